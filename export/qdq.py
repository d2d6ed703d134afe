"""A float32 graph with Q/DQ pairs around chosen nodes: onnxruntime.quantization, set up for two readers.

int8, for onnxruntime on CPUs: activations are unsigned with a zero point, 0..255. Its kernels multiply unsigned by
signed, and a range from 0 to 6 then has all 256 values and swallows the Clip that made it; with signed symmetric
activations each Clip stays a float32 node, and the convolution before it float32 with it. Sums of residuals and
upsampling follow when what they read is quantised. Convolutions write 8 bits, matrix products float32.
int8-trt, for TensorRT: activations are signed, their zero point 0, as TensorRT demands; pairs stand before weighted
nodes alone, and their outputs are left to its fusions.
Weights are signed, symmetric, one scale an output channel, in both. Nodes of the domain `psdiff` are not touched.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Mapping
from contextlib import contextmanager
from typing import Any

import onnx
from onnx import numpy_helper
from onnxruntime.quantization import QDQQuantizer, QuantType

from ..bundle import QuantizedForm
from .quantizable import WEIGHTED, Constants

# These carry 8 bits on from quantised nodes to the next.
_FOLLOWING = ("Add", "Clip", "Relu", "MaxPool", "Resize")

_OPTIONS: Mapping[str, Any] = {"QDQOpTypePerChannelSupportToAxis": {"MatMul": 1}}
_OPTIONS_OF: Mapping[QuantizedForm, Mapping[str, Any]] = {
    "int8": {"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
    "int8-trt": {
        "OpTypesToExcludeOutputQuantization": list(WEIGHTED),
        "ActivationSymmetric": True,
        "QuantizeBias": False,
    },
}


def quantized(
    model: onnx.ModelProto,
    nodes: Collection[str],
    ranges: Any,  # noqa: ANN401
    form: QuantizedForm,
) -> onnx.ModelProto:
    """A copy of a float32 graph in which the named nodes compute in 8 bits.

    nodes: of quantizable.candidates. ranges: the TensorsData of calibration. Without nodes it is the graph itself.
    """
    if not nodes:
        return copy.deepcopy(model)
    model = with_constants(model, nodes)
    chosen = [*nodes, *(following(model.graph, nodes) if form == "int8" else ())]
    activations = QuantType.QUInt8 if form == "int8" else QuantType.QInt8
    with _quiet():
        quantizer = QDQQuantizer(
            model,
            True,  # a scale a channel
            False,  # all 8 bits of the weights: OnnxEngine asks for kernels that do not saturate
            QuantType.QInt8,
            activations,
            ranges,
            chosen,
            [],
            [*WEIGHTED, *_FOLLOWING],
            {**_OPTIONS, **_OPTIONS_OF[form]},
        )
        quantizer.quantize_model()
    quantizer.model.topological_sort()
    return quantizer.model.model


def ranged(model: onnx.ModelProto) -> list[str]:
    """The kinds of nodes whose tensors need ranges; only convolutions hand 8 bits on."""
    convolves = any(node.op_type == "Conv" for node in model.graph.node)
    return [*WEIGHTED, *(_FOLLOWING if convolves else ())]


def with_constants(model: onnx.ModelProto, nodes: Collection[str]) -> onnx.ModelProto:
    """A copy in which weights and biases of the named nodes are initializers, which is what can be quantised."""
    model = copy.deepcopy(model)
    graph, constants = model.graph, Constants(model.graph)
    wanted = {
        name
        for node in graph.node
        if node.name in nodes
        for name in node.input[1:]
        if name in constants and constants.maker(name) is not None
    }
    # All outputs of a split become initializers together: no tensor may be made twice.
    made = {name: constants.maker(name) for name in wanted}
    for maker in {id(node): node for node in made.values() if node is not None}.values():
        for name in maker.output:
            graph.initializer.append(numpy_helper.from_array(constants.value(name), name))
        graph.node.remove(maker)
    _drop_unread(graph)
    return model


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Remove casts that nothing reads any more, and the initializers that they read."""
    while True:
        read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
        unread = [node for node in graph.node if read.isdisjoint(node.output)]
        if not unread:
            break
        for node in unread:
            graph.node.remove(node)
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def following(graph: onnx.GraphProto, nodes: Collection[str]) -> list[str]:
    """The nodes that read what quantised nodes write, and nothing else that varies."""
    constants = Constants(graph)
    in_8_bits: set[str] = {
        name for node in graph.node if node.op_type == "Conv" and node.name in nodes for name in node.output
    }
    following = []
    for node in graph.node:
        # Sizes and limits are no data: Resize and Clip carry their first input.
        data = node.input[:1] if node.op_type in ("Clip", "Resize") else node.input
        varying = [name for name in data if name not in constants]
        if node.op_type in _FOLLOWING and varying and in_8_bits.issuperset(varying):
            following.append(node.name)
            in_8_bits.update(node.output)
    return following


@contextmanager
def _quiet():  # noqa: ANN202 - a generator for the decorator
    """Without the advice of onnxruntime's quantiser, which it logs as warnings of the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
