"""The settings of a teacher's training run: one YAML file, checked before anything starts."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from ...models.reid_teacher import TeacherConfig
from ..recipe import read_settings
from .memory import MemorySettings


class TeacherRecipe(BaseModel):
    """A training run of a teacher. The defaults are those of HHCL (arXiv:2109.12333) with true identities."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    network: TeacherConfig = TeacherConfig()
    memory: MemorySettings = MemorySettings()
    seed: int = Field(default=0, ge=0)
    """Of the weights' start, the batches, and the disturbances of the crops."""
    epochs: int = Field(default=60, gt=0)
    iterations: int = Field(default=200, gt=0)
    """Per epoch; the memory is filled anew at the start of each."""
    identities: int = Field(default=16, gt=0)
    """People in a batch."""
    instances: int = Field(default=16, gt=1)
    """Views of each; 4 suit a set with about three boxes a person, as CUHK-SYSU."""
    unlabelled_share: float = Field(default=0.25, ge=0, lt=1)
    """Of a batch: people whom nobody named, whose embeddings the queue of negatives keeps up to date."""
    same_place_iou: float = Field(default=0.3, ge=0, le=1)
    """Unlabelled boxes that overlap a named one by more are no negatives of it: they may show the same person."""
    learning_rate: float = Field(default=3.5e-4, gt=0)
    weight_decay: float = Field(default=5e-4, ge=0)
    decay_epochs: int = Field(default=20, gt=0)
    """The learning rate is divided by ten after every so many epochs."""
    padding: int = Field(default=10, ge=0)
    """Pixels of the resized crop around which the random shift goes."""
    erasing: float = Field(default=0.5, ge=0, le=1)
    """Probability that a rectangle of a crop is covered."""
    loader_workers: int = Field(default=4, ge=0)
    threads: int | None = Field(default=None, gt=0)
    """Threads of PyTorch; null takes every core."""
    save_every_epochs: int = Field(default=5, gt=0)


def load_teacher_recipe(path: Path) -> TeacherRecipe:
    """Read a YAML recipe. Raises RecipeError that names the first wrong key and the closest known one."""
    return read_settings(path, TeacherRecipe, parts=(TeacherConfig, MemorySettings))
