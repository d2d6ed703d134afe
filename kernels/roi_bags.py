"""Multi-level ROIAlign as one weighted embedding bag: each pooled cell is a weighted sum of feature rows.

The same numbers as reference.multilevel_roi_align to float32 rounding. On a CPU it is made of vectorised
gathers where torchvision's operator walks the samples one by one; benchmarks/bench_roi_align.py measures it.
Legend: B images, N boxes an image, M = B*N, C channels, S pool size, R sampling ratio, L = S*R samples a side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .reference import FINEST_LEVEL, pyramid_levels


def multilevel_roi_align_bags(
    features: Sequence[Tensor],
    boxes_xyxy: Tensor,
    *,
    pool_size: int,
    sampling_ratio: int,
    canonical_size: float,
) -> Tensor:
    """As reference.multilevel_roi_align: (B, C, h, w) levels and (B, N, 4) pixels -> (B*N, S*S, C)."""
    images, boxes_per_image = boxes_xyxy.shape[:2]
    boxes = boxes_xyxy.detach().flatten(0, 1)
    level = pyramid_levels(boxes, canonical_size, len(features))
    heights, widths = (boxes.new_tensor([f.shape[d] for f in features], dtype=torch.int64) for d in (2, 3))
    rows_per_level = heights * widths * images
    first_row = rows_per_level.cumsum(0) - rows_per_level
    height, width = heights[level], widths[level]
    image = torch.arange(images, device=boxes.device).repeat_interleave(boxes_per_image)
    base = first_row[level] + image * height * width
    # Half-pixel alignment: the centre of cell 0 lies at 0.5 strides.
    corners = boxes * (0.5 ** (level + FINEST_LEVEL))[:, None] - 0.5
    samples = (torch.arange(pool_size * sampling_ratio, device=boxes.device) + 0.5) / sampling_ratio
    cell = (corners[:, 2:] - corners[:, :2]) / pool_size
    x, x_weight = _taps(corners[:, :1] + samples * cell[:, :1], width)
    y, y_weight = _taps(corners[:, 1:2] + samples * cell[:, 1:], height)
    rows = (
        base[:, None, None, None, None]
        + (y * width[:, None, None])[:, :, None, :, None]
        + x[:, None, :, None]
    )
    weights = y_weight[:, :, None, :, None] * x_weight[:, None, :, None] / sampling_ratio**2
    table = torch.cat([feature.permute(0, 2, 3, 1).flatten(0, 2) for feature in features])
    bags = [_by_cell(part, pool_size, sampling_ratio) for part in (rows, weights)]
    pooled = F.embedding_bag(bags[0], table, per_sample_weights=bags[1].to(table.dtype), mode="sum")
    return pooled.view(len(boxes), pool_size**2, table.shape[1])


def _taps(position: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Bilinear taps along one axis: (M, L) positions in cells, (M,) sizes -> (M, L, 2) indices and weights.

    A sample beyond one cell outside the map counts as zero, within it as the border.
    """
    last = size[:, None] - 1
    inside = (position >= -1) & (position <= size[:, None])
    clamped = position.clamp(min=0)
    low = torch.minimum(clamped.floor().long(), last)
    high = torch.minimum(low + 1, last)
    fraction = torch.where(low >= last, torch.zeros_like(clamped), clamped - low)
    weights = torch.stack([1 - fraction, fraction], dim=-1) * inside[..., None]
    return torch.stack([low, high], dim=-1), weights


def _by_cell(samples: Tensor, pool_size: int, ratio: int) -> Tensor:
    """(M, L, L, 2, 2) per sample -> (M*S*S, R*R*4) per pooled cell."""
    split = samples.reshape(-1, pool_size, ratio, pool_size, ratio, 2, 2)
    return split.permute(0, 1, 3, 2, 4, 5, 6).reshape(-1, ratio * ratio * 4)
