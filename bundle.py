"""The bundle: the folder that export writes and every runtime reads, and the proof that it is whole.

manifest.json         what the model is, and the SHA-256 of every other file
backbone.onnx         image u8 [B,H,W,3] -> p2..p5
denoise_step.onnx     p2..p5, boxes_t, emb_t, t, t_next -> boxes_next, emb_next, boxes_xyxy, scores, embeddings
e2e_k{K}.onnx         image, boxes_T, emb_T -> boxes_xyxy, scores, embeddings: all of the above, K steps unrolled
*.fp16.onnx           the same graphs computing in half precision, *.bf16.onnx in bfloat16; inputs and outputs that
                      hold boxes, scores and embeddings stay float32
*.int8.onnx           backbone and step with Q/DQ pairs around what 8 bits hold, for onnxruntime; *.int8-trt.onnx for
                      TensorRT; both hold their own weights and come from psdiff export --target int8
precision.int8.json   what 8 bits cost: the error of each tensor, and what stayed float32
weights.safetensors   the weights, for PyTorch and for every graph above: these point into it
reference.npz         one input, states and PyTorch fp32 outputs at several K: see models.verification
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MANIFEST = "manifest.json"
BACKBONE = "backbone.onnx"
DENOISE_STEP = "denoise_step.onnx"
WEIGHTS = "weights.safetensors"
REFERENCE = "reference.npz"
PRECISION_REPORT = "precision.int8.json"

Precision = Literal["fp32", "fp16", "bf16"]
"""In what a graph computes; boxes, scores, embeddings and the state of the sampler are float32 in each."""
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")

QuantizedForm = Literal["int8", "int8-trt"]
"""For whom a graph is quantised: onnxruntime on CPUs, or TensorRT."""
QUANTIZED_FORMS: tuple[QuantizedForm, ...] = ("int8", "int8-trt")

# Read by every runtime before anything else: a bundle of another format is refused.
FORMAT_VERSION = 1


class BundleError(Exception):
    """The bundle is missing, incomplete, altered, or made for another format; serving it is refused."""


class Measurement(BaseModel):
    """What one number of steps achieved on a labelled set, and what it cost."""

    model_config = ConfigDict(extra="forbid")

    steps: int
    backend: str
    ap50: float
    """Detection average precision at IoU 0.5, in [0, 1]."""
    top1: float
    """Share of queries whose best match in the other camera is the right person, in [0, 1]."""
    ms_per_frame: float
    dataset: str
    machine: str


class Latency(BaseModel):
    """What a number of steps costs on one machine, one batch after the other."""

    model_config = ConfigDict(extra="forbid")

    steps: int
    batch: int
    backend: str
    """Its name and version."""
    machine: str
    p50_ms: float
    """Of a whole batch, from frames to detections."""
    p95_ms: float
    p99_ms: float


class Manifest(BaseModel):
    """Everything a runtime must know of a model, as JSON."""

    model_config = ConfigDict(extra="forbid")

    format_version: int = FORMAT_VERSION
    model_id: str
    embedding_space: str
    """Embeddings of two bundles may be compared only where this agrees."""
    width: int = Field(gt=0)
    height: int = Field(gt=0)
    num_proposals: int = Field(gt=0)
    embedding_dim: int = Field(gt=0)
    box_scale: float = Field(gt=0)
    timesteps: dict[int, list[int]]
    """K -> the K descending timesteps of its DDIM grid."""
    default_steps: int = 4
    score_threshold: float = Field(ge=0, le=1)
    """Detection score from which a box counts as a person."""
    score_thresholds: dict[int, float] = {}
    """The same by K, where it was calibrated: scores rise with the number of steps."""
    nms_iou: float = Field(gt=0, le=1)
    match_threshold: float = Field(ge=-1, le=1)
    """Cosine from which a detection counts as the person asked for."""
    weight_precision: str
    model: dict[str, Any]
    """The PSDiffConfig it was built from."""
    training: dict[str, Any]
    """How the weights came about: data, initial weights with their licence, iterations, minutes."""
    tools: dict[str, str]
    """Versions of what wrote the bundle."""
    files: dict[str, str]
    """File name -> SHA-256."""
    measurements: list[Measurement] = []
    latencies: list[Latency] = []
    """By psdiff bench --record; a scheduler chooses K by them."""

    @property
    def embedding_scale(self) -> float | None:
        """Norm of an embedding in signal space, of the model; None where the bundle does not tell."""
        return self.model.get("embedding_scale")

    @property
    def num_timesteps(self) -> int | None:
        """T of the model's noise schedule; None where the bundle does not tell."""
        return self.model.get("num_timesteps")


def graph_file(part: str, precision: Precision | QuantizedForm = "fp32") -> str:
    """File name of a graph: part is `backbone`, `denoise_step` or `e2e_k{K}`."""
    return f"{part}.onnx" if precision == "fp32" else f"{part}.{precision}.onnx"


def load_manifest(folder: Path) -> Manifest:
    """Read manifest.json and check every file's SHA-256 against it.

    Raises BundleError that names the file, what was wanted, what was found, and what to do.
    """
    manifest = _read_manifest(folder)
    for name, wanted in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise BundleError(f"bundle must hold {name}, got no such file in {folder}; export it again")
        found = file_sha256(path)
        if found != wanted:
            raise BundleError(
                f"{name} must have SHA-256 {wanted[:12]}..., got {found[:12]}...; "
                f"the bundle {folder} was altered or damaged: restore it or export it again"
            )
    return manifest


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"bundle must be a folder with {MANIFEST}, got {folder}; make one with psdiff export"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("format_version") != FORMAT_VERSION:
            found = content.get("format_version")
            raise BundleError(
                f"bundle format must be {FORMAT_VERSION}, got {found} in {path}; export it again"
            )
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(
            f"{path}: {where}: {first['msg']}, got {first['input']!r}; export it again"
        ) from None
    except (ValueError, AttributeError) as error:
        raise BundleError(f"{path} must be a JSON object, got {error}; export it again") from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json at once: a reader sees the old one or the new one, never a part."""
    temporary = folder / f".{MANIFEST}.partial"
    temporary.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / MANIFEST)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
