"""Frames from video files and cameras, through PyAV (FFmpeg)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, Self

import av
import av.error
import numpy as np
from av.codec.context import ThreadType
from av.container import InputContainer
from av.video.stream import VideoStream

from .capture_time import Arrival
from .connection import Reason
from .containers import (
    NO_ANSWER,
    CameraError,
    comes_in_segments,
    has_timestamps,
    is_live,
    open_camera,
    open_recording,
    reason_of,
    reference_time,
    told,
)
from .damage import DamageWatch
from .decoders import DecoderChoice, StreamDecoder
from .frames import Picture, SourceError, VideoFrame
from .source_address import SourceAddress

# A demuxer that reports bad data this many times in a row has lost its place in the file.
MAX_BAD_READS = 100

# Reports of the camera's clock that wait for their frame: as many as a decoder ever holds back.
MAX_REFERENCES = 64

# Cameras and recorders without a clock write the zero of MP4 (1904) or of Unix (1970).
FIRST_CREDIBLE_YEAR = 1980

# Of a video that does not tell.
USUAL_FPS = 25.0


class Decoded(NamedTuple):
    """A frame that is decoded but not yet converted to RGB."""

    seq: int
    frame: av.VideoFrame
    pts_s: float | None
    """Seconds since the first frame."""
    arrival: Arrival
    reference_s: float | None = None
    """The camera's own clock at this frame, seconds since 1970, where it has told."""
    is_damaged: bool = False
    """Whether it shows something else than the camera saw; runtime.damage. Nobody may look for people in it."""
    decode_s: float | None = None
    """What the codec took for its packet."""


