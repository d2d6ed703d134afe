"""In-camera tracks: the detections of one camera, frame by frame, as people with votes.

A track says that the boxes of consecutive frames are one person, so that a person who stands before a camera for a
minute is one object and not hundreds of detections. It makes no claim beyond that: who leaves the picture, or stays
hidden for longer than gap_s, comes back as another track, and nobody is known again at another camera. NumPy only,
for one thread; `CameraTracks` works on any detections, without a service.

Rule: of all pairs of a track and a detection that may be the same person the one with the largest IoU + cosine is
joined first, then the next one whose two ends are still free. This greedy choice differs from the best sum over all
pairs only where two people overlap and look alike.
Legend: n detections, m tracks, E embedding dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..models.detections import Detections, Float32Array, box_iou

# The box of a track, moved to the time of the frame, and a detection may be one person if they overlap by this and
# do not look like two people: boxes alone mix people up who cross, embeddings alone those in the same clothes.
LEAST_IOU, LEAST_COSINE = 0.2, 0.3

# Or, without overlap, if they look alike and are no further apart than somebody runs: two frames a second leave no
# overlap, and a new track has no velocity yet. In body heights: so much at once, and so much more a second.
SAME_LOOK = 0.7
SLACK_HEIGHTS, RUN_HEIGHTS_PER_S = 0.15, 1.5

# Share of a newly measured velocity. A box jitters, so one difference of two says little.
VELOCITY_GAIN = 0.5


class View(NamedTuple):
    """One detection of a track."""

    seq: int
    """Frame of the camera."""
    time_s: float
    box_xyxy: tuple[float, float, float, float]
    """Frame pixels."""
    score: float

    @property
    def weight(self) -> float:
        """What its vote counts: the score times the area in pixels; a large, certain view tells most."""
        x1, y1, x2, y2 = self.box_xyxy
        return self.score * (x2 - x1) * (y2 - y1)


class Track:
    """One person before one camera. Its size does not grow with the time it lives."""

    def __init__(self, number: int, view: View, embedding: Float32Array) -> None:
        """number: tells it from others. embedding: (E,) unit."""
        self.number = number
        self.first = self.last = self.best = view
        self.votes = 0
        """Detections so far."""
        self.velocity = np.zeros(2)
        """Of the box's centre, pixels a second."""
        self._sum = np.zeros(len(embedding))
        self._vote(view, embedding)

    @property
    def embedding(self) -> Float32Array:
        """(E,) unit: the mean of the votes by weight."""
        return (self._sum / max(float(np.linalg.norm(self._sum)), 1e-12)).astype(np.float32)

    def box_at(self, time_s: float) -> NDArray[np.float64]:
        """(4,) xyxy frame pixels: the last box, moved on at constant velocity. It may lie outside the frame."""
        step = self.velocity * max(0.0, time_s - self.last.time_s)
        return np.array(self.last.box_xyxy) + np.tile(step, 2)

    def add(self, view: View, embedding: Float32Array) -> None:
        """Follow the person to another frame. view: not older than the last one."""
        seconds = view.time_s - self.last.time_s
        if seconds > 0:
            measured = (_centre(view.box_xyxy) - _centre(self.last.box_xyxy)) / seconds
            self.velocity += (1.0 if self.votes == 1 else VELOCITY_GAIN) * (measured - self.velocity)
        self.last = view
        self._vote(view, embedding)

    def _vote(self, view: View, embedding: Float32Array) -> None:
        self.votes += 1
        self._sum += view.weight * embedding
        self.best = max(self.best, view, key=lambda each: each.weight)


class Association(NamedTuple):
    """What one frame did to the tracks of its camera."""

    tracks: Sequence[Track]
    """(n,) that of each detection; it is new where its votes are 1."""
    ended: Sequence[Track]
    """Those that the camera lost."""


