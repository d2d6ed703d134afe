"""Files and folders as cameras of a site: at their own speed or flat out, to an end, or again and again."""

import time

import av
import numpy as np
import pytest
from conftest import RED, scene, walk, write_video
from PIL import Image
from psdiff.runtime.camera_feed import CameraFeed, FeedSettings
from psdiff.runtime.capture_time import Arrival
from psdiff.runtime.connection import Connection, HostLimit, State
from psdiff.runtime.frame_queues import FrameQueues, QueuePolicy
from psdiff.runtime.playback import LATEST_S, LONGEST_PAUSE_S, Playback, paced, with_pts
from psdiff.runtime.video import Decoded


@pytest.fixture
def follow():
    feeds = []

    def start(url, policy=None, sample_fps=None, **playback):
        queues = FrameQueues(8, 0.0)
        queues.add("file", policy or QueuePolicy(depth=1000, max_staleness_s=1000), time.monotonic())

        def offer(frame, now_s, deadline_s):
            taken = queues.offer("file", frame, now_s=now_s, deadline_s=deadline_s)
            return None if taken else "removed"

        settings = FeedSettings("file", str(url), 1000.0, sample_fps, playback=Playback(**playback))
        feed = CameraFeed(settings, offer, HostLimit())
        feed.start()
        feeds.append((feed, queues))
        return feed, queues

    yield start
    for feed, queues in feeds:
        feed.stop()
        # Who waits for room wakes up.
        queues.remove("file")
        assert feed.join(10)


def wait_for(condition, seconds=20.0):
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.01)


def frames_in(queues):
    return [waiting.content for waiting in iter_batches(queues)]


def iter_batches(queues):
    while batch := queues.take(time.monotonic()):
        yield from batch


def has_ended(feed):
    return lambda: feed.status()["state"] == "ended"


def test_a_file_is_played_at_its_own_speed_and_ends(follow, tmp_path):
    began = time.monotonic()
    feed, queues = follow(write_video(tmp_path / "a.mp4", walk(20), fps=10))
    wait_for(has_ended(feed))
    assert time.monotonic() - began >= 1.85
    status = feed.status()
    assert (status["decoded"], status["reconnects"], status["reason"]) == (20, {}, None)
    assert status["decoder"] == "pyav-cpu"
    assert status["offline_s"] is None
    frames = frames_in(queues)
    assert [frame.seq for frame in frames] == list(range(20))
    # Nobody knows when it was filmed; it is treated as if it were filmed now, one frame after the other.
    assert {frame.time.source for frame in frames} == {"arrival"}
    assert frames[-1].time.utc_s - frames[0].time.utc_s == pytest.approx(1.9, abs=0.2)


def test_a_file_that_ended_stays_so_when_the_service_stops(follow, tmp_path):
    feed, _ = follow(write_video(tmp_path / "a.mp4", walk(3)))
    wait_for(has_ended(feed))
    feed.stop()
    assert feed.join(2)
    assert feed.status()["state"] == "ended"


def test_flat_out_waits_for_room_and_nothing_is_dropped(follow, tmp_path):
    video = write_video(tmp_path / "a.mp4", walk(100), fps=10)
    began = time.monotonic()
    feed, queues = follow(video, QueuePolicy("every_frame", depth=2), pace="flat_out")
    seqs = []
    while not (has_ended(feed)() and not queues.waiting("file")):
        assert queues.waiting("file") <= 2
        seqs += [waiting.content.seq for waiting in queues.take(time.monotonic())]
        time.sleep(0.002)
    assert seqs == list(range(100))
    assert time.monotonic() - began < 9, "ten seconds of video"


def test_the_file_tells_when_it_was_made(follow, tmp_path):
    made = {"creation_time": "2026-03-01T10:00:00.000000Z"}
    feed, queues = follow(write_video(tmp_path / "a.mp4", walk(5), metadata=made), pace="flat_out")
    wait_for(has_ended(feed))
    first, *_, last = frames_in(queues)
    assert (first.time.utc_s, first.time.source, first.time.uncertainty_s) == (1772359200.0, "file", 1.0)
    assert last.time.utc_s == pytest.approx(1772359200.4)


def test_a_file_without_timestamps_is_sampled_by_the_number_of_its_frames(follow, tmp_path):
    """Flat out, the clock says nothing about the video."""
    feed, queues = follow(write_video(tmp_path / "a.264", walk(100)), pace="flat_out", sample_fps=5.0)
    wait_for(has_ended(feed))
    # FFmpeg takes such a stream for one of 25 frames a second: each fifth, or its neighbour by rounding.
    seqs = [frame.seq for frame in frames_in(queues)]
    assert len(seqs) == 20
    assert all(abs(seq - 5 * i) <= 1 for i, seq in enumerate(seqs))


