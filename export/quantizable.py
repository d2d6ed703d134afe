"""Which nodes of a graph may compute in 8 bits, and why the others stay float32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from ..models.sampling import StepOutput

# Convolutions of backbone and pyramid, and the layers that PyTorch calls Linear.
WEIGHTED = ("Conv", "MatMul", "Gemm")
TIMES = frozenset({"t", "t_next"})

# What weights pass through between their initializer and the node that multiplies by them.
_UNPACKING = ("Cast", "Split", "Transpose")

PRODUCT = "it multiplies two activations"
OF_TIME = "it sees t alone: one row a step, with nothing to win"
HEAD = "it is the last layer before boxes, scores or embeddings"
ARITHMETIC = "boxes, the sampler's state, norms, softmax and sums are float32 by design"
SENSITIVE = "with it in 8 bits the bundle fails its proof"


class NodeId(NamedTuple):
    """A node of one of a bundle's graphs."""

    part: str
    """backbone or denoise_step."""
    name: str


class Constants:
    """Tensors of a graph that are known before it runs: initializers, and what casts and splits make of them."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._known = {tensor.name: tensor for tensor in graph.initializer}
        self._makers = {
            name: node for node in graph.node if node.op_type in _UNPACKING for name in node.output
        }

    def __contains__(self, name: str) -> bool:
        if name in self._known:
            return True
        maker = self._makers.get(name)
        return maker is not None and all(source in self for source in maker.input)

    def maker(self, name: str) -> onnx.NodeProto | None:
        """The node that unpacks a constant; None where it is an initializer."""
        return None if name in self._known else self._makers[name]

    def value(self, name: str) -> NDArray[np.generic]:
        """Raises KeyError where the tensor is no constant."""
        if name in self._known:
            return numpy_helper.to_array(self._known[name])
        maker = self._makers[name]
        inputs = {source: self.value(source) for source in maker.input}
        return _evaluate(maker, inputs)[list(maker.output).index(name)]


def _evaluate(node: onnx.NodeProto, inputs: dict[str, NDArray[np.generic]]) -> list[NDArray[np.generic]]:
    described = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in inputs.items()
    ]
    graph = helper.make_graph(
        [node], "constants", described, [onnx.ValueInfoProto(name=n) for n in node.output]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    return list(ReferenceEvaluator(model).run(None, inputs))  # type: ignore[arg-type]


def candidates(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes that may compute in 8 bits, in the order of the graph."""
    stay = dict(staying(model))
    return [node.name for node in model.graph.node if node.op_type in WEIGHTED and node.name not in stay]


def staying(model: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    """(name, reason) of each node that computes and is float32 whatever its error would be."""
    graph, constants = model.graph, Constants(model.graph)
    heads = _heads(graph, constants)
    of_frame = _depending_on(graph, {value.name for value in graph.input} - TIMES)
    for node in graph.node:
        if all(name in constants for name in node.output) or node.op_type in ("Shape", "Constant"):
            continue
        if node.op_type not in WEIGHTED:
            yield node.name, ARITHMETIC
        elif node.input[1] not in constants:
            yield node.name, PRODUCT
        elif node.name in heads:
            yield node.name, HEAD
        elif node.input[0] not in of_frame:
            yield node.name, OF_TIME


def _heads(graph: onnx.GraphProto, constants: Constants) -> set[str]:
    """The weighted nodes behind which only arithmetic follows, up to an output of the denoising step."""
    makers = {name: node for node in graph.node for name in node.output}
    to_visit = [value.name for value in graph.output if value.name in StepOutput._fields]
    heads, visited = set(), set()
    while to_visit:
        node = makers.get(to_visit.pop())
        if node is None or node.name in visited:
            continue
        visited.add(node.name)
        if node.op_type in WEIGHTED and node.input[1] in constants:
            heads.add(node.name)
        else:
            to_visit += node.input
    return heads


def _depending_on(graph: onnx.GraphProto, names: Iterable[str]) -> set[str]:
    """The tensors that are, or are made of, the named ones."""
    reached = set(names)
    for node in graph.node:
        if not reached.isdisjoint(node.input):
            reached.update(node.output)
    return reached
