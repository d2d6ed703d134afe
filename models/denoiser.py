"""The Collaborative Denoising Layer (CDL): one step from noisy boxes and embeddings to better ones.

Legend: B images, N proposals, M = B*N regions, C channels, E embedding dimension, P = S*S tokens of a region,
D dynamic width. Source: PSDiff (arXiv:2309.11125), sec. III; what the paper leaves open is marked.
The layer with all its ablations is one subject, hence the many lines.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.ops import dynamic_conv, multilevel_roi_align
from ..kernels.reference import FINEST_LEVEL
from .config import PSDiffConfig
from .diffusion import NoiseSchedule

# Sparse R-CNN's weights of the four deltas, and the largest log-size change a step may make.
DELTA_WEIGHTS = (2.0, 2.0, 1.0, 1.0)
MAX_LOG_SIZE = math.log(100000 / 16)

# Every proposal starts at a probability of 0.01, so that the many negatives do not drown the first steps.
PRIOR_LOGIT = -math.log(0.99 / 0.01)

# How much of a generated kernel comes from the embedding before training, against Xavier's share.
DYNAMIC_START = 0.1


class Prediction(NamedTuple):
    """What the layer says of the clean state."""

    boxes_norm: Tensor
    """(B, N, 4) xyxy normalised, not clipped."""
    logits: Tensor
    """(B, N) before the sigmoid."""
    embeddings: Tensor
    """(B, N, E), not normalised."""


class Denoiser(nn.Module):
    """Pool each noisy box, let region and embedding inform each other, predict the clean state."""

    def __init__(self, config: PSDiffConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.channels
        self.schedule = NoiseSchedule(config.num_timesteps)
        self.embedding_proj = nn.Linear(config.embedding_dim, channels)
        if config.position_code:
            self.position_code = nn.Parameter(torch.empty(config.pool_size**2, channels))
        if config.self_attention != "none":
            self.self_attention = SelfAttention(channels, config.num_heads, config.self_attention)
        if config.dynamic_conv:
            self.dynamic_conv = DynamicConv(config)
        if config.cross_attention:
            self.cross_attention = CrossAttention(channels, config.num_heads)
        self.time = TimeEmbedding(config.time_dim, config.time_hidden, channels)
        self.heads = Heads(config)
        self._initialise()

    def forward(
        self,
        features: Sequence[Tensor],
        boxes_norm: Tensor,
        emb_t: Tensor,
        t: Tensor,
        t_emb: Tensor | None = None,
    ) -> Prediction:
        """Predict the clean state from noisy boxes (B, N, 4) and noisy embeddings (B, N, E) at timesteps t (B,).

        features: p2..p5 of (B, C, h, w). boxes_norm: decoded and normalised. t_emb: timesteps of the
        embeddings where they differ from those of the boxes (a device of training). The layer computes in the
        type of its weights; boxes, times and what it returns are float32 whatever that is.
        """
        region = tokens = self._pool(features, boxes_norm)
        known = self._gain(emb_t, t if t_emb is None else t_emb).to(self.embedding_proj.weight.dtype)
        embedding = self.embedding_proj(known).flatten(0, 1)
        if self.config.self_attention != "none":
            tokens = self.self_attention(tokens, proposals=boxes_norm.shape[1])
        convolved = self.dynamic_conv(tokens, embedding) if self.config.dynamic_conv else tokens.mean(1)
        attended = self.cross_attention(embedding, tokens) if self.config.cross_attention else embedding
        scale, shift = self.time(t)
        fused = torch.cat([convolved, attended], dim=1).unflatten(0, boxes_norm.shape[:2])
        outputs = self.heads(fused, region, scale[:, None], shift[:, None])
        logits, deltas, embeddings = (output.float() for output in outputs)
        return Prediction(apply_deltas(boxes_norm, deltas), logits, embeddings)

    def _pool(self, features: Sequence[Tensor], boxes_norm: Tensor) -> Tensor:
        # Filled on the device: a list of numbers would be copied from the host, which a CUDA graph cannot hold.
        height, width = (boxes_norm.new_full((1,), side * 2**FINEST_LEVEL) for side in features[0].shape[-2:])
        tokens = multilevel_roi_align(
            features,
            boxes_norm * torch.cat([width, height, width, height]),
            pool_size=self.config.pool_size,
            sampling_ratio=self.config.sampling_ratio,
            canonical_size=self.config.canonical_size,
        )
        return tokens + self.position_code if self.config.position_code else tokens

    def _gain(self, emb_t: Tensor, t: Tensor) -> Tensor:
        """Scale e_t to what is known of e_0: the Wiener gain, in units of a unit-RMS signal.

        Without it the layer sees unit noise at t = T where there is no signal at all, and learns to copy
        e_t instead of looking at the image. differs from PSDiff: the paper feeds e_t as it is.
        """
        if self.config.embedding_gain == "none":
            return emb_t
        level = self.schedule.at(t)
        rms = self.config.embedding_scale / math.sqrt(self.config.embedding_dim)
        return emb_t * (level.signal * rms / ((level.signal * rms) ** 2 + level.noise**2))

    def _initialise(self) -> None:
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        if self.config.dynamic_conv:
            self.dynamic_conv.start_static()
        if self.config.position_code:
            nn.init.normal_(self.position_code, std=0.5)
        nn.init.constant_(self.heads.logit.bias, PRIOR_LOGIT)


class Attention(nn.Module):
    """Multi-head attention of queries (M, L, C) over tokens (M, P, C), residual on the queries and LayerNorm."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(channels, 2 * channels)
        self.out = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """(M, L, C) queries, (M, P, C) tokens -> (M, L, C)."""
        weights, biases = self.key_value.weight.chunk(2), self.key_value.bias.chunk(2)
        key, value = (_tokenwise(tokens, weight, bias) for weight, bias in zip(weights, biases, strict=True))
        query = _tokenwise(queries, self.query.weight, self.query.bias)
        query, key, value = (self._split(part) for part in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value)
        merged = attended.transpose(1, 2).flatten(2)
        return self.norm(queries + _tokenwise(merged, self.out.weight, self.out.bias))

    def of_one_query(self, query: Tensor, tokens: Tensor) -> Tensor:
        """One query (M, C) over the tokens (M, P, C) of its region -> (M, C): what forward gives, for less.

        Keys and values of all tokens are never made. A score q (W x) is (q W) x, so the query meets the weights
        of the keys first; tokens are averaged before they meet the weights of the values. The bias of the keys
        moves all scores of a query alike, which softmax does not see.
        """
        key_weight, value_weight = (
            weight.unflatten(0, (self.num_heads, -1)) for weight in self.key_value.weight.chunk(2)
        )
        heads = self.query(query).unflatten(1, (self.num_heads, -1)).transpose(0, 1)
        asked = (heads * heads.shape[-1] ** -0.5 @ key_weight).transpose(0, 1)
        averaged = (asked @ tokens.transpose(1, 2)).softmax(-1) @ tokens
        values = (averaged.transpose(0, 1) @ value_weight.transpose(1, 2)).transpose(0, 1).flatten(1)
        return self.norm(query + self.out(values + self.key_value.bias.chunk(2)[1]))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _tokenwise(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a linear layer to (M, L, C) tokens as one (M*L, C) matrix.

    The same numbers; but a graph gets one Gemm with its bias instead of a batched product and an addition, and
    keys and values as two products instead of one that is then split: a quarter of a step on a CPU.
    """
    return F.linear(tokens.flatten(0, 1), weight, bias).unflatten(0, tokens.shape[:2])


class SelfAttention(nn.Module):
    """Attention among the P tokens of each region (`intra`), or among the N regions of an image (`inter`).

    The paper's N x S*S x C input and its parameter and FLOP counts fit only `intra`; `inter` is Sparse
    R-CNN's form, on the mean of each region, added to all its tokens.
    """

    def __init__(self, channels: int, num_heads: int, among: str) -> None:
        super().__init__()
        self.among = among
        self.attention = Attention(channels, num_heads)

    def forward(self, tokens: Tensor, *, proposals: int) -> Tensor:
        """(M, P, C) -> (M, P, C)."""
        if self.among == "intra":
            return self.attention(tokens, tokens)
        pooled = tokens.mean(1)
        per_image = pooled.unflatten(0, (-1, proposals))
        refined = self.attention(per_image, per_image).flatten(0, 1)
        return tokens + (refined - pooled)[:, None]


class DynamicConv(nn.Module):
    """Convolve each region with kernels made from its own embedding, and reduce its P tokens to one vector."""

    def __init__(self, config: PSDiffConfig) -> None:
        super().__init__()
        channels, width, tokens = config.channels, config.dynamic_dim, config.pool_size**2
        self.kernels = nn.Linear(channels, 2 * channels * width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(channels)
        self.reduction = config.reduction
        if config.reduction == "squeeze":
            self.squeeze = nn.Linear(channels, config.squeeze_dim)
            self.reduce = nn.Linear(tokens * config.squeeze_dim, channels)
        elif config.reduction == "linear":
            self.reduce = nn.Linear(tokens * channels, channels)
        self.norm3 = nn.LayerNorm(channels)
        self.has_ffn = config.ffn_dim > 0
        if self.has_ffn:
            self.ffn = nn.Sequential(
                nn.Linear(channels, config.ffn_dim), nn.ReLU(), nn.Linear(config.ffn_dim, channels)
            )
            self.norm4 = nn.LayerNorm(channels)

    def forward(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        """Tokens (M, P, C), embedding (M, C) -> (M, C)."""
        norms = ((norm.weight, norm.bias) for norm in (self.norm1, self.norm2))
        x = F.relu(self.norm3(self._reduce(dynamic_conv(tokens, self.kernels(embedding), *norms))))
        return self.norm4(x + self.ffn(x)) if self.has_ffn else x

    @torch.no_grad()
    def start_static(self) -> None:
        """Start as an ordinary convolution that the embedding changes little.

        differs from PSDiff (Xavier everywhere), where the kernels of a proposal start as a random function of
        its noise: one image learnt by heart for 300 iterations then still had its boxes where they came in.
        """
        channels = self.norm2.normalized_shape[0]
        width = self.norm1.normalized_shape[0]
        first, second = self.kernels.bias.split(channels * width)
        self.kernels.weight.mul_(DYNAMIC_START)
        nn.init.normal_(first, std=channels**-0.5)
        nn.init.normal_(second, std=width**-0.5)

    def _reduce(self, tokens: Tensor) -> Tensor:
        # The mean forgets where in the box the person stands, so it is kept as an ablation only.
        if self.reduction == "mean":
            return tokens.mean(1)
        if self.reduction == "squeeze":
            tokens = _tokenwise(tokens, self.squeeze.weight, self.squeeze.bias)
        return self.reduce(tokens.flatten(1))


class CrossAttention(nn.Module):
    """The embedding asks the region: one query token over the P tokens."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.attention = Attention(channels, num_heads)

    def forward(self, embedding: Tensor, tokens: Tensor) -> Tensor:
        """Embedding (M, C), tokens (M, P, C) -> (M, C)."""
        if torch.compiler.is_exporting():
            return self.attention.of_one_query(embedding, tokens)
        return self.attention(embedding[:, None], tokens)[:, 0]


class TimeEmbedding(nn.Module):
    """Timestep -> scale and shift of a FiLM layer (Perez et al., arXiv:1709.07871)."""

    frequencies: Tensor

    def __init__(self, dim: int, hidden: int, channels: int) -> None:
        super().__init__()
        exponents = torch.arange(dim // 2, dtype=torch.float64) / (dim // 2 - 1)
        self.register_buffer("frequencies", (10000.0**-exponents).float(), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.film = nn.Linear(hidden, 2 * channels)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) -> scale (B, C) and shift (B, C)."""
        waves = self.sinusoid(t).to(self.film.weight.dtype)
        scale, shift = self.film(F.silu(self.mlp(waves))).chunk(2, dim=1)
        return scale, shift

    def sinusoid(self, t: Tensor) -> Tensor:
        """(B,) raw timesteps -> (B, dim): sines, then cosines, of norm sqrt(dim / 2)."""
        angles = t[:, None].float() * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Heads(nn.Module):
    """Fused features (B, N, 2C) -> logits (B, N), deltas (B, N, 4), embeddings (B, N, E).

    `cascaded` (the paper): box and class see the embedding alone. `parallel`: they see the features alone.
    `joint`: both. `region`: both, and the pooled region by a way of its own, which neither attention nor
    generated kernels lie on; the embedding sees the region too. Time enters by FiLM on the hidden layers, so
    it reaches every output.
    """

    def __init__(self, config: PSDiffConfig) -> None:
        super().__init__()
        channels, dim = config.channels, config.embedding_dim
        self.kind = config.head
        self.embedding_hidden = _hidden((3 if config.head == "region" else 2) * channels, channels)
        self.embedding = nn.Linear(channels, dim)
        if config.head != "cascaded":
            self.detection_hidden = _hidden(2 * channels, channels)
        if config.head == "region":
            self.squeeze = nn.Linear(channels, config.squeeze_dim)
            self.region = nn.Linear(config.pool_size**2 * config.squeeze_dim, channels)
        seen = {
            "cascaded": dim,
            "parallel": channels,
            "joint": channels + dim,
            "region": 2 * channels + dim,
        }[config.head]
        self.class_tower = _tower(seen, channels, layers=1)
        self.box_tower = _tower(seen, channels, layers=3)
        self.logit = nn.Linear(channels, 1)
        self.deltas = nn.Linear(channels, 4)

    def forward(
        self, fused: Tensor, region: Tensor, scale: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Fused (B, N, 2C), region (B*N, P, C), scale and shift (B, 1, C) -> logits, deltas, embeddings."""
        if self.kind == "region":
            squeezed = _tokenwise(region, self.squeeze.weight, self.squeeze.bias).flatten(1)
            direct = F.relu(self.region(squeezed)).unflatten(0, fused.shape[:2])
            described = torch.cat([fused, direct], dim=-1)
        else:
            direct, described = None, fused
        embeddings = self.embedding(self.embedding_hidden(described) * (1 + scale) + shift)
        seen = [] if self.kind == "cascaded" else [self.detection_hidden(fused) * (1 + scale) + shift]
        seen += [] if self.kind == "parallel" else [embeddings]
        seen = torch.cat([*seen, direct] if direct is not None else seen, dim=-1)
        return self.logit(self.class_tower(seen))[..., 0], self.deltas(self.box_tower(seen)), embeddings


def _hidden(inputs: int, channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, channels), nn.LayerNorm(channels), nn.ReLU())


def _tower(inputs: int, channels: int, layers: int) -> nn.Sequential:
    widths = [inputs] + [channels] * layers
    blocks = [
        nn.Sequential(nn.Linear(narrow, wide, bias=False), nn.LayerNorm(wide), nn.ReLU())
        for narrow, wide in itertools.pairwise(widths)
    ]
    return nn.Sequential(*blocks)


def apply_deltas(boxes_norm: Tensor, deltas: Tensor) -> Tensor:
    """Move and resize xyxy boxes (..., 4) by (dx, dy, dw, dh), relative to each box's own size."""
    dx, dy, dw, dh = (part / weight for part, weight in zip(deltas.unbind(-1), DELTA_WEIGHTS, strict=True))
    x1, y1, x2, y2 = boxes_norm.unbind(-1)
    width, height = x2 - x1, y2 - y1
    cx, cy = (x1 + x2) / 2 + dx * width, (y1 + y2) / 2 + dy * height
    half_width = width * dw.clamp(max=MAX_LOG_SIZE).exp() / 2
    half_height = height * dh.clamp(max=MAX_LOG_SIZE).exp() / 2
    return torch.stack([cx - half_width, cy - half_height, cx + half_width, cy + half_height], dim=-1)
