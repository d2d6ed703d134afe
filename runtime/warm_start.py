"""Warm start: the diffusion of a frame begins with the people of the frames before, at t_w < T.

A cold start draws boxes and embeddings at T, pure noise. A warm one takes the people that a camera's tracks expect in
this frame, repeats them, fills up with fresh boxes without a person, and noises all that to t_w by the forward
process; the steps then walk a grid from t_w. Frames with a warm and with a cold start may share a batch: each image
has timesteps of its own.

It is off unless a site says warm_start: true; docs/warm_start.md says what it gains and loses.
Legend: B images, N proposals, E embedding dimension, K steps, m people expected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from ..models.detections import Detections, Float32Array
from ..models.detector import Canvas, Detector, Start, canvas_of, timesteps_of
from ..models.preprocess import Frame, Letterbox, seeded_noise
from ..models.renoising import Fresh, known_timesteps, people_at, timesteps_from
from ..models.sampling import SamplerSettings
from .tracks import CameraTracks

StartKind = Literal["warm", "off", "first", "gap", "size", "connection", "cut", "nobody"]
"""warm, or why a start is cold: not asked for, the first frame, too long since the last one, another size, a new
connection, another picture, nobody expected."""

# A scene cut: the correlation of the grey values of two frames, each shrunk to this, is below. It does not change
# with brightness and contrast, so a lamp or the camera's exposure is no cut; people who walk by are small on it.
THUMBNAIL = (32, 18)
LEAST_CORRELATION = 0.5


@dataclass(frozen=True)
class WarmSettings:
    """How warm starts are made; benchmarks/bench_warm_start.py --tune chose the defaults, on clips of their own."""

    timestep: int = 299
    """t_w, in [0, T - 1)."""
    fresh_share: float = 0.5
    """Least share of the N proposals without a person, in [0.3, 1]: they are the ones that find newcomers."""
    fresh: Fresh = "spread"
    most_copies: int | None = None
    """Proposals of one person at the most; None for as many as there is room."""
    gap_s: float = 1.0
    """After a longer time without a frame a start is cold. People unseen for longer are not expected."""

    score_thresholds: Mapping[int, float] = field(default_factory=lambda: {2: 0.91})
    """K -> score from which a box counts as a person, where that is above the model's own; a K between two takes that
    of the smaller one. K steps from t_w end nearer to the clean signal than K from T, and scores spread with it: with
    the shipped model, of which these are, half of what passes the own threshold of K = 2 is nobody."""

    def __post_init__(self) -> None:
        if not 0.3 <= self.fresh_share <= 1:
            raise ValueError(f"fresh_share must be in [0.3, 1], got {self.fresh_share:g}")


class Shot(NamedTuple):
    """A frame of a camera, and what is known about its people so far."""

    camera: str
    image: Frame
    time_s: float
    connection: int
    seed: int
    tracks: CameraTracks | None
    """None where the camera wants no warm start."""


class Found(NamedTuple):
    """The people of a frame."""

    people: Detections
    start: StartKind


class _Last(NamedTuple):
    """What is remembered of a camera's last frame."""

    time_s: float
    size: tuple[int, int]
    connection: int
    thumbnail: Float32Array


