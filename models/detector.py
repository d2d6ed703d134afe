"""Frames in, people out: letterbox, noise, the K-step loop and selection over any engine; NumPy only.

Legend: B images, H, W canvas, N proposals, E embedding dimension, K steps, n boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .detections import Detections, Float32Array, select_detections
from .preprocess import Frame, Letterbox, check_frame, seeded_noise
from .sampling import Engine, Grid, SamplerSettings, StepOutput, denoise
from .solvers import PLAIN, SamplerOptions, boxes_to_signal

# One query box is described by this many proposals with independent noise, averaged.
PROPOSALS_PER_QUERY = 8

AfterStep = Callable[[StepOutput], None]


class PersonDetector(Protocol):
    """What finds and describes people: a Detector on this machine, or one behind a network."""

    settings: SamplerSettings

    def detect(
        self, frames: Sequence[Frame], steps: int = 4, seeds: Sequence[int] | None = None
    ) -> list[Detections]:
        """Find the people in each frame, as Detector.detect does."""
        ...

    def embed(
        self, frame: Frame, boxes_xyxy: NDArray[np.floating], steps: int = 4, seed: int = 0
    ) -> Float32Array:
        """Describe the people in given boxes, as Detector.embed does."""
        ...


class Canvas(NamedTuple):
    """A frame as the network sees it, and where it lies."""

    image: Frame
    """(H, W, 3) uint8 RGB."""
    letterbox: Letterbox


class Start(NamedTuple):
    """Where the diffusion of a batch starts, at the first timestep of the grid."""

    boxes_t: Float32Array
    """(B, N, 4) signal space."""
    emb_t: Float32Array
    """(B, N, E) signal space."""


class Detector:
    """Detect people in frames and describe them, with any number of denoising steps."""

    def __init__(self, engine: Engine, settings: SamplerSettings) -> None:
        self.engine = engine
        self.settings = settings

    def detect(
        self,
        frames: Sequence[Frame],
        steps: int = 4,
        seeds: Sequence[int] | None = None,
        *,
        options: SamplerOptions = PLAIN,
    ) -> list[Detections]:
        """Find the people in each frame.

        frames: RGB uint8 arrays (height, width, 3), sizes may differ. steps: K >= 1. seeds: one per frame,
        default 0 for all; the result of a frame depends on its pixels, its seed, K and the options alone.
        Returns one Detections per frame, boxes in frame pixels. Raises ValueError on a bad argument.
        """
        canvases = [canvas_of(frame, self.settings, f"frames[{i}]") for i, frame in enumerate(frames)]
        return self.detect_canvases(canvases, steps, seeds, options=options)

    def detect_canvases(
        self,
        canvases: Sequence[Canvas],
        steps: int = 4,
        seeds: Sequence[int] | None = None,
        *,
        start: Start | None = None,
        grid: Grid | None = None,
        options: SamplerOptions = PLAIN,
        after_step: AfterStep | None = None,
    ) -> list[Detections]:
        """Find the people in frames that lie on the canvas already; otherwise as detect.

        start: instead of noise from the seeds. grid: the K timesteps, instead of the model's; (B,) each where
        images differ. start lies at the first. after_step: called with the output of each step; what it raises
        ends the loop.
        """
        grid = self._checked(grid, steps)
        seeds = [0] * len(canvases) if seeds is None else seeds
        if len(seeds) != len(canvases):
            raise ValueError(f"seeds must be one per frame ({len(canvases)}), got {len(seeds)}")
        if not canvases:
            return []
        start = start or self._noise(seeds)
        features = self.engine.backbone(np.stack([canvas.image for canvas in canvases]))
        output = denoise(
            self.engine,
            features,
            start.boxes_t,
            start.emb_t,
            grid,
            options=options,
            settings=self.settings,
            seeds=seeds,
            after_step=after_step,
        )
        threshold = self.settings.threshold(steps)
        return [self._select(output, i, canvas.letterbox, threshold) for i, canvas in enumerate(canvases)]

    def embed(
        self,
        frame: Frame,
        boxes_xyxy: NDArray[np.floating],
        steps: int = 4,
        seed: int = 0,
        *,
        options: SamplerOptions = PLAIN,
    ) -> Float32Array:
        """Describe the people in given boxes: the boxes stay pinned, only embeddings are denoised.

        boxes_xyxy: (n, 4) frame pixels. options: solver and eta; a given box is neither renewed nor pooled.
        Returns (n, E) unit rows. Raises ValueError on a bad argument.
        """
        return self.embed_canvas(
            canvas_of(frame, self.settings, "frame"), boxes_xyxy, steps, seed, options=options
        )

    def embed_canvas(
        self,
        canvas: Canvas,
        boxes_xyxy: NDArray[np.floating],
        steps: int = 4,
        seed: int = 0,
        *,
        options: SamplerOptions = PLAIN,
        after_step: AfterStep | None = None,
    ) -> Float32Array:
        """Describe people in a frame that lies on the canvas already; otherwise as embed."""
        if options.renewal is not None or options.ensemble or options.refresh:
            raise ValueError(f"options must be a solver and eta alone where boxes are given, got {options}")
        grid = timesteps_of(self.settings, steps)
        letterbox = canvas.letterbox
        boxes = check_boxes(boxes_xyxy, letterbox.frame_width, letterbox.frame_height)
        if len(boxes) == 0:
            return np.zeros((0, self.settings.embedding_dim), np.float32)
        signal = boxes_to_signal(letterbox.boxes_to_canvas(boxes), self.settings.box_scale)
        pinned = np.repeat(signal, PROPOSALS_PER_QUERY, axis=0)[None]
        _, emb_t = seeded_noise(seed, pinned.shape[1], self.settings.embedding_dim)
        output = denoise(
            self.engine,
            self.engine.backbone(canvas.image[None]),
            pinned,
            emb_t[None],
            grid,
            pin_boxes=True,
            options=options,
            settings=self.settings,
            seeds=[seed],
            after_step=after_step,
        )
        mean = output.embeddings[0].reshape(len(boxes), PROPOSALS_PER_QUERY, -1).mean(axis=1)
        return mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)

    def _checked(self, grid: Grid | None, steps: int) -> Grid:
        own = timesteps_of(self.settings, steps)
        if grid is not None and len(grid) != steps:
            raise ValueError(f"grid must hold {steps} timesteps, one a step, got {len(grid)}")
        return own if grid is None else grid

    def _noise(self, seeds: Sequence[int]) -> Start:
        sizes = self.settings.num_proposals, self.settings.embedding_dim
        noise = [seeded_noise(seed, *sizes) for seed in seeds]
        return Start(*(np.stack(part) for part in zip(*noise, strict=True)))

    def _select(self, output: StepOutput, image: int, letterbox: Letterbox, threshold: float) -> Detections:
        return select_detections(
            letterbox.boxes_to_frame(output.boxes_xyxy[image]),
            output.scores[image],
            output.embeddings[image],
            score_threshold=threshold,
            nms_iou=self.settings.nms_iou,
        )


def canvas_of(frame: Frame, settings: SamplerSettings, name: str = "frame") -> Canvas:
    """Lay a frame on the canvas. Raises ValueError, which calls it name, unless it is RGB uint8."""
    check_frame(frame, name)
    height, width = frame.shape[:2]
    letterbox = Letterbox(width, height, settings.width, settings.height)
    return Canvas(letterbox.image(frame), letterbox)


def timesteps_of(settings: SamplerSettings, steps: int) -> Sequence[int]:
    """The K timesteps of a number of steps. Raises ValueError where the model has no such grid."""
    if steps not in settings.timesteps:
        most = max(settings.timesteps)
        raise ValueError(f"steps must be a whole number from 1 to {most}, got {steps}")
    return settings.timesteps[steps]


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
