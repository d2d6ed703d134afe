"""The person search metric of CUHK-SYSU, PRW and PoseTrack21: mAP and top-k over galleries of whole images.

A gallery image counts when one of its detections is the person, so a missed detection costs as much as a
wrong embedding. NumPy only.
Legend: Q queries, G gallery images, n detections of one image, D of all images, E embedding dimension.
Source: Xiao et al., Joint Detection and Identification Feature Learning for Person Search (CVPR 2017), and
the evaluation code released with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ...models.detections import Detections, box_iou
from ..datasets.schema import DatasetError, Query

RankBy = Literal["cosine", "cws"]

# OIM, NAE and SeqNet; other papers choose 0.2 to 0.3, which moves mAP by points: always print it.
SCORE_THRESHOLD = 0.5

# Queries whose similarities are computed in one matrix product.
QUERIES_PER_BLOCK = 64


@dataclass(frozen=True)
class SearchScores:
    """What a search achieved; means are over the queries whose person is in the gallery."""

    map: float
    top1: float
    """Share of queries with a hit at the top of the whole gallery."""
    top5: float
    top10: float
    num_queries: int
    """Queries that were scored."""
    num_without_truth: int
    """Queries that were left out: their gallery does not show the person."""
    gallery_size: float
    """Mean number of gallery images of the queries that were scored."""
    ap: NDArray[np.float64]
    """(Q,) average precision of each query; NaN for one that was left out."""


def search(
    detections: Sequence[Detections],
    queries: Sequence[Query],
    query_embeddings: NDArray[np.floating],
    *,
    score_threshold: float = SCORE_THRESHOLD,
    rank_by: RankBy = "cosine",
) -> SearchScores:
    """Rank the detections of each query's gallery and score the ranking.

    detections: one per test image, boxes in pixels of the stored image. query_embeddings: (Q, E) unit rows;
    a row with NaN is a query that could not be described and finds nothing. score_threshold: detections
    below it are not searched. rank_by: "cosine", or "cws" for cosine x detection score (Chen et al.,
    Norm-Aware Embedding for Efficient Person Search, CVPR 2020). Equal similarities stay in gallery order.
    Raises ValueError on a bad argument, DatasetError where no query's person is in its gallery.
    """
    _check(queries, query_embeddings, rank_by)
    pool = _pool(detections, score_threshold)
    ap, ranks = np.full(len(queries), np.nan), np.full(len(queries), np.nan)
    for start in range(0, len(queries), QUERIES_PER_BLOCK):
        block = query_embeddings[start : start + QUERIES_PER_BLOCK] @ pool.embeddings.T
        values = block * pool.scores if rank_by == "cws" else block
        for number, similarity in enumerate(values, start):
            if queries[number].truth:
                ap[number], ranks[number] = _score_query(pool, queries[number], similarity)
    scored = ~np.isnan(ap)
    if not scored.any():
        raise DatasetError(
            f"one query at least must have its person in its gallery, got none of {len(queries)}"
        )
    top1, top5, top10 = (float((ranks[scored] < k).mean()) for k in (1, 5, 10))
    num_queries = int(scored.sum())
    sizes = [len(query.gallery) for query, is_scored in zip(queries, scored, strict=True) if is_scored]
    return SearchScores(
        map=float(ap[scored].mean()),
        top1=top1,
        top5=top5,
        top10=top10,
        num_queries=num_queries,
        num_without_truth=len(queries) - num_queries,
        gallery_size=float(np.mean(sizes)),
        ap=ap,
    )


def gallery_curve(
    detections: Sequence[Detections],
    queries_by_size: Mapping[int, Sequence[Query]],
    query_embeddings: NDArray[np.floating],
    *,
    score_threshold: float = SCORE_THRESHOLD,
    rank_by: RankBy = "cosine",
) -> dict[int, SearchScores]:
    """Score the same queries in galleries of several sizes; arguments as in `search`.

    queries_by_size: gallery size -> (Q) queries, the same people in the same order for each size.
    """
    return {
        size: search(detections, queries, query_embeddings, score_threshold=score_threshold, rank_by=rank_by)
        for size, queries in queries_by_size.items()
    }


def average_precision(is_hit: NDArray[np.bool_], values: NDArray[np.floating]) -> float:
    """Average precision of a ranking, best value first; 0 without a hit.

    is_hit, values: (n,). The sum of (R_k - R_k-1) P_k with equal values grouped, as scikit-learn's
    average_precision_score. Recall grows at hits only, so it is the mean over hits of the precision there.
    """
    hit_values = np.sort(values[is_hit])
    if len(hit_values) == 0:
        return 0.0
    hits_from = len(hit_values) - np.searchsorted(hit_values, hit_values)
    shown_from = len(values) - np.searchsorted(np.sort(values), hit_values)
    return float((hits_from / shown_from).mean())


def first_hit_rank(is_hit: NDArray[np.bool_], values: NDArray[np.floating]) -> float:
    """How many entries stand above the best hit; inf without a hit. Equal values stay in their order."""
    if not is_hit.any():
        return np.inf
    best = int(np.where(is_hit, values, -np.inf).argmax())
    above = (values > values[best]).sum() + (values[:best] == values[best]).sum()
    return float(above)


def iou_thresholds(boxes_xyxy: NDArray[np.floating]) -> NDArray[np.float64]:
    """(n, 4) boxes in pixels -> (n,) the IoU from which a detection is that person.

    min(0.5, w h / ((w + 10)(h + 10))): a small box may miss by five pixels on each side.
    """
    width, height = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).astype(np.float64).T
    return np.minimum(0.5, width * height / ((width + 10) * (height + 10)))


@dataclass(frozen=True)
class _Pool:
    """The detections of all test images, one image after the other."""

    boxes_xyxy: NDArray[np.float32]
    """(D, 4)."""
    scores: NDArray[np.float32]
    """(D,)."""
    embeddings: NDArray[np.float32]
    """(D, E)."""
    starts: NDArray[np.int64]
    """Detections of image i are the rows starts[i] to starts[i + 1]."""

    def rows(self, images: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of the detections of some images, in the order of the images."""
        first, counts = self.starts[images], self.starts[images + 1] - self.starts[images]
        shift = first - (np.cumsum(counts) - counts)
        return np.repeat(shift, counts) + np.arange(counts.sum())


