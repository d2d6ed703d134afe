"""Where a diffusion starts below T: people who are known already, noised again; NumPy only.

Legend: m people, N proposals, E embedding dimension, K steps, T timesteps, abar the cumulative alpha.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from .detections import Float32Array
from .preprocess import seeded_noise
from .sampling import SamplerSettings, distinct
from .solvers import Schedule, boxes_to_signal

# How far along the frame's stream of noise the fresh boxes are drawn: nobody else draws there (see fresh_noise).
FRESH_BOXES = 1 << 32

Fresh = Literal["spread", "gaussian"]
"""Clean boxes without a person. gaussian: around the middle of the canvas, as in training (pad_people). spread: of
the shape of a standing person, anywhere, cut at the sides: those in the middle do not come upon who enters there."""

FRESH_MEAN, FRESH_DEVIATION = 0.5, 1 / 6
LEAST_FRESH_SIDE = 1e-4

# Heights of spread boxes, as shares of the canvas, width by height, and how far outside the canvas centres may lie.
LEAST_HEIGHT, LARGEST_HEIGHT, WIDTH_BY_HEIGHT, OUTSIDE = 0.12, 0.8, 0.4, 0.06


def people_at(
    boxes_norm: Float32Array,
    embeddings: Float32Array,
    t: int,
    seed: int,
    settings: SamplerSettings,
    *,
    fresh_share: float,
    fresh: Fresh = "spread",
    most_copies: int | None = None,
) -> tuple[Float32Array, Float32Array]:
    """Fill N proposals with known people and fresh boxes, and noise them to timestep t: boxes_t (N, 4), emb_t (N, E).

    boxes_norm: (m, 4) xyxy normalised on the canvas. embeddings: (m, E) unit rows. t: in [0, T). fresh_share: at
    least this share of N are fresh boxes, with no embedding (zero). The people share the rest evenly, the first ones
    get what remains, each at most most_copies times; where they are more than that, the last ones are left out. Each
    copy has noise of its own. The same seed gives the same state.
    Raises ValueError on a bad argument, or where the bundle does not tell T and the scale of embeddings.
    """
    if not 0 <= fresh_share <= 1 or (most_copies is not None and most_copies < 1):
        raise ValueError(
            f"fresh_share must be in [0, 1] and most_copies >= 1, got {fresh_share:g} and {most_copies}"
        )
    if settings.embedding_scale is None:
        raise ValueError("bundle must hold embedding_scale to start from people, got none; export it again")
    sizes = settings.num_proposals, settings.embedding_dim
    origin = shared_out(len(boxes_norm), settings.num_proposals, fresh_share, most_copies)
    boxes_0, emb_0 = _fresh_boxes(settings, seed, fresh), np.zeros(sizes, np.float32)
    boxes_0[: len(origin)] = boxes_to_signal(boxes_norm, settings.box_scale)[origin]
    emb_0[: len(origin)] = settings.embedding_scale * embeddings[origin]
    noise = seeded_noise(seed, *sizes)
    return noised(boxes_0, noise[0], t, settings), noised(emb_0, noise[1], t, settings)


def shared_out(people: int, proposals: int, fresh_share: float, most_copies: int | None = None) -> list[int]:
    """Which of the people each of the first proposals is made from; the proposals behind them are fresh."""
    places = proposals - math.ceil(fresh_share * proposals)
    if most_copies is not None:
        places = min(places, most_copies * people)
    return [i % people for i in range(places)] if people else []


def noised(x_0: Float32Array, noise: Float32Array, t: int, settings: SamplerSettings) -> Float32Array:
    """Noise a clean signal of any shape to timestep t in [-1, T): sqrt(abar) x_0 + sqrt(1 - abar) noise.

    Raises ValueError where the bundle does not tell T.
    """
    level = Schedule(known_timesteps(settings)).at(t)
    return (level.signal * x_0 + level.noise * noise).astype(np.float32)


def timesteps_from(start: int, steps: int, settings: SamplerSettings) -> list[int]:
    """The K descending timesteps of a diffusion that starts at any timestep: the model's own grid, shrunk.

    t becomes floor((t + 1) (start + 1) / T) - 1, so that start = T - 1 gives the grid itself. Raises ValueError
    unless 0 <= start < T and the model has K = steps, or where the bundle does not tell T.
    """
    num_timesteps = known_timesteps(settings)
    if not 0 <= start < num_timesteps:
        raise ValueError(f"start must be a timestep from 0 to {num_timesteps - 1}, got {start}")
    if steps not in settings.timesteps or steps > start + 1:
        most = min(max(settings.timesteps), start + 1)
        raise ValueError(f"steps must be a whole number from 1 to {most}, got {steps}")
    return distinct([(t + 1) * (start + 1) // num_timesteps - 1 for t in settings.timesteps[steps]])


def known_timesteps(settings: SamplerSettings) -> int:
    """T of the noise schedule. Raises ValueError where the bundle does not tell."""
    if settings.num_timesteps is None:
        raise ValueError("bundle must hold num_timesteps to start below T, got none; export it again")
    return settings.num_timesteps


def _fresh_boxes(settings: SamplerSettings, seed: int, fresh: Fresh) -> Float32Array:
    """(N, 4) signal space."""
    stream = np.random.Generator(np.random.Philox(seed).jumped(FRESH_BOXES))
    if fresh == "gaussian":
        boxes = FRESH_MEAN + FRESH_DEVIATION * stream.standard_normal((settings.num_proposals, 4))
        boxes[:, 2:] = boxes[:, 2:].clip(min=LEAST_FRESH_SIDE)
        return (settings.box_scale * (2 * boxes - 1)).astype(np.float32)
    drawn = stream.random((settings.num_proposals, 3))
    centres = drawn[:, :2] * (1 + 2 * OUTSIDE) - OUTSIDE
    # Small people are as many as large ones on the scale of logarithms, as in perspective.
    height = LEAST_HEIGHT * (LARGEST_HEIGHT / LEAST_HEIGHT) ** drawn[:, 2]
    sides = np.stack([WIDTH_BY_HEIGHT * height * settings.height / settings.width, height], axis=1)
    corners = np.concatenate([centres - sides / 2, centres + sides / 2], axis=1)
    return boxes_to_signal(corners.clip(0, 1).astype(np.float32), settings.box_scale)
