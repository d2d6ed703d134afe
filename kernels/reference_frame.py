"""What the kernels around the network compute, plainly: the DDIM step behind the heads, the letterbox before it.

Legend: B images, N proposals, E embedding dimension, h, w frame, H, W canvas.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from .frame_launches import Matrix, placed_size, yuv_to_rgb

DELTA_WEIGHTS = (2.0, 2.0, 1.0, 1.0)
MOST_LOG_SIZE = math.log(100000 / 16)
LEAST_SIDE = 1e-4
PAD_VALUE = 114


def ddim_step(
    state: tuple[Tensor, Tensor],
    heads: tuple[Tensor, Tensor, Tensor],
    levels: Tensor,
    *,
    box_scale: float,
    embedding_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Decode the outputs of the heads and move both states: boxes_next, emb_next, boxes_xyxy, scores, unit rows.

    state: boxes_t (B, N, 4) and emb_t (B, N, E) in signal space. heads: logits (B, N), deltas (B, N, 4), embeddings
    (B, N, E). levels: (B, 4), signal and noise at t, then at t_next. The tail of PSDiff.denoise_step, in one place.
    """
    (boxes_t, emb_t), (logits, deltas, embeddings) = state, heads
    moved = _moved(_decoded(boxes_t, box_scale), deltas)
    boxes_0 = _encoded(moved, box_scale)
    unit = F.normalize(embeddings, dim=-1)
    signal, noise, next_signal, next_noise = (level[:, None, None] for level in levels.unbind(1))

    def step(x_t: Tensor, x_0: Tensor) -> Tensor:
        return next_signal * x_0 + next_noise * ((x_t - signal * x_0) / noise)

    return step(boxes_t, boxes_0), step(emb_t, embedding_scale * unit), moved, logits.sigmoid(), unit


def _decoded(boxes_t: Tensor, box_scale: float) -> Tensor:
    boxes = (boxes_t.clamp(-box_scale, box_scale) / box_scale + 1) / 2
    centre, size = boxes[..., :2], boxes[..., 2:].clamp(min=LEAST_SIDE)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def _moved(boxes_xyxy: Tensor, deltas: Tensor) -> Tensor:
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    size = high - low
    centre = (low + high) / 2 + deltas[..., :2] / DELTA_WEIGHTS[0] * size
    half = size * (deltas[..., 2:] / DELTA_WEIGHTS[2]).clamp(max=MOST_LOG_SIZE).exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def _encoded(boxes_xyxy: Tensor, box_scale: float) -> Tensor:
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    boxes = torch.cat([(low + high) / 2, high - low], dim=-1)
    return (box_scale * (2 * boxes - 1)).clamp(-box_scale, box_scale)


def letterbox(frame: NDArray[np.uint8], width: int, height: int) -> NDArray[np.float64]:
    """(h, w, 3) RGB -> the (H, W, 3) canvas in 0..255, not rounded: area average or bilinear, mid grey outside."""
    return _on_canvas(_resized(frame, width, height), width, height)


def letterbox_nv12(
    luma: NDArray[np.uint8],
    chroma: NDArray[np.uint8],
    width: int,
    height: int,
    *,
    matrix: Matrix = "bt709",
    full_range: bool = False,
) -> NDArray[np.float64]:
    """Do the same from luma (h, w) and chroma (ceil(h / 2), ceil(w / 2), 2), U before V.

    A pixel has the chroma of its 2x2 block. Y, U and V are resized, then converted, then clamped to 0..255.
    """
    rows, columns = luma.shape
    nearest = chroma.repeat(2, axis=0).repeat(2, axis=1)[:rows, :columns]
    y, u, v = np.moveaxis(_resized(np.dstack([luma, nearest]), width, height), 2, 0)
    numbers = yuv_to_rgb(matrix, full_range=full_range)
    y, u, v = (y - numbers["luma_offset"]) * numbers["luma_gain"], u - 128, v - 128
    green = y + numbers["green_u"] * u + numbers["green_v"] * v
    rgb = np.stack([y + numbers["red_v"] * v, green, y + numbers["blue_u"] * u], axis=2)
    return _on_canvas(rgb.clip(0, 255), width, height)


def _resized(frame: NDArray[np.uint8], width: int, height: int) -> NDArray[np.float64]:
    placed_width, placed_height = placed_size(frame.shape[1], frame.shape[0], width, height)
    scale_y, scale_x = frame.shape[0] / placed_height, frame.shape[1] / placed_width
    weights = _area_weights if min(scale_x, scale_y) >= 1 else _bilinear_weights
    rows, columns = weights(frame.shape[0], placed_height), weights(frame.shape[1], placed_width)
    # (h, w, 3): columns first, each row by itself, then rows.
    narrowed = columns @ frame.astype(float)
    return np.tensordot(rows, narrowed, axes=1)


def _on_canvas(placed: NDArray[np.float64], width: int, height: int) -> NDArray[np.float64]:
    canvas = np.full((height, width, 3), float(PAD_VALUE))
    canvas[: placed.shape[0], : placed.shape[1]] = placed
    return canvas


def _area_weights(size: int, placed: int) -> NDArray[np.float64]:
    """(placed, size): the share of each source cell in the span of each target cell; rows sum to 1."""
    edges = np.arange(placed + 1) * (size / placed)
    cells = np.arange(size)
    shares = np.minimum(cells + 1, edges[1:, None]) - np.maximum(cells, edges[:-1, None])
    return shares.clip(0) * (placed / size)


def _bilinear_weights(size: int, placed: int) -> NDArray[np.float64]:
    """(placed, size): the two source cells around the centre of each target cell, clamped at the border."""
    position = ((np.arange(placed) + 0.5) * (size / placed) - 0.5).clip(0, size - 1)
    return (1 - np.abs(position[:, None] - np.arange(size))).clip(0)
