"""Cameras in threads of this process: nothing is copied, and nothing keeps a decoder's crash from the service."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from .camera_feed import CameraFeed, Feed, FeedSettings, Offer
from .connection import HostLimit, State

# A connection takes its timeouts, and those of the cameras of its host before it.
STUCK_S = 300.0


class Ingest(Protocol):
    """Where cameras are followed: ThreadIngest, or ingest_processes.ProcessIngest."""

    def open(self, settings: FeedSettings, offer: Offer, *, depth: int, is_blocking: bool) -> Feed:
        """A feed of a camera, not yet started. depth, is_blocking: of the queue that offer fills."""
        ...

    def pids(self) -> list[int]:
        """Of processes that follow cameras."""
        ...

    def is_well(self) -> bool:
        """Whether processes that end are started again."""
        ...

    def close(self, timeout_s: float) -> bool:
        """End what is left when all feeds have ended; False where that took force."""
        ...


class ThreadIngest:
    """A thread a camera."""

    def __init__(self) -> None:
        self._limit = HostLimit()

    def open(self, settings: FeedSettings, offer: Offer, *, depth: int, is_blocking: bool) -> CameraFeed:
        """A feed of a camera, not yet started."""
        return CameraFeed(settings, offer, self._limit)

    def pids(self) -> list[int]:
        """None: threads alone."""
        return []

    def is_well(self) -> bool:
        """There are none."""
        return True

    def close(self, timeout_s: float) -> bool:
        """Nothing is left."""
        return True


def faults_of(ingest: Ingest, feeds: Iterable[Feed]) -> Iterator[str]:
    """What is wrong with feeds that only a restart of the service mends."""
    if not ingest.is_well():
        yield "processes of cameras must be started again when they end, got one that nobody watches"
    for feed in feeds:
        status = feed.status()
        is_waiting = status["state"] not in (State.CONNECTING, State.STALLED)
        # A process has who watches over it; a thread that ended is gone.
        has_ended = isinstance(feed, CameraFeed) and feed.join(0.0) and status["state"] != State.ENDED
        if has_ended or (not is_waiting and status["state_s"] > STUCK_S):
            yield f"camera {feed.camera} must be followed, got a thread that ended or hangs"
