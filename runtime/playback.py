"""What a camera of a site plays: a live stream, a recording at its own speed or flat out, or a folder of images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Protocol, Self

import av
import numpy as np

from .capture_time import Arrival
from .decoders import DecoderChoice
from .frames import ImageSource, VideoFrame
from .source_address import SourceAddress
from .sources import images_at
from .video import USUAL_FPS, Decoded, VideoSource

Pace = Literal["real_time", "flat_out"]

# A live playlist brings nothing for as long as a segment lasts; 10 s is the longest in use.
SEGMENT_TIMEOUT_S = 30.0

# PTS that jump by more are a cut, not a pause; a reader that is later than this does not race to catch up.
LONGEST_PAUSE_S, LATEST_S = 10.0, 0.5


@dataclass(frozen=True)
class Playback:
    """How a source is played."""

    pace: Pace = "real_time"
    """Of files and folders. flat_out: as fast as frames are taken; nothing is dropped."""
    loop: bool = False
    """Whether a recording starts again at its end."""
    image_fps: float = 5.0
    """Of a folder of images."""
    decoder: DecoderChoice = "cpu"
    """Of live cameras."""
    transport: str = "tcp"
    """Of RTSP."""


class CameraSource(Protocol):
    """An open source, as a feed reads it."""

    is_live: bool
    """Whether it should go on for ever."""
    comes_in_segments: bool
    fps_hint: float | None
    created: datetime | None
    """When a recording was made."""

    @property
    def corrupt_packets(self) -> int:
        """Packets or files so far that could not be decoded, or only in part."""
        ...

    @property
    def decoder(self) -> str:
        """What decodes, by its name in psdiff doctor."""
        ...

    def decoded(self) -> Iterator[Decoded]:
        """Give every frame, damaged ones too."""
        ...

    def picture(self, decoded: Decoded) -> VideoFrame:
        """Convert a frame to upright RGB."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class ImagePlayback:
    """Image files as a video of a given rate."""

    is_live = False
    comes_in_segments = False
    created: datetime | None = None
    decoder = "pillow"

    def __init__(self, paths: Sequence[Path], camera: str, *, name: str, fps: float) -> None:
        """Read the first image. Raises SourceError if none can be read."""
        self.fps_hint: float | None = fps
        self._source = ImageSource(paths, camera, name=name)
        self._fps = fps

    @property
    def corrupt_packets(self) -> int:
        """Files that could not be read."""
        return self._source.corrupt_packets

    def decoded(self) -> Iterator[Decoded]:
        """Give the images that can be read."""
        for image in self._source:
            frame = av.VideoFrame.from_ndarray(image.image, format="rgb24")
            yield Decoded(image.seq, frame, image.seq / self._fps, Arrival(time.time(), time.monotonic()))

    def picture(self, decoded: Decoded) -> VideoFrame:
        """The image, with its time."""
        image = np.asarray(decoded.frame.to_ndarray(format="rgb24"), np.uint8)
        arrived = datetime.fromtimestamp(decoded.arrival.utc_s, UTC)
        return VideoFrame(self._source.camera, decoded.seq, decoded.pts_s, image, arrived, "arrival")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._source.close()


def open_playback(
    address: SourceAddress, camera: str, playback: Playback, open_timeout_s: float, read_timeout_s: float
) -> CameraSource:
    """Open a source and decode its first frame. Raises SourceError, of a camera CameraError."""
    images = images_at(address.path) if address.kind == "path" and address.path is not None else None
    if images is not None:
        return ImagePlayback(images, camera, name=address.shown, fps=playback.image_fps)
    return VideoSource(
        address,
        camera,
        open_timeout_s=open_timeout_s,
        read_timeout_s=SEGMENT_TIMEOUT_S if address.is_playlist else read_timeout_s,
        transport=playback.transport,
        decoder=playback.decoder,
    )


def frames_of(
    source: CameraSource, playback: Playback, kind: str, wait: Callable[[float], object]
) -> Iterator[Decoded]:
    """Give the frames when they are due. kind: of the address. wait: sleeps for so many seconds at most."""
    if source.is_live and not source.comes_in_segments:
        return source.decoded()
    frames = with_pts(source.decoded(), source.fps_hint or USUAL_FPS)
    return frames if kind == "path" and playback.pace == "flat_out" else paced(frames, wait)


def with_pts(frames: Iterator[Decoded], fps: float) -> Iterator[Decoded]:
    """Number frames without PTS by fps: of a recording the clock of the machine says nothing."""
    for decoded in frames:
        yield decoded._replace(pts_s=decoded.seq / fps) if decoded.pts_s is None else decoded


def paced(
    frames: Iterator[Decoded], wait: Callable[[float], object], now: Callable[[], float] = time.monotonic
) -> Iterator[Decoded]:
    """Give each frame when its PTS says, counted from the first; it arrives when it is given.

    Who is late is not hurried: the rest of the video is late by as much.
    """
    start_s: float | None = None
    last_s = 0.0
    for decoded in frames:
        video_s = decoded.pts_s or 0.0
        is_cut = not 0 <= video_s - last_s <= LONGEST_PAUSE_S
        if start_s is None or is_cut or now() - start_s - video_s > LATEST_S:
            start_s = now() - video_s
        ahead_s = video_s - (now() - start_s)
        if ahead_s > 0:
            wait(ahead_s)
        last_s = video_s
        yield decoded._replace(arrival=Arrival(time.time(), time.monotonic()))
