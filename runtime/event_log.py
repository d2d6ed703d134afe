"""The events of a service: one file a day, which survives a crash with whole lines."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from .events import DetectionEvent, TrackEvent

# How much of a file is read at once, from its end, to find the last whole line.
BLOCK = 65536

# Less than this is called full before a write fails.
LEAST_FREE_BYTES = 1 << 20


class EventLog:
    """Appends events to FOLDER/events-YYYY-MM-DD.jsonl, by the day (UTC) on which they are written."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError where the folder cannot be written."""
        self._folder = folder
        self._day = ""
        self._file = -1
        # Events and probes come from different threads.
        self._lock = threading.Lock()
        self._turn_to(_today())

    @property
    def path(self) -> Path:
        """The file of today."""
        return self._folder / f"events-{self._day}.jsonl"

    def write(self, events: Sequence[DetectionEvent | TrackEvent]) -> None:
        """Append the events of one frame with one system call. Raises OSError when the disk is full."""
        lines = "".join(event.line() for event in events).encode()
        if not lines:
            return
        with self._lock:
            self._append(lines)

    def _append(self, lines: bytes) -> None:
        if (day := _today()) != self._day or not self._is_there():
            self._turn_to(day)
        size = os.fstat(self._file).st_size
        written = os.write(self._file, lines)
        if written != len(lines):
            # A full disk takes a part of the bytes: take the half line back before saying so.
            os.ftruncate(self._file, size)
            raise OSError(
                f"events must fit on the disk, got {written} of {len(lines)} bytes into {self.path}"
            )

    def fault(self) -> str | None:
        """Why the next events could not be written; None where they could."""
        try:
            with self._lock:
                if not self._is_there():
                    self._turn_to(_today())
                volume = os.fstatvfs(self._file)
        except OSError as error:
            return f"{self.path} cannot be written: {error.strerror}"
        if volume.f_flag & os.ST_RDONLY:
            return f"{self._folder} lies on a read-only volume"
        if volume.f_bavail * volume.f_frsize < LEAST_FREE_BYTES:
            return f"{self._folder} lies on a full volume"
        return None

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _is_there(self) -> bool:
        """Whether the file is open, and still the one by that name: events must not go to one that was deleted."""
        try:
            mine, there = os.fstat(self._file), self.path.stat()
        except OSError:
            return False
        return os.path.samestat(mine, there)

    def _turn_to(self, day: str) -> None:
        self.close()
        self._day = day
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        _cut_half_line(self._file)


def _cut_half_line(file: int) -> None:
    """Take away what a crash left of a line at the end of a file."""
    end = os.fstat(file).st_size
    while end:
        start = max(0, end - BLOCK)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    os.ftruncate(file, end)


def _today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")
