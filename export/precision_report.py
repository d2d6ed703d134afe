"""What 8 bits cost: the error of each tensor against float32, and what stayed float32 and why."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from pydantic import BaseModel, ConfigDict
from rich.table import Table

from ..models.verification import Comparison
from .calibration import Recording
from .quantizable import Constants

# onnxruntime.quantization names what it adds after what was there.
_WEIGHT, _OUTPUT = "_quantized", "_QuantizeLinear_Input"

# Rows of the table that people read; the file holds all.
SHOWN = 8


class TensorError(BaseModel):
    """How far a tensor of the 8 bit graph is from the same tensor in float32."""

    model_config = ConfigDict(extra="forbid")

    part: str
    """backbone or denoise_step; each is given float32 inputs, so the errors of one are not those of the other."""
    tensor: str
    kind: Literal["weight", "activation"]
    sqnr_db: float | None
    """Signal to error, 10 log10(sum x^2 / sum (x - y)^2); None where there is no error, or no signal."""
    relative: float
    """Root of sum (x - y)^2 / sum x^2; 0 where there is no signal."""
    largest: float
    """max |x - y|."""


class StayedFloat32(BaseModel):
    """Nodes that compute in float32 for one reason."""

    model_config = ConfigDict(extra="forbid")

    part: str
    operation: str
    reason: str
    nodes: list[str]
    harms: list[float | None] | None = None
    """Of a search: the largest difference with this node alone in 8 bits, in units of the tolerance."""


class PrecisionReport(BaseModel):
    """precision.int8.json."""

    model_config = ConfigDict(extra="forbid")

    calibration: str
    keep_fp32: Literal["auto", "none"]
    calibration_pictures: int
    held_out_pictures: int
    """Errors are measured on these; ranges were found on the others."""
    steps: int
    """K of the diffusion that was walked through."""
    tools: dict[str, str]
    quantized: dict[str, list[str]]
    """Part -> the weighted nodes that compute in 8 bits; sums and limits between them follow in onnxruntime."""
    num_candidates: int
    """Weighted nodes that could compute in 8 bits."""
    tensors: list[TensorError]
    """Of the graphs for onnxruntime; the weights of those for TensorRT are the same."""
    stayed_fp32: list[StayedFloat32]
    proof: list[dict[str, float]]
    """The comparison of psdiff verify, by K, as it came out on the machine that quantised."""
    holds: bool
    """Whether the bundle is proven in 8 bits, and so may be served."""


@dataclass
class _Sums:
    signal: float = 0.0
    error: float = 0.0
    largest: float = 0.0

    def add(self, wanted: NDArray[np.generic], found: NDArray[np.generic]) -> None:
        x = np.asarray(wanted, np.float64)
        difference = x - np.asarray(found, np.float64)
        self.signal += float((x**2).sum())
        self.error += float((difference**2).sum())
        self.largest = max(self.largest, float(np.abs(difference).max(initial=0)))

    def as_error(self, part: str, tensor: str, kind: Literal["weight", "activation"]) -> TensorError:
        has_both = self.signal > 0 and self.error > 0
        return TensorError(
            part=part,
            tensor=tensor,
            kind=kind,
            sqnr_db=10 * math.log10(self.signal / self.error) if has_both else None,
            relative=math.sqrt(self.error / self.signal) if self.signal > 0 else 0.0,
            largest=self.largest,
        )


def tensor_errors(
    part: str, full: onnx.ModelProto, quantized: onnx.ModelProto, recordings: Iterable[Recording]
) -> list[TensorError]:
    """Errors of the weights, and of the activations over the recorded calls."""
    return [*_weight_errors(part, full, quantized), *_activation_errors(part, full, quantized, recordings)]


def _weight_errors(part: str, full: onnx.ModelProto, quantized: onnx.ModelProto) -> list[TensorError]:
    originals = Constants(full.graph)
    stored = {tensor.name: tensor for tensor in quantized.graph.initializer}
    errors = []
    for node in quantized.graph.node:
        tensor = stored.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if tensor is None or tensor.data_type != TensorProto.INT8:
            continue
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        name = tensor.name.removesuffix(_WEIGHT)
        sums = _Sums()
        scale = numpy_helper.to_array(stored[node.input[1]])
        sums.add(originals.value(name), _dequantized(numpy_helper.to_array(tensor), scale, axis))
        errors.append(sums.as_error(part, name, "weight"))
    return errors


def _dequantized(values: NDArray[Any], scale: NDArray[Any], axis: int) -> NDArray[np.float64]:
    """Values of a symmetric tensor whose axis has a scale each."""
    shape = [1] * values.ndim
    if scale.size > 1:
        shape[axis] = scale.size
    return values.astype(np.float64) * scale.astype(np.float64).reshape(shape)


def _activation_errors(
    part: str, full: onnx.ModelProto, quantized: onnx.ModelProto, recordings: Iterable[Recording]
) -> list[TensorError]:
    rounded = _rounded_activations(quantized)
    names = list(rounded)
    if not names:  # nothing asked for would be all outputs
        return []
    sums = {name: _Sums() for name in names}
    wanted, found = _session(full, names), _session(quantized, [rounded[name] for name in names])
    for recording in recordings:
        for call in recording[part]:
            pairs = zip(
                wanted.run(names, dict(call)), found.run(list(rounded.values()), dict(call)), strict=True
            )
            for name, (x, y) in zip(names, pairs, strict=True):
                sums[name].add(np.asarray(x), np.asarray(y))
    return [each.as_error(part, name, "activation") for name, each in sums.items()]


def _rounded_activations(quantized: onnx.ModelProto) -> dict[str, str]:
    """Tensor of the float32 graph -> the tensor of the 8 bit graph that it became, rounded."""
    quantizers = {node.output[0]: node for node in quantized.graph.node if node.op_type == "QuantizeLinear"}
    rounded = {}
    for node in quantized.graph.node:
        source = quantizers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if source is not None:
            rounded[source.input[0].removesuffix(_OUTPUT)] = node.output[0]
    return rounded


def _session(model: onnx.ModelProto, outputs: Sequence[str]) -> ort.InferenceSession:
    """A graph as it is written, node by node, that gives inner tensors out."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    known = {value.name for value in copied.graph.output}
    copied.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs if name not in known)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return ort.InferenceSession(copied.SerializeToString(), options, providers=["CPUExecutionProvider"])


