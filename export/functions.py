"""The two operations of psdiff in ONNX: nodes of the domain `psdiff`, and the functions that say what they mean.

A graph holds nodes `PSRoiAlignCL` and `PSDynamicConv`, and beside them a function for each, made of standard
operators. A runtime that knows neither node computes by the function: onnxruntime, OpenVINO, TensorRT without the
plugin. TensorRT with the plugin library takes its kernels instead. The functions are exports of the PyTorch
specification, so there is one text to keep right.
Legend: B images, N boxes an image, M = B*N regions, C channels, S pool size, P = S*S tokens, D dynamic width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import torch
from onnx import TensorProto, defs, helper
from onnxscript import FLOAT
from onnxscript.values import Opset
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from ..kernels.reference import FINEST_LEVEL
from ..kernels.roi_bags import row_table, rows_and_weights
from ..models.config import PSDiffConfig
from .tracing import OPSET, to_onnx

DOMAIN = "psdiff"
DOMAIN_VERSION = 1
ROI_ALIGN = "PSRoiAlignCL"
DYNAMIC_CONV = "PSDynamicConv"

# Inputs and attributes are those of the TensorRT plugins, kernels/csrc/plugin_logic.h.
ROI_ALIGN_INPUTS = ("p2", "p3", "p4", "p5", "boxes_xyxy")
ROI_ALIGN_ATTRIBUTES = {
    "sampling_ratio": defs.OpSchema.AttrType.INT,
    "canonical_size": defs.OpSchema.AttrType.FLOAT,
}
DYNAMIC_CONV_INPUTS = ("tokens", "params", "weight1", "bias1", "weight2", "bias2")
DYNAMIC_CONV_ATTRIBUTES = {"epsilon": defs.OpSchema.AttrType.FLOAT}
# These stay float32 whatever the type of the others.
ALWAYS_FLOAT32 = ("boxes_xyxy", "weight1", "bias1", "weight2", "bias2")

# The stubs of onnxscript do not know a domain's own operators.
_psdiff: Any = Opset(DOMAIN, DOMAIN_VERSION)
# ... and take no value for another's input that might have been left out.
_onnx: Any = Opset("", OPSET)


def translations() -> dict[Any, Callable[..., Any]]:
    """How torch.onnx.export writes the two custom operations: as nodes of the domain."""
    _describe(ROI_ALIGN, ROI_ALIGN_INPUTS, ROI_ALIGN_ATTRIBUTES)
    _describe(DYNAMIC_CONV, DYNAMIC_CONV_INPUTS, DYNAMIC_CONV_ATTRIBUTES)
    return {
        torch.ops.psdiff.multilevel_roi_align.default: _roi_align_node,
        torch.ops.psdiff.dynamic_conv.default: _dynamic_conv_node,
        torch.ops.aten.scaled_dot_product_attention.default: _attention,
    }


def _attention(query: FLOAT, key: FLOAT, value: FLOAT, **_: Any) -> FLOAT:
    """Attention without mask or dropout on (M, heads, L, C), which is all that the network has.

    The exporter's own translation turns the keys by way of another shape, where onnxruntime cannot let the product
    read them turned: two more copies of all keys.
    """
    size = _onnx.Squeeze(_onnx.Shape(query, start=3, end=4))
    scale = _onnx.CastLike(_onnx.Sqrt(_onnx.Cast(size, to=TensorProto.FLOAT)), query)
    # Scaled before the product, which then stays within the range of float16.
    weights = _onnx.Softmax(
        _onnx.MatMul(_onnx.Div(query, scale), _onnx.Transpose(key, perm=[0, 1, 3, 2])), axis=-1
    )
    return _onnx.MatMul(weights, value)


def _roi_align_node(
    maps: Sequence[FLOAT], boxes_xyxy: FLOAT, pool_size: int, sampling_ratio: int, canonical_size: float
) -> FLOAT:
    # The pool size is 7 in the plugin, and whatever it was in the function.
    return _psdiff.PSRoiAlignCL(
        *maps, boxes_xyxy, sampling_ratio=sampling_ratio, canonical_size=canonical_size
    )


def _dynamic_conv_node(
    tokens: FLOAT, params: FLOAT, weight1: FLOAT, bias1: FLOAT, weight2: FLOAT, bias2: FLOAT, epsilon: float
) -> FLOAT:
    return _psdiff.PSDynamicConv(tokens, params, weight1, bias1, weight2, bias2, epsilon=epsilon)


def _describe(name: str, inputs: Sequence[str], attributes: dict[str, Any]) -> None:
    """Tell onnx of an operator; without a schema the exporter does not know how many outputs it has."""
    if defs.has(name, DOMAIN_VERSION, DOMAIN):
        return
    kinds = {name: "tensor(float)" if name in ALWAYS_FLOAT32 else "T" for name in inputs}
    types = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    schema = defs.OpSchema(
        name,
        DOMAIN,
        DOMAIN_VERSION,
        inputs=[defs.OpSchema.FormalParameter(name, kind) for name, kind in kinds.items()],
        outputs=[defs.OpSchema.FormalParameter("output", "T")],
        type_constraints=[("T", types, "")],
        attributes=[
            defs.OpSchema.Attribute(name, kind, "", required=False) for name, kind in attributes.items()
        ],
    )
    defs.register_schema(schema)


def add_functions(graph: onnx.ModelProto, config: PSDiffConfig, dtype: torch.dtype) -> None:
    """Give a graph the functions of the nodes that it holds."""
    held = {node.op_type for node in graph.graph.node if node.domain == DOMAIN}
    if ROI_ALIGN in held:
        graph.functions.append(_roi_align_function(config, dtype))
    if DYNAMIC_CONV in held:
        graph.functions.append(_dynamic_conv_function(config, dtype))


class _RoiAlign(nn.Module):
    """One gather over all levels: every shape is known from B and N, as a captured graph needs it."""

    def __init__(self, config: PSDiffConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, p2: Tensor, p3: Tensor, p4: Tensor, p5: Tensor, boxes_xyxy: Tensor) -> Tensor:
        """(B, h, w, C) maps and (B, N, 4) float32 canvas pixels -> (M, P, C)."""
        config, maps = self.config, (p2, p3, p4, p5)
        rows, weights = rows_and_weights(
            [(level.shape[1], level.shape[2]) for level in maps],
            boxes_xyxy,
            pool_size=config.pool_size,
            sampling_ratio=config.sampling_ratio,
            canonical_size=config.canonical_size,
        )
        pooled = _weighted_sum(F.embedding(rows, row_table(maps)), weights)
        return pooled.unflatten(0, (-1, config.pool_size**2))


def _weighted_sum(taken: Tensor, weights: Tensor) -> Tensor:
    """Rows (L, R, C) and weights (L, R) -> (L, C), written as the runtimes of that precision like it.

    CPUs compute in float32: with a product of matrices a step of psdiff_r50 takes 169 ms, with the sum 198.
    GPUs compute in half precision: TensorRT fuses the sum with the gather into one kernel, of a product it makes
    two with all rows in memory between them. ADR 9 has the measurements.
    """
    if taken.dtype == torch.float32:
        return (weights[:, None] @ taken).squeeze(1)
    return (taken.float() * weights[..., None]).sum(1).to(taken.dtype)


def _roi_align_function(config: PSDiffConfig, dtype: torch.dtype) -> onnx.FunctionProto:
    strides = (2 ** (level + FINEST_LEVEL) for level in range(4))
    maps = [
        torch.zeros(2, config.height // stride, config.width // stride, config.channels, dtype=dtype)
        for stride in strides
    ]
    boxes = torch.tensor([10.0, 20.0, 60.0, 120.0]).expand(2, 3, 4).clone()
    batch = Dim("batch")
    shapes = (*({0: batch} for _ in maps), {0: batch, 1: Dim("num_proposals")})
    body = to_onnx(_RoiAlign(config), (*maps, boxes), ROI_ALIGN_INPUTS, ("output",), shapes)
    return _function(ROI_ALIGN, body, ROI_ALIGN_ATTRIBUTES)


class _DynamicConv(nn.Module):
    """kernels.reference.dynamic_conv with LayerNorm in float32, whatever the tokens are."""

    def forward(
        self, tokens: Tensor, params: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
    ) -> Tensor:
        """Tokens (M, P, C), params (M, 2CD), LayerNorms of D and of C -> (M, P, C)."""
        channels, width = tokens.shape[2], weight1.shape[0]
        kernel1, kernel2 = params.split(channels * width, dim=1)
        rows = (tokens @ kernel1.unflatten(1, (channels, width))).float()
        hidden = F.relu(F.layer_norm(rows, (width,), weight1, bias1)).to(tokens.dtype)
        rows = (hidden @ kernel2.unflatten(1, (width, channels))).float()
        return F.relu(F.layer_norm(rows, (channels,), weight2, bias2)).to(tokens.dtype)


def _dynamic_conv_function(config: PSDiffConfig, dtype: torch.dtype) -> onnx.FunctionProto:
    channels, width = config.channels, config.dynamic_dim
    tokens = torch.zeros(5, config.pool_size**2, channels, dtype=dtype)
    params = torch.zeros(5, 2 * channels * width, dtype=dtype)
    norms = [torch.zeros(size) for size in (width, width, channels, channels)]
    regions = Dim("regions")
    shapes = ({0: regions}, {0: regions}, None, None, None, None)
    body = to_onnx(_DynamicConv(), (tokens, params, *norms), DYNAMIC_CONV_INPUTS, ("output",), shapes)
    return _function(DYNAMIC_CONV, body, DYNAMIC_CONV_ATTRIBUTES)


def _function(name: str, body: onnx.ModelProto, attributes: dict[str, Any]) -> onnx.FunctionProto:
    """The graph of a model as a function, its constants inside; attributes are for the plugin to read."""
    graph = body.graph
    constants = [
        helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in graph.initializer
    ]
    return helper.make_function(
        DOMAIN,
        name,
        [value.name for value in graph.input],
        [value.name for value in graph.output],
        [*constants, *graph.node],
        list(body.opset_import),
        attributes=list(attributes),
    )
