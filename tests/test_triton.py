"""psdiff behind a real tritonserver: the same people as here, and what happens when things go wrong."""

import json
import re
import threading
import time
import urllib.error
import urllib.request
from multiprocessing import shared_memory
from pathlib import Path

import numpy as np
import psdiff
import pytest
import triton_server
import yaml
from psdiff.bundle import BundleError, load_manifest
from psdiff.models.detections import box_iou
from psdiff.models.preprocess import seeded_noise
from psdiff.runtime.detector import open_detector, settings_of
from psdiff.runtime.triton_detector import ServerBusyError, ServerError, TritonDetector
from psdiff.training.synthetic.clips import write_clip
from psdiff.training.synthetic.street import Street
from typer.testing import CliRunner

pytest.importorskip("tritonclient", reason="tritonclient is not installed")
if triton_server.missing():
    pytest.skip(triton_server.missing(), allow_module_level=True)

from psdiff.__main__ import app
from psdiff.export.triton_config import RepositoryOptions
from psdiff.export.triton_repository import write_repository
from psdiff.runtime.detector import shipped_bundle
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

DEPLOY = Path(psdiff.__file__).resolve().parent / "deploy"
BUNDLE = shipped_bundle()
MANIFEST = load_manifest(BUNDLE)
SETTINGS = settings_of(MANIFEST)
CANVAS = (MANIFEST.height, MANIFEST.width, 3)


@pytest.fixture(scope="module")
def street():
    return Street(77, num_people=6, duration_s=5.0)


@pytest.fixture(scope="module")
def frames(street):
    """Frames of two cameras, and one of another size."""
    pictures = [street.frame(camera, time_s).image for camera, time_s in ((0, 2.5), (1, 2.5), (0, 1.0))]
    return [*pictures, np.ascontiguousarray(pictures[0][:300, :500])]


@pytest.fixture(scope="module")
def local():
    return open_detector(BUNDLE, threads=1)


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """Start a server over a repository written with the given options."""
    servers = []

    def start(options=None, bundle=BUNDLE, flags=()):
        folder = tmp_path_factory.mktemp("triton")
        # A machine that runs other tests beside this one must not time requests out.
        options = options or RepositoryOptions(threads=1, queue_timeout_ms=20_000)
        write_repository(bundle, folder / "models", options)
        servers.append(triton_server.TritonServer(folder / "models", folder / "log", flags))
        return servers[-1].start()

    yield start
    for server in servers:
        server.kill()


@pytest.fixture(scope="module")
def server(serve):
    """Started with the options of deploy/compose.yaml."""
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    return serve(flags=[flag for flag in services["triton"]["command"] if "=/models" not in flag])


@pytest.fixture
def connect():
    """Open detectors that are closed at the end."""
    opened = []

    def to(server, **options):
        opened.append(TritonDetector(server.url, SETTINGS, BUNDLE, **options))
        return opened[-1]

    yield to
    for detector in opened:
        detector.close()


@pytest.fixture
def remote(server, connect):
    return connect(server)


def assert_same(got, wanted):
    """The people of two lists, one a frame, within half a pixel and a cosine of 0.999."""
    assert sum(map(len, wanted)) > 0
    for one, other in zip(got, wanted, strict=True):
        assert len(one) == len(other)
        np.testing.assert_allclose(one.boxes_xyxy, other.boxes_xyxy, atol=0.5)
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-3)
        assert ((one.embeddings * other.embeddings).sum(1) >= 0.999).all()


def metrics(server):
    return urllib.request.urlopen(f"http://127.0.0.1:{server.metrics}/metrics", timeout=5).read().decode()


