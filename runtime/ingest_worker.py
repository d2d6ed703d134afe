"""A process that follows some cameras: decoding crashes, leaks and hangs here, and never in the service.

Started by runtime.ingest_processes with one end of a socket. It ends when the other end is gone.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .camera_feed import CameraFeed, CameraFrame
from .connection import HostLimit
from .frame_slots import FrameSlots
from .heaps import share_heaps
from .ingest_messages import Ended, Follow, FrameInSlot, Leave, Line, NewSlots, Report
from .inherited_logs import configure_inherited_logs
from .redaction import Redactor

# How often feeds that may have ended are looked at.
TICK_S = 0.1

# How often a frame that must not be dropped looks for a free slot.
SLOT_WAIT_S = 0.002


class SlotWriter:
    """Lays the frames of one camera in slots, and tells of each."""

    def __init__(self, line: Line, num_slots: int, is_blocking: bool) -> None:
        self._line = line
        self._num_slots = num_slots
        self._is_blocking = is_blocking
        self._slots: FrameSlots | None = None
        self.is_stopping = False

    def offer(self, frame: CameraFrame, now_s: float, deadline_s: float) -> str | None:
        """Send a frame on; "overflow" where the service holds all slots, "removed" where nobody wants it any more."""
        slots = self._slots_for(frame.image.nbytes)
        while (slot := slots.write(frame.image)) is None:
            if self.is_stopping:
                return "removed"
            if not self._is_blocking:
                return "overflow"
            time.sleep(SLOT_WAIT_S)
        height, width = frame.image.shape[:2]
        self._line.send(
            FrameInSlot(
                slot,
                height,
                width,
                frame.seq,
                frame.time,
                frame.pts_s,
                frame.connection,
                now_s,
                deadline_s,
                frame.decode_s,
            )
        )
        return None

    def _slots_for(self, image_bytes: int) -> FrameSlots:
        if self._slots is None or image_bytes > self._slots.slot_bytes:
            self._slots = FrameSlots.create(image_bytes, self._num_slots)
            self._line.send(NewSlots(image_bytes, self._num_slots))
            self._line.send_fd(self._slots.fd)
            # The mapping, here and there, keeps the memory.
            os.close(self._slots.fd)
        return self._slots


class Worker:
    """Answers commands; the feeds work in threads of their own."""

    def __init__(
        self, control: Line, limit: HostLimit, learn: Callable[[str], None] = lambda url: None
    ) -> None:
        """learn: told of each camera's URL before it is followed."""
        self._learn = learn
        self._control = control
        self._limit = limit
        self._feeds: dict[str, tuple[CameraFeed, SlotWriter, Line]] = {}
        self._leaving: list[tuple[CameraFeed, Line]] = []

    def run(self) -> None:
        """Work until the service hangs up."""
        while True:
            try:
                if self._control.poll(TICK_S):
                    self._control.send(self._answer(self._control.receive()))
            except (EOFError, OSError):
                return
            self._say_who_ended()

    def _answer(self, command: Follow | Leave | Report) -> dict[str, Any]:
        if isinstance(command, Follow):
            line = Line(socket.socket(fileno=self._control.receive_fd()))
            self._learn(command.settings.url)
            writer = SlotWriter(line, command.num_slots, command.is_blocking)
            feed = CameraFeed(command.settings, writer.offer, self._limit)
            self._feeds[feed.camera] = feed, writer, line
            feed.start()
            return {}
        if isinstance(command, Leave):
            if command.camera in self._feeds:
                feed, writer, line = self._feeds.pop(command.camera)
                writer.is_stopping = True
                feed.stop()
                self._leaving.append((feed, line))
            return {}
        feed, _, _ = self._feeds.get(command.camera or "", (None, None, None))
        return {} if feed is None else feed.status()

    def _say_who_ended(self) -> None:
        for camera, (feed, _, line) in list(self._feeds.items()):
            # A recording that is played out; cameras are followed until they are left.
            if feed.join(0):
                del self._feeds[camera]
                self._leaving.append((feed, line))
        for feed, line in [each for each in self._leaving if each[0].join(0)]:
            self._leaving.remove((feed, line))
            with suppress(OSError):  # the service may not have waited
                line.send(Ended(feed.status()))
            line.close()


def main(fd: int, connects_per_host: int) -> None:
    """Serve the socket fd."""
    # Ctrl-C and service managers signal every process of a group; the service alone says when to end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    share_heaps()
    redactor = Redactor()
    if not configure_inherited_logs(redactor):
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    Worker(Line(socket.socket(fileno=fd)), HostLimit(connects_per_host), redactor.learn_url).run()
    # Not sys.exit: threads may sit in a read of a camera that does not answer.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
