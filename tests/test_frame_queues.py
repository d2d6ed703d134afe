"""Queues of many cameras: nothing unaccounted, earliest deadline first, every camera its share."""

import itertools
import threading
import time

import numpy as np
import pytest
from psdiff.runtime.frame_queues import FrameQueues, QueuePolicy

CAMERAS = ("gate", "hall", "lift")


def queues(max_batch=4, window_s=0.02, cameras=CAMERAS, **policy):
    made = FrameQueues(max_batch, window_s)
    for camera in cameras:
        made.add(camera, QueuePolicy(**policy), 0.0)
    return made


def offer(queues, camera, content, now_s, deadline_s=None):
    return queues.offer(
        camera, content, now_s=now_s, deadline_s=now_s + 0.25 if deadline_s is None else deadline_s
    )


def contents(batch):
    return [frame.content for frame in batch]


def test_the_earliest_deadline_goes_first():
    each = queues(max_batch=2)
    for camera, content, deadline_s in (("gate", "late", 3.0), ("hall", "soon", 1.0), ("lift", "then", 2.0)):
        offer(each, camera, content, 0.1, deadline_s)
    assert contents(each.take(0.2)) == ["soon", "then"]
    assert contents(each.take(0.2)) == ["late"]
    assert each.take(0.2) == []


def test_a_camera_gives_no_more_than_its_share_while_others_wait():
    each = queues(max_batch=4)
    for i in range(6):
        offer(each, "gate", f"gate {i}", 0.1 + i / 100, deadline_s=0.2)
    offer(each, "hall", "hall", 0.2, deadline_s=9.0)
    assert contents(each.take(0.2)) == ["gate 0", "gate 1", "hall"]
    assert contents(each.take(0.2)) == ["gate 2", "gate 3", "gate 4", "gate 5"]


def test_a_camera_below_its_least_rate_goes_before_a_more_urgent_one():
    each = queues(max_batch=1, min_fps=2.0)
    for i in range(20):
        now_s = i / 10
        offer(each, "gate", "gate", now_s, now_s + 0.1)
        offer(each, "hall", "hall", now_s, now_s + 9.0)
        each.take(now_s)
    assert (
        each.account("hall").taken == 3
    )  # 0.6 s after the one before, each: twice a second, at the next batch
    assert each.account("gate").taken == 17


def test_freshest_keeps_the_newest_alone():
    each = queues(mode="freshest")
    for i in range(5):
        offer(each, "gate", i, i / 100)
    assert contents(each.take(0.05)) == [4]
    account = each.account("gate")
    assert (account.offered, account.taken, dict(account.dropped)) == (5, 1, {"stale": 4})


def test_bounded_drops_the_oldest_when_full_and_what_waited_too_long():
    each = queues(max_batch=9, depth=3, max_staleness_s=0.5)
    for i in range(5):
        offer(each, "gate", i, i / 10, deadline_s=9.0)
    assert each.account("gate").dropped == {"overflow": 2}
    assert contents(each.take(0.85)) == [4]  # 2 and 3 are 0.65 and 0.55 s old
    assert each.account("gate").dropped == {"overflow": 2, "stale": 2}


def test_every_frame_waits_for_room_and_drops_nothing():
    each = queues(mode="every_frame", depth=2, max_staleness_s=0.001, cameras=["file"])
    got = []

    def read():
        for i in range(50):
            assert offer(each, "file", i, time.monotonic())

    reader = threading.Thread(target=read)
    reader.start()
    while len(got) < 50:
        got += contents(each.take(time.monotonic()))
        assert each.waiting("file") <= 2
    reader.join(5)
    assert got == list(range(50))
    assert each.account("file").dropped.total() == 0