def metric(server, name):
    lines = [line for line in metrics(server).splitlines() if line.startswith(f"{name}{{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def status(server, path):
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{server.http}/v2/{path}", timeout=5).status
    except urllib.error.HTTPError as error:
        return error.code


def tensor(name, array):
    kinds = {"uint8": "UINT8", "float32": "FP32", "int32": "INT32", "int64": "INT64"}
    made = InferInput(name, list(array.shape), kinds[str(array.dtype)])
    made.set_data_from_numpy(array)
    return made


def ask(server, arrays, **options):
    with InferenceServerClient(server.url) as client:
        inputs = [tensor(name, array) for name, array in arrays.items()]
        return client.infer("psdiff", inputs, client_timeout=20, **options)


# The same people


@pytest.mark.parametrize("steps", range(1, 9))
def test_a_batch_has_the_people_that_are_found_here(remote, local, frames, steps):
    seeds = list(range(len(frames)))
    assert_same(remote.detect(frames, steps, seeds), local.detect(frames, steps, seeds))


def test_images_of_one_request_are_a_batch_too(server, local, frames):
    images = np.stack([local_canvas(frame) for frame in frames[:3]])
    answer = ask(server, {"image": images}, parameters={"steps": 2, "seed": 4})
    alone = [ask(server, {"image": image[None]}, parameters={"steps": 2, "seed": 4}) for image in images]
    for i, each in enumerate(alone):
        num = answer.as_numpy("num")[i, 0]
        assert num == each.as_numpy("num")[0, 0] > 0
        for name in ("boxes_xyxy", "scores", "embeddings"):
            np.testing.assert_allclose(
                answer.as_numpy(name)[i, :num], each.as_numpy(name)[0, :num], rtol=1e-3, atol=1e-3
            )


def local_canvas(frame):
    from psdiff.models.detector import canvas_of

    return canvas_of(frame, SETTINGS).image


def test_a_given_box_is_described_as_here(remote, local, frames):
    [people] = local.detect(frames[:1], 2)
    boxes = people.boxes_xyxy[:3]
    got, wanted = (detector.embed(frames[0], boxes, 2, 5) for detector in (remote, local))
    assert ((got * wanted).sum(1) >= 0.999).all()
    assert remote.embed(frames[0], np.zeros((0, 4)), 2).shape == (0, MANIFEST.embedding_dim)


def test_a_start_of_the_seeds_noise_is_the_seed(server, frames):
    image = local_canvas(frames[0])[None]
    noise = seeded_noise(6, MANIFEST.num_proposals, MANIFEST.embedding_dim)
    seeded = ask(server, {"image": image}, parameters={"steps": 2, "seed": 6})
    start = {"boxes_t": noise[0][None], "emb_t": noise[1][None]}
    given = ask(server, {"image": image, **start}, parameters={"steps": 2})
    np.testing.assert_array_equal(seeded.as_numpy("boxes_xyxy"), given.as_numpy("boxes_xyxy"))


def test_the_person_asked_for_is_the_most_similar(server, local, frames):
    [people] = local.detect([local_canvas(frames[0])], 2)
    query = people.embeddings[1]
    answer = ask(
        server, {"image": local_canvas(frames[0])[None], "query": query[None]}, parameters={"steps": 2}
    )
    similarity = answer.as_numpy("similarity")[0]
    best = answer.as_numpy("boxes_xyxy")[:1, similarity.argmax()]
    assert box_iou(best, people.boxes_xyxy[people.similarity(query).argmax()][None])[0, 0] > 0.9


def test_two_clients_at_once(server, connect, local, frames):
    wanted = {steps: local.detect(frames, steps) for steps in (1, 2)}
    got = {}

    def work(steps):
        detector = connect(server)
        got[steps] = [detector.detect(frames, steps) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(steps,)) for steps in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for steps, people in wanted.items():
        for each in got[steps]:
            assert_same(each, people)


@pytest.mark.parametrize("shared", [True, False])
def test_images_travel_through_shared_memory_or_in_the_request(server, connect, local, frames, shared):
    detector = connect(server, shared_memory=shared)
    # The region grows with the batch.
    for count in (1, 4, 2):
        assert_same(detector.detect(frames[:count], 2), local.detect(frames[:count], 2))
        assert detector._images.is_shared == shared


def test_shared_memory_is_given_back(server, connect, frames):
    detector = connect(server, shared_memory=True)
    detector.detect(frames[:1], 1)
    name = detector._images._name
    with InferenceServerClient(server.url) as client:
        assert name in client.get_system_shared_memory_status(as_json=True)["regions"]
        detector.close()
        assert name not in client.get_system_shared_memory_status(as_json=True).get("regions", {})
    with pytest.raises(FileNotFoundError):
        shared_memory.SharedMemory(name)


def test_a_server_that_allows_no_shared_memory_is_sent_the_images(server, connect, frames, monkeypatch):
    detector = connect(server, shared_memory=True)

    def refuse(*args, **kwargs):
        raise InferenceServerException("not supported", status="StatusCode.UNIMPLEMENTED")

    monkeypatch.setattr(detector._client, "register_system_shared_memory", refuse)
    assert len(detector.detect(frames[:1], 2)[0]) > 0
    assert not detector._images.is_shared


# Health, metrics


def test_health_and_configuration(server):
    assert status(server, "health/live") == status(server, "health/ready") == 200
    assert status(server, "models/psdiff/ready") == 200
    with urllib.request.urlopen(
        f"http://127.0.0.1:{server.http}/v2/models/psdiff/config", timeout=5
    ) as reply:
        config = json.load(reply)
    assert config["max_batch_size"] == 8
    assert [int(size) for size in config["input"][0]["dims"]] == list(CANVAS)


def test_metrics_count_what_was_done(server, remote, frames):
    names = [f"psdiff_{name}_total" for name in ("images", "steps", "people", "execute_seconds")]
    before = [metric(server, name) for name in names]
    people = remote.detect(frames[:2], 4)
    images, steps, found, seconds = (metric(server, name) - b for name, b in zip(names, before, strict=True))
    assert (images, steps, found) == (2, 8, sum(map(len, people)))
    assert 0 < seconds < 20


def test_what_the_dashboard_shows_is_measured(server, remote, frames):
    """Rejected requests alone are missing: this server has none, and tells of a reason when there is one."""
    remote.detect(frames[:1], 1)
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "psdiff.json").read_text())
    shown = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\b(?:psdiff|nv)_\w+", target["expr"])
    }
    measured = {line.split()[2] for line in metrics(server).splitlines() if line.startswith("# TYPE")}
    assert len(shown) > 8
    assert shown <= measured


