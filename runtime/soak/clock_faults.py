"""Faults of clocks: the camera's numbers, the camera's time of day, and the time of day of this machine.

As in network_faults.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .network_faults import BACK_S
from .rtp_faults import CameraClock
from .watched_service import FaultError, WatchedService

HOUR_S = 3600.0

# A capture time further from the arrival is wrong: all cameras of the soak are on this machine.
MOST_AGE_S = 5.0


def camera_clock(site: WatchedService, rng: random.Random) -> float:
    """9: PTS jump, start again and overflow, and the camera's time of day is set by an hour."""
    name = rng.choice(site.plain)
    backwards = site.backwards[name]
    worst_s = 0.0
    clock = CameraClock()
    with site.others_undisturbed(name):
        try:
            site.proxies[name].fault = clock
            dated(site, name)
            for kind in ("ahead", "back", "zero", "wrap"):
                jump(clock, kind)
                worst_s = max(worst_s, site.wait_for_frames([name], BACK_S), dated(site, name))
            clock.offset_s = HOUR_S
            site.wait(
                lambda: abs(offset_s(site, name) - HOUR_S) < 10, BACK_S, "the clock offset must be told"
            )
            site.wait_for_frames([name], BACK_S)
        finally:
            site.proxies[name].heal()
    worst_s = max(worst_s, site.wait_for_frames([name], BACK_S))
    if site.backwards[name] != backwards:
        raise FaultError(f"time must not go back, got {site.backwards[name] - backwards} frames")
    far = [each for each in site.seen(name)[-50:] if not -1 < each.since_capture_s < MOST_AGE_S]
    if far:
        raise FaultError(f"capture must be just before arrival, got {far[0].since_capture_s:.1f} s before it")
    return worst_s


def jump(clock: CameraClock, kind: str) -> None:
    """Move the camera's PTS: ahead or back by an hour, to zero, or to just before the end of its 32 bits."""
    if kind == "ahead":
        clock.pts_shift_s += HOUR_S
    elif kind == "back":
        clock.pts_shift_s -= 2 * HOUR_S
    else:
        clock.wraps_in_s = 0.0 if kind == "zero" else 1.0


def dated(site: WatchedService, name: str) -> float:
    """Seconds until frames carry the camera's own time again."""
    since_s = time.monotonic()

    def is_dated() -> bool:
        seen = site.seen(name, since_s)
        return bool(seen) and seen[-1].source == "rtcp_sr"

    return site.wait(is_dated, BACK_S, f"{name} must be dated by its own clock")


def offset_s(site: WatchedService, name: str) -> float:
    """The camera's clock minus ours, as the service tells it."""
    return site.camera(name)["clock_offset_s"] or 0.0


def host_clock(site: WatchedService, rng: random.Random) -> float:
    """23: the clock of this machine is set by an hour, and back."""
    names = site.streaming()
    before = {name: site.camera(name)["reconnects"] for name in names}
    with site.others_undisturbed(), site.times_may_go_back():
        with wall_clock_off_by(rng.choice((-1, 1)) * HOUR_S):
            site.wait_for_frames(names, BACK_S)
            time.sleep(1)
            for name in names:
                age_s = site.seen(name)[-1].since_capture_s
                if not -1 < age_s < MOST_AGE_S:
                    raise FaultError(
                        f"times must follow the clock, got {age_s:.1f} s between capture and now"
                    )
        worst_s = site.wait_for_frames(names, BACK_S)
    for name in names:
        if site.camera(name)["reconnects"] != before[name]:
            raise FaultError(f"{name} must stay connected, got {site.camera(name)['reconnects']}")
    return worst_s


@contextmanager
def wall_clock_off_by(seconds: float) -> Iterator[None]:
    """Set the time of day of this process, as far as it asks time.time; monotonic clocks go on."""
    real = time.time
    time.time = lambda: real() + seconds
    try:
        yield
    finally:
        time.time = real
