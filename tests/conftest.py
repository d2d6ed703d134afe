"""Shared fixtures: small scenes and videos, a fake engine that finds bright rectangles, the footage folder.

The fake engine stands behind the real Detector, so letterbox, noise, NMS and pinned boxes are the real ones.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from filelock import FileLock
from psdiff.bundle import BACKBONE, DENOISE_STEP, REFERENCE, Manifest, file_sha256, write_manifest
from psdiff.models.detector import Detector
from psdiff.models.sampling import SamplerSettings, StepOutput
from psdiff.models.verification import reference_arrays
from psdiff.runtime import detector as detector_module
from psdiff.runtime.detector import OnnxEngine
from psdiff.runtime.soak import rtsp_server

RED, GREEN, BLUE, YELLOW = (235, 40, 40), (40, 235, 40), (40, 40, 235), (235, 235, 40)
EMBEDDING_DIM = 3


def pytest_collection_modifyitems(items):
    """Files with slow tests first: workers that take file by file then end at about the same time.

    Before them one that needs the small bundle, and behind them all others that do: nobody waits for who makes it.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    waiting = [item.path for item in items if "small_bundle" in item.fixturenames]
    ranks = dict.fromkeys(slow, 1) | dict.fromkeys(waiting, 2) | dict.fromkeys(waiting[:1], 0)
    items.sort(key=lambda item: ranks.get(item.path, 3))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What programs remember between runs goes to a folder of this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def scene(people=(), width=160, height=96):
    """A dark frame with one bright rectangle a person: ((x1, y1, x2, y2), colour)."""
    image = np.full((height, width, 3), 30, np.uint8)
    for (x1, y1, x2, y2), colour in people:
        image[y1:y2, x1:x2] = colour
    return image


