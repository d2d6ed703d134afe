"""The small model of the study: frozen features of the shipped model, and a denoising layer trained on them.

The study asks what the denoising layer, its training and its sampler contribute. So everything below that layer
is held fixed: MobileNetV2 and pyramid of the shipped psdiff_mobile, each level projected on its leading principal
components. Features of the training frames are computed once and kept; a run then takes minutes on one core.
Legend: n frames, C channels of the pyramid, D channels of the study, h, w sides of a level.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..models.config import PSDiffConfig
from ..models.detector import Detector
from ..models.person_search import PSDiff, TorchEngine, load_checkpoint, sampler_settings
from ..models.preprocess import Letterbox
from ..models.sampling import Float32Array, StepOutput
from ..runtime.detector import shipped_bundle
from ..training.matcher import People
from ..training.noising import image_generator
from ..training.objective import denoising_objective
from ..training.recipe import Recipe

WIDTH, HEIGHT, CHANNELS = 320, 192, 64
LEVELS = 4

# Frames that the principal components are computed from; the covariance of 96 channels needs no more.
PROJECTION_FRAMES = 100


class FrozenBackbone(nn.Module):
    """Backbone and pyramid of the shipped model, projected to CHANNELS; no parameter is trained."""

    def __init__(self, backbone: nn.Module, projections: Sequence[Tensor]) -> None:
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)
        self.projections = nn.ParameterList(
            nn.Parameter(projection, requires_grad=False) for projection in projections
        )

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, H, W, 3) uint8 RGB -> p2..p5 of (B, CHANNELS, h, w)."""
        levels = zip(self.backbone(images), self.projections, strict=True)
        return [torch.einsum("bchw,dc->bdhw", level, projection) for level, projection in levels]


class Frames(NamedTuple):
    """Training frames as features on disk, with their people."""

    features: list[NDArray[np.float16]]
    """Four memory-mapped levels of (n, h, w, CHANNELS)."""
    people: list[People]


def study_config(changes: dict[str, Any]) -> PSDiffConfig:
    """The network of the study with the changes of a variant."""
    settings = {
        "backbone": "mobilenet_v2",
        "separable_fpn": True,
        "width": WIDTH,
        "height": HEIGHT,
        "canonical_size": 56.0,
        "channels": CHANNELS,
        "num_proposals": 60,
        "embedding_dim": 64,
        "sampling_ratio": 1,
        "num_heads": 4,
        "dynamic_dim": 8,
        "ffn_dim": 192,
        "time_dim": 64,
        "time_hidden": 128,
        "squeeze_dim": 24,
        "head": "region",
        "embedding_gain": "wiener",
        "grid_power": 3.0,
    }
    return PSDiffConfig.model_validate(settings | changes)


def frozen_backbone(projections_path: Path, canvases: Callable[[], NDArray[np.uint8]]) -> FrozenBackbone:
    """The backbone of the study; the projections are made from `canvases` (n, H, W, 3) at the first use."""
    shipped, _ = load_checkpoint(shipped_bundle() / "weights.safetensors")
    if not projections_path.is_file():
        _save_projections(shipped.backbone, canvases(), projections_path)
    with np.load(projections_path) as stored:
        projections = [torch.from_numpy(stored[f"p{2 + level}"]) for level in range(LEVELS)]
    return FrozenBackbone(shipped.backbone, projections)


@torch.no_grad()
def _save_projections(backbone: nn.Module, canvases: NDArray[np.uint8], path: Path) -> None:
    """The leading eigenvectors of each level's second moments, and the share of energy that they keep."""
    moments: list[Tensor] = []
    for canvas in canvases:
        levels = [level.flatten(2)[0] for level in backbone.eval()(torch.from_numpy(canvas[None]))]
        products = [(level @ level.T).double() for level in levels]
        moments = [a + b for a, b in zip(moments, products, strict=True)] if moments else products
    arrays = {}
    for number, moment in enumerate(moments):
        values, vectors = torch.linalg.eigh(moment)
        arrays[f"p{2 + number}"] = vectors[:, -CHANNELS:].T.float().contiguous().numpy()
        arrays[f"kept{2 + number}"] = (values[-CHANNELS:].sum() / values.sum()).numpy()
    temporary = path.with_name(f".{path.name}")
    np.savez(temporary, **arrays)
    temporary.replace(path)


