"""Faults of the service's own surroundings: crashes, overload, signals, edits of the site. As in network_faults."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from ..detector import shipped_bundle
from ..site_errors import SiteError
from ..site_file import Site
from .network_faults import BACK_S
from .stub_detector import MAX_STEPS
from .watched_service import FaultError, WatchedService

WORKER_BACK_S = 5.0
DRAIN_S = 10.0
OVERLOAD_S, LEARN_S = 8.0, 4.0
CYCLES = 20


def decoder_crash(site: WatchedService, rng: random.Random) -> float:
    """7: a decoder takes its process with it."""
    workers, names = worker_ids(site), site.streaming()
    began_s = time.monotonic()
    victim = rng.choice(workers)
    os.kill(victim, rng.choice((signal.SIGSEGV, signal.SIGABRT)))
    site.wait(lambda: victim not in worker_ids(site), WORKER_BACK_S, "the worker must be replaced")
    back_s = site.wait_for_frames(names, WORKER_BACK_S)
    if len(workers) > 1:
        longest = [_longest_gap_s(site, name, began_s) for name in names]
        if min(longest) > 1.0:
            raise FaultError(
                f"cameras of other workers must go on, got gaps of {min(longest):.1f} s and more"
            )
    return back_s


def overload(site: WatchedService, rng: random.Random) -> float:
    """12: four times as many frames come as can be computed at the most steps."""
    names = site.streaming()
    usual_fps = 8 / site.stub.seconds(MAX_STEPS, 8)
    site.stub.slowness = 4 * usual_fps / (len(names) * site.fps)
    began_s = time.monotonic()
    try:
        time.sleep(OVERLOAD_S)
    finally:
        site.stub.slowness = 1.0
    lasted_s = time.monotonic() - began_s
    # What a step takes is learnt from batch to batch.
    seen = {name: site.seen(name, began_s + LEARN_S) for name in names}
    _check_overload(site, seen, lasted_s - LEARN_S)
    since_s = time.monotonic()

    def has_risen() -> bool:
        newest = [site.seen(name, since_s)[-3:] for name in names]
        return all(each and min(one.steps for one in each) == MAX_STEPS for each in newest)

    return site.wait(has_risen, BACK_S, "K must rise again")


def _check_overload(site: WatchedService, seen: dict[str, list[Any]], lasted_s: float) -> None:
    everything = [each for frames in seen.values() for each in frames]
    if not everything:
        raise FaultError("frames must be computed under overload, got none")
    steps = float(np.mean([each.steps for each in everything]))
    if steps > MAX_STEPS / 2:
        raise FaultError(f"K must fall under overload, got {steps:.1f} on average")
    least = 0.7 * site.site.promise.min_fps * lasted_s
    for name, frames in seen.items():
        if len(frames) < least:
            raise FaultError(f"{name} must be served {least:.0f} times, got {len(frames)}")
    late_s = float(np.percentile([each.late_s for each in everything], 99))
    if late_s > 1 / site.fps:
        raise FaultError(f"99 of 100 frames must keep the promise but for one frame, got {late_s:.2f} s late")


def sigterm(site: WatchedService, rng: random.Random) -> float:
    """22: a service of its own, with the shipped model, is asked to end while it works."""
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder) / "site.yaml", Path(folder) / "log"
        path.write_text(yaml.safe_dump(_served(site, Path(folder))), encoding="utf-8")
        with log.open("w") as output:
            program = subprocess.Popen(
                [sys.executable, "-m", "psdiff", "serve", "-c", str(path)],
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            site.wait(lambda: _is_watching(program, log), 60, "psdiff serve must start")
            time.sleep(rng.uniform(1, 3))
            program.send_signal(signal.SIGTERM)
            began_s = time.monotonic()
            try:
                code = program.wait(DRAIN_S)
            except subprocess.TimeoutExpired:
                raise FaultError(f"psdiff serve must end within {DRAIN_S:g} s, got that it runs") from None
            took_s = time.monotonic() - began_s
        finally:
            program.kill()
            program.wait()
        if code:
            raise FaultError(f"psdiff serve must end with 0, got {code}: {log.read_text()[-500:]}")
        for file in (Path(folder) / "data").glob("events-*.jsonl"):
            for line in file.read_text(encoding="utf-8").splitlines():
                json.loads(line)
        return took_s


def add_and_remove(site: WatchedService, rng: random.Random) -> float:
    """24: a camera is taken out and put in again, over and over."""
    name = rng.choice(site.plain)
    without = _edited(site, lambda cameras: [each for each in cameras if each["id"] != name])
    threads, files = threading.active_count(), psutil.Process().num_fds()
    with site.others_undisturbed(name):
        for _ in range(CYCLES):
            _apply(site, without)
            _apply(site, site.site)
        back_s = site.wait_for_frames([name], BACK_S)
    site.wait(
        # A connection that was being opened needs its moment to end.
        lambda: threading.active_count() <= threads + 2 and psutil.Process().num_fds() <= files + 4,
        BACK_S,
        f"threads and files must not grow from {threads} and {files}",
    )
    return back_s


def edits(site: WatchedService, rng: random.Random) -> float:
    """25: the site is edited while it runs; what cannot hold is refused, and the old goes on."""
    name = rng.choice(site.plain)
    slower = _edited(site, lambda cameras: [each | _if(each["id"] == name, sample_fps=2) for each in cameras])
    missing = _edited(
        site,
        lambda cameras: [
            each | _if(each["id"] == name, url="rtsp://${PSDIFF_NOT_SET}@h/x") for each in cameras
        ],
    )
    with site.others_undisturbed(name):
        try:
            _apply(site, missing)
        except SiteError:
            pass
        else:
            raise FaultError("a secret that is not there must be refused, got that it was taken")
        site.wait_for_frames([name], BACK_S)
        _apply(site, slower)
        back_s = site.wait_for_frames([name], BACK_S)
        since_s = time.monotonic()
        time.sleep(3)
        found = len(site.seen(name, since_s))
        _apply(site, site.site)
        if found > 9:
            raise FaultError(f"two frames a second must be seen of {name}, got {found} in 3 s")
    return max(back_s, site.wait_for_frames([name], BACK_S))


def no_workers(site: WatchedService) -> str | None:
    """Why there is no worker that could crash."""
    return None if worker_ids(site) else "needs ingest.isolation: process"


def no_apply(site: WatchedService) -> str | None:
    """Why a site cannot be edited while it runs."""
    return None if hasattr(site.service, "apply") else "the service cannot change its site while it runs"


def no_model(site: WatchedService) -> str | None:
    """Why psdiff serve cannot run."""
    return None if shipped_bundle().is_dir() else "the shipped bundle is not there"


def worker_ids(site: WatchedService) -> list[int]:
    """Process ids of the workers that decode; none where cameras are threads."""
    ask: Callable[[], list[int]] | None = getattr(site.service, "ingest_workers", None)
    return [] if ask is None else list(ask())


def _apply(site: WatchedService, changed: Site) -> None:
    apply: Callable[[Site], object] = site.service.apply  # pyright: ignore[reportAttributeAccessIssue]
    apply(changed)


def _edited(site: WatchedService, edit: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Site:
    content = site.site.model_dump(mode="json")
    return Site.model_validate(content | {"cameras": edit(content["cameras"])})


def _if(condition: bool, **keys: object) -> dict[str, object]:
    return keys if condition else {}


def _longest_gap_s(site: WatchedService, name: str, since_s: float) -> float:
    times = [since_s, *(each.at_s for each in site.seen(name, since_s)), time.monotonic()]
    return float(np.diff(times).max())


def _served(site: WatchedService, folder: Path) -> dict[str, Any]:
    """One camera at one frame a second: the soak's own service goes on beside it."""
    name = site.plain[0]
    return {
        "site": {"id": "sigterm", "data_dir": str(folder / "data")},
        "model": {"threads": 1, "max_batch": 1},
        "promise": {"latency_ms": 5000, "steps": {"min": 1, "max": 1}},
        "defaults": {"sample_fps": 1, "max_staleness_ms": 5000},
        "cameras": [{"id": name, "url": f"rtsp://127.0.0.1:{site.server.port}/{name}"}],
        "api": {"listen": f"127.0.0.1:{_free_port()}"},
    }


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def _is_watching(program: subprocess.Popen[bytes], log: Path) -> bool:
    if program.poll() is not None:
        raise FaultError(f"psdiff serve must run, got its end: {log.read_text()[-500:]}")
    return "watching" in log.read_text()
