"""The state of a run on disk: everything that the next iteration depends on, in one file, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .recipe import Recipe

STATE = "resume.pt"
RECIPE = "recipe.yaml"

# What may change between the parts of a run without changing its result.
FREE_KEYS = ("threads", "loader_workers", "save_every_minutes")


class ResumeError(ValueError):
    """The run cannot go on from its state; the message says what differs and what to do."""


@dataclass(frozen=True)
class RunState:
    """A run between two iterations. Noise and image order are functions of `samples`, so no generator is kept."""

    recipe: dict[str, Any]
    """As recipe_key gives it."""
    processes: int
    config: str
    """The network at full size, JSON: resuming needs neither the initial weights nor --init."""
    stage: int
    iteration: int
    """Steps of the optimizer in this stage."""
    samples: int
    """Images read by all processes since the start of the run."""
    seconds: float
    """Time spent in this stage."""
    model: dict[str, Tensor]
    average: dict[str, Tensor] | None
    """The averaged weights, where the recipe asks for them."""
    optimizer: dict[str, Any]
    averages: dict[str, float]
    notes: str
    """JSON."""


def recipe_key(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe decides the result: dotted keys, such as stages.0.width, and plain values."""
    return {key: value for key, value in _flat(recipe.model_dump(mode="json")) if key not in FREE_KEYS}


def _flat(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        branch = dict(enumerate(value)) if isinstance(value, list) else value
        if isinstance(branch, dict):
            yield from _flat(branch, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def save_state(state: RunState, out: Path) -> None:
    """Write out/resume.pt; a reader, or a resumed run, sees the old file or the new one."""
    temporary = out / f".{STATE}.partial"
    torch.save(vars(state), temporary)
    temporary.replace(out / STATE)


def load_state(out: Path, recipe: Recipe, processes: int) -> RunState:
    """Read out/resume.pt. Raises ResumeError where it is missing, damaged, or of another recipe."""
    path = out / STATE
    if not path.is_file():
        raise ResumeError(
            f"out must hold a run to resume, got {out} without {STATE}; start one without --resume"
        )
    state = _read(path)
    saved, wanted = (
        {**key, "number of processes": n}
        for key, n in ((state.recipe, state.processes), (recipe_key(recipe), processes))
    )
    for name in [*wanted, *saved]:
        if saved.get(name) != wanted.get(name):
            raise ResumeError(
                f"{name} must be {json.dumps(saved.get(name))} as in the run in {out}, got "
                f"{json.dumps(wanted.get(name))}; resume with that, or train into another folder"
            )
    return state


def _read(path: Path) -> RunState:
    try:
        return RunState(**torch.load(path, map_location="cpu", weights_only=True))
    # What a damaged pickle raises is anything. Its own message tells how to load it unsafely: it stays here.
    except Exception as error:
        raise ResumeError(
            f"{path} must be written by psdiff train, got a file that cannot be read ({type(error).__name__}); "
            "start the run again in another folder"
        ) from None
