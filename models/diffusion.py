"""The noise process over boxes and embeddings: schedule, signal space, noising, DDIM; pure functions.

Legend: B images, N proposals, M people, E embedding dimension, T timesteps; abar is the cumulative alpha.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import solvers

Padding = Literal["repeat", "gaussian", "mixed"]

# Width and height of a decoded box, as a share of the canvas. Box deltas multiply the size, and about
# 4.5 % of the proposals drawn at t = T have a side of zero, which no delta could ever grow.
MIN_BOX_SIDE = 1e-4


def cosine_alphas_cumprod(num_timesteps: int) -> Tensor:
    """abar_t for t = 0..T-1, (T,) float64: the table of models.solvers as a tensor."""
    # torch.tensor, since from_numpy would not go to the device that a model is built on.
    return torch.tensor(solvers.cosine_alphas_cumprod(num_timesteps))


class NoiseLevel(NamedTuple):
    """Share of signal, sqrt(abar), and of noise, sqrt(1 - abar), each (B, 1, 1) float32."""

    signal: Tensor
    noise: Tensor


class NoiseSchedule(torch.nn.Module):
    """Tables of the cosine schedule, looked up by timestep; t = -1 is the clean signal."""

    signal: Tensor
    noise: Tensor

    def __init__(self, num_timesteps: int) -> None:
        super().__init__()
        abar = torch.cat([torch.ones(1, dtype=torch.float64), cosine_alphas_cumprod(num_timesteps)])
        # float64 tables would promote every activation they touch: only the roots leave, as float32.
        self.register_buffer("signal", abar.sqrt().float(), persistent=False)
        self.register_buffer("noise", (1 - abar).sqrt().float(), persistent=False)

    def at(self, t: Tensor) -> NoiseLevel:
        """Levels at timesteps t, (B,) int64 in [-1, T)."""
        return NoiseLevel(self.signal[t + 1][:, None, None], self.noise[t + 1][:, None, None])


def boxes_to_signal(boxes_norm: Tensor, box_scale: float) -> Tensor:
    """(..., 4) xyxy normalised -> (..., 4) cxcywh in signal space, clamped to [-box_scale, box_scale]."""
    top_left, bottom_right = boxes_norm[..., :2], boxes_norm[..., 2:]
    boxes = torch.cat([(top_left + bottom_right) / 2, bottom_right - top_left], dim=-1)
    return (box_scale * (2 * boxes - 1)).clamp(-box_scale, box_scale)


def signal_to_boxes(boxes_t: Tensor, box_scale: float) -> Tensor:
    """(..., 4) cxcywh in signal space, clamped -> (..., 4) xyxy normalised, sides >= MIN_BOX_SIDE."""
    boxes = (boxes_t.clamp(-box_scale, box_scale) / box_scale + 1) / 2
    centre, size = boxes[..., :2], boxes[..., 2:].clamp(min=MIN_BOX_SIDE)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def embeddings_to_signal(embeddings: Tensor, embedding_scale: float) -> Tensor:
    """(..., E) -> unit vectors times embedding_scale."""
    return embedding_scale * F.normalize(embeddings, dim=-1)


def q_sample(x_0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
    """Noise x_0 to a level: sqrt(abar) x_0 + sqrt(1 - abar) noise. x_0, noise: (B, N, D)."""
    return level.signal * x_0 + level.noise * noise


def ddim_step(
    x_t: Tensor,
    x_0: Tensor,
    level: NoiseLevel,
    level_next: NoiseLevel,
    *,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """Move x_t to the next level along the predicted x_0.

    x_t, x_0, noise: (B, N, D) signal space, x_t unclamped. eta in [0, 1] mixes in fresh noise, which is then
    required. Source: Song et al., DDIM (arXiv:2010.02502), eq. 12; x_0 is predicted, not the noise.
    """
    predicted_noise = (x_t - level.signal * x_0) / level.noise
    if eta == 0:
        return level_next.signal * x_0 + level_next.noise * predicted_noise
    if noise is None:
        raise ValueError("noise must be given where eta > 0, got None")
    sigma = ddim_sigma(level, level_next, eta)
    direction = (level_next.noise**2 - sigma**2).clamp(min=0).sqrt()
    return level_next.signal * x_0 + direction * predicted_noise + sigma * noise


def ddim_sigma(level: NoiseLevel, level_next: NoiseLevel, eta: float) -> Tensor:
    """Standard deviation of the fresh noise of a DDIM step (arXiv:2010.02502, eq. 16)."""
    forward_variance = 1 - (level.signal / level_next.signal) ** 2
    return eta * (forward_variance * level_next.noise**2 / level.noise**2).sqrt()


class PaddedPeople(NamedTuple):
    """The people of one image, padded to N proposals."""

    boxes_0: Tensor
    """(N, 4) signal space."""
    emb_0: Tensor
    """(N, E) signal space; zero where a proposal has no person."""
    origin: Tensor
    """(N,) int64, the person each proposal was made from, -1 for none."""


def pad_people(
    boxes_norm: Tensor,
    embeddings: Tensor,
    num_proposals: int,
    *,
    box_scale: float,
    embedding_scale: float,
    padding: Padding = "repeat",
    generator: torch.Generator | None = None,
) -> PaddedPeople:
    """Pad M people to N clean proposals, before noise.

    boxes_norm: (M, 4) xyxy normalised. embeddings: (M, E). padding: `repeat` shares N evenly among the people
    and gives the remainder to randomly chosen ones (the paper); `gaussian` keeps each once and draws the rest
    around the image centre (DiffusionDet); `mixed` repeats for half of N. M > N takes a random subset.
    M = 0 gives gaussian boxes with no embedding.
    """
    people = len(boxes_norm)
    repeated = {"repeat": num_proposals, "gaussian": min(people, num_proposals), "mixed": num_proposals // 2}
    count = repeated[padding] if people else 0
    origin = torch.full((num_proposals,), -1, dtype=torch.int64)
    if people:
        shuffled = torch.randperm(people, generator=generator)
        origin[:count] = torch.cat([torch.arange(people).repeat(count // people), shuffled[: count % people]])
    drawn = torch.randn(num_proposals, 4, generator=generator) / 6 + 0.5
    boxes_0 = box_scale * (2 * torch.cat([drawn[:, :2], drawn[:, 2:].clamp(min=MIN_BOX_SIDE)], dim=1) - 1)
    emb_0 = torch.zeros(num_proposals, embeddings.shape[-1])
    has_person = origin >= 0
    boxes_0[has_person] = boxes_to_signal(boxes_norm, box_scale)[origin[has_person]]
    emb_0[has_person] = embeddings_to_signal(embeddings, embedding_scale)[origin[has_person]]
    return PaddedPeople(boxes_0, emb_0, origin)
