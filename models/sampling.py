"""The K-step denoising loop on the host, over any engine; NumPy only.

PyTorch, onnxruntime, TensorRT and Triton differ in two calls, `backbone` and `denoise_step`. Everything
around them is here, once: letterbox, seeded noise, DDIM grid, pinned boxes, selection of detections.
Legend: B images, H, W canvas, N proposals, E embedding dimension, K steps, n boxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .detections import Detections, Float32Array, select_detections
from .preprocess import Frame, Letterbox, check_frame, seeded_noise

# In whatever form the engine likes: arrays, tensors on a device, handles.
Features = Sequence[Any]

# The tensor names of a bundle's graphs; the outputs of a step are the fields of StepOutput.
BACKBONE_INPUTS: tuple[str, ...] = ("image",)
FEATURES: tuple[str, ...] = ("p2", "p3", "p4", "p5")
STEP_INPUTS: tuple[str, ...] = (*FEATURES, "boxes_t", "emb_t", "t", "t_next")

# One query box is described by this many proposals with independent noise, averaged.
PROPOSALS_PER_QUERY = 8


class StepOutput(NamedTuple):
    """What one denoising step returns; names and order are those of denoise_step.onnx."""

    boxes_next: Float32Array
    """(B, N, 4) signal space, at t_next."""
    emb_next: Float32Array
    """(B, N, E) signal space, at t_next."""
    boxes_xyxy: Float32Array
    """(B, N, 4) predicted boxes, normalised on the canvas."""
    scores: Float32Array
    """(B, N) in [0, 1]."""
    embeddings: Float32Array
    """(B, N, E) predicted embeddings, unit rows."""


class Engine(Protocol):
    """The two calls in which backends differ. Features stay in whatever form the engine likes."""

    def backbone(self, images: NDArray[np.uint8]) -> Features:
        """(B, H, W, 3) uint8 RGB canvases -> feature pyramid p2..p5."""
        ...

    def denoise_step(
        self,
        features: Features,
        boxes_t: Float32Array,
        emb_t: Float32Array,
        t: NDArray[np.int64],
        t_next: NDArray[np.int64],
    ) -> StepOutput:
        """Move (B, N, 4) boxes and (B, N, E) embeddings from timestep t (B,) to t_next (B,)."""
        ...


@dataclass(frozen=True)
class SamplerSettings:
    """What the loop needs to know of the model: sizes, grid, thresholds."""

    width: int
    height: int
    num_proposals: int
    embedding_dim: int
    box_scale: float
    timesteps: Mapping[int, Sequence[int]]
    """K -> the K descending timesteps it visits; the step after the last goes to -1 (no noise)."""
    score_threshold: float = 0.05
    nms_iou: float = 0.5
    score_thresholds: Mapping[int, float] = field(default_factory=dict)
    """Calibrated thresholds by K; a K between two of them takes that of the smaller one."""

    def threshold(self, steps: int) -> float:
        """The score from which a box counts as a person after K = steps."""
        known = [k for k in self.score_thresholds if k <= steps]
        return self.score_thresholds[max(known)] if known else self.score_threshold


class Detector:
    """Detect people in frames and describe them, with any number of DDIM steps (eta 0)."""

    def __init__(self, engine: Engine, settings: SamplerSettings) -> None:
        self.engine = engine
        self.settings = settings

    def detect(
        self, frames: Sequence[Frame], steps: int = 4, seeds: Sequence[int] | None = None
    ) -> list[Detections]:
        """Find the people in each frame.

        frames: RGB uint8 arrays (height, width, 3), sizes may differ. steps: K >= 1. seeds: one per frame,
        default 0 for all; the result of a frame depends on its pixels, its seed and K alone.
        Returns one Detections per frame, boxes in frame pixels. Raises ValueError on a bad argument.
        """
        grid = self._grid(steps)
        seeds = [0] * len(frames) if seeds is None else seeds
        if len(seeds) != len(frames):
            raise ValueError(f"seeds must be one per frame ({len(frames)}), got {len(seeds)}")
        if not frames:
            return []
        letterboxes = [self._letterbox(frame, f"frames[{i}]") for i, frame in enumerate(frames)]
        images = np.stack([box.image(frame) for box, frame in zip(letterboxes, frames, strict=True)])
        sizes = self.settings.num_proposals, self.settings.embedding_dim
        noise = [seeded_noise(seed, *sizes) for seed in seeds]
        boxes_t, emb_t = (np.stack(part) for part in zip(*noise, strict=True))
        features = self.engine.backbone(images)
        output = denoise(self.engine, features, boxes_t, emb_t, grid)
        threshold = self.settings.threshold(steps)
        return [self._select(output, i, letterbox, threshold) for i, letterbox in enumerate(letterboxes)]

    def embed(
        self, frame: Frame, boxes_xyxy: NDArray[np.floating], steps: int = 4, seed: int = 0
    ) -> Float32Array:
        """Describe the people in given boxes: the boxes stay pinned, only embeddings are denoised.

        boxes_xyxy: (n, 4) frame pixels. Returns (n, E) unit rows. Raises ValueError on a bad argument.
        """
        grid = self._grid(steps)
        letterbox = self._letterbox(frame, "frame")
        boxes = check_boxes(boxes_xyxy, letterbox.frame_width, letterbox.frame_height)
        if len(boxes) == 0:
            return np.zeros((0, self.settings.embedding_dim), np.float32)
        signal = boxes_to_signal(letterbox.boxes_to_canvas(boxes), self.settings.box_scale)
        pinned = np.repeat(signal, PROPOSALS_PER_QUERY, axis=0)[None]
        _, emb_t = seeded_noise(seed, pinned.shape[1], self.settings.embedding_dim)
        features = self.engine.backbone(letterbox.image(frame)[None])
        output = denoise(self.engine, features, pinned, emb_t[None], grid, pin_boxes=True)
        mean = output.embeddings[0].reshape(len(boxes), PROPOSALS_PER_QUERY, -1).mean(axis=1)
        return mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)

    def _select(self, output: StepOutput, image: int, letterbox: Letterbox, threshold: float) -> Detections:
        return select_detections(
            letterbox.boxes_to_frame(output.boxes_xyxy[image]),
            output.scores[image],
            output.embeddings[image],
            score_threshold=threshold,
            nms_iou=self.settings.nms_iou,
        )

    def _letterbox(self, frame: Frame, name: str) -> Letterbox:
        check_frame(frame, name)
        height, width = frame.shape[:2]
        return Letterbox(width, height, self.settings.width, self.settings.height)

    def _grid(self, steps: int) -> Sequence[int]:
        if steps not in self.settings.timesteps:
            most = max(self.settings.timesteps)
            raise ValueError(f"steps must be a whole number from 1 to {most}, got {steps}")
        return self.settings.timesteps[steps]


def denoise(
    engine: Engine,
    features: Features,
    boxes_t: Float32Array,
    emb_t: Float32Array,
    grid: Sequence[int],
    *,
    pin_boxes: bool = False,
) -> StepOutput:
    """Run the K steps of a grid; returns the last step's output.

    boxes_t: (B, N, 4) and emb_t: (B, N, E) at grid[0]. pin_boxes keeps the boxes where they are.
    """
    output = None
    for t, t_next in zip(grid, [*grid[1:], -1], strict=True):
        times = (np.full(len(boxes_t), value, np.int64) for value in (t, t_next))
        output = engine.denoise_step(features, boxes_t, emb_t, *times)
        boxes_t = boxes_t if pin_boxes else output.boxes_next
        emb_t = output.emb_next
    assert output is not None  # a grid has at least one timestep
    return output


def sampling_timesteps(steps: int, num_timesteps: int, power: float) -> list[int]:
    """The K descending timesteps floor(T (1 - i/K)^power) - 1 at which the network is evaluated.

    power 1 is the paper's even grid (K = 4: 999, 749, 499, 249). A higher power spends more steps where
    boxes carry little noise (power 3: 999, 420, 124, 14); a box of a distant person still has a noise of
    its own size at t = 200. Raises ValueError unless 1 <= steps <= num_timesteps.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps must be a whole number from 1 to {num_timesteps}, got {steps}")
    # The small term keeps an exact product such as 1000 * (3/4) from falling below the integer.
    grid = [int(num_timesteps * (1 - i / steps) ** power + 1e-9) - 1 for i in range(steps)]
    # With a high power and many steps neighbours near t = 0 round to one timestep: push them apart.
    grid[-1] = max(grid[-1], 0)
    for i in range(steps - 2, -1, -1):
        grid[i] = max(grid[i], grid[i + 1] + 1)
    return grid