def test_who_waits_for_room_gives_up_in_time_or_when_the_camera_goes():
    each = queues(mode="every_frame", depth=1, cameras=["file"])
    offer(each, "file", 0, 0.0)
    assert not each.offer("file", 1, now_s=0.0, deadline_s=1.0, wait_s=0.05)
    threading.Timer(0.1, each.remove, ["file"]).start()
    began = time.monotonic()
    assert not offer(each, "file", 2, 0.0)
    assert 0.05 < time.monotonic() - began < 2
    account = each.account("file")
    assert (account.offered, dict(account.dropped)) == (1, {"removed": 1})


def test_a_batch_is_due_at_once_when_it_cannot_grow():
    each = queues(max_batch=2, window_s=0.02)
    assert each.due_s(0.0) is None
    offer(each, "gate", 0, 1.0)
    assert each.due_s(1.005) == pytest.approx(1.02)
    offer(each, "hall", 0, 1.01)
    assert each.due_s(1.011) == 1.011  # full
    each.take(1.02)
    other = queues(max_batch=9, window_s=0.02)
    for camera in CAMERAS:
        offer(other, camera, 0, 1.0)
    assert other.due_s(1.001) == 1.001  # every camera is in


def test_what_cannot_be_done_in_time_makes_room_for_what_can():
    each = queues(max_batch=2)
    for camera, deadline_s in zip(CAMERAS, (1.05, 1.2, 1.3), strict=True):
        offer(each, camera, camera, 1.0, deadline_s)
    counts = []

    def needed_s(count):
        counts.append(count)
        return 0.1

    assert contents(each.take(1.0, needed_s)) == ["hall", "lift"]
    assert each.account("gate").dropped == {"deadline": 1}
    assert max(counts) == 2  # as many as a batch can hold


def test_frames_of_a_camera_keep_their_order_when_its_clock_is_put_back():
    each = queues()
    for i, deadline_s in enumerate((3.0, 1.0, 2.0)):
        offer(each, "gate", i, 0.1, deadline_s)
    assert contents(each.take(0.2)) == [0, 1, 2]


def test_a_file_is_never_too_late():
    each = queues(mode="every_frame", cameras=["file"])
    offer(each, "file", 0, 1.0, deadline_s=1.0)
    assert contents(each.take(99.0, lambda count: 9.0)) == [0]


def test_frames_that_were_taken_in_vain_are_dropped():
    each = queues()
    offer(each, "gate", 0, 0.0)
    offer(each, "hall", 0, 0.0)
    each.drop(each.take(0.1)[:1], "deadline")
    assert [each.account(camera).dropped["deadline"] for camera in ("gate", "hall")] == [1, 0]
    assert [each.account(camera).taken for camera in ("gate", "hall")] == [0, 1]


@pytest.mark.parametrize("mode", ["freshest", "bounded"])
def test_nothing_is_unaccounted_and_frames_of_a_camera_keep_their_order(mode):
    rng = np.random.default_rng(0)
    each = queues(max_batch=3, depth=4, max_staleness_s=0.05, mode=mode)
    numbers = {camera: itertools.count() for camera in CAMERAS}
    seen = {camera: [-1] for camera in CAMERAS}
    now_s = 0.0
    for _ in range(3000):
        now_s += rng.exponential(0.01)
        camera = CAMERAS[rng.integers(3)]
        if rng.random() < 0.6:
            offer(each, camera, next(numbers[camera]), now_s, now_s + rng.uniform(0.1, 0.3))
        else:
            for frame in each.take(now_s):
                if mode == "freshest":
                    assert frame.content > seen[frame.camera][-1]
                seen[frame.camera].append(frame.content)
    for camera in CAMERAS:
        account = each.account(camera)
        assert account.offered == account.taken + account.dropped.total() + each.waiting(camera)
        assert account.taken == len(seen[camera]) - 1 > 100
        assert len(set(seen[camera])) == len(seen[camera])


