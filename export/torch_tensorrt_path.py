"""The modules of a bundle compiled by Torch-TensorRT: for programs that run PyTorch anyway.

The same modules that become graphs go through torch.export and torch_tensorrt.dynamo. psdiff's two operations stay
PyTorch operations between the engines and run the CUDA kernels where these are built. Without PyTorch take
engines.py; the names of the arguments are those of Torch-TensorRT 2.14, whose networks are strongly typed.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from ..bundle import WEIGHTS, Manifest, load_manifest
from ..models.person_search import PSDiff, load_checkpoint
from ..plans import PLANS
from .engines import EngineOptions, profiles_of
from .onnx_graph import DenoiseStep, backbone_example, step_example
from .precision import half_precision
from .tensorrt_plan import EngineError

# A program that loads the modules must have imported psdiff.kernels.ops, which defines these.
KEPT_IN_TORCH = frozenset(
    {torch.ops.psdiff.multilevel_roi_align.default, torch.ops.psdiff.dynamic_conv.default}
)


def compile_modules(
    bundle: Path,
    options: EngineOptions,
    on_step: Callable[[str], None] = lambda step: None,
    *,
    device: str = "cuda",
) -> Path:
    """Compile backbone and denoising step; returns plans/<target>, which is replaced at once, when both are there.

    It holds backbone.pt2 and denoise_step.pt2 for torch.export.load, after import of torch_tensorrt and
    psdiff.kernels.ops. Of the options sm must be this machine's; plugins and unrolled graphs have no part in it.
    Raises EngineError (no Torch-TensorRT, no GPU, bf16) and BundleError.
    """
    torch_tensorrt = torch_tensorrt_module()
    if device == "cuda" and not torch.cuda.is_available():
        raise EngineError("target torch-tensorrt must have a GPU that PyTorch sees, got none")
    if options.precision == "bf16":
        raise EngineError("precision must be fp32 or fp16 with target torch-tensorrt, got bf16")
    manifest = load_manifest(bundle)
    model, _ = load_checkpoint(bundle / WEIGHTS)
    if options.precision == "fp16":
        model = half_precision(model)
    folder = bundle / PLANS / f"sm{options.sm}-torch-tensorrt{torch_tensorrt.__version__}-{options.precision}"
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()
        for part, program in exported(model, device):
            on_step(f"compiling {part} for sm_{options.sm} in {options.precision}")
            inputs = _inputs(torch_tensorrt, part, program, manifest, options)
            compiled = torch_tensorrt.dynamo.compile(
                program, arg_inputs=inputs, torch_executed_ops=set(KEPT_IN_TORCH)
            )
            torch_tensorrt.save(
                compiled, str(made / f"{part}.pt2"), output_format="exported_program", arg_inputs=inputs
            )
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    return folder


def torch_tensorrt_module() -> ModuleType:
    """Import torch_tensorrt. Raises EngineError that says how to install it."""
    if find_spec("torch_tensorrt") is None:
        raise EngineError(
            "target torch-tensorrt must have the package torch-tensorrt, got none; run "
            "pip install 'psdiff[torch-tensorrt]' on a machine with a GPU (its version must be that of torch, here "
            f"{torch.__version__}; a Jetson Orin has no wheel: take --target trt there)"
        )
    return import_module("torch_tensorrt")


def exported(model: PSDiff, device: str) -> Iterator[tuple[str, ExportedProgram]]:
    """Backbone and denoising step as torch.export writes them; B and N are dynamic, inputs those of the graphs."""
    parts: list[tuple[str, nn.Module, tuple[tuple[torch.Tensor, ...], tuple[Any, ...]]]] = [
        ("backbone", model.backbone, backbone_example(model)),
        ("denoise_step", DenoiseStep(model), step_example(model)),
    ]
    for part, module, (inputs, shapes) in parts:
        placed = tuple(tensor.to(device) for tensor in inputs)
        yield part, torch.export.export(module.eval().to(device), placed, dynamic_shapes=shapes)


def _inputs(
    torch_tensorrt: ModuleType,
    part: str,
    program: ExportedProgram,
    manifest: Manifest,
    options: EngineOptions,
) -> list[Any]:
    """The range of each input's shape, that of the engines, and its type."""
    # Maps pass between modules as PyTorch has them, (B, C, h, w), which is how float32 engines take them, too.
    [_, profile] = profiles_of(part, manifest, replace(options, precision="fp32"))
    example, _ = program.example_inputs or ((), {})
    return [
        torch_tensorrt.Input(
            min_shape=tuple(smallest),
            opt_shape=tuple(usual),
            max_shape=tuple(largest),
            dtype=tensor.dtype,
            name=name,
        )
        for tensor, (name, (smallest, usual, largest)) in zip(example, profile.items(), strict=True)
    ]
