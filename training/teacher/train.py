"""The training loop of the teacher: labelled people in, a frozen network out.

Legend: n rows of the table, B crops of a batch, E embedding dimension.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ...models.backbone import initial_weights
from ...models.reid_teacher import ReidTeacher, load_body_weights, load_teacher, save_teacher
from ..datasets.schema import UNLABELLED, PersonSearchSet, ReidSet
from .crops import CropTable, TrainingCrops, table_of_crops, table_of_images
from .embedding import default_device, embed_table, score_teacher
from .memory import HybridMemory, overlaps
from .recipe import TeacherRecipe
from .sampler import IdentitySampler

CHECKPOINT = "teacher.safetensors"
LOG = "log.jsonl"

DECAY = 0.1


@dataclass(frozen=True)
class TeacherProgress:
    """Where a run stands; handed to the caller after every iteration."""

    epoch: int
    """From 0."""
    iteration: int
    """Of the epoch, from 1."""
    loss: float
    """Mean over the epoch so far."""
    images_per_s: float


class NonFiniteTeacherLossError(RuntimeError):
    """The loss is not a number; training stopped and the last checkpoint is good."""


def train_teacher(
    recipe: TeacherRecipe,
    data: ReidSet | PersonSearchSet,
    out: Path,
    *,
    backbone_weights: str | None = None,
    init: Path | None = None,
    device: str | None = None,
    on_progress: Callable[[TeacherProgress], None] = lambda progress: None,
) -> Path:
    """Train on the true identities of a data set; return the path of the checkpoint, whose notes hold its scores.

    out: folder for checkpoint and log. backbone_weights: see models.backbone.initial_weights; None starts from
    random weights. init: a teacher to go on from instead, with its own network. device: default
    embedding.default_device. Raises ValueError where fewer than two people are labelled.
    """
    torch.manual_seed(recipe.seed)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    out.mkdir(parents=True, exist_ok=True)
    teacher, notes = start(recipe, backbone_weights, init)
    teacher.to(device or default_device())
    table = table_of_crops(data.train) if isinstance(data, ReidSet) else table_of_images(data.train)
    trainer = _Trainer(teacher, recipe, table, out=out)
    notes |= {"data": data.name, "identities": trainer.num_classes, "crops": len(trainer.table)}
    for epoch in range(recipe.epochs):
        trainer.run(epoch, on_progress)
        notes["epochs"] = epoch + 1
        if (epoch + 1) % recipe.save_every_epochs == 0:
            save_teacher(teacher, out / CHECKPOINT, notes)
    # Scoring may take long and may fail; what was learned is safe before.
    save_teacher(teacher, out / CHECKPOINT, notes)
    scores = score_teacher(teacher, data, workers=recipe.loader_workers)
    if scores is not None:
        notes["scores"] = {"map": scores.map, "top1": scores.top(1), "queries": scores.num_queries}
        save_teacher(teacher, out / CHECKPOINT, notes)
    return out / CHECKPOINT


def start(
    recipe: TeacherRecipe, backbone_weights: str | None, init: Path | None
) -> tuple[ReidTeacher, dict[str, Any]]:
    """The teacher to train and the notes on its origin."""
    notes: dict[str, Any] = {"recipe": recipe.model_dump(mode="json")}
    if init is not None:
        return load_teacher(init)[0], notes | {"init": init.name}
    if backbone_weights is None:
        return ReidTeacher(recipe.network), notes | {"initial_backbone_weights": None}
    weights = initial_weights(recipe.network.backbone, backbone_weights)
    pixels = {"pixel_mean": weights.pixel_mean, "pixel_std": weights.pixel_std}
    teacher = ReidTeacher(recipe.network.model_copy(update=pixels))
    load_body_weights(teacher, weights)
    return teacher, notes | {"initial_backbone_weights": Path(backbone_weights).name}


class _Trainer:
    """Table, loader, optimiser and schedule of one run."""

    def __init__(self, teacher: ReidTeacher, recipe: TeacherRecipe, table: CropTable, *, out: Path) -> None:
        self.teacher, self.recipe, self.out = teacher, recipe, out
        self.device = teacher.norm.weight.device
        _num_classes(table)
        # The first look at every crop also tells which boxes show nobody; these take no part.
        features = self._embed(table)
        shown = features.any(dim=1).cpu()
        self.features: Tensor | None = features[shown.to(self.device)]
        self.table = table.rows(shown.numpy())
        self.num_classes = _num_classes(self.table)
        self.labels = torch.from_numpy(self.table.labels()).to(self.device)
        self.frames = torch.from_numpy(self.table.frames).to(self.device)
        self.boxes_xyxy = torch.from_numpy(self.table.boxes_xyxy).to(self.device)
        self.is_unlabelled = self.labels == UNLABELLED
        self.queue_entries = self.is_unlabelled.cumsum(0) - 1
        self.loader = self._loader()
        self.optimizer = torch.optim.Adam(
            [p for p in teacher.parameters() if p.requires_grad],
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
        )
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, recipe.decay_epochs, DECAY)

    def run(self, epoch: int, on_progress: Callable[[TeacherProgress], None]) -> None:
        """One epoch with a memory of its own, and a line in the log."""
        memory = self._memory()
        self.teacher.train()
        began, total, images = time.monotonic(), 0.0, 0
        for iteration, (crops, rows) in enumerate(self.loader, start=1):
            total += self._step(memory, crops.to(self.device), rows.to(self.device))
            images += len(rows)
            rate = images / (time.monotonic() - began)
            on_progress(TeacherProgress(epoch, iteration, total / iteration, rate))
        entry = {
            "epoch": epoch,
            "loss": total / self.recipe.iterations,
            "learning_rate": self.schedule.get_last_lr()[0],
            "minutes": round((time.monotonic() - began) / 60, 2),
        }
        with (self.out / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self.schedule.step()

    def _step(self, memory: HybridMemory, crops: Tensor, rows: Tensor) -> float:
        features = self.teacher(crops)
        is_unlabelled = self.is_unlabelled[rows]
        anchors, labels = features[~is_unlabelled], self.labels[rows[~is_unlabelled]]
        loss = memory.loss(anchors, labels, self._excluded(rows[~is_unlabelled]))
        if not torch.isfinite(loss):
            torch.save({"crops": crops, "rows": rows}, self.out / "non_finite_batch.pt")
            raise NonFiniteTeacherLossError(
                f"loss must be finite, got {loss.item()}; the batch is in {self.out / 'non_finite_batch.pt'}; "
                "lower learning_rate and go on from the checkpoint"
            )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        memory.update(anchors, labels)
        memory.refresh(features[is_unlabelled], self.queue_entries[rows[is_unlabelled]])
        return loss.item()

    def _memory(self) -> HybridMemory:
        features = self._embed(self.table) if self.features is None else self.features
        self.features = None
        return HybridMemory(
            features[~self.is_unlabelled],
            self.labels[~self.is_unlabelled],
            unlabelled=features[self.is_unlabelled],
            instances=self.recipe.instances,
            settings=self.recipe.memory,
        )

    def _embed(self, table: CropTable) -> Tensor:
        return embed_table(self.teacher, table, workers=self.recipe.loader_workers, with_mirror=False)

    def _excluded(self, rows: Tensor) -> Tensor:
        return overlaps(
            self.frames[rows],
            self.boxes_xyxy[rows],
            self.frames[self.is_unlabelled],
            self.boxes_xyxy[self.is_unlabelled],
            min_iou=self.recipe.same_place_iou,
        )

    def _loader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        recipe = self.recipe
        crops = TrainingCrops(self.table, self.teacher.config, padding=recipe.padding, erasing=recipe.erasing)
        sampler = IdentitySampler(
            self.table.labels(),
            self.table.cameras,
            identities=recipe.identities,
            instances=recipe.instances,
            unlabelled_share=recipe.unlabelled_share,
            batches=recipe.iterations,
            seed=recipe.seed,
        )
        return DataLoader(crops, batch_sampler=sampler, num_workers=recipe.loader_workers)


def _num_classes(table: CropTable) -> int:
    count = int(table.labels().max(initial=UNLABELLED)) + 1
    if count < 2:
        raise ValueError(f"data must have at least two labelled people to train on, got {count}")
    return count