def test_many_threads_lose_nothing():
    each = queues(max_batch=4, cameras=[f"camera-{i}" for i in range(8)], depth=2)
    taken = []

    def feed(camera):
        for i in range(500):
            offer(each, camera, i, time.monotonic())

    feeders = [threading.Thread(target=feed, args=(f"camera-{i}",)) for i in range(8)]
    for feeder in feeders:
        feeder.start()
    while any(feeder.is_alive() for feeder in feeders) or each.due_s(0.0) is not None:
        taken += each.take(time.monotonic())
    accounts = [each.account(f"camera-{i}") for i in range(8)]
    assert sum(account.taken for account in accounts) == len(taken) > 0
    for account in accounts:
        assert account.offered == 500 == account.taken + account.dropped.total()


def test_a_removed_camera_takes_its_frames_along_and_may_come_back():
    each = queues()
    offer(each, "gate", 0, 0.0)
    each.remove("gate")
    assert not offer(each, "gate", 1, 0.1)
    assert each.take(0.1) == []
    each.add("gate", QueuePolicy(), 0.2)
    with pytest.raises(ValueError, match="camera must be new, got gate"):
        each.add("gate", QueuePolicy(), 0.2)
    offer(each, "gate", 2, 0.3)
    assert contents(each.take(0.3)) == [2]
    assert each.account("gate").dropped == {"removed": 1}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QueuePolicy(depth=0), "depth must be a whole number >= 1, got 0"),
        (lambda: QueuePolicy(max_staleness_s=0), "max_staleness_s must be > 0 and min_fps >= 0, got 0 and 1"),
        (lambda: FrameQueues(0, 0.1), "max_batch must be >= 1 and window_s >= 0, got 0 and 0.1"),
    ],
)
def test_settings_without_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_batch_is_smaller_where_that_brings_frames_in_time():
    """Four frames take longer than any of them has; dropping all of them would bring none."""
    each = queues(max_batch=4, cameras="abcd")
    for camera in "abcd":
        offer(each, camera, camera, 0.0, deadline_s=0.25)
    assert contents(each.take(0.0, lambda count: 0.1 * count)) == ["a", "b"]
    assert sum(each.account(camera).dropped["deadline"] for camera in "abcd") == 0
    assert sum(each.waiting(camera) for camera in "abcd") == 2


def test_a_camera_that_was_not_served_for_long_is_not_dropped_for_the_others():
    """Together they take too long for its frame, which is the oldest; so it was the last time, and so it will be."""
    each = queues(max_batch=4, cameras=["gate", "hall", "lift", "yard"], min_fps=1.0)
    for now_s in (4.8, 5.0):
        for camera in ("hall", "lift", "yard"):
            offer(each, camera, camera, now_s, deadline_s=now_s + 0.5)
        if now_s < 5:
            assert len(each.take(now_s)) == 3
    offer(each, "gate", "gate", 5.0, deadline_s=5.15)
    assert contents(each.take(5.0, lambda count: 0.1 * count)) == ["gate"]
    assert contents(each.take(5.1, lambda count: 0.1 * count)) == ["hall", "lift", "yard"]


def test_a_camera_is_behind_when_its_frames_are_dropped_instead_of_taken():
    queues = FrameQueues(1, 0.0)
    queues.add("gate", QueuePolicy(depth=1, max_staleness_s=100.0, min_fps=1.0), 0.0)
    queues.add("rare", QueuePolicy(min_fps=1.0), 0.0)
    queues.offer("gate", "a", now_s=0.1, deadline_s=100.0)
    assert not queues.is_behind(5.0), "it is slow, but nothing of it was dropped"
    queues.offer("gate", "b", now_s=0.2, deadline_s=100.0)
    assert not queues.is_behind(0.9), "it was served, or came, less than a second ago"
    assert queues.is_behind(1.1)
    assert [each.content for each in queues.take(1.2)] == ["b"]
    assert not queues.is_behind(1.3)
    queues.offer("gate", "late", now_s=2.0, deadline_s=2.1)
    assert queues.take(2.5) == []
    assert queues.is_behind(2.6)
