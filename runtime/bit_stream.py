"""A stream as decoders outside FFmpeg want it, and their pictures as frames of PyAV."""

from __future__ import annotations

import errno
from typing import NamedTuple

import av
import av.error
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.video.plane import VideoPlane
from av.video.stream import VideoStream
from numpy.typing import NDArray

from .device_decoder import DeviceError

Plane = NDArray[np.uint8]

# FFmpeg's names of the codecs that all these decoders take.
CODECS = ("h264", "hevc")

# Cameras reorder at most 16 pictures; one that is missing for longer was swallowed by its decoder.
MOST_HELD = 64

# The time of a first picture that has none.
UNTIMED = -1


class Payload(NamedTuple):
    """One picture, compressed."""

    data: bytes
    """Annex B."""
    time: int
    """What tells it from others, and orders pictures: the PTS, in units of the stream's time base."""


class Held(NamedTuple):
    """A picture in the decoder."""

    pts: int | None
    is_key: bool


class BitStream:
    """Follows one stream into a decoder and out of it."""

    def __init__(self, stream: VideoStream) -> None:
        """Raises DeviceError for a codec that is not in CODECS."""
        self.codec = stream.codec_context.codec.canonical_name
        if self.codec not in CODECS:
            raise DeviceError(f"it takes {' and '.join(CODECS)}, not {self.codec}")
        # Without B-frames no picture has to wait for a later one.
        self.has_b_frames = bool(stream.codec_context.has_b_frames)
        self._stream = stream
        self._filter = BitStreamFilterContext(_to_annex_b(stream), stream)
        self._has_begun = self._has_times = False
        self._held: dict[int, Held] = {}
        """The pictures in the decoder by their times, in the order in which they went in."""

    @property
    def num_held(self) -> int:
        """How many pictures went in and have not come out."""
        return len(self._held)

    def payloads(self, packet: av.Packet) -> list[Payload]:
        """Give what the decoder gets for a packet: nothing before the first key frame, mostly one picture.

        Raises DeviceError where several packets have no time: their frames could not be told from each other.
        """
        self._has_begun |= packet.is_keyframe
        if not self._has_begun:
            return []
        # The filter takes the packet's data away, which the CPU may still have to decode.
        copy = av.Packet(bytes(packet))
        copy.pts, copy.dts, copy.is_keyframe = packet.pts, packet.dts, packet.is_keyframe
        return [self._note(filtered) for filtered in self._filter.filter(copy)]

    def frame(self, time: int, luma: Plane, chroma: Plane, *, is_damaged: bool = False) -> av.VideoFrame:
        """Turn a picture that came out into a frame.

        time: that of its Payload. luma: uint8[height, width]. chroma: uint8[ceil(height / 2), 2 ceil(width / 2)],
        U and V alternating (NV12).
        is_damaged: what the decoder says. Raises InvalidDataError where it is, or refers to a picture that is lost.
        """
        height, width = luma.shape
        frame = av.VideoFrame(width, height, "nv12")
        for plane, pixels in zip(frame.planes, (luma, chroma), strict=True):
            _rows(plane)[: len(pixels), : pixels.shape[1]] = pixels
        context = self._stream.codec_context
        frame.time_base = self._stream.time_base
        frame.colorspace, frame.color_range = context.colorspace, context.color_range
        # PyAV's stubs do not know that these can be set.
        frame.pts, frame.key_frame = self._held.pop(time, Held(time, False))  # pyright: ignore
        # Pictures come out in the order of their times: an older one was swallowed.
        lost = [held for held in self._held if held < time]
        for held in lost:
            del self._held[held]
        if is_damaged or (lost and not frame.key_frame):
            raise av.error.InvalidDataError(errno.EINVAL, "the decoder met damaged data")
        return frame

    def _note(self, packet: av.Packet) -> Payload:
        time = packet.pts
        if time is None:
            # Of RTSP the first packet has none; the others count from it.
            time = UNTIMED
            if time in self._held or self._has_times:
                raise DeviceError("its packets must have timestamps, got one without")
        else:
            self._has_times = True
        self._held[time] = Held(packet.pts, packet.is_keyframe)
        while len(self._held) > MOST_HELD:
            del self._held[next(iter(self._held))]
        return Payload(bytes(packet), time)


def _to_annex_b(stream: VideoStream) -> str:
    """The filter of FFmpeg's that puts the parameter sets before each key frame, where the container has them."""
    extradata = bytes(stream.codec_context.extradata or b"")
    # MP4, FLV: a record that begins with its version, and lengths instead of start codes.
    if extradata[:1] == b"\x01":
        return f"{stream.codec_context.codec.canonical_name}_mp4toannexb"
    return "dump_extra=freq=keyframe"


def _rows(plane: VideoPlane) -> Plane:
    # A plane is a buffer, which PyAV's stubs do not say.
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)  # pyright: ignore
