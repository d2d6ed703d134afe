"""How a run goes: running averages, the log, TensorBoard, and where the time goes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

LOG = "log.jsonl"
TENSORBOARD = "tensorboard"

# A curve needs no more points; each costs a line in a file.
ITERATIONS_PER_POINT = 20

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """Where a run stands; handed to the caller after every iteration."""

    stage: int
    share: float
    """Of the stage, in [0, 1]."""
    iteration: int
    images_per_s: float
    """Over all processes, since the stage began or was resumed."""
    loader_share: float
    """Of the time, spent waiting for images; above a few per cent, add loader workers."""
    loss: float
    image_cosine: float
    """Cosine of predicted and true embedding on people whose e_t was pure noise: what is seen, not copied."""


class RunningAverages:
    """Exponential averages of named values, half-life about 34 iterations."""

    def __init__(self, values: Mapping[str, float] | None = None) -> None:
        self.values = dict(values or {})

    def add(self, name: str, value: float) -> None:
        """Take in a value; the first is the average."""
        self.values[name] = 0.98 * self.values.get(name, value) + 0.02 * value


class Stopwatch:
    """Iterates over batches and tells how long it waited for them."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.waited = 0.0

    def watch(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, adding up the time until each came."""
        iterator = iter(items)
        while True:
            asked = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.waited += time.perf_counter() - asked
            yield item

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.began


class RunLog:
    """log.jsonl and TensorBoard's event files of a run; the first process writes, the others do nothing."""

    def __init__(self, out: Path, *, enabled: bool, resumed_at: int | None = None) -> None:
        """resumed_at: TensorBoard forgets the points from this step on, which the stopped run had drawn already."""
        self.path = out / LOG
        self.writer = None
        if enabled:
            # Its import takes a second, which only the writing process pays.
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(out / TENSORBOARD, purge_step=resumed_at)

    def scalars(self, values: Mapping[str, float], iteration: int, step: int) -> None:
        """A point at `step` of every curve, in the first of each ITERATIONS_PER_POINT iterations (from 1)."""
        if self.writer is not None and iteration % ITERATIONS_PER_POINT == 1:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def line(self, entry: Mapping[str, object]) -> None:
        """One line of log.jsonl."""
        if self.writer is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        """Flush what TensorBoard holds back."""
        if self.writer is not None:
            self.writer.close()
