"""From checkpoint to bundle: ONNX equals PyTorch, and a bundle is whole or refused."""

import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psdiff
import pytest
from psdiff.bundle import MANIFEST, PRECISIONS, BundleError, graph_file, load_manifest
from psdiff.export.export import ExportError, export_bundle
from psdiff.models.detector import Detector
from psdiff.models.person_search import TorchEngine, load_checkpoint, sampler_settings
from psdiff.models.preprocess import seeded_noise
from psdiff.models.sampling import denoise
from psdiff.models.verification import Tolerance, compare
from psdiff.runtime.detector import OnnxEngine, open_detector, shipped_bundle
from psdiff.training.synthetic.street import Street


@pytest.fixture(scope="module")
def bundle(small_bundle):
    return small_bundle


def both_engines(folder):
    model, _ = load_checkpoint(folder / "weights.safetensors")
    return model, TorchEngine(model), OnnxEngine(folder)


def assert_same_people(folder, images, steps, proposals):
    """Boxes within 0.5 px of the input, cosine >= 0.9999, from the same noise, without selection."""
    model, reference, engine = both_engines(folder)
    config = model.config
    noise = [seeded_noise(i, proposals, config.embedding_dim) for i in range(len(images))]
    boxes_t, emb_t = (np.stack(part) for part in zip(*noise, strict=True))
    grid = sampler_settings(config).timesteps[steps]
    wanted, got = (denoise(e, e.backbone(images), boxes_t, emb_t, grid) for e in (reference, engine))
    pixels = np.array([config.width, config.height] * 2)
    inside = np.clip(wanted.boxes_xyxy, 0, 1), np.clip(got.boxes_xyxy, 0, 1)
    assert (np.abs(inside[0] - inside[1]) * pixels).max() <= 0.5
    assert (wanted.embeddings * got.embeddings).sum(-1).min() >= 0.9999
    np.testing.assert_allclose(got.scores, wanted.scores, atol=1e-3)


def noise_images(count, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (count, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_onnxruntime_equals_pytorch_at_every_k(bundle, steps):
    assert_same_people(bundle, noise_images(2, 128, 192), steps, 12)


@pytest.mark.parametrize(("batch", "proposals"), [(1, 1), (1, 40), (3, 5)])
def test_the_graphs_take_any_batch_and_number_of_proposals(bundle, batch, proposals):
    assert_same_people(bundle, noise_images(batch, 128, 192), 2, proposals)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_shipped_bundle_equals_pytorch(steps):
    """Step by step from PyTorch's own state for all proposals; over the whole loop for the people found.

    A proposal of exactly the size at which the pyramid level changes may take another way in the two; in the
    free-running loop that moves proposals on the background, not people.
    """
    folder = shipped_bundle()
    if not folder.is_dir():
        pytest.skip(f"the shipped bundle is missing: {folder}")
    model, reference, engine = both_engines(folder)
    settings = sampler_settings(model.config)
    frame = Street(77, num_people=6, duration_s=5.0).frame(0, 2.5).image
    pixels = np.array([settings.width, settings.height] * 2)
    boxes_t, emb_t = (part[None] for part in seeded_noise(0, settings.num_proposals, settings.embedding_dim))
    features = reference.backbone(frame[None]), engine.backbone(frame[None])
    grid = [*settings.timesteps[steps], -1]
    for t, t_next in itertools.pairwise(grid):
        times = np.array([t]), np.array([t_next])
        wanted = reference.denoise_step(features[0], boxes_t, emb_t, *times)
        got = engine.denoise_step(features[1], boxes_t, emb_t, *times)
        difference = np.clip(wanted.boxes_xyxy, 0, 1) - np.clip(got.boxes_xyxy, 0, 1)
        assert (np.abs(difference) * pixels).max() <= 0.5
        assert (wanted.embeddings * got.embeddings).sum(-1).min() >= 0.9999
        boxes_t, emb_t = wanted.boxes_next, wanted.emb_next
    manifest = load_manifest(folder)
    people = [
        Detector(e, replace(settings, score_thresholds=manifest.score_thresholds)).detect([frame], steps)[0]
        for e in (reference, engine)
    ]
    assert len(people[0]) == len(people[1]) > 0
    assert np.abs(people[0].boxes_xyxy - people[1].boxes_xyxy).max() <= 0.5
    assert (people[0].embeddings * people[1].embeddings).sum(-1).min() >= 0.9999


def test_the_shipped_bundle_gives_its_reference_outputs():
    folder = shipped_bundle()
    if not folder.is_dir():
        pytest.skip(f"the shipped bundle is missing: {folder}")
    detector = open_detector(folder)
    with np.load(folder / "reference.npz") as reference:
        comparisons = compare(detector.engine, reference, detector.settings, Tolerance())
    assert [(each.steps, each.matched) for each in comparisons] == [(1, 1), (2, 1), (4, 1), (8, 1)]
    assert max(each.box_px for each in comparisons) < 0.01


def test_a_bundle_opens_and_answers_in_three_lines(bundle):
    detector = open_detector(bundle, backend="onnxruntime")
    frames = list(noise_images(2, 90, 160))
    assert len(detector.detect(frames, steps=2)) == 2
    assert detector.embed(frames[0], np.array([[10, 10, 60, 80.0]])).shape == (1, 64)


def test_the_manifest_says_what_the_model_is(bundle):
    manifest = load_manifest(bundle)
    assert (manifest.width, manifest.height, manifest.num_proposals) == (192, 128, 12)
    assert manifest.timesteps[4] == [999, 420, 124, 14]
    assert manifest.training == {"preset": "a test"}
    assert manifest.embedding_space.startswith("small-")
    parts = ["backbone", "denoise_step", *(f"e2e_k{steps}" for steps in (1, 2, 4, 8))]
    graphs = {graph_file(part, precision) for part in parts for precision in PRECISIONS}
    assert set(manifest.files) == {"weights.safetensors", "reference.npz", *graphs}
    assert graph_file("e2e_k4", "fp16") == "e2e_k4.fp16.onnx"


def test_weights_are_stored_once_and_in_half_precision(bundle):
    parameters = sum(p.numel() for p in load_checkpoint(bundle / "weights.safetensors")[0].parameters())
    assert (bundle / "weights.safetensors").stat().st_size < 2.1 * parameters
    assert (bundle / "backbone.onnx").stat().st_size < 0.1 * parameters


def test_a_server_may_read_every_file(bundle):
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in bundle.iterdir())


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "copy")


