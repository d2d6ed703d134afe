"""Which proposal answers for which person: Hungarian (one to one), SimOTA (one to many), or its origin.

Legend: N proposals, M people of one image, E embedding dimension. Everything here is without gradient.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou, generalized_box_iou

from ..models.denoiser import Prediction

Matching = Literal["hungarian", "simota", "origin"]

# Focal loss constants (Lin et al., arXiv:1708.02002) and the weights of PSDiff, sec. IV-A.
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
WEIGHT_CLASS, WEIGHT_L1, WEIGHT_GIOU, WEIGHT_REID = 2.0, 5.0, 2.0, 5.0

# SimOTA (Ge et al., arXiv:2107.08430): candidates summed for the dynamic k, the centre window in box sizes,
# and the penalties outside of it; only their order of magnitude matters.
TOP_CANDIDATES = 5
CENTRE_RADIUS = 2.5
OUTSIDE_COST, BACKGROUND_COST = 100.0, 10000.0


class People(NamedTuple):
    """The people of one image."""

    boxes_norm: Tensor
    """(M, 4) xyxy normalised."""
    embeddings: Tensor
    """(M, E) unit rows; a row of zeros where nobody knows the embedding, which is then not learnt."""


class Match(NamedTuple):
    """Pairs: proposals[i] answers for people[i]; a proposal occurs once, a person at least once.

    Under `origin`, and where there are fewer proposals than people, a person may be left without.
    """

    proposals: Tensor
    people: Tensor


@torch.no_grad()
def match(prediction: Prediction, people: People, matching: Matching, origin: Tensor) -> Match:
    """Match the N proposals of one image (fields without B) with its M people.

    `hungarian` minimises the total cost of one proposal a person (PSDiff, sec. III-D); `simota` gives each
    person as many as fit it; `origin` (N,) gives each proposal the person it was made from by noise, -1 for none.
    """
    if len(people.boxes_norm) == 0:
        nothing = torch.zeros(0, dtype=torch.int64, device=people.boxes_norm.device)
        return Match(nothing, nothing)
    if matching == "origin":
        proposals = (origin >= 0).nonzero()[:, 0]
        return Match(proposals, origin[proposals])
    cost = matching_cost(prediction, people)
    if matching == "hungarian":
        rows, columns = linear_sum_assignment(cost.cpu().numpy())
        return Match(*(torch.as_tensor(index, device=cost.device) for index in (rows, columns)))
    return _simota(cost, prediction.boxes_norm, people.boxes_norm)


def matching_cost(prediction: Prediction, people: People) -> Tensor:
    """(N, M) cost: focal class cost, L1 and GIoU of boxes, distance of unit embeddings, weighted."""
    probability = prediction.logits.sigmoid()[:, None]
    positive = FOCAL_ALPHA * (1 - probability) ** FOCAL_GAMMA * -(probability + 1e-8).log()
    negative = (1 - FOCAL_ALPHA) * probability**FOCAL_GAMMA * -(1 - probability + 1e-8).log()
    cost = (
        WEIGHT_CLASS * (positive - negative)
        + WEIGHT_L1 * torch.cdist(prediction.boxes_norm, people.boxes_norm, p=1)
        - WEIGHT_GIOU * generalized_box_iou(prediction.boxes_norm, people.boxes_norm)
        + WEIGHT_REID * torch.cdist(F.normalize(prediction.embeddings, dim=-1), people.embeddings)
    )
    # A prediction that is no number is told by the loss, which keeps the batch, not by the matching.
    return cost.nan_to_num(nan=BACKGROUND_COST, posinf=BACKGROUND_COST)


def _simota(cost: Tensor, boxes: Tensor, people_boxes: Tensor) -> Match:
    in_box, in_window = _centre_inside(boxes, people_boxes)
    cost = cost + OUTSIDE_COST * (~(in_box & in_window))
    cost = cost + BACKGROUND_COST * (~(in_box | in_window).any(1, keepdim=True))
    iou = box_iou(boxes, people_boxes)
    wanted = iou.topk(min(TOP_CANDIDATES, len(boxes)), dim=0).values.sum(0).int().clamp(min=1)
    chosen = torch.zeros_like(cost, dtype=torch.bool)
    for person, count in enumerate(wanted.tolist()):
        chosen[cost[:, person].topk(count, largest=False).indices, person] = True
    _keep_cheapest_person(chosen, cost)
    # One free proposal for each person left without: taking it can leave nobody else empty.
    for person in (~chosen.any(0)).nonzero()[:, 0].tolist():
        free = ~chosen.any(1)
        if free.any():
            chosen[torch.where(free, cost[:, person], torch.inf).argmin(), person] = True
    return Match(*chosen.nonzero(as_tuple=True))


def _centre_inside(boxes: Tensor, people_boxes: Tensor) -> tuple[Tensor, Tensor]:
    """(N, M) whether the centre of a box lies in the person's box, and in the window around its centre."""
    centre = ((boxes[:, :2] + boxes[:, 2:]) / 2)[:, None]
    top_left, bottom_right = people_boxes[:, :2], people_boxes[:, 2:]
    in_box = ((centre > top_left) & (centre < bottom_right)).all(-1)
    offset = (centre - (top_left + bottom_right) / 2).abs()
    return in_box, (offset < CENTRE_RADIUS * (bottom_right - top_left)).all(-1)


def _keep_cheapest_person(chosen: Tensor, cost: Tensor) -> None:
    contested = (chosen.sum(1) > 1).nonzero()[:, 0]
    if len(contested):
        cheapest = torch.where(chosen, cost, torch.inf)[contested].argmin(1)
        chosen[contested] = False
        chosen[contested, cheapest] = True


@torch.no_grad()
def add_overlapping(matched: Match, input_boxes: Tensor, people_boxes: Tensor, iou: float) -> Match:
    """Make every proposal whose *input* box overlaps a person by >= iou a positive as well.

    input_boxes: (N, 4) xyxy normalised, before denoising. differs from PSDiff: at low noise the proposals
    around a person are near-copies of the one that was matched; calling them background stops learning.
    """
    if len(people_boxes) == 0:
        return matched
    best, person = box_iou(input_boxes, people_boxes).max(1)
    extra = best >= iou
    extra[matched.proposals] = False
    proposals = extra.nonzero()[:, 0]
    return Match(torch.cat([matched.proposals, proposals]), torch.cat([matched.people, person[proposals]]))
