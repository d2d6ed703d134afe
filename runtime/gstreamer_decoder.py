"""A stream decoded by GStreamer: the only way to the decoder of a Jetson Orin."""

from __future__ import annotations

import functools
from importlib import import_module
from types import ModuleType
from typing import Any

import av
import numpy as np
from av.video.stream import VideoStream

from .bit_stream import BitStream, Payload
from .device_decoder import DecoderFinding, DeviceError

NAME = "gst-nvv4l2"

# The decoder of Jetson, and the copy from its memory to main memory.
JETSON = "nvv4l2decoder name=decoder enable-max-performance=true ! nvvidconv"

# Media type and parser of GStreamer's, by FFmpeg's name of the codec.
MEDIA = {"h264": ("video/x-h264", "h264parse"), "hevc": ("video/x-h265", "h265parse")}

# Decoding goes on beside us: a picture comes some milliseconds after its packet. One that takes longer than this
# waits for later pictures.
LONGEST_WAIT_S = 0.1

# A decoder that was slow once is not taken for one that holds pictures back for ever.
PACKETS_PER_TRIAL = 32

# Pictures before the first key frame's have times before it, and GStreamer knows no time below zero.
ORIGIN_NS = 3_600_000_000_000

NS_PER_S = 1_000_000_000


class GStreamerDecoder:
    """One pipeline of GStreamer's: compressed pictures in, NV12 in main memory out."""

    def __init__(self, stream: VideoStream, elements: str = JETSON) -> None:
        """elements: the decoder, and what brings its pictures to main memory, as gst-launch-1.0 takes them.

        Raises DeviceError where GStreamer or an element is missing, or the codec is not taken.
        """
        self._gst = load_gstreamer()
        self._bits = BitStream(stream)
        assert stream.time_base is not None
        self._ns_per_tick = stream.time_base * NS_PER_S
        self._first_time: int | None = None
        self._usually_held = 0
        self._num_packets = 0
        self._pipeline = self._start(elements)

    def decode(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        """Give the frames that a packet completes; None gives those that are held back.

        Raises InvalidDataError where the packet is damaged, DeviceError where the pipeline has failed.
        """
        if packet is None:
            self._source.emit("end-of-stream")
            return self._rest()
        for payload in self._bits.payloads(packet):
            self._push(payload)
        self._check()
        return self._ready()

    def close(self) -> None:
        """Give the decoder back."""
        self._pipeline.set_state(self._gst.State.NULL)

    def _start(self, elements: str) -> Any:  # noqa: ANN401 - PyGObject makes its classes at run time
        media, parser = MEDIA[self._bits.codec]
        try:
            pipeline = self._gst.parse_launch(
                f"appsrc name=source format=time caps={media},stream-format=byte-stream,alignment=au"
                f" ! {parser} ! {elements} ! video/x-raw,format=NV12 ! appsink name=sink sync=false"
            )
        except import_module("gi.repository.GLib").Error as error:
            raise DeviceError(error.message) from None
        self._source, self._sink = pipeline.get_by_name("source"), pipeline.get_by_name("sink")
        decoder = pipeline.get_by_name("decoder")
        if decoder and decoder.find_property("disable-dpb") and not self._bits.has_b_frames:
            # Otherwise pictures wait for later ones that no camera without B-frames ever sends.
            decoder.set_property("disable-dpb", True)
        if pipeline.set_state(self._gst.State.PLAYING) == self._gst.StateChangeReturn.FAILURE:
            pipeline.set_state(self._gst.State.NULL)
            raise DeviceError(f"its pipeline does not start: {elements}")
        return pipeline

    def _push(self, payload: Payload) -> None:
        if self._first_time is None:
            self._first_time = payload.time
        time_ns = ORIGIN_NS + round((payload.time - self._first_time) * self._ns_per_tick)
        if time_ns < 0:
            raise DeviceError("its packets must not go back in time by more than an hour, got one that does")
        buffer = self._gst.Buffer.new_wrapped(payload.data)
        buffer.pts = time_ns
        self._source.emit("push-buffer", buffer)

    def _ready(self) -> list[av.VideoFrame]:
        """Wait for the picture of the newest packet, or for the one that it moves out of the decoder."""
        self._num_packets += 1
        expected = self._usually_held - (self._num_packets % PACKETS_PER_TRIAL == 0)
        frames: list[av.VideoFrame] = []
        while True:
            wait_s = LONGEST_WAIT_S if self._bits.num_held > max(expected, 0) else 0.0
            sample = self._sink.emit("try-pull-sample", round(wait_s * NS_PER_S))
            if sample is None:
                self._usually_held = self._bits.num_held
                return frames
            frames.append(self._frame(sample))

    def _rest(self) -> list[av.VideoFrame]:
        frames: list[av.VideoFrame] = []
        while not self._sink.get_property("eos"):
            sample = self._sink.emit("try-pull-sample", NS_PER_S)
            if sample is None:
                break
            frames.append(self._frame(sample))
        return frames

    def _frame(self, sample: Any) -> av.VideoFrame:  # noqa: ANN401 - a Gst.Sample
        size = sample.get_caps().get_structure(0)
        width, height = size.get_value("width"), size.get_value("height")
        # GStreamer's layout where nothing else was agreed on: lines of a multiple of four bytes.
        line = (width + 3) // 4 * 4
        lines, chroma_lines = (height + 1) // 2 * 2, (height + 1) // 2
        buffer = sample.get_buffer()
        data = np.frombuffer(buffer.extract_dup(0, buffer.get_size()), np.uint8)
        if data.size != line * (lines + chroma_lines):
            raise DeviceError(
                f"its NV12 of {width}x{height} must have {line * (lines + chroma_lines)} bytes, "
                f"got {data.size}"
            )
        if buffer.pts == self._gst.CLOCK_TIME_NONE:
            raise DeviceError("its pictures must have times, got one without")
        rows = data.reshape(-1, line)
        assert self._first_time is not None
        time = self._first_time + round((buffer.pts - ORIGIN_NS) / self._ns_per_tick)
        chroma = rows[lines:, : (width + 1) // 2 * 2]
        is_damaged = buffer.has_flags(self._gst.BufferFlags.CORRUPTED)
        return self._bits.frame(time, rows[:height, :width], chroma, is_damaged=is_damaged)

    def _check(self) -> None:
        message = self._pipeline.get_bus().pop_filtered(self._gst.MessageType.ERROR)
        if message is not None:
            raise DeviceError(message.parse_error()[0].message)


@functools.cache
def load_gstreamer() -> ModuleType:
    """PyGObject's Gst, ready for use. Raises DeviceError that says what is missing."""
    try:
        gi = import_module("gi")
    except ImportError:
        raise DeviceError(
            "PyGObject is not installed: pip install 'psdiff[gstreamer]', or make the virtual environment "
            "with --system-site-packages"
        ) from None
    try:
        gi.require_version("Gst", "1.0")
        gst = import_module("gi.repository.Gst")
    except (ValueError, ImportError):
        raise DeviceError("GStreamer is not there: apt install gir1.2-gstreamer-1.0") from None
    gst.init(None)
    return gst


def find_gstreamer() -> DecoderFinding:
    """Look for the decoder of Jetson."""
    try:
        gst = load_gstreamer()
    except DeviceError as error:
        return DecoderFinding(NAME, False, str(error))
    for element in ("nvv4l2decoder", "nvvidconv", "h264parse", "h265parse"):
        if not gst.ElementFactory.find(element):
            return DecoderFinding(NAME, False, f"{gst.version_string()} has no {element}; {_origin(element)}")
    return DecoderFinding(NAME, True, f"{gst.version_string()} has nvv4l2decoder")


def _origin(element: str) -> str:
    if element.startswith("nv"):
        return "it comes with JetPack"
    return "apt install gstreamer1.0-plugins-bad"
