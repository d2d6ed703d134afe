"""Training runs of a few seconds: a tiny network, a recipe for it, and the weights it starts from."""

import torch
from psdiff.models.config import PSDiffConfig
from psdiff.models.person_search import PSDiff, load_checkpoint, save_checkpoint
from psdiff.training.recipe import Recipe

TINY = {
    "backbone": "mobilenet_v2",
    "height": 96,
    "width": 160,
    "channels": 32,
    "separable_fpn": True,
    "num_proposals": 30,
    "embedding_dim": 64,
    "canonical_size": 56.0,
    "num_heads": 4,
    "dynamic_dim": 4,
    "ffn_dim": 64,
    "time_dim": 32,
    "time_hidden": 64,
    "head": "joint",
    "embedding_gain": "wiener",
    "grid_power": 3.0,
}


def tiny_stage(**changes):
    return {"width": 160, "height": 96, "batch_size": 2, "iterations": 3} | changes


def tiny_recipe(**changes):
    settings = {
        "stages": [tiny_stage()],
        "data": {"frames": 4},
        "loader_workers": 0,
        "num_proposals": 10,
    }
    return Recipe.model_validate(settings | changes)


def tiny_model(**changes):
    torch.manual_seed(0)
    return PSDiff(PSDiffConfig.model_validate(TINY | changes))


def write_tiny_checkpoint(folder):
    path = folder / "start.safetensors"
    save_checkpoint(tiny_model(), path, {"made_by": "a test"})
    return path


def weights(path):
    return load_checkpoint(path)[0].state_dict()


def assert_same(first, second):
    """Nested weights are equal to the last bit."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for name in first:
            assert_same(first[name], second[name])
    elif isinstance(first, list):
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second
