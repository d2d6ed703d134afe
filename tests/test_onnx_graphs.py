"""The graphs of a bundle: psdiff's own nodes and what they mean, unrolled steps, half precision, shared weights."""

import json
import struct
from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, shape_inference
from psdiff.bundle import PRECISIONS, BundleError, graph_file, load_manifest
from psdiff.export.functions import DYNAMIC_CONV, DYNAMIC_CONV_INPUTS, ROI_ALIGN, ROI_ALIGN_INPUTS
from psdiff.kernels.reference import dynamic_conv, multilevel_roi_align
from psdiff.models.config import PSDiffConfig
from psdiff.models.preprocess import seeded_noise
from psdiff.models.sampling import STEP_INPUTS, denoise
from psdiff.runtime.detector import OnnxEngine

WEIGHTS = "weights.safetensors"
TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
HALVES = [precision for precision in PRECISIONS if precision != "fp32"]
# What changes shape with the data, or cannot be captured: nothing of it may be in a step.
FORBIDDEN = {"Loop", "Scan", "If", "NonZero", "NonMaxSuppression", "RoiAlign", "TopK", "Unique", "Compress"}


def session(model):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def load(folder, part, precision="fp32"):
    return onnx.load(folder / graph_file(part, precision))


def all_nodes(model):
    return [*model.graph.node, *(node for function in model.functions for node in function.node)]


def images_of(count, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (count, 128, 192, 3), dtype=np.uint8)


def start(images, proposals=12):
    noise = [seeded_noise(seed, proposals, 64) for seed in range(images)]
    return [np.stack(part) for part in zip(*noise, strict=True)]


# ---- nodes and functions ----


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_holds_the_two_nodes_of_the_plugins_and_a_function_for_each(small_bundle, precision):
    model = load(small_bundle, "denoise_step", precision)
    ours = {node.op_type: node for node in model.graph.node if node.domain == "psdiff"}
    assert set(ours) == {function.name for function in model.functions} == {ROI_ALIGN, DYNAMIC_CONV}
    attributes = {
        name: {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        for name, node in ours.items()
    }
    assert attributes[ROI_ALIGN] == {"sampling_ratio": 1, "canonical_size": 112.0}
    assert attributes[DYNAMIC_CONV] == {"epsilon": pytest.approx(1e-5)}
    assert [len(ours[name].input) for name in (ROI_ALIGN, DYNAMIC_CONV)] == [5, 6]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("part", ["denoise_step", "e2e_k1", "e2e_k8"])
def test_no_operator_has_a_shape_that_depends_on_data(small_bundle, part, precision):
    assert FORBIDDEN.isdisjoint(node.op_type for node in all_nodes(load(small_bundle, part, precision)))


def only_the_function(bundle, name, inputs, output_shape):
    """A graph of one psdiff node, with the function of a bundle's step."""
    step = load(bundle, "denoise_step")
    [node] = [node for node in step.graph.node if node.op_type == name]
    alone = helper.make_node(name, list(inputs), ["output"], domain="psdiff")
    alone.attribute.extend(node.attribute)
    values = [helper.make_tensor_value_info(key, TensorProto.FLOAT, shape) for key, shape in inputs.items()]
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, output_shape)
    graph = helper.make_graph([alone], name, values, [output])
    functions = [function for function in step.functions if function.name == name]
    return helper.make_model(
        graph, opset_imports=step.opset_import, ir_version=step.ir_version, functions=functions
    )


def test_the_function_of_roi_align_is_the_reference(small_bundle):
    """Boxes inside, across every border, far outside, of no size, and at the sizes where the level changes."""
    rng = np.random.default_rng(1)
    maps = [rng.standard_normal((2, 32 >> k, 48 >> k, 96), dtype=np.float32) for k in range(4)]
    special = [
        (-30, -20, 25, 40), (150, 100, 260, 190), (-900, 5, -700, 60), (50, 50, 50, 50), (90, 60, 40, 20),
        (0, 0, 56, 56), (0, 0, 112, 112), (0, 0, 224, 224), (8, 8, 63.999, 64),
    ]  # fmt: skip
    corners = rng.uniform(0, 130, (2, 41, 2))
    ordinary = np.concatenate([corners, corners + rng.uniform(2, 120, (2, 41, 2))], axis=2)
    boxes = np.concatenate([ordinary, np.tile(np.array(special), (2, 1, 1))], axis=1).astype(np.float32)
    inputs = dict(zip(ROI_ALIGN_INPUTS, [*maps, boxes], strict=True))
    shapes = {name: ["B", *value.shape[1:]] for name, value in inputs.items()}
    shapes["boxes_xyxy"] = ["B", "N", 4]
    [got] = session(only_the_function(small_bundle, ROI_ALIGN, shapes, ["M", 49, 96])).run(None, inputs)
    wanted = multilevel_roi_align(
        [torch.from_numpy(level).permute(0, 3, 1, 2) for level in maps],
        torch.from_numpy(boxes),
        pool_size=7,
        sampling_ratio=1,
        canonical_size=112.0,
    )
    assert got.shape == (100, 49, 96)
    np.testing.assert_allclose(got, wanted.numpy(), atol=1e-4)


