"""The person asked for, and the best places where that person was seen."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from ..models.detections import Float32Array
from ..models.detector import PersonDetector, check_boxes
from .frames import Picture, read_image

Box = tuple[float, float, float, float]

# Hits of one camera that lie closer than this show the same passage of a person.
SAME_PASSAGE_S = 1.0

# A crop is kept for the contact sheet only; this bounds the memory of a hit to about half a megabyte.
CROP_HEIGHT = 360

logger = logging.getLogger(__name__)


class QueryError(Exception):
    """The query image or box does not say which person is meant."""


@dataclass(frozen=True, eq=False)
class Query:
    """The person to find."""

    name: str
    embedding: Float32Array
    """(E,) unit norm."""
    image: Picture
    box: Box
    """The person in the image, x1, y1, x2, y2 pixels."""


@dataclass(frozen=True, eq=False)
class Hit:
    """A person that may be the one asked for."""

    camera: str
    seq: int
    moment_s: float | None
    """Seconds since the camera's first frame; None where neither timestamps nor a frame rate are known."""
    box: Box
    """Frame pixels."""
    score: float
    cos: float
    is_match: bool
    """Whether cos reaches the match threshold."""
    crop: Picture = field(repr=False)

    @property
    def similarity(self) -> float:
        """By which hits are ranked; see models.detections.Detections.similarity."""
        return self.cos * self.score


def load_query(detector: PersonDetector, image: Path, box: Box | None = None, steps: int = 4) -> Query:
    """Read the query image and describe the person in it: the one in the box, else the best detection.

    box: x1, y1, x2, y2 in pixels of the upright image. Raises ImageError (unreadable image), QueryError
    (wrong box, no person), ValueError (wrong steps).
    """
    picture = read_image(image, "query")
    if box is None:
        return _best_person(detector, image, picture, steps)
    height, width = picture.shape[:2]
    try:
        boxes = check_boxes(np.array([box], np.float32), width, height)
    except ValueError:
        raise QueryError(
            f"box must be x1,y1,x2,y2 with x1 < x2 and y1 < y2, inside the {width}x{height} image {image}, "
            f"got {box_text(box)}"
        ) from None
    boxes = np.clip(boxes, 0, np.array([width, height] * 2, np.float32))
    return Query(image.stem, detector.embed(picture, boxes, steps)[0], picture, as_box(boxes[0]))


def _best_person(detector: PersonDetector, path: Path, picture: Picture, steps: int) -> Query:
    [people] = detector.detect([picture], steps)
    if len(people) == 0:
        raise QueryError(
            f"query must be an image with a person, got no detection in {path}; give --box x1,y1,x2,y2"
        )
    boxes = [as_box(box) for box in people.boxes_xyxy]
    if len(boxes) > 1:
        others = " or ".join(f"--box {box_text(box)}" for box in boxes[1:4])
        logger.warning(
            "query %s shows %d people: took the one with score %.2f at %s; for another give %s",
            path,
            len(boxes),
            people.scores[0],
            box_text(boxes[0]),
            others,
        )
    return Query(path.stem, people.embeddings[0], picture, boxes[0])


class BestHits:
    """The best hits of each camera, one a passage. Memory is bounded: cameras x per_camera crops."""

    def __init__(self, per_camera: int = 6) -> None:
        self._per_camera = per_camera
        self._hits: dict[str, list[Hit]] = {}

    def offer(self, hit: Hit) -> None:
        """Keep the hit if it is one of the best of its camera and the best of its passage."""
        kept = self._hits.setdefault(hit.camera, [])
        passage = [other for other in kept if _same_passage(hit, other)]
        if any(other.similarity >= hit.similarity for other in passage):
            return
        rest = [other for other in kept if other not in passage]
        self._hits[hit.camera] = sorted([*rest, hit], key=_by_similarity)[: self._per_camera]

    def ranked(self, most: int | None = None) -> list[Hit]:
        """Return the hits of all cameras, best first."""
        return sorted((hit for hits in self._hits.values() for hit in hits), key=_by_similarity)[:most]

    def best_of(self, camera: str) -> Hit | None:
        """Return the best hit of one camera."""
        return next(iter(self._hits.get(camera, [])), None)


def _by_similarity(hit: Hit) -> float:
    return -hit.similarity


def _same_passage(a: Hit, b: Hit) -> bool:
    if a.moment_s is None or b.moment_s is None:
        return a.seq == b.seq
    return abs(a.moment_s - b.moment_s) < SAME_PASSAGE_S


def crop_person(image: Picture, box: Box, margin: float = 0.06) -> Picture:
    """Return a copy of the box and a margin around it, at most CROP_HEIGHT pixels high.

    margin: as a share of the box.
    """
    frame_height, frame_width = image.shape[:2]
    x1, y1, x2, y2 = box
    dx, dy = margin * (x2 - x1), margin * (y2 - y1)
    # A box on the edge of the frame still gives a crop of a pixel.
    left = min(max(0, int(x1 - dx)), frame_width - 1)
    top = min(max(0, int(y1 - dy)), frame_height - 1)
    right, bottom = min(frame_width, int(x2 + dx) + 1), min(frame_height, int(y2 + dy) + 1)
    crop = image[top:bottom, left:right]
    if (height := bottom - top) <= CROP_HEIGHT:
        return crop.copy()
    width = max(1, round((right - left) * CROP_HEIGHT / height))
    return np.asarray(cv2.resize(crop, (width, CROP_HEIGHT), interpolation=cv2.INTER_AREA), np.uint8)


def box_text(box: Sequence[float]) -> str:
    """Write a box as --box takes it: 10,20.5,60,180."""
    return ",".join(f"{value:g}" for value in box)


def as_box(row: Float32Array) -> Box:
    """(4,) x1, y1, x2, y2 -> floats rounded to a tenth of a pixel."""
    x1, y1, x2, y2 = (round(float(value), 1) for value in row)
    return x1, y1, x2, y2
