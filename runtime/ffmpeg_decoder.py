"""A stream decoded by FFmpeg: on a device of its own (NVDEC, VA-API), or on the CPU."""

from __future__ import annotations

import ctypes

import av
import av.error
from av.codec.hwaccel import HWAccel, hwdevices_available
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from .device_decoder import DecoderFinding, DeviceError


class FFmpegDecoder:
    """A decoder of its own for a stream; frames come back to main memory.

    Apart from the stream's own decoder, so that a device that fails does not cost the connection.
    """

    def __init__(self, stream: VideoStream, device: str | None) -> None:
        """device: cuda, vaapi, ...; None: the CPU.

        Raises DeviceError where the device is not there, or does not take the codec.
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
        except (
            NotImplementedError
        ) as error:  # PyAV's word for a device or codec that its FFmpeg does not have
            raise DeviceError(str(error)) from None
        assert isinstance(context, VideoCodecContext)
        if device is not None and not context.is_hwaccel:
            raise DeviceError(f"this FFmpeg does not decode {context.codec.name} there")
        context.extradata = stream.codec_context.extradata
        self._context: VideoCodecContext | None = context

    def decode(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        """Give the frames that a packet completes; None gives those that are held back. Raises FFmpegError."""
        assert self._context is not None, "decode() must not be called after close()"
        return self._context.decode(packet)

    def close(self) -> None:
        """Give the device back."""
        self._context = None


def find_ffmpeg(device: str) -> DecoderFinding:
    """Try to open a device of FFmpeg's, cuda or vaapi."""
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
