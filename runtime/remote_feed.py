"""A camera that a process follows for the service: its frames as they come, its status, its account over crashes."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from dataclasses import replace
from typing import Any, Protocol

from .camera_feed import CameraFrame, FeedSettings, Offer
from .connection import Reason, State
from .frame_slots import FrameSlots
from .ingest_messages import Ended, Follow, FrameInSlot, Line, NewSlots
from .source_address import parse_address

# Slots beyond the queue: those of a batch under work, of one being filled, and of results not yet written.
SPARE_SLOTS = 4


class Follower(Protocol):
    """The process that follows the camera, or its successor after a crash."""

    def add(self, feed: RemoteFeed) -> None:
        """Follow the camera, now and after each restart; calls attach each time."""
        ...

    def remove(self, feed: RemoteFeed) -> None:
        """Let the camera go."""
        ...

    def report(self, camera: str) -> dict[str, Any]:
        """What CameraFeed.status says there; {} where nobody answers."""
        ...


class RemoteFeed:
    """A camera that a worker follows; it outlives the worker."""

    def __init__(
        self, settings: FeedSettings, offer: Offer, worker: Follower, *, depth: int, is_blocking: bool
    ) -> None:
        """offer: called by a thread of this process. depth: of the queue behind it."""
        self.camera = settings.camera
        # Frames are numbered here, over all workers.
        self.follow = Follow(replace(settings, first_seq=0), is_blocking, depth + SPARE_SLOTS)
        self.has_ended = False
        """Nothing more will come: the camera was left, or a recording is played out. New workers need not know."""
        self._offer = offer
        self._worker = worker
        self._lock = threading.Lock()
        self._readers: list[threading.Thread] = []
        # Since when no frame came because the worker was lost.
        self._lost_s: float | None = None
        # Of the present worker: its last status, and the frames that came. Of those before: what they add up to.
        self._status: dict[str, Any] = {}
        self._received = 0
        self._past = {"decoded": 0, "corrupt_packets": 0, "stalled_s": 0.0}
        self._past_skipped: Counter[str] = Counter()
        self._past_reconnects: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._next_seq, self._connections = settings.first_seq, 0

    def start(self) -> None:
        """Begin to connect."""
        self._worker.add(self)

    def stop(self) -> None:
        """Ask the worker to let the camera go."""
        self._worker.remove(self)

    def join(self, timeout_s: float) -> bool:
        """Wait until the last frame is here; False where it takes longer."""
        end_s = time.monotonic() + timeout_s
        for reader in list(self._readers):
            reader.join(max(0.0, end_s - time.monotonic()))
        return not any(reader.is_alive() for reader in self._readers)

    def attach(self, line: Line) -> None:
        """A worker has begun; its frames come over line."""
        with self._lock:
            self._readers = [reader for reader in self._readers if reader.is_alive()]
            reader = threading.Thread(
                target=self._read,
                args=(line, self._next_seq, self._connections),
                name=f"frames {self.camera}",
                daemon=True,
            )
            self._readers.append(reader)
        reader.start()

    def lose(self) -> None:
        """The worker is gone."""
        if self.has_ended:
            return
        for reader in list(self._readers):
            reader.join()
        with self._lock:
            self._past["decoded"] += self._received + sum(self._status.get("skipped", {}).values())
            for name in ("corrupt_packets", "stalled_s"):
                self._past[name] += self._status.get(name, 0)
            self._past_skipped += Counter(self._status.get("skipped", {}))
            self._past_reconnects += Counter(self._status.get("reconnects", {}))
            self._past_reconnects[str(Reason.CRASHED)] += 1
            self._status, self._received = {}, 0
            self._lost_s = time.monotonic()

    def status(self) -> dict[str, Any]:
        """As CameraFeed.status; what the worker said last where it does not answer."""
        answer = self._worker.report(self.camera)
        with self._lock:
            if answer:
                self._status = answer
            status = dict(self._status or self._without_worker())
            if not answer and not self.has_ended:
                # What it decoded since, and did not send, nobody can say.
                status["decoded"] = self._received + sum(status["skipped"].values())
            if self._lost_s is not None:
                status["offline_s"] = round(time.monotonic() - self._lost_s, 3)
            status["skipped"] = dict(Counter(status["skipped"]) + self._past_skipped + self._refused)
            status["reconnects"] = dict(Counter(status["reconnects"]) + self._past_reconnects)
            for name, value in self._past.items():
                status[name] += value
            return status

    def _without_worker(self) -> dict[str, Any]:
        return {
            "camera": self.camera,
            "source": parse_address(self.follow.settings.url).shown,
            "state": str(State.CONNECTING if self._lost_s is None else State.BACKOFF),
            "state_s": 0.0,
            "reason": None if self._lost_s is None else str(Reason.CRASHED),
            "offline_s": None,
            "retry_in_s": None,
            "reconnects": {},
            "stalled_s": 0.0,
            "decoded": 0,
            "corrupt_packets": 0,
            "skipped": {},
            "time_source": None,
            "clock_offset_s": None,
            "decoder": None,
        }

    def _read(self, line: Line, first_seq: int, connections: int) -> None:
        """Take in what one worker sends, to its end."""
        slots: FrameSlots | None = None
        try:
            while True:
                message = line.receive()
                if isinstance(message, NewSlots):
                    fd = line.receive_fd()
                    slots = FrameSlots(fd, message.slot_bytes, message.count)
                    os.close(fd)
                elif isinstance(message, Ended):
                    with self._lock:
                        self._status, self.has_ended = message.status, True
                    return
                elif slots is not None:
                    self._take_in(message, slots, first_seq, connections)
        except (EOFError, OSError):
            return
        finally:
            line.close()

    def _take_in(self, message: FrameInSlot, slots: FrameSlots, first_seq: int, connections: int) -> None:
        frame = CameraFrame(
            self.camera,
            first_seq + message.seq,
            slots.picture(message.slot, message.height, message.width),
            message.time,
            message.pts_s,
            connections + message.connection,
            message.decode_s,
        )
        with self._lock:
            self._received += 1
            self._lost_s = None
            self._next_seq = frame.seq + 1
            self._connections = frame.connection
        unwanted = self._offer(frame, message.now_s, message.deadline_s)
        if unwanted is not None:
            with self._lock:
                self._refused[unwanted] += 1
