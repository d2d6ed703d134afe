"""The re-identification metric of Market-1501 and its successors: CMC and mAP over a gallery of crops.

A query's own camera does not count: crops of the same person from the same camera are left out of its gallery.
NumPy only.
Legend: Q queries, G gallery crops, E embedding dimension.
Source: Zheng et al., Scalable Person Re-identification: A Benchmark (ICCV 2015).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..datasets.schema import NO_CAMERA, UNLABELLED
from .search import average_precision, first_hit_rank

# Similarities held at once: 64 MiB of float32.
MAX_SIMILARITIES = 1 << 24

MAX_RANK = 50


@dataclass(frozen=True)
class DescribedCrops:
    """Crops with their embeddings; UNLABELLED crops match nobody. Raises ValueError where shapes disagree."""

    embeddings: NDArray[np.float32]
    """(n, E), compared by Euclidean distance; unit rows make that the order of the cosine."""
    pids: NDArray[np.int64]
    """(n,)."""
    cameras: NDArray[np.int64]
    """(n,); NO_CAMERA where the set does not tell."""

    def __post_init__(self) -> None:
        n = len(self.embeddings)
        if self.embeddings.ndim != 2:
            raise ValueError(f"embeddings must be of shape (n, E), got {self.embeddings.shape}")
        for name in ("pids", "cameras"):
            shape = getattr(self, name).shape
            if shape != (n,):
                raise ValueError(f"{name} must be of shape ({n},), got {shape}")


@dataclass(frozen=True)
class ReidScores:
    """What a ranking achieved; means are over the queries with a match in their gallery."""

    map: float
    cmc: NDArray[np.float64]
    """(MAX_RANK,) share of queries with a match among the first 1, 2, ... crops."""
    num_queries: int
    """Queries that were scored."""
    num_without_match: int
    """Queries that were left out: nothing of that person was left in the gallery."""
    ap: NDArray[np.float64]
    """(Q,) average precision of each query; NaN for one that was left out."""

    def top(self, rank: int) -> float:
        """Share of queries with a match among the first `rank` crops, 1 <= rank <= MAX_RANK."""
        return float(self.cmc[rank - 1])


def evaluate_reid(query: DescribedCrops, gallery: DescribedCrops) -> ReidScores:
    """Rank the gallery for every query by Euclidean distance, without re-ranking, and score the ranking.

    Distractors stay in the gallery: they match nobody. A crop of unknown camera is never left out, so a set
    without cameras keeps all its matches; a query crop must not be in the gallery then. Equal distances form
    one group in the average precision and stay in gallery order in the CMC.
    Raises ValueError where embeddings do not agree or no query has a match.
    """
    if query.embeddings.shape[1] != gallery.embeddings.shape[1]:
        found = f"{query.embeddings.shape[1]} and {gallery.embeddings.shape[1]}"
        raise ValueError(f"query and gallery must have one embedding dimension, got {found}")
    num_queries = len(query.pids)
    ap, ranks = np.full(num_queries, np.nan), np.full(num_queries, np.nan)
    for number, nearness in enumerate(_nearness(query.embeddings, gallery.embeddings)):
        pid, camera = query.pids[number], query.cameras[number]
        same_person = (gallery.pids == pid) & (pid != UNLABELLED)
        kept = ~(same_person & (gallery.cameras == camera) & (camera != NO_CAMERA))
        if (same_person & kept).any():
            ap[number] = average_precision(same_person[kept], nearness[kept])
            ranks[number] = first_hit_rank(same_person[kept], nearness[kept])
    scored = ~np.isnan(ap)
    if not scored.any():
        raise ValueError("query must have at least one crop with a match in the gallery, got none")
    cmc = (ranks[scored, None] < np.arange(1, MAX_RANK + 1)).mean(axis=0)
    num_scored = int(scored.sum())
    return ReidScores(float(ap[scored].mean()), cmc, num_scored, num_queries - num_scored, ap)


def _nearness(query: NDArray[np.float32], gallery: NDArray[np.float32]) -> Iterator[NDArray[np.floating]]:
    """Yield for each query (G,) values that fall as the Euclidean distance grows: |q|^2 - |q - g|^2."""
    squares = np.einsum("ge,ge->g", gallery, gallery)
    chunk = max(1, MAX_SIMILARITIES // max(len(gallery), 1))
    for start in range(0, len(query), chunk):
        yield from 2 * query[start : start + chunk] @ gallery.T - squares