def write_video(path, frames, fps=10, codec="libx264", metadata=None, options=None, container_options=None):
    """Encode RGB frames; the suffix chooses the container (.264 is raw Annex-B without timestamps)."""
    form = {"format": "h264"} if path.suffix == ".264" else {}
    with av.open(str(path), "w", options=container_options or {}, **form) as container:
        container.metadata.update(metadata or {})
        stream = container.add_stream(codec, rate=Fraction(fps), options=options or {"crf": "12", "g": "10"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def walk(count, colour=RED, start=10, width=160, height=96):
    """Frames in which a person walks to the right, two pixels a frame."""
    boxes = [(start + 2 * i, 20, start + 2 * i + 16, 60) for i in range(count)]
    return [scene([(box, colour)], width, height) for box in boxes]


class FakeEngine:
    """Find bright rectangles on the canvas; an embedding is the rectangle's colour around grey.

    A proposal that lies on a rectangle predicts it (so pinned boxes are described by what they hold);
    otherwise proposal i predicts rectangle i. Counts its backbone batches.
    """

    def __init__(self):
        self.batches = []

    def backbone(self, images):
        self.batches.append(len(images))
        return [images]

    def denoise_step(self, features, boxes_t, emb_t, t, t_next):
        found = [self._predict(image, boxes) for image, boxes in zip(features[0], boxes_t, strict=True)]
        predicted = (np.stack(part).astype(np.float32) for part in zip(*found, strict=True))
        return StepOutput(boxes_t * np.float32(0.5), emb_t, *predicted)

    def _predict(self, image, boxes_t):
        height, width = image.shape[:2]
        rectangles = bright_rectangles(image)
        count = len(boxes_t)
        boxes, scores = np.zeros((count, 4)), np.zeros(count)
        embeddings = np.tile(np.eye(EMBEDDING_DIM)[0], (count, 1))
        for i, signal in enumerate(boxes_t):
            chosen = self._rectangle_under(signal, rectangles, width, height)
            chosen = i if chosen is None else chosen
            if chosen < len(rectangles):
                x1, y1, x2, y2 = rectangles[chosen]
                boxes[i] = x1 / width, y1 / height, x2 / width, y2 / height
                colour = image[(y1 + y2) // 2, (x1 + x2) // 2].astype(float) - 128
                scores[i], embeddings[i] = 0.95 - 0.05 * chosen, colour / np.linalg.norm(colour)
        return boxes, scores, embeddings

    def _rectangle_under(self, signal, rectangles, width, height):
        cx, cy, w, h = (signal + 1) / 2 * [width, height, width, height]
        for k, (x1, y1, x2, y2) in enumerate(rectangles):
            across = min(cx + w / 2, x2) - max(cx - w / 2, x1)
            down = min(cy + h / 2, y2) - max(cy - h / 2, y1)
            if across > 0 and down > 0 and w > 0 and h > 0:
                overlap = across * down
                if overlap / (w * h + (x2 - x1) * (y2 - y1) - overlap) > 0.5:
                    return k
        return None


def bright_rectangles(image):
    """Boxes of the bright regions, from left to right; the letterbox padding (114) is not bright."""
    mask = (image.max(axis=2) > 170).astype(np.uint8)
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask)
    boxes = [(x, y, x + w, y + h) for x, y, w, h, area in stats[1:].tolist() if area > 20]
    return sorted(boxes)


def fake_manifest(files=None):
    return Manifest(
        model_id="fake",
        embedding_space="fake-colours",
        width=160,
        height=96,
        num_proposals=12,
        embedding_dim=EMBEDDING_DIM,
        box_scale=1.0,
        timesteps={1: [999], 2: [999, 499], 4: [999, 749, 499, 249]},
        default_steps=2,
        score_threshold=0.3,
        nms_iou=0.5,
        match_threshold=0.7,
        weight_precision="float32",
        model={},
        training={},
        tools={},
        files=files or {},
    )


def fake_detector_of(engine, manifest):
    settings = {name: getattr(manifest, name) for name in SamplerSettings.__dataclass_fields__}
    return Detector(engine, SamplerSettings(**settings))


def write_reference(folder, engine):
    """What a fake bundle is verified against: its own engine's outputs."""
    settings = fake_detector_of(engine, fake_manifest()).settings
    np.savez_compressed(folder / REFERENCE, **reference_arrays(engine, settings))


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Make what is expensive once a run: once(name, make) gives the folder that make(folder) filled.

    The first worker that asks makes it, the others wait. It belongs to all: copy it before you change anything.
    """
    base = tmp_path_factory.getbasetemp()
    # Workers have folders of their own inside the folder of the run.
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    shared.mkdir(exist_ok=True)

    def folder_of(name, make):
        folder, unfinished = shared / name, shared / f"{name}-unfinished"
        with FileLock(shared / f"{name}.lock"):
            if not folder.exists():
                # Of a worker that failed here.
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                make(unfinished)
                unfinished.rename(folder)
        return folder

    return folder_of


@pytest.fixture(scope="session")
def host_kernels(once):
    """The CUDA kernels, compiled for the CPU by g++ once a run."""
    kernels_on_host = pytest.importorskip("kernels_on_host", reason="torch is not installed")
    if kernels_on_host.missing_compiler():
        pytest.skip(kernels_on_host.missing_compiler())
    folder = once("kernels", kernels_on_host.build)
    return kernels_on_host.HostKernels(folder / kernels_on_host.LIBRARY)


@pytest.fixture
def manifest():
    return fake_manifest({"backbone.onnx": "ab" * 32})


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def detector(engine, manifest):
    """The real Detector over the fake engine."""
    return fake_detector_of(engine, manifest)


@pytest.fixture
def bundle_folder(tmp_path):
    """A bundle whose graphs are real, tiny ONNX files: enough to prove names, types and dynamic shapes."""
    pytest.importorskip("onnx", reason="onnx is not installed; it writes the tiny graphs of this test")
    folder = tmp_path / "bundle"
    folder.mkdir()
    write_tiny_graphs(folder)
    write_reference(folder, OnnxEngine(folder))
    files = {name: file_sha256(folder / name) for name in (BACKBONE, DENOISE_STEP, REFERENCE)}
    write_manifest(folder, fake_manifest(files))
    return folder


@pytest.fixture
def fake_bundle(tmp_path, monkeypatch):
    """A bundle with the fake engine instead of graphs; the manifest and its hashes are real."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "backbone.onnx").write_bytes(b"graph")
    write_reference(folder, FakeEngine())
    files = {name: file_sha256(folder / name) for name in ("backbone.onnx", REFERENCE)}
    write_manifest(folder, fake_manifest(files))
    monkeypatch.setattr(detector_module, "OnnxEngine", lambda folder, threads: FakeEngine())
    return folder


@pytest.fixture(scope="session")
def small_bundle(once):
    """The bundle of a small network with random weights, with every part that a network can have."""
    return once("export", export_small_bundle) / "small"


def export_small_bundle(folder):
    import torch
    from psdiff.export.export import export_bundle
    from psdiff.models.config import PSDiffConfig, load_preset
    from psdiff.models.person_search import PSDiff, save_checkpoint

    sizes = {"height": 128, "width": 192, "num_proposals": 12}
    parts = {"self_attention": "intra", "cross_attention": True, "dynamic_conv": True, "dynamic_dim": 8}
    config = PSDiffConfig.model_validate(load_preset("psdiff_mobile").model_dump() | sizes | parts)
    torch.manual_seed(0)
    model = PSDiff(config)
    # Random deltas throw boxes across the canvas, and over eight such steps rounding grows a thousandfold. A
    # trained layer moves them little: so does this one.
    with torch.no_grad():
        model.denoiser.heads.deltas.weight.mul_(0.1)
    save_checkpoint(model, folder / "model.safetensors", {"preset": "a test"})
    export_bundle(folder / "model.safetensors", folder / "small")


@pytest.fixture(scope="session")
def fp16_engines(once, small_bundle):
    """A copy of the small bundle with engines in it that tensorrt-rtx built: (bundle, plans/<target>, steps told)."""
    from psdiff.export.engines import EngineOptions, build_engines

    def build(folder):
        bundle, steps = shutil.copytree(small_bundle, folder / "bundle"), []
        options = EngineOptions(sm=86, precision="fp16", max_batch=3, max_proposals=20, unrolled=[1])
        build_engines(bundle, options, steps.append)
        (folder / "steps.txt").write_text("\n".join(steps), encoding="utf-8")

    folder = once("engines", build)
    [target] = (folder / "bundle" / "plans").iterdir()
    return folder / "bundle", target, (folder / "steps.txt").read_text(encoding="utf-8").splitlines()


RTSP_SERVER = Path(rtsp_server.__file__)
SYSTEM_PYTHON = "/usr/bin/python3"


@pytest.fixture
def serve():
    """Start GStreamer's RTSP server over files; gives rtsp://127.0.0.1:PORT and the server's process."""
    if not shutil.which(SYSTEM_PYTHON):
        pytest.skip(f"{SYSTEM_PYTHON} is not there; it runs the RTSP server")
    processes = []

    def start(*files, options=(), port=0):
        command = [SYSTEM_PYTHON, RTSP_SERVER, "--port", str(port), *options, *files]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        processes.append(process)
        word, _, rest = process.stdout.readline().strip().partition(" ")
        if word == "missing":
            pytest.skip(f"the RTSP server needs the Debian package {rest}")
        assert word == "ready"
        return f"rtsp://127.0.0.1:{rest}", process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def camera_files(tmp_path_factory):
    """Two cameras; somebody red walks through the one, somebody green through the other."""
    folder = tmp_path_factory.mktemp("cameras")
    options = {"crf": "20", "g": "5", "bf": "0"}
    return [
        write_video(folder / "gate.mp4", walk(150), fps=15, options=options),
        write_video(folder / "hall.mp4", walk(150, colour=GREEN, start=20), fps=15, options=options),
    ]


@pytest.fixture
def run(detector, manifest):
    """Start services that are stopped at the end, each with its HTTP server."""
    pytest.importorskip("fastapi", reason="fastapi is not installed")
    from psdiff.runtime.elastic_steps import CostTable
    from psdiff.runtime.service import Service
    from psdiff.runtime.service_api import HttpServer

    table, started = CostTable({(1, 1): 0.005, (4, 1): 0.01}), []

    def start(site):
        service = Service(site, manifest, detector, table)
        http = HttpServer(service, site.api.listen)
        http.start()
        service.start()
        started.append((service, http))
        return service

    yield start
    for service, http in started:
        assert service.stop(10)
        http.stop()


def write_tiny_graphs(folder):
    """backbone: four strided views of the image. denoise_step: box i lies around emb_t's first value."""
    from onnx import TensorProto, checker, helper, numpy_helper, save

    def value(name, kind, shape):
        return helper.make_tensor_value_info(name, kind, shape)

    def constant(name, array):
        return numpy_helper.from_array(np.asarray(array), name)

    def save_graph(path, nodes, inputs, outputs, constants):
        graph = helper.make_graph(nodes, path.stem, inputs, outputs, constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        checker.check_model(model)
        save(model, path)

    floats, pyramid = TensorProto.FLOAT, ("p2", "p3", "p4", "p5")
    image = value("image", TensorProto.UINT8, ["B", "H", "W", 3])
    save_graph(
        folder / BACKBONE,
        [
            helper.make_node("Cast", ["image"], ["floats"], to=floats),
            helper.make_node("Transpose", ["floats"], ["channels_first"], perm=[0, 3, 1, 2]),
            *(
                helper.make_node(
                    "AveragePool", ["channels_first"], [name], kernel_shape=[s, s], strides=[s, s]
                )
                for name, s in zip(pyramid, (4, 8, 16, 32), strict=True)
            ),
        ],
        [image],
        [value(name, floats, ["B", 3, f"H{name}", f"W{name}"]) for name in pyramid],
        [],
    )
    times = [value(name, TensorProto.INT64, ["B"]) for name in ("t", "t_next")]
    boxes, emb = ["B", "N", 4], ["B", "N", EMBEDDING_DIM]
    save_graph(
        folder / DENOISE_STEP,
        [
            helper.make_node("Mul", ["boxes_t", "half"], ["boxes_next"]),
            helper.make_node("Identity", ["emb_t"], ["emb_next"]),
            # Brightness of the frame decides the score: a black frame holds nobody.
            helper.make_node("ReduceMax", ["p5", "rows_columns"], ["peaks"], keepdims=0),
            helper.make_node("ReduceMax", ["peaks", "channels"], ["peak"], keepdims=1),
            helper.make_node("Div", ["peak", "white"], ["share"]),
            helper.make_node("ReduceMean", ["boxes_t", "last"], ["mean"], keepdims=0),
            helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
            helper.make_node("Add", ["nothing", "share"], ["scores"]),
            helper.make_node("Mul", ["boxes_t", "zero"], ["no_boxes"]),
            helper.make_node("Add", ["no_boxes", "middle"], ["boxes_xyxy"]),
            helper.make_node("LpNormalization", ["emb_t"], ["embeddings"], axis=-1, p=2),
        ],
        [
            *(value(name, floats, ["B", 3, f"H{name}", f"W{name}"]) for name in pyramid),
            value("boxes_t", floats, boxes),
            value("emb_t", floats, emb),
            *times,
        ],
        [
            value("boxes_next", floats, boxes),
            value("emb_next", floats, emb),
            value("boxes_xyxy", floats, boxes),
            value("scores", floats, ["B", "N"]),
            value("embeddings", floats, emb),
        ],
        [
            constant("half", np.float32(0.5)),
            constant("white", np.float32(255)),
            constant("zero", np.float32(0)),
            constant("last", np.array([2], np.int64)),
            constant("rows_columns", np.array([2, 3], np.int64)),
            constant("channels", np.array([1], np.int64)),
            constant("middle", np.array([0.25, 0.25, 0.5, 0.75], np.float32)),
        ],
    )


FOOTAGE = Path(os.environ.get("PSDIFF_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture
def footage():
    """Path of a file in the footage folder given by PSDIFF_DATA, default ../shared/data; skips without it."""

    def path_of(name):
        path = FOOTAGE / name
        if not path.exists():
            pytest.skip(f"footage {name} is not in {FOOTAGE}; set PSDIFF_DATA")
        return path

    return path_of


@pytest.fixture
def shipped():
    """The shipped bundle's folder; skips while the package holds none."""
    from psdiff.runtime.detector import shipped_bundle

    folder = shipped_bundle()
    if not folder.is_dir():
        pytest.skip(f"the shipped bundle is not in {folder}")
    return folder
