"""A site at work, in one process: cameras, queues, detector, events."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from ..bundle import Manifest
from ..models.detections import Detections
from ..models.detector import PersonDetector
from .batch_loop import BatchLoop, FrameResult
from .camera_feed import CameraFrame, Feed, FeedSettings
from .elastic_steps import CostTable, StepChooser
from .event_log import EventLog
from .events import (
    Compute,
    DetectedPerson,
    DetectionEvent,
    TrackEvent,
    detection_event,
    model_record,
)
from .frame_queues import FrameQueues
from .frames import VideoFrame
from .ingest import Ingest, ThreadIngest
from .ingest_processes import ProcessIngest, default_workers
from .query import as_box
from .site_file import Camera, Site, resolved_url
from .site_people import SitePeople
from .step_costs import allowed_steps

# How long a frame waits for those of other cameras to share its batch.
WINDOW_S = 0.02

logger = logging.getLogger(__name__)


@dataclass
class Totals:
    """What a service has done, for metrics; written by the detector's thread alone."""

    frames: Counter[str] = field(default_factory=Counter)
    """By camera."""
    people: Counter[str] = field(default_factory=Counter)
    late: Counter[str] = field(default_factory=Counter)
    """Frames that were done after their deadline, by camera."""
    steps: Counter[int] = field(default_factory=Counter)
    """Frames by K."""
    failed_writes: int = 0


class Service:
    """Runs a site until it is stopped."""

    def __init__(self, site: Site, manifest: Manifest, detector: PersonDetector, table: CostTable) -> None:
        """detector: proven, used by one thread. table: what steps cost.

        Raises OSError where data_dir cannot be written, and ValueError where the model has no such steps.
        """
        self.site = site
        self.totals = Totals()
        self._model = model_record(manifest)
        self._queues: FrameQueues[CameraFrame] = FrameQueues(site.model.max_batch, WINDOW_S)
        self._ingest: Ingest | None = None
        self._feeds: dict[str, Feed] = {}
        self._lock = threading.Lock()
        self._log = EventLog(site.site.data_dir)
        self._people = SitePeople(site, detector, self._model)
        steps = allowed_steps(site, manifest)
        self._loop = BatchLoop(self._queues, self._detect, StepChooser(table, steps), self._on_result)
        self._is_serving = False

    def start(self) -> None:
        """Begin with every camera that is enabled; those that are missing are waited for."""
        self._loop.start()
        self._ingest = _ingest(self.site)
        for camera in self.site.cameras:
            if camera.enabled:
                self._add(camera)
        self._is_serving = True

    def stop(self, timeout_s: float) -> bool:
        """Stop the cameras, finish the batch under way, close the events.

        False where a thread did not end in time.
        """
        self._is_serving = False
        end_s = time.monotonic() + timeout_s
        with self._lock:
            feeds = list(self._feeds.values())
        for feed in feeds:
            feed.stop()
            # Who waits for room in a queue wakes up.
            self._queues.remove(feed.camera)
        ended = [self._loop.stop(max(0.0, end_s - time.monotonic()))]
        ended += [feed.join(max(0.0, end_s - time.monotonic())) for feed in feeds]
        if ended[0]:
            self._write(self._people.end())
        if self._ingest is not None:
            ended.append(self._ingest.close(max(0.0, end_s - time.monotonic())))
        self._log.close()
        return all(ended)

    @property
    def is_ready(self) -> bool:
        """Whether frames are worked on; not whether there are any: cameras may be away."""
        return self._is_serving and self._loop.is_alive

    def cameras(self) -> list[dict[str, Any]]:
        """State and account of every camera, in the order of the site."""
        with self._lock:
            feeds = dict(self._feeds)
        return [self._camera(camera, feeds.get(camera.id)) for camera in self.site.cameras]

    def ingest_workers(self) -> list[int]:
        """Process ids of those that follow cameras; none with ingest.isolation thread."""
        return [] if self._ingest is None else self._ingest.pids()

    def waits_s(self) -> list[float]:
        """How long the latest frames waited for their computation."""
        return self._loop.waits_s()

    def _camera(self, camera: Camera, feed: Feed | None) -> dict[str, Any]:
        if feed is None:
            return {"camera": camera.id, "state": "disabled"}
        account = self._queues.account(camera.id)
        return feed.status() | {
            "offered": account.offered,
            "computed": account.taken,
            "dropped": dict(account.dropped),
            "waiting": self._queues.waiting(camera.id),
            "people": self.totals.people[camera.id],
        }

    def _add(self, camera: Camera) -> None:
        assert self._ingest is not None  # start made it
        settings, policy = self.site.settings(camera), self.site.queue_policy(camera)
        self._queues.add(camera.id, policy, time.monotonic())
        feed = self._ingest.open(
            FeedSettings(
                camera.id,
                resolved_url(camera),
                latency_s=self.site.promise.latency_ms / 1000,
                sample_fps=settings.sample_fps,
                playback=self.site.playback(camera),
                trust_clock=settings.trust_clock,
            ),
            self._take_in,
            depth=policy.depth,
            is_blocking=policy.mode == "every_frame",
        )
        with self._lock:
            self._feeds[camera.id] = feed
        feed.start()

    def _take_in(self, frame: CameraFrame, now_s: float, deadline_s: float) -> str | None:
        is_in = self._queues.offer(frame.camera, frame, now_s=now_s, deadline_s=deadline_s)
        return None if is_in else "removed"

    def _detect(self, frames: Sequence[CameraFrame], steps: int) -> list[Detections]:
        return self._people.detect(frames, steps)

    def _on_result(self, result: FrameResult) -> None:
        frame, people = result.frame, result.people
        self.totals.frames[frame.camera] += 1
        self.totals.people[frame.camera] += len(people)
        self.totals.late[frame.camera] += result.late_s > 0
        self.totals.steps[result.steps] += 1
        picture = VideoFrame(
            frame.camera,
            frame.seq,
            frame.pts_s,
            frame.image,
            datetime.fromtimestamp(frame.time.utc_s, UTC),
            frame.time.source,
            frame.time.uncertainty_s,
        )
        followed = self._people.follow(frame, people)
        compute = Compute(
            steps=result.steps,
            batch=result.batch,
            infer_ms=1000 * result.infer_s,
            queue_ms=1000 * result.queue_s,
            warm=followed.warm,
        )
        events = [
            detection_event(
                picture,
                DetectedPerson(
                    id=f"{frame.camera}:{frame.seq}:{i}",
                    box=as_box(people.boxes_xyxy[i]),
                    score=float(people.scores[i]),
                    track=followed.tracks[i],
                ),
                match=None,
                model=self._model,
                compute=compute,
                site=self.site.site.id,
            )
            for i in range(len(people))
        ]
        self._write([*events, *followed.ended])

    def _write(self, events: Sequence[DetectionEvent | TrackEvent]) -> None:
        try:
            self._log.write(events)
        except OSError as error:
            # A full disk must not end detection; the count is what tells.
            self.totals.failed_writes += 1
            logger.error("%s", error)


def _ingest(site: Site) -> Ingest:
    """Where the cameras of a site are followed."""
    if site.ingest.isolation == "thread":
        return ThreadIngest()
    return ProcessIngest(site.ingest.workers or default_workers(len(site.cameras)))
