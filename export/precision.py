"""The numbers of a bundle: weights stored in half precision once, and graphs that compute in fp32, fp16 or bf16.

Boxes, the state of the sampler, sample positions and the schedule are float32 in each; LayerNorm keeps its
statistics in float32 by its definition in ONNX (stash_type 1).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from ..models.person_search import PSDiff

# Smaller tensors (biases, norms, tables of the schedule) stay float32: they weigh nothing, and the schedule
# near t = T does not survive half precision.
SMALLEST_HALF_TENSOR = 4096

# The first opset whose convolutions may be bfloat16.
BFLOAT16_OPSET = 22


def round_to_half(model: PSDiff) -> PSDiff:
    """Round the large weights to float16, in place: PyTorch then computes with what the bundle stores."""
    for tensor in model.state_dict().values():
        if tensor.dtype == torch.float32 and tensor.numel() >= SMALLEST_HALF_TENSOR:
            tensor.copy_(tensor.half().float())
    return model


def half_precision(model: PSDiff) -> PSDiff:
    """A copy whose weights are float16, and which computes in that. Tables and pixel statistics stay float32."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, FrozenBatchNorm2d):
                setattr(module, name, _ChannelScale(child))
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    return model


class _ChannelScale(nn.Module):
    """A frozen BatchNorm as scale and shift, worked out in float32: 1 / sqrt(var) of a half misses the mark."""

    def __init__(self, norm: FrozenBatchNorm2d) -> None:
        super().__init__()
        weight, bias, mean, var = (
            getattr(norm, name).float() for name in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight * (var + norm.eps).rsqrt()
        self.scale = nn.Parameter(scale[:, None, None])
        self.shift = nn.Parameter((bias - mean * scale)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def halve_weights(model: onnx.ModelProto) -> None:
    """Store the large float32 weights of a graph as float16 with a cast behind; computation stays float32.

    Runtimes fold the casts when they load the graph, so this halves the file and costs nothing per frame.
    """
    casts = []
    for initializer in model.graph.initializer:
        values = numpy_helper.to_array(initializer)
        if values.dtype == np.float32 and values.size >= SMALLEST_HALF_TENSOR:
            casts.append(_store_as_half(initializer, values.astype(np.float16), TensorProto.FLOAT))
    for cast in reversed(casts):
        model.graph.node.insert(0, cast)


def to_bfloat16(half: onnx.ModelProto) -> onnx.ModelProto:
    """A float16 graph with bfloat16 in place of float16; large weights stay stored as float16."""
    model = copy.deepcopy(half)
    for imports in (model.opset_import, *(function.opset_import for function in model.functions)):
        for opset in imports:
            opset.version = opset.version if opset.domain else BFLOAT16_OPSET
    casts = []
    for initializer in model.graph.initializer:
        if initializer.data_type != TensorProto.FLOAT16:
            continue
        values = numpy_helper.to_array(initializer)
        if values.size >= SMALLEST_HALF_TENSOR:
            casts.append(_store_as_half(initializer, values, TensorProto.BFLOAT16))
        else:
            initializer.CopyFrom(_bfloat16(initializer))
    for node in _all_nodes(model):
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.BFLOAT16
            elif attribute.t.data_type == TensorProto.FLOAT16:
                attribute.t.CopyFrom(_bfloat16(attribute.t))
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    for cast in reversed(casts):
        model.graph.node.insert(0, cast)
    return model


def _store_as_half(initializer: TensorProto, values: np.ndarray, computed: int) -> onnx.NodeProto:
    """Make an initializer float16, and return the cast that gives it its name and type back."""
    name = initializer.name
    initializer.CopyFrom(numpy_helper.from_array(values, f"{name}.half"))
    return helper.make_node("Cast", [f"{name}.half"], [name], to=computed)


def _bfloat16(tensor: TensorProto) -> TensorProto:
    values = numpy_helper.to_array(tensor).astype(np.float32)
    return helper.make_tensor(tensor.name, TensorProto.BFLOAT16, values.shape, values.ravel())


def _all_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    yield from model.graph.node
    for function in model.functions:
        yield from function.node
