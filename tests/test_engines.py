"""TensorRT engines, built by TensorRT-RTX without a GPU: what became of the graphs, and the folder of a target.

Nothing here runs an engine. The table of kernels is the builder's own; a GPU's TensorRT may choose other kernels,
so these tests look at the shape of the result: plugins, transposes, types, memory.
"""

import re
import shutil
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from psdiff.__main__ import app
from psdiff.bundle import BundleError, graph_file, load_manifest
from psdiff.export.engines import EngineOptions, build_engines, channels_last, profiles_of
from psdiff.export.layer_table import Layer, LayerTensor, kinds, read_layers, read_memory
from psdiff.export.tensorrt_plan import (
    EngineError,
    PlanOptions,
    build_plan,
    load_plugins,
    sums_for_products,
    tensorrt_module,
)
from psdiff.models.sampling import FEATURES
from psdiff.plans import EnginesRecord
from typer.testing import CliRunner

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

SM = 86
OPTIONS = EngineOptions(sm=SM, max_batch=4, max_proposals=100)
# Of the small bundle: 12 proposals, 49 tokens of 96 channels.
LARGEST_TOKENS = 4 * 100 * 49 * 96 * 2


def compile_part(bundle, part, precision="fp16", **changes):
    manifest, options = load_manifest(bundle), replace(OPTIONS, precision=precision)
    profiles = profiles_of(part, manifest, options)[1:]
    options = PlanOptions(SM, profiles, channels_last(part, manifest, precision), **changes)
    return build_plan(tensorrt_module(), bundle / graph_file(part, precision), options)


@pytest.fixture(scope="module")
def backbone(small_bundle):
    return compile_part(small_bundle, "backbone")


@pytest.fixture(scope="module")
def step(small_bundle, stand_ins):
    """Plugins are there, and not asked for."""
    return compile_part(small_bundle, "denoise_step")


@pytest.fixture(scope="module")
def unrolled(small_bundle):
    return {steps: compile_part(small_bundle, f"e2e_k{steps}") for steps in (1, 4)}


@pytest.fixture(scope="module")
def stand_ins():
    import plugin_stand_ins

    return plugin_stand_ins.register()


@pytest.fixture(scope="module")
def step_with_plugins(small_bundle, stand_ins):
    for creator in stand_ins.values():
        creator.seen.clear()
    return compile_part(small_bundle, "denoise_step", use_plugins=True)


def dtypes(tensors):
    return {tensor.dtype for tensor in tensors}


def products(layers):
    """Kernels that multiply matrices or convolve."""
    return [
        layer
        for layer in layers
        if layer.kind in ("gemm", "correlation", "runtime_fusion") or "_mha" in layer.name
    ]


# ---- what became of the graphs ----


def test_a_backbone_in_fp16_is_convolutions_without_transposes(backbone):
    assert kinds(backbone.layers)["correlation"] >= 52
    assert not [layer.name for layer in backbone.layers if layer.is_transpose]
    assert len(backbone.layers) <= 80
    assert all(dtypes(layer.outputs) == {"Half"} for layer in backbone.layers)


def test_a_cuda_graph_can_hold_each_plan(backbone, step, unrolled):
    assert all(plan.is_capturable for plan in (backbone, step, *unrolled.values()))


def test_products_compute_in_half_precision(step, unrolled):
    for plan in (step, *unrolled.values()):
        assert len(products(plan.layers)) > 20
        for layer in products(plan.layers):
            assert dtypes(layer.inputs) <= {"Half"}, layer.name


def test_roi_align_without_the_plugin_is_one_kernel(step):
    """It reads the pyramid as the backbone left it: nothing before it moves a level about."""
    kernels = [layer for layer in step.layers if any("PSRoiAlignCL" in node for node in layer.nodes)]
    assert len(kernels) == 1
    assert set(FEATURES) <= {tensor.name for tensor in kernels[0].inputs}


def test_the_product_of_roi_align_becomes_a_sum_of_the_same_value(small_bundle):
    graph = onnx.load(small_bundle / "denoise_step.onnx")
    inputs = {
        value.name: np.random.default_rng(0)
        .uniform(0, 1, [side.dim_value or 2 for side in value.type.tensor_type.shape.dim])
        .astype(np.int64 if value.name.startswith("t") else np.float32)
        for value in graph.graph.input
    }
    outputs = []
    for rewrite in (lambda graph: None, sums_for_products):
        rewrite(graph)
        session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        outputs.append(session.run(None, inputs))
    for product, weighted_sum in zip(*outputs, strict=True):
        np.testing.assert_allclose(product, weighted_sum, atol=1e-4)
    [function] = [each for each in graph.functions if each.name == "PSRoiAlignCL"]
    written = {node.op_type for node in function.node}
    assert "ReduceSum" in written
    assert "MatMul" not in written


def test_attention_is_fused(step):
    fused = [layer for layer in step.layers if "_mha" in layer.name]
    assert len(fused) == 1, "self-attention among 49 tokens; one query makes no keys that could be fused away"