def stayed(
    part: str,
    model: onnx.ModelProto,
    reasons: Mapping[str, str],
    harms: Mapping[str, float] | None = None,
) -> list[StayedFloat32]:
    """Nodes that stayed, gathered by kind and reason. reasons: node -> reason. harms: of those that were tried."""
    groups: dict[tuple[str, str], list[str]] = {}
    for node in model.graph.node:
        if node.name in reasons:
            groups.setdefault((node.op_type, reasons[node.name]), []).append(node.name)
    return [
        StayedFloat32(
            part=part,
            operation=operation,
            reason=reason,
            nodes=nodes,
            harms=[_finite(harms[name]) for name in nodes] if harms and nodes[0] in harms else None,
        )
        for (operation, reason), nodes in groups.items()
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def proof_rows(comparisons: Sequence[Comparison]) -> list[dict[str, float]]:
    """The comparisons as JSON holds them."""
    names = ("steps", "matched", "box_px", "cosine", "score")
    return [{name: getattr(each, name) for name in names} for each in comparisons]


def report_tables(report: PrecisionReport) -> list[Table]:
    """The worst tensors, what stayed float32, and the proof, as people read them."""
    worst = Table(
        title=f"The {SHOWN} worst activations of {len(report.tensors)} tensors", title_justify="left"
    )
    for heading in ("graph", "tensor", "SQNR", "relative error", "largest error"):
        worst.add_column(heading, justify="left" if heading in ("graph", "tensor") else "right")
    activations = [each for each in report.tensors if each.kind == "activation"]
    for each in sorted(activations, key=lambda each: -each.relative)[:SHOWN]:
        sqnr = "-" if each.sqnr_db is None else f"{each.sqnr_db:.1f} dB"
        worst.add_row(each.part, each.tensor, sqnr, f"{each.relative:.4f}", f"{each.largest:.4g}")
    kept = Table(title="What stayed float32", title_justify="left")
    for heading in ("graph", "operation", "nodes", "reason"):
        kept.add_column(heading, justify="right" if heading == "nodes" else "left")
    counts: dict[tuple[str, str, str], int] = {}
    for each in report.stayed_fp32:
        # Sums and norms are of many kinds; the file tells them apart.
        operation = each.operation if each.operation in ("Conv", "MatMul", "Gemm") else "other"
        key = each.part, operation, each.reason
        counts[key] = counts.get(key, 0) + len(each.nodes)
    for (part, operation, reason), count in counts.items():
        kept.add_row(part, operation, str(count), reason)
    proof = Table(title="Against PyTorch float32, last step of each K", title_justify="left")
    for heading in ("K", "the same", "largest box difference", "smallest cosine", "largest score difference"):
        proof.add_column(heading, justify="right")
    for row in report.proof:
        numbers = (f"{row['box_px']:.3f} px", f"{row['cosine']:.4f}", f"{row['score']:.4f}")
        proof.add_row(str(int(row["steps"])), f"{row['matched']:.1%}", *numbers)
    return [worst, kept, proof]
