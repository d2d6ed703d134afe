"""What a run starts from: random weights, a classifier's backbone, or a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..models.backbone import initial_weights, load_initial_weights
from ..models.config import PSDiffConfig, load_preset
from ..models.person_search import PSDiff, load_checkpoint
from .recipe import Recipe
from .resume import RunState


class StartError(ValueError):
    """The preset, the backbone's weights or the checkpoint cannot be used; the message says why."""


def start(recipe: Recipe, backbone_weights: str | None, init: Path | None) -> tuple[PSDiff, dict[str, Any]]:
    """The model to train and the notes on its origin. Raises StartError for names and files that do not fit."""
    try:
        return load_checkpoint(init) if init is not None else _from_preset(recipe, backbone_weights)
    except ValueError as error:
        raise StartError(str(error)) from None


def start_again(state: RunState) -> tuple[PSDiff, dict[str, Any]]:
    """The network of an interrupted run, still without its weights, and its notes."""
    return PSDiff(PSDiffConfig.model_validate_json(state.config)), json.loads(state.notes)


def _from_preset(recipe: Recipe, backbone_weights: str | None) -> tuple[PSDiff, dict[str, Any]]:
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
