"""TensorRT as a backend: which engines are taken, what is refused, and what moves between host and device.

There is no GPU here. TensorRT-RTX builds real plans and sidecars, and tensorrt_on_host.py stands in for running them;
the tests marked gpu run the real thing where there is one.
"""

import hashlib
import importlib.util
import json
import shutil

import numpy as np
import onnxruntime as ort
import pytest
from psdiff.bundle import BundleError, graph_file, load_manifest
from psdiff.kernels.driver import CudaError, DriverNotFoundError
from psdiff.kernels.launch import open_driver
from psdiff.models.preprocess import seeded_noise
from psdiff.models.sampling import STEP_INPUTS, StepOutput, denoise
from psdiff.models.verification import Tolerance, compare
from psdiff.plans import Device, choose_plans, sidecars_sha256
from psdiff.runtime import tensorrt_engine
from psdiff.runtime.detector import open_detector
from psdiff.runtime.tensorrt_engine import TensorRtEngine, device_of, tensorrt_module
from psdiff.runtime.tensorrt_network import MemoryPool, num_bytes, profile_for
from psdiff.runtime.verified import verify

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
from psdiff.export.engines import EngineOptions, build_engines
from psdiff.export.tensorrt_plan import RTX
from tensorrt_on_host import STREAM, HostDriver, stand_in

SM = 86


def gpu_is_missing():
    try:
        open_driver()
    except (DriverNotFoundError, CudaError) as error:
        return str(error)
    return ""


NO_GPU = gpu_is_missing()
NO_TENSORRT = (
    "" if importlib.util.find_spec("tensorrt") else "tensorrt is not installed: pip install tensorrt"
)


@pytest.fixture(scope="module", params=["fp16", "fp32"])
def built(request, small_bundle, tmp_path_factory):
    """A bundle with engines of one precision, as tensorrt-rtx builds them: (bundle, plans/<target>)."""
    if request.param == "fp16":
        return request.getfixturevalue("fp16_engines")[:2]
    bundle = shutil.copytree(small_bundle, tmp_path_factory.mktemp("engines") / "bundle")
    options = EngineOptions(SM, request.param, max_batch=3, max_proposals=20, unrolled=[])
    return bundle, build_engines(bundle, options)


@pytest.fixture
def bundle(built, tmp_path):
    """A copy to spoil: (bundle, plans/<target>)."""
    copy = shutil.copytree(built[0], tmp_path / "bundle")
    return copy, copy / "plans" / built[1].name


def version():
    return tensorrt_module().__version__


def open_engine(bundle, target, driver=None, **changes):
    trt = stand_in(bundle, target, version(), **changes)
    return TensorRtEngine(bundle, load_manifest(bundle), trt=trt, driver=driver or HostDriver()), trt.seen


def images_of(count):
    return np.random.default_rng(0).integers(0, 255, (count, 128, 192, 3), dtype=np.uint8)


def start(images, proposals=12):
    noise = [seeded_noise(seed, proposals, 64) for seed in range(images)]
    return [np.stack(part) for part in zip(*noise, strict=True)]


class GraphEngine:
    """The graphs of a precision in onnxruntime."""

    def __init__(self, bundle, precision):
        options = ort.SessionOptions()
        options.log_severity_level = 4
        self.sessions = [
            ort.InferenceSession(
                bundle / graph_file(part, precision), options, providers=["CPUExecutionProvider"]
            )
            for part in ("backbone", "denoise_step")
        ]

    def backbone(self, images):
        return self.sessions[0].run(None, {"image": images})

    def denoise_step(self, *inputs):
        features, *rest = inputs
        named = dict(zip(STEP_INPUTS, [*features, *rest], strict=True))
        return StepOutput(*self.sessions[1].run(list(StepOutput._fields), named))


# ---- what moves ----


