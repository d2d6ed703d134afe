"""How many denoising steps a batch gets: as many as its most urgent frame, and the cameras' min_fps, have time for.

What K steps take is known from psdiff bench --record (the manifest), and corrected by what they take now.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..bundle import Latency

# Weight of the newest measurement in what is expected of the next.
SMOOTHING = 0.2

# What is expected falls by this share with every batch that is not run at all.
FORGETTING = 0.02

# One measurement counts for no more than this factor: a stall of the machine is not the model's speed.
LARGEST_SURPRISE = 4.0


@dataclass(frozen=True)
class StepRange:
    """How many steps the user allows."""

    least: int = 1
    most: int = 4
    hold: int = 5
    """So many batches in a row must have time for more steps before there are more."""
    reserve: float = 0.15
    """Share of the expected time that must be left over, too, before there are more."""

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ValueError(f"steps must be 1 <= least <= most, got {self.least} and {self.most}")
        if self.hold < 1 or self.reserve < 0:
            raise ValueError(f"hold must be >= 1 and reserve >= 0, got {self.hold} and {self.reserve:g}")


class CostTable:
    """Seconds that K steps on B images take: measured at some K and B, linear in both between and beyond."""

    def __init__(self, seconds: Mapping[tuple[int, int], float]) -> None:
        """seconds: (K, B) -> seconds. Raises ValueError without two different K for some B, or none at all."""
        by_batch: dict[int, list[tuple[int, float]]] = defaultdict(list)
        for (steps, batch), value in seconds.items():
            by_batch[batch].append((steps, value))
        if not any(len(points) > 1 for points in by_batch.values()):
            raise ValueError(
                f"latencies must hold two numbers of steps of one batch size, got {sorted(seconds)}; "
                "run psdiff bench --record --steps 1,2,4,8"
            )
        # Rows: B, seconds without steps, seconds a step. Neither is ever negative.
        rows = [(batch, *_line(points)) for batch, points in sorted(by_batch.items()) if len(points) > 1]
        self._batches, self._fixed, self._per_step = (np.array(column) for column in zip(*rows, strict=True))

    @classmethod
    def of(cls, latencies: Sequence[Latency], backend: str, machine: str) -> CostTable:
        """From the rows of a manifest for one backend and machine. Raises ValueError where there are too few."""
        rows = [row for row in latencies if (row.backend, row.machine) == (backend, machine)]
        return cls({(row.steps, row.batch): row.p50_ms / 1000 for row in rows})

    def seconds(self, steps: int, batch: int) -> float:
        """What K steps on B images are expected to take."""
        return self._at(self._fixed, batch) + steps * self._at(self._per_step, batch)

    def _at(self, values: np.ndarray, batch: int) -> float:
        largest = self._batches[-1]
        if batch > largest:
            return float(values[-1] * batch / largest)
        if batch < self._batches[0]:
            return float(values[0])
        return float(np.interp(batch, self._batches, values))


class StepChooser:
    """Chooses K for one batch after the other; for one thread."""

    def __init__(self, table: CostTable, allowed: StepRange) -> None:
        self._table = table
        self._allowed = allowed
        self._correction = 1.0
        self._current = allowed.least
        self._times_with_room = 0

    @property
    def correction(self) -> float:
        """How many times longer steps take now than the table says."""
        return self._correction

    def expected_s(self, steps: int, batch: int) -> float:
        """What K steps on B images are expected to take now."""
        return self._correction * self._table.seconds(steps, batch)

    def choose(self, slack_s: float, batch: int, *, is_behind: bool = False) -> int | None:
        """K for B images of which the most urgent must be done in slack_s; None where the least is too much.

        Fewer steps are taken at once, more only after some batches that had time for them, one more at a time.
        is_behind: a camera gets less than its min_fps, which goes before steps: there is one less.
        """
        fitting = [k for k in self._range() if self.expected_s(k, batch) <= slack_s]
        if not fitting:
            self._times_with_room = 0
            self._current = self._allowed.least
            return None
        most = max(self._allowed.least, self._current - 1) if is_behind else self._current
        if is_behind or fitting[-1] <= most:
            self._times_with_room = 0
            self._current = min(most, fitting[-1])
            return self._current
        wanted = self.expected_s(self._current + 1, batch) * (1 + self._allowed.reserve)
        self._times_with_room = self._times_with_room + 1 if wanted <= slack_s else 0
        if self._times_with_room >= self._allowed.hold:
            self._times_with_room = 0
            self._current += 1
        return self._current

    def least_s(self, batch: int) -> float:
        """What the fewest steps on B images are expected to take now."""
        return self.expected_s(self._allowed.least, batch)

    def skip(self) -> None:
        """Nothing was computed, since nothing fits. Where nothing runs nothing is learnt: expect a little less."""
        self._correction *= 1 - FORGETTING

    def observe(self, steps: int, batch: int, seconds: float) -> None:
        """Learn from a batch that is done."""
        ratio = seconds / self._table.seconds(steps, batch)
        ratio = min(max(ratio, self._correction / LARGEST_SURPRISE), self._correction * LARGEST_SURPRISE)
        self._correction += SMOOTHING * (ratio - self._correction)

    def _range(self) -> range:
        return range(self._allowed.least, self._allowed.most + 1)


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Seconds without steps, and a step, by least squares over (K, seconds)."""
    steps, seconds = (np.array(column, float) for column in zip(*points, strict=True))
    per_step, fixed = np.polyfit(steps, seconds, 1)
    per_step = max(per_step, 0.0)
    return max(fixed, 0.0) if per_step else float(seconds.mean()), per_step
