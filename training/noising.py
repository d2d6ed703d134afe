"""Noisy proposals to learn from: the dual noise generator, and what keeps the network looking at the image.

All noise of an image comes from a generator of its own, so that it is the same in whichever process, batch or
resumed run the image is read.
Legend: B images, N proposals, M people of one image, E embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from ..models.config import PSDiffConfig
from ..models.diffusion import NoiseSchedule, pad_people, q_sample, signal_to_boxes
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
    origin: Tensor
    """(B, N) the person each proposal was made from, -1 for none."""


def noisy_group(
    config: PSDiffConfig,
    people: Sequence[People],
    recipe: Recipe,
    generators: Sequence[Generator],
    *,
    max_timestep: int,
) -> NoisyGroup:
    """Draw a timestep below max_timestep for each image and noise its people; one generator an image.

    People and result are on the CPU, whatever device computes: the same noise everywhere.
    """
    schedule = _schedule(config.num_timesteps)
    images = [
        _noisy_image(config, schedule, person, recipe, generator, max_timestep)
        for person, generator in zip(people, generators, strict=True)
    ]
    return NoisyGroup(*(torch.cat(parts) for parts in zip(*images, strict=True)))


@lru_cache(maxsize=4)
def _schedule(num_timesteps: int) -> NoiseSchedule:
    return NoiseSchedule(num_timesteps)


def _noisy_image(
    config: PSDiffConfig,
    schedule: NoiseSchedule,
    people: People,
    recipe: Recipe,
    generator: Generator,
    max_timestep: int,
) -> NoisyGroup:
    """Noise the people of one image; every field has B = 1.

    differs from PSDiff in two ways, both against copying e_t instead of looking at the image: for a share of
    the images the embeddings are pure noise, and what is noised is a vector near the true embedding, since
    at inference e_t carries the model's own error.
    """
    padded = pad_people(
        people.boxes_norm,
        wrong_embeddings(people.embeddings, recipe.embedding_error, generator),
        recipe.num_proposals or config.num_proposals,
        box_scale=config.box_scale,
        embedding_scale=config.embedding_scale,
        padding=recipe.padding,
        generator=generator,
    )
    last = torch.tensor([config.num_timesteps - 1])
    t = torch.randint(0, max_timestep, (1,), generator=generator)
    dropped = torch.rand(1, generator=generator) < recipe.embedding_dropout
    if recipe.pure_noise:
        t, dropped = last, torch.tensor([True])
    t_emb = torch.where(dropped, last, t)
    boxes_0, emb_0 = padded.boxes_0[None], padded.emb_0[None]
    boxes_t = q_sample(boxes_0, torch.randn(boxes_0.shape, generator=generator), schedule.at(t))
    emb_t = q_sample(emb_0, torch.randn(emb_0.shape, generator=generator), schedule.at(t_emb))
    return NoisyGroup(signal_to_boxes(boxes_t, config.box_scale), emb_t, t, t_emb, padded.origin[None])


def wrong_embeddings(embeddings: Tensor, largest_error: float, generator: Generator | None = None) -> Tensor:
    """Unit vectors at a cosine of 1 - U(0, largest_error) to the given ones (M, E), in random directions.

    A row of zeros, an embedding that nobody knows, stays zero.
    """
    cosine = 1 - largest_error * torch.rand(len(embeddings), 1, generator=generator)
    direction = torch.randn(embeddings.shape, generator=generator)
    direction = direction - (direction * embeddings).sum(1, keepdim=True) * embeddings
    wrong = cosine * embeddings + (1 - cosine**2).sqrt() * F.normalize(direction, dim=1)
    return wrong * embeddings.any(dim=1, keepdim=True)


def image_generator(seed: int, sample: int) -> Generator:
    """The source of all noise of the sample-th image that a run reads."""
    # Knuth's multiplicative constant spreads neighbouring samples over the seeds of the generator.
    return torch.Generator().manual_seed((seed * 1_000_003 + sample * 2_654_435_761) % (1 << 63))
