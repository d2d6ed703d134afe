"""How well people are detected: the standard AP50, and the AP x recall of the person search papers.

The two are not interchangeable. AP50 lets the best-scored detection of a person count (PASCAL VOC, COCO); the
papers' lets the best-placed one count and multiplies by the recall. NumPy only.
Legend: n detections of one image, M people of it, R ignored regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...models.detections import Detections, box_iou
from ..datasets.schema import UNLABELLED, LabelledImage
from .search import average_precision

IOU_THRESHOLD = 0.5

# COCO's recall levels.
RECALL_LEVELS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class PrecisionRecall:
    """A precision-recall curve at COCO's 101 levels."""

    precision: NDArray[np.float64]
    """(101,) best precision at a recall of at least 0, 0.01, ... 1; 0 where that recall is not reached."""
    recall: float
    """Share of all people that were found, at whatever score."""

    @property
    def ap(self) -> float:
        """COCO's 101-point average precision: the mean over the levels."""
        return float(self.precision.mean())


@dataclass(frozen=True)
class DetectionScores:
    """Detection at IoU 0.5 by both conventions."""

    curve: PrecisionRecall
    """Detections taken by score, as in COCO; curve.ap is the AP50 and curve.recall its recall."""
    ap_recall: float
    """The person search papers' AP: scikit-learn's average precision times `recall`."""
    recall: float
    """The recall that goes with ap_recall: people whose best-placed detection has IoU >= 0.5 with them."""
    num_people: int


def evaluate_detection(
    detections: Sequence[Detections],
    images: Sequence[LabelledImage],
    *,
    score_threshold: float = 0.0,
    labelled_only: bool = False,
) -> DetectionScores:
    """Score the detections of some images, one Detections per image, boxes in pixels of the stored image.

    score_threshold: detections below it do not count; average precision is complete only with a low one.
    labelled_only: look for people with an identity only and leave out images without any. Detections of
    other people are wrong then, so only the recall means something; the published scripts print it alone.
    A detection that finds nobody and lies in one ignored region by more than half of its own area counts
    neither way. Raises ValueError where there is nobody to find.
    """
    by_score, by_iou = [], []
    num_people = 0
    for people, image in zip(detections, images, strict=True):
        truth = image.boxes_xyxy[image.pids != UNLABELLED] if labelled_only else image.boxes_xyxy
        if labelled_only and len(truth) == 0:
            continue
        num_people += len(truth)
        shown = scored_from(score_threshold, people)
        excused = _in_ignored_region(shown.boxes_xyxy, image.ignored_xyxy)
        by_score.append(_judged(shown.scores, match_by_score(shown, truth) >= 0, excused))
        by_iou.append(_judged(shown.scores, match_by_iou(shown, truth) >= 0, excused))
    if num_people == 0:
        whom = "person with an identity" if labelled_only else "person"
        raise ValueError(f"images must show at least one {whom}, got none in {len(images)} images")
    scores, hits = _joined(by_iou)
    recall = float(hits.sum() / num_people)
    ap_recall = average_precision(hits, scores) * recall
    return DetectionScores(precision_recall(*_joined(by_score), num_people), ap_recall, recall, num_people)


def match_by_score(people: Detections, truth_xyxy: NDArray[np.float32]) -> NDArray[np.int64]:
    """(n,) which of the (M, 4) people each detection found, -1 for none; a person is found once.

    Greedy by score: a detection takes the best-placed person who is still free, at IoU >= 0.5 (COCO).
    """
    assigned = np.full(len(people), -1, np.int64)
    iou = box_iou(people.boxes_xyxy, truth_xyxy)
    free = np.ones(len(truth_xyxy), bool)
    for i in np.argsort(-people.scores, kind="stable"):
        candidates = np.where(free, iou[i], 0.0)
        if len(candidates) and candidates.max() >= IOU_THRESHOLD:
            assigned[i] = candidates.argmax()
            free[assigned[i]] = False
    return assigned


def match_by_iou(people: Detections, truth_xyxy: NDArray[np.float32]) -> NDArray[np.int64]:
    """(n,) which of the (M, 4) people each detection found, -1 for none; a person is found once.

    A pair counts when each is the other's best by IoU, and that is >= 0.5; scores play no part.
    Source: the evaluation code of Xiao et al. (CVPR 2017), kept by the papers that followed.
    """
    assigned = np.full(len(people), -1, np.int64)
    if len(people) == 0 or len(truth_xyxy) == 0:
        return assigned
    iou = box_iou(people.boxes_xyxy, truth_xyxy)
    best_person, best_detection = iou.argmax(axis=1), iou.argmax(axis=0)
    for person, i in enumerate(best_detection):
        if best_person[i] == person and iou[i, person] >= IOU_THRESHOLD:
            assigned[i] = person
    return assigned


def precision_recall(
    scores: NDArray[np.floating], is_hit: NDArray[np.bool_], num_people: int
) -> PrecisionRecall:
    """Precision at COCO's 101 recall levels, of detections pooled over all images.

    scores, is_hit: one entry a detection. num_people: all who were there, found or not.
    """
    hits = is_hit[np.argsort(-scores, kind="stable")]
    if num_people == 0 or not hits.any():
        return PrecisionRecall(np.zeros(len(RECALL_LEVELS)), 0.0)
    found = np.cumsum(hits)
    recall, precision = found / num_people, found / np.arange(1, len(hits) + 1)
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    index = np.searchsorted(recall, RECALL_LEVELS, side="left")
    return PrecisionRecall(envelope[index], float(recall[-1]))


def scored_from(score_threshold: float, people: Detections) -> Detections:
    """Return the detections that have at least a score."""
    kept = people.scores >= score_threshold
    return Detections(people.boxes_xyxy[kept], people.scores[kept], people.embeddings[kept])


# Scores and hits of the detections that count.
_Judged = tuple[NDArray[np.float32], NDArray[np.bool_]]


def _judged(scores: NDArray[np.float32], is_hit: NDArray[np.bool_], excused: NDArray[np.bool_]) -> _Judged:
    counts = is_hit | ~excused
    return scores[counts], is_hit[counts]


def _joined(parts: Sequence[_Judged]) -> _Judged:
    scores, hits = zip(*parts, strict=True)
    return np.concatenate(scores), np.concatenate(hits)


def _in_ignored_region(
    boxes_xyxy: NDArray[np.float32], ignored_xyxy: NDArray[np.float32] | None
) -> NDArray[np.bool_]:
    """(n,) whether more than half of a box lies in one of the (R, 4) regions."""
    if ignored_xyxy is None or len(ignored_xyxy) == 0:
        return np.zeros(len(boxes_xyxy), bool)
    low = np.maximum(boxes_xyxy[:, None, :2], ignored_xyxy[None, :, :2])
    high = np.minimum(boxes_xyxy[:, None, 2:], ignored_xyxy[None, :, 2:])
    area = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(axis=1)
    return ((high - low).clip(min=0).prod(axis=2) > area[:, None] / 2).any(axis=1)
