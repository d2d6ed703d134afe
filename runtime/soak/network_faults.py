"""Faults of networks and servers: what is done to a camera's connection, and what the service must do.

Each takes the service and a random generator, leaves everything as it was, and returns the seconds until frames came
again. Each raises FaultError where its criterion is not kept.
"""

from __future__ import annotations

import random
import time

from .rtp_faults import FlippedBytes, LostPackets, NoFirstKeyFrame, NoReports
from .watched_service import FaultError, Seen, WatchedService

# After the fault is over.
BACK_S = 10.0

# A new session asks the camera for at most this long, and the wait before it is no longer.
OPEN_S, BACKOFF_S = 10.0, 6.0

# From the last byte on.
STALL_SEEN_S = 3.0


def absent(site: WatchedService, rng: random.Random) -> float:
    """1: the camera's port is closed."""
    name = rng.choice(site.plain)
    proxy = site.proxies[name]
    try:
        with site.others_undisturbed(name):
            proxy.refuse()
            site.wait(
                lambda: _state(site, name) == ("backoff", "refused"), 8, f"{name} must be in backoff(refused)"
            )
            time.sleep(1.5)
            if not site.camera(name)["offline_s"]:
                raise FaultError(f"{name} must tell since when it is offline, got nothing")
    finally:
        proxy.heal()
    return site.wait_for_frames([name], BACK_S)


def all_gone(site: WatchedService, rng: random.Random) -> float:
    """2: the server of all cameras dies and comes back."""
    names = site.streaming()
    try:
        site.server.kill()
        site.wait(lambda: not site.streaming(), 10, "all cameras must be seen offline")
        time.sleep(rng.uniform(0.5, 3))
        if not site.service.is_ready:
            raise FaultError("a service must be ready without cameras, got that it is not")
    finally:
        site.server.start()
    return site.wait_for_frames(names, BACK_S)


def mute(site: WatchedService, rng: random.Random) -> float:
    """3: the camera takes the connection and never speaks."""
    name = rng.choice(site.plain)
    proxy = site.proxies[name]
    try:
        with site.others_undisturbed(name):
            before = proxy.accepted
            proxy.mute()
            site.wait(lambda: proxy.accepted > before, BACKOFF_S, f"{name} must be tried again")
            what = f"{name} must be given up for its timeout"
            site.wait(lambda: _state(site, name) == ("backoff", "timeout"), OPEN_S, what)
    finally:
        proxy.heal()
    return site.wait_for_frames([name], BACK_S)


def stall(site: WatchedService, rng: random.Random) -> float:
    """4: the network stops forwarding, and goes on before or after the connection is given up."""
    name = rng.choice(site.plain)
    proxy = site.proxies[name]
    try:
        with site.others_undisturbed(name):
            seen_s = stall_seen_s(site, name)
            if seen_s > STALL_SEEN_S:
                raise FaultError(f"a stall must be seen within {STALL_SEEN_S:g} s, got {seen_s:.2f} s")
            if rng.random() < 0.5:
                site.wait(lambda: site.camera(name)["state"] == "backoff", 6, f"{name} must be given up")
    finally:
        proxy.heal()
    return site.wait_for_frames([name], BACK_S)


def stall_seen_s(site: WatchedService, name: str) -> float:
    """Stop a camera's network; returns the seconds from the last byte until the state is stalled."""
    site.proxies[name].stall()
    site.wait(lambda: site.camera(name)["state"] == "stalled", 10, f"{name} must be stalled")
    return time.monotonic() - site.proxies[name].forwarded_s


def slow_link(site: WatchedService, rng: random.Random) -> float:
    """5: the link carries less than the camera sends, or loses packets."""
    name = rng.choice(site.plain)
    proxy, began_s = site.proxies[name], time.monotonic()
    dropped = sum(site.camera(name)["dropped"].values())
    loses = rng.random() < 0.5
    try:
        with site.others_undisturbed(name):
            if loses:
                proxy.fault = LostPackets(rng, 0.2)
            else:
                proxy.bytes_per_s = 0.5 * proxy.usual_bytes_per_s()
            time.sleep(5)
    finally:
        proxy.heal()
    back_s = site.wait_for_frames([name], BACK_S)
    settings = site.site.settings(site.site.cameras[0])
    longest_s = max((each.queue_s for each in site.seen(name, began_s)), default=0.0)
    if longest_s > settings.max_staleness_ms / 1000 + 1 / site.fps:
        raise FaultError(f"frames must not wait longer than they may, got {longest_s:.2f} s")
    if sum(site.camera(name)["dropped"].values()) < dropped:
        raise FaultError("drops must be counted, got fewer than before")
    return back_s


