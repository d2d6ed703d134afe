"""The parts of psdiff soak that need no camera: packets, growth, the report; and the command as a whole."""

import json
import random
import struct
import subprocess
import sys

import pytest
from psdiff.runtime.soak import clips
from psdiff.runtime.soak.endurance import Record, Report
from psdiff.runtime.soak.fault_list import FAULTS, fault
from psdiff.runtime.soak.report import document
from psdiff.runtime.soak.resources import Growth, Sample, sample
from psdiff.runtime.soak.rtp_faults import CameraClock, NoFirstKeyFrame, NoReports, RtspSplitter


def rtp(timestamp, payload=b"\x41data", marker=True):
    return struct.pack("!BBHII", 0x80, 96 | marker << 7, 1, timestamp, 7) + payload


def framed(channel, packet):
    return b"$" + bytes([channel]) + len(packet).to_bytes(2) + packet


ANSWER = b"RTSP/1.0 200 OK\r\nCSeq: 1\r\nContent-Length: 5\r\n\r\nv=0\r\n"


@pytest.mark.parametrize("seed", range(5))
def test_what_is_not_altered_passes_as_it_is_however_it_is_cut(seed):
    stream = ANSWER + b"".join(framed(i % 2, bytes(40 * i + 1)) for i in range(20)) + ANSWER
    rng, splitter, out, start = random.Random(seed), RtspSplitter(), b"", 0
    while start < len(stream):
        end = start + rng.randrange(1, 60)
        out += splitter.feed(stream[start:end], lambda channel, packet: [(channel, packet)])
        start = end
    assert out == stream


def test_reports_are_kept_back_and_video_is_not():
    video, report = framed(0, rtp(1)), framed(1, b"\x80\xc8report")
    assert RtspSplitter().feed(ANSWER + video + report + video, NoReports()) == ANSWER + video + video


def test_a_clock_tells_its_time_before_every_frame_and_moves_pts():
    clock = CameraClock(offset_s=3600, pts_shift_s=-1)
    (channel, report), (_, video) = clock(0, rtp(90_000, marker=False))
    assert (channel, struct.unpack_from("!I", video, 4)[0]) == (1, 0)
    assert struct.unpack_from("!I", report, 16)[0] == 0, "the report is about the same timestamp"
    assert len(clock(0, rtp(90_000))) == 1, "a frame of two packets has one report"
    assert len(clock(0, rtp(99_000))) == 2
    assert clock(1, b"\x80\xc8report") == []


def test_the_first_key_frame_is_kept_back_with_its_parameter_sets():
    skip = NoFirstKeyFrame()
    first = [rtp(0, b"\x67sps"), rtp(0, b"\x68pps"), rtp(0, b"\x7c\x85idr fragment")]
    later = [rtp(9000, b"\x41p"), rtp(18000, b"\x67sps"), rtp(18000, b"\x65idr")]
    assert [skip(0, packet) for packet in first] == [[], [], []]
    assert [skip(0, packet) for packet in later] == [[(0, packet)] for packet in later]


def test_the_slope_of_memory_is_that_after_the_warm_up():
    rising = [Sample(t, 100 + 50 * min(t, 100) / 100 + 2 * t / 3600, 10, 10) for t in range(0, 1800, 3)]
    growth = Growth(rising)
    assert growth.slope_mb_per_h(300) == pytest.approx(2.0, rel=0.01)
    assert growth.slope_mb_per_h(1796) is None
    peaks = [Sample(s.at_s, s.rss_mb + 300 * (s.at_s % 60 < 6), 10, 10) for s in rising]
    assert Growth(peaks).slope_mb_per_h(300) == pytest.approx(2.0, rel=0.05)


def test_a_sample_is_of_this_process():
    found = sample()
    assert found.rss_mb > 20
    assert found.threads >= 1


def report_of(records, **changes):
    told = {
        "seed": 3,
        "cameras": 5,
        "seconds": 1800.0,
        "interrupted": False,
        "slope_mb_per_h": 0.2,
        "rss_mb": (200.0, 200.1),
        "threads": (40, 40),
        "files": (30, 30),
        "unaccounted": 0,
        "backwards": 0,
        "ended": True,
    }
    return Report(records=records, **(told | changes))


def test_a_report_names_everything_that_was_not_kept():
    fine = Record(1, "absent", "back in 10 s", runs=2, passed=2, worst_s=3.0)
    assert report_of([fine]).complaints == []
    failed = Record(2, "all drop", "back in 10 s", runs=2, passed=1, failures=["frames must come"])
    complaints = report_of([fine, failed], unaccounted=3, slope_mb_per_h=1.5).complaints
    assert [any(word in each for each in complaints) for word in ("all drop", "accounted", "MB/h")] == [
        True
    ] * 3
    assert report_of([fine], slope_mb_per_h=None).complaints == [], "too short to tell"


def test_the_document_holds_every_fault_and_what_was_not_run():
    records = [Record(each.number, each.title, each.criterion) for each in FAULTS]
    records[0].missing = "needs a ladder"
    text = document(report_of(records), 30)
    for each in FAULTS:
        assert f"| {each.number} | {each.title} | {each.criterion} |" in text
    assert "needs a ladder" in text
    with pytest.raises(ValueError, match=r"fault must be one of \[1, 2, .*got 13"):
        fault(13)


def test_a_person_of_a_clip_is_where_it_is_in_every_size():
    for size in ((640, 360), (320, 180)):
        for index in (0, 7, 50, 99):
            box = clips.person_in(clips.room(index, size))
            assert clips.is_in_place(box, *size)
    assert not clips.is_in_place((0, 0, 640, 360), 640, 360)


@pytest.mark.slow
def test_the_program_soaks_and_writes_what_it_saw(serve, tmp_path):
    command = [sys.executable, "-m", "psdiff", "soak", "--minutes", "0.2", "--cameras", "2"]
    result = subprocess.run(
        [*command, "--isolation", "thread", "--write-docs", "faults.md"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    told = json.loads((tmp_path / "psdiff-soak.json").read_text())
    assert sum(each["runs"] for each in told["records"]) >= 1
    assert (told["complaints"], told["unaccounted"]) == ([], 0)
    assert "camera absent" in (tmp_path / "faults.md").read_text()
