"""GStreamer's RTSP server as a process of its own: cameras that can be killed and brought back on their port."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from . import rtsp_server

# PyGObject lives in the system's Python, not in a virtual environment.
SYSTEM_PYTHON = "/usr/bin/python3"


class ServerMissingError(Exception):
    """The RTSP server cannot run here; the text says what to install."""


class RtspServer:
    """One process with one or more cameras."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        """Start it.

        files: camera -> the H.264 file (MP4) that it plays from its start to everyone who comes, with its parameter
        sets before every key frame, as clips.write_clip writes it. Raises ServerMissingError.
        """
        self._files = files
        self._process: subprocess.Popen[str] | None = None
        self.port = 0
        self.start()

    @property
    def pid(self) -> int | None:
        """Of the process; None where it was killed."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Serve (again), on the same port. Raises ServerMissingError."""
        if not shutil.which(SYSTEM_PYTHON):
            raise ServerMissingError(
                f"{SYSTEM_PYTHON} must be there for the RTSP server, got no such program"
            )
        mounts = [f"{name}={path}" for name, path in self._files.items()]
        self._process = subprocess.Popen(
            [SYSTEM_PYTHON, rtsp_server.__file__, "--in-band", "--port", str(self.port), *mounts],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # Ctrl-C in a terminal goes to the whole group, and the service must be stopped first.
            start_new_session=True,
        )
        assert self._process.stdout is not None
        word, _, rest = self._process.stdout.readline().strip().partition(" ")
        if word != "ready":
            self.kill()
            raise ServerMissingError(
                f"the RTSP server needs the Debian package {rest}; apt-get install {rest}"
                if word == "missing"
                else f"the RTSP server must start on port {self.port}, got '{word} {rest}'"
            )
        self.port = int(rest)

    def kill(self) -> None:
        """End it without a word to its clients."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
