"""From queues to people: the thread that takes batches, chooses K, and lets the detector work.

It never runs late silently: frames that cannot keep their deadline even at the fewest steps are dropped, and
counted, before anything is computed for them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..models.detections import Detections
from .camera_feed import CameraFrame
from .elastic_steps import StepChooser
from .frame_queues import FrameQueues, Waiting

# How long the thread sleeps at most before it looks for a stop.
LONGEST_SLEEP_S = 0.1

# Waits of frames that are remembered for percentiles.
REMEMBERED = 10_000

Detect = Callable[[Sequence[CameraFrame], int], list[Detections]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FrameResult:
    """The people of one frame, and what it took."""

    frame: CameraFrame
    people: Detections
    steps: int
    batch: int
    """Images that were computed together."""
    queue_s: float
    """From the offer to the start of the computation."""
    infer_s: float
    """Of the whole batch."""
    late_s: float
    """How long after its deadline the frame was done; negative when in time."""
    start_s: float
    """When the computation began, by the monotonic clock."""
    is_first: bool
    """Of its batch."""


class BatchLoop:
    """One thread over one detector."""

    def __init__(
        self,
        queues: FrameQueues[CameraFrame],
        detect: Detect,
        chooser: StepChooser,
        on_result: Callable[[FrameResult], None],
    ) -> None:
        """detect: frames and K -> the people of each; what it raises drops the batch, and the loop goes on.

        on_result: called by the loop's thread.
        """
        self._queues = queues
        self._detect = detect
        self._chooser = chooser
        self._on_result = on_result
        self._stopping = threading.Event()
        self._waits: deque[float] = deque(maxlen=REMEMBERED)
        self._beat_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="detector", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """End after the batch under way; False where that takes longer."""
        self._stopping.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def is_alive(self) -> bool:
        """Whether the thread works."""
        return self._thread.is_alive()

    @property
    def silent_s(self) -> float:
        """For how long the thread has been busy with one batch, or worse."""
        return time.monotonic() - self._beat_s

    def waits_s(self) -> list[float]:
        """How long the latest frames waited from their offer to their computation."""
        return list(self._waits)

    def work(self, now_s: float) -> float:
        """Compute a batch if one is due. Returns for how many seconds there is nothing to do."""
        due_s = self._queues.due_s(now_s)
        if due_s is None:
            return LONGEST_SLEEP_S
        if due_s > now_s:
            return due_s - now_s
        is_behind = self._queues.is_behind(now_s)
        batch, steps = self._in_time(self._queues.take(now_s, self._chooser.least_s), now_s, is_behind)
        if batch:
            self._compute(batch, steps, now_s)
        else:
            self._chooser.skip()
        return 0.0

    def _in_time(
        self, batch: list[Waiting[CameraFrame]], now_s: float, is_behind: bool
    ) -> tuple[list[Waiting[CameraFrame]], int]:
        """Choose K; drop the most urgent frames until there is one."""
        batch = sorted(batch, key=lambda frame: frame.deadline_s)
        for late in range(len(batch)):
            steps = self._chooser.choose(
                batch[late].deadline_s - now_s, len(batch) - late, is_behind=is_behind
            )
            if steps is not None:
                self._queues.drop(batch[:late], "deadline")
                return batch[late:], steps
        self._queues.drop(batch, "deadline")
        return [], 0

    def _compute(self, batch: Sequence[Waiting[CameraFrame]], steps: int, start_s: float) -> None:
        try:
            people = self._detect([frame.content for frame in batch], steps)
            found_in = list(zip(batch, people, strict=True))
        # One batch that fails (a server that went away, a device out of memory) must not end the site.
        except Exception:
            logger.exception(
                "a batch of %d frames at K = %d failed and is dropped",
                len(batch),
                steps,
                extra={"err_code": "batch_failed"},
            )
            self._queues.drop(batch, "failed")
            return
        end_s = time.monotonic()
        self._chooser.observe(steps, len(batch), end_s - start_s)
        for i, (frame, found) in enumerate(found_in):
            self._waits.append(start_s - frame.since_s)
            self._on_result(
                FrameResult(
                    frame=frame.content,
                    people=found,
                    steps=steps,
                    batch=len(batch),
                    queue_s=start_s - frame.since_s,
                    infer_s=end_s - start_s,
                    late_s=end_s - frame.deadline_s,
                    start_s=start_s,
                    is_first=i == 0,
                )
            )

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._beat_s = time.monotonic()
            idle_s = self.work(time.monotonic())
            if idle_s > 0:
                self._queues.wait(min(idle_s, LONGEST_SLEEP_S))
