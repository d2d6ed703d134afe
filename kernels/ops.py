"""Which implementation of an operation runs: chosen by device here, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .roi_bags import multilevel_roi_align_bags


def multilevel_roi_align(
    features: Sequence[Tensor],
    boxes_xyxy: Tensor,
    *,
    pool_size: int,
    sampling_ratio: int,
    canonical_size: float,
) -> Tensor:
    """Pool (B, N, 4) boxes from (B, C, h, w) levels -> (B*N, S*S, C); see kernels.reference.

    Under torch.export it stays one node, psdiff::multilevel_roi_align, which export translates.
    """
    if torch.compiler.is_exporting():
        return multilevel_roi_align_op(list(features), boxes_xyxy, pool_size, sampling_ratio, canonical_size)
    is_cpu = boxes_xyxy.device.type == "cpu"
    implementation = multilevel_roi_align_bags if is_cpu else reference.multilevel_roi_align
    return implementation(
        features,
        boxes_xyxy,
        pool_size=pool_size,
        sampling_ratio=sampling_ratio,
        canonical_size=canonical_size,
    )


@torch.library.custom_op("psdiff::multilevel_roi_align", mutates_args=())
def multilevel_roi_align_op(
    features: list[Tensor], boxes_xyxy: Tensor, pool_size: int, sampling_ratio: int, canonical_size: float
) -> Tensor:
    """reference.multilevel_roi_align as a node of a graph; inference only."""
    return reference.multilevel_roi_align(
        features,
        boxes_xyxy,
        pool_size=pool_size,
        sampling_ratio=sampling_ratio,
        canonical_size=canonical_size,
    )


@multilevel_roi_align_op.register_fake
def _shape(
    features: list[Tensor], boxes_xyxy: Tensor, pool_size: int, sampling_ratio: int, canonical_size: float
) -> Tensor:
    images, boxes = boxes_xyxy.shape[:2]
    return features[0].new_empty(images * boxes, pool_size**2, features[0].shape[1])