# Faults


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": np.zeros((1, 100, 100, 3), np.uint8)}, "unexpected shape for input 'image'"),
        ({"image": np.zeros((1, *CANVAS), np.float32)}, "data-type"),
        ({"image": np.zeros((9, *CANVAS), np.uint8)}, "batch-size must be <= 8"),
        ({"query": np.zeros((1, 5), np.float32)}, "expected 1 inputs|unexpected shape|missing input"),
        (
            {"image": np.zeros((1, *CANVAS), np.uint8), "given_boxes": np.zeros((1, 99, 4), np.float32)},
            "given_boxes must be 1 to 62 an image, got 99",
        ),
    ],
)
def test_wrong_inputs_are_refused_and_the_server_goes_on(server, remote, frames, arrays, message):
    with pytest.raises(InferenceServerException, match=message):
        ask(server, arrays)
    assert len(remote.detect(frames[:1], 2)[0]) > 0


def test_a_wrong_parameter_is_counted_as_refused(server):
    before = metric(server, "psdiff_refused_total")
    with pytest.raises(InferenceServerException, match="steps must be a whole number from 1 to 16, got 99"):
        ask(server, {"image": np.zeros((1, *CANVAS), np.uint8)}, parameters={"steps": 99})
    assert metric(server, "psdiff_refused_total") == before + 1


def test_a_request_that_is_cancelled_ends_between_two_steps(server):
    """Eight images of eight steps take a second or more; they are left after the first ones."""
    before = metric(server, "psdiff_cancelled_total"), metric(server, "psdiff_steps_total")
    spent = metric(server, "psdiff_execute_seconds_total")
    images = np.zeros((8, *CANVAS), np.uint8)
    began = time.perf_counter()
    ask(server, {"image": images}, parameters={"steps": 8})
    whole_s = time.perf_counter() - began
    spent_whole = metric(server, "psdiff_execute_seconds_total") - spent
    errors = []
    with InferenceServerClient(server.url) as client:
        call = client.async_infer(
            "psdiff",
            [tensor("image", images)],
            lambda result, error: errors.append(error),
            parameters={"steps": 8},
        )
        time.sleep(whole_s / 3)
        call.cancel()
        wait_for(lambda: metric(server, "psdiff_cancelled_total") == before[0] + 1)
    assert "CANCELLED" in str(errors[0].status())
    assert metric(server, "psdiff_steps_total") == before[1] + 64  # those of the first request alone
    assert metric(server, "psdiff_execute_seconds_total") - spent - spent_whole < 0.8 * spent_whole


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_deadline_is_kept(server, connect, frames):
    detector = connect(server, deadline_s=0.02)
    began = time.monotonic()
    with pytest.raises(ServerError, match=r"must answer within 0.02 s, got no answer") as caught:
        detector.detect(frames * 2, 8)
    assert not isinstance(caught.value, ServerBusyError)
    assert time.monotonic() - began < 2