@pytest.mark.parametrize(("images", "proposals"), [(1, 12), (1, 5), (3, 20)])
def test_a_loop_over_the_engines_is_a_loop_over_their_graphs(built, images, proposals):
    bundle, target = built
    engine, seen = open_engine(bundle, target)
    precision = json.loads((target / "engines.json").read_text())["precision"]
    outputs = [
        denoise(each, each.backbone(images_of(images)), *start(images, proposals), [999, 420, 14])
        for each in (engine, GraphEngine(bundle, precision))
    ]
    for got, wanted in zip(*outputs, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert seen.streams == {STREAM}


def test_a_bundle_proves_itself_on_its_engines(built):
    bundle, target = built
    engine, _ = open_engine(bundle, target)
    manifest = load_manifest(bundle)
    settings = open_detector(bundle).settings
    with np.load(bundle / "reference.npz") as reference:
        comparisons = compare(engine, reference, settings, Tolerance())
    assert [each.steps for each in comparisons] == [1, 2, 4, 8]
    assert all(each.matched >= 0.98 for each in comparisons)
    assert manifest.num_proposals == 12


def test_features_of_two_frames_do_not_share_memory(built):
    engine, _ = open_engine(*built)
    states, times = start(1), (np.array([420]), np.array([14]))
    first = engine.backbone(images_of(1))
    wanted = engine.denoise_step(first, *states, *times)
    second = engine.backbone(255 - images_of(1))
    again = engine.denoise_step(first, *states, *times)
    np.testing.assert_array_equal(wanted.boxes_xyxy, again.boxes_xyxy)
    other = engine.denoise_step(second, *states, *times)
    assert not np.array_equal(wanted.embeddings, other.embeddings)


def test_memory_of_frames_that_are_gone_is_used_again(built):
    driver = HostDriver()
    engine, _ = open_engine(*built, driver)
    counts = []
    for _ in range(4):
        features = engine.backbone(images_of(2))
        denoise(engine, features, *start(2), [999, 420])
        del features
        counts.append(driver.allocations)
    assert counts[0] == counts[-1]
    assert driver.streams == {STREAM}


def test_each_inference_runs_in_the_first_profile_that_holds_it(built):
    engine, seen = open_engine(*built)
    for images, proposals in ((1, 12), (2, 12), (1, 5), (1, 13)):
        features = engine.backbone(images_of(images))
        denoise(engine, features, *start(images, proposals), [999, 420])
    # Backbone and step, for two images and back; then the step alone, for more proposals than the model's own.
    assert seen.profiles == [1, 1, 0, 0, 1]


def test_more_images_than_the_engines_were_built_for_are_refused(built):
    engine, _ = open_engine(*built)
    with pytest.raises(
        ValueError,
        match=r"image must have a shape from \(1, 128, 192, 3\) to \(3, 128, 192, 3\) in backbone.plan, got "
        r"\(4, 128, 192, 3\); build engines with a larger --max-batch",
    ):
        engine.backbone(images_of(4))


def test_shapes_that_no_one_profile_holds_are_refused(tmp_path):
    profiles = [{"a": ([1], [1], [2]), "b": ([3], [3], [4])}, {"a": ([1], [1], [9]), "b": ([9], [9], [9])}]
    assert profile_for({"a": (2,), "b": (4,)}, profiles, tmp_path) == 0
    assert profile_for({"a": (9,), "b": (9,)}, profiles, tmp_path) == 1
    with pytest.raises(ValueError, match=r"b must have a shape from \(9,\) to \(9,\) in .*, got \(4,\)"):
        profile_for({"a": (9,), "b": (4,)}, profiles, tmp_path)


@pytest.mark.parametrize(("dtype", "size"), [("UINT8", 24), ("HALF", 48), ("BF16", 48), ("INT64", 192)])
def test_memory_is_taken_by_the_type(dtype, size):
    assert num_bytes((2, 3, 4), dtype) == size


def test_a_pool_gives_memory_of_the_size_that_is_asked_for():
    pool = MemoryPool(HostDriver())
    first = pool.take(64)
    pool.give_back(first)
    assert pool.take(32) is not first
    assert pool.take(64) is first


# ---- what is refused ----


def altered(target, **changes):
    sidecar = target / "engines.json"
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | changes))


def altered_engine(target, part, **changes):
    engines = json.loads((target / "engines.json").read_text())["engines"]
    altered(target, engines=engines | {part: engines[part] | changes})


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (
            Device(87, "tensorrt 10.3.0"),
            r"sm of the engines must be 87, got 86; run psdiff export .* --sm 87",
        ),
        (
            Device(86, "tensorrt 10.3.0"),
            r"tensorrt of the engines must be tensorrt 10.3.0, got tensorrt_rtx [\d.]+; run psdiff export",
        ),
    ],
)
def test_engines_for_another_device_are_refused(built, device, message):
    with pytest.raises(BundleError, match=message):
        choose_plans(built[0], load_manifest(built[0]), device)


def test_a_bundle_without_engines_is_refused(small_bundle):
    with pytest.raises(
        BundleError, match=r"bundle must hold plans/\*/engines.json, got none in .*--target trt"
    ):
        choose_plans(small_bundle, load_manifest(small_bundle), Device(SM, "tensorrt 10.3.0"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda target: altered(target, embedding_space="other"), r"embedding_space in .* must be small-"),
        (lambda target: altered(target, engines={}), "engines in .* must have backbone, got none"),
        (lambda target: altered(target, sm="many"), r"engines.json: sm: Input should be a valid integer"),
        (
            lambda target: altered_engine(target, "backbone", graph_sha256="0"),
            r"graph_sha256 of backbone in .* must be \w{64}, got 0",
        ),
        (
            lambda target: (target / "denoise_step.plan").write_bytes(b"other"),
            r"SHA-256 of denoise_step.plan in .* must be \w{64}, got \w{64}",
        ),
        (
            lambda target: (target / "backbone.plan").unlink(),
            r"SHA-256 of backbone.plan in .* must be \w{64}, got no such file",
        ),
        (
            lambda target: altered(target, plugin_sha256="0"),
            r"SHA-256 of libpsdiff_trt.so in .* must be 0, got no such file",
        ),
    ],
)
def test_engines_that_are_not_what_was_built_are_refused(bundle, spoil, message):
    folder, target = bundle
    spoil(target)
    with pytest.raises(BundleError, match=message):
        choose_plans(folder, load_manifest(folder), Device(SM, f"{RTX} {version()}"))


