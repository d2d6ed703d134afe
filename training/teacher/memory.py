"""The banks of remembered embeddings that a teacher's crops are classified against.

Three banks: one centroid a class, some instances a class, and a queue of people whom nobody named, who can only
be negatives. Centroids and instances follow HHCL (arXiv:2109.12333) with true identities for clusters.
Legend: B anchors, n crops, N classes, K instances a class, U people in the queue, E embedding dimension.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou


class MemorySettings(BaseModel):
    """How a memory weighs and ages what it remembers; the defaults are HHCL's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(default=0.05, gt=0)
    momentum: float = Field(default=0.1, ge=0, lt=1)
    """Share of the old value that stays at an update of a centroid or of the queue."""
    centroid_share: float = Field(default=0.5, ge=0, le=1)
    """mu: weight of the centroid loss beside the loss on hard instances."""
    weighting: Literal["paper", "public_code"] = "paper"
    """paper: mu C + (1 - mu) I, of centroid loss C and instance loss I. public_code: mu (I + (1 - mu) C)."""


class HybridMemory:
    """Centroids, instances and queue, filled from the embeddings of a whole training set.

    An update changes the banks in place and belongs after `backward`: before it, autograd refuses, because the
    gradient needs the banks that the loss was computed with.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        unlabelled: Tensor,
        instances: int,
        settings: MemorySettings,
    ) -> None:
        """features: (n, E) unit rows. labels: (n,) int64, every class of 0..N-1 occurs. unlabelled: (U, E)."""
        num_classes = int(labels.max()) + 1
        self.settings = settings
        self.centroids = F.normalize(_class_means(features, labels, num_classes), dim=1)
        """(N, E) unit rows."""
        self.instances = features[_rows_of_classes(labels, num_classes, instances)]
        """(N, K, E) unit rows."""
        self.queue = unlabelled.clone()
        """(U, E) unit rows."""

    def loss(self, features: Tensor, labels: Tensor, excluded: Tensor | None = None) -> Tensor:
        """Cross-entropy of (B, E) unit rows against centroids and against hard instances, a scalar.

        labels: (B,) in 0..N-1. excluded: (B, U) bool, True where a person of the queue is no negative of the
        anchor: `overlaps`.
        """
        negatives = features @ self.queue.T
        if excluded is not None:
            negatives = negatives.masked_fill(excluded, -torch.inf)
        centroid, hard = (
            F.cross_entropy(torch.cat([logits, negatives], dim=1) / self.settings.temperature, labels)
            for logits in (features @ self.centroids.T, self.hard_logits(features, labels))
        )
        share = self.settings.centroid_share
        if self.settings.weighting == "public_code":
            return share * (hard + (1 - share) * centroid)
        return share * centroid + (1 - share) * hard

    def hard_logits(self, features: Tensor, labels: Tensor) -> Tensor:
        """(B, N) cosines with the farthest instance of the own class and the nearest one of every other class."""
        cosines = torch.einsum("be,nke->bnk", features, self.instances)
        own = F.one_hot(labels, len(self.instances)).bool()
        return torch.where(own, cosines.amin(2), cosines.amax(2))

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Move the centroids of a batch's classes towards its means, and replace their instances by it.

        features: (B, E) unit rows, labels: (B,).
        """
        classes, batch_labels = labels.unique(return_inverse=True)
        means = _class_means(features, batch_labels, len(classes))
        self.centroids[classes] = self._aged(self.centroids[classes], means)
        rows = _rows_of_classes(batch_labels, len(classes), self.instances.shape[1])
        self.instances[classes] = features[rows]

    @torch.no_grad()
    def refresh(self, features: Tensor, entries: Tensor) -> None:
        """Move people of the queue, seen again as (B, E) unit rows. entries: (B,) distinct places in the queue."""
        self.queue[entries] = self._aged(self.queue[entries], features)

    def _aged(self, old: Tensor, new: Tensor) -> Tensor:
        momentum = self.settings.momentum
        return F.normalize(momentum * old + (1 - momentum) * new, dim=1)


def overlaps(
    frames: Tensor, boxes_xyxy: Tensor, other_frames: Tensor, other_boxes_xyxy: Tensor, *, min_iou: float
) -> Tensor:
    """(B, U) bool: which of U people may be the same person as an anchor, seen in the same frame at one place.

    frames: (B,) and (U,). boxes_xyxy: (B, 4) and (U, 4).
    """
    same_frame = frames[:, None] == other_frames[None]
    return same_frame & (box_iou(boxes_xyxy, other_boxes_xyxy) > min_iou)


def _class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    sums = features.new_zeros(num_classes, features.shape[1]).index_add_(0, labels, features)
    return sums / labels.bincount(minlength=num_classes)[:, None]


def _rows_of_classes(labels: Tensor, num_classes: int, count: int) -> Tensor:
    """(N, count) rows of each class, in order; a class with fewer begins again."""
    counts = labels.bincount(minlength=num_classes)
    starts = counts.cumsum(0) - counts
    offsets = torch.arange(count, device=labels.device)[None] % counts[:, None]
    return labels.argsort(stable=True)[starts[:, None] + offsets]
