"""A live camera for a reader that may be slower than it: the newest frame, never an old one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Self

from .frames import SourceError, VideoFrame
from .video import Decoded, VideoSource


class LiveSource:
    """A live camera: a thread decodes all the time, the reader gets the newest frame.

    A reader that is slower than the camera drops frames instead of falling behind.
    """

    num_frames_hint: int | None = None

    def __init__(self, video: VideoSource) -> None:
        self.camera = video.camera
        self.fps_hint = video.fps_hint
        self.every = video.every
        self.frames_dropped = 0
        self._video = video
        self._changed = threading.Condition()
        self._newest: Decoded | None = None
        self._ended = False
        self._closing = False
        self._error: SourceError | None = None
        self._thread = threading.Thread(target=self._follow, name=f"camera {self.camera}", daemon=True)
        self._thread.start()

    @property
    def frames_decoded(self) -> int:
        """Frames the camera has sent, dropped ones included."""
        return self._video.frames_decoded

    @property
    def frames_corrupt(self) -> int:
        """Damaged frames, which nobody is given."""
        return self._video.frames_corrupt

    @property
    def corrupt_packets(self) -> int:
        """Packets that could not be decoded, or only in part."""
        return self._video.corrupt_packets

    def ready(self) -> bool:
        """Tell whether a new frame, or the end, is there."""
        return self._newest is not None or self._ended

    def __iter__(self) -> Iterator[VideoFrame]:
        """Wait for the next new frame, give it, and so on. Raises SourceError when the camera is lost."""
        while (decoded := self._take()) is not None:
            yield self._video.picture(decoded)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Hang up. Waits for the packet under way, at most the read timeout."""
        self._closing = True
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self) -> Decoded | None:
        with self._changed:
            self._changed.wait_for(self.ready)
            newest, self._newest = self._newest, None
            return newest

    def _follow(self) -> None:
        try:
            for decoded in self._video.decoded():
                if self._closing:
                    break
                if decoded.is_damaged:
                    continue
                with self._changed:
                    self.frames_dropped += self._newest is not None
                    self._newest = decoded
                    self._changed.notify_all()
        except SourceError as error:
            self._error = error
        finally:
            # Closed by the thread that reads: FFmpeg contexts may not be freed under a running read.
            self._video.close()
            with self._changed:
                self._ended = True
                self._changed.notify_all()
