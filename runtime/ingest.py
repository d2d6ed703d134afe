"""Cameras in threads of this process: nothing is copied, and nothing keeps a decoder's crash from the service."""

from __future__ import annotations

from typing import Protocol

from .camera_feed import CameraFeed, Feed, FeedSettings, Offer
from .connection import HostLimit


class Ingest(Protocol):
    """Where cameras are followed: ThreadIngest, or ingest_processes.ProcessIngest."""

    def open(self, settings: FeedSettings, offer: Offer, *, depth: int, is_blocking: bool) -> Feed:
        """A feed of a camera, not yet started. depth, is_blocking: of the queue that offer fills."""
        ...

    def pids(self) -> list[int]:
        """Of processes that follow cameras."""
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

    def close(self, timeout_s: float) -> bool:
        """Nothing is left."""
        return True
