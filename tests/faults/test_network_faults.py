"""Faults 1 to 6, 8, 10 and 11: networks, servers, and what cameras send."""

import time

import pytest
from watched import films, survives, watch

__all__ = ["films", "watch"]


def test_01_a_camera_that_is_absent_at_the_start_is_waited_for(watch):
    site = watch("gate", "hall", away=["hall"])
    site.wait(lambda: site.camera("hall")["reason"] == "refused", 10, "hall must be refused")
    assert site.service.is_ready
    assert site.camera("hall")["state"] == "backoff"
    since_s = time.monotonic()
    time.sleep(1)
    assert len(site.seen("gate", since_s)) >= 5, "the other is at full rate"
    site.proxies["hall"].listen()
    site.wait_for_frames(["hall"], 10)


def test_01_a_camera_that_goes_away_comes_back(watch):
    survives(1, watch())


def test_02_all_cameras_are_back_ten_seconds_after_their_server(watch):
    assert survives(2, watch()) <= 10


def test_03_a_camera_that_never_speaks_is_given_up(watch):
    site = watch()
    survives(3, site)
    reconnects = [site.camera(name)["reconnects"] for name in site.plain]
    assert sum(each.get("timeout", 0) for each in reconnects) >= 1


@pytest.mark.parametrize("seed", [2, 1], ids=["given up", "goes on"])
def test_04_a_stalled_connection_is_seen_in_three_seconds(watch, seed):
    survives(4, watch(), seed)


@pytest.mark.parametrize("seed", [1, 2], ids=["slow", "lossy"])
def test_05_a_bad_link_costs_frames_and_not_time(watch, seed):
    survives(5, watch(), seed)


def test_06_flipped_bytes_are_counted_and_not_looked_at(watch):
    site = watch()
    survives(6, site)
    assert sum(site.camera(name)["skipped"].get("corrupt", 0) for name in site.plain) > 0


def test_08_boxes_follow_the_size_of_the_picture(watch):
    site = watch("gate", "resizes")
    survives(8, site)
    sizes = [each.size for each in site.seen("resizes")]
    assert set(sizes) == {(640, 360), (320, 180)}


def test_10_without_sender_reports_time_is_that_of_arrival(watch):
    survives(10, watch())


def test_11_nothing_is_seen_before_the_first_key_frame(watch):
    site = watch("gate", "long_groups")
    survives(11, site)
    assert {each.people for each in site.seen("long_groups")} == {1}
