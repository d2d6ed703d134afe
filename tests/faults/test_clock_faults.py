"""Faults 9 and 23: the camera's numbers and clock, and the clock of this machine."""

import time

import pytest
from psdiff.runtime.soak.clock_faults import HOUR_S, dated, jump, offset_s
from psdiff.runtime.soak.rtp_faults import CameraClock
from watched import films, survives, watch

__all__ = ["films", "watch"]


def test_09_time_goes_on_through_everything_that_a_camera_does_to_its_clock(watch):
    survives(9, watch())


@pytest.mark.parametrize("kind", ["ahead", "back", "zero", "wrap"])
def test_09_frames_keep_their_true_time_when_pts_jump(watch, kind):
    site = watch("gate", wait=False)
    site.proxies["gate"].fault = clock = CameraClock()
    site.wait_for_frames(["gate"], 20)
    dated(site, "gate")
    jump(clock, kind)
    since_s = time.monotonic()
    site.wait_for_frames(["gate"], 10, count=15)
    dated(site, "gate")
    for each in site.seen("gate", since_s + 0.5):
        assert -1 < each.since_capture_s < 5


def test_09_a_camera_whose_clock_is_set_is_no_longer_believed_and_says_so(watch):
    site = watch("gate", wait=False)
    site.proxies["gate"].fault = clock = CameraClock()
    site.wait_for_frames(["gate"], 20)
    dated(site, "gate")
    clock.offset_s = -HOUR_S
    site.wait(lambda: abs(offset_s(site, "gate") + HOUR_S) < 10, 10, "the offset must be told")
    since_s = time.monotonic()
    site.wait_for_frames(["gate"], 10)
    assert {each.source for each in site.seen("gate", since_s)} == {"arrival"}


def test_23_a_clock_that_is_set_disturbs_nobody(watch):
    survives(23, watch())
