"""A bundle proves on the machine that serves it what it computes; every seeded fault is refused."""

import itertools
import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from psdiff.__main__ import app
from psdiff.bundle import BundleError, file_sha256, load_manifest, write_manifest
from psdiff.export.export import save_weights
from psdiff.models.person_search import TorchEngine, load_checkpoint, sampler_settings
from psdiff.models.verification import Tolerance, compare, reference_arrays
from psdiff.runtime import verified
from psdiff.runtime.detector import open_detector
from psdiff.runtime.verified import kept_proof, require_proof, verify
from typer.testing import CliRunner

BACKEND = "onnxruntime"


@pytest.fixture
def bundle(small_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shutil.copytree(small_bundle, tmp_path / "bundle")


def sign_again(folder):
    """Give the manifest the hashes of what lies there: only the outputs can betray the bundle now."""
    manifest = load_manifest_unchecked(folder)
    manifest["files"] = {name: file_sha256(folder / name) for name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def load_manifest_unchecked(folder):
    return json.loads((folder / "manifest.json").read_text())


def proof_of(folder, **tolerance):
    manifest = load_manifest(folder)
    return verify(open_detector(folder), manifest, folder, BACKEND, Tolerance(**tolerance))


# ---- a bundle that is right ----


def test_every_k_agrees_far_within_the_tolerance(bundle):
    proof = proof_of(bundle)
    assert proof.faults == []
    assert [each.steps for each in proof.comparisons] == [1, 2, 4, 8]
    for each in proof.comparisons:
        assert each.matched == 1
        assert each.box_px < 0.05
        assert each.cosine > 0.9999
        assert each.score < 1e-3


def test_a_proof_is_kept_and_not_asked_for_twice(bundle, monkeypatch):
    manifest, detector = load_manifest(bundle), open_detector(bundle)
    assert kept_proof(bundle, BACKEND) is None
    first = require_proof(detector, manifest, bundle, BACKEND)

    def compare_again(*arguments):
        raise AssertionError("the proof was there")

    monkeypatch.setattr(verified, "compare", compare_again)
    assert require_proof(detector, manifest, bundle, BACKEND) == first == kept_proof(bundle, BACKEND)


@pytest.mark.parametrize("what", ["manifest", "backend", "machine"])
def test_a_proof_holds_for_one_bundle_backend_and_machine(bundle, monkeypatch, what):
    proof_of(bundle)
    if what == "manifest":
        manifest = load_manifest(bundle)
        write_manifest(bundle, manifest.model_copy(update={"default_steps": 2}))
    elif what == "backend":
        monkeypatch.setattr(verified, "backend_version", lambda backend: f"{backend} 0.0")
    else:
        monkeypatch.setattr(verified, "machine", lambda: "another one")
    assert kept_proof(bundle, BACKEND) is None


def test_a_proof_of_a_wider_tolerance_is_not_kept(bundle):
    assert proof_of(bundle, cosine=0.5).faults == []
    assert kept_proof(bundle, BACKEND) is None


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(bundle, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert proof_of(bundle).faults == []
    assert kept_proof(bundle, BACKEND) is None


def test_a_damaged_proof_is_made_again(bundle, tmp_path):
    proof_of(bundle)
    [path] = (tmp_path / "cache").rglob("*.json")
    path.write_text("{")
    assert kept_proof(bundle, BACKEND) is None
    require_proof(open_detector(bundle), load_manifest(bundle), bundle, BACKEND)
    assert kept_proof(bundle, BACKEND) is not None


# ---- seeded faults ----


def flip_a_byte(folder):
    path = folder / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def weights_of_another_network(folder):
    """The graphs point at places in a file: another network's weights lie at the same places."""
    model, _ = load_checkpoint(folder / "weights.safetensors")
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.neg_()
    save_weights(model, folder / "weights.safetensors")
    sign_again(folder)


def edit(folder, part, change):
    model = onnx.load(folder / f"{part}.onnx", load_external_data=False)
    change(model.graph)
    onnx.save(model, folder / f"{part}.onnx")
    sign_again(folder)


def wrong_normalisation(folder):
    """The pixel statistics of another data set."""

    def change(graph):
        [index] = [i for i, tensor in enumerate(graph.initializer) if "pixel_mean" in tensor.name]
        tensor = graph.initializer[index]
        mean = numpy_helper.to_array(tensor) + np.float32(20)
        tensor.CopyFrom(numpy_helper.from_array(mean, tensor.name))

    edit(folder, "backbone", change)


def behind_output(graph, output, *nodes):
    """Let an output pass through more nodes: the first reads `before`, the last writes the output."""
    for node in graph.node:
        node.output[:] = ["before" if name == output else name for name in node.output]
        node.input[:] = ["before" if name == output else name for name in node.input]
    graph.node.extend(nodes)


def reversed_embedding(folder):
    def change(graph):
        order = np.arange(64)[::-1].copy()
        graph.initializer.append(numpy_helper.from_array(order, "order"))
        behind_output(
            graph, "embeddings", helper.make_node("Gather", ["before", "order"], ["embeddings"], axis=-1)
        )

    edit(folder, "denoise_step", change)


def overflow_of_fp16(folder):
    """Maps whose largest values do not fit half precision."""

    def change(graph):
        graph.initializer.append(numpy_helper.from_array(np.float32(1e6), "large"))
        graph.initializer.append(numpy_helper.from_array(np.float32(1e-6), "small"))
        behind_output(
            graph,
            "p3",
            helper.make_node("Mul", ["before", "large"], ["scaled"]),
            helper.make_node("Cast", ["scaled"], ["half"], to=onnx.TensorProto.FLOAT16),
            helper.make_node("Cast", ["half"], ["float"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", ["float", "small"], ["p3"]),
        )

    edit(folder, "backbone", change)


def stale_reference(folder):
    """The outputs of the weights before the last training."""
    model, _ = load_checkpoint(folder / "weights.safetensors")
    with torch.no_grad():
        model.denoiser.heads.deltas.bias.add_(0.1)
    np.savez_compressed(
        folder / "reference.npz", **reference_arrays(TorchEngine(model), sampler_settings(model.config))
    )
    sign_again(folder)


def no_reference(folder):
    (folder / "reference.npz").write_bytes(b"nothing")
    sign_again(folder)


def reference_of_an_older_form(folder):
    np.savez_compressed(folder / "reference.npz", image=np.zeros((128, 192, 3), np.uint8))
    sign_again(folder)


FAULTS = {
    flip_a_byte: "must have SHA-256",
    weights_of_another_network: "must compute what PyTorch computed",
    wrong_normalisation: "must compute what PyTorch computed",
    reversed_embedding: "must compute what PyTorch computed",
    overflow_of_fp16: "must compute what PyTorch computed",
    stale_reference: "must compute what PyTorch computed",
    no_reference: "must hold the reference outputs of this bundle",
    reference_of_an_older_form: "must hold the reference outputs of this bundle",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_seeded_fault_is_refused_before_anything_is_served(bundle, fault):
    fault(bundle)
    with pytest.raises(BundleError, match=FAULTS[fault]):
        require_proof(open_detector(bundle), load_manifest(bundle), bundle, BACKEND)
    assert kept_proof(bundle, BACKEND) is None


def test_the_harmless_forms_of_these_edits_pass(bundle):
    """An edit that changes nothing is not refused, so the refusals above are about what changed."""
    edit(
        bundle,
        "backbone",
        lambda graph: behind_output(graph, "p3", helper.make_node("Identity", ["before"], ["p3"])),
    )
    assert proof_of(bundle).faults == []


# ---- the comparison ----


class Shifted:
    """An engine that is right but for some proposals."""

    def __init__(self, engine, change):
        self.engine, self.change, self.backbone = engine, change, engine.backbone

    def denoise_step(self, *arguments):
        return self.change(self.engine.denoise_step(*arguments))


def moved_boxes(count, pixels):
    def change(output):
        boxes = output.boxes_xyxy.copy()
        boxes[:, :count] = np.clip(boxes[:, :count], 0.2, 0.8) + pixels / 192
        return output._replace(boxes_xyxy=boxes)

    return change


def not_a_number(output):
    return output._replace(embeddings=np.full_like(output.embeddings, np.nan))


@pytest.fixture(scope="module")
def torch_engine(small_bundle):
    model, _ = load_checkpoint(small_bundle / "weights.safetensors")
    settings = sampler_settings(model.config)
    engine = TorchEngine(model)
    return engine, settings, reference_arrays(engine, settings)


def test_an_engine_agrees_with_itself(torch_engine):
    engine, settings, reference = torch_engine
    for each in compare(engine, reference, settings, Tolerance()):
        assert (each.matched, each.box_px, each.score) == (1, 0, 0)
        assert each.cosine == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "matched"),
    [(moved_boxes(12, 30), 0), (moved_boxes(3, 30), 0.75), (not_a_number, 0)],
    ids=["all boxes", "three of twelve boxes", "no numbers"],
)
def test_the_share_that_agrees_is_counted(torch_engine, change, matched):
    engine, settings, reference = torch_engine
    for each in compare(Shifted(engine, change), reference, settings, Tolerance()):
        assert each.matched == pytest.approx(matched)


def test_only_the_best_hundred_are_compared(torch_engine):
    engine, settings, _ = torch_engine
    many = replace(settings, num_proposals=150)
    reference = reference_arrays(engine, many)
    worst = np.argsort(-reference["scores_k1"], kind="stable")[100:]

    def spoil(output):
        boxes = output.boxes_xyxy.copy()
        boxes[:, worst] += 1
        return output._replace(boxes_xyxy=boxes)

    [first, *_] = compare(Shifted(engine, spoil), reference, many, Tolerance())
    assert first.matched == 1


def test_the_stored_state_is_that_of_the_loop(torch_engine):
    engine, settings, reference = torch_engine
    features = engine.backbone(reference["image"][None])
    boxes_t, emb_t = (reference[f"{name}_k1"][None] for name in ("boxes_t", "emb_t"))
    for t, t_next in itertools.pairwise(settings.timesteps[4]):
        moved = engine.denoise_step(features, boxes_t, emb_t, np.array([t]), np.array([t_next]))
        boxes_t, emb_t = moved.boxes_next, moved.emb_next
    np.testing.assert_array_equal(reference["boxes_t_k4"], boxes_t[0])
    np.testing.assert_array_equal(reference["emb_t_k4"], emb_t[0])


# ---- the commands ----


def psdiff(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_shows_the_proof(bundle):
    result = psdiff("verify", bundle)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("100.0%") == 4
    proof = json.loads(psdiff("verify", bundle, "--json").stdout)
    assert proof["tolerance"] == asdict(Tolerance())
    assert proof["backend"].startswith("onnxruntime 1.")


@pytest.mark.parametrize("command", ["verify", "run"])
def test_a_bundle_that_fails_ends_the_program_with_code_3(bundle, tmp_path, command):
    wrong_normalisation(bundle)
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"never read")
    arguments = [bundle] if command == "verify" else [picture, "--bundle", bundle, "--out", tmp_path / "out"]
    result = psdiff(command, *arguments)
    assert result.exit_code == 3
    assert "of the best proposals must agree with PyTorch's within 0.5 px" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_proves_the_bundle_by_itself(bundle_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = psdiff("run", tmp_path / "nothing.mp4", "--bundle", bundle_folder, "--out", tmp_path / "out")
    assert result.exit_code == 2, "the video is missing, but the bundle was proven first"
    assert kept_proof(bundle_folder, BACKEND) is not None
