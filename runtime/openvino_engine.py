"""The two graphs of a bundle in OpenVINO, on x86 and ARM CPUs; in bfloat16 where the processor has it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import BACKBONE, DENOISE_STEP, BundleError
from ..models.detections import Float32Array
from ..models.sampling import BACKBONE_INPUTS, FEATURES, STEP_INPUTS, Features, StepOutput


class OpenVinoEngine:
    """Backbone and denoising step of a bundle, compiled for this CPU."""

    def __init__(self, folder: Path, threads: int | None = None, precision: str = "f32") -> None:
        """precision: f32, or bf16, which OpenVINO takes where the processor has it.

        threads: by default one a core. Raises BundleError where a graph cannot be compiled, and ValueError where
        openvino or onnx is not installed.
        """
        self._openvino, onnx = _modules()
        core = self._openvino.Core()
        config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            config["INFERENCE_NUM_THREADS"] = threads
        self._backbone, self._denoise_step = (
            _compiled(core, onnx, folder / name, config) for name in (BACKBONE, DENOISE_STEP)
        )

    def backbone(self, images: NDArray[np.uint8]) -> Features:
        """(B, H, W, 3) uint8 RGB canvases -> feature pyramid p2..p5."""
        return _run(self._backbone, FEATURES, dict(zip(BACKBONE_INPUTS, [images], strict=True)))

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


def _modules() -> tuple[ModuleType, ModuleType]:
    try:
        import onnx
        import openvino
    except ImportError as error:
        raise ValueError(
            f"backend openvino must have the packages openvino and onnx, got {error}; "
            "run pip install psdiff[openvino]"
        ) from None
    return openvino, onnx


def _compiled(core: Any, onnx: ModuleType, path: Path, config: dict[str, Any]) -> Any:  # noqa: ANN401
    """Compile a graph; OpenVINO knows no functions of a model, so they are written out first."""
    from onnx.inliner import inline_local_functions

    try:
        # With its weights: a graph from memory has no folder in which to look for them.
        graph = inline_local_functions(onnx.load(path))
        return core.compile_model(core.read_model(graph.SerializeToString()), "CPU", config)
    # OpenVINO raises RuntimeError for everything; onnx its own kinds. The path and its hash are known to be right.
    except Exception as error:
        reason = str(error).strip().splitlines()[-1]
        raise BundleError(
            f"{path} must be a graph that OpenVINO can compile, got: {reason}; "
            "update openvino or export the bundle again"
        ) from None


def _run(compiled: Any, outputs: Sequence[str], inputs: dict[str, Any]) -> list[NDArray[Any]]:  # noqa: ANN401
    results = compiled(inputs, share_inputs=True, share_outputs=False)
    return [results[name] for name in outputs]
