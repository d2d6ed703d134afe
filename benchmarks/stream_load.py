"""Cameras that send more and more: what is scheduled, and how old it gets. Parts of bench_streams."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ..bundle import load_manifest
from ..runtime.detector import shipped_bundle
from ..runtime.soak.resources import sample
from ..runtime.soak.service_faults import worker_ids
from ..runtime.soak.stub_detector import StubDetector, stub_manifest
from ..runtime.soak.watched_service import Seen, WatchedService
from ..runtime.step_costs import cost_table
from ..runtime.verified import open_proven

FPS = 5
PROMISE_S = 0.5

# The detector of scheduling, for each batch.
STUB_S = 0.005

# Connections, first sender reports and the chooser of K settle.
SETTLE_S = 8.0


@dataclass(frozen=True)
class Setting:
    """What the parts measure."""

    folder: Path
    clip: Path
    seconds: float
    cameras: int
    repeats: int
    cycles: int
    counts: Sequence[int]
    isolation: str | None
    advance: Callable[[str, float], None]
    """What is being done, and the share of it that is done."""

    def changes(self) -> dict[str, Any]:
        """Keys of the site."""
        keys: dict[str, Any] = {"promise": {"latency_ms": 1000 * PROMISE_S}}
        return keys | ({"ingest": {"isolation": self.isolation}} if self.isolation else {})

    def clips(self, cameras: int) -> dict[str, Path]:
        """Camera -> clip."""
        return {f"cam{i + 1}": self.clip for i in range(cameras)}

    def sleep(self, what: str, seconds: float) -> None:
        """Wait, with progress."""
        end_s = time.monotonic() + seconds
        while (left_s := end_s - time.monotonic()) > 0:
            self.advance(what, 1 - left_s / seconds)
            time.sleep(min(0.5, left_s))


def scheduling(setting: Setting) -> dict[str, Any]:
    """Many cameras and a stub of 5 ms a batch: what becomes of the frames, and how long they wait."""
    stub = StubDetector(STUB_S, looks=False)
    site = WatchedService(
        setting.folder / "scheduling",
        setting.clips(setting.cameras),
        fps=FPS,
        model=(stub_manifest(), stub, stub.table()),
        changes=setting.changes(),
        proxied=False,
    )
    try:
        site.wait_for_frames(site.proxies, 60)
        setting.sleep("settling", SETTLE_S)
        began_s, cpu_s, before = time.monotonic(), _cpu_s(site), sample(worker_ids(site))
        setting.sleep(f"{setting.cameras} cameras", setting.seconds)
        lasted_s, after = time.monotonic() - began_s, sample(worker_ids(site))
        cpu = {name: (used - cpu_s[name]) / lasted_s for name, used in _cpu_s(site).items()}
        seen = _everything(site, began_s)
    finally:
        site.close()
    cameras = site.service.cameras()
    queue_ms = _percentiles([each.queue_s for each in seen])
    row = {
        "cameras": setting.cameras,
        "frames_per_s": len(seen) / lasted_s,
        "decoded": sum(each["decoded"] for each in cameras),
        "unaccounted": site.unaccounted(),
        "dropped": _summed(cameras, "dropped"),
        "queue_ms": queue_ms,
        "since_arrival_ms": _percentiles([each.since_arrival_s for each in seen]),
        "since_capture_ms": _since_capture_ms(seen),
        "mean_batch": float(np.mean([each.batch for each in seen])),
        "cpu_cores": round(cpu["service"], 2),
        "server_cpu_cores": round(cpu["server"], 2),
        "rss_mb": round(after.rss_mb),
        "rss_growth_mb": round(after.rss_mb - before.rss_mb, 1),
        "threads": after.threads,
    }
    bars = {
        "0 unaccounted frames": row["unaccounted"] == 0,
        "p99 of the queue at most promise + 1 frame": queue_ms[2] <= 1000 * (PROMISE_S + 1 / FPS),
    }
    return {"seconds": lasted_s, "stub_ms_a_batch": 1000 * STUB_S, "rows": [row], "bars": bars}


def latency(setting: Setting) -> dict[str, Any]:
    """The shipped bundle and more and more cameras: how old people are when they are known, and at which K."""
    return {
        "seconds": setting.seconds,
        "promise_ms": 1000 * PROMISE_S,
        "backend": "onnxruntime",
        "rows": [_latency_row(setting, count) for count in setting.counts],
    }


def _latency_row(setting: Setting, count: int) -> dict[str, Any]:
    folder = shipped_bundle()
    manifest = load_manifest(folder)
    detector = open_proven(manifest, folder, "onnxruntime")
    clips = setting.clips(count)
    site = WatchedService(
        setting.folder / f"latency{count}",
        clips,
        fps=FPS,
        model=(manifest, detector, lambda site: cost_table(site, manifest, detector)),
        changes=setting.changes(),
        proxied=False,
    )
    try:
        site.wait_for_frames(site.proxies, 60, count=1)
        setting.sleep("settling", SETTLE_S)
        began_s, before = time.monotonic(), site.service.cameras()
        setting.sleep(f"{count} cameras", setting.seconds)
        lasted_s, after = time.monotonic() - began_s, site.service.cameras()
        seen = _everything(site, began_s)
    finally:
        site.close()
    steps = Counter(each.steps for each in seen)
    drops = Counter(_summed(after, "dropped")) - Counter(_summed(before, "dropped"))
    return {
        "cameras": count,
        "offered_per_s": _grown(before, after, "offered") / lasted_s,
        "computed_per_s": len(seen) / lasted_s,
        "since_arrival_ms": _percentiles([each.since_arrival_s for each in seen]),
        "since_capture_ms": _since_capture_ms(seen),
        "share_of_k": {str(k): round(steps[k] / len(seen), 3) for k in sorted(steps)},
        "mean_batch": float(np.mean([each.batch for each in seen])) if seen else 0.0,
        "dropped": dict(drops),
        "unaccounted": site.unaccounted(),
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Latency and K against the number of cameras."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True)
    names = [str(row["cameras"]) for row in rows]
    for key, colour in (("since_capture_ms", "tab:blue"), ("since_arrival_ms", "tab:orange")):
        told = [row[key] or [np.nan] * 3 for row in rows]
        label = key.removesuffix("_ms").replace("_", " ")
        above.plot(names, [each[0] for each in told], "o-", color=colour, label=f"{label}, p50")
        above.plot(names, [each[1] for each in told], "s--", color=colour, label=f"{label}, p95")
    above.axhline(1000 * PROMISE_S, color="grey", linewidth=1, label="promise")
    above.set_ylabel("ms")
    above.set_ylim(bottom=0)
    above.legend(fontsize=8)
    bottom = np.zeros(len(rows))
    for k in sorted({int(k) for row in rows for k in row["share_of_k"]}):
        share = np.array([row["share_of_k"].get(str(k), 0.0) for row in rows])
        below.bar(names, share, bottom=bottom, label=f"K = {k}")
        bottom += share
    below.set_xlabel(f"cameras of {FPS} frames a second")
    below.set_ylabel("share of frames")
    below.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _everything(site: WatchedService, since_s: float) -> list[Seen]:
    return [each for name in site.proxies for each in site.seen(name, since_s)]


def _percentiles(seconds: Sequence[float]) -> list[float]:
    """p50, p95 and p99 in milliseconds; nothing of nothing."""
    if not seconds:
        return []
    return [round(1000 * float(value), 1) for value in np.percentile(seconds, (50, 95, 99))]


def _since_capture_ms(seen: Sequence[Seen]) -> list[float]:
    """Of the frames whose capture the camera has told."""
    return _percentiles([each.since_capture_s for each in seen if each.source == "rtcp_sr"])


def _summed(cameras: Sequence[dict[str, Any]], key: str) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in cameras:
        total.update(each[key])
    return dict(+total)


def _grown(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], key: str) -> int:
    return sum(each[key] for each in after) - sum(each[key] for each in before)


def _cpu_s(site: WatchedService) -> dict[str, float]:
    """Seconds of CPU of the service with its workers, and of the RTSP server."""
    used = {"service": sum(psutil.Process().cpu_times()[:2]), "server": 0.0}
    for kind, pids in (("service", worker_ids(site)), ("server", [site.server.pid])):
        used[kind] += sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)
    return used
