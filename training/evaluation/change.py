"""What another arithmetic costs on labelled images: the change in AP50 and top-1 against float32. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from ...models.detector import Detector
from ..datasets.images import read_image
from ..datasets.load import load_person_search
from . import clips
from .person_search import evaluate_person_search

CLIPS = "clips"

Tick = Callable[[str, int], Callable[[], None]]
"""Told what begins and of how many images; returns what to call after each."""


@dataclass(frozen=True)
class Change:
    """Scores of a backend beside those of float32, in percent, and how far they may be apart."""

    steps: int
    dataset: str
    images: int
    queries: int
    ap50: tuple[float, float]
    """Of float32, and of the backend."""
    top1: tuple[float, float]
    bound: float
    """In points."""

    @property
    def faults(self) -> list[str]:
        """What changed by more than it may, one sentence each; a gain is a change."""
        return [
            f"{name} must stay within {self.bound:g} points of {before:.2f} at K = {self.steps}, got {after:.2f} "
            f"on {self.dataset}{self._grain if name == 'top-1' else ''}"
            for name, (before, after) in self._pairs
            # A difference of the bound itself, but for rounding, is within it.
            if not abs(after - before) <= self.bound + 1e-9
        ]

    @property
    def _grain(self) -> str:
        """What to know of a set where a single query is more than the bound."""
        grain = 100 / max(self.queries, 1)
        return f", where one query of {self.queries} is {grain:.2f} points" if grain > self.bound else ""

    @property
    def _pairs(self) -> tuple[tuple[str, tuple[float, float]], ...]:
        return (("AP50", self.ap50), ("top-1", self.top1))

    def table(self) -> Table:
        """The change as people read it."""
        title = f"K = {self.steps} on {self.dataset}: {self.images} images, {self.queries} queries"
        table = Table(title=title, title_justify="left")
        for heading in ("percent", "float32", "this backend", "change", "allowed"):
            table.add_column(heading, justify="left" if heading == "percent" else "right")
        for name, (before, after) in self._pairs:
            numbers = (f"{before:.2f}", f"{after:.2f}", f"{after - before:+.2f}", f"{self.bound:g}")
            table.add_row(name, *numbers)
        return table


def change_on_clips(
    folder: Path, streets: int, pair: tuple[Detector, Detector], *, steps: int, bound: float, tick: Tick
) -> Change:
    """Score two detectors, float32 first, on the held-out synthetic clips in a folder; missing ones are drawn."""
    settings = clips.EvaluationSet(streets=streets)
    paths = clips.render_evaluation_set(settings, folder, tick("drawing clips", settings.num_frames))
    images = clips.load_evaluation_set(settings, paths)
    full, other = (
        clips.evaluate(detector, images, steps, tick(name, len(images)))
        for detector, name in zip(pair, ("float32", "this backend"), strict=True)
    )
    return Change(
        steps=steps,
        dataset=f"{streets} held-out synthetic streets",
        images=len(images),
        queries=full.queries,
        ap50=(100 * full.ap50, 100 * other.ap50),
        top1=(100 * full.top1, 100 * other.top1),
        bound=bound,
    )


def change_on_data_set(
    root: Path, name: str, pair: tuple[Detector, Detector], *, steps: int, bound: float, tick: Tick
) -> Change:
    """Score two detectors, float32 first, by the protocol of a person search set.

    Raises ValueError and DatasetError where root does not hold it.
    """
    dataset = load_person_search(name, root)
    full, other = (
        evaluate_person_search(
            detector, dataset, steps, read_image=read_image, on_image=tick(whose, len(dataset.test))
        )
        for detector, whose in zip(pair, ("float32", "this backend"), strict=True)
    )
    return Change(
        steps=steps,
        dataset=dataset.name,
        images=len(dataset.test),
        queries=full.search.num_queries,
        ap50=(100 * full.detection.curve.ap, 100 * other.detection.curve.ap),
        top1=(100 * full.search.top1, 100 * other.search.top1),
        bound=bound,
    )
