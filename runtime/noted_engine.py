"""An engine whose calls are timed, for benchmarks and for the stages of a service."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..models.detections import Float32Array
from ..models.sampling import Engine, Features, StepOutput


@dataclass
class NotedEngine:
    """An engine that notes when its calls began and ended."""

    engine: Engine
    calls: list[tuple[float, float]] = field(default_factory=list)
    """Since they were cleared, seconds of the monotonic clock: of each batch the backbone, then its steps."""

    def backbone(self, images: NDArray[np.uint8]) -> Features:
        """As Engine.backbone."""
        start_s = time.monotonic()
        features = self.engine.backbone(images)
        self.calls.append((start_s, time.monotonic()))
        return features

    def denoise_step(
        self,
        features: Features,
        boxes_t: Float32Array,
        emb_t: Float32Array,
        t: NDArray[np.int64],
        t_next: NDArray[np.int64],
    ) -> StepOutput:
        """As Engine.denoise_step."""
        start_s = time.monotonic()
        output = self.engine.denoise_step(features, boxes_t, emb_t, t, t_next)
        self.calls.append((start_s, time.monotonic()))
        return output
