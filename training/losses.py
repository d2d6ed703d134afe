"""The set loss of PSDiff: focal classification, L1 and GIoU of boxes, distance of embeddings.

Legend: B images, N proposals, E embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from ..models.denoiser import Prediction
from .matcher import (
    FOCAL_ALPHA,
    FOCAL_GAMMA,
    WEIGHT_CLASS,
    WEIGHT_GIOU,
    WEIGHT_L1,
    WEIGHT_REID,
    Match,
    People,
)


class SetLoss(NamedTuple):
    """The four terms, each divided by the number of matched pairs, and their weighted sum."""

    classification: Tensor
    l1: Tensor
    giou: Tensor
    reid: Tensor

    @property
    def total(self) -> Tensor:
        """The weighted sum that is minimised (PSDiff, eq. 11)."""
        return (
            WEIGHT_CLASS * self.classification
            + WEIGHT_L1 * self.l1
            + WEIGHT_GIOU * self.giou
            + WEIGHT_REID * self.reid
        )


def set_loss(
    prediction: Prediction, people: Sequence[People], matches: Sequence[Match], *, pairs: float | None = None
) -> SetLoss:
    """Loss of a batch of predictions (B, N, ...) against the people of each image, as matched.

    Images without people count in the classification alone, people without a known embedding not in `reid`.
    pairs: what the sums are divided by; the default is the number of matched pairs, at least 1. Processes that
    share a batch pass the mean over all of them.
    """
    image = torch.cat([torch.full_like(m.proposals, i) for i, m in enumerate(matches)])
    proposal = torch.cat([m.proposals for m in matches])
    boxes = torch.cat([p.boxes_norm[m.people] for p, m in zip(people, matches, strict=True)])
    embeddings = torch.cat([p.embeddings[m.people] for p, m in zip(people, matches, strict=True)])
    is_person = torch.zeros_like(prediction.logits)
    is_person[image, proposal] = 1.0
    pairs = max(len(proposal), 1) if pairs is None else pairs
    distance = reid_distance(prediction.embeddings[image, proposal], embeddings)
    focal = sigmoid_focal_loss(prediction.logits, is_person, FOCAL_ALPHA, FOCAL_GAMMA, reduction="sum")
    predicted_boxes = prediction.boxes_norm[image, proposal]
    return SetLoss(
        classification=focal / pairs,
        l1=F.l1_loss(predicted_boxes, boxes, reduction="sum") / pairs,
        giou=generalized_box_iou_loss(predicted_boxes, boxes, reduction="sum") / pairs,
        reid=(distance * embeddings.any(dim=1)).sum() / pairs,
    )


def reid_distance(predicted: Tensor, target: Tensor) -> Tensor:
    """Euclidean distance of unit vectors, sqrt(2 - 2 cos) in [0, 2]. (..., E) -> (...,). PSDiff, eq. 10."""
    difference = F.normalize(predicted, dim=-1) - F.normalize(target, dim=-1)
    # The small term keeps the gradient finite where the two agree.
    return (difference.square().sum(-1) + 1e-12).sqrt()
