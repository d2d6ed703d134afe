"""The state of a connection: when it stalls, when the next try is, and that cameras do not come back in step."""

import itertools
import random
import threading
import time

import pytest
from psdiff.runtime.connection import (
    LONGEST_WAIT_S,
    PATIENT_WAIT_S,
    Connection,
    HostLimit,
    Reason,
    State,
)


def connection(seed=0):
    return Connection(0.0, rng=random.Random(seed))


def stream(each, start_s, seconds, fps=10):
    for i in range(int(seconds * fps)):
        each.frame(start_s + i / fps)
    return start_s + (int(seconds * fps) - 1) / fps


def test_a_camera_is_offline_until_its_first_frame():
    each = connection()
    assert (each.state, each.offline_since_s) == (State.CONNECTING, 0.0)
    each.frame(1.5)
    assert (each.state, each.since_s, each.offline_since_s) == (State.STREAMING, 1.5, None)


@pytest.mark.parametrize(("fps", "stall_s"), [(25, 2.5), (10, 2.5), (1, 5.0), (0.5, 10.0)])
def test_frames_that_stay_away_are_a_stall_by_the_rate_of_the_camera(fps, stall_s):
    each = connection()
    last_s = stream(each, 0.0, 60, fps)
    assert not each.check(last_s + stall_s - 0.01)
    assert each.check(last_s + stall_s + 0.01)
    assert (each.state, each.offline_since_s) == (State.STALLED, last_s)


def test_one_long_gap_at_the_beginning_does_not_make_stalls_longer():
    each = connection()
    each.frame(0.0)
    last_s = stream(each, 2.0, 1.0)
    assert each.check(last_s + 3.01)


def test_connections_that_are_lost_after_two_frames_do_not_make_stalls_longer():
    each = connection()
    for begin_s in range(0, 200, 10):
        each.connect(begin_s)
        each.frame(begin_s + 1.0)
        each.frame(begin_s + 3.0)
        each.fail(Reason.LOST, begin_s + 5.0)
    each.connect(300.0)
    last_s = stream(each, 301.0, 1.0)
    assert each.check(last_s + 3.01)


def test_time_without_frames_is_summed_and_a_late_frame_ends_the_stall():
    each = connection()
    last_s = stream(each, 0.0, 10)
    each.check(last_s + 4)
    each.frame(last_s + 6)
    assert (each.state, each.offline_since_s, each.stalled_s) == (State.STREAMING, None, pytest.approx(2.0))
    last_s = stream(each, last_s + 6.1, 5)
    each.check(last_s + 4)
    each.fail(Reason.LOST, last_s + 5)
    assert each.stalled_s == pytest.approx(3.0)
    assert each.offline_since_s == last_s


def failures(each, reason, count):
    """Waits after one failure after the other."""
    now_s, waits = 0.0, []
    for _ in range(count):
        retry_s = each.fail(reason, now_s)
        waits.append(retry_s - now_s)
        assert each.retry_s == retry_s
        now_s = retry_s
        each.connect(now_s)
    return waits


def test_waits_grow_and_stay_below_what_the_promise_allows():
    waits = [failures(connection(seed), Reason.REFUSED, 12) for seed in range(300)]
    longest = [max(column) for column in zip(*waits, strict=True)]
    for found, bound in zip(longest, [0.5, 1, 2, 4, *[LONGEST_WAIT_S] * 8], strict=True):
        assert 0.95 * bound < found <= bound


def test_cameras_that_were_lost_together_do_not_come_back_together():
    waits = sorted(failures(connection(seed), Reason.LOST, 6)[-1] for seed in range(16))
    assert max(later - earlier for earlier, later in itertools.pairwise(waits)) < 2
    assert waits[-1] - waits[0] > 2


@pytest.mark.parametrize("reason", [Reason.AUTH_FAILED, Reason.NOT_FOUND, Reason.UNSUPPORTED])
def test_what_a_new_try_does_not_mend_is_tried_seldom(reason):
    for wait_s in failures(connection(), reason, 5):
        assert 0.8 * PATIENT_WAIT_S <= wait_s <= 1.2 * PATIENT_WAIT_S


def test_waits_start_short_again_after_half_a_minute_without_a_fault():
    for healthy_s, most_s in ((29, LONGEST_WAIT_S), (32, 0.5)):
        waits = []
        for seed in range(200):
            each = connection(seed)
            failures(each, Reason.LOST, 8)
            last_s = stream(each, 1000.0, healthy_s)
            waits.append(each.fail(Reason.LOST, last_s) - last_s)
        assert 0.9 * most_s < max(waits) <= most_s


def test_failures_are_counted_by_reason():
    each = connection()
    for reason in (Reason.LOST, Reason.TIMEOUT, Reason.LOST):
        each.fail(reason, 1.0)
    assert each.reconnects == {Reason.LOST: 2, Reason.TIMEOUT: 1}
    assert each.reason is Reason.LOST
    each.frame(2.0)
    assert each.reason is None


def test_a_camera_that_is_switched_off_waits_for_nothing():
    each = connection()
    each.fail(Reason.LOST, 1.0)
    each.disable(2.0)
    assert (each.state, each.retry_s, each.check(1e9)) == (State.DISABLED, None, False)


def test_a_host_is_not_asked_by_all_cameras_at_once():
    limit, now, most = HostLimit(4), {"a": 0, "b": 0}, {"a": 0, "b": 0}
    lock = threading.Lock()

    def connect(host):
        with limit.connecting(host):
            with lock:
                now[host] += 1
                most[host] = max(most[host], now[host])
            time.sleep(0.02)
            with lock:
                now[host] -= 1

    threads = [threading.Thread(target=connect, args=(host,)) for host in ("a", "b") * 16]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert most == {"a": 4, "b": 4}