class CameraTracks:
    """The tracks of one camera. Memory is bounded: at most `most` tracks of constant size."""

    def __init__(self, gap_s: float = 2.0, most: int = 128, numbers: Iterator[int] | None = None) -> None:
        """gap_s: a track that was not seen for longer ends. most: beyond, those unseen for the longest time end.

        numbers: of new tracks; by default from 1.
        """
        if gap_s <= 0 or most < 1:
            raise ValueError(f"gap_s must be > 0 and most >= 1, got {gap_s:g} and {most}")
        self._gap_s, self._most = gap_s, most
        self._tracks: list[Track] = []
        self._size: tuple[int, int] | None = None
        self._numbers = count(1) if numbers is None else numbers

    @property
    def live(self) -> Sequence[Track]:
        """Tracks that have not ended, the oldest first."""
        return tuple(self._tracks)

    def update(self, people: Detections, time_s: float, seq: int, size: tuple[int, int]) -> Association:
        """Tell the people of the next frame from those of the frames before.

        time_s: when it was captured; it should not go back. size: width and height of the frame in pixels; where it
        changes, all tracks end, since boxes do not compare.
        """
        ended = self.end() if self._size not in (None, size) else self._end_before(time_s - self._gap_s)
        self._size = size
        partner = self._partners(people, time_s)
        found = []
        for i in range(len(people)):
            x1, y1, x2, y2 = people.boxes_xyxy[i].tolist()
            view = View(seq, time_s, (x1, y1, x2, y2), float(people.scores[i]))
            if i in partner:
                track = self._tracks[partner[i]]
                track.add(view, people.embeddings[i])
            else:
                track = Track(next(self._numbers), view, people.embeddings[i])
                self._tracks.append(track)
            found.append(track)
        return Association(found, [*ended, *self._end_overflow()])

    def end(self) -> list[Track]:
        """End all tracks: the camera was taken away."""
        ended, self._tracks = self._tracks, []
        return ended

    def _partners(self, people: Detections, time_s: float) -> dict[int, int]:
        """Detection -> index of the track that it continues."""
        if not self._tracks or len(people) == 0:
            return {}
        affinity = self._affinity(people, time_s)
        order = np.argsort(-affinity, axis=None, kind="stable")
        partner: dict[int, int] = {}
        for row, column in zip(*np.unravel_index(order, affinity.shape), strict=True):
            if affinity[row, column] == -np.inf:
                break
            if int(column) not in partner and int(row) not in partner.values():
                partner[int(column)] = int(row)
        return partner

    def _affinity(self, people: Detections, time_s: float) -> NDArray[np.float64]:
        """(m, n) IoU + cosine; -inf where the two cannot be one person."""
        boxes = np.stack([track.box_at(time_s) for track in self._tracks])
        iou = box_iou(boxes.astype(np.float32), people.boxes_xyxy)
        cosine = np.stack([track.embedding for track in self._tracks]) @ people.embeddings.T
        heights = (boxes[:, 3] - boxes[:, 1])[:, None]
        seconds = np.array([max(0.0, time_s - track.last.time_s) for track in self._tracks])[:, None]
        apart = np.linalg.norm(_centres(boxes)[:, None] - _centres(people.boxes_xyxy)[None], axis=-1)
        reached = apart <= heights * (SLACK_HEIGHTS + RUN_HEIGHTS_PER_S * seconds)
        overlaps = (iou >= LEAST_IOU) & (cosine >= LEAST_COSINE)
        return np.where(overlaps | (reached & (cosine >= SAME_LOOK)), iou + cosine, -np.inf)

    def _end_before(self, time_s: float) -> list[Track]:
        ended = [track for track in self._tracks if track.last.time_s < time_s]
        self._tracks = [track for track in self._tracks if track.last.time_s >= time_s]
        return ended

    def _end_overflow(self) -> list[Track]:
        unseen_first = sorted(self._tracks, key=lambda track: (track.last.time_s, track.votes))
        ended = unseen_first[: max(0, len(self._tracks) - self._most)]
        self._tracks = [track for track in self._tracks if track not in ended]
        return ended


def _centres(boxes_xyxy: NDArray[np.floating]) -> NDArray[np.floating]:
    return (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2


def _centre(box_xyxy: tuple[float, float, float, float]) -> NDArray[np.float64]:
    x1, y1, x2, y2 = box_xyxy
    return np.array([(x1 + x2) / 2, (y1 + y2) / 2])