def boxes_to_signal(boxes_norm: Float32Array, box_scale: float) -> Float32Array:
    """(n, 4) xyxy normalised on the canvas -> (n, 4) cxcywh in the signal range [-box_scale, box_scale]."""
    centre, size = (boxes_norm[:, :2] + boxes_norm[:, 2:]) / 2, boxes_norm[:, 2:] - boxes_norm[:, :2]
    signal = box_scale * (2 * np.concatenate([centre, size], axis=1) - 1)
    return np.clip(signal, -box_scale, box_scale).astype(np.float32)


def check_boxes(boxes_xyxy: NDArray[np.floating], frame_width: int, frame_height: int) -> Float32Array:
    """Boxes as (n, 4) float32. Raises ValueError unless each has x1 < x2, y1 < y2 and meets the frame."""
    boxes = np.asarray(boxes_xyxy, np.float32)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes_xyxy must be of shape (n, 4), got {boxes.shape}")
    for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        meets = x1 < x2 and y1 < y2 and x1 < frame_width and y1 < frame_height and x2 > 0 and y2 > 0
        if not meets:
            raise ValueError(
                f"boxes_xyxy[{i}] must be x1,y1,x2,y2 with x1 < x2 and y1 < y2, inside the "
                f"{frame_width}x{frame_height} frame, got {x1:g},{y1:g},{x2:g},{y2:g}"
            )
    return boxes
