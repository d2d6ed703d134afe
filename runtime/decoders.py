"""Which decoders this machine offers, and one stream decoded on a device where that works, else on the CPU."""

from __future__ import annotations

import ctypes
import functools
import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import av
import av.error
from av.codec.hwaccel import HWAccel, hwdevices_available
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

DecoderChoice = Literal["auto", "cpu", "cuda", "vaapi"]

CPU = "pyav-cpu"

# A device that has given no frame after so many packets does not decode; cameras reorder at most 16.
UNPROVEN_PACKETS = 64

# A device that fails so often in a row is lost; damaged packets fail one by one.
MOST_FAILURES = 30

# Present on every Jetson.
TEGRA = Path("/etc/nv_tegra_release")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecoderFinding:
    """One decoder, on this machine."""

    name: str
    is_usable: bool
    reason: str
    """Why it is usable or not, and how to get it."""


@functools.cache
def probe_decoders() -> tuple[DecoderFinding, ...]:
    """Try each decoder, best first. The answer is kept: devices do not come and go."""
    return (_pynvvideocodec(), _nvv4l2(), _pyav("cuda"), _pyav("vaapi"), _cpu())


class DeviceError(Exception):
    """A device cannot decode a stream; the text says why."""


def device_of(choice: DecoderChoice) -> str | None:
    """Which device of FFmpeg to decode on; None is the CPU. auto: the first that is usable."""
    if choice == "cpu":
        return None
    if choice != "auto":
        return choice
    usable = [found.name for found in probe_decoders() if found.is_usable and found.name != CPU]
    return usable[0].removeprefix("pyav-") if usable else None


class StreamDecoder:
    """Packets of one stream -> frames in main memory.

    A device that cannot be opened, gives no frame, or is lost is replaced by the CPU, which gets the same packets.
    """

    def __init__(self, stream: VideoStream, choice: DecoderChoice = "cpu") -> None:
        self.name = CPU
        self._stream = stream
        self._device: VideoCodecContext | None = None
        self._unproven: list[av.Packet] | None = []
        self._failures = 0
        device = device_of(choice)
        if device is None:
            return
        try:
            self.use(open_on_device(stream, device), f"pyav-{device}")
        except DeviceError as error:
            announce(f"pyav-{device}", str(error))

    def use(self, device: VideoCodecContext, name: str) -> None:
        """Decode with another context, as long as it works."""
        self._device, self.name = device, name

    def decode(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        """Give the frames that a packet completes; None gives those that are held back. Raises FFmpegError."""
        if self._device is None:
            return self._stream.decode(packet)
        if packet is not None and self._unproven is not None:
            self._unproven.append(packet)
        try:
            frames = self._device.decode(packet)
        except av.error.FFmpegError as error:
            self._failures += 1
            if self._unproven is not None or self._failures >= MOST_FAILURES:
                return self._leave_device(packet, str(error.strerror))
            raise
        self._failures = 0
        if frames:
            self._unproven = None
        elif self._unproven is not None and (packet is None or len(self._unproven) >= UNPROVEN_PACKETS):
            return self._leave_device(packet, f"no frame from {len(self._unproven)} packets")
        return frames

    def _leave_device(self, packet: av.Packet | None, reason: str) -> list[av.VideoFrame]:
        announce(self.name, reason)
        waiting = [*(self._unproven or []), *([packet] if packet is None or not self._unproven else [])]
        self._device, self._unproven, self.name = None, None, CPU
        frames: list[av.VideoFrame] = []
        for each in waiting:
            try:
                frames += self._stream.decode(each)
            except av.error.FFmpegError:
                # Damage stays damage on the CPU; the newest packet is the one that the caller asks about.
                if each is waiting[-1] and not frames:
                    raise
        return frames


def open_on_device(stream: VideoStream, device: str | None) -> VideoCodecContext:
    """A decoder of its own for a stream, on a device of FFmpeg (None: the CPU); frames come back to main memory.

    Apart from the stream's own decoder, so that a device that fails does not cost the connection. Raises
    DeviceError where the device is not there, or does not take the codec.
    """
    # One CUDA context for all cameras of a process: each of its own takes hundreds of megabytes of the GPU.
    options: dict[str, object] = {"primary_ctx": "1"} if device == "cuda" else {}
    try:
        accelerator = (
            None if device is None else HWAccel(device, allow_software_fallback=False, options=options)
        )
        context = av.CodecContext.create(stream.codec_context.codec.name, "r", accelerator)
    except av.error.FFmpegError as error:
        raise DeviceError(error.strerror or str(error)) from None
    except NotImplementedError as error:  # PyAV's word for a device or codec that its FFmpeg does not have
        raise DeviceError(str(error)) from None
    assert isinstance(context, VideoCodecContext)
    if device is not None and not context.is_hwaccel:
        raise DeviceError(f"this FFmpeg does not decode {context.codec.name} there")
    context.extradata = stream.codec_context.extradata
    return context


@functools.cache
def announce(decoder: str, reason: str) -> None:
    """Say once a process and reason that the CPU decodes instead."""
    logger.warning("decoder %s failed (%s); the CPU decodes instead", decoder, reason)


def _pynvvideocodec() -> DecoderFinding:
    installed = "installed" if find_spec("PyNvVideoCodec") else "not installed"
    return DecoderFinding(
        "pynvvideocodec",
        False,
        f"{installed}; psdiff does not drive it yet: pyav-cuda decodes on the same unit of the GPU",
    )


def _nvv4l2() -> DecoderFinding:
    place = "this is a Jetson" if TEGRA.exists() else "no Jetson"
    return DecoderFinding(
        "gst-nvv4l2", False, f"{place}; psdiff does not drive GStreamer yet: there the CPU decodes"
    )


def _pyav(device: str) -> DecoderFinding:
    name = f"pyav-{device}"
    if device not in hwdevices_available():
        return DecoderFinding(
            name, False, f"the FFmpeg of this PyAV has no {device}; build PyAV on one that has"
        )
    try:
        HWAccel(device).create(av.Codec("h264", "r"))
    except NotImplementedError:
        return DecoderFinding(name, False, f"the FFmpeg of this PyAV does not decode H.264 with {device}")
    except av.error.FFmpegError as error:
        return DecoderFinding(name, False, _missing(device) or f"the device does not open: {error.strerror}")
    return DecoderFinding(
        name, True, "the device opens; streams that it does not take are decoded on the CPU"
    )


def _missing(device: str) -> str | None:
    """The library that is not there, since FFmpeg's own error does not name it."""
    libraries = {"cuda": ("libcuda.so.1", "libnvcuvid.so.1"), "vaapi": ("libva.so.2",)}
    for library in libraries.get(device, ()):
        try:
            ctypes.CDLL(library)
        except OSError:
            return f"{library} is not there; it comes with the driver of the GPU"
    return None


def _cpu() -> DecoderFinding:
    version = ".".join(map(str, av.library_versions["libavcodec"]))
    return DecoderFinding(CPU, True, f"libavcodec {version}")
