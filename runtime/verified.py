"""Nothing unverified is served: a bundle proves on this machine that it computes what PyTorch computed.

The proof is kept in the user's cache, under the hash of the manifest (which holds the hash of every file), the
backend with its version, and the machine; so it is repeated when one of them changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from ..bundle import MANIFEST, REFERENCE, BundleError, Manifest, file_sha256
from ..models.detector import Detector, PersonDetector
from ..models.verification import INT8_TOLERANCE, Comparison, Tolerance, compare
from ..plans import sidecars_sha256
from .backends import DEFAULT_SERVER, INT8_BACKENDS, TRITON
from .detector import backend_version, detector_of, settings_of
from .triton_detector import TritonDetector


class Proof(BaseModel):
    """What was compared, where, and how it came out."""

    model_config = ConfigDict(extra="forbid")

    model_id: str
    manifest_sha256: str
    backend: str
    """Its name and version."""
    machine: str
    checked_at: datetime
    tolerance: dict[str, float]
    comparisons: list[Comparison]

    @property
    def faults(self) -> list[str]:
        """What is wrong, one sentence a K; empty where the bundle may be served."""
        wanted = self.tolerance["matched"]
        return [
            f"at K = {each.steps} {each.matched:.1%} of the best proposals must agree with PyTorch's within "
            f"{self.tolerance['box_px']:g} px and cosine {self.tolerance['cosine']:g}, at least {wanted:.0%}; "
            f"largest differences: {each.box_px:.3g} px, cosine {each.cosine:.4f}, score {each.score:.3g}"
            for each in self.comparisons
            if not each.matched >= wanted
        ]


def tolerance_of(backend: str) -> Tolerance:
    """What a backend's arithmetic is held to: embeddings in 8 bits may turn a little further, boxes may not move."""
    return INT8_TOLERANCE if backend in INT8_BACKENDS else Tolerance()


def verify(
    detector: Detector, manifest: Manifest, folder: Path, backend: str, tolerance: Tolerance | None = None
) -> Proof:
    """Compare an open bundle with its reference outputs; a proof that holds at the usual tolerance is kept.

    Raises BundleError where there is no reference, or one that belongs to another form of bundle.
    """
    tolerance = tolerance or tolerance_of(backend)
    try:
        with (folder / REFERENCE).open("rb") as file, np.load(file) as reference:
            comparisons = compare(detector.engine, reference, detector.settings, tolerance)
    except (OSError, BadZipFile, KeyError, ValueError) as error:
        raise BundleError(
            f"{folder / REFERENCE} must hold the reference outputs of this bundle, got: {error}; export it again"
        ) from None
    proof = Proof(
        model_id=manifest.model_id,
        manifest_sha256=file_sha256(folder / MANIFEST),
        backend=_computed_by(folder, backend),
        machine=machine(),
        checked_at=datetime.now(UTC),
        tolerance=asdict(tolerance),
        comparisons=comparisons,
    )
    if not proof.faults and tolerance == tolerance_of(backend):
        _keep(proof)
    return proof


def require_proof(detector: Detector, manifest: Manifest, folder: Path, backend: str) -> Proof:
    """The proof of an earlier run, or a new one. Raises BundleError where the bundle computes something else."""
    known = kept_proof(folder, backend)
    proof = known or verify(detector, manifest, folder, backend)
    if proof.faults:
        raise BundleError(
            f"{folder} must compute what PyTorch computed before it is served, got {proof.faults[0]}; "
            f"psdiff verify {folder} --backend {backend} shows more; export the bundle again, or update "
            f"{proof.backend}"
        )
    return proof


def open_proven(
    manifest: Manifest,
    folder: Path,
    backend: str = "onnxruntime",
    *,
    threads: int | None = None,
    server: str = DEFAULT_SERVER,
) -> PersonDetector:
    """Open a bundle that proves itself, or ask a server that has it: there it proved itself when it was loaded.

    Arguments as in open_detector. Raises what detector_of, require_proof and TritonDetector raise.
    """
    if backend == TRITON:
        return TritonDetector(server, settings_of(manifest), folder, waits_when_busy=True)
    detector = detector_of(manifest, folder, backend, threads=threads)
    require_proof(detector, manifest, folder, backend)
    return detector


def kept_proof(folder: Path, backend: str) -> Proof | None:
    """The proof that this bundle, backend and machine have given before; None where there is none."""
    path = _place(file_sha256(folder / MANIFEST), _computed_by(folder, backend), machine())
    try:
        return Proof.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None


def machine() -> str:
    """The machine as far as arithmetic depends on it: processor, and what the system calls it."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        models = [
            line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))
        ]
        name = models[0] if models else name
    return f"{platform.system()} {platform.machine()} {name}"


def _computed_by(folder: Path, backend: str) -> str:
    """The backend and its version; for TensorRT its engines too, which the manifest does not hold."""
    name = backend_version(backend)
    return f"{name} {sidecars_sha256(folder)[:12]}" if backend == "tensorrt" else name


def _keep(proof: Proof) -> None:
    """Write the proof; a folder that cannot be written costs a second at the next start, and nothing else."""
    path = _place(proof.manifest_sha256, proof.backend, proof.machine)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(proof.model_dump_json(indent=2) + "\n")
        Path(file.name).replace(path)
    except OSError:
        return


def _place(manifest_sha256: str, backend: str, machine_name: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "psdiff" / "verified"
    key = json.dumps([manifest_sha256, backend, machine_name])
    return cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
