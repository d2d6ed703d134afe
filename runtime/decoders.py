"""Which decoders this machine offers, and one stream decoded on a device where that works, else on the CPU."""

from __future__ import annotations

import functools
import logging
from typing import Literal

import av
import av.error
import numpy as np
from av.video.stream import VideoStream

from .device_decoder import DecoderFinding, DeviceDecoder, DeviceError
from .ffmpeg_decoder import FFmpegDecoder, find_ffmpeg
from .gstreamer_decoder import NAME as NVV4L2
from .gstreamer_decoder import GStreamerDecoder, find_gstreamer
from .nvidia_decoder import NAME as NVIDIA
from .nvidia_decoder import NvidiaDecoder, find_nvidia

DecoderChoice = Literal["auto", "cpu", "pynvvideocodec", "nvv4l2", "cuda", "vaapi"]

CPU = "pyav-cpu"

# What psdiff doctor and the log call a choice.
NAMES = {
    "cpu": CPU,
    "pynvvideocodec": NVIDIA,
    "nvv4l2": NVV4L2,
    "cuda": "pyav-cuda",
    "vaapi": "pyav-vaapi",
}

# A device that gives no frame for so many packets does not decode; cameras reorder at most 16.
MOST_SILENT_PACKETS = 64

# A device that fails so often in a row is lost; damaged packets fail one by one.
MOST_FAILURES = 30

# How far a device's first picture may lie from the CPU's, as a mean over its pixels of 0 to 255: the standards
# leave no freedom, other conversions to 8 bits cost a level.
LARGEST_DIFFERENCE = 2.0

logger = logging.getLogger(__name__)


@functools.cache
def probe_decoders() -> tuple[DecoderFinding, ...]:
    """Try each decoder, best first. The answer is kept: devices do not come and go."""
    version = ".".join(map(str, av.library_versions["libavcodec"]))
    return (
        find_nvidia(),
        find_gstreamer(),
        find_ffmpeg("cuda"),
        find_ffmpeg("vaapi"),
        DecoderFinding(CPU, True, f"libavcodec {version}"),
    )


def name_of(choice: DecoderChoice) -> str:
    """The decoder that a choice stands for, by its name in psdiff doctor. auto: the first that is usable."""
    if choice == "auto":
        return next(found.name for found in probe_decoders() if found.is_usable)
    return NAMES[choice]


def open_device(stream: VideoStream, name: str) -> DeviceDecoder:
    """Open a decoder for a stream by its name in psdiff doctor, but for the CPU's. Raises DeviceError."""
    if name == NVIDIA:
        return NvidiaDecoder(stream)
    if name == NVV4L2:
        return GStreamerDecoder(stream)
    return FFmpegDecoder(stream, name.removeprefix("pyav-"))


class StreamDecoder:
    """Packets of one stream -> frames in main memory.

    A device that cannot be opened, gives no frames or other pictures than the CPU, or is lost is replaced by the CPU,
    which gets the same packets.
    """

    def __init__(self, stream: VideoStream, choice: DecoderChoice = "cpu") -> None:
        self.name = CPU
        self._stream = stream
        self._device: DeviceDecoder | None = None
        self._unproven: list[av.Packet] | None = None
        """What the device got before its first frame was compared."""
        self._num_silent = 0
        self._num_failures = 0
        name = name_of(choice)
        if name == CPU:
            return
        try:
            self.use(open_device(stream, name), name)
        except DeviceError as error:
            announce(name, str(error))

    def use(self, device: DeviceDecoder, name: str) -> None:
        """Decode on a device, as long as it works."""
        self._device, self.name = device, name
        self._unproven, self._num_silent, self._num_failures = [], 0, 0

    def decode(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        """Give the frames that a packet completes; None gives those that are held back. Raises FFmpegError."""
        if self._device is None:
            return self._stream.decode(packet)
        if packet is not None and self._unproven is not None:
            self._unproven.append(packet)
        try:
            frames = self._device.decode(packet)
        except DeviceError as error:
            return self._leave_device(packet, str(error))
        except av.error.FFmpegError as error:
            self._num_failures += 1
            if self._unproven is not None or self._num_failures >= MOST_FAILURES:
                return self._leave_device(packet, str(error.strerror))
            raise
        self._num_failures = 0
        self._num_silent = 0 if frames else self._num_silent + 1
        if frames and self._unproven is not None:
            difference = self._difference(frames[0], self._unproven)
            if difference > LARGEST_DIFFERENCE:
                return self._leave_device(
                    packet, f"its first picture is {difference:.0f} levels from the CPU's"
                )
            self._unproven = None
        elif self._num_silent >= MOST_SILENT_PACKETS or (packet is None and self._unproven):
            return self._leave_device(packet, f"no frame from {self._num_silent} packets")
        return frames

    def close(self) -> None:
        """Give the device back."""
        if self._device is not None:
            self._device.close()
            self._device = None

    def _difference(self, frame: av.VideoFrame, packets: list[av.Packet]) -> float:
        """Mean over the pixels between a device's picture and the CPU's; 0 where the CPU has none to compare."""
        own = FFmpegDecoder(self._stream, None)
        for packet in [*packets, None]:
            try:
                frames = own.decode(packet)
            except av.error.FFmpegError:
                continue
            for expected in frames:
                if expected.pts == frame.pts:
                    return _difference(frame, expected)
        return 0.0

    def _leave_device(self, packet: av.Packet | None, reason: str) -> list[av.VideoFrame]:
        announce(self.name, reason)
        waiting = [*(self._unproven or []), *([packet] if packet is None or not self._unproven else [])]
        self.close()
        self._unproven, self.name = None, CPU
        frames: list[av.VideoFrame] = []
        for each in waiting:
            try:
                frames += self._stream.decode(each)
            except av.error.FFmpegError:
                # Damage stays damage on the CPU; the newest packet is the one that the caller asks about.
                if each is waiting[-1] and not frames:
                    raise
        return frames


@functools.cache
def announce(decoder: str, reason: str) -> None:
    """Say once a process and reason that the CPU decodes instead."""
    logger.warning("decoder %s failed (%s); the CPU decodes instead", decoder, reason)


def _difference(frame: av.VideoFrame, expected: av.VideoFrame) -> float:
    if (frame.width, frame.height) != (expected.width, expected.height):
        return float("inf")
    pictures = (np.asarray(each.to_ndarray(format="rgb24"), np.float32) for each in (frame, expected))
    return float(np.abs(next(pictures) - next(pictures)).mean())