def test_a_box_that_is_no_number_pools_zeros(small_bundle):
    maps = [np.ones((1, 32 >> k, 48 >> k, 96), np.float32) for k in range(4)]
    boxes = np.array([[[np.nan] * 4, [10, 10, 40, 60]]], np.float32)
    inputs = dict(zip(ROI_ALIGN_INPUTS, [*maps, boxes], strict=True))
    shapes = {name: value.shape for name, value in inputs.items()}
    [got] = session(only_the_function(small_bundle, ROI_ALIGN, shapes, ["M", 49, 96])).run(None, inputs)
    assert (got[0] == 0).all()
    np.testing.assert_allclose(got[1], 1, rtol=1e-6)


def test_the_function_of_dynamic_conv_is_the_reference(small_bundle):
    rng = np.random.default_rng(2)
    shapes = [("M", 49, 96), ("M", 2 * 96 * 8), (8,), (8,), (96,), (96,)]
    sizes = [tuple(7 if side == "M" else side for side in shape) for shape in shapes]
    arrays = [rng.standard_normal(size, dtype=np.float32) for size in sizes]
    model = only_the_function(
        small_bundle,
        DYNAMIC_CONV,
        dict(zip(DYNAMIC_CONV_INPUTS, shapes, strict=True)),
        ["M", 49, 96],
    )
    [got] = session(model).run(None, dict(zip(DYNAMIC_CONV_INPUTS, arrays, strict=True)))
    tokens, params, *norms = map(torch.from_numpy, arrays)
    wanted = dynamic_conv(tokens, params, (norms[0], norms[1]), (norms[2], norms[3]))
    np.testing.assert_allclose(got, wanted.numpy(), atol=2e-4)


# ---- unrolled ----


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_unrolled_graph_is_the_loop(small_bundle, steps):
    images, noise = images_of(3), start(3, proposals=5)
    engine, grid = OnnxEngine(small_bundle), load_manifest(small_bundle).timesteps[steps]
    wanted = denoise(engine, engine.backbone(images), *noise, grid)
    inputs = dict(zip(("image", "boxes_T", "emb_T"), (images, *noise), strict=True))
    got = session(small_bundle / f"e2e_k{steps}.onnx").run(["boxes_xyxy", "scores", "embeddings"], inputs)
    np.testing.assert_allclose(got[0], wanted.boxes_xyxy, atol=1e-3)
    np.testing.assert_allclose(got[1], wanted.scores, atol=1e-4)
    assert (got[2] * wanted.embeddings).sum(-1).min() >= 0.9999


def test_the_steps_of_an_unrolled_graph_share_their_weights(small_bundle):
    one, four = (load(small_bundle, f"e2e_k{steps}") for steps in (1, 4))
    sizes = [
        sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer if tensor.dims)
        for model in (one, four)
    ]
    # Where step and step are one number, the last step does without the tables of the next.
    assert sizes[1] <= 1.01 * sizes[0]
    counts = [Counter(node.op_type for node in model.graph.node) for model in (one, four)]
    assert counts[1][ROI_ALIGN] == 4 * counts[0][ROI_ALIGN] == 4
    assert counts[1]["Conv"] == counts[0]["Conv"] > 50


# ---- half precision ----


def inferred_types(model):
    inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    values = [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]
    known = {value.name: value.type.tensor_type.elem_type for value in values}
    return known | {tensor.name: tensor.data_type for tensor in inferred.graph.initializer}


