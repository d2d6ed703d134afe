"""Clips of the synthetic street watched frame by frame, and how well people are found and recognised in them.

Frames of a clip are looked at in their order, as a camera gives them, in several ways at once; the backbone's
features of a frame are computed once and shared, since the ways differ in the steps alone.
Legend: E embedding dimension.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..models.detections import Detections, Float32Array
from ..models.detector import Detector
from ..models.sampling import Engine, Features, StepOutput
from ..runtime.tracks import CameraTracks
from ..runtime.warm_start import Shot, WarmDetector, WarmSettings, warm_threshold
from ..training.datasets.schema import Query
from ..training.evaluation.clips import (
    EvaluationSet,
    LabelledImage,
    assigned_pids,
    best_f1_threshold,
    best_views,
    load_evaluation_set,
    render_evaluation_set,
)
from ..training.evaluation.detection import precision_recall, scored_from
from ..training.evaluation.person_search import LOWEST_SCORE, without_threshold
from ..training.evaluation.search import search

# A person has entered when half of them is seen for the first time.
ENTERED_VISIBILITY = 0.5

# Frames after the entrance in which is looked whether the person was found.
FRAMES_AFTER = (0, 1, 2, 4)

# Queries are described as an operator's would be, with the same steps whatever the way.
QUERY_STEPS = 4


@dataclass(frozen=True)
class Way:
    """How frames are looked at."""

    steps: int
    warm: WarmSettings | None = None
    """None for cold starts."""


@dataclass(frozen=True)
class ClipSet:
    """The frames of some clips, one clip after the other."""

    images: Sequence[LabelledImage]
    clip_frames: int
    fps: float

    @property
    def clips(self) -> list[range]:
        """Indices of the frames of each clip."""
        starts = range(0, len(self.images), self.clip_frames)
        return [range(start, start + self.clip_frames) for start in starts]


@dataclass
class Watched:
    """What a way saw."""

    people: list[Detections] = field(default_factory=list)
    """One per image, from LOWEST_SCORE on."""
    starts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Scores:
    """What a way achieved on a set of clips; shares in [0, 1]."""

    map: float
    top1: float
    ap50: float
    precision: float
    """Of what passes the way's threshold, as everything below."""
    recall: float
    entered: Mapping[int, float]
    """Frames since somebody entered -> share of them found; without numbers after which nobody is there."""
    best_threshold: float
    """With the largest F1 on these clips."""
    entrances: int
    queries: int