class VideoSource:
    """A video file (or the connection below a LiveSource), read to its last frame."""

    def __init__(
        self,
        address: SourceAddress,
        camera: str,
        *,
        every: int = 1,
        open_timeout_s: float = 10.0,
        read_timeout_s: float = 5.0,
        transport: str = "tcp",
        decoder: DecoderChoice = "cpu",
    ) -> None:
        """Open and decode the first frame.

        transport: of RTSP, tcp or udp. decoder: of live cameras; files are decoded on the CPU, which turns the
        pictures of phones upright. Raises SourceError, of a camera CameraError.
        """
        self.camera = camera
        self.every = every
        self.frames_decoded = 0
        self.frames_dropped = 0
        self.frames_corrupt = 0
        self.corrupt_packets = 0
        self._decode_s = 0.0
        self._read_timeout_s = read_timeout_s
        self._name = address.shown
        self._references: dict[int, float] = {}
        if address.kind == "path":
            self._container = open_recording(address)
        else:
            self._container = open_camera(address, open_timeout_s, read_timeout_s, transport)
        with ExitStack() as opened:
            opened.callback(self._container.close)
            self.is_live = is_live(address, self._container)
            self.comes_in_segments = comes_in_segments(self._container)
            self._has_timestamps = has_timestamps(self._container)
            self._stream = _video_stream(self._container, self._name)
            # Threads over whole frames are fastest but hold frames back, which a live view must not. Threads over
            # slices switch FFmpeg's search for damage off, so that smeared pictures would count as whole.
            self._stream.thread_type = ThreadType.NONE if self.is_live else ThreadType.AUTO
            self._decoder = StreamDecoder(self._stream, decoder if self.is_live else "cpu")
            opened.callback(self._decoder.close)
            self.created = None if self.is_live else _creation_time(self._container, self._stream)
            self.fps_hint = _fps(self._stream)
            self.num_frames_hint = (
                None if self.is_live else _num_frames(self._container, self._stream, self.fps_hint)
            )
            self._start_pts: int | None = None
            self._damage = DamageWatch(self._stream.codec_context.codec.canonical_name)
            self._decoded = self._decode()
            self._first = next(self._decoded, None)
            if self._first is None:
                found = (
                    f"{self.corrupt_packets} corrupt packets" if self.corrupt_packets else "an empty video"
                )
                raise SourceError(
                    f"source must hold a frame that can be decoded, got {found} in {self._name}"
                )
            self._opened = opened.pop_all()

    @property
    def decoder(self) -> str:
        """What decodes now, by its name in psdiff doctor."""
        return self._decoder.name

    def ready(self) -> bool:
        """Return True: a disk does not make the reader wait."""
        return True

    def __iter__(self) -> Iterator[VideoFrame]:
        """Give every every-th frame but damaged ones; what was given once is not given again."""
        return (self.picture(decoded) for decoded in self.decoded() if not decoded.is_damaged)

    def decoded(self) -> Iterator[Decoded]:
        """Give the frames of __iter__ before they are converted to RGB (3 ms in 1080p), damaged ones too."""
        if self._first is not None:
            first, self._first = self._first, None
            yield first
        yield from self._decoded

    def picture(self, decoded: Decoded) -> VideoFrame:
        """Convert to upright RGB and attach the time."""
        seq, frame, pts_s, arrival, *_ = decoded
        try:
            image = _upright_rgb(frame)
        except (av.error.FFmpegError, ValueError) as error:
            raise SourceError(
                f"source must have frames that convert to RGB, got {error} in {self._name}"
            ) from None
        if self.created is None or pts_s is None:
            arrived = datetime.fromtimestamp(arrival.utc_s, UTC)
            return VideoFrame(self.camera, seq, pts_s, image, arrived, "arrival")
        return VideoFrame(self.camera, seq, pts_s, image, self.created + timedelta(seconds=pts_s), "file")

    def close(self) -> None:
        """Close the file or connection."""
        self._first = None
        self._decoded.close()
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _decode(self):  # noqa: ANN202 - a Generator[Decoded], for its close()
        for packet in self._packets():
            for frame in self._frames_of(packet):
                pts_s = self._seconds_since_start(frame)
                seq = self.frames_decoded
                self.frames_decoded += 1
                is_damaged = self._is_damaged(frame, pts_s, seq)
                if seq % self.every == 0:
                    self.frames_corrupt += is_damaged
                    arrival = Arrival(time.time(), time.monotonic())
                    reference_s = None if frame.pts is None else self._references.pop(frame.pts, None)
                    yield Decoded(seq, frame, pts_s, arrival, reference_s, is_damaged, self._decode_s)

    def _is_damaged(self, frame: av.VideoFrame, pts_s: float | None, seq: int) -> bool:
        time_s = seq / (self.fps_hint or USUAL_FPS) if pts_s is None else pts_s
        return self._damage.is_damaged(
            time_s, frame.pts, is_key=bool(frame.key_frame), is_corrupt=frame.is_corrupt
        )

    def _seconds_since_start(self, frame: av.VideoFrame) -> float | None:
        # Not frame.time: it is nan for the frames that the decoder hands out at the end.
        if frame.pts is None or self._stream.time_base is None or not self._has_timestamps:
            return None
        if self._start_pts is None:
            self._start_pts = frame.pts
        return float((frame.pts - self._start_pts) * self._stream.time_base)

    def _frames_of(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        began_s = time.monotonic()
        try:
            frames = self._decoder.decode(packet)
        except av.error.FFmpegError:
            self.corrupt_packets += 1
            self._damage.lose(None if packet is None else packet.pts)
            return []
        self._decode_s = time.monotonic() - began_s
        # The decoder conceals what it can, and marks the frame.
        damaged = sum(frame.is_corrupt for frame in frames)
        self.corrupt_packets += max(damaged, int(packet is not None and packet.is_corrupt))
        return frames

    def _packets(self) -> Iterator[av.Packet | None]:
        """Give the stream's packets, then None, which makes the decoder hand out the frames it holds back."""
        bad_reads, waiting_since_s = 0, time.monotonic()
        while bad_reads < MAX_BAD_READS:
            try:
                for packet in self._container.demux(self._stream):
                    # The parser holds back the last picture until the next one begins. Where none begins in time
                    # FFmpeg gives that picture first, which is no live one any more, and the error after as long
                    # again.
                    if self.is_live and time.monotonic() - waiting_since_s > self._read_timeout_s:
                        raise CameraError(self._broken_off(NO_ANSWER), Reason.TIMEOUT)
                    bad_reads = 0
                    if packet.size:
                        self._note_reference(packet)
                        yield packet
                    waiting_since_s = time.monotonic()
                break
            except av.error.InvalidDataError:
                self.corrupt_packets += 1
                bad_reads += 1
            except av.error.FFmpegError as error:
                raise CameraError(self._broken_off(told(error)), reason_of(error)) from None
        yield None

    def _broken_off(self, what: str) -> str:
        return f"source must stay readable to its end, got {what} from {self._name}"

    def _note_reference(self, packet: av.Packet) -> None:
        """Keep what the camera's clock says of a packet until its frame is decoded."""
        reference_s = reference_time(packet) if self.is_live else None
        if reference_s is not None and packet.pts is not None:
            if len(self._references) >= MAX_REFERENCES:
                self._references.pop(next(iter(self._references)))
            self._references[packet.pts] = reference_s


def _video_stream(container: InputContainer, name: str) -> VideoStream:
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream):
        raise SourceError(f"source must hold video, got none in {name}")
    return stream


def _fps(stream: VideoStream) -> float | None:
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate else None


def _num_frames(container: InputContainer, stream: VideoStream, fps: float | None) -> int | None:
    if stream.frames:
        return stream.frames
    if container.duration and fps:
        return max(1, round(container.duration / av.time_base * fps))
    return None


def _creation_time(container: InputContainer, stream: VideoStream) -> datetime | None:
    text = container.metadata.get("creation_time") or stream.metadata.get("creation_time")
    if not text:
        return None
    try:
        created = datetime.fromisoformat(text)
    except ValueError:
        return None
    if created.year < FIRST_CREDIBLE_YEAR:
        return None
    # FFmpeg writes UTC; a text without zone is UTC too.
    return created.replace(tzinfo=created.tzinfo or UTC).astimezone(UTC)


def _upright_rgb(frame: av.VideoFrame) -> Picture:
    image = np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
    quarter_turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(image, quarter_turns)) if quarter_turns else image