@pytest.mark.parametrize("precision", HALVES)
def test_products_compute_in_half_precision_and_state_and_boxes_in_float32(small_bundle, precision):
    model = load(small_bundle, "denoise_step", precision)
    types, half = inferred_types(model), TYPES[precision]
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul", "Softmax"):
            assert {types[name] for name in (*node.input, *node.output) if name} == {half}, node.name
        if node.op_type in ("Sin", "Cos", "Exp", "Sqrt"):
            assert types[node.input[0]] == TensorProto.FLOAT, node.name
    [roi_align] = [node for node in model.graph.node if node.op_type == ROI_ALIGN]
    assert [types[name] for name in roi_align.input] == [half] * 4 + [TensorProto.FLOAT]
    assert {types[value.name] for value in model.graph.output} == {TensorProto.FLOAT}
    assert [types[name] for name in STEP_INPUTS[4:6]] == [TensorProto.FLOAT] * 2


@pytest.mark.parametrize("precision", HALVES)
def test_a_backbone_in_half_precision_normalises_pixels_in_float32(small_bundle, precision):
    model = load(small_bundle, "backbone", precision)
    types, half = inferred_types(model), TYPES[precision]
    assert {types[node.output[0]] for node in model.graph.node if node.op_type == "Conv"} == {half}
    assert {types[node.output[0]] for node in model.graph.node if node.op_type in ("Div", "Sub")} == {
        TensorProto.FLOAT
    }
    assert {types[value.name] for value in model.graph.output} == {half}


def test_one_step_in_fp16_moves_boxes_by_less_than_half_a_pixel(small_bundle):
    images, (boxes_t, emb_t) = images_of(2), start(2)
    times = {"t": np.array([420, 124]), "t_next": np.array([124, -1])}
    outputs = {}
    for precision in ("fp32", "fp16"):
        features = session(small_bundle / graph_file("backbone", precision)).run(None, {"image": images})
        inputs = dict(zip(("p2", "p3", "p4", "p5"), features, strict=True))
        step = session(small_bundle / graph_file("denoise_step", precision))
        outputs[precision] = step.run(None, inputs | {"boxes_t": boxes_t, "emb_t": emb_t} | times)
    wanted, got = outputs["fp32"], outputs["fp16"]
    assert (np.abs(wanted[2] - got[2]) * [192, 128, 192, 128]).max() <= 0.5
    np.testing.assert_allclose(got[3], wanted[3], atol=1e-3)
    assert (wanted[4] * got[4]).sum(-1).min() >= 0.999


def test_bf16_graphs_are_the_fp16_graphs_in_another_type(small_bundle):
    half, brain = (load(small_bundle, "denoise_step", precision) for precision in HALVES)
    operators = [
        Counter(node.op_type for node in all_nodes(model) if node.op_type != "Cast")
        for model in (half, brain)
    ]
    assert operators[0] == operators[1]
    types = inferred_types(brain)
    assert all(kind != TensorProto.FLOAT16 for name, kind in types.items() if not name.endswith(".half"))


# ---- shared weights ----


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("part", ["backbone", "denoise_step", "e2e_k4"])
def test_large_weights_are_pointers_into_the_file_of_weights(small_bundle, part, precision):
    content = (small_bundle / WEIGHTS).read_bytes()
    (header,) = struct.unpack_from("<Q", content)
    entries = json.loads(content[8 : 8 + header])
    spans = {
        tuple(8 + header + offset for offset in entry["data_offsets"])
        for name, entry in entries.items()
        if name != "__metadata__"
    }
    model = onnx.load(small_bundle / graph_file(part, precision), load_external_data=False)
    pointing, inside = 0, 0
    for tensor in model.graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where:
            first, length = int(where["offset"]), int(where["length"])
            assert where["location"] == WEIGHTS
            assert (first, first + length) in spans
            assert length == helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * np.prod(tensor.dims)
            pointing += length
        else:
            inside += len(tensor.raw_data)
    assert pointing > 4 * inside


def test_a_graph_without_its_file_of_weights_is_refused(small_bundle, tmp_path):
    for name in ("backbone.onnx", "denoise_step.onnx"):
        (tmp_path / name).write_bytes((small_bundle / name).read_bytes())
    with pytest.raises(BundleError, match=r"backbone.onnx must be a graph that onnxruntime .* can load"):
        OnnxEngine(tmp_path)


def test_the_config_of_the_small_bundle_has_every_part(small_bundle):
    config = PSDiffConfig.model_validate(load_manifest(small_bundle).model)
    assert (config.self_attention, config.cross_attention, config.dynamic_conv) == ("intra", True, True)