def test_steps_share_their_weights_and_scratch_memory(unrolled):
    assert unrolled[4].weight_bytes <= 1.01 * unrolled[1].weight_bytes
    assert unrolled[4].scratch_bytes <= 1.1 * unrolled[1].scratch_bytes


def test_memory_stays_within_its_budget(small_bundle, backbone, step):
    weights = (small_bundle / "weights.safetensors").stat().st_size
    assert backbone.weight_bytes + step.weight_bytes <= 1.05 * weights
    # Tokens of all regions that live at once in self-attention: the region for the head, the residual, query, key,
    # value, what was attended and projected, LayerNorm's float32 (two), its output. Taps of ROIAlign in memory
    # would be four more.
    assert step.scratch_bytes <= 11 * LARGEST_TOKENS
    # Every input of four images at stride 2, with the widest layer of the network there.
    assert backbone.scratch_bytes <= 4 * 64 * 96 * 96 * 2 * 10


def test_bf16_engines_hold_no_fp16(small_bundle):
    plan = compile_part(small_bundle, "denoise_step", "bf16")
    used = {tensor.dtype for layer in plan.layers for tensor in (*layer.inputs, *layer.outputs)}
    assert "BFloat16" in used
    assert "Half" not in used


def test_fp32_engines_build_too(small_bundle):
    plan = compile_part(small_bundle, "denoise_step", "fp32")
    used = {tensor.dtype for layer in products(plan.layers) for tensor in layer.inputs}
    assert used == {"Float"}


# ---- plugins ----


def test_the_nodes_become_the_plugins(step_with_plugins, stand_ins):
    plugins = [layer for layer in step_with_plugins.layers if layer.kind == "custom_layer"]
    assert [layer.nodes for layer in plugins] == [("node_multilevel_roi_align",), ("node_dynamic_conv",)]
    assert stand_ins["PSRoiAlignCL"].seen == [{"sampling_ratio": 1, "canonical_size": 112.0}]
    assert stand_ins["PSDynamicConv"].seen == [{"epsilon": pytest.approx(1e-5)}]
    assert step_with_plugins.is_capturable


def test_the_plugins_read_and_write_without_transposes(step_with_plugins):
    layers = step_with_plugins.layers
    written_by = {tensor.name: layer for layer in layers for tensor in layer.outputs}
    read_by = {tensor.name: layer for layer in layers for tensor in layer.inputs}
    for plugin in (layer for layer in layers if layer.kind == "custom_layer"):
        before = [written_by.get(tensor.name) for tensor in plugin.inputs]
        after = [read_by.get(tensor.name) for tensor in plugin.outputs]
        assert not [layer.name for layer in (*before, *after) if layer is not None and layer.is_transpose]


def test_roi_align_takes_maps_in_fp16_and_boxes_in_fp32(step_with_plugins):
    [roi_align] = [
        layer for layer in step_with_plugins.layers if layer.nodes == ("node_multilevel_roi_align",)
    ]
    shapes = [tensor.shape for tensor in roi_align.inputs[:4]]
    assert shapes == [(-1, 32, 48, 96), (-1, 16, 24, 96), (-1, 8, 12, 96), (-1, 4, 6, 96)]
    assert [tensor.dtype for tensor in roi_align.inputs] == ["Half"] * 4 + ["Float"]
    assert [(tensor.shape, tensor.dtype) for tensor in roi_align.outputs] == [((-1, 49, 96), "Half")]


def test_plugins_are_taken_only_when_they_are_wanted(step):
    assert "custom_layer" not in kinds(step.layers)


# ---- the folder of a target ----


@pytest.fixture
def bundle(small_bundle, tmp_path):
    return shutil.copytree(small_bundle, tmp_path / "bundle")


def test_a_target_is_a_folder_with_plans_and_a_sidecar(fp16_engines):
    bundle, folder, steps = fp16_engines
    assert folder.name == f"sm86-rtx{tensorrt_module().__version__}-fp16"
    parts = [f"building {part} for sm_86 in fp16" for part in ("backbone", "denoise_step", "e2e_k1")]
    assert [step for step in steps if ":" not in step] == parts
    for part in parts:
        assert any(step.startswith(f"{part}: building engine, ") for step in steps)
    record = EnginesRecord.model_validate_json((folder / "engines.json").read_text())
    assert {path.name for path in folder.iterdir()} == {
        "engines.json",
        *(engine.file for engine in record.engines.values()),
    }
    manifest = load_manifest(bundle)
    assert (record.sm, record.precision, record.embedding_space) == (86, "fp16", manifest.embedding_space)
    step = record.engines["denoise_step"]
    assert step.graph_sha256 == manifest.files["denoise_step.fp16.onnx"]
    assert step.channels_last == list(FEATURES)
    assert [profile["boxes_t"] for profile in step.profiles] == [
        ([1, 1, 4], [1, 12, 4], [1, 12, 4]),
        ([1, 1, 4], [3, 12, 4], [3, 20, 4]),
    ]
    assert [path.name for path in (bundle / "plans").iterdir()] == [folder.name], "nothing half-written stays"