def test_a_changed_byte_is_refused(copy):
    path = copy / "backbone.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"backbone.onnx must have SHA-256 .*, got .*altered or damaged"):
        open_detector(copy)


def test_a_missing_file_and_a_missing_bundle_are_refused(copy, tmp_path):
    (copy / "denoise_step.onnx").unlink()
    with pytest.raises(BundleError, match=r"bundle must hold denoise_step.onnx, got no such file"):
        open_detector(copy)
    with pytest.raises(BundleError, match=r"bundle must be a folder with manifest.json"):
        open_detector(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "bundle format must be 1, got 99"),
        ({"width": -1}, "width: Input should be greater than 0, got -1"),
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
    ],
)
def test_a_manifest_of_another_form_is_refused(copy, change, message):
    path = copy / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BundleError, match=message):
        open_detector(copy)


def test_a_manifest_that_is_no_json_is_refused(copy):
    (copy / MANIFEST).write_text("{")
    with pytest.raises(BundleError, match="must be a JSON object"):
        open_detector(copy)


def test_an_export_replaces_a_bundle_and_nothing_else(bundle, tmp_path):
    checkpoint = bundle.parent / "model.safetensors"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "dear.jpg").write_bytes(b"x")
    with pytest.raises(ExportError, match="out must be a new folder or a bundle"):
        export_bundle(checkpoint, tmp_path / "photos")
    assert (tmp_path / "photos" / "dear.jpg").is_file()


def test_an_export_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "none.safetensors").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="checkpoint must be written by psdiff train"):
        export_bundle(tmp_path / "none.safetensors", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["none.safetensors"]


def test_the_script_is_the_command(tmp_path):
    """python export/export.py is psdiff export."""
    script = Path(psdiff.__file__).parent / "export" / "export.py"
    missing = tmp_path / "none.safetensors"
    done = subprocess.run([sys.executable, script, missing], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == f"error: out must be the folder of the bundle to write, got none for {missing}\n"
