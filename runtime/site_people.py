"""The people of a site: the detector with warm starts where a camera wants them, tracks, and events of both."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import count
from typing import NamedTuple

from ..models.detections import Detections
from ..models.detector import Detector, PersonDetector
from .batch_loop import FrameResult
from .camera_feed import CameraFrame
from .events import (
    BestView,
    Compute,
    DetectedPerson,
    DetectionEvent,
    ModelRecord,
    TrackData,
    TrackEvent,
    TrackRecord,
    detection_event,
    source_of,
)
from .frames import VideoFrame
from .query import as_box
from .run import frame_seed
from .site_file import Site
from .tracks import CameraTracks, Track
from .warm_start import Shot, StartKind, WarmDetector


class Followed(NamedTuple):
    """What is known of the people of one frame because of the frames before."""

    start: str
    """Tells the service from those before it, whose frames had the same numbers."""
    tracks: Sequence[TrackRecord]
    """That of each detection."""
    warm: bool | None
    """None where the camera wants no warm start."""
    ended: Sequence[TrackEvent]


class SitePeople:
    """For the detector's thread alone. What it remembers of a camera is bounded."""

    def __init__(self, site: Site, detector: PersonDetector, model: ModelRecord) -> None:
        """Raises ValueError where a camera wants a warm start and the detector, or its bundle, has none."""
        self._site_id, self._detector, self._model = site.site.id, detector, model
        self._wants_warm = {camera.id: site.settings(camera).warm_start for camera in site.cameras}
        self._warm: WarmDetector | None = None
        if any(self._wants_warm.values()):
            if not isinstance(detector, Detector):
                raise ValueError(
                    "warm_start must be false for a detector that is not on this machine, got true"
                )
            self._warm = WarmDetector(detector)
        self._tracks: dict[str, CameraTracks] = {}
        self._starts: dict[tuple[str, int], StartKind] = {}
        self._start = f"{time.time_ns() // 1_000_000:x}"
        # One row of numbers for all: a camera that is changed, or taken away and added again, begins no new one.
        self._numbers = count(1)

    @property
    def can_start_warm(self) -> bool:
        """Whether there is what cameras need that want warm starts."""
        return self._warm is not None

    def follow_site(self, site: Site) -> None:
        """Take the cameras of another site from now on. One wants a warm start only where can_start_warm."""
        self._wants_warm = {camera.id: site.settings(camera).warm_start for camera in site.cameras}

    def detect(self, frames: Sequence[CameraFrame], steps: int) -> list[Detections]:
        """Find the people of a batch."""
        seeds = [frame_seed(frame.camera, frame.seq) for frame in frames]
        if self._warm is None:
            return self._detector.detect([frame.image for frame in frames], steps, seeds)
        shots = [
            Shot(
                frame.camera,
                frame.image,
                frame.time.utc_s,
                frame.connection,
                seed,
                self._tracks_of(frame.camera) if self._wants_warm.get(frame.camera) else None,
            )
            for frame, seed in zip(frames, seeds, strict=True)
        ]
        found = self._warm.detect(shots, steps)
        # What a batch that failed has left here goes with it.
        self._starts = {
            (frame.camera, frame.seq): each.start for frame, each in zip(frames, found, strict=True)
        }
        return [each.people for each in found]

    def follow(self, frame: CameraFrame, people: Detections) -> Followed:
        """Tell who is who among the people that detect found in a frame; frames of a camera in their order."""
        height, width = frame.image.shape[:2]
        tracks, ended = self._tracks_of(frame.camera).update(
            people, frame.time.utc_s, frame.seq, (width, height)
        )
        start = self._starts.pop((frame.camera, frame.seq), "off")
        records = [self._record(frame.camera, track) for track in tracks]
        return Followed(
            self._start,
            records,
            None if start == "off" else start == "warm",
            [self._ended(frame.camera, track) for track in ended],
        )

    def remove(self, camera: str) -> list[TrackEvent]:
        """Forget a camera that was taken away, or changed."""
        if self._warm is not None:
            self._warm.forget(camera)
        tracks = self._tracks.pop(camera, None)
        return [] if tracks is None else [self._ended(camera, track) for track in tracks.end()]

    def end(self) -> list[TrackEvent]:
        """Forget all cameras."""
        return [event for camera in list(self._tracks) for event in self.remove(camera)]

    def _tracks_of(self, camera: str) -> CameraTracks:
        return self._tracks.setdefault(camera, CameraTracks(numbers=self._numbers))

    def _record(self, camera: str, track: Track, *, is_over: bool = False) -> TrackRecord:
        return TrackRecord(
            id=f"{camera}:{self._start}:{track.number}",
            state="end" if is_over else "new" if track.votes == 1 else "update",
            votes=track.votes,
        )

    def _ended(self, camera: str, track: Track) -> TrackEvent:
        record = self._record(camera, track, is_over=True)
        first, last = (datetime.fromtimestamp(view.time_s, UTC) for view in (track.first, track.last))
        best = BestView(frame_seq=track.best.seq, box=track.best.box_xyxy, score=track.best.score)
        return TrackEvent(
            source=source_of(self._site_id, camera),
            subject=record.id,
            time=last,
            data=TrackData(
                camera=camera,
                track=record,
                first_seen=first,
                last_seen=last,
                best=best,
                model=self._model,
            ),
        )


def people_events(
    result: FrameResult, followed: Followed, model: ModelRecord, site_id: str, trace_id: str | None
) -> list[DetectionEvent]:
    """One event for each person of a frame."""
    frame, people = result.frame, result.people
    picture = VideoFrame(
        frame.camera,
        frame.seq,
        frame.pts_s,
        frame.image,
        datetime.fromtimestamp(frame.time.utc_s, UTC),
        frame.time.source,
        frame.time.uncertainty_s,
    )
    compute = Compute(
        steps=result.steps,
        batch=result.batch,
        infer_ms=1000 * result.infer_s,
        queue_ms=1000 * result.queue_s,
        warm=followed.warm,
    )
    return [
        detection_event(
            picture,
            DetectedPerson(
                id=f"{frame.camera}:{followed.start}:{frame.seq}:{i}",
                box=as_box(people.boxes_xyxy[i]),
                score=float(people.scores[i]),
                track=followed.tracks[i],
            ),
            match=None,
            model=model,
            compute=compute,
            site=site_id,
            trace_id=trace_id,
        )
        for i in range(len(people))
    ]
