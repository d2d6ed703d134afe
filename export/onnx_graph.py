"""The two ONNX graphs of a bundle: the backbone, run once a frame, and one denoising step, run K times.

Legend: B images, H, W canvas, N proposals, E embedding dimension, M = B*N, C channels, S pool size.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxscript import FLOAT, INT64, opset20
from torch import Tensor, nn
from torch.export import Dim

from ..kernels.reference import CANONICAL_LEVEL, FINEST_LEVEL
from ..models.person_search import PSDiff
from ..models.sampling import BACKBONE_INPUTS, FEATURES, STEP_INPUTS, StepOutput

OPSET = 20

# The stubs of onnxscript know neither lists as axes nor the results of their own operators.
op: Any = opset20

# Smaller tensors (biases, norms, tables of the schedule) stay float32: they weigh nothing, and the schedule
# near t = T does not survive half precision.
SMALLEST_HALF_TENSOR = 4096


class _DenoiseStep(nn.Module):
    """PSDiff.denoise_step with the pyramid as four arguments, as a graph wants them."""

    def __init__(self, model: PSDiff) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        p2: Tensor,
        p3: Tensor,
        p4: Tensor,
        p5: Tensor,
        boxes_t: Tensor,
        emb_t: Tensor,
        t: Tensor,
        t_next: Tensor,
    ) -> tuple[Tensor, ...]:
        return self.model.denoise_step((p2, p3, p4, p5), boxes_t, emb_t, t, t_next)


def write_backbone(model: PSDiff, path: Path) -> None:
    """Image u8 [B,H,W,3] -> p2..p5 [B,C,H/s,W/s]; B is dynamic."""
    images = torch.zeros(2, model.config.height, model.config.width, 3, dtype=torch.uint8)
    _export(model.backbone, (images,), path, BACKBONE_INPUTS, FEATURES, ({0: Dim("batch")},))


def write_denoise_step(model: PSDiff, path: Path) -> None:
    """p2..p5, boxes_t, emb_t, t, t_next -> the fields of StepOutput; B and N are dynamic."""
    config, batch = model.config, Dim("batch")
    # Two images and an odd number of proposals: sizes that export cannot mistake for constants.
    images, proposals = 2, config.num_proposals + 1
    pyramid = [
        torch.zeros(images, config.channels, config.height // stride, config.width // stride)
        for stride in (4, 8, 16, 32)
    ]
    state = (torch.randn(images, proposals, 4), torch.randn(images, proposals, config.embedding_dim))
    times = (torch.full((images,), 999), torch.full((images,), 499))
    per_proposal = {0: batch, 1: Dim("num_proposals")}
    shapes = (*({0: batch} for _ in FEATURES), per_proposal, per_proposal, {0: batch}, {0: batch})
    inputs = (*pyramid, *state, *times)
    _export(_DenoiseStep(model), inputs, path, STEP_INPUTS, StepOutput._fields, shapes)


def _export(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    path: Path,
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic_shapes: tuple[Any, ...],
) -> None:
    translations = {torch.ops.psdiff.multilevel_roi_align.default: multilevel_roi_align_graph}
    with warnings.catch_warnings():
        # The exporter warns of its own deprecated calls; nothing a user could act on.
        warnings.simplefilter("ignore")
        for name in ("torch.onnx", "onnxscript"):
            logging.getLogger(name).setLevel(logging.ERROR)
        program = torch.onnx.export(
            module.eval(),
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(input_names),
            output_names=list(output_names),
            dynamic_shapes=dynamic_shapes,
            custom_translation_table=translations,
            verbose=False,
        )
    assert program is not None
    graph = halve_weights(program.model_proto)
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, path)


def multilevel_roi_align_graph(
    maps: Sequence[FLOAT], boxes_xyxy: FLOAT, pool_size: int, sampling_ratio: int, canonical_size: float
) -> FLOAT:
    """kernels.reference.multilevel_roi_align in ONNX: each box is pooled from its own level only.

    maps: (B, h, w, C) each; ONNX pools (B, C, h, w), and the two transpositions cancel when a graph is optimised.
    boxes_xyxy: (B, N, 4) canvas pixels. Returns (B*N, S*S, C).
    """
    rois = op.Reshape(boxes_xyxy, op.Constant(value_ints=[-1, 4]))
    image = _image_of_roi(boxes_xyxy)
    level = _level_of_roi(rois, canonical_size, len(maps))
    pooled, order = [], []
    for number, channels_last in enumerate(maps):
        feature = op.Transpose(channels_last, perm=[0, 3, 1, 2])
        chosen = op.Squeeze(op.NonZero(op.Equal(level, op.Constant(value_int=number))), [0])
        region = op.RoiAlign(
            feature,
            op.Gather(rois, chosen),
            op.Gather(image, chosen),
            coordinate_transformation_mode="half_pixel",
            mode="avg",
            output_height=pool_size,
            output_width=pool_size,
            sampling_ratio=sampling_ratio,
            spatial_scale=0.5 ** (number + FINEST_LEVEL),
        )
        pooled.append(region)
        order.append(chosen)
    place = op.Concat(*order, axis=0)
    count = op.Squeeze(op.Shape(place), [0])
    inverse = op.ScatterElements(place, place, op.Range(0, count, 1), axis=0)
    restored = op.Gather(op.Concat(*pooled, axis=0), inverse)
    tokens = op.Reshape(restored, op.Constant(value_ints=[0, 0, pool_size * pool_size]))
    return op.Transpose(tokens, perm=[0, 2, 1])


def _image_of_roi(boxes_xyxy: FLOAT) -> INT64:
    """(B, N, 4) -> (B*N,) index of the image each box lies in."""
    images = op.Squeeze(op.Shape(boxes_xyxy, start=0, end=1), [0])
    per_image = op.Unsqueeze(op.Range(0, images, 1), [1])
    return op.Reshape(
        op.Expand(per_image, op.Shape(boxes_xyxy, start=0, end=2)), op.Constant(value_ints=[-1])
    )


def _level_of_roi(rois: FLOAT, canonical_size: float, num_levels: int) -> INT64:
    """(M, 4) -> (M,) index of the level, as kernels.reference.pyramid_levels."""
    size = op.Sub(op.Slice(rois, [2], [4], [1]), op.Slice(rois, [0], [2], [1]))
    area = op.ReduceProd(op.Max(size, op.Constant(value_float=0.0)), [1], keepdims=1)
    side = op.Sqrt(area)
    thresholds = [canonical_size * 2.0 ** (k - CANONICAL_LEVEL) for k in range(1, num_levels)]
    reached = op.GreaterOrEqual(side, op.Constant(value_floats=thresholds))
    return op.ReduceSum(op.Cast(reached, to=TensorProto.INT64), [1], keepdims=0)


def halve_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Store the large float32 weights as float16 with a cast behind; computation stays float32.

    Runtimes fold the casts when they load the graph, so this halves the file and costs nothing per frame.
    """
    graph = model.graph
    casts = []
    for initializer in graph.initializer:
        values = numpy_helper.to_array(initializer)
        if values.dtype != np.float32 or values.size < SMALLEST_HALF_TENSOR:
            continue
        name = initializer.name
        stored = numpy_helper.from_array(values.astype(np.float16), f"{name}.half")
        initializer.CopyFrom(stored)
        casts.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
    for cast in reversed(casts):
        graph.node.insert(0, cast)
    return model


def round_to_half(model: PSDiff) -> PSDiff:
    """Round the weights that halve_weights would, in place, so that PyTorch computes with the same numbers."""
    for tensor in model.state_dict().values():
        if tensor.dtype == torch.float32 and tensor.numel() >= SMALLEST_HALF_TENSOR:
            tensor.copy_(tensor.half().float())
    return model
