"""The settings of a teacher's training run: one YAML file, checked before anything starts."""

from __future__ import annotations

import difflib
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...models.reid_teacher import TeacherConfig
from ..recipe import RecipeError
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
    if not path.is_file():
        raise RecipeError(f"recipe must be a YAML file, got {path}, which does not exist")
    try:
        return TeacherRecipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe must be YAML, got {path}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "recipe"
        if first["type"] == "extra_forbidden":
            message = f"{where} must be a known key{_closest(str(first['loc'][-1]))}"
        else:
            message = f"{where}: {first['msg']}, got {first['input']!r}"
        raise RecipeError(f"{path}: {message}") from None


def _closest(key: str) -> str:
    parts = (TeacherRecipe, TeacherConfig, MemorySettings)
    close = difflib.get_close_matches(key, [name for part in parts for name in part.model_fields], n=1)
    return f"; did you mean {close[0]}?" if close else ""