def _pool(detections: Sequence[Detections], score_threshold: float) -> _Pool:
    kept = [people.scores >= score_threshold for people in detections]
    chosen = list(zip(detections, kept, strict=True))
    counts = [int(mask.sum()) for mask in kept]
    return _Pool(
        np.concatenate([people.boxes_xyxy[mask] for people, mask in chosen]),
        np.concatenate([people.scores[mask] for people, mask in chosen]),
        np.concatenate([people.embeddings[mask] for people, mask in chosen]),
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    )


def _score_query(pool: _Pool, query: Query, similarity: NDArray[np.floating]) -> tuple[float, float]:
    """Average precision x recall of one query, and the rank of its first hit. similarity: (D,)."""
    if np.isnan(similarity).any():
        return 0.0, np.inf
    is_hit = np.zeros(len(similarity), bool)
    for image, boxes in query.truth.items():
        start, end = pool.starts[image], pool.starts[image + 1]
        overlaps = box_iou(pool.boxes_xyxy[start:end], boxes) >= iou_thresholds(boxes)
        matches = start + np.flatnonzero(overlaps.any(axis=1))
        if len(matches):
            # The most similar one alone; further detections of the same person count as wrong.
            is_hit[matches[similarity[matches].argmax()]] = True
    rows = pool.rows(query.gallery)
    recall = is_hit.sum() / len(query.truth)
    shown, values = is_hit[rows], similarity[rows]
    return average_precision(shown, values) * float(recall), first_hit_rank(shown, values)


def _check(queries: Sequence[Query], query_embeddings: NDArray[np.floating], rank_by: str) -> None:
    if query_embeddings.ndim != 2 or len(query_embeddings) != len(queries):
        raise ValueError(
            f"query_embeddings must be of shape ({len(queries)}, E), got {query_embeddings.shape}"
        )
    if rank_by not in get_args(RankBy):
        raise ValueError(f"rank_by must be one of {', '.join(get_args(RankBy))}, got {rank_by}")
