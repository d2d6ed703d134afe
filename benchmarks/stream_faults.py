"""Cameras that are lost: how soon their loss is seen, how soon they are back, and what it leaves behind.

Parts of bench_streams.
"""

from __future__ import annotations

import time
from typing import Any

from ..runtime.soak.network_faults import stall_seen_s
from ..runtime.soak.resources import Sample, sample
from ..runtime.soak.service_faults import worker_ids
from ..runtime.soak.watched_service import WatchedService
from .stream_load import FPS, Setting

BACK_S, STALL_SEEN_S = 10.0, 3.0

# How long the server is away: the cameras' waits have grown to their longest by then.
AWAY_S = 12.0

# Threads of connections that were lost a moment ago still end.
QUIET_S = 6.0


def recovery(setting: Setting) -> dict[str, Any]:
    """The server of all cameras dies and comes back: when the first and the last one send again."""
    rows = []
    with _watched(setting, "recovery") as site:
        site.wait_for_frames(site.proxies, 60)
        for i in range(setting.repeats):
            setting.advance(f"the server dies for the {i + 1}. time", i / setting.repeats)
            site.server.kill()
            site.wait(lambda: not site.streaming(), 15, "all cameras must be seen offline")
            time.sleep(AWAY_S)
            site.server.start()
            back_s = _back_s(site)
            rows.append({"cameras": setting.cameras, "first_s": min(back_s), "last_s": max(back_s)})
    worst_s = max(row["last_s"] for row in rows)
    return {
        "away_s": AWAY_S,
        "rows": rows,
        "worst_s": worst_s,
        "bars": {"all back in 10 s": worst_s <= BACK_S},
    }


def stall(setting: Setting) -> dict[str, Any]:
    """The network stops in mid-stream, over and over: when that is seen, and whether anything stays behind."""
    with _watched(setting, "stall") as site:
        site.wait_for_frames(site.proxies, 60)
        time.sleep(QUIET_S)
        seen_s, before, cycles = [], sample(worker_ids(site)), 0
        while cycles < setting.cycles:
            setting.advance(f"{cycles} of {setting.cycles} cycles", cycles / setting.cycles)
            seen_s += _round(site)
            cycles += len(site.proxies)
        time.sleep(QUIET_S)
        after = _least(sample(worker_ids(site)), site)
    worst_s = max(seen_s)
    row = {
        "cameras": setting.cameras,
        "cycles": cycles,
        "seen_s_worst": worst_s,
        "threads_before": before.threads,
        "threads_after": after.threads,
        "files_before": before.files,
        "files_after": after.files,
        "rss_mb_before": round(before.rss_mb, 1),
        "rss_mb_after": round(after.rss_mb, 1),
    }
    bars = {
        "a stall is seen in 3 s": worst_s <= STALL_SEEN_S,
        "no threads stay behind": after.threads <= before.threads,
        "no files stay behind": after.files <= before.files,
    }
    return {"rows": [row], "bars": bars}


def _watched(setting: Setting, name: str) -> WatchedService:
    return WatchedService(
        setting.folder / name, setting.clips(setting.cameras), fps=FPS, changes=setting.changes()
    )


def _back_s(site: WatchedService) -> list[float]:
    """Seconds from now to the first frame of each camera."""
    since_s, back_s = time.monotonic(), {}

    def are_back() -> bool:
        for name in site.proxies:
            if name not in back_s and (seen := site.seen(name, since_s)):
                back_s[name] = seen[0].at_s - since_s
        return len(back_s) == len(site.proxies)

    site.wait(are_back, 60, "all cameras must be back")
    return list(back_s.values())


def _round(site: WatchedService) -> list[float]:
    """Stall all cameras at once, cut them when they are seen, and wait until all are back."""
    names = list(site.proxies)
    for name in names[1:]:
        site.proxies[name].stall()
    seen_s = {names[0]: stall_seen_s(site, names[0])}

    def are_seen() -> bool:
        for each in site.service.cameras():
            name = each["camera"]
            if name not in seen_s and each["state"] == "stalled":
                seen_s[name] = time.monotonic() - site.proxies[name].forwarded_s
        return len(seen_s) == len(names)

    site.wait(are_seen, 15, "all cameras must be stalled")
    for proxy in site.proxies.values():
        proxy.cut()
        proxy.heal()
    _back_s(site)
    # The frame may have been one of the old connection; only a camera that streams can stall.
    site.wait(lambda: _stream(site), 60, "all cameras must stream")
    return list(seen_s.values())


def _stream(site: WatchedService) -> bool:
    return all(each["state"] == "streaming" for each in site.service.cameras())


def _least(found: Sample, site: WatchedService) -> Sample:
    """What is there when nothing is on its way: the least of some seconds."""
    for _ in range(10):
        time.sleep(1)
        again = sample(worker_ids(site))
        if (again.threads, again.files) < (found.threads, found.files):
            found = again
    return found
