"""The training loop: synthetic frames in, checkpoint out.

Legend: B images, G groups of proposals per image, V = B*G rows, N proposals, E embedding dimension.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ..models.backbone import freeze_stages, initial_weights, load_initial_weights
from ..models.config import PSDiffConfig, load_preset
from ..models.denoiser import Prediction
from ..models.person_search import PSDiff, load_checkpoint, save_checkpoint
from .dataset import Batch, FramePool, street_batches
from .losses import SetLoss, set_loss
from .matcher import Match, People, add_overlapping, match
from .noising import NoisyGroup, noisy_group
from .recipe import Recipe, Stage

CHECKPOINT = "model.safetensors"
LOG = "log.jsonl"

# Two groups of proposals share the features of an image: one as in the paper, one with little box noise.
GROUPS = 2

# More frames than any run reads; the loader counts them lazily.
ENDLESS = 1 << 40

# The learning rate is constant for this share of a stage, then falls along a cosine to FINAL_RATE of it.
CONSTANT_SHARE = 0.5
FINAL_RATE = 0.02


@dataclass(frozen=True)
class Progress:
    """Where a run stands; handed to the caller after every iteration."""

    stage: int
    share: float
    """Of the stage, in [0, 1]."""
    iteration: int
    images_per_s: float
    loss: float
    image_cosine: float
    """Cosine of predicted and true embedding on people whose e_t was pure noise: what is seen, not copied."""


class NonFiniteLossError(RuntimeError):
    """The loss is not a number; training stopped and the last checkpoint is good."""


def train(
    recipe: Recipe,
    out: Path,
    *,
    backbone_weights: str | None = None,
    init: Path | None = None,
    frames_folder: Path | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Path:
    """Run the recipe's stages; return the checkpoint's path.

    Under torchrun each rank draws its own frames and the gradients are averaged; rank 0 writes.
    out: folder for checkpoint and log. backbone_weights: see models.backbone.initial_weights; None starts
    from random weights. init: a checkpoint to go on from instead. frames_folder: where drawn
    frames are kept, default out.
    """
    torch.manual_seed(recipe.seed)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    out.mkdir(parents=True, exist_ok=True)
    model, notes = start(recipe, backbone_weights, init)
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group("gloo")
    # The ranks start from the same weights, then draw noise of their own.
    torch.manual_seed(recipe.seed + _rank())
    final = model.config
    frames_read = int(notes.get("frames", 0))
    for number, stage in enumerate(recipe.stages):
        model = resized(model, stage.width, stage.height, reference=final)
        trainer = _Trainer(model, recipe, stage, out=out, frames_folder=frames_folder or out, notes=notes)
        frames_read = trainer.run(number, frames_read, on_progress)
    return out / CHECKPOINT


def start(recipe: Recipe, backbone_weights: str | None, init: Path | None) -> tuple[PSDiff, dict[str, Any]]:
    """The model to train and the notes on its origin."""
    if init is not None:
        return load_checkpoint(init)
    config = load_preset(recipe.preset)
    notes: dict[str, Any] = {"preset": recipe.preset, "initial_backbone_weights": backbone_weights}
    if backbone_weights is None:
        return PSDiff(config), notes
    weights = initial_weights(config.backbone, backbone_weights)
    notes["initial_backbone_weights"] = Path(backbone_weights).name
    config = config.model_copy(update={"pixel_mean": weights.pixel_mean, "pixel_std": weights.pixel_std})
    model = PSDiff(config)
    load_initial_weights(model.backbone, config.backbone, weights)
    return model, notes


def resized(model: PSDiff, width: int, height: int, *, reference: PSDiffConfig) -> PSDiff:
    """The same weights for another canvas; boxes of the same share of the canvas keep their pyramid level."""
    canonical_size = reference.canonical_size * width / reference.width
    update = {"width": width, "height": height, "canonical_size": canonical_size}
    other = PSDiff(model.config.model_copy(update=update))
    other.load_state_dict(model.state_dict())
    return other


def is_first_rank() -> bool:
    """Whether this process is the one that writes and reports; also before the ranks have met."""
    return int(os.environ.get("RANK", "0")) == 0


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class _Trainer:
    """One stage: model, optimiser, and the running averages that are reported."""

    def __init__(
        self,
        model: PSDiff,
        recipe: Recipe,
        stage: Stage,
        *,
        out: Path,
        frames_folder: Path,
        notes: dict[str, Any],
    ) -> None:
        self.model, self.recipe, self.stage = model.train(), recipe, stage
        self.out, self.frames_folder, self.notes = out, frames_folder, notes
        freeze_stages(model.backbone, recipe.frozen_stages)
        body = [p for p in model.backbone.stages.parameters() if p.requires_grad]
        rest = [*model.backbone.fpn.parameters(), *model.denoiser.parameters()]
        self.parameters = body + rest
        self.optimizer = torch.optim.AdamW(
            [{"params": body, "factor": recipe.backbone_learning_rate}, {"params": rest, "factor": 1.0}],
            lr=stage.learning_rate,
            weight_decay=recipe.weight_decay,
        )
        self.averages: dict[str, float] = {}

    def run(self, number: int, frames_read: int, on_progress: Callable[[Progress], None]) -> int:
        """Train to the end of the stage; returns how many frames of the run were drawn so far."""
        began = saved = time.monotonic()
        iteration = 0
        for iteration, batch in enumerate(self._batches(frames_read)):
            share = self._agreed(self._share(iteration, (time.monotonic() - began) / 60))
            if share >= 1:
                break
            self._set_learning_rate(iteration, share)
            self._step(batch)
            frames_read += len(batch.people) * _world_size()
            now = time.monotonic()
            rate = (iteration + 1) * len(batch.people) * _world_size() / (now - began)
            progress = Progress(
                number, share, iteration + 1, rate, self.averages["total"], self.averages["image_cosine"]
            )
            on_progress(progress)
            if now - saved > 60 * self.recipe.save_every_minutes:
                self._save(number, iteration + 1, frames_read, now - began)
                saved = now
        self._save(number, iteration, frames_read, time.monotonic() - began)
        self.notes.setdefault("stages", []).append(self._stage_notes(iteration, time.monotonic() - began))
        if _rank() == 0:
            save_checkpoint(self.model, self.out / CHECKPOINT, self.notes)
        return frames_read

    def _batches(self, start: int) -> Iterator[Batch]:
        stage, recipe = self.stage, self.recipe
        return street_batches(
            FramePool(self.frames_folder, recipe.seed, recipe.frames),
            range(start + _rank(), ENDLESS, _world_size()),
            width=stage.width,
            height=stage.height,
            batch_size=stage.batch_size,
            workers=recipe.loader_workers,
        )

    def _step(self, batch: Batch) -> None:
        loss, image_cosine = self._forward(batch)
        if not torch.isfinite(loss.total):
            torch.save(batch, self.out / "non_finite_batch.pt")
            raise NonFiniteLossError(
                f"loss must be finite, got {[part.item() for part in loss]}; the batch is in "
                f"{self.out / 'non_finite_batch.pt'}; lower learning_rate and go on from the checkpoint"
            )
        self.optimizer.zero_grad()
        loss.total.backward()
        self._average_gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.max_gradient_norm)
        self.optimizer.step()
        named = zip(loss._fields, (part.item() for part in loss), strict=True)
        self._average({"total": loss.total.item(), "image_cosine": image_cosine, **dict(named)})

    def _forward(self, batch: Batch) -> tuple[SetLoss, float]:
        features = self.model.backbone(batch.images)
        groups = [
            noisy_group(self.model, batch.people, self.recipe, max_timestep=limit)
            for limit in (self.model.config.num_timesteps, self.recipe.dense_max_timestep)
        ]
        inputs = NoisyGroup(*(torch.cat(parts) for parts in zip(*groups, strict=True)))
        people = batch.people * GROUPS
        repeated = [torch.cat([feature] * GROUPS) for feature in features]
        prediction = self.model.denoiser(repeated, inputs.boxes_norm, inputs.emb_t, inputs.t, inputs.t_emb)
        matches = [self._match(prediction, inputs.boxes_norm, people, row) for row in range(len(people))]
        return set_loss(prediction, people, matches), self._image_cosine(prediction, inputs, people, matches)

    def _match(self, prediction: Prediction, input_boxes: Tensor, people: list[People], row: int) -> Match:
        alone = Prediction(*(part[row].detach() for part in prediction))
        matched = match(alone, people[row], self.recipe.matching)
        if self.recipe.dense_iou is None:
            return matched
        return add_overlapping(matched, input_boxes[row], people[row].boxes_norm, self.recipe.dense_iou)

    @torch.no_grad()
    def _image_cosine(
        self, prediction: Prediction, inputs: NoisyGroup, people: list[People], matches: list[Match]
    ) -> float:
        cosines = [
            F.cosine_similarity(
                prediction.embeddings[row, m.proposals], people[row].embeddings[m.people], dim=1
            )
            for row, m in enumerate(matches)
            if inputs.t_emb[row] == self.model.config.num_timesteps - 1
        ]
        pooled = torch.cat(cosines) if cosines else torch.zeros(0)
        return pooled.mean().item() if len(pooled) else self.averages.get("image_cosine", 0.0)

    def _average_gradients(self) -> None:
        if _world_size() == 1:
            return
        # A parameter without gradient (an image without people) counts as zero, so that the ranks agree.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        parts = (flat / _world_size()).split([p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def _agreed(self, share: float) -> float:
        """Rank 0's clock decides for all, or the ranks would leave the loop apart."""
        if _world_size() == 1:
            return share
        value = torch.tensor(share, dtype=torch.float64)
        dist.broadcast(value, src=0)
        return value.item()

    def _average(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.averages[name] = 0.98 * self.averages.get(name, value) + 0.02 * value

    def _share(self, iteration: int, minutes: float) -> float:
        by_iterations = iteration / self.stage.iterations if self.stage.iterations else 0.0
        by_minutes = minutes / self.stage.minutes if self.stage.minutes else 0.0
        return max(by_iterations, by_minutes)

    def _set_learning_rate(self, iteration: int, share: float) -> None:
        warmup = min(1.0, (iteration + 1) / max(self.stage.warmup_iterations, 1))
        falling = max(0.0, share - CONSTANT_SHARE) / (1 - CONSTANT_SHARE)
        cosine = FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * falling))
        decay = cosine if self.stage.decay else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.stage.learning_rate * group["factor"] * warmup * decay

    def _save(self, number: int, iteration: int, frames: int, seconds: float) -> None:
        if _rank() != 0:
            return
        self.notes["frames"] = frames
        save_checkpoint(self.model, self.out / CHECKPOINT, self.notes)
        entry = {"stage": number, "iteration": iteration, "minutes": round(seconds / 60, 2), **self.averages}
        with (self.out / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _stage_notes(self, iterations: int, seconds: float) -> dict[str, Any]:
        return {
            "width": self.stage.width,
            "height": self.stage.height,
            "batch_size": self.stage.batch_size,
            "processes": _world_size(),
            "iterations": iterations,
            "minutes": round(seconds / 60, 1),
        }