def test_of_several_precisions_half_is_taken(bundle):
    folder, target = bundle
    other = shutil.copytree(target, target.with_name("other"))
    for place, precision in ((target, "fp32"), (other, "fp16")):
        altered(place, precision=precision)
    plans = choose_plans(folder, load_manifest(folder), Device(SM, f"{RTX} {version()}"))
    assert plans.folder == other


def test_half_written_engines_are_not_seen(bundle):
    folder, target = bundle
    before = sidecars_sha256(folder)
    shutil.copytree(target, target.with_name(".half"))
    assert sidecars_sha256(folder) == before
    altered(target, sm=89)
    assert sidecars_sha256(folder) != before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"backbone": {"names": {"image": "picture"}}},
            r"backbone.plan must have the inputs image, got picture",
        ),
        (
            {"denoise_step": {"types": {"t": "INT32"}}},
            r"t of .*denoise_step.plan must be INT64, got INT32",
        ),
        (
            {"backbone": {"types": {"p3": "INT64"}}},
            r"p3 of .*backbone.plan must be FLOAT or HALF or BF16, got INT64",
        ),
        (
            {"backbone": {"types": {"p4": "BF16"}}},
            r"p4 must be of one type in both engines of .*, got BF16 and (HALF|FLOAT)",
        ),
        (
            {"denoise_step": {"out_of_memory": True}},
            r"denoise_step.plan must be an engine that .* has \d+ MB of scratch memory for on sm_86",
        ),
    ],
)
def test_engines_with_other_tensors_are_refused(built, changes, message):
    with pytest.raises(BundleError, match=message):
        open_engine(*built, **changes)


def test_the_plugins_beside_the_engines_are_loaded_before_them(bundle):
    folder, target = bundle
    library = target / "libpsdiff_trt.so"
    library.write_bytes(b"kernels")
    altered(target, plugin_sha256=hashlib.sha256(b"kernels").hexdigest())
    _, seen = open_engine(folder, target)
    assert seen.libraries == [str(library)]
    with pytest.raises(BundleError, match=r"libpsdiff_trt.so must hold plugins for tensorrt_rtx"):
        open_engine(folder, target, library=None)


def test_tensorrt_says_that_it_cannot_load_an_engine_without_a_gpu(built):
    """The real TensorRT-RTX, which cannot read its own plan on a machine without a driver."""
    if not NO_GPU:
        pytest.skip("this machine has a GPU")
    with pytest.raises(
        BundleError, match=r"backbone.plan must be an engine that tensorrt_rtx .* loads on sm_86"
    ):
        TensorRtEngine(built[0], load_manifest(built[0]), driver=HostDriver())


# ---- what is missing ----


def test_without_tensorrt_the_message_says_where_it_comes_from(small_bundle, monkeypatch):
    monkeypatch.setattr(tensorrt_engine, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"backend tensorrt must have the package tensorrt .*JetPack"):
        open_detector(small_bundle, "tensorrt")


@pytest.mark.skipif(not NO_GPU, reason="this machine has a GPU")
def test_without_a_gpu_the_message_says_so(built):
    with pytest.raises(ValueError, match=r"backend tensorrt must have a GPU, got none: "):
        open_detector(built[0], "tensorrt")


# ---- the real thing ----


@pytest.mark.gpu
@pytest.mark.tensorrt
@pytest.mark.skipif(bool(NO_GPU), reason=f"no GPU: {NO_GPU}")
@pytest.mark.skipif(bool(NO_TENSORRT), reason=NO_TENSORRT)
def test_engines_of_this_gpu_compute_what_pytorch_computed(small_bundle, tmp_path):
    bundle = shutil.copytree(small_bundle, tmp_path / "bundle")
    device = device_of(tensorrt_module(), open_driver())
    build_engines(bundle, EngineOptions(device.sm, "fp16", max_batch=2, unrolled=[]))
    detector = open_detector(bundle, "tensorrt")
    assert verify(detector, load_manifest(bundle), bundle, "tensorrt").faults == []
