"""A model repository for Triton Inference Server: psdiff, which loops, and a psdiff_k{K} an engine of K steps.

OUT/psdiff/config.pbtxt                 Python backend: a request says K, seed, start, boxes: runtime.serving
OUT/psdiff/VERSION/model.py, bundle/    the bundle as it is, which proves itself when the server loads it
OUT/psdiff_k{K}/config.pbtxt            TensorRT backend: image, boxes_T, emb_T -> all N proposals
OUT/psdiff_k{K}/VERSION/model_sm{SM}.plan

Everything is written beside OUT and moved in: a server that watches the folder never sees a part.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import BACKBONE, BundleError, Manifest, Precision, file_sha256, graph_file, load_manifest
from ..bundle import MANIFEST as MANIFEST_FILE
from ..plans import PLANS, SIDECAR, EnginesRecord
from ..runtime.triton_contract import BUNDLE, MODEL
from .tensorrt_plan import RTX
from .triton_config import (
    Plan,
    RepositoryError,
    RepositoryOptions,
    engine_config,
    graph_tensors,
    psdiff_config,
)

CONFIG = "config.pbtxt"
WARMUP = "warmup"

MODEL_PY = '''"""Written by psdiff triton-repo. psdiff must be installed in the Python of the server."""

from psdiff.runtime.triton_model import TritonPythonModel  # noqa: F401 - the server looks for this name
'''


def write_repository(bundle: Path, out: Path, options: RepositoryOptions | None = None) -> list[Path]:
    """Add a version of every model that the bundle can give. Returns the folders of the versions.

    Raises BundleError (a bundle not whole) and RepositoryError (a version that exists, engines that a server
    cannot load, tritonclient missing); then nothing was written.
    """
    options = options or RepositoryOptions()
    manifest = load_manifest(bundle)
    _check_canvas(bundle, manifest)
    plans = {
        steps: found for steps in manifest.timesteps if (found := _plans(bundle, steps, options.precision))
    }
    names = [MODEL, *(f"{MODEL}_k{steps}" for steps in plans)]
    version = options.version or 1 + max((_latest(out / name) for name in names), default=0)
    for name in names:
        if (out / name / str(version)).exists():
            raise RepositoryError(f"version must be new, got {version}, which {out / name} has already")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        staged = Path(temporary)
        _stage_psdiff(staged / MODEL, bundle, manifest, options, version)
        for steps, found in plans.items():
            _stage_engines(staged / f"{MODEL}_k{steps}", bundle, manifest, steps, found, options, version)
        return [_move_in(staged / name, out / name, version) for name in names]


def _check_canvas(bundle: Path, manifest: Manifest) -> None:
    """Raise BundleError where the graph takes another image than the manifest says."""
    inputs, _ = graph_tensors(bundle / BACKBONE)
    wanted = ("TYPE_UINT8", [manifest.height, manifest.width, 3])
    kind, dims = inputs["image"]
    fits = kind == wanted[0] and all(found in (-1, want) for found, want in zip(dims, wanted[1], strict=True))
    if not fits:
        raise BundleError(
            f"image of {BACKBONE} must be {wanted[0]} {wanted[1]}, as the manifest says, got {kind} {dims}; "
            "export the bundle again"
        )


def _plans(bundle: Path, steps: int, precision: Precision) -> list[Plan]:
    """The engines of K steps that a server can load, one a GPU."""
    found: dict[int, Plan] = {}
    for sidecar in sorted((bundle / PLANS).glob(f"*/{SIDECAR}")):
        record = EnginesRecord.model_validate_json(sidecar.read_text(encoding="utf-8"))
        engine = record.engines.get(f"e2e_k{steps}")
        # The server's backend loads plans of TensorRT; those of TensorRT-RTX are another format.
        if engine is None or record.precision != precision or record.tensorrt.startswith(RTX):
            continue
        path = sidecar.parent / engine.file
        if file_sha256(path) != engine.sha256:
            raise BundleError(
                f"{path} must be what {SIDECAR} says, got another file; build the engines again"
            )
        if record.sm in found:
            raise RepositoryError(
                f"plans of sm_{record.sm} must be of one TensorRT, got {found[record.sm].record.tensorrt} and "
                f"{record.tensorrt}; remove the folder of one of them from {bundle / PLANS}"
            )
        found[record.sm] = Plan(record.sm, path, record)
    return [found[sm] for sm in sorted(found)]


def _stage_psdiff(
    folder: Path, bundle: Path, manifest: Manifest, options: RepositoryOptions, version: int
) -> None:
    made = folder / str(version) / BUNDLE
    made.mkdir(parents=True)
    for name in [MANIFEST_FILE, *manifest.files]:
        shutil.copy2(bundle / name, made / name)
    if (bundle / PLANS).is_dir() and options.backend == "tensorrt":
        shutil.copytree(bundle / PLANS, made / PLANS)
    (made.parent / "model.py").write_text(MODEL_PY, encoding="utf-8")
    _write_config(folder, psdiff_config(manifest, file_sha256(made / MANIFEST_FILE), options))


def _stage_engines(
    folder: Path,
    bundle: Path,
    manifest: Manifest,
    steps: int,
    plans: Sequence[Plan],
    options: RepositoryOptions,
    version: int,
) -> None:
    (folder / str(version)).mkdir(parents=True)
    for plan in plans:
        shutil.copy2(plan.path, folder / str(version) / plan.file)
    (folder / WARMUP).mkdir()
    _grey(manifest).tofile(folder / WARMUP / "image")
    graph = bundle / graph_file(f"e2e_k{steps}", options.precision)
    _write_config(folder, engine_config(graph, manifest, steps, plans, options))


def _grey(manifest: Manifest) -> np.ndarray[Any, Any]:
    return np.full((manifest.height, manifest.width, 3), 114, np.uint8)


def _write_config(folder: Path, config: Any) -> None:  # noqa: ANN401 - a message type of the server
    from google.protobuf import text_format

    (folder / CONFIG).write_text(text_format.MessageToString(config), encoding="utf-8")


def _move_in(staged: Path, folder: Path, version: int) -> Path:
    """Move a model to its place; into a model that exists, its new version before the new configuration."""
    if not folder.exists():
        staged.rename(folder)
        return folder / str(version)
    (staged / str(version)).rename(folder / str(version))
    for path in [path for path in staged.rglob("*") if path.is_file()]:
        target = folder / path.relative_to(staged)
        target.parent.mkdir(exist_ok=True)
        path.replace(target)
    return folder / str(version)


def _latest(folder: Path) -> int:
    """The highest version of a model; 0 without one."""
    numbers = [int(path.name) for path in folder.glob("*") if path.is_dir() and path.name.isdecimal()]
    return max(numbers, default=0)
