"""What a process and its children hold: memory, threads, files; and whether memory grows."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import psutil

MB = 1e6


@dataclass(frozen=True)
class Sample:
    """At one moment."""

    at_s: float
    rss_mb: float
    threads: int
    files: int


def sample(workers: Iterable[int] = (), at_s: float = 0.0) -> Sample:
    """Of this process and of workers (process ids); what else it started, servers of films, is no part of it."""
    rss, threads, files = 0, 0, 0
    for pid in (os.getpid(), *workers):
        try:
            each = psutil.Process(pid)
            with each.oneshot():
                rss += each.memory_info().rss
                threads += each.num_threads()
                files += each.num_fds()
        # A worker may end while we look.
        except psutil.Error:
            continue
    return Sample(at_s, rss / MB, threads, files)


@dataclass
class Growth:
    """Samples of a run."""

    samples: list[Sample] = field(default_factory=list)

    def slope_mb_per_h(self, warm_up_s: float) -> float | None:
        """A line through the memory after the warm-up, by least squares; None for less than three samples.

        The medians of minutes, so that a short peak (the samples fall into faults) does not turn the line.
        """
        late = [each for each in self.samples if each.at_s >= warm_up_s]
        if len(late) < 3:
            return None
        at_s, rss_mb = np.array([[each.at_s, each.rss_mb] for each in late]).T
        minutes = (at_s // 60).astype(int)
        if len(set(minutes.tolist())) >= 3:
            groups = [minutes == minute for minute in np.unique(minutes)]
            at_s = np.array([np.median(at_s[group]) for group in groups])
            rss_mb = np.array([np.median(rss_mb[group]) for group in groups])
        return float(3600 * np.polyfit(at_s, rss_mb, 1)[0])


class ResourceWatch:
    """A thread that takes samples."""

    def __init__(self, every_s: float, workers: Callable[[], Iterable[int]] = tuple) -> None:
        """workers: process ids at the moment."""
        self.growth = Growth()
        self._workers = workers
        self._every_s = every_s
        self._began_s = time.monotonic()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="resources", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(self._every_s):
            self.growth.samples.append(sample(self._workers(), time.monotonic() - self._began_s))
