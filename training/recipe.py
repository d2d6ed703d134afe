"""The settings of a training run: one YAML file, checked before anything starts."""

from __future__ import annotations

import difflib
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..models.diffusion import Padding
from .matcher import Matching

RECIPES = Path(__file__).parent / "recipes"


class RecipeError(ValueError):
    """The recipe file cannot be used; the message names the key and what to do."""


class Stage(BaseModel):
    """One part of a run at one canvas size; ends at `iterations` or after `minutes`, whichever is first."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: int = Field(gt=0, multiple_of=32)
    height: int = Field(gt=0, multiple_of=32)
    batch_size: int = Field(4, gt=0)
    iterations: int | None = Field(None, gt=0)
    minutes: float | None = Field(None, gt=0)
    learning_rate: float = Field(7e-4, gt=0)
    warmup_iterations: int = Field(100, ge=0)
    decay: bool = True
    """Let the learning rate fall in the second half; a stage that others follow may keep it."""


class Recipe(BaseModel):
    """A training run on the synthetic street."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: str = "psdiff_mobile"
    seed: int = Field(0, ge=0)
    """Of the weights' start, the noise, and the frames that are drawn."""
    frames: int = Field(8000, gt=0)
    """Size of the pool of frames; each is read several times."""
    stages: tuple[Stage, ...] = Field(min_length=1)
    matching: Matching = "simota"
    padding: Padding = "mixed"
    num_proposals: int | None = Field(None, gt=0)
    """Proposals per group while training; null takes the preset's. The weights do not depend on it."""
    dense_iou: float | None = Field(0.5, gt=0, le=1)
    """Input boxes that overlap a person by this much are positives too; null leaves it to the matching."""
    dense_max_timestep: int = Field(150, gt=0)
    """A second group of proposals per image has box noise below this timestep; see train.noisy_group."""
    embedding_dropout: float = Field(0.5, ge=0, le=1)
    """Share of the images of a batch whose embeddings are pure noise while the boxes are not."""
    embedding_error: float = Field(0.7, ge=0, le=1)
    """Up to how far (1 - cosine) the embedding that is noised may be from the true one."""
    backbone_learning_rate: float = Field(0.3, ge=0)
    """Times the learning rate of the rest."""
    frozen_stages: int = Field(1, ge=0, le=4)
    weight_decay: float = Field(1e-4, ge=0)
    max_gradient_norm: float = Field(1.0, gt=0)
    loader_workers: int = Field(1, ge=0)
    threads: int | None = Field(None, gt=0)
    """Threads of PyTorch; null takes every core."""
    save_every_minutes: float = Field(3.0, gt=0)


def load_recipe(path: Path) -> Recipe:
    """Read a YAML recipe. Raises RecipeError that names the first wrong key and the closest known one."""
    if not path.is_file():
        raise RecipeError(f"recipe must be a YAML file, got {path}, which does not exist")
    try:
        return Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe must be YAML, got {path}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "recipe"
        if first["type"] == "extra_forbidden":
            raise RecipeError(
                f"{path}: {where} must be a known key{_closest(str(first['loc'][-1]))}"
            ) from None
        raise RecipeError(f"{path}: {where}: {first['msg']}, got {first['input']!r}") from None


def _closest(key: str) -> str:
    close = difflib.get_close_matches(key, [*Recipe.model_fields, *Stage.model_fields], n=1)
    return f"; did you mean {close[0]}?" if close else ""
