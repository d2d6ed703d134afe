"""psdiff soak: one service for a long time, faults at random, and what became of each."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .fault_list import FAULTS, Fault, write_clips
from .network_faults import BACK_S
from .resources import ResourceWatch
from .service_faults import worker_ids
from .watched_service import FaultError, WatchedService

SAMPLE_EVERY_S = 3.0

# Caches, codecs and thread pools grow at first.
WARM_UP_SHARE, LONGEST_WARM_UP_S = 0.25, 300.0

# Between two faults everything must be well.
PAUSE_S = (0.5, 3.0)

# What a soak promises of memory; a shorter one cannot tell so small a slope from noise.
MOST_MB_PER_H, SHORTEST_FOR_SLOPE_S = 1.0, 1500.0


@dataclass
class Record:
    """What became of one kind of fault."""

    number: int
    title: str
    criterion: str
    runs: int = 0
    passed: int = 0
    worst_s: float = 0.0
    """Recovery."""
    missing: str | None = None
    """Why it could not be had here."""
    failures: list[str] = field(default_factory=list)


@dataclass
class Report:
    """Of a whole soak."""

    seed: int
    cameras: int
    seconds: float
    interrupted: bool
    records: list[Record]
    slope_mb_per_h: float | None
    """None for a soak that is too short to tell."""
    rss_mb: tuple[float, float]
    """First and last after the warm-up."""
    threads: tuple[int, int]
    files: tuple[int, int]
    unaccounted: int
    """Frames, after the end."""
    backwards: int
    """Frames whose time was not after that of the frame before."""
    ended: bool
    """Whether the service stopped in time."""

    @property
    def complaints(self) -> list[str]:
        """Everything that was not as promised; empty for a pass."""
        found = [f"{each.number} {each.title}: {why}" for each in self.records for why in each.failures]
        if self.unaccounted:
            found.append(f"every frame must be accounted for, got {self.unaccounted} that are not")
        if self.backwards:
            found.append(f"times must not go back, got {self.backwards} frames")
        if not self.ended:
            found.append("the service must stop within ten seconds, got that it did not")
        slope = self.slope_mb_per_h
        if slope is not None and slope > MOST_MB_PER_H:
            found.append(f"memory must grow by less than {MOST_MB_PER_H:g} MB/h, got {slope:.1f}")
        return found

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "complaints": self.complaints}


def endure(
    folder: Path,
    *,
    seconds: float,
    cameras: int,
    seed: int,
    changes: dict[str, Any] | None = None,
    on_fault: Callable[[Fault, Sequence[Record], float], None] = lambda fault, records, elapsed_s: None,
) -> Report:
    """Run faults at random for a while; an interrupt (Ctrl-C) ends it early and is no error.

    folder: for clips and events. changes: keys of the site. on_fault: told before each fault. Raises
    ServerMissingError.
    """
    rng = random.Random(seed)
    site = WatchedService(folder / "data", write_clips(folder, cameras, seconds / 60 + 5), changes=changes)
    records = {each.number: Record(each.number, each.title, each.criterion) for each in FAULTS}
    interrupted, began_s = False, time.monotonic()
    watch = ResourceWatch(SAMPLE_EVERY_S, lambda: worker_ids(site))
    try:
        site.wait_for_frames(site.proxies, 30)
        possible = _possible(site, records)
        order: list[Fault] = []
        while (elapsed_s := time.monotonic() - began_s) < seconds:
            # Each kind once, in a new order, before any comes again.
            order = order or rng.sample(possible, len(possible))
            chosen = order.pop()
            on_fault(chosen, list(records.values()), elapsed_s)
            _cause(site, chosen, records[chosen.number], rng)
            time.sleep(rng.uniform(*PAUSE_S))
    except KeyboardInterrupt:
        interrupted = True
    finally:
        elapsed_s = time.monotonic() - began_s
        watch.stop()
        ended = site.close()
    return _report(site, watch, list(records.values()), seed, cameras, elapsed_s, interrupted, ended)


def _possible(site: WatchedService, records: dict[int, Record]) -> list[Fault]:
    for each in FAULTS:
        records[each.number].missing = each.missing(site)
    return [each for each in FAULTS if records[each.number].missing is None]


def _cause(site: WatchedService, fault: Fault, record: Record, rng: random.Random) -> None:
    """Once: a fault, and everything well again before the next one."""
    try:
        recovery_s = fault.run(site, rng)
        record.worst_s = max(record.worst_s, recovery_s)
        record.runs += 1
        record.passed += 1
    except FaultError as error:
        record.runs += 1
        record.failures.append(str(error))
    try:
        site.wait_for_frames(site.proxies, 2 * BACK_S)
    except FaultError as error:
        record.failures.append(f"afterwards: {error}")


def _report(
    site: WatchedService,
    watch: ResourceWatch,
    records: list[Record],
    seed: int,
    cameras: int,
    elapsed_s: float,
    interrupted: bool,
    ended: bool,
) -> Report:
    warm_up_s = min(WARM_UP_SHARE * elapsed_s, LONGEST_WARM_UP_S)
    late = [each for each in watch.growth.samples if each.at_s >= warm_up_s] or watch.growth.samples[-1:]
    return Report(
        seed=seed,
        cameras=cameras + 2,
        seconds=round(elapsed_s, 1),
        interrupted=interrupted,
        records=records,
        slope_mb_per_h=watch.growth.slope_mb_per_h(warm_up_s) if elapsed_s >= SHORTEST_FOR_SLOPE_S else None,
        rss_mb=(round(late[0].rss_mb, 1), round(late[-1].rss_mb, 1)) if late else (0.0, 0.0),
        threads=(late[0].threads, late[-1].threads) if late else (0, 0),
        files=(late[0].files, late[-1].files) if late else (0, 0),
        unaccounted=site.unaccounted(),
        backwards=site.backwards.total(),
        ended=ended,
    )