def corrupt(site: WatchedService, rng: random.Random) -> float:
    """6: bytes of the video are flipped."""
    name = rng.choice(site.plain)
    before, flips, began_s = site.camera(name), FlippedBytes(rng, 0.3), time.monotonic()
    try:
        with site.others_undisturbed(name):
            site.proxies[name].fault = flips
            site.wait(lambda: flips.flipped >= 12, 20, f"packets of {name} must pass")
    finally:
        site.proxies[name].heal()
    back_s = site.wait_for_frames([name], BACK_S)
    after = site.camera(name)
    if after["corrupt_packets"] <= before["corrupt_packets"]:
        raise FaultError("damage must be counted, got none")
    crashes = after["reconnects"].get("crashed", 0) - before["reconnects"].get("crashed", 0)
    if crashes:
        raise FaultError(f"damage must not break the camera's thread, got {crashes} times")
    # Some flips make other, valid pictures; without a search for damage it would be most of them.
    seen = site.seen(name, began_s)
    smeared = sum(each.people != 1 or each.misplaced > 0 for each in seen)
    if smeared > 0.15 * len(seen):
        raise FaultError(f"damaged pictures must not be looked at, got {smeared} of {len(seen)}")
    # From the next key frame on everything is as it was.
    site.wait(lambda: _is_clean(site.seen(name)[-5:]), BACK_S, f"pictures of {name} must be whole again")
    return back_s


def resolution(site: WatchedService, rng: random.Random) -> float:
    """8: the size of the picture changes within the stream."""
    name, began_s = "resizes", time.monotonic()
    took_s = site.wait(
        lambda: len({each.size for each in site.seen(name, began_s)}) > 1,
        20,
        f"{name} must come in two sizes",
    )
    seen = site.seen(name, began_s)
    wrong = [each for each in seen if each.misplaced or each.people != 1]
    if wrong:
        raise FaultError(f"people must lie where they are, got {len(wrong)} of {len(seen)} frames elsewhere")
    return took_s


def no_reports(site: WatchedService, rng: random.Random) -> float:
    """10: the camera never sends a sender report."""
    name = rng.choice(site.plain)
    proxy = site.proxies[name]
    try:
        with site.others_undisturbed(name):
            before, connection, began_s = proxy.accepted, site.next_connection(name), time.monotonic()
            proxy.cut()
            proxy.fault = NoReports()
            site.wait(lambda: proxy.accepted > before, BACKOFF_S, f"{name} must be tried again")
            back_s = site.wait_for_frames([name], BACK_S, count=10, connection=connection)
    finally:
        proxy.heal()
    seen = site.seen(name, began_s, connection=connection)
    wrong = [each for each in seen if each.source != "arrival" or each.uncertainty_s <= 0]
    if wrong:
        raise FaultError(f"times must be of the arrival and uncertain, got {wrong[0]}")
    return back_s


def mid_group(site: WatchedService, rng: random.Random) -> float:
    """11: a stream with B-frames and long groups begins between two key frames."""
    name, skip = "long_groups", NoFirstKeyFrame()
    proxy = site.proxies[name]
    try:
        with site.others_undisturbed(name):
            before, connection, began_s = proxy.accepted, site.next_connection(name), time.monotonic()
            proxy.cut()
            proxy.fault = skip
            site.wait(lambda: proxy.accepted > before, BACKOFF_S, f"{name} must be tried again")
            # The next key frame is five seconds away.
            back_s = site.wait_for_frames([name], BACK_S + 5, connection=connection)
    finally:
        proxy.heal()
    if not skip.dropped:
        raise FaultError("the first key frame must be kept back, got none")
    seen = site.seen(name, began_s, connection=connection)
    if not _is_clean(seen):
        raise FaultError("no picture may be seen before its key frame, got smeared ones")
    return back_s


def _state(site: WatchedService, name: str) -> tuple[str, str | None]:
    status = site.camera(name)
    return status["state"], status["reason"]


def _is_clean(seen: list[Seen]) -> bool:
    return bool(seen) and all(each.people == 1 and not each.misplaced for each in seen)
