"""Open a bundle for inference: the manifest, an engine for its graphs, and the Detector over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..bundle import BundleError, Manifest, Precision, QuantizedForm, graph_file, load_manifest
from ..models.detections import Float32Array
from ..models.detector import Detector, PersonDetector
from ..models.sampling import (
    BACKBONE_INPUTS,
    FEATURES,
    STEP_INPUTS,
    Engine,
    Features,
    SamplerSettings,
    StepOutput,
)
from .backends import BACKENDS, DEFAULT_SERVER, TRITON
from .triton_detector import TritonDetector

# onnxruntime's one kernel for addition and LayerNorm takes 11 ms where the two take 4: 14700 tokens of 256 channels,
# two cores, onnxruntime 1.31.
SLOW_FUSIONS = ("SkipLayerNormFusion",)


def backend_version(backend: str) -> str:
    """Name and version of what a backend computes with. Raises ValueError where it is missing."""
    if backend == "tensorrt":
        from .tensorrt_engine import tensorrt_version

        return tensorrt_version()
    return f"{backend} {version(backend.partition('-')[0])}"


def shipped_bundle() -> Path:
    """Return the folder of the bundle that comes with the package."""
    return Path(__file__).parent / "bundles" / "psdiff_mobile"


def open_detector(
    bundle: Path | str | None = None,
    backend: str = "onnxruntime",
    *,
    threads: int | None = None,
    server: str = DEFAULT_SERVER,
) -> PersonDetector:
    """Check a bundle and open it: `open_detector().detect([frame], steps=4)`.

    bundle: its folder, by default the shipped one; load_manifest(bundle) tells what it is. backend: one of
    BACKENDS, or triton for a server that has the same bundle. threads: CPU threads of the inference, by default
    one a core. server: HOST:PORT of the gRPC service of Triton.
    Raises BundleError (missing, altered, not loadable, or not what the server has), ServerError (not there) and
    ValueError (unknown backend, or one that is not installed, threads < 1).
    """
    folder = shipped_bundle() if bundle is None else Path(bundle)
    manifest = load_manifest(folder)
    if backend == TRITON:
        return TritonDetector(server, settings_of(manifest), folder)
    return detector_of(manifest, folder, backend, threads=threads)


def detector_of(
    manifest: Manifest, folder: Path, backend: str = "onnxruntime", *, threads: int | None = None
) -> Detector:
    """Open a bundle whose manifest is loaded, and thereby checked, already. Arguments as in open_detector."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be a whole number >= 1, got {threads}")
    return Detector(_engine(manifest, folder, backend, threads), settings_of(manifest))


def settings_of(manifest: Manifest) -> SamplerSettings:
    """What the loop needs to know of a bundle."""
    return SamplerSettings(
        width=manifest.width,
        height=manifest.height,
        num_proposals=manifest.num_proposals,
        embedding_dim=manifest.embedding_dim,
        box_scale=manifest.box_scale,
        timesteps=manifest.timesteps,
        score_threshold=manifest.score_threshold,
        nms_iou=manifest.nms_iou,
        score_thresholds=manifest.score_thresholds,
        embedding_scale=manifest.embedding_scale,
        num_timesteps=manifest.num_timesteps,
    )


def _engine(manifest: Manifest, folder: Path, backend: str, threads: int | None) -> Engine:
    if backend == "onnxruntime":
        return OnnxEngine(folder, threads)
    if backend == "onnxruntime-int8":
        _check_quantized(manifest, folder)
        return OnnxEngine(folder, threads, "int8")
    if backend == "tensorrt":
        from .tensorrt_engine import TensorRtEngine

        return TensorRtEngine(folder, manifest)
    from .openvino_engine import OpenVinoEngine

    return OpenVinoEngine(folder, threads, "bf16" if backend == "openvino-bf16" else "f32")


def _check_quantized(manifest: Manifest, folder: Path) -> None:
    for name in (graph_file("backbone", "int8"), graph_file("denoise_step", "int8")):
        # What the manifest does not list was never hashed, and is not served.
        if name not in manifest.files:
            raise BundleError(
                f"bundle must hold {name} for backend onnxruntime-int8, got {folder} without it; "
                f"make it with psdiff export {folder} --target int8 --frames FOLDER_OR_VIDEO"
            )


class OnnxEngine:
    """The two graphs of a bundle in onnxruntime, on the CPU."""

    def __init__(
        self, folder: Path, threads: int | None = None, precision: Precision | QuantizedForm = "fp32"
    ) -> None:
        """threads: by default one a core. Raises BundleError where a graph cannot be loaded."""
        backbone, denoise_step = (graph_file(part, precision) for part in ("backbone", "denoise_step"))
        self._backbone = _session(folder / backbone, BACKBONE_INPUTS, FEATURES, threads)
        self._denoise_step = _session(folder / denoise_step, STEP_INPUTS, StepOutput._fields, threads)

    def backbone(self, images: NDArray[np.uint8]) -> Features:
        """(B, H, W, 3) uint8 RGB canvases -> feature pyramid p2..p5."""
        return _run(self._backbone, FEATURES, {"image": images})

    def denoise_step(
        self,
        features: Features,
        boxes_t: Float32Array,
        emb_t: Float32Array,
        t: NDArray[np.int64],
        t_next: NDArray[np.int64],
    ) -> StepOutput:
        """Move (B, N, 4) boxes and (B, N, E) embeddings from timestep t (B,) to t_next (B,)."""
        inputs = dict(zip(STEP_INPUTS, [*features, boxes_t, emb_t, t, t_next], strict=True))
        return StepOutput(*_run(self._denoise_step, StepOutput._fields, inputs))


def _session(
    path: Path, inputs: Sequence[str], outputs: Sequence[str], threads: int | None
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    # Waiting threads sleep instead of spinning: decoders and encoders need the cores meanwhile. Measured with
    # two graphs and two threads on two cores that others use too: 190 instead of 640 ms a frame (K=2).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Without VNNI the quick kernel for unsigned times signed adds pairs in 16 bits, which overflow: the pyramid of
    # psdiff_mobile then has 11 dB of signal to error instead of 17. With VNNI it was not tried.
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3  # errors only; a warning a graph node helps no user
    try:
        session = ort.InferenceSession(
            path, options, providers=["CPUExecutionProvider"], disabled_optimizers=SLOW_FUSIONS
        )
    # onnxruntime's errors share no class below Exception; the path and its hash are known to be right.
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise BundleError(
            f"{path} must be a graph that onnxruntime {ort.__version__} can load, got: {reason}; "
            "update onnxruntime or export the bundle again"
        ) from None
    _check_names(path, "inputs", inputs, [node.name for node in session.get_inputs()])
    _check_names(path, "outputs", outputs, [node.name for node in session.get_outputs()])
    return session


def _run(
    session: ort.InferenceSession, outputs: Sequence[str], inputs: Mapping[str, NDArray[Any]]
) -> list[NDArray[Any]]:
    # The stubs allow for sparse tensors and lists; graphs with _check_names' outputs give arrays.
    return cast("list[NDArray[Any]]", session.run(outputs, dict(inputs)))


def _check_names(path: Path, what: str, wanted: Sequence[str], found: Sequence[str]) -> None:
    if set(wanted) != set(found):
        raise BundleError(
            f"{path} must have the {what} {', '.join(wanted)}, got {', '.join(found)}; export it again"
        )
