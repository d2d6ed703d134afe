"""A detector that finds the people of clips.py and takes as long as it is told: faults of streams need no network."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...bundle import Manifest
from ...models.detections import Detections, Float32Array
from ...models.sampling import SamplerSettings
from ..elastic_steps import CostTable
from ..frames import Picture
from .clips import person_in

MAX_STEPS = 4
EMBEDDING_DIM = 4
TIMESTEPS = {k: list(range(999, 999 - k, -1)) for k in range(1, MAX_STEPS + 1)}


class StubDetector:
    """Stands where a Detector stands."""

    def __init__(self, call_s: float = 0.005, step_s: float = 0.0, looks: bool = True) -> None:
        """What it takes: call_s a batch, and step_s for each step and image. looks: whether it finds anybody."""
        self.settings = SamplerSettings(
            width=640,
            height=360,
            num_proposals=1,
            embedding_dim=EMBEDDING_DIM,
            box_scale=1,
            timesteps=TIMESTEPS,
        )
        self.slowness = 1.0
        """How many times longer everything takes."""
        self._call_s, self._step_s, self._looks = call_s, step_s, looks

    def detect(
        self, frames: Sequence[Picture], steps: int = 4, seeds: Sequence[int] | None = None
    ) -> list[Detections]:
        """The bright person of each frame."""
        end_s = time.monotonic() + self.slowness * self.seconds(steps, len(frames))
        found = [self._look(frame) for frame in frames]
        time.sleep(max(0.0, end_s - time.monotonic()))
        return found

    def embed(
        self, frame: Picture, boxes_xyxy: NDArray[np.floating], steps: int = 4, seed: int = 0
    ) -> Float32Array:
        """(n, E): all look alike."""
        return np.tile(np.eye(EMBEDDING_DIM, dtype=np.float32)[0], (len(boxes_xyxy), 1))

    def seconds(self, steps: int, batch: int) -> float:
        """What a batch takes when nothing slows it."""
        return self._call_s + self._step_s * steps * batch

    def table(self) -> CostTable:
        """The same, as a service wants it."""
        return CostTable({(k, b): self.seconds(k, b) for k in (1, MAX_STEPS) for b in (1, 8)})

    def _look(self, frame: Picture) -> Detections:
        box = person_in(frame) if self._looks else None
        boxes = np.array([box] if box else [], np.float32).reshape(-1, 4)
        return Detections(boxes, np.full(len(boxes), 0.9, np.float32), self.embed(frame, boxes))


def stub_manifest() -> Manifest:
    """What a service must know of the stub."""
    return Manifest(
        model_id="stub",
        embedding_space="stub",
        width=640,
        height=360,
        num_proposals=1,
        embedding_dim=EMBEDDING_DIM,
        box_scale=1,
        timesteps=TIMESTEPS,
        score_threshold=0.5,
        nms_iou=0.5,
        match_threshold=0.5,
        weight_precision="float32",
        model={},
        training={},
        tools={},
        files={},
    )
