"""The ranges of a bundle's tensors, from pictures that a user gives, by onnxruntime's calibrators.

The denoising step sees what it sees in service: the states of the diffusion, from noise to people, as the float32
loop walks through them. Legend: H, W canvas.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
from onnxruntime.quantization.calibrate import create_calibrator

from ..models.detections import Float32Array
from ..models.preprocess import seeded_noise
from ..models.sampling import (
    BACKBONE_INPUTS,
    STEP_INPUTS,
    Engine,
    Features,
    SamplerSettings,
    StepOutput,
    denoise,
)
from .qdq import ranged

T = TypeVar("T")

Method = Literal["entropy", "percentile", "minmax"]
"""How a range is found: where 8 bits keep most of the distribution, all but one value in 10,000, or all values."""

Recording = Mapping[str, Sequence[Mapping[str, NDArray[Any]]]]
"""backbone, denoise_step -> the inputs of each call that one picture took."""

# With its default, as many bins as 8 bits have, entropy has one range to choose from. Its time grows with the square.
_SETTINGS: Mapping[Method, tuple[CalibrationMethod, Mapping[str, Any]]] = {
    "entropy": (CalibrationMethod.Entropy, {"num_bins": 512, "num_quantized_bins": 128}),
    "percentile": (CalibrationMethod.Percentile, {"percentile": 99.99, "symmetric": False}),
    "minmax": (CalibrationMethod.MinMax, {}),
}


def spread(items: Iterable[T], most: int) -> list[T]:
    """At most `most` items, evenly spread over all of them, whose number need not be known."""
    kept: list[T] = []
    stride = 1
    for i, item in enumerate(items):
        if i % stride == 0:
            kept.append(item)
        if len(kept) > most:
            kept, stride = kept[::2], 2 * stride
    return kept


def record(
    engine: Engine, settings: SamplerSettings, canvas: NDArray[np.uint8], *, steps: int, seed: int
) -> Recording:
    """Walk through the K = steps of a picture, (H, W, 3), and keep what each graph was given."""
    recorder = _Recorder(engine)
    boxes_t, emb_t = seeded_noise(seed, settings.num_proposals, settings.embedding_dim)
    features = recorder.backbone(canvas[None])
    denoise(recorder, features, boxes_t[None], emb_t[None], settings.timesteps[steps])
    return recorder.calls


class _Recorder:
    """An engine that keeps its inputs."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.calls: dict[str, list[dict[str, NDArray[Any]]]] = {"backbone": [], "denoise_step": []}

    def backbone(self, images: NDArray[np.uint8]) -> Features:
        """As Engine.backbone."""
        self.calls["backbone"].append(dict(zip(BACKBONE_INPUTS, [images], strict=True)))
        return self._engine.backbone(images)

    def denoise_step(
        self,
        features: Features,
        boxes_t: Float32Array,
        emb_t: Float32Array,
        t: NDArray[np.int64],
        t_next: NDArray[np.int64],
    ) -> StepOutput:
        """As Engine.denoise_step."""
        values = [*features, boxes_t, emb_t, t, t_next]
        self.calls["denoise_step"].append(dict(zip(STEP_INPUTS, values, strict=True)))
        return self._engine.denoise_step(features, boxes_t, emb_t, t, t_next)


class _Calls(CalibrationDataReader):
    """The calls of one picture, as a calibrator asks for them."""

    def __init__(self, calls: Iterable[Mapping[str, NDArray[Any]]]) -> None:
        self._calls: Iterator[Mapping[str, NDArray[Any]]] = iter(calls)

    def get_next(self) -> dict[str, NDArray[Any]] | None:  # type: ignore[override]
        """The next inputs; None after the last."""
        call = next(self._calls, None)
        return None if call is None else dict(call)


def ranges_of(
    graphs: Mapping[str, onnx.ModelProto],
    recordings: Iterable[Recording],
    method: Method,
    on_picture: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Part -> the TensorsData of the tensors around its weighted nodes.

    graphs: self-contained, weights as initializers. on_picture is told how many pictures are done.
    """
    kind, settings = _SETTINGS[method]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        calibrators = {}
        for part, graph in graphs.items():
            path = Path(folder) / f"{part}.onnx"
            onnx.save(graph, path)
            calibrators[part] = create_calibrator(
                path,
                ranged(graph),
                augmented_model_path=str(Path(folder) / f"{part}.outputs.onnx"),
                calibrate_method=kind,
                extra_options=dict(settings),
            )
        for count, recording in enumerate(recordings, start=1):
            for part, calibrator in calibrators.items():
                # A picture at a time: the calibrator holds every tensor of all that it is given. Not a step at a
                # time: a histogram that begins with the small values of one t grows without end at another.
                calibrator.collect_data(_Calls(recording[part]))
            on_picture(count)
        return {part: calibrator.compute_data() for part, calibrator in calibrators.items()}
