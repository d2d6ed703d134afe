"""How good a detector is on held-out synthetic clips: detection AP50 and cross-camera search top-1.

Works on any Detector, so the same numbers come from PyTorch and from the shipped bundle; no torch here.
Legend: n detections, M people of one frame, E embedding dimension.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from ...bundle import Manifest, Measurement
from ...models.detections import Detections
from ...models.detector import Detector
from ..synthetic.clips import read_truth, truth_path, write_clip
from ..synthetic.street import Street
from .detection import match_by_score, precision_recall
from .person_search import LOWEST_SCORE, without_threshold

# A query must show the person well, as an operator would choose it.
QUERY_VISIBILITY = 0.8

# Thresholds are chosen on other streets than those that are scored.
CALIBRATION_SEED = 2_000_000


@dataclass(frozen=True)
class EvaluationSet:
    """Held-out clips: `streets` casts of people, two cameras each. Seeds far above those of training."""

    streets: int = 8
    people: int = 8
    duration_s: float = 12.0
    clip_fps: float = 10.0
    every: int = 5
    """Every how many frames of a clip one is evaluated."""
    seed: int = 1_000_000

    @property
    def num_frames(self) -> int:
        """Frames of all clips together."""
        return round(self.duration_s * self.clip_fps) * 2 * self.streets

    def description(self) -> str:
        """One line for tables and manifests."""
        return (
            f"synthetic street, {self.streets} held-out streets x 2 cameras, {self.people} people each, "
            f"{self.duration_s:g} s H.264 at {self.clip_fps:g} fps, every {self.every}th frame, seed {self.seed}"
        )


@dataclass(frozen=True)
class LabelledImage:
    """A frame of a clip with its people; pids are unique over all streets."""

    street: int
    camera: int
    image: NDArray[np.uint8]
    boxes_xyxy: NDArray[np.float32]
    pids: NDArray[np.int64]
    visibility: NDArray[np.float32]


@dataclass(frozen=True)
class Thresholds:
    """Where a detector decides best: the F1 optima on a calibration set."""

    score: float
    """Detection score from which a box counts as a person."""
    match: float
    """Cosine from which a detection counts as the person asked for."""


@dataclass(frozen=True)
class Scores:
    """What a detector achieved at one number of steps."""

    steps: int
    ap50: float
    recall: float
    top1: float
    queries: int
    ms_per_frame: float


def render_evaluation_set(
    settings: EvaluationSet, folder: Path, on_frame: Callable[[], None] = lambda: None
) -> list[Path]:
    """Write the clips that are not there yet; returns their paths, camera 0 before camera 1 of each street."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(settings.streets):
        street = Street(
            settings.seed + number, num_people=settings.people, duration_s=settings.duration_s, cameras=2
        )
        for camera in range(2):
            name = f"street{street.seed}-{settings.people}people-{settings.duration_s:g}s-camera{camera}.mp4"
            path = folder / name
            if not path.is_file():
                write_clip(
                    street,
                    camera,
                    path,
                    fps=settings.clip_fps,
                    duration_s=settings.duration_s,
                    on_frame=on_frame,
                )
            paths.append(path)
    return paths


def load_evaluation_set(settings: EvaluationSet, paths: Sequence[Path]) -> list[LabelledImage]:
    """Decode every `every`-th frame of the clips with its labels."""
    return [image for i, path in enumerate(paths) for image in _labelled(settings, path, *divmod(i, 2))]


def _labelled(settings: EvaluationSet, path: Path, street: int, camera: int) -> Iterator[LabelledImage]:
    truth = read_truth(truth_path(path))
    with av.open(str(path)) as container:
        for index, (frame, labels) in enumerate(zip(container.decode(video=0), truth.frames, strict=True)):
            if index % settings.every == 0:
                yield LabelledImage(
                    street,
                    camera,
                    np.asarray(frame.to_ndarray(format="rgb24"), np.uint8),
                    np.asarray(labels.boxes_xyxy, np.float32).reshape(-1, 4),
                    np.asarray(labels.pids, np.int64) + street * settings.people,
                    np.asarray(labels.visibility, np.float32),
                )


def evaluate(
    detector: Detector,
    images: Sequence[LabelledImage],
    steps: int,
    on_frame: Callable[[], None] = lambda: None,
) -> Scores:
    """Score a detector at K = steps. Milliseconds are wall-clock per frame, one frame at a time."""
    began = time.perf_counter()
    found = find_people(detector, images, steps, on_frame)
    ms_per_frame = 1000 * (time.perf_counter() - began) / max(len(images), 1)
    pids = [assigned_pids(people, labelled) for people, labelled in zip(found, images, strict=True)]
    curve = precision_recall(
        np.concatenate([people.scores for people in found]),
        np.concatenate([assigned >= 0 for assigned in pids]),
        sum(len(labelled.pids) for labelled in images),
    )
    hits = search_hits(detector, images, found, pids, steps)
    return Scores(steps, curve.ap, curve.recall, float(np.mean(hits)), len(hits), ms_per_frame)


def find_people(
    detector: Detector,
    images: Sequence[LabelledImage],
    steps: int,
    on_frame: Callable[[], None] = lambda: None,
) -> list[Detections]:
    """Everything a detector finds from LOWEST_SCORE on, one frame at a time."""
    eager = without_threshold(detector, LOWEST_SCORE)
    found = []
    for i, labelled in enumerate(images):
        found += eager.detect([labelled.image], steps, seeds=[i])
        on_frame()
    return found