def save_features(
    backbone: FrozenBackbone,
    canvases: NDArray[np.uint8],
    folder: Path,
    on_frame: Callable[[], None],
) -> None:
    """Write the four levels of every canvas as float16 .npy files, complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = [(len(canvases), HEIGHT // stride, WIDTH // stride, CHANNELS) for stride in (4, 8, 16, 32)]
    partial = [folder / f".p{2 + level}.partial.npy" for level in range(LEVELS)]
    arrays = [
        np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
        for path, shape in zip(partial, shapes, strict=True)
    ]
    for row in range(len(canvases)):
        for array, level in zip(arrays, backbone(torch.from_numpy(canvases[row][None])), strict=True):
            array[row] = level[0].permute(1, 2, 0).numpy()
        on_frame()
    for level, (path, array) in enumerate(zip(partial, arrays, strict=True)):
        array.flush()
        path.replace(folder / f"p{2 + level}.npy")


def load_features(folder: Path) -> list[NDArray[np.float16]]:
    """The four memory-mapped levels of (n, h, w, CHANNELS)."""
    return [np.load(folder / f"p{2 + level}.npy", mmap_mode="r") for level in range(LEVELS)]


def canvas_of(image: NDArray[np.uint8]) -> tuple[Letterbox, NDArray[np.uint8]]:
    """The letterbox of an image and its (HEIGHT, WIDTH, 3) canvas."""
    letterbox = Letterbox(image.shape[1], image.shape[0], WIDTH, HEIGHT)
    return letterbox, letterbox.image(image)


def train_denoiser(
    backbone: FrozenBackbone,
    frames: Frames,
    config: PSDiffConfig,
    recipe: Recipe,
    on_iteration: Callable[[int, float], None] = lambda iteration, loss: None,
) -> tuple[PSDiff, list[dict[str, float]]]:
    """Train a denoising layer from its random start; returns the model and its curve.

    Uses batch size, iterations and learning rate of the recipe's only stage, with a short warm-up and a cosine.
    """
    torch.manual_seed(recipe.seed)
    model = PSDiff(config)
    model.add_module("backbone", backbone)
    denoiser, stage = model.denoiser.train(), recipe.stages[0]
    assert stage.iterations is not None
    optimizer = torch.optim.AdamW(
        denoiser.parameters(), lr=stage.learning_rate, weight_decay=recipe.weight_decay
    )
    order = np.random.default_rng(recipe.seed)
    queue: list[int] = []
    curve: list[dict[str, float]] = []
    began, mean = time.perf_counter(), 0.0
    for iteration in range(stage.iterations):
        if len(queue) < stage.batch_size:
            queue += order.permutation(len(frames.people)).tolist()
        rows, queue = queue[: stage.batch_size], queue[stage.batch_size :]
        features = [
            torch.from_numpy(level[rows].astype(np.float32)).movedim(3, 1) for level in frames.features
        ]
        first = iteration * stage.batch_size
        generators = [image_generator(recipe.seed, first + i) for i in range(stage.batch_size)]
        objective = denoising_objective(
            denoiser, features, [frames.people[row] for row in rows], recipe, generators
        )
        loss = objective.loss.total
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * _schedule(
                iteration, stage.iterations, stage.warmup_iterations
            )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), recipe.max_gradient_norm)
        optimizer.step()
        mean = loss.item() if iteration == 0 else 0.98 * mean + 0.02 * loss.item()
        on_iteration(iteration, mean)
        if (iteration + 1) % 250 == 0:
            seconds = time.perf_counter() - began
            curve.append({"iteration": iteration + 1, "loss": mean, "seconds": round(seconds, 1)})
    return model.eval(), curve


def _schedule(iteration: int, iterations: int, warmup: int) -> float:
    warm = min(1.0, (iteration + 1) / max(warmup, 1))
    return warm * 0.5 * (1 + math.cos(math.pi * iteration / iterations))


class RememberingEngine:
    """A TorchEngine that keeps the features of every canvas it has seen: all samplers share one backbone pass."""

    def __init__(self, model: PSDiff, memory: dict[int, list[Tensor]]) -> None:
        self.engine, self.memory = TorchEngine(model), memory

    def backbone(self, images: NDArray[np.uint8]) -> list[Tensor]:
        """(B, H, W, 3) uint8 RGB -> p2..p5, float16 in memory."""
        keys = [zlib.crc32(image.tobytes()) for image in images]
        for key, image in zip(keys, images, strict=True):
            if key not in self.memory:
                self.memory[key] = [level.half() for level in self.engine.backbone(image[None])]
        rows = [self.memory[key] for key in keys]
        return [torch.cat(levels).float() for levels in zip(*rows, strict=True)]

    def denoise_step(
        self,
        features: Sequence[Tensor],
        boxes_t: Float32Array,
        emb_t: Float32Array,
        t: NDArray[np.int64],
        t_next: NDArray[np.int64],
    ) -> StepOutput:
        """One DDIM step of the trained layer."""
        return self.engine.denoise_step(features, boxes_t, emb_t, t, t_next)


def study_detector(model: PSDiff, memory: dict[int, list[Tensor]]) -> Detector:
    """A Detector over a trained model; `memory` is shared between the models of one process."""
    return Detector(RememberingEngine(model, memory), sampler_settings(model.config))
