"""Frames of many cameras on their way to one detector: queues that stay short, batches by earliest deadline.

Every frame that is offered is taken, dropped for a reason that is counted, or still waits. Times are seconds of a
monotonic clock, given by the caller.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

# How long a frame waits for those of other cameras to share its batch.
WINDOW_S = 0.02

QueueMode = Literal["freshest", "bounded", "every_frame"]
DropReason = Literal["stale", "overflow", "deadline", "failed", "removed"]

Content = TypeVar("Content")


@dataclass(frozen=True)
class QueuePolicy:
    """How the frames of one camera wait."""

    mode: QueueMode = "bounded"
    """freshest: the newest frame alone. bounded: in order, up to depth. every_frame, for files: in order, whoever
    offers waits for room, and nothing is ever too late."""
    depth: int = 8
    """Of bounded and every_frame."""
    max_staleness_s: float = 0.5
    """A frame that has waited longer is dropped; not in every_frame."""
    min_fps: float = 1.0
    """A camera that was served less often goes first."""

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth must be a whole number >= 1, got {self.depth}")
        if not self.max_staleness_s > 0 or not self.min_fps >= 0:
            raise ValueError(
                f"max_staleness_s must be > 0 and min_fps >= 0, got {self.max_staleness_s:g} and {self.min_fps:g}"
            )


@dataclass(frozen=True, eq=False)
class Waiting(Generic[Content]):
    """One frame in a queue."""

    camera: str
    content: Content
    since_s: float
    """When it was offered."""
    deadline_s: float
    """When its people must be known: capture plus the promised latency."""


@dataclass
class Account:
    """What became of a camera's frames."""

    offered: int = 0
    taken: int = 0
    """Computed, or on the way there: it falls by those that are dropped after all."""
    dropped: Counter[DropReason] = field(default_factory=Counter)


@dataclass
class _Queue(Generic[Content]):
    policy: QueuePolicy
    served_s: float
    """When a frame of this camera was taken last."""
    has_lost: bool = False
    """Whether frames were dropped since then for want of time."""
    frames: deque[Waiting[Content]] = field(default_factory=deque)


