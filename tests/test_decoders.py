"""Decoders of this machine, and what happens when a device does not do what it promised."""

import logging

import av
import av.error
import numpy as np
import pytest
from av.codec.hwaccel import HWAccel
from conftest import walk, write_video
from psdiff.runtime.decoders import (
    CPU,
    MOST_FAILURES,
    MOST_SILENT_PACKETS,
    NAMES,
    StreamDecoder,
    announce,
    name_of,
    probe_decoders,
)
from psdiff.runtime.device_decoder import DeviceError
from psdiff.runtime.ffmpeg_decoder import FFmpegDecoder
from psdiff.runtime.source_address import parse_address
from psdiff.runtime.video import VideoSource

ORDER = ["pynvvideocodec", "gst-nvv4l2", "pyav-cuda", "pyav-vaapi", "pyav-cpu"]


@pytest.fixture(autouse=True)
def _announced_nothing():
    announce.cache_clear()


@pytest.fixture
def video(tmp_path):
    """Thirty frames with B-frames: the decoder holds some back."""
    return write_video(tmp_path / "a.mp4", walk(30), options={"bf": "2", "g": "10", "crf": "20"})


@pytest.fixture
def stream(video):
    with av.open(str(video)) as container:
        yield container.streams.video[0]


def has_no_cuda():
    try:
        HWAccel("cuda").create(av.Codec("h264", "r"))
    except (av.error.FFmpegError, NotImplementedError):
        return True
    return False


class Device:
    """In a device's place: what decodes its first packets, what those after them; counts how often it is closed."""

    def __init__(self, first, later=None, count=0):
        self._first, self._later, self._count = first, later, count
        self.num_closed = 0

    def decode(self, packet):
        self._count -= 1
        return (self._first if self._later is None or self._count >= 0 else self._later).decode(packet)

    def close(self):
        self.num_closed += 1


class Nothing:
    def decode(self, packet):
        return []


class Lost:
    def decode(self, packet):
        raise DeviceError("it has been unplugged")


def failing():
    """A decoder that was not told the stream's parameters: it fails at each packet."""
    return av.CodecContext.create("h264", "r")


def everything(decoder, stream):
    """Every frame's PTS and picture."""
    frames = []
    for packet in stream.container.demux(stream):
        frames += decoder.decode(packet if packet.size else None)
    return [(frame.pts, frame.to_ndarray(format="gray")) for frame in frames]


def same(got, expected):
    return len(got) == len(expected) and all(
        a[0] == b[0] and np.array_equal(a[1], b[1]) for a, b in zip(got, expected, strict=True)
    )


@pytest.fixture
def expected(video):
    with av.open(str(video)) as container:
        return [(frame.pts, frame.to_ndarray(format="gray")) for frame in container.decode(video=0)]


def test_every_decoder_is_told_with_its_reason_and_the_cpu_is_the_last():
    found = probe_decoders()
    assert [each.name for each in found] == ORDER
    assert all(each.reason for each in found)
    assert found[-1].is_usable


def test_a_probe_tries_the_device():
    [cuda] = [each for each in probe_decoders() if each.name == "pyav-cuda"]
    assert cuda.is_usable != has_no_cuda()


def test_auto_is_the_first_that_works():
    usable = [each.name for each in probe_decoders() if each.is_usable]
    assert name_of("auto") == usable[0]


def test_every_decoder_can_be_chosen():
    assert set(NAMES.values()) == {found.name for found in probe_decoders()}
    assert [name_of(choice) for choice in NAMES] == list(NAMES.values())


@pytest.mark.skipif(not has_no_cuda(), reason="this machine has a CUDA device")
def test_a_device_that_does_not_open_is_replaced_and_announced_once(stream, expected, caplog):
    with caplog.at_level(logging.WARNING, "psdiff"):
        first, second = StreamDecoder(stream, "cuda"), StreamDecoder(stream, "cuda")
    assert (first.name, second.name) == (CPU, CPU)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("decoder pyav-cuda failed")
    assert same(everything(first, stream), expected)


def test_a_device_that_this_ffmpeg_does_not_know_is_replaced(stream, caplog):
    assert StreamDecoder(stream, "vaapi").name == CPU or "pyav-vaapi" in [
        each.name for each in probe_decoders() if each.is_usable
    ]
    with pytest.raises(DeviceError):
        FFmpegDecoder(stream, "videotoolbox")


def test_a_decoder_of_its_own_gives_what_that_of_the_stream_gives(stream, expected):
    """Stands where the device stands, without one: the same context, on the CPU."""
    decoder = StreamDecoder(stream)
    decoder.use(FFmpegDecoder(stream, None), "stand-in")
    assert same(everything(decoder, stream), expected)
    assert decoder.name == "stand-in"


