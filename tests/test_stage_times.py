"""Where the time of frames goes, from real cameras to histograms and traces; and counters that never fall."""

import itertools
import re
import time

import pytest
from psdiff.runtime.detector import backend_version
from psdiff.runtime.service import Service

pytest.importorskip("fastapi", reason="fastapi is not installed")
from test_service import TABLE, events_of, get, site_of, wait_for


def samples(site):
    """Sample -> value, of /metrics."""
    lines = [line for line in get(site, "/metrics").splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_metrics_tell_where_the_time_goes(serve, camera_files, run, tmp_path):
    url, _ = serve(*camera_files)
    site = site_of(tmp_path, {"gate": f"{url}/gate", "hall": f"{url}/hall"})
    service = run(site)
    wait_for(lambda: min(service.totals.frames[camera] for camera in ("gate", "hall")) >= 5)
    wait_for(lambda: service.cameras()[0]["time_source"] == "rtcp_sr")
    told = samples(site)
    counts = {
        name.split('"')[1]: value
        for name, value in told.items()
        if name.startswith("psdiff_frame_latency_seconds_count")
    }
    # Every stage of every frame; the counts are read while frames go through.
    assert set(counts) == {"decode", "queue", "preprocess", "backbone", "cdl", "post", "publish", "e2e"}
    assert min(counts.values()) >= 10
    assert max(counts.values()) - min(counts.values()) <= 2
    sums = {
        stage: told[f'psdiff_frame_latency_seconds_sum{{stage="{stage}"}}'] / count
        for stage, count in counts.items()
    }
    inside = sum(sums[stage] for stage in counts if stage != "e2e")
    # The way from the camera and the promise of arrival come on top.
    assert 0 < inside < sums["e2e"]
    assert told["psdiff_ddim_steps_count"] >= 10
    assert told["psdiff_ddim_steps_sum"] >= told["psdiff_ddim_steps_count"]
    assert 1 <= told["psdiff_batch_size_count"] <= told["psdiff_ddim_steps_count"]
    assert told["psdiff_batch_size_sum"] == pytest.approx(told["psdiff_ddim_steps_count"], abs=8)
    assert told['psdiff_camera_time_source_info{camera="gate",source="rtcp_sr"}'] == 1
    assert told['psdiff_camera_time_source_info{camera="gate",source="arrival"}'] == 0
    assert told['psdiff_events_published_total{sink="file"}'] >= 10
    assert told['psdiff_event_publish_errors_total{sink="file"}'] == 0
    assert told["psdiff_storage_free_bytes"] > 1e6
    assert told["psdiff_engine_verify_ok"] == 1
    [engine] = [name for name in told if name.startswith("psdiff_engine_info{")]
    assert f'engine="{backend_version("onnxruntime")}",model="fake"' in engine
    [build] = [name for name in told if name.startswith("psdiff_build_info{")]
    assert told[build] == 1


def test_counters_never_fall(serve, camera_files, run, tmp_path, monkeypatch):
    """Half of the batches fail; a camera is changed meanwhile."""
    url, _ = serve(*camera_files)
    site = site_of(tmp_path, {"gate": f"{url}/gate", "hall": f"{url}/hall"})
    service = run(site)
    detect, calls = service._loop._detect, []

    def sometimes(frames, steps):
        calls.append(steps)
        if len(calls) % 2:
            # Long enough to be seen under way.
            time.sleep(0.15)
            raise RuntimeError("the device is out of memory")
        return detect(frames, steps)

    service._loop._detect = sometimes
    before, falls, rounds = {}, [], 0

    def go_on():
        nonlocal before, rounds
        now = samples(site)
        falls.extend(
            (name, value, now.get(name, 0.0))
            for name, value in before.items()
            if re.search(r"_(total|count|sum|bucket)(\{|$)", name) and now.get(name, 0.0) < value
        )
        before, rounds = now, rounds + 1
        if rounds == 20:
            camera = site.cameras[1].model_copy(update={"sample_fps": 4.0})
            changed = site.model_copy(update={"cameras": (site.cameras[0], camera)})
            assert service.apply(changed).changed == ("hall",)
        time.sleep(0.05)
        return rounds > 30 and service.cameras()[1]["dropped"].get("failed", 0) >= 3

    wait_for(go_on)
    assert falls == []


def test_without_an_engine_in_the_process_inference_is_one_stage(
    serve, camera_files, detector, manifest, tmp_path
):
    class Remote:
        settings = detector.settings

        def detect(self, frames, steps=4, seeds=None):
            return detector.detect(frames, steps, seeds)

    url, _ = serve(camera_files[0])
    service = Service(site_of(tmp_path, {"gate": f"{url}/gate"}), manifest, Remote(), TABLE)
    records = []
    service.observers.append(records.append)
    service.start()
    wait_for(lambda: len(records) >= 2)
    assert service.stop(8)
    names = [stage.name for stage in records[-1].stages]
    assert names == ["decode", "queue", "infer", "publish"]
    for earlier, later in itertools.pairwise(records[-1].stages):
        assert earlier.start_s <= earlier.end_s <= later.end_s


def test_frames_that_are_traced_carry_their_trace_in_the_event(
    serve, camera_files, detector, manifest, tmp_path
):
    pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from psdiff.runtime.traces import FrameTracer

    exporter = InMemorySpanExporter()
    url, _ = serve(camera_files[0])
    tracer = FrameTracer(3, SimpleSpanProcessor(exporter))
    service = Service(site_of(tmp_path, {"gate": f"{url}/gate"}), manifest, detector, TABLE, tracer)
    service.start()
    wait_for(lambda: service.totals.frames["gate"] >= 8)
    assert service.stop(8)
    frames = {
        span.attributes["psdiff.frame_seq"]: span for span in exporter.get_finished_spans() if not span.parent
    }
    assert len(frames) >= 3
    # What tells of the end of a track belongs to no one frame.
    events = [event for event in events_of(tmp_path) if event["type"] == "psdiff.detection.v1"]
    assert len([event for event in events if "trace_id" in event["data"]]) >= 2
    for event in events:
        data = event["data"]
        traced = frames.get(data["frame_seq"])
        assert data.get("trace_id") == (traced and f"{traced.context.trace_id:032x}")
    stages = [span for span in exporter.get_finished_spans() if span.parent]
    assert len(stages) == 7 * len(frames)