class FrameQueues(Generic[Content]):
    """The queues of all cameras; cameras come and go, any thread may call."""

    def __init__(self, max_batch: int, window_s: float) -> None:
        """max_batch: the most frames at once. window_s: how long a frame waits for others to share its batch."""
        if max_batch < 1 or window_s < 0:
            raise ValueError(f"max_batch must be >= 1 and window_s >= 0, got {max_batch} and {window_s:g}")
        self._max_batch = max_batch
        self._window_s = window_s
        self._queues: dict[str, _Queue[Content]] = {}
        self._accounts: dict[str, Account] = {}
        self._changed = threading.Condition()

    def add(self, camera: str, policy: QueuePolicy, now_s: float) -> None:
        """Let a camera in. Raises ValueError where it is in already."""
        with self._changed:
            if camera in self._queues:
                raise ValueError(f"camera must be new, got {camera}")
            self._queues[camera] = _Queue(policy, now_s)
            self._accounts.setdefault(camera, Account())

    def remove(self, camera: str) -> None:
        """Let a camera go; its frames are dropped, its account stays."""
        with self._changed:
            queue = self._queues.pop(camera)
            self._accounts[camera].dropped["removed"] += len(queue.frames)
            self._changed.notify_all()

    def offer(
        self, camera: str, content: Content, *, now_s: float, deadline_s: float, wait_s: float = math.inf
    ) -> bool:
        """Put a frame in its queue. wait_s: how long every_frame waits for room.

        False where the camera was removed, or there was no room in time; such a frame was never offered.
        """
        with self._changed:
            if camera in self._queues and self._queues[camera].policy.mode == "every_frame":
                self._changed.wait_for(
                    lambda: not self._is_full(camera), None if math.isinf(wait_s) else wait_s
                )
            if camera not in self._queues or self._is_full_for_good(camera):
                return False
            queue, account = self._queues[camera], self._accounts[camera]
            account.offered += 1
            if queue.policy.mode == "freshest":
                account.dropped["stale"] += len(queue.frames)
                queue.has_lost |= bool(queue.frames)
                queue.frames.clear()
            elif queue.policy.mode == "bounded" and len(queue.frames) >= queue.policy.depth:
                queue.frames.popleft()
                account.dropped["overflow"] += 1
                queue.has_lost = True
            if queue.policy.mode == "every_frame":
                deadline_s = math.inf
            if queue.frames:
                # Frames of a camera stay in order, also where its clock was put back between two.
                deadline_s = max(deadline_s, queue.frames[-1].deadline_s)
            queue.frames.append(Waiting(camera, content, now_s, deadline_s))
            self._changed.notify_all()
            return True

    def due_s(self, now_s: float) -> float | None:
        """When the next batch should be taken: at once when it is as large as it gets, else after the window.

        None while nothing waits.
        """
        with self._changed:
            queues = [queue for queue in self._queues.values() if queue.frames]
            if not queues:
                return None
            waiting = sum(len(queue.frames) for queue in queues)
            if waiting >= self._max_batch or len(queues) == len(self._queues):
                return now_s
            return min(queue.frames[0].since_s for queue in queues) + self._window_s

    def wait(self, timeout_s: float) -> None:
        """Sleep until something changes, at most timeout_s."""
        with self._changed:
            self._changed.wait(timeout_s)

    def is_behind(self, now_s: float) -> bool:
        """Whether a camera is served less often than its min_fps though it sends enough: its frames were dropped."""
        with self._changed:
            return any(
                queue.has_lost and not self._is_served(queue, now_s) for queue in self._queues.values()
            )

    def take(
        self, now_s: float, needed_s: Callable[[int], float] = lambda count: 0.0
    ) -> list[Waiting[Content]]:
        """Take a batch; empty where no frame waits that is still worth it.

        needed_s: how long so many frames take at the least. As many are taken as bring the most frames in
        time; those that cannot be done by their deadline then are dropped here, before they push aside others that
        can. A camera that was served less often than its min_fps is not dropped so: rather the batch is smaller, and
        its frames come first. Then comes the earliest deadline. A camera gives no more than its share while others
        wait.
        """
        with self._changed:
            for queue in self._queues.values():
                self._drop_stale(queue, now_s)
            size = self._best_size(now_s, needed_s)
            for queue in self._queues.values():
                self._drop_late(queue, now_s + needed_s(size))
            share = math.ceil(size / max(1, sum(bool(queue.frames) for queue in self._queues.values())))
            candidates = [
                (self._is_served(queue, now_s), frame.deadline_s, frame.camera, i, frame)
                for queue in self._queues.values()
                for i, frame in enumerate(list(queue.frames)[:share])
            ]
            # Camera and place in the queue make the order one, and keep the frames of a camera in order.
            batch = [each[-1] for each in sorted(candidates, key=lambda each: each[:-1])[:size]]
            for frame in batch:
                queue = self._queues[frame.camera]
                queue.frames.remove(frame)
                queue.served_s, queue.has_lost = now_s, False
                self._accounts[frame.camera].taken += 1
            if batch:
                self._changed.notify_all()
            return batch

    def drop(self, frames: Iterable[Waiting[Content]], reason: DropReason) -> None:
        """Count frames that were taken and then not used, as dropped."""
        with self._changed:
            for frame in frames:
                account = self._accounts[frame.camera]
                account.taken -= 1
                account.dropped[reason] += 1

    def account(self, camera: str) -> Account:
        """A copy of what became of a camera's frames so far."""
        with self._changed:
            account = self._accounts[camera]
            return Account(account.offered, account.taken, account.dropped.copy())

    def waiting(self, camera: str) -> int:
        """Frames in the queue of a camera; 0 where it was removed."""
        with self._changed:
            return len(self._queues[camera].frames) if camera in self._queues else 0

    def _is_full(self, camera: str) -> bool:
        return (
            camera in self._queues and len(self._queues[camera].frames) >= self._queues[camera].policy.depth
        )

    def _is_full_for_good(self, camera: str) -> bool:
        return self._queues[camera].policy.mode == "every_frame" and self._is_full(camera)

    def _best_size(self, now_s: float, needed_s: Callable[[int], float]) -> int:
        """How many frames to take: as few as bring the most frames in time."""
        deadlines = [frame.deadline_s for queue in self._queues.values() for frame in queue.frames]
        starving = [
            queue.frames[-1].deadline_s
            for queue in self._queues.values()
            if queue.frames and not self._is_served(queue, now_s)
        ]
        sizes = range(1, max(1, min(len(deadlines), self._max_batch)) + 1)
        ends_s = {size: now_s + needed_s(size) for size in sizes}
        # Sizes that serve the most of the starving cameras, as far as anything can.
        most = max(sum(deadline_s >= ends_s[size] for deadline_s in starving) for size in sizes)
        fair = [s for s in sizes if sum(deadline_s >= ends_s[s] for deadline_s in starving) == most]

        def in_time(size: int) -> int:
            return min(size, sum(deadline_s >= ends_s[size] for deadline_s in deadlines))

        return max(fair, key=lambda size: (in_time(size), -size))

    def _drop_stale(self, queue: _Queue[Content], now_s: float) -> None:
        if queue.policy.mode == "every_frame":
            return
        while queue.frames and now_s - queue.frames[0].since_s > queue.policy.max_staleness_s:
            frame = queue.frames.popleft()
            self._accounts[frame.camera].dropped["stale"] += 1
            queue.has_lost = True

    def _drop_late(self, queue: _Queue[Content], done_s: float) -> None:
        for frame in [frame for frame in queue.frames if frame.deadline_s < done_s]:
            queue.frames.remove(frame)
            self._accounts[frame.camera].dropped["deadline"] += 1
            queue.has_lost = True

    def _is_served(self, queue: _Queue[Content], now_s: float) -> bool:
        return now_s - queue.served_s <= 1 / queue.policy.min_fps if queue.policy.min_fps else True
