"""The TensorRT engines of a bundle: plans/<target>/ with a sidecar that says for which device each was made.

export writes them, runtime takes those that fit its device, and refuses what does not fit before it loads a byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from .bundle import BundleError, Manifest, Precision, file_sha256

PLANS = "plans"
SIDECAR = "engines.json"
PLUGIN_LIBRARY = "libpsdiff_trt.so"
"""A copy of the library whose kernels the engines call, beside them."""

EnginePrecision = Precision | Literal["int8"]
"""int8: where the bundle was quantised; all else is float32 there."""

# Where a device has engines in several, the first of these is taken; those in 8 bits must pass the proof of the rest.
PREFERENCE: tuple[EnginePrecision, ...] = ("fp16", "bf16", "fp32", "int8")

LOOPED = ("backbone", "denoise_step")
"""The engines of a runtime that loops on the host."""


class EngineRecord(BaseModel):
    """One engine of a target."""

    model_config = ConfigDict(extra="forbid")

    file: str
    sha256: str
    graph: str
    graph_sha256: str
    kernels: dict[str, int]
    """How many of each kind; empty where TensorRT does not say."""
    scratch_bytes: int
    stream_capturable: bool | None
    profiles: list[dict[str, tuple[list[int], list[int], list[int]]]]
    """Of each input the smallest, usual and largest shape."""
    channels_last: list[str]
    """Inputs and outputs that lie (B, h, w, C) in memory."""


class EnginesRecord(BaseModel):
    """The sidecar: a runtime compares it with the device and the bundle before it loads an engine."""

    model_config = ConfigDict(extra="forbid")

    sm: int
    tensorrt: str
    """Name and version of what built them; a plan loads in this version alone."""
    precision: EnginePrecision
    embedding_space: str
    plugin_sha256: str | None
    engines: dict[str, EngineRecord]


@dataclass(frozen=True)
class Device:
    """What engines run on."""

    sm: int
    """Compute capability times ten."""
    tensorrt: str
    """Name and version, as in EnginesRecord."""


@dataclass(frozen=True)
class Plans:
    """The engines that a runtime takes."""

    folder: Path
    record: EnginesRecord

    @property
    def plugin_library(self) -> Path | None:
        """What the engines need loaded before them; None where they need nothing."""
        return None if self.record.plugin_sha256 is None else self.folder / PLUGIN_LIBRARY

    def path(self, part: str) -> Path:
        """File of an engine."""
        return self.folder / self.record.engines[part].file


def choose_plans(bundle: Path, manifest: Manifest, device: Device) -> Plans:
    """The engines of a bundle for a device, every byte of them checked.

    manifest: of the bundle, loaded and thereby checked. Raises BundleError that names the field, what was wanted,
    what was found, and the command that makes what is missing.
    """
    remedy = f"run psdiff export {bundle} --target trt --sm {device.sm} on this device"
    found = [_read(path) for path in sorted((bundle / PLANS).glob(f"[!.]*/{SIDECAR}"))]
    if not found:
        raise BundleError(f"bundle must hold {PLANS}/*/{SIDECAR}, got none in {bundle}; {remedy}")
    fitting = _fitting(found, "sm", device.sm, remedy)
    fitting = _fitting(fitting, "tensorrt", device.tensorrt, remedy)
    plans = min(fitting, key=lambda each: PREFERENCE.index(each.record.precision))
    _check(plans, manifest, remedy)
    return plans


def sidecars_sha256(bundle: Path) -> str:
    """One hash of all sidecars of a bundle, whose manifest says nothing of engines: it changes with any of them."""
    sidecars = sorted((bundle / PLANS).glob(f"[!.]*/{SIDECAR}"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sidecars)).hexdigest()


def _read(path: Path) -> Plans:
    try:
        return Plans(path.parent, EnginesRecord.model_validate_json(path.read_bytes()))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{path}: {where}: {first['msg']}; build the engines again") from None


def _fitting(found: Sequence[Plans], field: str, wanted: object, remedy: str) -> list[Plans]:
    fitting = [plans for plans in found if getattr(plans.record, field) == wanted]
    if not fitting:
        others = ", ".join(sorted({str(getattr(plans.record, field)) for plans in found}))
        raise BundleError(f"{field} of the engines must be {wanted}, got {others}; {remedy}")
    return fitting


def _check(plans: Plans, manifest: Manifest, remedy: str) -> None:
    """Raise BundleError unless the engines are of this bundle, and the files are those that were written."""
    record = plans.record

    def same(what: str, wanted: str | None, found: str | None) -> None:
        if wanted != found:
            raise BundleError(f"{what} in {plans.folder} must be {wanted}, got {found}; {remedy}")

    same("embedding_space", manifest.embedding_space, record.embedding_space)
    for part in LOOPED:
        if part not in record.engines:
            got = ", ".join(record.engines) or "none"
            raise BundleError(f"engines in {plans.folder} must have {part}, got {got}; {remedy}")
        engine = record.engines[part]
        same(f"graph_sha256 of {part}", manifest.files.get(engine.graph), engine.graph_sha256)
        same(f"SHA-256 of {engine.file}", engine.sha256, _sha256(plans.path(part)))
    if plans.plugin_library is not None:
        same(f"SHA-256 of {PLUGIN_LIBRARY}", record.plugin_sha256, _sha256(plans.plugin_library))


def _sha256(path: Path) -> str:
    return file_sha256(path) if path.is_file() else "no such file"