class WarmDetector:
    """A detector that remembers the last frame of every camera; for one thread."""

    def __init__(self, detector: Detector, settings: WarmSettings | None = None) -> None:
        """Raises ValueError where the bundle cannot start below T."""
        self._detector = detector
        self._settings = settings or WarmSettings()
        self._last: dict[str, _Last] = {}
        most = known_timesteps(detector.settings) - 2
        if not 0 <= self._settings.timestep <= most:
            raise ValueError(f"timestep must be from 0 to {most}, got {self._settings.timestep}")
        if detector.settings.embedding_scale is None:
            raise ValueError("bundle must hold embedding_scale for a warm start, got none; export it again")

    def detect(self, shots: Sequence[Shot], steps: int) -> list[Found]:
        """Find the people of each frame with K = steps, whether its start is warm or cold.

        The result of a frame depends on its pixels, its seed, K, its tracks and the camera's last frame, not on the
        batch. Raises ValueError on a bad argument.
        """
        sampler = self._detector.settings
        canvases = [canvas_of(shot.image, sampler, f"shots[{i}]") for i, shot in enumerate(shots)]
        if not canvases:
            return []
        kinds, states, grids = [], [], []
        for shot, canvas in zip(shots, canvases, strict=True):
            kind, state = self._start(shot, canvas)
            kinds.append(kind)
            states.append(state)
            is_warm = kind == "warm"
            grids.append(
                timesteps_from(self._settings.timestep, steps, sampler)
                if is_warm
                else timesteps_of(sampler, steps)
            )
        people = self._detector.detect_canvases(
            canvases,
            steps,
            [shot.seed for shot in shots],
            start=Start(*(np.stack(part) for part in zip(*states, strict=True))),
            grid=np.array(grids, np.int64).T,
        )
        certain = warm_threshold(self._settings, sampler, steps)
        return [
            Found(_scored_from(certain, found) if kind == "warm" else found, kind)
            for found, kind in zip(people, kinds, strict=True)
        ]

    def forget(self, camera: str) -> None:
        """Let go of a camera that was taken away."""
        self._last.pop(camera, None)

    def _start(self, shot: Shot, canvas: Canvas) -> tuple[StartKind, tuple[Float32Array, Float32Array]]:
        """Where the diffusion of a frame starts: (N, 4) and (N, E)."""
        sampler, settings = self._detector.settings, self._settings
        kind = self._kind(shot, canvas)
        if kind == "warm" and shot.tracks is not None:
            boxes_norm, embeddings = expected(shot.tracks, shot.time_s, canvas.letterbox, settings.gap_s)
            if len(boxes_norm):
                return kind, people_at(
                    boxes_norm,
                    embeddings,
                    settings.timestep,
                    shot.seed,
                    sampler,
                    fresh_share=settings.fresh_share,
                    fresh=settings.fresh,
                    most_copies=settings.most_copies,
                )
            kind = "nobody"
        return kind, seeded_noise(shot.seed, sampler.num_proposals, sampler.embedding_dim)

    def _kind(self, shot: Shot, canvas: Canvas) -> StartKind:
        """Whether the last frame of the camera tells anything about this one; then this is the last one."""
        if shot.tracks is None:
            return "off"
        height, width = shot.image.shape[:2]
        now = _Last(shot.time_s, (width, height), shot.connection, thumbnail(canvas))
        last, self._last[shot.camera] = self._last.get(shot.camera), now
        if last is None:
            return "first"
        if now.connection != last.connection:
            return "connection"
        if now.size != last.size:
            return "size"
        if not 0 <= now.time_s - last.time_s <= self._settings.gap_s:
            return "gap"
        return "cut" if correlation(now.thumbnail, last.thumbnail) < LEAST_CORRELATION else "warm"


def expected(
    tracks: CameraTracks, time_s: float, letterbox: Letterbox, gap_s: float
) -> tuple[Float32Array, Float32Array]:
    """Who should be in a frame, and where: boxes (m, 4) xyxy normalised on the canvas, and embeddings (m, E).

    Everybody who was seen no longer than gap_s ago, moved on at constant velocity, the most recently seen first;
    without those whose box has left the frame by more than half.
    """
    seen = [track for track in tracks.live if time_s - track.last.time_s <= gap_s]
    seen.sort(key=lambda track: (-track.last.time_s, -track.votes, track.number))
    if not seen:
        return np.zeros((0, 4), np.float32), np.zeros((0, 0), np.float32)
    moved = np.stack([track.box_at(time_s) for track in seen])
    limits = np.array([letterbox.frame_width, letterbox.frame_height] * 2)
    inside = moved.clip(0, limits)
    stays = _areas(inside) > 0.5 * _areas(moved)
    embeddings = np.stack([track.embedding for track in seen])
    return letterbox.boxes_to_canvas(inside[stays].astype(np.float32)), embeddings[stays]


def warm_threshold(settings: WarmSettings, sampler: SamplerSettings, steps: int) -> float:
    """The score from which a box counts as a person after K = steps from a warm start."""
    known = [k for k in settings.score_thresholds if k <= steps]
    own = settings.score_thresholds[max(known)] if known else 0.0
    return max(own, sampler.threshold(steps))


def thumbnail(canvas: Canvas) -> Float32Array:
    """Grey values of the frame's part of the canvas, shrunk, with mean 0 and norm 1; zero where all are the same."""
    letterbox = canvas.letterbox
    width = max(1, round(letterbox.frame_width * letterbox.scale))
    height = max(1, round(letterbox.frame_height * letterbox.scale))
    small = cv2.resize(canvas.image[:height, :width], THUMBNAIL, interpolation=cv2.INTER_AREA)
    grey = np.asarray(small, np.float32).mean(axis=2).ravel()
    grey -= grey.mean()
    norm = float(np.linalg.norm(grey))
    return grey / norm if norm > 1e-3 else np.zeros_like(grey)


def correlation(a: Float32Array, b: Float32Array) -> float:
    """Of two thumbnails, in [-1, 1]; 0 with an empty picture."""
    return float(a @ b)


def _scored_from(score: float, people: Detections) -> Detections:
    kept = people.scores >= score
    return Detections(people.boxes_xyxy[kept], people.scores[kept], people.embeddings[kept])


def _areas(boxes_xyxy: NDArray[np.floating]) -> NDArray[np.floating]:
    return (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(axis=1)
