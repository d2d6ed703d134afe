"""8 bits: the small bundle is really quantised; structure, errors, proof, and every way that it can go wrong."""

import json
import math
import shutil

import cv2
import numpy as np
import onnx
import pytest
from conftest import write_video
from int8_cases import pictures, prefix
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from psdiff.__main__ import app
from psdiff.bundle import (
    PRECISION_REPORT,
    QUANTIZED_FORMS,
    REFERENCE,
    BundleError,
    graph_file,
    load_manifest,
    write_manifest,
)
from psdiff.export import engines, int8
from psdiff.export.engines import EngineOptions, EnginesRecord, build_engines, profiles_of
from psdiff.export.int8 import PARTS, QuantizationError, QuantizationOptions, quantize_bundle
from psdiff.export.precision_report import PrecisionReport
from psdiff.export.qdq import following
from psdiff.export.quantizable import ARITHMETIC, HEAD, OF_TIME, PRODUCT, candidates, staying
from psdiff.export.tensorrt_plan import Plan, PlanOptions, build_plan, tensorrt_module
from psdiff.models.verification import Tolerance
from psdiff.runtime.detector import OnnxEngine, detector_of, open_detector
from psdiff.runtime.verified import kept_proof, require_proof, tolerance_of, verify
from typer.testing import CliRunner

BACKEND = "onnxruntime-int8"
ADDED = {graph_file(part, form) for part in PARTS for form in QUANTIZED_FORMS} | {PRECISION_REPORT}


def open_int8(folder):
    return OnnxEngine(folder, None, "int8")


def quantize(folder, canvases, *, keep_fp32="none", method="minmax", **arguments):
    options = QuantizationOptions(method, keep_fp32)
    return quantize_bundle(folder, open_detector(folder), canvases, open_int8, options, **arguments)


@pytest.fixture(scope="module")
def full(small_bundle, tmp_path_factory):
    """(folder, report, what was said) of the small bundle with all in 8 bits that may be."""
    folder = shutil.copytree(small_bundle, tmp_path_factory.mktemp("int8") / "bundle")
    steps = []
    return folder, quantize(folder, pictures(5), on_step=steps.append), steps


