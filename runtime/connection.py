"""The connection to a camera as a state: connecting, streaming, stalled, waiting for the next try - and since when.

Pure bookkeeping over a monotonic clock of the caller; runtime.video does the talking.
"""

from __future__ import annotations

import math
import random
import statistics
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum


class State(StrEnum):
    """Of a connection."""

    DISABLED = "disabled"
    CONNECTING = "connecting"
    STREAMING = "streaming"
    STALLED = "stalled"
    BACKOFF = "backoff"
    ENDED = "ended"
    """A recording is played out."""


class Reason(StrEnum):
    """Why a connection failed."""

    TIMEOUT = "timeout"
    REFUSED = "refused"
    LOST = "lost"
    ENDED = "ended"
    AUTH_FAILED = "auth_failed"
    NOT_FOUND = "not_found"
    UNSUPPORTED = "unsupported"
    CRASHED = "crashed"


# Trying again soon does not help, and locks accounts of cameras.
PATIENT = frozenset({Reason.AUTH_FAILED, Reason.NOT_FOUND, Reason.UNSUPPORTED})
PATIENT_WAIT_S = 300.0

# Cameras must be back ten seconds after their network, so that the wait ends well before; with a try every few
# seconds a camera that is off for a week costs nothing.
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 5.0

# Waits start short again after this long without a fault: a camera that drops every ten seconds stays slow.
HEALTHY_S = 30.0

# No frame for so many intervals, and for so long at least, is a stall. The user is promised to see it three
# seconds after the last byte.
STALL_INTERVALS, SHORTEST_STALL_S = 5.0, 2.5

# From so many of the latest frames the interval is known.
REMEMBERED_GAPS = 15

CONNECTS_PER_HOST = 4


@dataclass
class Connection:
    """One camera's connection. Methods take the present time, seconds of a monotonic clock."""

    since_s: float
    """When the state began."""
    state: State = State.CONNECTING
    reason: Reason | None = None
    """Of the latest failure; None while streaming."""
    retry_s: float | None = None
    """When to try again; in BACKOFF alone."""
    offline_since_s: float | None = None
    """When frames stopped; None while they come. What a user must see instead of an old picture."""
    reconnects: Counter[Reason] = field(default_factory=Counter)
    stalled_s: float = 0.0
    """Time without frames though connected, in all."""
    rng: random.Random = field(default_factory=random.Random, repr=False)
    _failures: int = field(default=0, repr=False)
    _last_frame_s: float | None = field(default=None, repr=False)
    _frames: int = field(default=0, repr=False)
    """Of the present connection."""
    _gaps_s: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED_GAPS), repr=False)

    def __post_init__(self) -> None:
        if self.state is not State.STREAMING and self.offline_since_s is None:
            self.offline_since_s = self.since_s

    def connect(self, now_s: float) -> None:
        """A try begins."""
        self.retry_s, self._last_frame_s, self._frames = None, None, 0
        self._enter(State.CONNECTING, now_s)

    def frame(self, now_s: float) -> None:
        """A frame came."""
        if self._last_frame_s is not None:
            gap_s = now_s - self._last_frame_s
            if self.state is State.STALLED:
                self.stalled_s += now_s - self.since_s
            elif self._frames > 1:
                # Not the first gap: the second frame of a connection comes when it comes.
                self._gaps_s.append(gap_s)
        if self.state is not State.STREAMING:
            self._enter(State.STREAMING, now_s)
            self.reason, self.offline_since_s = None, None
        elif now_s - self.since_s >= HEALTHY_S:
            self._failures = 0
        self._last_frame_s = now_s
        self._frames += 1

    def check(self, now_s: float) -> bool:
        """Tell whether frames stay away too long; then the state is STALLED, and the connection to be given up."""
        last_s = self._last_frame_s
        if self.state is State.STREAMING and last_s is not None and now_s - last_s > self.stall_after_s:
            self.offline_since_s = last_s
            self._enter(State.STALLED, now_s)
        return self.state is State.STALLED

    @property
    def stall_after_s(self) -> float:
        """How long frames may stay away."""
        # The median: cameras send frames in bursts.
        interval_s = statistics.median(self._gaps_s) if self._gaps_s else 0.0
        return max(SHORTEST_STALL_S, STALL_INTERVALS * interval_s)

    def fail(self, reason: Reason, now_s: float) -> float:
        """The try or the stream failed. Returns when to try again, which is random within bounds."""
        if self.state is State.STALLED:
            self.stalled_s += now_s - self.since_s
        if self.offline_since_s is None:
            self.offline_since_s = now_s if self._last_frame_s is None else self._last_frame_s
        self.reason = reason
        self.reconnects[reason] += 1
        longest_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * math.pow(2, min(self._failures, 30)))
        self._failures += 1
        # A full jitter: cameras that were lost together do not come back together.
        wait_s = (
            PATIENT_WAIT_S * self.rng.uniform(0.8, 1.2)
            if reason in PATIENT
            else self.rng.uniform(0, longest_s)
        )
        self.retry_s = now_s + wait_s
        self._enter(State.BACKOFF, now_s)
        return self.retry_s

    def end(self, now_s: float) -> None:
        """A recording was played to its end, and will not be opened again."""
        # It is not offline: nothing is missing.
        self.retry_s, self.reason, self.offline_since_s = None, None, None
        self._enter(State.ENDED, now_s)

    def disable(self, now_s: float) -> None:
        """The user switched the camera off."""
        self.retry_s, self.reason = None, None
        self._enter(State.DISABLED, now_s)

    def _enter(self, state: State, now_s: float) -> None:
        self.state, self.since_s = state, now_s


class HostLimit:
    """How many connections to one host may be opened at once: recorders fall over when all channels come together."""

    def __init__(self, most: int = CONNECTS_PER_HOST) -> None:
        self._permits: dict[str, threading.BoundedSemaphore] = defaultdict(
            lambda: threading.BoundedSemaphore(most)
        )
        self._lock = threading.Lock()

    @contextmanager
    def connecting(self, host: str) -> Iterator[None]:
        """Wait for a permit, and hold it within the block."""
        with self._lock:
            permit = self._permits[host]
        with permit:
            yield