def test_a_loop_begins_again_without_a_wait_and_time_goes_on(follow, tmp_path):
    made = {"creation_time": "2026-03-01T10:00:00.000000Z"}
    video = write_video(tmp_path / "a.mp4", walk(5), metadata=made)
    feed, queues = follow(video, loop=True, pace="flat_out")
    wait_for(lambda: feed.status()["decoded"] > 17)
    assert feed.status()["reconnects"] == {}
    frames = frames_in(queues)[:17]
    assert [frame.connection for frame in frames] == [1] * 5 + [2] * 5 + [3] * 5 + [4] * 2
    assert [frame.seq for frame in frames] == list(range(17))
    times = [frame.time.utc_s for frame in frames]
    assert times == sorted(times)
    assert len(set(times)) == 17


def test_a_folder_is_played_in_the_order_of_its_names(follow, tmp_path):
    for number, x in [(1, 10), (2, 40), (10, 80)]:
        Image.fromarray(scene([((x, 20, x + 10, 60), RED)])).save(tmp_path / f"img{number}.png")
    (tmp_path / "img3.png").write_bytes(b"damaged")
    began = time.monotonic()
    feed, queues = follow(tmp_path, image_fps=4.0)
    wait_for(has_ended(feed))
    assert time.monotonic() - began >= 0.45
    frames = frames_in(queues)
    assert [int(np.argmax(frame.image[40, :, 0])) for frame in frames] == [10, 40, 80]
    assert [frame.pts_s for frame in frames] == [0, 0.25, 0.5]
    assert (feed.status()["decoder"], feed.status()["corrupt_packets"]) == ("pillow", 1)


def test_a_file_that_is_not_there_is_waited_for_with_patience(follow, tmp_path):
    feed, _ = follow(tmp_path / "none.mp4")
    wait_for(lambda: feed.status()["state"] == "backoff")
    assert (feed.status()["reason"], feed.status()["retry_in_s"] > 200) == ("not_found", True)


def test_a_device_that_is_not_there_is_tried_again_soon(follow):
    feed, _ = follow("v4l2:///dev/video97")
    wait_for(lambda: feed.status()["reconnects"].get("lost", 0) >= 2)
    assert feed.status()["state"] in ("backoff", "connecting")


def test_the_end_of_a_recording_is_a_state_with_a_beginning():
    each = Connection(0.0)
    each.frame(1.0)
    each.end(5.0)
    assert (each.state, each.offline_since_s, each.retry_s, each.reason) == (State.ENDED, None, None, None)
    assert not each.check(100.0)
    assert each.state is State.ENDED


# The pace alone -------------------------------------------------------------------------------------------


class Clock:
    """Stands still but for those who wait."""

    def __init__(self):
        self.now_s = 100.0
        self.waits = []

    def __call__(self):
        return self.now_s

    def wait(self, seconds):
        # Sums of tenths are off by rounding.
        self.waits += [round(seconds, 6)] if seconds > 1e-6 else []
        self.now_s += seconds


def frames_at(*pts, clock=None, work_s=0.0):
    """Frames whose decoding takes work_s each."""
    for seq, pts_s in enumerate(pts):
        if clock is not None:
            clock.now_s += work_s
        yield Decoded(seq, av.VideoFrame(2, 2, "gray"), pts_s, Arrival(0, 0))


def waits(*pts, work_s=0.0):
    clock = Clock()
    given = list(paced(frames_at(*pts, clock=clock, work_s=work_s), clock.wait, clock))
    assert len(given) == len(pts)
    assert all(each.arrival.utc_s > 0 for each in given)
    return clock.waits


def test_frames_come_when_their_pts_says():
    assert waits(0, 0.1, 0.5) == [0.1, 0.4]


def test_decoding_takes_from_the_wait_and_not_from_the_pace():
    assert waits(0, 0.1, 0.2, work_s=0.04) == [0.06, 0.06]


def test_frames_without_pts_are_numbered_by_the_rate_of_the_video():
    numbered = list(with_pts(frames_at(None, None, 7.0), 4.0))
    assert [each.pts_s for each in numbered] == [0, 0.25, 7.0]


def test_a_jump_in_the_pts_is_not_waited_for():
    assert waits(0, 0.1, 0.1 + LONGEST_PAUSE_S + 1, 0.2 + LONGEST_PAUSE_S + 1) == [0.1, 0.1]
    assert waits(5.0, 5.1, 0.0, 0.1) == [0.1, 0.1]


def test_who_is_late_is_not_hurried():
    # Each frame takes a second to decode, and lasts a tenth: no wait, and no rush once decoding is fast again.
    clock = Clock()
    slow = frames_at(0, 0.1, 0.2, clock=clock, work_s=LATEST_S + 1)

    def then_fast():
        yield from slow
        yield from (each._replace(pts_s=0.3 + each.seq / 10) for each in frames_at(0, 0, 0))

    list(paced(then_fast(), clock.wait, clock))
    assert clock.waits == [0.1, 0.1, 0.1]