def test_a_full_queue_is_told_at_once(serve, connect, frames):
    server = serve(RepositoryOptions(threads=1, max_batch=1, queue_size=1))
    detector, patient = connect(server), connect(server, waits_when_busy=True)
    began = time.monotonic()
    with pytest.raises(ServerBusyError, match=r"must have room in its queue, got: .*send fewer frames"):
        detector.detect(frames * 3, 8)
    assert time.monotonic() - began < 5
    assert len(patient.detect(frames[:1], 2)[0]) > 0


def test_a_server_that_is_killed_and_restarted_goes_on_mid_stream(serve, connect, local, frames):
    server = serve()
    detector = connect(server, shared_memory=True)
    wanted = local.detect(frames[:2], 2)
    assert_same(detector.detect(frames[:2], 2), wanted)
    server.kill()
    threading.Timer(1.0, server.start).start()
    began = time.monotonic()
    assert_same(detector.detect(frames[:2], 2), wanted)
    assert 1.0 < time.monotonic() - began < 30
    assert detector._images.is_shared  # registered again with the new server
    assert_same(detector.detect(frames[:2], 2), wanted)


def test_a_server_that_stays_away_is_an_error_in_time(connect):
    away = triton_server.TritonServer(None, None)
    began = time.monotonic()
    with pytest.raises(ServerError, match=r"must serve the model psdiff.*is tritonserver running"):
        connect(away, patience_s=1.0)
    assert time.monotonic() - began < 8


def test_a_server_of_another_bundle_is_refused(server, small_bundle):
    settings = settings_of(load_manifest(small_bundle))
    with pytest.raises(BundleError, match=r"bundle must be the one that .* serves, .*give the same --bundle"):
        TritonDetector(server.url, settings, small_bundle)


def test_an_altered_bundle_is_not_served(tmp_path):
    write_repository(BUNDLE, tmp_path / "models")
    graph = tmp_path / "models" / "psdiff" / "1" / "bundle" / "denoise_step.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    server = triton_server.TritonServer(tmp_path / "models", tmp_path / "log").start(wait=False)
    try:
        assert server.ended() != 0
    finally:
        server.kill()
    assert "denoise_step.onnx must have SHA-256" in server.log.read_text()


# The command line


def test_run_finds_the_same_through_a_server(server, street, tmp_path):
    write_clip(street, 0, tmp_path / "a.mp4", fps=4)
    events = {}
    for backend in ("onnxruntime", "triton"):
        out = tmp_path / backend
        options = ["--backend", backend, "--server", server.url, "--steps", "2", "--out", str(out)]
        result = CliRunner().invoke(app, ["run", str(tmp_path / "a.mp4"), *options])
        assert result.exit_code == 0, result.output
        events[backend] = [
            json.loads(line)["data"] for line in (out / "events.jsonl").read_text().splitlines()
        ]
    assert len(events["triton"]) == len(events["onnxruntime"]) > 5
    for one, other in zip(events["triton"], events["onnxruntime"], strict=True):
        np.testing.assert_allclose(one["det"]["box"], other["det"]["box"], atol=0.5)


def test_open_detector_asks_a_server(server, frames):
    detector = open_detector(backend="triton", server=server.url)
    assert len(detector.detect(frames[:1], 2)[0]) > 0
    detector.close()


class EmptyAnswer:
    """What tritonclient makes of the answer of a Python backend that cannot read arrays of NumPy 2."""

    def as_numpy(self, name):
        raise ValueError("cannot reshape array of size 0 into shape (1,1)")


def test_an_answer_without_bytes_says_what_to_do(remote):
    with pytest.raises(ServerError, match="a server from before NumPy 2 needs numpy < 2 beside psdiff"):
        remote._detections(EmptyAnswer())
