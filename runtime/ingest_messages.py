"""What the service and a process that follows cameras tell each other, and how.

Two kinds of line, both Unix sockets with pickled messages between processes of one user: one for commands, each
answered at once, and one a camera, for its frames.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from .camera_feed import FeedSettings
from .capture_time import CaptureTime


@dataclass(frozen=True)
class Follow:
    """Command: follow a camera; the socket of its frames comes right after."""

    settings: FeedSettings
    is_blocking: bool
    """Whether frames wait for a free slot (every_frame) instead of being dropped."""
    num_slots: int


@dataclass(frozen=True)
class Leave:
    """Command: stop following a camera; its last message is Ended."""

    camera: str


@dataclass(frozen=True)
class Report:
    """Command: the status of a camera, {} where it is not followed; camera None: just be alive."""

    camera: str | None = None


@dataclass(frozen=True)
class NewSlots:
    """On the line of a camera: pictures lie in other memory from now on; its file descriptor comes right after."""

    slot_bytes: int
    count: int


@dataclass(frozen=True)
class FrameInSlot:
    """On the line of a camera: a frame."""

    slot: int
    height: int
    width: int
    seq: int
    time: CaptureTime
    pts_s: float | None
    connection: int
    now_s: float
    deadline_s: float
    decode_s: float | None


@dataclass(frozen=True)
class Ended:
    """On the line of a camera, the last: nobody follows it any more."""

    status: dict[str, Any]


class Line:
    """Messages and file descriptors over one socket."""

    def __init__(self, end: socket.socket) -> None:
        """Own the socket."""
        self._socket = end
        # Reads exactly one message, so that a file descriptor behind it stays in the socket. Closes what it is given.
        self._messages = Connection(os.dup(end.fileno()))

    def send(self, message: object) -> None:
        """Send a message. Raises OSError where the other side is gone."""
        self._messages.send(message)

    def send_fd(self, fd: int) -> None:
        """Send a file descriptor, after the message that announces it."""
        socket.send_fds(self._socket, [b"\0"], [fd])

    def receive(self) -> Any:  # noqa: ANN401 - any of the messages above
        """Wait for a message. Raises EOFError or OSError where the other side is gone."""
        return self._messages.recv()

    def receive_fd(self) -> int:
        """The file descriptor that the last message announced; the caller's to close."""
        _, (fd, *_), _, _ = socket.recv_fds(self._socket, 1, 1)
        return fd

    def poll(self, timeout_s: float) -> bool:
        """Whether a message, or the end, is there in time."""
        return self._messages.poll(timeout_s)

    def close(self) -> None:
        """Hang up; who waits on this line, here or there, wakes up."""
        with suppress(OSError):  # the other side may have been faster
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._messages.close()


def pair() -> tuple[Line, socket.socket]:
    """A line, and the socket at its other end."""
    ours, theirs = socket.socketpair()
    return Line(ours), theirs
