"""Damaged frames reach nobody: flipped bits, streams that begin between key frames, sizes that change on the way."""

import random

import av
import cv2
import numpy as np
import pytest
from conftest import RED, scene, write_video
from psdiff.runtime.camera_feed import CameraFeed, FeedSettings
from psdiff.runtime.connection import HostLimit
from psdiff.runtime.damage import LONGEST_SMEAR_S, DamageWatch
from psdiff.runtime.live_source import LiveSource
from psdiff.runtime.run import run
from psdiff.runtime.source_address import parse_address
from psdiff.runtime.sources import open_source
from psdiff.runtime.video import VideoSource

GOP = 20


def texture(count):
    """A camera that is carried past a wall: every block of every frame moves."""
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)
    wall = cv2.GaussianBlur(noise, (0, 0), 3)
    return [np.ascontiguousarray(wall[i : i + 96, 2 * i : 2 * i + 160]) for i in range(count)]


def packets_of(path):
    """(header, packets) of a raw stream."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        header = bytes(stream.codec_context.extradata or b"")
        return header, [bytes(packet) for packet in container.demux(stream) if packet.size]


def write_stream(path, frames, codec, options):
    """A raw stream without a container."""
    form = {".264": "h264", ".265": "hevc", ".m4v": "m4v"}[path.suffix]
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def h264(refresh=0):
    x264 = f"keyint={GOP}:bframes=0:repeat-headers=1:scenecut=0:intra-refresh={refresh}"
    return {"crf": "24", "x264-params": x264}


CODECS = {
    ".264": ("libx264", h264()),
    ".265": ("libx265", {"x265-params": f"log-level=none:keyint={GOP}:bframes=2:repeat-headers=1"}),
    ".m4v": ("mpeg4", {"g": str(GOP), "bf": "0", "b": "1000000"}),
}


def decoded(path):
    with VideoSource(parse_address(str(path)), "gate") as source:
        return list(source.decoded()), source


def pixels(each):
    return each.frame.to_ndarray(format="gray").astype(int)


@pytest.fixture
def damaged(tmp_path):
    """An MPEG-4 stream whose decoder notices damage, with packet 25 of 60 damaged; and the whole one."""
    whole = write_stream(tmp_path / "whole.m4v", texture(60), *CODECS[".m4v"])
    header, packets = packets_of(whole)
    flip = random.Random(30)
    bad = bytearray(packets[25])
    for _ in range(30):
        bad[flip.randrange(12, len(bad))] ^= 1 << flip.randrange(8)
    packets[25] = bytes(bad)
    path = tmp_path / "damaged.m4v"
    # The first packet of this format holds the header already.
    path.write_bytes(b"".join(packets))
    assert header in packets[0]
    return whole, path


@pytest.mark.parametrize("suffix", list(CODECS))
def test_a_stream_that_begins_between_key_frames_shows_nothing_before_the_first(tmp_path, suffix):
    whole = write_stream(tmp_path / f"whole{suffix}", texture(60), *CODECS[suffix])
    header, packets = packets_of(whole)
    joined = tmp_path / f"joined{suffix}"
    joined.write_bytes((header if suffix == ".m4v" else b"") + b"".join(packets[5:]))
    clean, _ = decoded(whole)
    got, source = decoded(joined)
    given = [each for each in got if not each.is_damaged]
    assert len(given) == 60 - GOP
    assert given[0].frame.key_frame
    for each, expected in zip(given, clean[GOP:], strict=True):
        assert np.array_equal(pixels(each), pixels(expected))
    if suffix == ".m4v":
        # This decoder hands out frames that refer to nothing, and does not mark them.
        smeared = got[0]
        assert not smeared.frame.is_corrupt
        assert np.abs(pixels(smeared) - pixels(clean[5])).mean() > 2
        assert source.frames_corrupt == GOP - 5


def test_a_stream_without_key_frames_that_refreshes_strip_by_strip_is_shown(tmp_path):
    whole = write_stream(tmp_path / "whole.264", texture(80), "libx264", h264(refresh=1))
    clean, _ = decoded(whole)
    assert sum(bool(each.frame.key_frame) for each in clean) == 1
    _, packets = packets_of(whole)
    joined = tmp_path / "joined.264"
    joined.write_bytes(b"".join(packets[GOP:]))
    given = [each for each in decoded(joined)[0] if not each.is_damaged]
    assert 20 < len(given) < 60
    for each, expected in zip(given, clean[-len(given) :], strict=True):
        assert np.array_equal(pixels(each), pixels(expected))


def test_damage_is_passed_on_until_the_key_frame_and_so_long_nobody_looks(damaged):
    whole, path = damaged
    clean, _ = decoded(whole)
    got, source = decoded(path)
    assert [each.seq for each in got if each.frame.is_corrupt] == [25]
    wrong = [each.seq for each in got if np.abs(pixels(each) - pixels(clean[each.seq])).mean() > 1]
    assert set(wrong) > {25, 26, 27}, "the decoder marks the first alone"
    assert [each.seq for each in got if each.is_damaged] == list(range(25, 2 * GOP))
    assert source.frames_corrupt == 2 * GOP - 25
    assert source.corrupt_packets == 1


def test_a_run_never_sees_damaged_frames_and_counts_them(damaged, detector, manifest, engine, tmp_path):
    _, path = damaged
    with open_source(str(path)) as source:
        seqs = [frame.seq for frame in source]
    assert seqs == [*range(25), *range(2 * GOP, 60)]
    summary = run([open_source(str(path))], detector, manifest, out=tmp_path / "out", steps=1)
    [told] = summary.sources
    assert (told.frames_decoded, told.frames_processed, told.frames_corrupt) == (60, 45, 15)
    assert sum(engine.batches) == 45


def test_a_reader_of_a_live_camera_is_given_no_damaged_frame(damaged):
    _, path = damaged
    with LiveSource(VideoSource(parse_address(str(path)), "gate")) as source:
        seqs = [frame.seq for frame in source]
    assert seqs
    assert not set(seqs) & set(range(25, 2 * GOP))
    assert (source.frames_corrupt, len(seqs) + source.frames_dropped) == (15, 45)


def test_a_feed_never_offers_damaged_frames_and_counts_them(damaged):
    _, path = damaged
    seqs = []
    settings = FeedSettings("gate", str(path), latency_s=1.0)
    feed = CameraFeed(settings, lambda frame, *_: seqs.append(frame.seq), HostLimit())
    feed.start()
    assert feed.join(30)
    assert feed.status()["skipped"] == {"corrupt": 15}
    assert feed.status()["decoded"] == 60
    assert seqs == [*range(25), *range(2 * GOP, 60)]


def test_flipped_bits_anywhere_end_nothing(tmp_path):
    video = write_video(tmp_path / "a.mp4", texture(60), options={"crf": "20", "g": str(GOP), "bf": "2"})
    content = video.read_bytes()
    flip = random.Random(0)
    begin, end = content.index(b"mdat") + 800, content.index(b"moov") - 8
    assert end - begin > 10_000
    frames = 0
    for _ in range(20):
        bad = bytearray(content)
        for _ in range(40):
            bad[flip.randrange(begin, end)] ^= 1 << flip.randrange(8)
        video.write_bytes(bad)
        got, source = decoded(video)
        frames += len(got)
        assert source.frames_corrupt == sum(each.is_damaged for each in got)
        assert all(each.is_damaged for each in got if each.frame.is_corrupt)
    assert frames > 20 * 40


def test_boxes_are_right_from_the_first_frame_of_another_size(tmp_path, detector):
    """Cameras are set to another resolution while they send: two raw H.264 streams, one after the other."""
    box, other = (20, 20, 40, 80), (200, 60, 240, 180)
    small = write_stream(tmp_path / "a.264", [scene([(box, RED)])] * 10, "libx264", h264())
    large = write_stream(tmp_path / "b.264", [scene([(other, RED)], 320, 192)] * 10, "libx264", h264())
    video = tmp_path / "both.264"
    video.write_bytes(small.read_bytes() + large.read_bytes())
    with open_source(str(video)) as source:
        frames = list(source)
    assert [frame.image.shape for frame in frames] == [(96, 160, 3)] * 10 + [(192, 320, 3)] * 10
    for i in (9, 10):
        [people] = detector.detect([frames[i].image], 1)
        assert np.abs(people.boxes_xyxy[0] - (box if i == 9 else other)).max() <= 4


# The rule alone ------------------------------------------------------------------------------------------


def watch(*frames, codec="mpeg4"):
    """frames: (time_s, marks), with K for a key frame and C for a corrupt one."""
    each = DamageWatch(codec)
    return [
        each.is_damaged(time_s, round(10 * time_s), is_key="K" in marks, is_corrupt="C" in marks)
        for time_s, marks in frames
    ]


def test_a_key_frame_ends_damage():
    assert watch((0, "K"), (1, ""), (2, "C"), (3, ""), (4, "K"), (5, "")) == [0, 0, 1, 1, 0, 0]


def test_a_corrupt_key_frame_ends_nothing():
    assert watch((0, "K"), (1, "C"), (2, "KC"), (3, ""), (4, "K")) == [0, 1, 1, 1, 0]


def test_without_key_frames_a_camera_is_not_blind_for_ever():
    late = 1 + LONGEST_SMEAR_S
    assert watch((0, "K"), (1, "C"), (late - 0.1, ""), (late + 0.1, ""), (late + 1, "")) == [0, 1, 1, 0, 0]


def test_before_the_first_key_frame_time_does_not_help():
    assert watch((0, ""), (100, ""), (101, "K"), (102, "")) == [1, 1, 0, 0]
    assert watch((0, ""), (100, ""), codec="h264") == [0, 0]


def test_a_key_frame_from_before_a_lost_packet_does_not_end_the_damage():
    each = DamageWatch("mpeg4")
    assert not each.is_damaged(0.0, 0, is_key=True, is_corrupt=False)
    each.lose(15)
    assert each.is_damaged(1.0, 10, is_key=True, is_corrupt=False)
    assert each.is_damaged(1.6, 16, is_key=False, is_corrupt=False)
    assert not each.is_damaged(2.0, 20, is_key=True, is_corrupt=False)