def test_a_device_that_fails_on_the_first_packets_loses_no_frame(stream, expected, caplog):
    decoder = StreamDecoder(stream)
    device = Device(failing())
    decoder.use(device, "stand-in")
    with caplog.at_level(logging.WARNING, "psdiff"):
        got = everything(decoder, stream)
    assert same(got, expected)
    assert (decoder.name, device.num_closed) == (CPU, 1)
    assert [message.split(" (")[0] for message in caplog.messages] == ["decoder stand-in failed"]


def test_a_device_that_gives_nothing_is_replaced_at_the_end_of_the_packets(stream, expected):
    decoder = StreamDecoder(stream)
    decoder.use(Device(Nothing()), "stand-in")
    assert same(everything(decoder, stream), expected)
    assert decoder.name == CPU


def test_a_device_whose_pictures_are_others_is_replaced(stream, expected, tmp_path, caplog):
    """It says nothing, and nobody would look for people in noise."""
    other = write_video(tmp_path / "other.mp4", [frame[::-1] for frame in walk(30)], options={"bf": "2"})
    with av.open(str(other)) as container:
        pictures = iter(list(container.decode(video=0)))

    class Liar:
        def decode(self, packet):
            if packet is None:
                return []
            frame = next(pictures)
            frame.pts = packet.pts
            return [frame]

    decoder = StreamDecoder(stream)
    decoder.use(Device(Liar()), "stand-in")
    with caplog.at_level(logging.WARNING, "psdiff"):
        got = everything(decoder, stream)
    assert same(got, expected)
    assert "levels from the CPU's" in caplog.text


def test_a_device_that_gives_another_size_is_replaced(stream, expected, tmp_path):
    other = write_video(tmp_path / "other.mp4", walk(30, width=192), options={"bf": "0"})
    with av.open(str(other)) as container:
        pictures = iter(list(container.decode(video=0)))

    class Liar:
        def decode(self, packet):
            frame = next(pictures)
            frame.pts = packet.pts
            return [frame]

    decoder = StreamDecoder(stream)
    decoder.use(Device(Liar()), "stand-in")
    assert same(everything(decoder, stream), expected)


@pytest.fixture
def long_stream(tmp_path):
    frames = walk(MOST_SILENT_PACKETS + 40, start=-100)
    video = write_video(tmp_path / "a.mp4", frames, options={"g": "10", "bf": "0"})
    with av.open(str(video)) as container:
        yield container.streams.video[0]


@pytest.mark.parametrize(
    ("later", "num_failures", "num_silent"),
    [(failing, MOST_FAILURES - 1, MOST_FAILURES), (Lost, 0, 1), (Nothing, 0, MOST_SILENT_PACKETS)],
)
def test_a_device_that_is_lost_on_the_way_is_replaced(long_stream, later, num_failures, num_silent):
    """Frames came; then nothing but failures, or nothing."""
    decoder = StreamDecoder(long_stream)
    device = Device(FFmpegDecoder(long_stream, None), later(), 10)
    decoder.use(device, "stand-in")
    seen, failed, left_at = [], 0, None
    for i, packet in enumerate(long_stream.container.demux(long_stream)):
        try:
            seen += [i for _ in decoder.decode(packet if packet.size else None)]
        except av.error.FFmpegError:
            failed += 1
        if left_at is None and decoder.name == CPU:
            left_at = i
    assert (failed, device.num_closed) == (num_failures, 1)
    assert left_at == 10 + num_silent - 1
    # The CPU goes on at the next key frame, ten packets later at most.
    assert seen[:10] == list(range(10))
    assert left_at <= seen[10] <= left_at + 10
    assert len(set(seen)) >= MOST_SILENT_PACKETS + 40 - 20 - num_silent


def test_damage_is_reported_and_the_device_stays(long_stream):
    decoder = StreamDecoder(long_stream)
    decoder.use(FFmpegDecoder(long_stream, None), "stand-in")
    failed = 0
    for i, packet in enumerate(long_stream.container.demux(long_stream)):
        sent = av.Packet(bytes(packet.size)) if i in (20, 21) else packet
        try:
            decoder.decode(sent if sent.size else None)
        except av.error.FFmpegError:
            failed += 1
    assert failed == 2
    assert decoder.name == "stand-in"


def test_a_file_is_decoded_on_the_cpu_whatever_is_asked(video):
    with VideoSource(parse_address(str(video)), "gate", decoder="cuda") as source:
        assert source.decoder == CPU


@pytest.mark.skipif(not has_no_cuda(), reason="this machine has a CUDA device")
def test_a_live_camera_falls_back_and_says_what_decodes(serve, tmp_path, caplog):
    file = write_video(tmp_path / "gate.mp4", walk(40), fps=20, options={"g": "5", "bf": "0"})
    url, _ = serve(file)
    with caplog.at_level(logging.WARNING, "psdiff"):
        source = VideoSource(parse_address(f"{url}/gate"), "gate", decoder="cuda", read_timeout_s=3)
    with source:
        assert source.decoder == CPU
        assert sum(1 for _ in source.decoded()) == 40
    assert "decoder pyav-cuda failed" in caplog.text
