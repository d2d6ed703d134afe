"""How long detection takes: stage by stage, one batch after the other; and with frames that do not wait."""

from __future__ import annotations

import itertools
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..bundle import Latency, Manifest, write_manifest
from ..models.detector import Detector
from ..models.preprocess import Frame
from .noted_engine import NotedEngine

# Graphs are compiled, and pages touched, in the first calls.
WARM_UP_CALLS = 3

# A fast GPU would fill a minute with tens of thousands of calls that tell nothing new.
MOST_CALLS = 2000


@dataclass(frozen=True)
class Percentiles:
    """Of one stage, in milliseconds."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class ClosedLoop:
    """One batch after the other."""

    steps: int
    batch: int
    calls: int
    total: Percentiles
    backbone: Percentiles
    denoising: Percentiles
    """All K steps."""
    host: Percentiles
    """Letterbox, noise, and selection of detections."""
    images_per_s: float
    peak_memory_mb: float
    """The most memory that the process ever held."""


@dataclass(frozen=True)
class OpenLoop:
    """Frames that arrive at a fixed rate and wait for each other."""

    steps: int
    cameras: int
    fps: float
    seconds: float
    frames: int
    latency: Percentiles
    """From arrival to detections."""
    frames_per_s: float
    waiting: int
    """Frames not begun when the last one arrived: it grows with the length of the run where the rate is too high."""


def closed_loop(detector: Detector, frame: Frame, *, steps: int, batch: int, seconds: float) -> ClosedLoop:
    """Detect in the same frames again and again for a while.

    frame: RGB uint8 (height, width, 3), `batch` times a call. Raises ValueError on steps that the bundle lacks.
    """
    engine = NotedEngine(detector.engine)
    timed = Detector(engine, detector.settings)
    frames = [frame] * batch
    for _ in range(WARM_UP_CALLS):
        timed.detect(frames, steps)
    engine.calls.clear()
    totals = []
    began = time.perf_counter()
    while not totals or (time.perf_counter() - began < seconds and len(totals) < MOST_CALLS):
        start = time.perf_counter()
        timed.detect(frames, steps)
        totals.append(time.perf_counter() - start)
    total = np.array(totals)
    parts = np.diff(engine.calls).reshape(len(total), 1 + steps)
    backbone, denoising = parts[:, 0], parts[:, 1:].sum(axis=1)
    return ClosedLoop(
        steps=steps,
        batch=batch,
        calls=len(total),
        total=percentiles(total),
        backbone=percentiles(backbone),
        denoising=percentiles(denoising),
        host=percentiles(total - backbone - denoising),
        images_per_s=float(batch * len(total) / total.sum()),
        peak_memory_mb=peak_memory_mb(),
    )


def open_loop(
    detect: Callable[[], object],
    *,
    steps: int,
    cameras: int,
    fps: float,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> OpenLoop:
    """Call `detect` for each frame of cameras that do not wait; their frames arrive evenly spread.

    detect: one frame to detections. clock, sleep: for tests. Frames queue without limit, and all are worked off, so
    that the latencies of an overload are seen instead of being dropped.
    """
    detect()
    arrivals = np.fromiter(_arrivals(cameras * fps, seconds), float)
    began, latencies, waiting = clock(), [], 0
    for number, arrival in enumerate(arrivals):
        ahead = began + arrival - clock()
        if ahead > 0:
            sleep(ahead)
        if clock() - began >= arrivals[-1] and not waiting:
            waiting = len(arrivals) - number - 1
        detect()
        latencies.append(clock() - began - arrival)
    return OpenLoop(
        steps=steps,
        cameras=cameras,
        fps=fps,
        seconds=seconds,
        frames=len(arrivals),
        latency=percentiles(np.array(latencies)),
        frames_per_s=float(len(arrivals) / (clock() - began)),
        waiting=waiting,
    )


def record_latencies(
    folder: Path, manifest: Manifest, rows: Sequence[ClosedLoop], backend: str, machine: str
) -> None:
    """Put K -> ms into the manifest, in place of what the same backend and machine took before."""
    new = [
        Latency(
            steps=row.steps,
            batch=row.batch,
            backend=backend,
            machine=machine,
            p50_ms=round(row.total.p50, 2),
            p95_ms=round(row.total.p95, 2),
            p99_ms=round(row.total.p99, 2),
        )
        for row in rows
    ]
    keys = {(row.steps, row.batch, row.backend, row.machine) for row in new}
    kept = [row for row in manifest.latencies if (row.steps, row.batch, row.backend, row.machine) not in keys]
    write_manifest(folder, manifest.model_copy(update={"latencies": [*kept, *new]}))


def _arrivals(rate: float, seconds: float) -> Iterator[float]:
    """Seconds at which frames arrive, at least one."""
    yield 0.0
    yield from itertools.takewhile(lambda at: at < seconds, (i / rate for i in itertools.count(1)))


def percentiles(seconds: NDArray[np.float64]) -> Percentiles:
    """Of durations in seconds, in milliseconds."""
    p50, p95, p99 = (float(value) for value in np.percentile(seconds, [50, 95, 99]) * 1000)
    return Percentiles(p50, p95, p99)


def peak_memory_mb() -> float:
    """The most memory that the process ever held, in MB (Linux counts it in KB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
