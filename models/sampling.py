"""The K-step denoising loop on the host, over any engine; NumPy only.

PyTorch, onnxruntime, OpenVINO and TensorRT differ in two calls, `backbone` and `denoise_step`. The steps around
them are here, once: grid, solvers and renewal, pinned boxes. models.detector is what frames go through.
Legend: B images, H, W canvas, N proposals, E embedding dimension, K steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .detections import Float32Array
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

# A timestep for all images, or (B,) one for each.
Times = int | NDArray[np.int64]

# K descending timesteps. Images that start elsewhere in the schedule may ride in one batch.
Grid = Sequence[Times] | NDArray[np.int64]

# The tensor names of a bundle's graphs; the outputs of a step are the fields of StepOutput.
BACKBONE_INPUTS: tuple[str, ...] = ("image",)
FEATURES: tuple[str, ...] = ("p2", "p3", "p4", "p5")
STEP_INPUTS: tuple[str, ...] = (*FEATURES, "boxes_t", "emb_t", "t", "t_next")


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


def denoise(
    engine: Engine,
    features: Features,
    boxes_t: Float32Array,
    emb_t: Float32Array,
    grid: Grid,
    *,
    pin_boxes: bool = False,
    options: SamplerOptions = PLAIN,
    settings: SamplerSettings | None = None,
    seeds: Sequence[int] | None = None,
    after_step: Callable[[StepOutput], None] | None = None,
) -> StepOutput:
    """Run the K steps of a grid and return the last step's output; arguments as in denoise_steps.

    With options.ensemble all steps' outputs come side by side, (B, K * N, ...), the last step's at the end.
    after_step: called with the output of each step; what it raises ends the loop.
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
    if after_step is not None:
        walk = _told(walk, after_step)
    if options.ensemble:
        return StepOutput(*(np.concatenate(parts, axis=1) for parts in zip(*walk, strict=True)))
    return deque(walk, maxlen=1).pop()  # a grid has at least one timestep


def _told(walk: Iterator[StepOutput], after_step: Callable[[StepOutput], None]) -> Iterator[StepOutput]:
    for output in walk:
        after_step(output)
        yield output


def denoise_steps(
    engine: Engine,
    features: Features,
    boxes_t: Float32Array,
    emb_t: Float32Array,
    grid: Grid,
    *,
    pin_boxes: bool = False,
    options: SamplerOptions = PLAIN,
    settings: SamplerSettings | None = None,
    seeds: Sequence[int] | None = None,
) -> Iterator[StepOutput]:
    """Walk a grid and yield the outputs of its K steps.

    boxes_t: (B, N, 4) and emb_t: (B, N, E) at grid[0]. pin_boxes keeps the boxes where they are. settings:
    needed where options.on_host; ValueError without them, or with them where images have different grids.
    seeds: one per image, default 0 for all.
    An output's boxes_next and emb_next are the graph's own DDIM step, whatever the options made of it.
    """

    def evaluate(boxes: Float32Array, emb: Float32Array, t: Times, t_next: Times) -> StepOutput:
        times = (np.full(len(boxes), value, np.int64) for value in (t, t_next))
        return engine.denoise_step(features, boxes_t if pin_boxes else boxes, emb, *times)

    if options.on_host and any(np.ndim(t) for t in grid):
        raise ValueError(f"grid must be the same for every image with {options}, got one for each")

    seeds = [0] * len(boxes_t) if seeds is None else seeds
    if len(seeds) != len(boxes_t):
        raise ValueError(f"seeds must be one per image ({len(boxes_t)}), got {len(seeds)}")
    host = _HostSteps(evaluate, options, settings, seeds) if options.changes_steps else None
    boxes, emb = boxes_t, emb_t
    for step, (t, t_next) in enumerate(zip(grid, [*grid[1:], -1], strict=True), start=1):
        output = evaluate(boxes, emb, t, t_next)
        yield output
        if host is None or step == len(grid):
            boxes, emb = output.boxes_next, output.emb_next
        else:
            boxes, emb = host.follow(output, join_signal(boxes, emb), step, (t, t_next))


class _HostSteps:
    """Steps that the graph does not take. Boxes and embeddings go side by side as one signal, (B, N, 4 + E)."""

    def __init__(
        self,
        evaluate: Callable[[Float32Array, Float32Array, Times, Times], StepOutput],
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
        self, output: StepOutput, x_t: Float64Array, step: int, times: tuple[Times, Times]
    ) -> tuple[Float32Array, Float32Array]:
        """Boxes and embeddings that the next step starts from; step counts the outputs so far."""
        noise = fresh_noise(self._seeds, step, x_t.shape[1:]) if self._options.draws_noise else None
        if noise is not None and self._options.refresh:
            return split_signal(noise)
        x_next = join_signal(output.boxes_next, output.emb_next)
        if self._stepper is not None:
            # A solver on the host has one grid for all images.
            t, t_next = map(int, times)
            x_next = self._stepper.step(x_t, self._clean(output), t, t_next, noise)
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
    return distinct([int(num_timesteps * (1 - i / steps) ** power + 1e-9) - 1 for i in range(steps)])


def distinct(grid: list[int]) -> list[int]:
    """Push timesteps apart that rounded to the same one near t = 0, and the last to 0 at least."""
    grid[-1] = max(grid[-1], 0)
    for i in range(len(grid) - 2, -1, -1):
        grid[i] = max(grid[i], grid[i + 1] + 1)
    return grid
