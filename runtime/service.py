"""A site at work, in one process: cameras, queues, detector, events."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..bundle import Manifest
from ..models.detections import Detections
from ..models.detector import PersonDetector
from .batch_loop import BatchLoop, FrameResult
from .camera_feed import CameraFrame, Feed, FeedSettings
from .connection import State
from .elastic_steps import CostTable, StepChooser
from .event_log import EventLog
from .events import DetectionEvent, TrackEvent, model_record
from .feed_history import FeedHistory
from .frame_queues import WINDOW_S, FrameQueues
from .ingest import Ingest, ThreadIngest, faults_of
from .ingest_processes import ProcessIngest, default_workers
from .site_changes import SiteChange, WantedCamera, change_between, wanted_cameras
from .site_errors import SiteError
from .site_file import Camera, Site
from .site_people import SitePeople, people_events
from .stage_times import BatchStages, FrameRecord, Stage, frame_record
from .step_costs import allowed_steps
from .traces import FrameTrace, FrameTracer

# How long a change waits for the old connections of the cameras that it touches.
LEAVE_S = 2.0

# A batch takes seconds at most.
STUCK_BATCH_S = 60.0

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
    """Frames whose events could not be written."""
    events: int = 0
    """Events that were written."""


class Service:
    """Runs a site until it is stopped."""

    def __init__(
        self,
        site: Site,
        manifest: Manifest,
        detector: PersonDetector,
        table: CostTable,
        tracer: FrameTracer | None = None,
    ) -> None:
        """detector: proven, used by one thread. table: what steps cost. tracer: for every so-manyth frame.

        Raises OSError where data_dir cannot be written, and ValueError where the model has no such steps.
        """
        self.site = site
        self.totals = Totals()
        self.observers: list[Callable[[FrameRecord], None]] = []
        """Told of every frame that is done, by the detector's thread."""
        self._stages = BatchStages(detector)
        self.model = model_record(manifest)
        self._tracer = tracer
        self._queues: FrameQueues[CameraFrame] = FrameQueues(site.model.max_batch, WINDOW_S)
        self._ingest: Ingest | None = None
        self._feeds: dict[str, Feed] = {}
        self._wanted: dict[str, WantedCamera] = {}
        self._history = FeedHistory()
        self._next_seq: dict[str, int] = {}
        self._left: deque[tuple[str, Site]] = deque()
        """Cameras that were let go or changed, and the site since then; for the detector's thread."""
        self._lock = threading.Lock()
        self._changing = threading.Lock()
        self._log = EventLog(site.site.data_dir)
        self._people = SitePeople(site, self._stages.detector, self.model)
        steps = allowed_steps(site, manifest)
        self._loop = BatchLoop(
            self._queues, self._stages.around(self._detect), StepChooser(table, steps), self._on_result
        )
        self._is_serving = False
        self.is_started = False
        """Whether start came to its end, once and for all."""

    def start(self) -> None:
        """Begin with every camera that is enabled; those that are missing are waited for.

        Raises SiteError where a secret is not there.
        """
        wanted = wanted_cameras(self.site)
        self._loop.start()
        self._ingest = _ingest(self.site)
        for camera in wanted.values():
            self._add(camera)
        self._is_serving = self.is_started = True

    def check(self, site: Site) -> SiteChange:
        """What apply would do. Raises what it raises."""
        with self._lock:
            change = change_between(self.site, site, self._wanted)
        if not self._people.can_start_warm and any(
            site.settings(camera).warm_start for camera in site.cameras
        ):
            reason = (
                "must stay false while the service runs without warm starts, got true; restart the service"
            )
            raise SiteError(f"warm_start {reason}", place="warm_start", reason=reason)
        return change

    def apply(self, site: Site) -> SiteChange:
        """Follow the cameras of another site from now on; those that are the same keep their connection.

        Raises SiteError, and changes nothing, where a key differs that holds until the next start, a secret is not
        there, or the service is not at work.
        """
        with self._changing:
            if not self._is_serving:
                raise SiteError("service must be at work to change its cameras, got one that is not")
            change, wanted = self.check(site), wanted_cameras(site)
            self._leave([*change.removed, *change.changed])
            with self._lock:
                self.site = site
            self._left.extend((name, site) for name in (*change.removed, *change.changed, *change.added))
            for name in (*change.changed, *change.added):
                if name in wanted:
                    self._add(wanted[name])
        return change

    def stop(self, timeout_s: float) -> bool:
        """Stop the cameras, finish the batch under way, close the events.

        False where a thread did not end in time.
        """
        self._is_serving = False
        end_s = time.monotonic() + timeout_s
        # A change under way comes to its end first; the next one finds a service that is not at work.
        with self._changing:
            feeds = list(self._feeds.values())
        for feed in feeds:
            feed.stop()
            # Who waits for room in a queue wakes up.
            self._queues.remove(feed.camera)
        ended = [self._loop.stop(max(0.0, end_s - time.monotonic()))]
        if ended[0]:
            self._write(self._people.end())
        for feed in feeds:
            has_ended = feed.join(max(0.0, end_s - time.monotonic()))
            # A camera that does not answer holds its thread for the rest of a timeout, and nothing else.
            ended.append(has_ended or feed.status()["state"] == State.CONNECTING)
        if self._ingest is not None:
            ended.append(self._ingest.close(max(0.0, end_s - time.monotonic())))
        self._log.close()
        return all(ended)

    @property
    def is_ready(self) -> bool:
        """Whether frames are worked on and events can be kept; not whether there are any: cameras may be away."""
        return self._is_serving and self._loop.is_alive and self._log.fault() is None

    def cameras(self) -> list[dict[str, Any]]:
        """State and account of every camera, in the order of the site."""
        with self._lock:
            feeds, site, history = dict(self._feeds), self.site, self._history.copy()
        return [self._camera(camera, feeds.get(camera.id), history) for camera in site.cameras]

    def faults(self) -> list[str]:
        """What only a restart mends, one sentence each; cameras that are away are none."""
        if not self._is_serving or self._ingest is None:
            return []
        found = []
        if not self._loop.is_alive or self._loop.silent_s > STUCK_BATCH_S:
            found.append(f"the detector must be done with a batch in {STUCK_BATCH_S:g} s, got none")
        with self._lock:
            feeds = list(self._feeds.values())
        found += faults_of(self._ingest, feeds)
        # Threads end when their camera is let go, too.
        return [] if self._changing.locked() else found

    def ingest_workers(self) -> list[int]:
        """Process ids of those that follow cameras; none with ingest.isolation thread."""
        return [] if self._ingest is None else self._ingest.pids()

    def waits_s(self) -> list[float]:
        """How long the latest frames waited for their computation."""
        return self._loop.waits_s()

    def _camera(self, camera: Camera, feed: Feed | None, history: FeedHistory) -> dict[str, Any]:
        if feed is None:
            return {"camera": camera.id, "state": "disabled"}
        account = self._queues.account(camera.id)
        return history.added_to(feed.status()) | {
            "offered": account.offered,
            # Not account.taken, which falls when a batch fails.
            "computed": self.totals.frames[camera.id],
            "dropped": dict(account.dropped),
            "waiting": self._queues.waiting(camera.id),
            "people": self.totals.people[camera.id],
        }

    def _leave(self, names: Iterable[str]) -> None:
        """Let go of cameras, and wait a little for their connections to end: recorders count sessions."""
        feeds = [self._feeds[name] for name in names if name in self._feeds]
        for feed in feeds:
            feed.stop()
            self._queues.remove(feed.camera)
        end_s = time.monotonic() + LEAVE_S
        for feed in feeds:
            feed.join(max(0.0, end_s - time.monotonic()))
            status = feed.status()
            with self._lock:
                del self._feeds[feed.camera], self._wanted[feed.camera]
                self._history.note(status)

    def _add(self, camera: WantedCamera) -> None:
        assert self._ingest is not None  # start made it
        settings = camera.settings
        self._queues.add(camera.id, camera.policy, time.monotonic())
        feed = self._ingest.open(
            FeedSettings(
                camera.id,
                camera.url,
                latency_s=self.site.promise.latency_ms / 1000,
                sample_fps=settings.sample_fps,
                playback=camera.playback,
                trust_clock=settings.trust_clock,
                first_seq=self._next_seq.get(camera.id, 0),
            ),
            self._take_in,
            depth=camera.policy.depth,
            is_blocking=camera.policy.mode == "every_frame",
        )
        # Known when it has begun: who asks whether it is followed must not be early.
        feed.start()
        with self._lock:
            self._feeds[camera.id], self._wanted[camera.id] = feed, camera

    def _take_in(self, frame: CameraFrame, now_s: float, deadline_s: float) -> str | None:
        self._next_seq[frame.camera] = frame.seq + 1
        is_in = self._queues.offer(frame.camera, frame, now_s=now_s, deadline_s=deadline_s)
        return None if is_in else "removed"

    def _detect(self, frames: Sequence[CameraFrame], steps: int) -> list[Detections]:
        # Between two batches: what is known of people belongs to this thread.
        while self._left:
            name, site = self._left.popleft()
            self._write(self._people.remove(name))
            self._people.follow_site(site)
        return self._people.detect(frames, steps)

    def _on_result(self, result: FrameResult) -> None:
        frame, people = result.frame, result.people
        self.totals.frames[frame.camera] += 1
        self.totals.people[frame.camera] += len(people)
        self.totals.late[frame.camera] += result.late_s > 0
        self.totals.steps[result.steps] += 1
        followed = self._people.follow(frame, people)
        # A recording was captured long ago: its trace begins now.
        start_s = time.time() if frame.time.source == "file" else frame.time.utc_s
        trace = self._tracer.begin(frame, start_s) if self._tracer is not None else None
        trace_id = None if trace is None else trace.trace_id
        events = people_events(result, followed, self.model, self.site.site.id, trace_id)
        publish_s = time.monotonic()
        self._write([*events, *followed.ended])
        self._tell(result, Stage("publish", publish_s, time.monotonic()), trace)

    def _write(self, events: Sequence[DetectionEvent | TrackEvent]) -> None:
        try:
            self._log.write(events)
            self.totals.events += len(events)
        except OSError as error:
            # A full disk must not end detection; the count is what tells.
            self.totals.failed_writes += 1
            logger.error("%s", error, extra={"err_code": "events_not_written"})

    def _tell(self, result: FrameResult, publish: Stage, trace: FrameTrace | None) -> None:
        """Tell who listens what a frame took."""
        record = frame_record(result, self._stages.latest, publish)
        for observe in self.observers:
            observe(record)
        if self._tracer is not None and trace is not None:
            self._tracer.end(trace, record)


def _ingest(site: Site) -> Ingest:
    """Where the cameras of a site are followed."""
    if site.ingest.isolation == "thread":
        return ThreadIngest()
    return ProcessIngest(site.ingest.workers or default_workers(len(site.cameras)))
