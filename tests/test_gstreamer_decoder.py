"""The door to GStreamer, with software decoders where a Jetson has nvv4l2decoder: the same pipeline around them."""

import contextlib
import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path

import av
import av.error
import numpy as np
import pytest
from conftest import walk, write_video
from psdiff.runtime import decoders
from psdiff.runtime.bit_stream import BitStream
from psdiff.runtime.decoders import CPU, StreamDecoder, announce
from psdiff.runtime.device_decoder import DeviceError
from psdiff.runtime.gstreamer_decoder import GStreamerDecoder, find_gstreamer, load_gstreamer
from psdiff.runtime.source_address import parse_address
from psdiff.runtime.video import VideoSource

SOFTWARE = {"h264": "openh264dec ! videoconvert", "hevc": "libde265dec ! videoconvert"}

# Debian's PyGObject, for a virtual environment of the same Python that was made without it.
SYSTEM_GI = Path("/usr/lib/python3/dist-packages/gi")


@pytest.fixture(scope="module", autouse=True)
def gst(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gi")
    if SYSTEM_GI.exists():
        (folder / "gi").symlink_to(SYSTEM_GI)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        try:
            with warnings.catch_warnings():
                # PyGObject up to 3.42 loads its modules in a way that Python no longer likes.
                warnings.simplefilter("ignore", ImportWarning)
                gst = load_gstreamer()
        except DeviceError as error:
            pytest.skip(str(error))
        for element in ("openh264dec", "libde265dec", "h264parse", "h265parse"):
            if not gst.ElementFactory.find(element):
                pytest.skip(f"GStreamer has no {element}: apt install gstreamer1.0-plugins-bad")
        yield gst


@pytest.fixture(autouse=True)
def _announced_nothing():
    announce.cache_clear()


@pytest.fixture
def open_stream(tmp_path):
    """Write a video and open its stream."""
    opened = []

    def start(frames, suffix=".mp4", **settings):
        file = write_video(tmp_path / f"{len(opened)}{suffix}", frames, **settings)
        opened.append(av.open(str(file)))
        return opened[-1].streams.video[0]

    yield start
    for container in opened:
        container.close()


def by_cpu(stream):
    with av.open(stream.container.name) as container:
        return [picture(frame) for frame in container.decode(video=0)]


def by(decoder, stream):
    frames = []
    for packet in stream.container.demux(stream):
        frames += decoder.decode(packet if packet.size else None)
    decoder.close()
    return [picture(frame) for frame in frames]


def picture(frame):
    """PTS, whether it is a key frame, luma and chroma."""
    nv12 = frame.reformat(format="nv12")
    planes = []
    for plane, columns in zip(nv12.planes, (frame.width, (frame.width + 1) // 2 * 2), strict=True):
        planes.append(np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:, :columns])
    return frame.pts, bool(frame.key_frame), *planes


def same(got, expected):
    return [each[:2] for each in got] == [each[:2] for each in expected] and all(
        np.array_equal(a, b)
        for one, other in zip(got, expected, strict=True)
        for a, b in zip(one[2:], other[2:], strict=True)
    )


@pytest.mark.parametrize(
    ("suffix", "size", "codec"),
    [
        (".mp4", (160, 96), "h264"),  # lengths before the units, parameter sets beside them
        (".ts", (160, 96), "h264"),  # start codes, parameter sets among the units
        (".mp4", (162, 94), "h264"),  # lines that GStreamer pads
        (".mp4", (160, 96), "hevc"),
    ],
)
def test_every_picture_is_that_of_the_cpu(open_stream, suffix, size, codec):
    width, height = size
    frames = walk(40, start=-20, width=width, height=height)
    settings = {"codec": "libx264" if codec == "h264" else "libx265", "options": {"bf": "0", "g": "10"}}
    if codec == "hevc":
        settings["options"] = {"x265-params": "bframes=0:keyint=10:log-level=none"}
    stream = open_stream(frames, suffix, **settings)
    got = by(GStreamerDecoder(stream, SOFTWARE[codec]), stream)
    assert len(got) == 40
    assert same(got, by_cpu(stream))


def test_pictures_with_b_frames_come_in_the_order_of_their_times(open_stream):
    stream = open_stream(walk(40, start=-20), options={"bf": "2", "g": "10"})
    got, expected = by(GStreamerDecoder(stream, SOFTWARE["h264"]), stream), by_cpu(stream)
    assert [each[:2] for each in got] == [each[:2] for each in expected]
    # OpenH264 gets a few B-frames wrong, by itself as well.
    assert sum(same([one], [other]) for one, other in zip(got, expected, strict=True)) >= 36


def test_a_picture_comes_with_its_packet(open_stream):
    """Not with the next one, a fifth of a second later."""
    stream = open_stream(walk(80, start=-100), options={"profile": "baseline", "g": "10"})
    decoder = GStreamerDecoder(stream, SOFTWARE["h264"])
    late = [
        packet.pts
        for packet in stream.container.demux(stream)
        if packet.size and [frame.pts for frame in decoder.decode(packet)] != [packet.pts]
    ]
    decoder.close()
    # A loaded machine is slow now and then, and that must not last.
    assert len(late) < 40


def test_a_slow_decoder_is_not_taken_for_one_that_holds_back(open_stream, monkeypatch):
    stream = open_stream(walk(120, start=-100), options={"profile": "baseline", "g": "10"})
    decoder = GStreamerDecoder(stream, SOFTWARE["h264"])
    packets = [packet for packet in stream.container.demux(stream) if packet.size]
    with monkeypatch.context() as patch:
        patch.setattr("psdiff.runtime.gstreamer_decoder.LONGEST_WAIT_S", 0.0)
        early = [len(decoder.decode(packet)) for packet in packets[:3]]
    assert sum(early) < 3
    came = [[frame.pts for frame in decoder.decode(packet)] for packet in packets[3:]]
    decoder.close()
    assert sum(map(len, came)) == len(packets) - sum(early)
    assert came[-1] == [packets[-1].pts]


def test_nothing_comes_before_the_first_key_frame(open_stream):
    stream = open_stream(walk(40, start=-20), ".ts", options={"bf": "0", "g": "10"})
    expected = by_cpu(stream)
    decoder, frames = GStreamerDecoder(stream, SOFTWARE["h264"]), []
    for i, packet in enumerate(stream.container.demux(stream)):
        if i >= 5:
            frames += decoder.decode(packet if packet.size else None)
    decoder.close()
    assert same([picture(frame) for frame in frames], expected[10:])


def with_data(packet, data):
    copy = av.Packet(bytes(data))
    copy.pts, copy.dts, copy.is_keyframe = packet.pts, packet.dts, packet.is_keyframe
    return copy


def test_a_damaged_packet_costs_the_pictures_up_to_the_next_key_frame(open_stream):
    stream = open_stream(walk(40, start=-20), options={"profile": "baseline", "g": "10"})
    expected = by_cpu(stream)
    decoder, frames = StreamDecoder(stream), []
    decoder.use(GStreamerDecoder(stream, SOFTWARE["h264"]), "stand-in")
    for i, packet in enumerate(stream.container.demux(stream)):
        data = bytes(packet)
        if i == 14:
            # The unit's header stays; what follows is none of H.264.
            data = data[:5] + bytes(len(data) - 5)
        frames += decoder.decode(with_data(packet, data) if packet.size else None)
    decoder.close()
    assert decoder.name == "stand-in"
    assert same([picture(frame) for frame in frames], expected[:14] + expected[20:])


def test_what_follows_a_picture_that_was_swallowed_is_damage(open_stream, gst):
    """A decoder that drops one and goes on shows the next as if nothing had been."""
    stream = open_stream(walk(40, start=-20), options={"profile": "baseline", "g": "10"})
    expected = by_cpu(stream)
    decoder, frames, damaged, count = GStreamerDecoder(stream, SOFTWARE["h264"]), [], [], iter(range(99))

    def swallow(_pad, _info):
        return gst.PadProbeReturn.DROP if next(count) in (14, 29) else gst.PadProbeReturn.OK

    decoder._sink.get_static_pad("sink").add_probe(gst.PadProbeType.BUFFER, swallow)
    for i, packet in enumerate(stream.container.demux(stream)):
        try:
            frames += decoder.decode(packet if packet.size else None)
        except av.error.InvalidDataError:
            damaged.append(i)
    decoder.close()
    # The one before a key frame spoils nothing.
    assert damaged == [15]
    assert same(
        [picture(frame) for frame in frames],
        [each for i, each in enumerate(expected) if i not in (14, 15, 29)],
    )


def test_a_picture_that_is_marked_as_damaged_is_not_given(open_stream):
    stream = open_stream(walk(3))
    bits = BitStream(stream)
    [payload] = bits.payloads(next(stream.container.demux(stream)))
    with pytest.raises(av.error.InvalidDataError):
        bits.frame(payload.time, np.zeros((96, 160)), np.zeros((48, 160)), is_damaged=True)
    assert bits.num_held == 0


def test_a_buffer_of_an_unexpected_size_is_refused(open_stream, gst):
    decoder = GStreamerDecoder(open_stream(walk(3)), SOFTWARE["h264"])
    caps = gst.Caps.from_string("video/x-raw,format=NV12,width=160,height=96")
    sample = gst.Sample.new(gst.Buffer.new_wrapped(bytes(176 * 96 * 3 // 2)), caps, None, None)
    with pytest.raises(DeviceError, match=r"NV12 of 160x96 must have 23040 bytes, got 25344"):
        decoder._frame(sample)
    sample = gst.Sample.new(gst.Buffer.new_wrapped(bytes(160 * 96 * 3 // 2)), caps, None, None)
    with pytest.raises(DeviceError, match="must have times"):
        decoder._frame(sample)
    decoder.close()


def test_what_it_cannot_decode_is_said(open_stream):
    mpeg4 = open_stream(walk(3), codec="mpeg4", options={})
    with pytest.raises(DeviceError, match="takes h264 and hevc, not mpeg4"):
        GStreamerDecoder(mpeg4, SOFTWARE["h264"])
    h264 = open_stream(walk(3))
    with pytest.raises(DeviceError, match='no element "nodecoder"'):
        GStreamerDecoder(h264, "nodecoder")
    with pytest.raises(DeviceError, match="does not start"):
        GStreamerDecoder(h264, f"{SOFTWARE['h264']} ! tee name=t t. ! fakesink state-error=null-to-ready t. ")
    decoder = GStreamerDecoder(h264, SOFTWARE["h264"])
    for _, packet in zip(range(2), h264.container.demux(h264), strict=False):
        packet.pts = None
        with (
            contextlib.nullcontext()
            if packet.is_keyframe
            else pytest.raises(DeviceError, match="must have time")
        ):
            decoder.decode(packet)
    packet.pts = -(10**9)
    with pytest.raises(DeviceError, match="more than an hour"):
        decoder.decode(packet)
    decoder.close()


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ("openh264dec ! identity error-after=5 ! videoconvert", "Failed after iterations"),
        ("openh264dec ! identity eos-after=5 ! videoconvert", "no frame from 64 packets"),
        ("openh264dec ! videoconvert ! videobalance brightness=0.3 ! videoconvert", "levels from the CPU's"),
        ("openh264dec ! videoconvert ! videoscale ! video/x-raw,width=80 ! videoconvert", "levels from the"),
    ],
)
def test_a_pipeline_that_breaks_is_replaced(open_stream, caplog, elements, reason):
    stream = open_stream(walk(120, start=-200), options={"profile": "baseline", "g": "10"})
    decoder = StreamDecoder(stream)
    decoder.use(GStreamerDecoder(stream, elements), "gst")
    with caplog.at_level(logging.WARNING, "psdiff"):
        got = by(decoder, stream)
    assert decoder.name == CPU
    [message] = caplog.messages
    assert re.match(rf"decoder gst failed \(.*({reason})", message, re.DOTALL), message
    expected = {each[0]: each for each in by_cpu(stream)}
    assert len(got) >= 120 - 64 - 20
    assert same(got, [expected[each[0]] for each in got])


def test_a_live_camera_is_decoded_by_it(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(
        decoders, "open_device", lambda stream, name: GStreamerDecoder(stream, SOFTWARE["h264"])
    )
    options = {"g": "5", "profile": "baseline"}
    file = write_video(tmp_path / "gate.mp4", walk(40), fps=20, options=options)
    with av.open(str(file)) as container:
        expected = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    url, _ = serve(file)
    with VideoSource(parse_address(f"{url}/gate"), "gate", decoder="nvv4l2", read_timeout_s=3) as source:
        got = [decoded for decoded in source.decoded() if not decoded.is_damaged]
        assert source.decoder == "gst-nvv4l2"
    assert len(got) == 40
    assert [each.frame.key_frame for each in got] == [i % 5 == 0 for i in range(40)]
    assert all(
        np.array_equal(a.frame.to_ndarray(format="gray"), b) for a, b in zip(got, expected, strict=True)
    )


def test_closing_gives_the_decoder_back(open_stream, gst):
    stream = open_stream(walk(3))
    decoder = GStreamerDecoder(stream, SOFTWARE["h264"])
    decoder.decode(next(stream.container.demux(stream)))
    pipeline = decoder._pipeline
    decoder.close()
    assert pipeline.get_state(0).state == gst.State.NULL


def test_a_machine_that_is_no_jetson_is_told_what_is_missing(gst):
    found = find_gstreamer()
    if gst.ElementFactory.find("nvv4l2decoder"):
        assert found.is_usable
    else:
        assert not found.is_usable
        assert "has no nvv4l2decoder; it comes with JetPack" in found.reason


def test_without_pygobject_the_way_to_it_is_told():
    script = (
        "import sys; sys.modules['gi'] = None\n"
        "from psdiff.runtime.gstreamer_decoder import find_gstreamer\n"
        "print(find_gstreamer())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert "is_usable=False" in done.stdout
    assert "pip install 'psdiff[gstreamer]'" in done.stdout
