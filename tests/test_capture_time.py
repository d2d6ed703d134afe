"""Capture time: true where the camera tells it, honest where it does not, and never backwards."""

import itertools

import numpy as np
import pytest
from psdiff.runtime.capture_time import UNKNOWN_DELAY_S, Arrival, CaptureClock

NOON = 1_800_000_000.0
FPS = 10
DELAY_S = 0.3


def play(
    clock, count, *, pts=0.0, start=NOON, camera=0.0, references=True, jitter=None, monotonic=0.0, step=0.0
):
    """Frames at 10/s, captured from start on and 0.3 s (and jitter) under way; camera: its clock minus ours."""
    times = []
    for i in range(count):
        captured = start + i / FPS
        late = DELAY_S + (0 if jitter is None else jitter[i])
        arrival = Arrival(captured + late + step, monotonic + captured - NOON + late)
        reference = captured + camera if references else None
        times.append((captured, clock.time_of(pts + i / FPS, arrival, reference)))
    return times


def errors(times):
    return np.array([each.utc_s - captured for captured, each in times])


def assert_forward(*plays):
    utc = [each.utc_s for times in plays for _, each in times]
    assert all(earlier < later for earlier, later in itertools.pairwise(utc))


def test_a_camera_that_tells_its_clock_is_believed():
    times = play(CaptureClock(), 30, camera=0.05, jitter=np.random.default_rng(0).uniform(0, 0.4, 30))
    assert {each.source for _, each in times} == {"rtcp_sr"}
    np.testing.assert_allclose(errors(times), 0.05, atol=1e-5)
    assert_forward(times)


def test_a_report_of_one_connection_says_nothing_about_the_next():
    """The first was lost after three frames, so that the PTS of the second seem to go on."""
    clock = CaptureClock()
    before = play(clock, 3)
    assert before[-1][1].source == "rtcp_sr"
    clock.begin_connection()
    assert clock.camera_offset_s is None
    after = play(clock, 30, start=NOON + 5.0, references=False)
    assert {each.source for _, each in after} == {"arrival"}
    assert all(
        abs(error) <= each.uncertainty_s for (_, each), error in zip(after, errors(after), strict=True)
    )
    assert_forward(before, after)


def test_without_a_report_the_error_stays_within_what_is_said():
    times = play(CaptureClock(), 100, references=False, jitter=np.random.default_rng(0).exponential(0.2, 100))
    assert {each.source for _, each in times} == {"arrival"}
    for (_, each), error in zip(times, errors(times), strict=True):
        assert abs(error) <= each.uncertainty_s
    # The jitter of the way is not in the times: after a while frames lie 0.1 s apart, as they were captured.
    gaps = np.diff([each.utc_s for _, each in times[60:]])
    np.testing.assert_allclose(gaps, 1 / FPS, atol=0.02)


def test_the_first_report_takes_over():
    clock = CaptureClock()
    before = play(clock, 20, references=False)
    after = play(clock, 20, pts=2.0, start=NOON + 2)
    assert {each.source for _, each in before} == {"arrival"}
    assert {each.source for _, each in after} == {"rtcp_sr"}
    np.testing.assert_allclose(errors(after[5:]), 0, atol=1e-5)
    assert_forward(before, after)


@pytest.mark.parametrize(
    ("trust", "source"), [("auto", "arrival"), ("always", "rtcp_sr"), ("never", "arrival")]
)
def test_a_clock_that_is_wrong_by_an_hour_is_believed_only_by_order(trust, source):
    clock = CaptureClock(trust)
    times = play(clock, 20, camera=3600.0)
    assert {each.source for _, each in times} == {source}
    assert clock.camera_offset_s == pytest.approx(3600 - DELAY_S)


def test_one_report_that_jumps_is_not_believed():
    clock = CaptureClock("always")
    before = play(clock, 10)
    jump = play(clock, 2, pts=1.0, start=NOON + 1, camera=60.0)
    after = play(clock, 10, pts=1.2, start=NOON + 1.2)
    np.testing.assert_allclose(errors([*before, *jump, *after]), 0, atol=1e-5)
    assert_forward(before, jump, after)


def test_a_jump_that_is_told_three_times_is_the_new_time():
    clock = CaptureClock("always")
    play(clock, 10)
    jumped = play(clock, 5, pts=1.0, start=NOON + 1, camera=60.0)
    np.testing.assert_allclose(errors(jumped), [0, 0, 60, 60, 60], atol=1e-4)


def test_a_camera_clock_that_is_put_back_holds_time_until_it_is_caught_up():
    clock = CaptureClock("always")
    before = play(clock, 10, camera=1.0)
    after = play(clock, 30, pts=1.0, start=NOON + 1)
    assert_forward(before, after)
    held = after[0][1]
    assert held.uncertainty_s > 0.5  # it says so
    np.testing.assert_allclose(errors(after[15:]), 0, atol=1e-5)


@pytest.mark.parametrize("pts", [0.0, 1e5])
def test_pts_that_start_again_keep_the_time(pts):
    clock = CaptureClock()
    before = play(clock, 20, pts=500.0)
    after = play(clock, 20, pts=pts, start=NOON + 2)
    np.testing.assert_allclose(errors(after), 0, atol=1e-5)
    assert_forward(before, after)


@pytest.mark.parametrize("step", [-3600.0, 3600.0])
def test_the_clock_of_the_machine_is_put_right(step):
    clock = CaptureClock()
    play(clock, 20, references=False)
    after = play(clock, 20, pts=2.0, start=NOON + 2, references=False, step=step)
    for _, each in after:
        assert abs(each.utc_s - (NOON + 2 + step)) < 5


def test_frames_without_pts_are_dated_by_their_arrival():
    clock = CaptureClock()
    times = [clock.time_of(None, Arrival(NOON + i, i)) for i in range(3)]
    assert [each.utc_s for each in times] == [NOON + i - UNKNOWN_DELAY_S for i in range(3)]
    assert {each.source for each in times} == {"arrival"}


def test_reordered_frames_do_not_go_back():
    clock = CaptureClock()
    times = []
    for i, pts in enumerate([0.0, 0.3, 0.1, 0.2, 0.6, 0.4, 0.5]):
        times.append((0, clock.time_of(pts, Arrival(NOON + i / FPS, i / FPS), NOON + pts)))
    assert_forward(times)
