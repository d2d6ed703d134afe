"""Multi-level ROIAlign as one weighted embedding bag: each pooled cell is a weighted sum of feature rows.

The same numbers as reference.multilevel_roi_align to float32 rounding. On a CPU it is made of vectorised
gathers where torchvision's operator walks the samples one by one; benchmarks/bench_roi_align.py measures it.
Legend: B images, N boxes an image, M = B*N, C channels, S pool size, R sampling ratio, L = S*R samples a side.
"""

from __future__ import annotations

import itertools
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
    maps = [feature.permute(0, 2, 3, 1) for feature in features]
    rows, weights = rows_and_weights(
        [(feature.shape[2], feature.shape[3]) for feature in features],
        boxes_xyxy,
        pool_size=pool_size,
        sampling_ratio=sampling_ratio,
        canonical_size=canonical_size,
    )
    table = row_table(maps)
    pooled = F.embedding_bag(rows, table, per_sample_weights=weights.to(table.dtype), mode="sum")
    return pooled.unflatten(0, (-1, pool_size**2))


def row_table(maps: Sequence[Tensor]) -> Tensor:
    """(B, h, w, C) maps -> (rows, C): the levels of the first image, then those of the second, and so on."""
    return torch.cat([level.flatten(1, 2) for level in maps], dim=1).flatten(0, 1)


def rows_and_weights(
    sizes: Sequence[tuple[int, int]],
    boxes_xyxy: Tensor,
    *,
    pool_size: int,
    sampling_ratio: int,
    canonical_size: float,
) -> tuple[Tensor, Tensor]:
    """Of each pooled cell: which rows of `row_table` it is made of, and their weights.

    sizes: (h, w) of each level. boxes_xyxy: (B, N, 4) canvas pixels. Returns (M*S*S, R*R*4) int64 and float.
    No shape in here depends on the boxes, so that a graph of it can be captured.
    """
    images, boxes_per_image = boxes_xyxy.shape[:2]
    boxes = boxes_xyxy.detach().flatten(0, 1)
    level = pyramid_levels(boxes, canonical_size, len(sizes))
    rows_before = [0, *itertools.accumulate(height * width for height, width in sizes)]
    heights, widths, first_row = (
        torch.tensor(numbers, device=boxes.device).index_select(0, level)
        for numbers in (*zip(*sizes, strict=True), rows_before[:-1])
    )
    image = torch.arange(images, device=boxes.device)[:, None].expand(-1, boxes_per_image).flatten()
    base = first_row + image * rows_before[-1]
    strides = boxes.new_tensor([0.5 ** (k + FINEST_LEVEL) for k in range(len(sizes))])
    # Half-pixel alignment: the centre of cell 0 lies at 0.5 strides.
    corners = boxes * strides.index_select(0, level)[:, None] - 0.5
    samples = (torch.arange(pool_size * sampling_ratio, device=boxes.device) + 0.5) / sampling_ratio
    cell = (corners[:, 2:] - corners[:, :2]) / pool_size
    x, x_weight = _taps(corners[:, :1] + samples * cell[:, :1], widths)
    y, y_weight = _taps(corners[:, 1:2] + samples * cell[:, 1:], heights)
    rows = (
        base[:, None, None, None, None]
        + (y * widths[:, None, None])[:, :, None, :, None]
        + x[:, None, :, None]
    )
    weights = y_weight[:, :, None, :, None] * x_weight[:, None, :, None] / sampling_ratio**2
    return _by_cell(rows, pool_size, sampling_ratio), _by_cell(weights, pool_size, sampling_ratio)


def _taps(position: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Bilinear taps along one axis: (M, L) positions in cells, (M,) sizes -> (M, L, 2) indices and weights.

    A sample beyond one cell outside the map counts as zero, within it as the border.
    """
    last = size[:, None] - 1
    inside = (position >= -1) & (position <= size[:, None])
    # Neither a far sample nor a NaN may become a row number.
    safe = torch.where(inside, position.clamp(min=0), 0.0)
    low = torch.minimum(safe.floor().long(), last)
    high = torch.minimum(low + 1, last)
    # On the last row both taps are the same one, whatever the fraction.
    fraction = safe - low
    weights = torch.stack([1 - fraction, fraction], dim=-1) * inside[..., None]
    return torch.stack([low, high], dim=-1), weights


def _by_cell(samples: Tensor, pool_size: int, ratio: int) -> Tensor:
    """(M, L, L, 2, 2) per sample -> (M*S*S, R*R*4) per pooled cell."""
    split = samples.reshape(-1, pool_size, ratio, pool_size, ratio, 2, 2)
    return split.permute(0, 1, 3, 2, 4, 5, 6).reshape(-1, ratio * ratio * 4)
