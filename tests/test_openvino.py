"""OpenVINO as a backend: the numbers of PyTorch, any batch and number of proposals, and errors that help."""

import sys

import numpy as np
import pytest
from psdiff.bundle import BundleError, load_manifest
from psdiff.models.person_search import TorchEngine, load_checkpoint, sampler_settings
from psdiff.models.preprocess import seeded_noise
from psdiff.models.sampling import denoise
from psdiff.runtime.detector import OnnxEngine, backend_version, open_detector
from psdiff.runtime.verified import verify

pytest.importorskip("openvino", reason="openvino is not installed")
from psdiff.runtime.openvino_engine import OpenVinoEngine


@pytest.fixture(scope="module")
def engines(small_bundle):
    model, _ = load_checkpoint(small_bundle / "weights.safetensors")
    return sampler_settings(model.config), {
        "torch": TorchEngine(model),
        "onnxruntime": OnnxEngine(small_bundle),
        "openvino": OpenVinoEngine(small_bundle, threads=1),
    }


def start(images, proposals):
    noise = [seeded_noise(seed, proposals, 64) for seed in range(images)]
    return [np.stack(part) for part in zip(*noise, strict=True)]


@pytest.mark.parametrize(("images", "proposals"), [(1, 12), (3, 5), (1, 1)])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_torch_onnxruntime_and_openvino_agree(engines, steps, images, proposals):
    settings, by_name = engines
    frames = np.random.default_rng(3).integers(0, 255, (images, 128, 192, 3), dtype=np.uint8)
    outputs = {
        name: denoise(engine, engine.backbone(frames), *start(images, proposals), settings.timesteps[steps])
        for name, engine in by_name.items()
    }
    wanted = outputs.pop("torch")
    for name, got in outputs.items():
        moved = np.clip(wanted.boxes_xyxy, 0, 1) - np.clip(got.boxes_xyxy, 0, 1)
        assert (np.abs(moved) * [192, 128, 192, 128]).max() <= 0.5, name
        assert (wanted.embeddings * got.embeddings).sum(-1).min() >= 0.9999, name
        np.testing.assert_allclose(got.scores, wanted.scores, atol=1e-3)


@pytest.mark.parametrize("backend", ["openvino", "openvino-bf16"])
def test_a_bundle_proves_itself(small_bundle, backend, tmp_path, monkeypatch):
    """bf16 is a wish: a processor that does not multiply in it computes in float32."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    detector = open_detector(small_bundle, backend, threads=1)
    assert verify(detector, load_manifest(small_bundle), small_bundle, backend).faults == []
    assert backend_version(backend).startswith(f"{backend} 20")


def test_a_graph_that_does_not_compile_is_named(small_bundle, tmp_path):
    for name in ("denoise_step.onnx", "weights.safetensors"):
        (tmp_path / name).write_bytes((small_bundle / name).read_bytes())
    (tmp_path / "backbone.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"backbone.onnx must be a graph that OpenVINO can compile, got: "):
        OpenVinoEngine(tmp_path)


def test_without_the_package_it_says_what_to_install(small_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ValueError, match=r"backend openvino must have .* run pip install psdiff\[openvino\]"):
        open_detector(small_bundle, "openvino")