def test_a_gpu_that_tensorrt_rtx_does_not_know_is_refused(bundle):
    with pytest.raises(
        EngineError, match=r"sm must be one of .*86, 89.* got 87; .* on the machine that has one"
    ):
        build_engines(bundle, EngineOptions(sm=87))
    assert not (bundle / "plans").exists()


def test_a_precision_that_was_not_exported_is_refused(small_bundle, bundle):
    manifest = load_manifest(bundle)
    manifest.files = {name: digest for name, digest in manifest.files.items() if "bf16" not in name}
    (bundle / "manifest.json").write_text(manifest.model_dump_json())
    with pytest.raises(
        EngineError, match=r"must hold backbone.bf16.onnx, got .*; export with --precision bf16"
    ):
        build_engines(bundle, EngineOptions(sm=SM, precision="bf16"))
    assert list((bundle / "plans").iterdir()) == []


def test_an_altered_bundle_is_refused(bundle):
    (bundle / "backbone.fp16.onnx").write_bytes(b"altered")
    with pytest.raises(BundleError, match="must have SHA-256"):
        build_engines(bundle, EngineOptions(sm=SM))


def test_a_graph_that_tensorrt_cannot_read_is_named(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"bad.onnx must be an ONNX graph, got: "):
        build_plan(tensorrt_module(), tmp_path / "bad.onnx", PlanOptions(SM, []))


def test_a_library_without_plugins_is_refused(tmp_path):
    with pytest.raises(
        EngineError, match=r"plugin library must be a file, got .*; make trt-plugin writes one"
    ):
        load_plugins(tensorrt_module(), tmp_path / "none.so")


# ---- the command ----


def psdiff(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_the_command_builds_engines_of_a_bundle(bundle):
    result = psdiff(
        bundle, "--target", "trt", "--sm", 89, "--max-batch", 2, "--max-proposals", 16, "--unrolled", ""
    )
    assert result.exit_code == 0, result.output
    [folder] = (bundle / "plans").iterdir()
    assert re.fullmatch(rf"wrote {folder}: 2 engines, [\d.]+ MB\n", result.stdout)
    record = EnginesRecord.model_validate_json((folder / "engines.json").read_text())
    assert record.engines["denoise_step"].profiles[1]["boxes_t"][2] == [2, 16, 4]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "out must be the folder of the bundle to write, got none for "),
        (["--target", "trt", "--sm", 87], 2, "sm must be one of 75, "),
        (["--target", "trt", "--sm", 86, "--unrolled", "3"], 2, "unrolled must be some of 1,2,4,8, got 3"),
        (
            ["--target", "trt", "--sm", 86, "--plugins", "none.so"],
            2,
            "plugin library must be a file, got none.so",
        ),
    ],
)
def test_the_command_says_what_is_wrong(bundle, arguments, code, message):
    result = psdiff(bundle, *arguments)
    assert result.exit_code == code
    assert message in result.stderr


def test_engines_of_no_bundle_are_refused(tmp_path):
    result = psdiff(tmp_path, "--target", "trt", "--sm", 86)
    assert result.exit_code == 3
    assert "bundle must be a folder with manifest.json" in result.stderr


# ---- the table itself ----

LOG = """Layers:
Name: __myl_TranResh_myl0_1, LayerType: kgen, \
Inputs: [ { Name: p2, Dimensions: [-1,96,32,48], Strides: [9,1], StrideOrder: [1,0], Datatype: Half, \
Format: (Linear) Row major linear format }], \
Constants: [ { Name: c, Dimensions: [3], Strides: [1], StrideOrder: [0], Datatype: Float, \
Format: (Linear) Row major linear format }], \
Outputs: [ { Name: q, Dimensions: [-1,1536,96], Strides: [9,1], StrideOrder: [1,0], Datatype: Half, \
Format: (Linear) Row major linear format }], \
TacticName: __myl_TranResh_0xaf, StreamId: 0, Metadata: [ONNX Layer: node_permute][ONNX Layer: node_b | f]
Name: wait, LayerType: wait, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0
"""


def test_the_table_is_read_from_the_log():
    [layer] = read_layers(["something else", LOG])
    half = {"dtype": "Half", "format": "Linear"}
    assert layer == Layer(
        "__myl_TranResh_myl0_1",
        "kgen",
        (LayerTensor("p2", (-1, 96, 32, 48), **half),),
        (LayerTensor("q", (-1, 1536, 96), **half),),
        ("node_permute", "node_b | f"),
    )
    assert layer.is_transpose
    assert read_memory(["Total Activation Memory: 12 bytes", "Total Weights Memory: 34 bytes"]) == (12, 34)


@pytest.mark.parametrize(
    ("name", "moves"),
    [("__myl_MoveReshTran_myl0_2", True), ("__myl_Move_myl0_2", False), ("__myl_TranAddMul_myl0_3", False)],
)
def test_a_kernel_that_computes_is_no_transpose(name, moves):
    assert Layer(name, "kgen", (), (), ()).is_transpose is moves