class _SharedBackbone:
    """An engine that computes the features of an image once for several ways."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._image = b""
        self._features: Features = ()

    def backbone(self, images: NDArray[np.uint8]) -> Features:
        """As Engine.backbone."""
        image = images.tobytes()
        if image != self._image:
            self._image, self._features = image, self._engine.backbone(images)
        return self._features

    def denoise_step(
        self,
        features: Features,
        boxes_t: Float32Array,
        emb_t: Float32Array,
        t: NDArray[np.int64],
        t_next: NDArray[np.int64],
    ) -> StepOutput:
        """As Engine.denoise_step."""
        return self._engine.denoise_step(features, boxes_t, emb_t, t, t_next)


def load_clips(settings: EvaluationSet, folder: Path) -> ClipSet:
    """Draw the clips that are not in the folder yet, and decode all."""
    images = load_evaluation_set(settings, render_evaluation_set(settings, folder))
    frames = round(settings.duration_s * settings.clip_fps)
    return ClipSet(images, -(-frames // settings.every), settings.clip_fps / settings.every)


def threshold_of(way: Way, detector: Detector) -> float:
    """The score from which the service would report a person."""
    if way.warm is None:
        return detector.settings.threshold(way.steps)
    return warm_threshold(way.warm, detector.settings, way.steps)


def watch(
    detector: Detector,
    clips: ClipSet,
    ways: Mapping[str, Way],
    on_frame: Callable[[], None] = lambda: None,
) -> dict[str, Watched]:
    """Look at every frame in every way. Tracks are made of what the service would report."""
    eager = without_threshold(Detector(_SharedBackbone(detector.engine), detector.settings), LOWEST_SCORE)
    watched = {name: Watched() for name in ways}
    for clip in clips.clips:
        viewers = {name: Viewer(eager, way, detector) for name, way in ways.items()}
        for number, index in enumerate(clip):
            for name, viewer in viewers.items():
                people, start = viewer.look(clips.images[index].image, number / clips.fps, index)
                watched[name].people.append(people)
                watched[name].starts[start] += 1
            on_frame()
    return watched


class Viewer:
    """One camera, looked at in one way."""

    def __init__(self, detector: Detector, way: Way, calibrated: Detector) -> None:
        """detector: looks. calibrated: has the thresholds from which tracks are made."""
        self._detector, self._way = detector, way
        # What passes is decided below, so that doubtful detections can be scored, too.
        whole = replace(way.warm, score_thresholds={}) if way.warm else None
        self._warm = WarmDetector(detector, whole) if whole else None
        self._tracks = CameraTracks()
        self._cold = calibrated.settings.threshold(way.steps)
        self._certain = threshold_of(way, calibrated)

    def look(self, image: NDArray[np.uint8], time_s: float, seed: int) -> tuple[Detections, str]:
        """The people of the next frame, and how the diffusion started."""
        height, width = image.shape[:2]
        if self._warm is None:
            return self._detector.detect([image], self._way.steps, [seed])[0], "cold"
        shot = Shot("camera", image, time_s, 0, seed, self._tracks)
        [(people, start)] = self._warm.detect([shot], self._way.steps)
        certain = scored_from(self._certain if start == "warm" else self._cold, people)
        self._tracks.update(certain, time_s, seed, (width, height))
        return people, start


def queries_of(clips: ClipSet, detector: Detector) -> tuple[list[Query], Float32Array]:
    """Who is searched for, from a camera 0 in all frames of cameras 1, and the (Q, E) embeddings."""
    gallery = np.array([i for i, image in enumerate(clips.images) if image.camera == 1])
    queries, embeddings = [], []
    for pid, (shown, row) in best_views(clips.images).items():
        truth = {
            int(i): clips.images[i].boxes_xyxy[clips.images[i].pids == pid]
            for i in gallery
            if pid in clips.images[i].pids
        }
        if truth:
            box = shown.boxes_xyxy[row]
            index = next(i for i, image in enumerate(clips.images) if image is shown)
            queries.append(Query(index, box, pid, gallery, truth))
            embeddings.append(detector.embed(shown.image, box[None], QUERY_STEPS)[0])
    return queries, np.stack(embeddings)


def scores_of(
    clips: ClipSet,
    people: Sequence[Detections],
    queries: tuple[Sequence[Query], Float32Array],
    threshold: float,
) -> Scores:
    """Judge what a way found. Search is ranked by cosine times score, without a threshold."""
    pids = [assigned_pids(found, image) for found, image in zip(people, clips.images, strict=True)]
    values = np.concatenate([found.scores for found in people])
    is_person = np.concatenate([assigned >= 0 for assigned in pids])
    num_people = sum(len(image.pids) for image in clips.images)
    passes = values >= threshold
    ranking = search(people, *queries, score_threshold=LOWEST_SCORE, rank_by="cws")
    entered = {after: _found_after(clips, people, pids, threshold, after) for after in FRAMES_AFTER}
    return Scores(
        map=ranking.map,
        top1=ranking.top1,
        ap50=precision_recall(values, is_person, num_people).ap,
        precision=float(is_person[passes].mean()),
        recall=float(is_person[passes].sum() / num_people),
        entered={after: float(np.mean(hits)) for after, hits in entered.items() if hits},
        best_threshold=best_f1_threshold(values, is_person, num_people),
        entrances=len(entered[0]),
        queries=ranking.num_queries,
    )


def _found_after(
    clips: ClipSet,
    people: Sequence[Detections],
    pids: Sequence[NDArray[np.int64]],
    threshold: float,
    after: int,
) -> list[bool]:
    """Whether everybody who entered was found so many frames later; without those who had left again."""
    hits = []
    for clip, number, pid in _entrances(clips):
        if number + after < len(clip) and pid in clips.images[index := clip[number + after]].pids:
            hits.append(bool(((pids[index] == pid) & (people[index].scores >= threshold)).any()))
    return hits


def _entrances(clips: ClipSet) -> list[tuple[range, int, int]]:
    """Clip, frame of the clip and pid of all who enter after the clip has begun."""
    entrances = []
    for clip in clips.clips:
        first: dict[int, int] = {}
        for number, index in enumerate(clip):
            image = clips.images[index]
            for pid in image.pids[image.visibility >= ENTERED_VISIBILITY].tolist():
                first.setdefault(pid, number)
        entrances += [(clip, number, pid) for pid, number in first.items() if number > 0]
    return entrances
