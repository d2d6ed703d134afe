"""What the network found in one frame, checked at the door; NumPy and OpenCV only, so every runtime shares it.

Legend: n detections, N proposals, E embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]


@dataclass(frozen=True)
class Detections:
    """People found in one frame, best score first.

    boxes_xyxy: (n, 4) float32, frame pixels. scores: (n,) float32 in [0, 1].
    embeddings: (n, E) float32, unit rows; the cosine of two people is their dot product.
    Raises ValueError where shapes do not agree.
    """

    boxes_xyxy: Float32Array
    scores: Float32Array
    embeddings: Float32Array

    def __post_init__(self) -> None:
        n = len(self.scores)
        if self.boxes_xyxy.shape != (n, 4):
            raise ValueError(f"boxes_xyxy must be of shape ({n}, 4), got {self.boxes_xyxy.shape}")
        if self.embeddings.ndim != 2 or len(self.embeddings) != n:
            raise ValueError(f"embeddings must be of shape ({n}, E), got {self.embeddings.shape}")

    def __len__(self) -> int:
        return len(self.scores)

    def similarity(self, query: Float32Array) -> Float32Array:
        """(n,) by which to rank: cosine to the query's embedding (E,), times the detection score.

        A doubtful detection can lie anywhere in the embedding space; the score keeps it from coming out on
        top. Source: confidence-weighted similarity, Chen et al., Norm-Aware Embedding for Efficient Person
        Search (CVPR 2020).
        """
        return self.embeddings @ query * self.scores


def select_detections(
    boxes_xyxy: Float32Array,
    scores: Float32Array,
    embeddings: Float32Array,
    *,
    score_threshold: float,
    nms_iou: float,
) -> Detections:
    """Filter the N proposals of one frame by score, then by non-maximum suppression.

    boxes_xyxy: (N, 4) frame pixels, already clipped to the frame. scores: (N,). embeddings: (N, E).
    A box is suppressed when its IoU with a better one is > nms_iou (strictly). What is suppressed still
    votes: the embedding of a person is the score-weighted mean over all proposals on that person, since they
    saw the same pixels through different noise.
    """
    # A box clipped to less than a pixel lies outside the frame; it is no detection whatever its score.
    inside = ((boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]) >= 1).all(axis=1)
    candidates = np.flatnonzero(inside & (scores >= score_threshold))
    kept = candidates[non_maximum_suppression(boxes_xyxy[candidates], scores[candidates], nms_iou)]
    votes = (box_iou(boxes_xyxy[kept], boxes_xyxy) > nms_iou) * scores
    votes[np.arange(len(kept)), kept] = scores[kept]
    mean = votes @ embeddings
    mean = mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)
    return Detections(boxes_xyxy[kept], scores[kept], mean.astype(np.float32))


def box_iou(a: Float32Array, b: Float32Array) -> Float32Array:
    """(n, 4) and (M, 4) xyxy -> (n, M) intersection over union."""
    overlap = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    intersection = overlap.clip(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (a, b)]
    return intersection / np.maximum(areas[0][:, None] + areas[1][None] - intersection, 1e-9)


def non_maximum_suppression(
    boxes_xyxy: Float32Array, scores: Float32Array, nms_iou: float
) -> NDArray[np.int64]:
    """Indices of the boxes that stay, best score first. boxes_xyxy: (n, 4), scores: (n,)."""
    if len(scores) == 0:
        return np.zeros(0, np.int64)
    boxes_xywh = np.concatenate([boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]], axis=1)
    rectangles: Sequence[Sequence[float]] = boxes_xywh.astype(float).tolist()
    kept = cv2.dnn.NMSBoxes(rectangles, scores.astype(float).tolist(), 0.0, nms_iou)
    return np.asarray(kept, np.int64).reshape(-1)
