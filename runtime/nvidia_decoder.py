"""A stream decoded by NVIDIA's PyNvVideoCodec: the decoder of datacenter GPUs, GeForce and Jetson Thor."""

from __future__ import annotations

import ctypes
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import av
import av.error
import numpy as np
from av.video.stream import VideoStream

from .bit_stream import BitStream, Payload
from .device_decoder import DecoderFinding, DeviceError

NAME = "pynvvideocodec"


class NvidiaDecoder:
    """One session of the decoder on the first GPU that CUDA_VISIBLE_DEVICES leaves.

    The library takes compressed pictures in main memory and gives NV12 there; calls return when the pictures that
    they complete are decoded.
    """

    def __init__(self, stream: VideoStream) -> None:
        """Raises DeviceError where the library or a GPU is missing, or the codec is not taken."""
        self._library = load_library()
        self._bits = BitStream(stream)
        codecs, latencies = self._library.cudaVideoCodec, self._library.DisplayDecodeLatencyType
        try:
            self._decoder = self._library.CreateDecoder(
                gpuid=0,
                codec={"h264": codecs.H264, "hevc": codecs.HEVC}[self._bits.codec],
                usedevicememory=False,
                # NATIVE gives each picture with a later packet, as B-frames need it; LOW with its own.
                latency=latencies.NATIVE if self._bits.has_b_frames else latencies.LOW,
            )
        except Exception as error:  # the library has several, among them the RuntimeError of its binding
            raise DeviceError(_first_line(error)) from None

    def decode(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        """Give the frames that a packet completes; None gives those that are held back.

        Raises InvalidDataError where a picture is lost, DeviceError where the session has failed.
        """
        if packet is None:
            return self._decode(Payload(b"", 0))
        return [frame for payload in self._bits.payloads(packet) for frame in self._decode(payload)]

    def close(self) -> None:
        """Give the session back."""
        self._decoder = None

    def _decode(self, payload: Payload) -> list[av.VideoFrame]:
        assert self._decoder is not None, "decode() must not be called after close()"
        flags = self._library.VideoPacketFlag
        # The library copies the data before it returns; the array keeps them until then.
        data = np.frombuffer(payload.data, np.uint8)
        packet = self._library.PacketData()
        packet.bsl, packet.bsl_data, packet.pts = data.size, data.ctypes.data, payload.time
        packet.decode_flag = (flags.ENDOFPICTURE if payload.data else flags.ENDOFSTREAM).value
        try:
            # A picture's memory is valid until the next call.
            return [self._frame(picture) for picture in self._decoder.Decode(packet)]
        except (DeviceError, av.error.FFmpegError):
            raise
        except Exception as error:
            raise DeviceError(_first_line(error)) from None

    def _frame(self, picture: Any) -> av.VideoFrame:  # noqa: ANN401 - the library has no types
        if picture.format != self._library.Pixel_Format.NV12:
            raise DeviceError(f"its pictures must be NV12, got {picture.format}")
        # Luma, then half as many lines of chroma, without padding.
        lines, width = picture.shape
        pixels = _memory(picture.GetPtrToPlane(0), lines * width).reshape(lines, width)
        height = lines * 2 // 3
        return self._bits.frame(picture.getPTS(), pixels[:height], pixels[height:])


def load_library() -> ModuleType:
    """PyNvVideoCodec. Raises DeviceError that says what is missing."""
    if find_spec("PyNvVideoCodec") is None:
        raise DeviceError("it is not installed: pip install 'psdiff[nvdec]'")
    for library in ("libcuda.so.1", "libnvcuvid.so.1"):
        try:
            ctypes.CDLL(library)
        except OSError:
            raise DeviceError(f"{library} is not there; it comes with the driver of the GPU") from None
    try:
        return import_module("PyNvVideoCodec")
    except (ImportError, RuntimeError) as error:
        raise DeviceError(_first_line(error)) from None


def find_nvidia() -> DecoderFinding:
    """Look for the library, the driver, and a GPU that decodes."""
    try:
        library = load_library()
        capabilities = library.GetDecoderCaps(gpuid=0, codec=library.cudaVideoCodec.H264)
    except DeviceError as error:
        return DecoderFinding(NAME, False, str(error))
    except Exception as error:
        return DecoderFinding(NAME, False, _first_line(error))
    units = capabilities.get("num_decoder_engines", 0)
    return DecoderFinding(NAME, units > 0, f"the GPU has {units} decoders of H.264")


def _memory(address: int, size: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def _first_line(error: Exception) -> str:
    """The library appends advice of a page."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
