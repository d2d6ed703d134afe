"""Noisy proposals to learn from: the dual noise generator, and what keeps the network looking at the image.

Legend: B images, N proposals, M people of one image, E embedding dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.diffusion import pad_people, q_sample, signal_to_boxes
from ..models.person_search import PSDiff
from .matcher import People
from .recipe import Recipe


class NoisyGroup(NamedTuple):
    """Noisy proposals for every image of a batch, and what they were made from."""

    boxes_norm: Tensor
    """(B, N, 4) decoded, normalised."""
    emb_t: Tensor
    """(B, N, E) signal space."""
    t: Tensor
    """(B,) timestep of the boxes."""
    t_emb: Tensor
    """(B,) timestep of the embeddings: t, or T - 1 where they were dropped."""


def noisy_group(model: PSDiff, people: list[People], recipe: Recipe, *, max_timestep: int) -> NoisyGroup:
    """Draw timesteps below max_timestep and noise the people of each image.

    differs from PSDiff in two ways, both against copying e_t instead of looking at the image: for a share of
    the images the embeddings are pure noise, and what is noised is a vector near the true embedding, since
    at inference e_t carries the model's own error.
    """
    config, schedule = model.config, model.denoiser.schedule
    padded = [
        pad_people(
            person.boxes_norm,
            wrong_embeddings(person.embeddings, recipe.embedding_error),
            recipe.num_proposals or config.num_proposals,
            box_scale=config.box_scale,
            embedding_scale=config.embedding_scale,
            padding=recipe.padding,
        )
        for person in people
    ]
    boxes_0 = torch.stack([image.boxes_0 for image in padded])
    emb_0 = torch.stack([image.emb_0 for image in padded])
    t = torch.randint(0, max_timestep, (len(people),))
    dropped = torch.rand(len(people)) < recipe.embedding_dropout
    t_emb = torch.where(dropped, torch.full_like(t, config.num_timesteps - 1), t)
    boxes_t = q_sample(boxes_0, torch.randn_like(boxes_0), schedule.at(t))
    emb_t = q_sample(emb_0, torch.randn_like(emb_0), schedule.at(t_emb))
    return NoisyGroup(signal_to_boxes(boxes_t, config.box_scale), emb_t, t, t_emb)


def wrong_embeddings(embeddings: Tensor, largest_error: float) -> Tensor:
    """Unit vectors at a cosine of 1 - U(0, largest_error) to the given ones (M, E), in random directions."""
    cosine = 1 - largest_error * torch.rand(len(embeddings), 1)
    direction = torch.randn_like(embeddings)
    direction = direction - (direction * embeddings).sum(1, keepdim=True) * embeddings
    return cosine * embeddings + (1 - cosine**2).sqrt() * F.normalize(direction, dim=1)
