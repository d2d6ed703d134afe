"""What a process and its children hold: memory, threads, files; and whether memory grows."""

from __future__ import annotations

import threading
import time
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


def sample(at_s: float = 0.0) -> Sample:
    """Of this process and all that it started, but for the RTSP server, which is no part of the service."""
    rss, threads, files = 0, 0, 0
    for each in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            with each.oneshot():
                if any("rtsp_server" in word for word in each.cmdline()):
                    continue
                rss += each.memory_info().rss
                threads += each.num_threads()
                files += each.num_fds()
        # It ended while we looked.
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

    def __init__(self, every_s: float) -> None:
        self.growth = Growth()
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
            self.growth.samples.append(sample(time.monotonic() - self._began_s))
