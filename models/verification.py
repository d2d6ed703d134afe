"""Does an engine compute what PyTorch computed? One image, at several K, from the very state PyTorch was in.

A loop left to itself answers nothing: rounding of the eighth decimal, grown over eight steps on proposals that hold
nobody, moves a box by ten pixels. So the last step of each K starts from the state that is stored with the outputs.
Legend: N proposals, E embedding dimension, K steps. NumPy only.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .detections import Float32Array
from .preprocess import seeded_noise
from .sampling import Engine, Features, SamplerSettings, StepOutput

# Steps whose outputs travel with a bundle.
REFERENCE_STEPS = (1, 2, 4, 8)

# The proposals that are compared: the best by the reference's own score.
COMPARED = 100


@dataclass(frozen=True)
class Tolerance:
    """What counts as the same, and how many must."""

    box_px: float = 0.5
    """Largest difference of a coordinate, in canvas pixels."""
    cosine: float = 0.999
    """Smallest cosine of the two embeddings: 0.999 in fp16, 0.99 in int8."""
    score: float = 0.02
    """Largest difference of the score."""
    matched: float = 0.98
    """Smallest share of the compared proposals that are the same."""


INT8_TOLERANCE = Tolerance(cosine=0.99)


@dataclass(frozen=True)
class Comparison:
    """How one K came out."""

    steps: int
    matched: float
    """Share of the compared proposals that are the same, in [0, 1]."""
    box_px: float
    """Largest difference of a coordinate, in canvas pixels; NaN where an engine gave NaN."""
    cosine: float
    """Smallest cosine."""
    score: float
    """Largest difference of a score."""


def reference_arrays(engine: Engine, settings: SamplerSettings) -> dict[str, NDArray[np.generic]]:
    """One image, and for each K the state before the last step and what the step makes of it.

    Keys: image (H, W, 3) uint8, and by K boxes_t_k{K} (N, 4), emb_t_k{K} (N, E), boxes_xyxy_k{K} (N, 4) normalised,
    scores_k{K} (N,), embeddings_k{K} (N, E).
    """
    image = reference_image(settings)
    features = engine.backbone(image[None])
    noise = seeded_noise(0, settings.num_proposals, settings.embedding_dim)
    arrays: dict[str, NDArray[np.generic]] = {"image": image}
    for steps in _steps(settings):
        boxes_t, emb_t = (part[None] for part in noise)
        grid = settings.timesteps[steps]
        for t, t_next in itertools.pairwise(grid):
            moved = engine.denoise_step(features, boxes_t, emb_t, np.array([t]), np.array([t_next]))
            boxes_t, emb_t = moved.boxes_next, moved.emb_next
        output = _last_step(engine, features, boxes_t, emb_t, grid[-1])
        named = {"boxes_t": boxes_t, "emb_t": emb_t} | output._asdict()
        for name in ("boxes_t", "emb_t", "boxes_xyxy", "scores", "embeddings"):
            arrays[f"{name}_k{steps}"] = named[name][0]
    return arrays


def compare(
    engine: Engine,
    reference: Mapping[str, NDArray[np.generic]],
    settings: SamplerSettings,
    tolerance: Tolerance,
) -> list[Comparison]:
    """Run the last step of each K of reference_arrays; raises KeyError where an array is missing."""
    features = engine.backbone(np.asarray(reference["image"], np.uint8)[None])
    comparisons = []
    for steps in _steps(settings):
        wanted = {name: np.asarray(reference[f"{name}_k{steps}"], np.float32) for name in _COMPARED_ARRAYS}
        got = _last_step(
            engine, features, wanted["boxes_t"][None], wanted["emb_t"][None], settings.timesteps[steps][-1]
        )
        comparisons.append(_comparison(steps, wanted, got, settings, tolerance))
    return comparisons


_COMPARED_ARRAYS = ("boxes_t", "emb_t", "boxes_xyxy", "scores", "embeddings")


def _steps(settings: SamplerSettings) -> list[int]:
    return [steps for steps in REFERENCE_STEPS if steps in settings.timesteps]


def _last_step(
    engine: Engine, features: Features, boxes_t: Float32Array, emb_t: Float32Array, t: int
) -> StepOutput:
    return engine.denoise_step(features, boxes_t, emb_t, np.array([t]), np.array([-1]))


def _comparison(
    steps: int,
    wanted: Mapping[str, Float32Array],
    got: StepOutput,
    settings: SamplerSettings,
    tolerance: Tolerance,
) -> Comparison:
    best = np.argsort(-wanted["scores"], kind="stable")[:COMPARED]
    pixels = np.array([settings.width, settings.height] * 2, np.float32)
    moved = np.clip(got.boxes_xyxy[0], 0, 1) - np.clip(wanted["boxes_xyxy"], 0, 1)
    box_px = np.abs(moved[best] * pixels).max(axis=1)
    cosine = (got.embeddings[0] * wanted["embeddings"]).sum(axis=1)[best]
    score = np.abs(got.scores[0] - wanted["scores"])[best]
    # A comparison with NaN is false: what is no number is not the same.
    same = (box_px <= tolerance.box_px) & (cosine >= tolerance.cosine) & (score <= tolerance.score)
    worst = (float(value) for value in (box_px.max(), cosine.min(), score.max()))
    return Comparison(steps, float(same.mean()), *worst)


def reference_image(settings: SamplerSettings) -> NDArray[np.uint8]:
    """A canvas with structure at every scale, made from a formula so that no picture has to be licensed."""
    y, x = np.mgrid[0 : settings.height, 0 : settings.width].astype(np.float32)
    waves = [127.5 + 127.5 * np.sin(x / (7.0 + 9 * c) + c) * np.cos(y / (5.0 + 11 * c)) for c in range(3)]
    image = np.stack(waves, axis=-1).astype(np.uint8)
    height, width = image.shape[:2]
    for i in range(6):
        left, top = int(width * (0.05 + 0.15 * i)), int(height * (0.1 + 0.05 * i))
        image[top : top + height // 3, left : left + width // 20] = (40 * i, 255 - 40 * i, 128)
    return image
