"""Cameras in processes of their own: what a decoder breaks, it breaks there, and the process is started again."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
import threading
import time
from collections import deque
from typing import Any

from .camera_feed import FeedSettings, Offer
from .connection import CONNECTS_PER_HOST
from .ingest_messages import Leave, Line, Report, pair
from .remote_feed import RemoteFeed

# A process that does not answer in this time hangs, and is killed. The first answer includes its start.
ANSWER_S, FIRST_ANSWER_S = 5.0, 30.0

# How long a status waits for other commands.
BUSY_S = 0.2

# How often a process is asked whether it lives.
HEARTBEAT_S = 1.0

# Processes that crash again and again are started this often within a window at once, then with pauses.
RESTARTS, RESTART_WINDOW_S, RESTART_PAUSE_S = 5, 60.0, 10.0

# A process costs some 60 MB; a crash takes all its cameras with it for a moment.
CAMERAS_PER_WORKER = 4

logger = logging.getLogger(__name__)


class WorkerLostError(Exception):
    """The process is gone, or does not answer."""


class IngestWorker:
    """One process and its cameras; started again when it dies, until it is closed."""

    def __init__(self, name: str, connects_per_host: int) -> None:
        self._name = name
        self._connects_per_host = connects_per_host
        self._feeds: dict[str, RemoteFeed] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._control: Line | None = None
        self._closing = threading.Event()
        # Whoever talks to the process holds it, so that each answer belongs to its command.
        self._talking = threading.RLock()
        self._spawn()
        self._watcher = threading.Thread(target=self._watch, name=name, daemon=True)
        self._watcher.start()

    @property
    def pid(self) -> int | None:
        """Of the process; None while it is not there."""
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    @property
    def is_watched(self) -> bool:
        """Whether the process is started again when it dies."""
        return self._watcher.is_alive()

    @property
    def load(self) -> int:
        """Cameras that it follows."""
        return len(self._feeds)

    def add(self, feed: RemoteFeed) -> None:
        """Follow a camera, now and after each restart."""
        with self._talking:
            self._feeds[feed.camera] = feed
            self._begin(feed)

    def remove(self, feed: RemoteFeed) -> None:
        """Let a camera go."""
        with self._talking:
            self._feeds.pop(feed.camera, None)
            self._try(Leave(feed.camera))

    def report(self, camera: str) -> dict[str, Any]:
        """The status of a camera; {} where it is not known, or the process is busy or not there."""
        # It may be starting, which takes a second; who asks for a status does not wait for that.
        if not self._talking.acquire(timeout=BUSY_S):
            return {}
        try:
            return self._try(Report(camera))
        finally:
            self._talking.release()

    def close(self, timeout_s: float) -> bool:
        """End the process; False where it had to be killed."""
        with self._talking:
            self._closing.set()
            self._hang_up()
        assert self._process is not None
        try:
            self._process.wait(timeout_s)
            return True
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return False
        finally:
            self._watcher.join()

    def _spawn(self) -> None:
        control, theirs = pair()
        command = [sys.executable, "-m", "psdiff.runtime.ingest_worker"]
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(self._connects_per_host)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._control, self._has_answered = control, False

    def _begin(self, feed: RemoteFeed) -> None:
        if feed.has_ended:
            return
        line, theirs = pair()
        with theirs:
            try:
                self._ask(feed.follow, theirs.fileno())
            except WorkerLostError:
                # The watcher has seen it, or will, and begins anew.
                line.close()
                return
        feed.attach(line)

    def _try(self, command: object) -> dict[str, Any]:
        try:
            return self._ask(command)
        except WorkerLostError:
            return {}

    def _ask(self, command: object, fd: int | None = None) -> dict[str, Any]:
        with self._talking:
            if self._control is None:
                raise WorkerLostError(self._name)
            try:
                self._control.send(command)
                if fd is not None:
                    self._control.send_fd(fd)
                if self._control.poll(ANSWER_S if self._has_answered else FIRST_ANSWER_S):
                    answer = self._control.receive()
                    self._has_answered = True
                    return answer
            except (EOFError, OSError):
                pass
            # Whatever it answers now, it would be to the wrong command.
            self._hang_up()
            if self._process is not None:
                self._process.kill()
            raise WorkerLostError(self._name)

    def _hang_up(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None

    def _watch(self) -> None:
        assert self._process is not None
        starts = deque([time.monotonic()], maxlen=RESTARTS)
        while not self._closing.is_set():
            try:
                code = self._process.wait(HEARTBEAT_S)
            except subprocess.TimeoutExpired:
                self._try(Report())
                continue
            if self._closing.is_set():
                return
            with self._talking:
                self._hang_up()
            logger.error(
                "%s with %s ended with %s and is started again",
                self._name,
                ", ".join(self._feeds),
                code,
                extra={"err_code": f"{self._name} ended"},
            )
            for feed in list(self._feeds.values()):
                feed.lose()
            if len(starts) == RESTARTS and time.monotonic() - starts[0] < RESTART_WINDOW_S:
                self._closing.wait(RESTART_PAUSE_S)
            starts.append(time.monotonic())
            with self._talking:
                if self._closing.is_set():
                    return
                self._spawn()
                for feed in self._feeds.values():
                    self._begin(feed)


class ProcessIngest:
    """Spreads cameras over processes."""

    def __init__(self, num_workers: int) -> None:
        """num_workers: processes, >= 1. Raises ValueError where memory cannot be shared this way."""
        if not hasattr(os, "memfd_create"):
            raise ValueError(f"ingest.isolation must be thread on {sys.platform}, got process")
        # A recorder's limit holds for all processes together.
        share = max(1, CONNECTS_PER_HOST // num_workers)
        self._workers = [IngestWorker(f"ingest {i}", share) for i in range(num_workers)]

    def open(self, settings: FeedSettings, offer: Offer, *, depth: int, is_blocking: bool) -> RemoteFeed:
        """A feed of a camera in the process that has the fewest; not yet started."""
        worker = min(self._workers, key=lambda worker: worker.load)
        return RemoteFeed(settings, offer, worker, depth=depth, is_blocking=is_blocking)

    def pids(self) -> list[int]:
        """Of the processes that are there."""
        return [worker.pid for worker in self._workers if worker.pid is not None]

    def is_well(self) -> bool:
        """Whether each process has who starts it again."""
        return all(worker.is_watched for worker in self._workers)

    def close(self, timeout_s: float) -> bool:
        """End all processes; False where one had to be killed."""
        end_s = time.monotonic() + timeout_s
        ended = [worker.close(max(0.1, end_s - time.monotonic())) for worker in self._workers]
        return all(ended)


def default_workers(num_cameras: int) -> int:
    """Processes for so many cameras: one for each few of them, as far as there are cores."""
    return max(1, min(os.cpu_count() or 1, math.ceil(num_cameras / CAMERAS_PER_WORKER)))
