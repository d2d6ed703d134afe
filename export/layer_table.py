"""What TensorRT made of a graph: the table of kernels that the builder writes to its log at the end of a build.

An engine can only be inspected where it can be loaded, on the GPU it was built for. The log says the same, and
says it on a machine without a GPU (TensorRT-RTX; names of the kinds are TensorRT's own).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_TENSOR = re.compile(r"\{ Name: ([^,]*), Dimensions: \[([^\]]*)\],.*?Datatype: (\w+), Format: \((\w+)\)")
_MEMORY = re.compile(r"(Total Activation Memory|Total Weights Memory): (\d+) bytes")
# These order the streams of an engine; they compute nothing.
BOOKKEEPING = ("signal", "wait", "shape_call")


@dataclass(frozen=True)
class LayerTensor:
    """A tensor that a kernel reads or writes."""

    name: str
    shape: tuple[int, ...]
    """-1 where it is not fixed."""
    dtype: str
    """TensorRT's word: Half, BFloat16, Float, Int64, ..."""
    format: str
    """TensorRT's word: Linear, Channel, ..."""


@dataclass(frozen=True)
class Layer:
    """One kernel of an engine."""

    name: str
    kind: str
    """kgen (pointwise, reduction, gather), gemm, correlation (convolution), runtime_fusion, custom_layer (plugin)."""
    inputs: tuple[LayerTensor, ...]
    outputs: tuple[LayerTensor, ...]
    nodes: tuple[str, ...]
    """Names of the ONNX nodes that it computes."""

    @property
    def is_transpose(self) -> bool:
        """Whether it only moves a tensor about."""
        return bool(re.match(r"__myl_(Tran|Resh|Move|Copy)+_", self.name)) and "Tran" in self.name


def read_layers(log: Iterable[str]) -> list[Layer]:
    """The kernels that compute something, from the lines of a builder's log with profiling_verbosity DETAILED."""
    tables = (message for message in log if message.lstrip().startswith("Layers:"))
    lines = (line for table in tables for line in table.splitlines() if line.startswith("Name: "))
    layers = (_layer(line) for line in lines)
    return [layer for layer in layers if layer.kind not in BOOKKEEPING]


def read_memory(log: Iterable[str]) -> tuple[int, int]:
    """Bytes of scratch memory at the largest profile, and of weights."""
    found = {name: int(size) for message in log for name, size in _MEMORY.findall(message)}
    return found.get("Total Activation Memory", 0), found.get("Total Weights Memory", 0)


def kinds(layers: Sequence[Layer]) -> dict[str, int]:
    """How many kernels there are of each kind."""
    return dict(Counter(layer.kind for layer in layers))


def _layer(line: str) -> Layer:
    name, rest = line.removeprefix("Name: ").split(", LayerType: ", 1)
    kind = rest.partition(",")[0]
    inputs = _between(rest, "Inputs: [", "], Constants: [")
    outputs = _between(rest, "Outputs: [", "], TacticName")
    nodes = tuple(re.findall(r"\[ONNX Layer: ([^\]]*)\]", rest))
    return Layer(name, kind, _tensors(inputs), _tensors(outputs), nodes)


def _between(text: str, start: str, end: str) -> str:
    return text.partition(start)[2].partition(end)[0]


def _tensors(text: str) -> tuple[LayerTensor, ...]:
    return tuple(
        LayerTensor(name, tuple(int(side) for side in shape.split(",") if side), dtype, form)
        for name, shape, dtype, form in _TENSOR.findall(text)
    )
