"""Traces of frames: one in so many, a span a stage, by OpenTelemetry's own rules."""

import gzip
import os
import subprocess
import sys
import time
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from psdiff.runtime.stage_times import FrameRecord, Stage
from psdiff.runtime.traces import FrameTracer, TraceError

pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed")
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

Frame = namedtuple("Frame", "camera seq")


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


def record(seq=0):
    names = ("decode", "queue", "preprocess", "backbone", "cdl", "post", "publish")
    stages = tuple(Stage(name, 100.0 + i, 100.5 + i) for i, name in enumerate(names))
    return FrameRecord("gate", seq, 2, 4, True, 3, stages, 0.25)


def traced(tracer, camera, count):
    ids = []
    for seq in range(count):
        trace = tracer.begin(Frame(camera, seq), 1_700_000_000.0)
        if trace is not None:
            ids.append((seq, trace.trace_id))
            tracer.end(trace, record(seq))
    return ids


def test_a_trace_is_a_frame_with_a_span_a_stage(exporter):
    tracer = FrameTracer(1, SimpleSpanProcessor(exporter))
    [(_, trace_id)] = traced(tracer, "gate", 1)
    *stages, frame = exporter.get_finished_spans()
    assert [span.name for span in stages] == [stage.name for stage in record().stages]
    assert frame.name == "frame"
    assert frame.parent is None
    assert f"{frame.context.trace_id:032x}" == trace_id
    assert {span.parent.span_id for span in stages} == {frame.context.span_id}
    assert frame.attributes["psdiff.camera"] == "gate"
    assert frame.attributes["psdiff.steps"] == 2
    assert frame.start_time == 1_700_000_000 * 10**9
    assert frame.end_time == stages[-1].end_time
    for span, stage in zip(stages, record().stages, strict=True):
        assert span.end_time - span.start_time == pytest.approx(stage.seconds * 1e9, abs=1000)


def test_each_camera_has_its_first_frame_and_one_in_so_many(exporter):
    tracer = FrameTracer(100, SimpleSpanProcessor(exporter))
    assert [seq for seq, _ in traced(tracer, "gate", 250)] == [0, 100, 200]
    assert [seq for seq, _ in traced(tracer, "hall", 50)] == [0]


def test_the_sampler_of_the_environment_may_say_no(exporter, monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    tracer = FrameTracer(1, SimpleSpanProcessor(exporter))
    assert traced(tracer, "gate", 3) == []


def test_the_name_of_the_service_is_that_of_the_environment(exporter, monkeypatch):
    FrameTracer(1, SimpleSpanProcessor(exporter))
    traced(FrameTracer(1, SimpleSpanProcessor(exporter)), "gate", 1)
    assert exporter.get_finished_spans()[-1].resource.attributes["service.name"] == "psdiff"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "hq")
    traced(FrameTracer(1, SimpleSpanProcessor(exporter)), "gate", 1)
    assert exporter.get_finished_spans()[-1].resource.attributes["service.name"] == "hq"


def test_the_exporter_of_the_environment_is_taken():
    """A program of its own: the exporter writes to the standard output that it finds when it is loaded."""
    code = (
        "from types import SimpleNamespace\n"
        "from psdiff.runtime.traces import FrameTracer\n"
        "tracer = FrameTracer(1)\n"
        "trace = tracer.begin(SimpleNamespace(camera='gate', seq=0), 1.0)\n"
        "trace.span.end()\n"
        "tracer._provider.force_flush()\n"
        "tracer.close()\n"
        "print('id', trace.trace_id)"
    )
    environment = os.environ | {"OTEL_TRACES_EXPORTER": "console"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    spans, _, trace_id = result.stdout.rpartition("id ")
    assert f'"trace_id": "0x{trace_id.strip()}"' in spans, result.stderr


@pytest.fixture
def collector():
    """What a collector of OpenTelemetry hears over HTTP: its address, and the path and body of each request."""
    heard = []

    class Hear(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            is_packed = self.headers.get("Content-Encoding") == "gzip"
            heard.append((self.path, gzip.decompress(body) if is_packed else body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hear)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", heard
    server.shutdown()
    server.server_close()


def test_a_collector_hears_of_the_frames_when_the_service_ends(collector, monkeypatch):
    """By the exporter of psdiff[traces], in OTLP over HTTP, without another setting than the address."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    address, heard = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
    tracer = FrameTracer(1)
    ids = traced(tracer, "gate", 3)
    tracer.close()
    deadline_s = time.monotonic() + 20
    while not heard and time.monotonic() < deadline_s:
        time.sleep(0.05)
    [(path, body)] = heard
    assert path == "/v1/traces"
    [resource] = ExportTraceServiceRequest.FromString(body).resource_spans
    assert {each.key: each.value.string_value for each in resource.resource.attributes}[
        "service.name"
    ] == "psdiff"
    spans = [span for scope in resource.scope_spans for span in scope.spans]
    frames = [span for span in spans if span.name == "frame"]
    assert [span.trace_id.hex() for span in frames] == [trace_id for _, trace_id in ids]
    assert len(spans) == 3 * (1 + len(record().stages))


def test_an_exporter_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "pigeons")
    with pytest.raises(
        TraceError, match="OTEL_TRACES_EXPORTER must be installed, got pigeons; installed are"
    ):
        FrameTracer(1)


def test_without_the_package_the_start_says_what_to_install(tmp_path):
    """The program itself, in an interpreter that finds no OpenTelemetry."""
    (tmp_path / "site.yaml").write_text("trace: {sample_every: 100}\n")
    code = (
        "import sys; sys.modules['opentelemetry.sdk'] = None\n"
        "from psdiff.__main__ import app; app(['serve', '-c', 'site.yaml'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2, result.stderr
    assert "trace.sample_every must be null without OpenTelemetry" in result.stderr
    assert "pip install psdiff[traces]" in result.stderr
