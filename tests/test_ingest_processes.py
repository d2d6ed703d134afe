"""Cameras in processes of their own: frames, status and account come through, and crashes stay there."""

import os
import signal
import threading
import time

import numpy as np
import pytest
from conftest import GREEN, walk, write_video
from psdiff.runtime.camera_feed import FeedSettings
from psdiff.runtime.ingest_processes import ProcessIngest, default_workers

FPS = 15


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ingest")
    options = {"crf": "20", "g": "5", "bf": "0"}
    return [
        write_video(folder / "gate.mp4", walk(20 * FPS, start=-500), fps=FPS, options=options),
        write_video(folder / "hall.mp4", walk(20 * FPS, GREEN, start=-500), fps=FPS, options=options),
    ]


class Frames:
    """Takes in frames, and remembers them without their pictures unless told to keep them."""

    def __init__(self, keep=False):
        self.seen, self.kept, self.pictures = [], [], []
        self.keep = keep

    def __call__(self, frame, now_s, deadline_s):
        self.seen.append((frame.seq, frame.connection, frame.image.shape, now_s, deadline_s))
        if self.keep:
            self.kept.append(frame)
        elif len(self.pictures) < 3:
            self.pictures.append(frame.image.copy())


@pytest.fixture
def ingest():
    """Make one that is closed at the end."""
    made = []

    def start(num_workers):
        made.append(ProcessIngest(num_workers))
        return made[-1]

    yield start
    for each in made:
        each.close(5)


def follow(ingest, camera, url, frames, depth=8, is_blocking=False):
    feed = ingest.open(
        FeedSettings(camera, url, latency_s=1000.0), frames, depth=depth, is_blocking=is_blocking
    )
    feed.start()
    return feed


def wait_for(condition, seconds=30.0):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it did not happen in time"
        time.sleep(0.01)
    return time.monotonic() - began


def test_frames_come_through_with_pictures_and_times(serve, files, ingest):
    url, _ = serve(files[0])
    frames = Frames()
    feed = follow(ingest(1), "gate", f"{url}/gate", frames)
    wait_for(lambda: len(frames.seen) > 10)
    seqs, connections, shapes, nows, deadlines = zip(*frames.seen[:10], strict=True)
    assert seqs == tuple(range(10))
    assert set(connections) == {1}
    assert set(shapes) == {(96, 160, 3)}
    assert list(nows) == sorted(nows)
    assert abs(nows[-1] - time.monotonic()) < 30
    assert all(
        deadline - now == pytest.approx(1000, abs=30) for now, deadline in zip(nows, deadlines, strict=True)
    )
    # Dark, with at most one red rectangle.
    for picture in frames.pictures:
        assert np.median(picture) == pytest.approx(30, abs=6)
    status = feed.status()
    assert (status["state"], status["camera"], status["source"]) == ("streaming", "gate", f"{url}/gate")


def test_the_account_adds_up_when_the_feed_has_ended(serve, files, ingest):
    """Nobody lets go of pictures, so that slots run out: those frames are counted as well."""
    url, _ = serve(files[0])
    frames = Frames(keep=True)
    feed = follow(ingest(1), "gate", f"{url}/gate", frames, depth=1)
    wait_for(lambda: feed.status()["skipped"].get("overflow", 0) > 3)
    feed.stop()
    assert feed.join(10)
    status = feed.status()
    assert status["state"] == "disabled"
    assert status["decoded"] == len(frames.kept) + sum(status["skipped"].values())
    # The last frame may have waited for its slot when the end came.
    assert set(status["skipped"]) <= {"overflow", "removed"}
    assert len(frames.kept) == 5


