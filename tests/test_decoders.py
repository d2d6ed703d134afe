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
    DeviceError,
    StreamDecoder,
    announce,
    device_of,
    open_on_device,
    probe_decoders,
)
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
    assert device_of("auto") == (None if usable[0] == CPU else usable[0].removeprefix("pyav-"))
    assert device_of("cpu") is None
    assert device_of("cuda") == "cuda"


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
        open_on_device(stream, "videotoolbox")


def test_a_decoder_of_its_own_gives_what_that_of_the_stream_gives(stream, expected):
    """Stands where the device stands, without one: the same context, on the CPU."""
    decoder = StreamDecoder(stream)
    decoder.use(open_on_device(stream, None), "stand-in")
    assert same(everything(decoder, stream), expected)
    assert decoder.name == "stand-in"


def test_a_device_that_fails_on_the_first_packets_loses_no_frame(stream, expected, caplog):
    decoder = StreamDecoder(stream)
    # A decoder that was not told the stream's parameters fails at each packet.
    decoder.use(av.CodecContext.create("h264", "r"), "stand-in")
    with caplog.at_level(logging.WARNING, "psdiff"):
        got = everything(decoder, stream)
    assert same(got, expected)
    assert decoder.name == CPU
    assert [message.split(" (")[0] for message in caplog.messages] == ["decoder stand-in failed"]


def test_a_device_that_gives_nothing_is_replaced_at_the_end_of_the_packets(stream, expected):
    decoder = StreamDecoder(stream)
    silent = open_on_device(stream, None)
    silent.skip_frame = "ALL"
    decoder.use(silent, "stand-in")
    assert same(everything(decoder, stream), expected)
    assert decoder.name == CPU


def test_a_device_that_is_lost_on_the_way_is_replaced(tmp_path):
    """Frames came; then nothing but failures."""
    frames = walk(MOST_FAILURES + 40, start=-60)
    video = write_video(tmp_path / "a.mp4", frames, options={"g": "10", "bf": "0"})
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        decoder = StreamDecoder(stream)
        decoder.use(open_on_device(stream, None), "stand-in")
        seen, failed = [], 0
        for i, packet in enumerate(container.demux(stream)):
            if i == 10:
                decoder.use(av.CodecContext.create("h264", "r"), "stand-in")
            try:
                seen += [(i, frame) for frame in decoder.decode(packet if packet.size else None)]
            except av.error.FFmpegError:
                failed += 1
    assert failed == MOST_FAILURES - 1
    assert decoder.name == CPU
    assert seen[-1][0] > 10 + MOST_FAILURES


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