@pytest.fixture
def bundle(small_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shutil.copytree(small_bundle, tmp_path / "bundle")


@pytest.fixture(scope="module")
def graphs(full):
    folder, _, _ = full
    return {
        (part, form): onnx.load(folder / graph_file(part, form))
        for part in PARTS
        for form in ("fp32", *QUANTIZED_FORMS)
    }


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# ---- what becomes of the graphs ----


def test_the_bundle_gains_both_forms_and_the_report_and_keeps_the_rest(full, small_bundle):
    folder, report, steps = full
    assert {path.name for path in folder.iterdir()} == {path.name for path in small_bundle.iterdir()} | ADDED
    before, after = load_manifest(small_bundle), load_manifest(folder)
    assert after.files.items() >= before.files.items()
    assert after.files.keys() - before.files.keys() == ADDED
    assert PrecisionReport.model_validate_json((folder / PRECISION_REPORT).read_text()) == report
    assert steps[0] == "calibrating by minmax: 4 pictures"
    assert steps[-1] == "adding them to the bundle"


@pytest.mark.parametrize("form", QUANTIZED_FORMS)
def test_every_weight_in_8_bits_has_a_symmetric_scale_an_output_channel(full, graphs, form):
    _, report, _ = full
    for part in PARTS:
        graph, original = graphs[part, form].graph, graphs[part, "fp32"].graph
        stored = {tensor.name: tensor for tensor in graph.initializer}
        layers = {node.name: node for node in original.node if node.name in report.quantized[part]}
        seen = 0
        for node in graph.node:
            tensor = stored.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
            if tensor is None or tensor.data_type != TensorProto.INT8:
                continue
            scale, zero_point = (numpy_helper.to_array(stored[name]) for name in node.input[1:])
            [axis] = [attribute.i for attribute in node.attribute if attribute.name == "axis"]
            assert scale.shape == (tensor.dims[axis],), tensor.name
            assert not zero_point.any(), tensor.name
            seen += 1
        assert seen == len({layer.input[1] for layer in layers.values()}) > 10


def activation_zero_points(graph):
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    return [stored[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]


def test_activations_are_unsigned_for_onnxruntime_and_signed_around_0_for_tensorrt(graphs):
    for part in PARTS:
        assert {points.dtype.name for points in activation_zero_points(graphs[part, "int8"].graph)} == {
            "uint8"
        }
        signed = activation_zero_points(graphs[part, "int8-trt"].graph)
        assert {(points.dtype.name, int(points)) for points in signed} == {("int8", 0)}


@pytest.mark.parametrize("form", QUANTIZED_FORMS)
def test_the_nodes_of_psdiff_and_their_functions_stay_as_they_were(graphs, form):
    before, after = graphs["denoise_step", "fp32"], graphs["denoise_step", form]
    assert [f.SerializeToString() for f in after.functions] == [
        f.SerializeToString() for f in before.functions
    ]
    assert {(entry.domain, entry.version) for entry in after.opset_import} >= {("psdiff", 1)}
    own = [node for node in after.graph.node if node.domain == "psdiff"]
    assert [node.op_type for node in own] == ["PSRoiAlignCL", "PSDynamicConv"]
    makers = {name: node for node in after.graph.node for name in node.output}
    boxes = own[0].input[4]
    assert makers[boxes].op_type == "Mul", "boxes reach ROIAlign in float32"


def test_boxes_scores_norms_and_time_stay_float32(full, graphs):
    _, report, _ = full
    step = graphs["denoise_step", "fp32"]
    in_8_bits = {node.name for node in step.graph.node if node.name in report.quantized["denoise_step"]}
    reasons = dict(staying(step))
    assert not in_8_bits & reasons.keys()
    by_reason = {
        reason: {name for name in reasons if reasons[name] == reason} for reason in set(reasons.values())
    }
    kinds = {node.name: node.op_type for node in step.graph.node}
    assert {"LayerNormalization", "Softmax", "Clip", "Exp", "PSRoiAlignCL", "PSDynamicConv"} <= {
        kinds[name] for name in by_reason[ARITHMETIC]
    }
    weights = {node.name: node.input[1] for node in step.graph.node if node.op_type in ("MatMul", "Gemm")}
    assert {weights[name] for name in by_reason[OF_TIME]} == {
        f"model.denoiser.time.{name}.weight" for name in ("mlp.0", "mlp.2", "film")
    }
    assert len(by_reason[HEAD]) == 3, "deltas, score and embedding"
    assert {kinds[name] for name in by_reason[PRODUCT]} == {"MatMul"}
    # Whatever is made of boxes_t or leads to boxes_xyxy by arithmetic alone meets no pair.
    rounded = {
        node.input[0]
        for node in graphs["denoise_step", "int8"].graph.node
        if node.op_type == "QuantizeLinear"
    }
    outputs = {
        f"{name}_QuantizeLinear_Input" for name in ("boxes_xyxy", "scores", "embeddings", "boxes_next")
    }
    assert not rounded & (outputs | {"boxes_t", "t", "t_next"})


def test_sums_follow_in_8_bits_where_all_that_they_read_does(graphs):
    model = graphs["backbone", "fp32"]
    convolutions = candidates(model)
    assert {
        node.op_type for node in model.graph.node if node.name in following(model.graph, convolutions)
    } == {
        "Add",
        "Clip",
        "Resize",
    }
    [first] = [node for node in model.graph.node if node.op_type == "Add"][:1]
    makers = {name: node.name for node in model.graph.node for name in node.output}
    without_one = [name for name in convolutions if name != makers[first.input[0]]]
    assert first.name not in following(model.graph, without_one)


def test_weights_that_stay_are_those_of_the_one_file(bundle):
    def one_layer(trial, keep_fp32, on_step):
        return trial.source.nodes[:1], {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "_chosen", one_layer)
        quantize(bundle, pictures(2))
    for part in PARTS:
        smaller = (bundle / graph_file(part, "int8")).stat().st_size
        assert smaller < 1.3 * (bundle / graph_file(part)).stat().st_size
    open_detector(bundle, BACKEND).detect(pictures(1), 1)


# ---- what it costs ----


def sqnr_db(wanted, found):
    return 10 * math.log10(float((wanted**2).sum() / ((wanted - found) ** 2).sum()))


def test_8_bits_are_close_to_float32(full):
    folder, _, _ = full
    [canvas] = pictures(1)
    exact, rounded = (
        open_detector(folder, backend).engine.backbone(canvas[None]) for backend in ("onnxruntime", BACKEND)
    )
    for wanted, found in zip(exact, rounded, strict=True):
        assert sqnr_db(wanted, found) > 8, "63 layers of random weights; ADR 11 measures a trained network"


def test_the_report_says_what_an_independent_reckoning_says(full, graphs, small_bundle):
    """A tensor's error over the held-out picture by onnx's evaluator, a weight's by the definition of rounding."""
    _, report, _ = full
    held_out = pictures(5)[3]
    name, model, rounded = "hardtanh", graphs["backbone", "fp32"], graphs["backbone", "int8"]
    outputs = [name], [f"{name}_DequantizeLinear_Output"]
    x, y = (
        ReferenceEvaluator(prefix(graph, names)).run(None, {"image": held_out[None]})[0]
        for graph, names in zip((model, rounded), outputs, strict=True)
    )
    [told] = [each for each in report.tensors if each.tensor == name]
    assert told.sqnr_db == pytest.approx(sqnr_db(x.astype(float), y), abs=0.05)
    assert told.largest == pytest.approx(np.abs(x - y).max(), rel=0.05)

    weight = "stages.0.0.0.weight"
    [exact] = [numpy_helper.to_array(each) for each in model.graph.initializer if each.name == weight]
    scale = np.abs(exact).max(axis=(1, 2, 3), keepdims=True) / 127
    [told] = [each for each in report.tensors if each.tensor == weight]
    assert told.kind == "weight"
    assert told.sqnr_db == pytest.approx(sqnr_db(exact, np.round(exact / scale) * scale), abs=0.3)


def test_every_pair_is_in_the_report(full, graphs):
    _, report, _ = full
    for part in PARTS:
        pairs = [node for node in graphs[part, "int8"].graph.node if node.op_type == "QuantizeLinear"]
        told = [each for each in report.tensors if each.part == part and each.kind == "activation"]
        assert len(told) == len(pairs)
        nodes = {node.name for node in graphs[part, "fp32"].graph.node}
        stayed = [name for each in report.stayed_fp32 if each.part == part for name in each.nodes]
        assert len(stayed) == len(set(stayed))
        assert set(stayed) <= nodes - set(report.quantized[part])


# ---- what stays float32 by its harm ----


def test_auto_keeps_what_it_takes_for_the_proof(bundle, monkeypatch):
    """With the nodes of the step alone, for time: the search is over nodes, wherever they are."""
    monkeypatch.setattr(int8, "candidates", lambda model: candidates(model)[:4])
    monkeypatch.setattr(int8, "INT8_TOLERANCE", Tolerance(box_px=0.02, cosine=0.99))
    report = quantize(bundle, pictures(3), keep_fp32="auto")
    chosen = sum(map(len, report.quantized.values()))
    assert report.num_candidates == 8
    assert report.holds
    assert chosen < 8
    by_harm = [each for each in report.stayed_fp32 if each.harms is not None]
    assert sum(len(each.nodes) for each in by_harm) == 8 - chosen
    assert all(value > 0 for each in by_harm for value in each.harms)


# ---- proven or not served ----


def proven(folder):
    manifest = load_manifest(folder)
    return verify(detector_of(manifest, folder, BACKEND), manifest, folder, BACKEND)


def test_int8_is_held_to_its_own_tolerance_and_nothing_wider():
    assert tolerance_of(BACKEND) == Tolerance(box_px=0.5, cosine=0.99, score=0.02, matched=0.98)
    assert tolerance_of("onnxruntime") == Tolerance()


def test_what_is_served_was_proven_in_8_bits(full, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder, report, _ = full
    manifest = load_manifest(folder)
    detector = detector_of(manifest, folder, BACKEND)
    proof = proven(folder)
    assert bool(proof.faults) is not report.holds
    told = [row["box_px"] for row in report.proof]
    assert [each.box_px for each in proof.comparisons] == pytest.approx(told, rel=0.2, abs=0.05)
    if report.holds:
        assert require_proof(detector, manifest, folder, BACKEND) == kept_proof(folder, BACKEND)
    else:
        with pytest.raises(BundleError, match=r"--backend onnxruntime-int8 shows more"):
            require_proof(detector, manifest, folder, BACKEND)
        assert kept_proof(folder, BACKEND) is None
    assert kept_proof(folder, "onnxruntime") is None, "a proof in 8 bits is none in float32"


def test_a_bundle_without_the_graphs_says_how_to_make_them(bundle):
    with pytest.raises(
        BundleError, match=r"must hold backbone.int8.onnx .*psdiff export .* --target int8 --frames"
    ):
        open_detector(bundle, BACKEND)


def test_a_graph_that_the_manifest_does_not_list_is_not_served(full, bundle):
    folder, _, _ = full
    for name in ADDED:
        shutil.copy(folder / name, bundle)
    with pytest.raises(BundleError, match=r"must hold backbone.int8.onnx"):
        open_detector(bundle, BACKEND)


def test_an_altered_graph_is_refused(full, tmp_path):
    folder = shutil.copytree(full[0], tmp_path / "bundle")
    path = folder / "denoise_step.int8.onnx"
    path.write_bytes(path.read_bytes() + b"\0")
    for backend in (BACKEND, "onnxruntime"):
        with pytest.raises(BundleError, match=r"denoise_step.int8.onnx must have SHA-256"):
            open_detector(folder, backend)


# ---- whole or not at all ----


@pytest.mark.parametrize("where", ["ranges_of", "tensor_errors", "_write"])
def test_what_fails_leaves_the_bundle_as_it_was(bundle, monkeypatch, where):
    before = contents(bundle)

    def fail(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(int8, where, fail)
    if where != "ranges_of":
        monkeypatch.setattr(int8, "candidates", lambda model: candidates(model)[:1])
    with pytest.raises(OSError, match="no space"):
        quantize(bundle, pictures(2))
    assert contents(bundle) == before


def test_a_crash_while_an_older_set_is_replaced_leaves_a_bundle_that_runs(full, tmp_path, monkeypatch):
    folder = shutil.copytree(full[0], tmp_path / "bundle")
    monkeypatch.setattr(int8, "candidates", lambda model: candidates(model)[:1])
    written = []

    def crash_at_the_second(where, manifest):
        if written:
            raise KeyboardInterrupt
        written.append(manifest)
        write_manifest(where, manifest)

    monkeypatch.setattr(int8, "write_manifest", crash_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        quantize(folder, pictures(2))
    open_detector(folder).detect(pictures(1), 1)
    with pytest.raises(BundleError, match=r"must hold backbone.int8.onnx"):
        open_detector(folder, BACKEND)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_pictures_are_refused(bundle, count):
    with pytest.raises(QuantizationError, match=rf"frames must hold at least 2 pictures, .* got {count}"):
        quantize(bundle, pictures(count))


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_a_bundle_without_reference_outputs_is_refused(bundle, monkeypatch, damage):
    manifest = load_manifest(bundle)
    manifest.files.pop(REFERENCE)
    write_manifest(bundle, manifest)
    (bundle / REFERENCE).unlink()
    if damage == "damaged":
        (bundle / REFERENCE).write_bytes(b"PK\3\4 no archive")
    before = contents(bundle)
    monkeypatch.setattr(int8, "ranges_of", lambda *arguments: {})
    with pytest.raises(
        BundleError, match=r"reference.npz must hold the reference outputs .* export it again"
    ):
        quantize(bundle, pictures(2))
    assert contents(bundle) == before


# ---- the commands ----


def psdiff(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_video_becomes_graphs_and_they_are_used(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "candidates", lambda model: candidates(model)[:2])
    video = write_video(tmp_path / "lobby.mp4", pictures(5))
    made = psdiff(
        "export", bundle, "--target", "int8", "--frames", video, "--calibration", "minmax", "--max-frames", 4
    )
    assert made.exit_code == 0, made.output
    report = PrecisionReport.model_validate_json((bundle / PRECISION_REPORT).read_text())
    assert report.calibration_pictures + report.held_out_pictures == 3, "each second of five"
    assert "What stayed float32" in made.stdout
    assert f"{bundle / PRECISION_REPORT} tells all" in made.stdout.replace("\n", "")
    judged = psdiff("verify", bundle, "--backend", BACKEND, "--json")
    assert judged.exit_code == (0 if report.holds else 3)
    assert json.loads(judged.stdout)["tolerance"]["cosine"] == 0.99
    timed = psdiff("bench", bundle, "--backend", BACKEND, "--steps", "1", "--seconds", "0.1", "--json")
    assert json.loads(timed.stdout)["backend"].startswith("onnxruntime-int8 1.")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["--target", "int8"],
            2,
            "--frames and --target int8 must go together, got target int8, frames None",
        ),
        (["--frames", "."], 2, "--frames and --target int8 must go together, got target onnx, frames ."),
        (
            ["--target", "int8", "--frames", "none.mp4"],
            2,
            "must be an existing file or folder, or the URL of a camera",
        ),
        (["--target", "int8", "--frames", "empty"], 2, "must be a folder with images, got empty"),
        (["--target", "int8", "--frames", "damaged.mp4"], 2, "damaged.mp4"),
        (["--target", "int8", "--frames", "one"], 2, "frames must hold at least 2 pictures"),
        (["--precision", "int8"], 2, "--precision int8 must go with --target trt, got onnx"),
        (["--target", "trt", "--sm", 86, "--precision", "int8"], 2, "export with --target int8 --frames ..."),
    ],
)
def test_the_command_says_what_is_wrong(bundle, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    cv2.imwrite("one/picture.png", pictures(1)[0])
    (tmp_path / "damaged.mp4").write_bytes(b"no video" * 100)
    before = contents(bundle)
    result = psdiff("export", bundle, *arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert contents(bundle) == before


# ---- TensorRT ----


def test_engines_are_built_of_the_graphs_for_tensorrt(full, tmp_path, monkeypatch):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    built = []

    def build(trt, graph, options):
        built.append((graph.name, options.channels_last))
        return Plan(b"plan", [], 0, 0)

    monkeypatch.setattr(engines, "build_plan", build)
    folder = shutil.copytree(full[0], tmp_path / "bundle")
    target = build_engines(folder, EngineOptions(sm=89, precision="int8"))
    assert built == [(f"{part}.int8-trt.onnx", ()) for part in PARTS], "no unrolled graphs, maps in float32"
    told = EnginesRecord.model_validate_json((target / "engines.json").read_text())
    assert target.name.endswith("-int8")
    assert told.precision == "int8"
    assert told.engines["backbone"].graph_sha256 == load_manifest(folder).files["backbone.int8-trt.onnx"]


@pytest.mark.parametrize(("part", "kind"), [("backbone", "correlation"), ("denoise_step", "gemm")])
def test_tensorrt_multiplies_in_8_bits_what_the_report_says(full, part, kind):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    folder, report, _ = full
    options = EngineOptions(sm=89, precision="int8", max_batch=2, max_proposals=16)
    profiles = profiles_of(part, load_manifest(folder), options)[1:]
    graph = folder / graph_file(part, "int8-trt")
    plan = build_plan(tensorrt_module(), graph, PlanOptions(89, profiles))
    in_8_bits = [
        layer
        for layer in plan.layers
        if layer.kind == kind and {tensor.dtype for tensor in layer.inputs} == {"Int8"}
    ]
    # Layers that read the same tokens became one kernel.
    assert {node for layer in in_8_bits for node in layer.nodes} >= set(report.quantized[part])
    assert {tensor.dtype for layer in in_8_bits for tensor in layer.outputs} == {"Float"}
    assert plan.is_capturable
