"""PSDiff: the backbone once, the denoising step K times.

Legend: B images, H, W canvas, N proposals, E embedding dimension.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import Backbone
from .config import PSDiffConfig
from .denoiser import Denoiser
from .detector import Detector
from .diffusion import boxes_to_signal, ddim_step, embeddings_to_signal, signal_to_boxes
from .sampling import Float32Array, SamplerSettings, StepOutput, sampling_timesteps

# The longest grid a bundle spells out; beyond about eight steps nothing is gained (arXiv:2309.11125, fig. 5).
MAX_STEPS = 16


class PSDiff(nn.Module):
    """The network of the PSDiff paper. `backbone` and `denoise_step` are what gets exported."""

    def __init__(self, config: PSDiffConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.denoiser = Denoiser(config)

    def forward(
        self, images: Tensor, boxes_t: Tensor, emb_t: Tensor, grid: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Denoise along a grid of descending timesteps; returns boxes_xyxy, scores, embeddings.

        images: (B, H, W, 3) uint8 RGB. boxes_t: (B, N, 4) and emb_t: (B, N, E) at grid[0], signal space.
        """
        features = self.backbone(images)
        boxes_xyxy, scores, embeddings = boxes_t, boxes_t[..., 0], emb_t
        for t, t_next in zip(grid, [*grid[1:], -1], strict=True):
            times = (torch.full((len(images),), value, device=images.device) for value in (t, t_next))
            step = self.denoise_step(features, boxes_t, emb_t, *times)
            boxes_t, emb_t, boxes_xyxy, scores, embeddings = step
        return boxes_xyxy, scores, embeddings

    def denoise_step(
        self, features: Sequence[Tensor], boxes_t: Tensor, emb_t: Tensor, t: Tensor, t_next: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One DDIM step (eta 0): boxes_next, emb_next, boxes_xyxy, scores, embeddings.

        boxes_t: (B, N, 4) and emb_t: (B, N, E) in signal space, unclamped. t, t_next: (B,) int64, t in
        [0, T), t_next in [-1, t). boxes_xyxy: (B, N, 4) normalised, embeddings: unit rows.
        """
        config, schedule = self.config, self.denoiser.schedule
        boxes_norm = signal_to_boxes(boxes_t, config.box_scale)
        prediction = self.denoiser(features, boxes_norm, emb_t, t)
        boxes_0 = boxes_to_signal(prediction.boxes_norm, config.box_scale)
        emb_0 = embeddings_to_signal(prediction.embeddings, config.embedding_scale)
        level, level_next = schedule.at(t), schedule.at(t_next)
        return (
            ddim_step(boxes_t, boxes_0, level, level_next),
            ddim_step(emb_t, emb_0, level, level_next),
            prediction.boxes_norm,
            prediction.logits.sigmoid(),
            F.normalize(prediction.embeddings, dim=-1),
        )


class TorchEngine:
    """PSDiff behind the two calls of models.sampling.Engine; the reference of every other engine."""

    def __init__(self, model: PSDiff) -> None:
        self.model = model.eval()
        self.device = next(model.parameters()).device

    @torch.inference_mode()
    def backbone(self, images: NDArray[np.uint8]) -> tuple[Tensor, ...]:
        """(B, H, W, 3) uint8 RGB canvases -> p2..p5 on the model's device."""
        return self.model.backbone(torch.from_numpy(images).to(self.device))

    @torch.inference_mode()
    def denoise_step(
        self,
        features: Sequence[Tensor],
        boxes_t: Float32Array,
        emb_t: Float32Array,
        t: NDArray[np.int64],
        t_next: NDArray[np.int64],
    ) -> StepOutput:
        """One DDIM step, arrays in and out."""
        inputs = (torch.from_numpy(array).to(self.device) for array in (boxes_t, emb_t, t, t_next))
        return StepOutput(*(part.cpu().numpy() for part in self.model.denoise_step(features, *inputs)))


def torch_detector(model: PSDiff) -> Detector:
    """A Detector that runs the model in PyTorch, on whatever device the model is."""
    return Detector(TorchEngine(model), sampler_settings(model.config))


def sampler_settings(config: PSDiffConfig) -> SamplerSettings:
    """What the sampling loop must know of a network."""
    return SamplerSettings(
        width=config.width,
        height=config.height,
        num_proposals=config.num_proposals,
        embedding_dim=config.embedding_dim,
        box_scale=config.box_scale,
        timesteps={
            steps: sampling_timesteps(steps, config.num_timesteps, config.grid_power)
            for steps in range(1, MAX_STEPS + 1)
        },
        score_threshold=config.score_threshold,
        nms_iou=config.nms_iou,
        embedding_scale=config.embedding_scale,
        num_timesteps=config.num_timesteps,
    )


def save_checkpoint(model: PSDiff, path: Path, notes: Mapping[str, object]) -> None:
    """Write the weights and the config to one .safetensors file, at once: readers never see a part.

    notes: how the weights came about, plain JSON values; they travel to the bundle's manifest.
    """
    metadata = {"config": model.config.model_dump_json(), "notes": json.dumps(notes)}
    temporary = path.with_name(f".{path.name}.partial")
    save_file(model.state_dict(), temporary, metadata=metadata)
    temporary.replace(path)


def load_checkpoint(path: Path) -> tuple[PSDiff, dict[str, Any]]:
    """Read a model and its notes. Raises ValueError where the file is none of ours."""
    if not path.is_file():
        raise ValueError(f"checkpoint must be a .safetensors file, got {path}, which does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state_dict = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        config = PSDiffConfig.model_validate_json(metadata["config"])
    except (KeyError, SafetensorError, ValidationError) as error:
        raise ValueError(f"checkpoint must be written by psdiff train, got {path}: {error}") from None
    model = PSDiff(config)
    model.load_state_dict(state_dict)
    return model, json.loads(metadata.get("notes", "{}"))
