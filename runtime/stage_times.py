"""Where the time of a frame goes: stages with their begin and end, noted while a batch runs.

Two readings of a clock a stage, no lock, no copy. Preprocess, backbone, cdl and post are told apart where the
detector runs an engine in this process; a server's answer is one stage, infer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..models.detections import Detections
from ..models.detector import Detector, PersonDetector
from .batch_loop import FrameResult
from .camera_feed import CameraFrame
from .noted_engine import NotedEngine

StageName = Literal["decode", "queue", "preprocess", "backbone", "cdl", "post", "infer", "publish", "e2e"]


class Stage(NamedTuple):
    """One stage of a frame, or of the batch that it was in; seconds of the monotonic clock."""

    name: StageName
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s


@dataclass(frozen=True)
class FrameRecord:
    """What one frame took, from its capture to its events."""

    camera: str
    seq: int
    steps: int
    batch: int
    is_first: bool
    """Of its batch: what counts batches counts these."""
    people: int
    stages: tuple[Stage, ...]
    """In order of time; those of the detector are the whole batch's."""
    e2e_s: float | None
    """From capture to the events being written; None for recordings, which were captured long ago."""


class BatchStages:
    """The stages of the latest batch; for the detector's thread alone."""

    def __init__(self, detector: PersonDetector) -> None:
        self._noted: NotedEngine | None = None
        self.detector = detector
        """What to detect with, so that its stages are noted."""
        self.latest: tuple[Stage, ...] = ()
        if isinstance(detector, Detector):
            self._noted = NotedEngine(detector.engine)
            self.detector = Detector(self._noted, detector.settings)

    def around(
        self, detect: Callable[[Sequence[CameraFrame], int], list[Detections]]
    ) -> Callable[[Sequence[CameraFrame], int], list[Detections]]:
        """The same function, whose stages are in latest after each call."""

        def noted(frames: Sequence[CameraFrame], steps: int) -> list[Detections]:
            if self._noted is not None:
                self._noted.calls.clear()
            start_s = time.monotonic()
            people = detect(frames, steps)
            self.latest = self._stages(start_s, time.monotonic())
            return people

        return noted

    def _stages(self, start_s: float, end_s: float) -> tuple[Stage, ...]:
        calls = self._noted.calls if self._noted is not None else []
        if len(calls) < 2:
            return (Stage("infer", start_s, end_s),)
        (backbone_s, features_s), done_s = calls[0], calls[-1][1]
        return (
            Stage("preprocess", start_s, backbone_s),
            Stage("backbone", backbone_s, features_s),
            Stage("cdl", features_s, done_s),
            Stage("post", done_s, end_s),
        )


def frame_record(result: FrameResult, batch: tuple[Stage, ...], publish: Stage) -> FrameRecord:
    """What a frame took whose events are written. batch: the stages of its batch."""
    frame, offered_s = result.frame, result.start_s - result.queue_s
    stages = (Stage("queue", offered_s, result.start_s), *batch, publish)
    if frame.decode_s is not None:
        stages = (Stage("decode", offered_s - frame.decode_s, offered_s), *stages)
    return FrameRecord(
        camera=frame.camera,
        seq=frame.seq,
        steps=result.steps,
        batch=result.batch,
        is_first=result.is_first,
        people=len(result.people),
        stages=stages,
        e2e_s=None if frame.time.source == "file" else time.time() - frame.time.utc_s,
    )
