"""Boxes of annotation files, made into those of the schema. All functions copy; no loaded array is changed.

Legend: M boxes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Detection sets: a side below this, after clipping, shows no person. A choice of ours.
MIN_SIDE_PX = 4


def xyxy_from_xywh(boxes_xywh: ArrayLike) -> NDArray[np.float64]:
    """Corners of (M, 4) or (4,) boxes xywh.

    Computed in float64: MATLAB stores boxes in uint8 or uint16, where x + w would wrap around.
    """
    boxes = np.asarray(boxes_xywh, dtype=np.float64)
    return np.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], axis=-1)


def rows(boxes: ArrayLike) -> NDArray[np.float64]:
    """(M, 4) float64 of any number of boxes, also none."""
    return np.asarray(boxes, dtype=np.float64).reshape(-1, 4)


def is_wide(boxes_xyxy: NDArray[np.float64], min_side_px: float = 0.0) -> NDArray[np.bool_]:
    """(M,) True where both sides are at least min_side_px, and above zero."""
    sides = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    shorter = np.minimum(sides[:, 0], sides[:, 1])
    return (shorter > 0) & (shorter >= min_side_px)


def clip(boxes_xyxy: NDArray[np.float64], size_px: tuple[int, int]) -> NDArray[np.float64]:
    """Boxes cut at the border of an image of size_px (width, height)."""
    return np.clip(boxes_xyxy, 0, np.array([*size_px, *size_px], dtype=np.float64))
