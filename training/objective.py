"""What one training step minimises, from the feature pyramid on.

Legend: B images, G groups of proposals per image, V = G*B rows, N proposals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from ..models.denoiser import Denoiser, Prediction
from . import processes
from .losses import SetLoss, set_loss
from .matcher import Match, People, add_overlapping, match
from .noising import NoisyGroup, noisy_group
from .recipe import Recipe


class Objective(NamedTuple):
    """The loss of a batch, and what the network sees rather than copies."""

    loss: SetLoss
    image_cosine: float | None
    """Mean cosine of predicted and true embedding over matched people whose e_t was pure noise and whose
    embedding is known; None for none."""


def denoising_objective(
    denoiser: Denoiser,
    features: Sequence[Tensor],
    people: Sequence[People],
    recipe: Recipe,
    generators: Sequence[Generator],
) -> Objective:
    """Noise the people of B images, denoise them, and compare with the truth.

    features: p2..p5 of (B, C, h, w), float32. generators: one an image. With a dense group, two groups of
    proposals share the features of an image: one as in the paper, one with little box noise.
    """
    config, device = denoiser.config, features[0].device
    limits = [config.num_timesteps, *([recipe.dense_max_timestep] if recipe.dense_max_timestep else [])]
    groups = [noisy_group(config, people, recipe, generators, max_timestep=limit) for limit in limits]
    inputs = NoisyGroup(*(torch.cat(parts).to(device) for parts in zip(*groups, strict=True)))
    truth = [People(*(part.to(device) for part in person)) for person in people] * len(groups)
    repeated = [torch.cat([feature] * len(groups)) for feature in features]
    prediction = denoiser(repeated, inputs.boxes_norm, inputs.emb_t, inputs.t, inputs.t_emb)
    prediction = Prediction(*(part.float() for part in prediction))
    matches = [_match_row(prediction, inputs, truth, recipe, row) for row in range(len(truth))]
    loss = set_loss(prediction, truth, matches, pairs=_mean_pairs(matches))
    is_pure_noise = (inputs.t_emb == config.num_timesteps - 1).tolist()
    return Objective(loss, _image_cosine(prediction, truth, matches, is_pure_noise))


def _match_row(
    prediction: Prediction, inputs: NoisyGroup, people: Sequence[People], recipe: Recipe, row: int
) -> Match:
    alone = Prediction(*(part[row].detach() for part in prediction))
    matched = match(alone, people[row], recipe.matching, inputs.origin[row])
    if recipe.dense_iou is None:
        return matched
    return add_overlapping(matched, inputs.boxes_norm[row], people[row].boxes_norm, recipe.dense_iou)


def _mean_pairs(matches: Sequence[Match]) -> float:
    """Matched pairs a process, of at least 1 in all: the gradients are as if the processes had one batch."""
    pairs = torch.tensor(float(sum(len(m.proposals) for m in matches)), dtype=torch.float64)
    return max(processes.mean(pairs).item(), 1 / processes.count())


@torch.no_grad()
def _image_cosine(
    prediction: Prediction, people: Sequence[People], matches: Sequence[Match], is_pure_noise: Sequence[bool]
) -> float | None:
    cosines = [prediction.logits.new_zeros(0)]
    for row, m in enumerate(matches):
        truth = people[row].embeddings[m.people]
        known = truth.any(dim=1)
        if is_pure_noise[row]:
            predicted = prediction.embeddings[row, m.proposals]
            cosines.append(F.cosine_similarity(predicted[known], truth[known], dim=1))
    pooled = torch.cat(cosines)
    return pooled.mean().item() if len(pooled) else None