def calibrate(detector: Detector, images: Sequence[LabelledImage], steps: int) -> Thresholds:
    """Choose the thresholds on labelled images; a match is judged among true detections of cameras 1."""
    found = find_people(detector, images, steps)
    pids = [assigned_pids(people, labelled) for people, labelled in zip(found, images, strict=True)]
    num_people = sum(len(labelled.pids) for labelled in images)
    is_person = np.concatenate([assigned >= 0 for assigned in pids])
    score = best_f1_threshold(np.concatenate([people.scores for people in found]), is_person, num_people)
    gallery = [i for i, labelled in enumerate(images) if labelled.camera == 1]
    embeddings = np.concatenate([found[i].embeddings[pids[i] >= 0] for i in gallery])
    owners = np.concatenate([pids[i][pids[i] >= 0] for i in gallery])
    views = best_views(images)
    queries = [
        detector.embed(labelled.image, labelled.boxes_xyxy[row : row + 1], steps)[0]
        for labelled, row in views.values()
    ]
    cosines = np.stack([embeddings @ query for query in queries])
    same = np.array(list(views))[:, None] == owners[None]
    return Thresholds(score, best_f1_threshold(cosines.ravel(), same.ravel(), int(same.sum())))


def with_thresholds(manifest: Manifest, found: Mapping[int, Thresholds]) -> Manifest:
    """Return the manifest with the thresholds found for each K; those of its default K hold for the others."""
    usual = found.get(manifest.default_steps) or found[max(found)]
    update = {
        "score_threshold": round(usual.score, 3),
        "score_thresholds": {steps: round(best.score, 3) for steps, best in found.items()},
        "match_threshold": round(usual.match, 3),
    }
    return manifest.model_copy(update=update)


def best_f1_threshold(values: NDArray[np.floating], is_true: NDArray[np.bool_], num_true: int) -> float:
    """The value from which calling everything true has the best F1; num_true counts what was never found too."""
    order = np.argsort(-values)
    found = np.cumsum(is_true[order])
    f1 = 2 * found / (np.arange(1, len(order) + 1) + num_true)
    return float(values[order][int(f1.argmax())])


def assigned_pids(people: Detections, labelled: LabelledImage) -> NDArray[np.int64]:
    """(n,) the pid that each detection found, -1 for none."""
    # Row -1, nobody, is the appended pid.
    return np.append(labelled.pids, -1)[match_by_score(people, labelled.boxes_xyxy)]


def search_hits(
    detector: Detector,
    images: Sequence[LabelledImage],
    found: Sequence[Detections],
    pids: Sequence[NDArray[np.int64]],
    steps: int,
) -> list[bool]:
    """Tell for each query person whether the best match over all cameras 1 is that person.

    A query is a person whom a camera 0 sees well, embedded from the true box; the gallery is what the
    detector found by itself.
    """
    gallery = [i for i, labelled in enumerate(images) if labelled.camera == 1]
    owners = np.concatenate([pids[i] for i in gallery])
    present = {int(pid) for i in gallery for pid in images[i].pids}
    hits = []
    for pid, (labelled, row) in best_views(images).items():
        if pid in present:
            query = detector.embed(labelled.image, labelled.boxes_xyxy[row : row + 1], steps)[0]
            similarity = np.concatenate([found[i].similarity(query) for i in gallery])
            hits.append(len(owners) > 0 and bool(owners[int(similarity.argmax())] == pid))
    return hits


def best_views(images: Sequence[LabelledImage]) -> dict[int, tuple[LabelledImage, int]]:
    """Pid -> the frame of its camera 0 that shows it largest among those that show it well, and its row."""
    best: dict[int, tuple[float, LabelledImage, int]] = {}
    for labelled in images:
        if labelled.camera != 0:
            continue
        heights = labelled.boxes_xyxy[:, 3] - labelled.boxes_xyxy[:, 1]
        for row in np.flatnonzero(labelled.visibility >= QUERY_VISIBILITY):
            pid, height = int(labelled.pids[row]), float(heights[row])
            if pid not in best or height > best[pid][0]:
                best[pid] = (height, labelled, int(row))
    return {pid: (labelled, row) for pid, (_, labelled, row) in best.items()}


def scores_table(scores: Sequence[Scores], settings: EvaluationSet) -> Table:
    """The scores as people read them."""
    table = Table(title=settings.description(), title_justify="left")
    for heading in ("K", "AP50", "recall", "top-1", "queries", "ms/frame"):
        table.add_column(heading, justify="right")
    for row in scores:
        shares = (f"{value:.3f}" for value in (row.ap50, row.recall, row.top1))
        table.add_row(str(row.steps), *shares, str(row.queries), f"{row.ms_per_frame:.0f}")
    return table


def with_scores(
    measurements: Sequence[Measurement], scores: Sequence[Scores], settings: EvaluationSet
) -> list[Measurement]:
    """A manifest's measurements with these scores in the place of older ones for the same K and data set."""
    new = [
        Measurement(
            steps=row.steps,
            backend="onnxruntime",
            ap50=round(row.ap50, 4),
            top1=round(row.top1, 4),
            ms_per_frame=round(row.ms_per_frame, 1),
            dataset=settings.description(),
            machine=f"{platform.machine()}, {os.cpu_count()} cores",
        )
        for row in scores
    ]
    replaced = {(row.steps, row.dataset) for row in new}
    return [row for row in measurements if (row.steps, row.dataset) not in replaced] + new
