"""The loop between queues and detector: in time or dropped, fewer steps under load, and no end by a failure."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from psdiff.models.detections import Detections
from psdiff.runtime.batch_loop import BatchLoop
from psdiff.runtime.elastic_steps import CostTable, StepChooser, StepRange
from psdiff.runtime.frame_queues import FrameQueues, QueuePolicy

NOBODY = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros((0, 3), np.float32))
PROMISE_S = 0.25


class Stub:
    """A detector that takes as long as it is told: seconds for a batch, and for each step."""

    def __init__(self, fixed_s=0.004, step_s=0.001, fails=0):
        self.fixed_s, self.step_s, self.fails = fixed_s, step_s, fails
        self.calls = []

    def __call__(self, frames, steps):
        self.calls.append((len(frames), steps))
        if len(self.calls) <= self.fails:
            raise RuntimeError("out of memory")
        time.sleep(self.fixed_s + steps * self.step_s)
        return [NOBODY] * len(frames)


def loop(queues, detect, results, *, table=None, hold=2, most=4):
    table = table or {(1, 1): 0.005, (4, 1): 0.008}
    chooser = StepChooser(CostTable(table), StepRange(1, most, hold=hold))
    return BatchLoop(queues, detect, chooser, results.append)


def queues(cameras, max_batch=4, window_s=0.005, **policy):
    made = FrameQueues(max_batch, window_s)
    for camera in cameras:
        made.add(camera, QueuePolicy(**policy), time.monotonic())
    return made


def offer(queues, camera, left_s=PROMISE_S):
    now_s = time.monotonic()
    frame = SimpleNamespace(camera=camera)
    return queues.offer(camera, frame, now_s=now_s, deadline_s=now_s + left_s)


def play(queues, cameras, fps, seconds, is_over=lambda: False):
    """Cameras that do not wait, each in a thread of its own."""

    def feed(camera):
        start_s = time.monotonic()
        for i in range(int(fps * seconds)):
            time.sleep(max(0.0, start_s + i / fps - time.monotonic()))
            if is_over():
                return
            offer(queues, camera)

    threads = [threading.Thread(target=feed, args=(camera,)) for camera in cameras]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_frames_of_several_cameras_are_one_batch():
    each, stub, results = queues("abc"), Stub(), []
    for camera in "abc":
        offer(each, camera)
    assert loop(each, stub, results).work(time.monotonic()) == 0
    assert stub.calls == [(3, 1)]
    assert [result.frame.camera for result in results] == ["a", "b", "c"]
    for result in results:
        assert (result.steps, result.batch) == (1, 3)
        assert 0 <= result.queue_s < 0.1
        assert 0.004 < result.infer_s < 0.2
        assert result.late_s == pytest.approx(result.queue_s + result.infer_s - PROMISE_S, abs=0.01)


def test_it_says_how_long_there_is_nothing_to_do():
    each, stub = queues("ab", window_s=0.05), Stub()
    work = loop(each, stub, [])
    assert work.work(time.monotonic()) == pytest.approx(0.1)
    offer(each, "a")
    assert 0.02 < work.work(time.monotonic()) <= 0.05
    assert stub.calls == []


def test_what_is_late_is_dropped_and_the_rest_is_computed():
    each, stub, results = queues("abc"), Stub(), []
    offer(each, "a", left_s=-0.1)
    offer(each, "b", left_s=0.001)
    offer(each, "c", left_s=0.2)
    loop(each, stub, results).work(time.monotonic())
    assert [result.frame.camera for result in results] == ["c"]
    assert [dict(each.account(camera).dropped) for camera in "abc"] == [{"deadline": 1}, {"deadline": 1}, {}]


def test_a_batch_that_fails_is_dropped_and_the_loop_goes_on(caplog):
    each, stub, results = queues("a"), Stub(fails=2), []
    work = loop(each, stub, results)
    for _ in range(4):
        offer(each, "a")
        work.work(time.monotonic())
    assert len(results) == 2
    assert each.account("a").dropped == {"failed": 2}
    assert "a batch of 1 frames at K = 1 failed" in caplog.text


def test_steps_rise_with_time_and_fall_under_load():
    """Four times as slow for a while: K falls to the least, and rises again."""
    cameras = [f"camera-{i}" for i in range(4)]
    each, stub, results = queues(cameras), Stub(fixed_s=0.01, step_s=0.01), []
    table = {(1, 1): 0.02, (4, 1): 0.05, (1, 4): 0.02, (4, 4): 0.05}
    work = loop(each, stub, results, table=table)
    work.start()
    over = threading.Event()
    playing = threading.Thread(target=play, args=(each, cameras, 8, 12.0, over.is_set))
    playing.start()
    for costs, steps in (((0.01, 0.01), 4), ((0.04, 0.12), 1), ((0.01, 0.01), 4)):
        stub.fixed_s, stub.step_s = costs
        end_s = time.monotonic() + 4
        while not (results and results[-1].steps == steps):
            assert time.monotonic() < end_s, f"K = {results[-1].steps} instead of {steps}"
            time.sleep(0.01)
    over.set()
    playing.join()
    assert work.stop(5)


def test_overload_keeps_the_promise_by_dropping_and_starves_nobody():
    """Sixteen cameras bring four times what the detector can do."""
    cameras = [f"camera-{i:02}" for i in range(16)]
    each, results = queues(cameras, max_batch=4, min_fps=1.0, depth=2), []
    stub = Stub(fixed_s=0.1, step_s=0.0)
    work = loop(each, stub, results, table={(1, 1): 0.1, (4, 1): 0.1, (1, 4): 0.1, (4, 4): 0.1})
    work.start()
    play(each, cameras, fps=10, seconds=4.0)
    assert work.stop(5)
    late = sorted(result.late_s for result in results)
    # The promise of 250 ms, and one frame of 100 ms.
    assert late[int(0.99 * len(late))] <= 0.1
    for camera in cameras:
        account = each.account(camera)
        assert account.offered == 40 == account.taken + account.dropped.total() + each.waiting(camera)
        assert account.taken >= 3, "a frame a second, at the least"


def test_stopping_waits_for_the_batch_under_way():
    each, results = queues("a"), []
    work = loop(each, Stub(fixed_s=0.3), results, table={(1, 1): 0.01, (2, 1): 0.02})
    work.start()
    offer(each, "a")
    time.sleep(0.1)
    assert not work.stop(0.01)
    assert work.stop(5)
    assert len(results) == 1