def test_a_worker_that_crashes_costs_its_own_cameras_seconds_and_the_others_nothing(serve, files, ingest):
    url, _ = serve(*files)
    both = ingest(2)
    gate, hall = Frames(), Frames()
    feed = follow(both, "gate", f"{url}/gate", gate)
    other = follow(both, "hall", f"{url}/hall", hall)
    wait_for(lambda: len(gate.seen) > 5 and len(hall.seen) > 5)
    first, second = both.pids()
    last_seq, last_connection = gate.seen[-1][:2]
    before = len(hall.seen)
    os.kill(first, signal.SIGSEGV)
    statuses = []
    # It may be back before it is asked again.
    wait_for(lambda: statuses.append(feed.status()) or statuses[-1]["state"] == "backoff", 5)
    assert statuses[-1]["reason"] == "crashed"
    assert statuses[-1]["offline_s"] is not None
    wait_for(lambda: gate.seen[-1][0] > last_seq + 5)
    assert gate.seen[-1][1] > last_connection
    seqs = [seen[0] for seen in gate.seen]
    assert seqs == sorted(set(seqs)), "a frame number came twice"
    assert len(hall.seen) > before
    assert second in both.pids()
    assert first not in both.pids()
    status = feed.status()
    assert status["state"] == "streaming"
    assert status["offline_s"] is None
    assert status["reconnects"] == {"crashed": 1}
    assert other.status()["reconnects"] == {}
    feed.stop()
    assert feed.join(10)
    status = feed.status()
    assert status["decoded"] == len(gate.seen) + sum(status["skipped"].values())


def test_a_worker_that_hangs_is_started_again(serve, files, ingest, monkeypatch):
    monkeypatch.setattr("psdiff.runtime.ingest_processes.ANSWER_S", 1.0)
    url, _ = serve(files[0])
    one = ingest(1)
    frames = Frames()
    feed = follow(one, "gate", f"{url}/gate", frames)
    wait_for(lambda: len(frames.seen) > 3)
    [pid] = one.pids()
    os.kill(pid, signal.SIGSTOP)
    before = frames.seen[-1][1]
    wait_for(lambda: frames.seen[-1][1] > before)
    assert one.pids() != [pid]
    assert feed.status()["reconnects"] == {"crashed": 1}


def test_a_camera_that_waits_for_room_holds_up_no_other_of_its_worker(serve, files, ingest):
    url, _ = serve(*files)
    one = ingest(1)
    gate_opens = threading.Event()
    hall = Frames()

    def held(frame, now_s, deadline_s):
        gate_opens.wait(30)

    held_feed = follow(one, "gate", f"{url}/gate", held, depth=1, is_blocking=True)
    follow(one, "hall", f"{url}/hall", hall)
    wait_for(lambda: len(hall.seen) > 30)
    status = held_feed.status()
    assert status["skipped"] == {}
    gate_opens.set()


def test_a_picture_that_is_kept_survives_its_worker(serve, files, ingest):
    url, _ = serve(files[0])
    one = ingest(1)
    frames = Frames(keep=True)
    follow(one, "gate", f"{url}/gate", frames)
    wait_for(lambda: len(frames.kept) > 2)
    kept = frames.kept[0].image
    copy = kept.copy()
    os.kill(one.pids()[0], signal.SIGKILL)
    wait_for(lambda: frames.seen[-1][1] > 1)
    np.testing.assert_array_equal(kept, copy)


def test_workers_end_when_the_service_hangs_up(ingest):
    two = ingest(2)
    pids = two.pids()
    assert len(pids) == 2
    assert two.close(10)
    assert two.pids() == []
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(("cameras", "most"), [(0, 1), (1, 1), (4, 1), (5, 2)])
def test_a_worker_serves_four_cameras_as_far_as_there_are_cores(cameras, most, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert default_workers(cameras) == most
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert default_workers(100) == 2


def test_a_recording_that_is_played_out_is_not_played_again_by_a_new_worker(serve, files, ingest, tmp_path):
    video = write_video(tmp_path / "a.mp4", walk(10), fps=FPS)
    url, _ = serve(files[0])
    processes, seen, live = ingest(1), Frames(), Frames()
    file = follow(processes, "file", str(video), seen)
    follow(processes, "gate", f"{url}/gate", live)
    wait_for(lambda: file.status()["state"] == "ended")
    assert len(seen.seen) == 10
    wait_for(lambda: file.has_ended and len(live.seen) > 5)
    [pid] = processes.pids()
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: live.seen[-1][1] == 2)
    status = file.status()
    assert (status["state"], status["decoded"], status["reconnects"]) == ("ended", 10, {})
    assert len(seen.seen) == 10
    file.stop()
    assert file.join(5)
