"""The K-step denoising loop on the host, over any engine; NumPy only.

PyTorch, onnxruntime, TensorRT and Triton differ in two calls, `backbone` and `denoise_step`. Everything around
them is here, once: letterbox, seeded noise, grid, solvers and renewal, pinned boxes, selection of detections.
Legend: B images, H, W canvas, N proposals, E embedding dimension, K steps, n boxes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .detections import Detections, Float32Array, select_detections
from .preprocess import Frame, Letterbox, check_frame, seeded_noise
from .solvers import (
    PLAIN,
    Float64Array,
    SamplerOptions,
    Schedule,
    Stepper,
    boxes_to_signal,
    fresh_noise,
    join_signal,
    split_signal,
)

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
    embedding_scale: float | None = None
    """Norm of an embedding in signal space; only solvers that run outside the graph need it."""
    num_timesteps: int | None = None
    """T of the noise schedule; only solvers that run outside the graph need it."""

    def threshold(self, steps: int) -> float:
        """The score from which a box counts as a person after K = steps."""
        known = [k for k in self.score_thresholds if k <= steps]
        return self.score_thresholds[max(known)] if known else self.score_threshold


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
        output = denoise(
            self.engine, features, boxes_t, emb_t, grid, options=options, settings=self.settings, seeds=seeds
        )
        threshold = self.settings.threshold(steps)
        return [self._select(output, i, letterbox, threshold) for i, letterbox in enumerate(letterboxes)]

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
        if options.renewal is not None or options.ensemble or options.refresh:
            raise ValueError(f"options must be a solver and eta alone where boxes are given, got {options}")
        grid = self._grid(steps)
        letterbox = self._letterbox(frame, "frame")
        boxes = check_boxes(boxes_xyxy, letterbox.frame_width, letterbox.frame_height)
        if len(boxes) == 0:
            return np.zeros((0, self.settings.embedding_dim), np.float32)
        signal = boxes_to_signal(letterbox.boxes_to_canvas(boxes), self.settings.box_scale)
        pinned = np.repeat(signal, PROPOSALS_PER_QUERY, axis=0)[None]
        _, emb_t = seeded_noise(seed, pinned.shape[1], self.settings.embedding_dim)
        features = self.engine.backbone(letterbox.image(frame)[None])
        output = denoise(
            self.engine,
            features,
            pinned,
            emb_t[None],
            grid,
            pin_boxes=True,
            options=options,
            settings=self.settings,
            seeds=[seed],
        )
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
    options: SamplerOptions = PLAIN,
    settings: SamplerSettings | None = None,
    seeds: Sequence[int] | None = None,
) -> StepOutput:
    """Run the K steps of a grid and return the last step's output; arguments as in denoise_steps.

    With options.ensemble all steps' outputs come side by side, (B, K * N, ...), the last step's at the end.
    """
    walk = denoise_steps(
        engine,
        features,
        boxes_t,
        emb_t,
        grid,
        pin_boxes=pin_boxes,
        options=options,
        settings=settings,
        seeds=seeds,
    )
    if options.ensemble:
        return StepOutput(*(np.concatenate(parts, axis=1) for parts in zip(*walk, strict=True)))
    return deque(walk, maxlen=1).pop()  # a grid has at least one timestep


def denoise_steps(
    engine: Engine,
    features: Features,
    boxes_t: Float32Array,
    emb_t: Float32Array,
    grid: Sequence[int],
    *,
    pin_boxes: bool = False,
    options: SamplerOptions = PLAIN,
    settings: SamplerSettings | None = None,
    seeds: Sequence[int] | None = None,
) -> Iterator[StepOutput]:
    """Walk a grid and yield the outputs of its K steps.

    boxes_t: (B, N, 4) and emb_t: (B, N, E) at grid[0]. pin_boxes keeps the boxes where they are. settings:
    needed where options.on_host; ValueError without them. seeds: one per image, default 0 for all.
    An output's boxes_next and emb_next are the graph's own DDIM step, whatever the options made of it.
    """

    def evaluate(boxes: Float32Array, emb: Float32Array, t: int, t_next: int) -> StepOutput:
        times = (np.full(len(boxes), value, np.int64) for value in (t, t_next))
        return engine.denoise_step(features, boxes_t if pin_boxes else boxes, emb, *times)

    seeds = [0] * len(boxes_t) if seeds is None else seeds
    if len(seeds) != len(boxes_t):
        raise ValueError(f"seeds must be one per image ({len(boxes_t)}), got {len(seeds)}")
    host = _HostSteps(evaluate, options, settings, seeds) if options.changes_steps else None
    boxes, emb = boxes_t, emb_t
    for step, (t, t_next) in enumerate(zip(grid, [*grid[1:], -1], strict=True), start=1):
        output = evaluate(boxes, emb, t, t_next)
        yield output
        if host is None or t_next < 0:
            boxes, emb = output.boxes_next, output.emb_next
        else:
            boxes, emb = host.follow(output, join_signal(boxes, emb), step, (t, t_next))


class _HostSteps:
    """Steps that the graph does not take. Boxes and embeddings go side by side as one signal, (B, N, 4 + E)."""

    def __init__(
        self,
        evaluate: Callable[[Float32Array, Float32Array, int, int], StepOutput],
        options: SamplerOptions,
        settings: SamplerSettings | None,
        seeds: Sequence[int],
    ) -> None:
        self._evaluate = evaluate
        self._options = options
        self._seeds = seeds
        self._stepper: Stepper | None = None
        if options.on_host:
            if settings is None or settings.embedding_scale is None or settings.num_timesteps is None:
                raise ValueError(
                    f"bundle must hold embedding_scale and num_timesteps for {options}, got none; export it again"
                )
            self._scales = settings.box_scale, settings.embedding_scale
            schedule = Schedule(settings.num_timesteps)
            self._stepper = Stepper(options.solver, schedule, self._predict, options.eta)

    def follow(
        self, output: StepOutput, x_t: Float64Array, step: int, times: tuple[int, int]
    ) -> tuple[Float32Array, Float32Array]:
        """Boxes and embeddings that the next step starts from; step counts the outputs so far."""
        noise = fresh_noise(self._seeds, step, x_t.shape[1:]) if self._options.draws_noise else None
        if noise is not None and self._options.refresh:
            return split_signal(noise)
        x_next = join_signal(output.boxes_next, output.emb_next)
        if self._stepper is not None:
            x_next = self._stepper.step(x_t, self._clean(output), *times, noise)
        if noise is not None and self._options.renewal is not None:
            renewed = (output.scores <= self._options.renewal)[..., None]
            x_next = np.where(renewed, noise, x_next)
            if self._stepper is not None:
                self._stepper.forget(renewed)
        return split_signal(x_next)

    def _predict(self, x_t: Float64Array, t: int) -> Float64Array:
        return self._clean(self._evaluate(*split_signal(x_t), t, -1))

    def _clean(self, output: StepOutput) -> Float64Array:
        box_scale, embedding_scale = self._scales
        return join_signal(boxes_to_signal(output.boxes_xyxy, box_scale), embedding_scale * output.embeddings)


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
