"""The model psdiff inside Triton Inference Server, by its Python backend: one request is K steps.

model.py of the repository that psdiff triton-repo writes imports TritonPythonModel from here, so psdiff must be
installed in the server's Python; with numpy < 2 where the server is so old that its Python backend was compiled
before NumPy 2 (24.10 was): it takes every array for one of no bytes. runtime.serving says what is asked.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from numpy.typing import NDArray

from ..bundle import load_manifest
from .detector import detector_of
from .serving import Arrays, CancelledError, Request, answer, read_request
from .triton_contract import BACKEND, BUNDLE, INPUTS, THREADS
from .verified import require_proof

Answer = dict[str, NDArray[Any]] | Exception


class TritonPythonModel:
    """What the Python backend calls: initialize once, execute for every batch, finalize once."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle of this version and let it prove itself; an error leaves the model unavailable."""
        # The server brings this module with it; nowhere else it exists.
        self._server = import_module("triton_python_backend_utils")
        config = json.loads(args["model_config"])
        parameters = {name: each["string_value"] for name, each in config["parameters"].items()}
        folder = Path(args["model_repository"]) / args["model_version"] / BUNDLE
        backend, threads = parameters[BACKEND], int(parameters.get(THREADS, 0)) or None
        manifest = load_manifest(folder)
        self._detector = detector_of(manifest, folder, backend, threads=threads)
        self._default_steps = manifest.default_steps
        require_proof(self._detector, manifest, folder, backend)
        self._metrics = Metrics(self._server, args["model_name"], args["model_version"])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request of a batch, by its people or by its error."""
        began = time.perf_counter()
        read = [self._read(request) for request in requests]
        answered = iter(answer(self._detector, [each for each in read if isinstance(each, Request)]))
        answers = [next(answered) if isinstance(each, Request) else each for each in read]
        self._metrics.count(read, answers, time.perf_counter() - began)
        return [
            self._response(each, request.requested_output_names())
            for each, request in zip(answers, requests, strict=True)
        ]

    def finalize(self) -> None:
        """Let go of the engine."""
        del self._detector

    def _read(self, request: Any) -> Request | ValueError:  # noqa: ANN401 - a type of the server
        tensors = {name: self._server.get_input_tensor_by_name(request, name) for name in INPUTS}
        inputs: Arrays = {name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None}
        try:
            return read_request(
                inputs,
                json.loads(request.parameters() or "{}"),
                self._detector.settings,
                self._default_steps,
                request.is_cancelled,
            )
        except ValueError as error:
            return error

    def _response(self, each: Answer, wanted: Sequence[str]) -> Any:  # noqa: ANN401 - a type of the server
        error = self._server.TritonError
        if isinstance(each, Exception):
            code = error.CANCELLED if isinstance(each, CancelledError) else error.INVALID_ARG
            return self._server.InferenceResponse(error=error(str(each), code))
        tensors = [self._server.Tensor(name, array) for name, array in each.items() if name in wanted]
        return self._server.InferenceResponse(tensors)


class Metrics:
    """Counters beside Triton's own, at /metrics."""

    def __init__(self, server: ModuleType, model: str, version: str) -> None:
        family = server.MetricFamily
        counters = {
            "images": "Images answered",
            "steps": "Denoising steps of the images answered",
            "people": "People found or described",
            "cancelled": "Requests that nobody waited for any more",
            "refused": "Requests that were wrong",
            "execute_seconds": "Seconds spent on batches",
        }
        # The families must live as long as their metrics.
        self._families = {
            name: family(name=f"psdiff_{name}_total", description=text, kind=family.COUNTER)
            for name, text in counters.items()
        }
        labels = {"model": model, "version": version}
        self._counters = {name: each.Metric(labels=labels) for name, each in self._families.items()}

    def count(
        self, requests: Sequence[Request | ValueError], answers: Sequence[Answer], seconds: float
    ) -> None:
        """Count a batch."""
        for request, each in zip(requests, answers, strict=True):
            if isinstance(request, Request) and isinstance(each, dict):
                self._add("images", len(request.canvases))
                self._add("steps", request.steps * len(request.canvases))
                self._add("people", int(each["num"].sum()))
            else:
                self._add("cancelled" if isinstance(each, CancelledError) else "refused", 1)
        self._add("execute_seconds", seconds)

    def _add(self, name: str, amount: float) -> None:
        self._counters[name].increment(amount)
