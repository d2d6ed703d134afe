"""The two operations that PSDiff repeats K times, in plain PyTorch: the specification of every faster version.

Legend: B images, N boxes an image, C channels, S pool size, P = S*S tokens, M = B*N regions, D dynamic width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

FINEST_LEVEL = 2
"""p2 has stride 4 = 2**2; p3, p4, p5 follow with 8, 16, 32."""

CANONICAL_LEVEL = 2
"""Index of p4, which pools boxes of the canonical size."""


def pyramid_levels(boxes_xyxy: Tensor, canonical_size: float, num_levels: int = 4) -> Tensor:
    """Index into (p2, p3, ...) of each box, by its size.

    boxes_xyxy: (..., 4) canvas pixels. A box of canonical_size**2 pixels goes to p4, half that side to p3.
    Source: Lin et al., FPN (arXiv:1612.03144), eq. 1, with k0 = 4, written as thresholds: no logarithm, so every
    backend agrees on a box of exactly the canonical size.
    """
    width, height = (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).clamp(min=0).unbind(-1)
    thresholds = [canonical_size * 2.0 ** (k - CANONICAL_LEVEL) for k in range(1, num_levels)]
    return torch.bucketize((width * height).sqrt(), boxes_xyxy.new_tensor(thresholds), right=True)


def multilevel_roi_align(
    features: Sequence[Tensor],
    boxes_xyxy: Tensor,
    *,
    pool_size: int,
    sampling_ratio: int,
    canonical_size: float,
) -> Tensor:
    """Pool each box from the pyramid level that suits its size.

    features: p2.. of (B, C, h, w). boxes_xyxy: (B, N, 4) canvas pixels, float32, may lie outside.
    Returns (B*N, S*S, C), tokens in row-major order. Differentiable in the features only.
    Source: He et al., Mask R-CNN (arXiv:1703.06870), with half-pixel alignment.
    """
    pooled, order = [], []
    for level, (chosen, rois) in enumerate(_rois_by_level(boxes_xyxy, canonical_size, len(features))):
        scale = 0.5 ** (level + FINEST_LEVEL)
        # Half-precision coordinates miss by up to a cell, so half-precision maps are pooled in the boxes' type.
        feature = features[level].to(rois.dtype)
        region = roi_align(feature, rois, pool_size, scale, sampling_ratio, aligned=True)
        pooled.append(region.flatten(2).transpose(1, 2).to(features[level].dtype))
        order.append(chosen)
    return torch.cat(pooled)[torch.argsort(torch.cat(order))]


def multilevel_roi_align_grad(
    grad_tokens: Tensor,
    boxes_xyxy: Tensor,
    sizes: Sequence[tuple[int, int]],
    *,
    sampling_ratio: int,
    canonical_size: float,
) -> list[Tensor]:
    """The gradient of multilevel_roi_align in its features, from that of its tokens.

    grad_tokens: (B*N, S*S, C). sizes: (h, w) of each level. Returns (B, C, h, w) a level.
    """
    images, channels, pool_size = len(boxes_xyxy), grad_tokens.shape[2], math.isqrt(grad_tokens.shape[1])
    regions = grad_tokens.transpose(1, 2).unflatten(2, (pool_size, pool_size))
    grads = []
    for level, (chosen, rois) in enumerate(_rois_by_level(boxes_xyxy, canonical_size, len(sizes))):
        shape = (images, channels, *sizes[level], sampling_ratio, True)
        scale = 0.5 ** (level + FINEST_LEVEL)
        grads.append(
            torch.ops.torchvision._roi_align_backward(
                regions[chosen].contiguous(), rois, scale, pool_size, pool_size, *shape
            )
        )
    return grads


def _rois_by_level(
    boxes_xyxy: Tensor, canonical_size: float, num_levels: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each level: which of the B*N boxes it pools, and these as (image, x1, y1, x2, y2)."""
    images, boxes_per_image = boxes_xyxy.shape[:2]
    boxes = boxes_xyxy.detach().flatten(0, 1)
    image_index = torch.arange(images, device=boxes.device).repeat_interleave(boxes_per_image)
    rois = torch.cat([image_index[:, None].to(boxes.dtype), boxes], dim=1)
    levels = pyramid_levels(boxes, canonical_size, num_levels)
    for level in range(num_levels):
        chosen = torch.nonzero(levels == level)[:, 0]
        yield chosen, rois[chosen]


def dynamic_conv(
    tokens: Tensor,
    params: Tensor,
    norm1: tuple[Tensor, Tensor],
    norm2: tuple[Tensor, Tensor],
    epsilon: float = 1e-5,
) -> Tensor:
    """Two 1x1 convolutions whose kernels are each region's own, with LayerNorm and ReLU after each.

    tokens: (M, P, C). params: (M, 2*C*D), first C x D then D x C. norm1, norm2: LayerNorm (weight, bias) of
    D and of C. Returns (M, P, C). Source: Sun et al., Sparse R-CNN (arXiv:2011.12450), sec. 3.3.
    """
    regions, _, channels = tokens.shape
    width = norm1[0].shape[0]
    kernel1, kernel2 = params.split(channels * width, dim=1)
    hidden = tokens @ kernel1.view(regions, channels, width)
    hidden = F.relu(F.layer_norm(hidden, (width,), *norm1, epsilon))
    hidden = hidden @ kernel2.view(regions, width, channels)
    return F.relu(F.layer_norm(hidden, (channels,), *norm2, epsilon))
