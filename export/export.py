"""A checkpoint becomes a bundle: graphs, weights, reference outputs, manifest; whole or not at all."""

from __future__ import annotations

import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from safetensors.torch import save_file

if __name__ == "__main__" and not __package__:
    __package__ = "psdiff.export"

from .. import __version__
from ..bundle import (
    MANIFEST,
    PRECISIONS,
    REFERENCE,
    WEIGHTS,
    Manifest,
    Precision,
    file_sha256,
    graph_file,
    write_manifest,
)
from ..models.person_search import PSDiff, TorchEngine, load_checkpoint, sampler_settings
from ..models.verification import reference_arrays
from .onnx_graph import backbone_graph, denoise_step_graph
from .precision import SMALLEST_HALF_TENSOR, half_precision, halve_weights, round_to_half, to_bfloat16
from .shared_weights import point_into
from .unroll import unroll

# Steps that servers without a loop can be asked for: one graph each.
UNROLLED_STEPS = (1, 2, 4, 8)

# Cosine from which a detection counts as the person asked for, until a site calibrates its own.
DEFAULT_MATCH_THRESHOLD = 0.6

TOOLS = ("torch", "torchvision", "onnx", "onnxscript", "numpy")


class ExportError(Exception):
    """The bundle could not be written; nothing was left behind."""


def export_bundle(
    checkpoint: Path,
    out: Path,
    *,
    model_id: str | None = None,
    match_threshold: float = DEFAULT_MATCH_THRESHOLD,
    precisions: Sequence[Precision] = PRECISIONS,
    on_step: Callable[[str], None] = lambda step: None,
) -> Manifest:
    """Write the bundle of a checkpoint to the folder `out`, replacing a bundle that is there.

    precisions: of the graphs; fp32 is always written. on_step is told what is being done. Raises ExportError where
    `out` holds something else than a bundle.
    """
    if out.exists() and not (out / MANIFEST).is_file():
        raise ExportError(f"out must be a new folder or a bundle, got {out}, which holds something else")
    model, notes = load_checkpoint(checkpoint)
    round_to_half(model).eval()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary) / out.name
        folder.mkdir()
        _write_files(model, folder, precisions, on_step)
        manifest = describe(model, notes, folder, model_id or out.name, match_threshold)
        write_manifest(folder, manifest)
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)
    return manifest


def _write_files(
    model: PSDiff, folder: Path, precisions: Sequence[Precision], on_step: Callable[[str], None]
) -> None:
    on_step(f"writing {WEIGHTS}")
    save_weights(model, folder / WEIGHTS)
    for precision, backbone, step in traced(model, precisions, on_step):
        on_step(f"writing the graphs in {precision}")
        for part, graph in _graphs(model, backbone, step):
            onnx.checker.check_model(graph, full_check=True)
            point_into(graph, folder / WEIGHTS)
            onnx.save(graph, folder / graph_file(part, precision))
    on_step(f"computing {REFERENCE}")
    _save_arrays(folder / REFERENCE, reference_arrays(TorchEngine(model), sampler_settings(model.config)))


def traced(
    model: PSDiff, precisions: Sequence[Precision], on_step: Callable[[str], None]
) -> Iterator[tuple[Precision, onnx.ModelProto, onnx.ModelProto]]:
    """Backbone and denoising step in fp32, then in the half precisions that are asked for."""
    on_step("tracing the network in fp32")
    full = backbone_graph(model), denoise_step_graph(model)
    for graph in full:
        halve_weights(graph)
    yield "fp32", *full
    if {"fp16", "bf16"}.isdisjoint(precisions):
        return
    on_step("tracing the network in half precision")
    half = half_precision(model)
    backbone, step = backbone_graph(half), denoise_step_graph(half)
    if "bf16" in precisions:
        yield "bf16", to_bfloat16(backbone), to_bfloat16(step)
    if "fp16" in precisions:
        yield "fp16", backbone, step


def _graphs(
    model: PSDiff, backbone: onnx.ModelProto, step: onnx.ModelProto
) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The unrolled graphs first: made of the other two before these point into the file of weights."""
    timesteps = sampler_settings(model.config).timesteps
    for steps in UNROLLED_STEPS:
        yield f"e2e_k{steps}", unroll(backbone, step, timesteps[steps])
    yield "backbone", backbone
    yield "denoise_step", step


def _save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    np.savez_compressed(path, **arrays)


def save_weights(model: PSDiff, path: Path) -> None:
    """The rounded weights as a checkpoint that `load_checkpoint` reads, large tensors in float16."""
    weights = {
        name: (tensor.half() if tensor.numel() >= SMALLEST_HALF_TENSOR else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(weights, path, metadata={"config": model.config.model_dump_json()})
    # safetensors writes for the owner's eyes alone; a server often runs as somebody else.
    path.chmod(0o644)


def describe(
    model: PSDiff, notes: dict[str, Any], folder: Path, model_id: str, match_threshold: float
) -> Manifest:
    """The manifest of a model whose files lie in folder."""
    config, settings = model.config, sampler_settings(model.config)
    files = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
    return Manifest(
        model_id=model_id,
        # Any change of the weights moves the embeddings, so the space is named after them.
        embedding_space=f"{model_id}-{files[WEIGHTS][:12]}",
        width=config.width,
        height=config.height,
        num_proposals=config.num_proposals,
        embedding_dim=config.embedding_dim,
        box_scale=config.box_scale,
        timesteps={steps: list(grid) for steps, grid in settings.timesteps.items()},
        score_threshold=config.score_threshold,
        nms_iou=config.nms_iou,
        match_threshold=match_threshold,
        weight_precision="float16 storage, float32 compute",
        model=config.model_dump(mode="json"),
        training=notes,
        tools={"psdiff": __version__, **{tool: version(tool) for tool in TOOLS}},
        files=files,
    )


if __name__ == "__main__":
    # python export/export.py is psdiff export.
    sys.argv.insert(1, "export")
    runpy.run_module("psdiff", run_name="__main__", alter_sys=True)
