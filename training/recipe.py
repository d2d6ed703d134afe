"""The settings of a training run: one YAML file, checked before anything starts.

The defaults are those of PSDiff (arXiv:2309.11125, sec. IV-A); the recipes that come with psdiff say where they
depart from them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..models.diffusion import Padding
from .matcher import Matching

Settings = TypeVar("Settings", bound=BaseModel)

RECIPES = Path(__file__).parent / "recipes"


class RecipeError(ValueError):
    """The recipe file cannot be used; the message names the key and what to do."""


class Data(BaseModel):
    """What is learnt from: a data set with cached embeddings, or frames of the synthetic street."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["street", "cuhk-sysu", "prw", "posetrack21"] = "street"
    root: Path | None = None
    """Folder of the data set; the street needs none."""
    embeddings: Path | None = None
    """Embedding cache of the training boxes, from `psdiff teacher embed`, or a synthetic city's truth.npz."""
    teacher: Path | None = None
    """Checkpoint of the teacher that made the cache: a cache of any other is refused."""
    frames: int = Field(default=8000, gt=0)
    """Street: size of the pool of frames; each is read several times."""


class Stage(BaseModel):
    """One part of a run at one canvas size; ends at `iterations` or after `minutes`, whichever is first."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: int = Field(1344, gt=0, multiple_of=32)
    height: int = Field(768, gt=0, multiple_of=32)
    batch_size: int = Field(8, gt=0)
    """Images a process and micro-batch; the optimizer sees times `accumulate` and times the processes."""
    accumulate: int = Field(1, gt=0)
    """Micro-batches whose gradients are averaged for one step of the optimizer."""
    iterations: int | None = Field(None, gt=0)
    """Steps of the optimizer."""
    minutes: float | None = Field(None, gt=0)
    learning_rate: float = Field(2.5e-5, gt=0)
    warmup_iterations: int = Field(1000, ge=0)
    decay: Literal["steps", "cosine", "none"] = "steps"
    """`steps`: a tenth after 7/9 and again after 14/15 of the stage (70k and 84k of 90k); `cosine`: constant for
    the first half, then down to 2 %; `none`: a stage that others follow."""

    @model_validator(mode="after")
    def _check_end(self) -> Stage:
        if self.iterations is None and self.minutes is None:
            raise ValueError("iterations or minutes must be given, or the stage would never end")
        return self


class Recipe(BaseModel):
    """A training run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: str = "psdiff_r50"
    data: Data = Data()
    seed: int = Field(0, ge=0)
    """Of the weights' start, the noise, and the order of the images."""
    stages: tuple[Stage, ...] = Field(min_length=1)
    matching: Matching = "hungarian"
    padding: Padding = "repeat"
    num_proposals: int | None = Field(None, gt=0)
    """Proposals per group while training; null takes the preset's. The weights do not depend on it."""
    dense_iou: float | None = Field(None, gt=0, le=1)
    """Input boxes that overlap a person by this much are positives too; null leaves it to the matching."""
    dense_max_timestep: int | None = Field(None, gt=0)
    """A second group of proposals per image has box noise below this timestep; null for none."""
    embedding_dropout: float = Field(0.0, ge=0, le=1)
    """Share of the images of a batch whose embeddings are pure noise while the boxes are not."""
    embedding_error: float = Field(0.0, ge=0, le=1)
    """Up to how far (1 - cosine) the embedding that is noised may be from the true one."""
    pure_noise: bool = False
    """Always start from noise at the last timestep: plain distillation with K = 1 (PSDiff, table VI)."""
    backbone_learning_rate: float = Field(1.0, ge=0)
    """Times the learning rate of the rest."""
    frozen_stages: int = Field(2, ge=0, le=4)
    weight_decay: float = Field(1e-4, ge=0)
    max_gradient_norm: float = Field(1.0, gt=0)
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Also average the weights with this decay per iteration, and hand out the average; null for none."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast on GPUs that have it; slower on most CPUs."""
    loader_workers: int = Field(1, ge=0)
    threads: int | None = Field(None, gt=0)
    """Threads of PyTorch; null takes every core."""
    save_every_minutes: float = Field(3.0, gt=0)


def load_recipe(path: Path) -> Recipe:
    """Read a YAML recipe. Raises RecipeError that names the first wrong key and the closest known one."""
    return read_settings(path, Recipe, parts=(Stage, Data))


def read_settings(path: Path, kind: type[Settings], *, parts: Sequence[type[BaseModel]]) -> Settings:
    """Read a YAML file as settings of a kind; parts: the models inside it, whose keys may be meant too.

    Raises RecipeError that names the first wrong key and the closest known one.
    """
    if not path.is_file():
        raise RecipeError(f"recipe must be a YAML file, got {path}, which does not exist")
    try:
        return kind.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe must be YAML, got {path}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "recipe"
        message = f"{where}: {first['msg'].removeprefix('Value error, ')}, got {first['input']!r}"
        if first["type"] == "extra_forbidden":
            known = [name for model in (kind, *parts) for name in model.model_fields]
            message = f"{where} must be a known key{_closest(str(first['loc'][-1]), known)}"
        raise RecipeError(f"{path}: {message}") from None


def with_data(recipe: Recipe, changes: Mapping[str, object]) -> Recipe:
    """Replace keys of the recipe's data; None leaves a key as it is. Raises RecipeError for a root of the street."""
    given = {name: value for name, value in changes.items() if value is not None}
    data = Data.model_validate(recipe.data.model_dump() | given)
    if data.format == "street" and given.keys() - {"format"}:
        raise RecipeError(
            f"data.format must be cuhk-sysu, prw or posetrack21 to read {', '.join(given)}, got street; add --format"
        )
    return recipe.model_copy(update={"data": data})


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write every setting as YAML that load_recipe reads, at once."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    temporary.replace(path)


def _closest(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
