"""Which crops a batch holds: some people with several views each, and some whom nobody named."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from ..datasets.schema import UNLABELLED


class IdentitySampler(Sampler[list[int]]):
    """Batches of rows: `identities` classes x `instances` views of each, then the unlabelled share.

    The views of a class are an anchor and, while there are any, views by other cameras; a class with too few
    gives some twice. Classes take turns, and so do the unlabelled crops.
    Source: the sampler of HHCL (arXiv:2109.12333).
    """

    def __init__(
        self,
        labels: NDArray[np.int64],
        cameras: NDArray[np.int64],
        *,
        identities: int,
        instances: int,
        unlabelled_share: float,
        batches: int,
        seed: int,
    ) -> None:
        """labels: (n,) of 0..N-1 or UNLABELLED. unlabelled_share: of the batch, in [0, 1). batches: per epoch."""
        self.cameras, self.instances, self.batches = cameras, instances, batches
        self.rows = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
        self.unlabelled = np.flatnonzero(labels == UNLABELLED)
        self.identities = min(identities, len(self.rows))
        wanted = round(self.identities * instances * unlabelled_share / (1 - unlabelled_share))
        self.num_unlabelled = min(wanted, len(self.unlabelled))
        self.rng = np.random.default_rng(seed)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        classes = _rounds(self.rng, np.arange(len(self.rows)), self.identities)
        strangers = _rounds(self.rng, self.unlabelled, self.num_unlabelled)
        for _ in range(self.batches):
            views = [self._views(self.rows[label]) for label in next(classes)]
            yield np.concatenate([*views, next(strangers)]).tolist()

    def _views(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        anchor = self.rng.choice(rows)
        others = rows[self.cameras[rows] != self.cameras[anchor]]
        if not len(others):
            others = rows[rows != anchor] if len(rows) > 1 else rows
        count = self.instances - 1
        return np.append(self.rng.choice(others, count, replace=len(others) < count), anchor)


def _rounds(rng: np.random.Generator, values: NDArray[np.int64], count: int) -> Iterator[NDArray[np.int64]]:
    """Endless samples of `count` distinct values that take turns; a remainder below `count` waits for nobody."""
    waiting = rng.permutation(values)
    while True:
        if len(waiting) < count:
            waiting = rng.permutation(values)
        yield waiting[:count]
        waiting = waiting[count:]
