"""A Detector behind Triton Inference Server: frames are laid on the canvas here, K steps are run there."""

from __future__ import annotations

import logging
import queue
import random
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import MANIFEST, BundleError, file_sha256
from ..models.detections import Detections, Float32Array
from ..models.detector import Canvas, canvas_of, check_boxes, timesteps_of
from ..models.preprocess import Frame
from ..models.sampling import SamplerSettings
from .triton_contract import INTERACTIVE, MANIFEST_SHA256, MODEL, OUTPUTS, STREAM
from .triton_images import SharedImages

# Waits between tries, in seconds: doubled each time, and shortened by chance so that clients do not come in step.
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 2.0

# A server that comes back is to be seen at once: gRPC itself would wait up to two minutes.
CHANNEL = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
]

logger = logging.getLogger(__name__)


class ServerError(Exception):
    """The server cannot be reached, is too slow, or failed."""


class ServerBusyError(ServerError):
    """The server's queue is full, or the request waited there for too long: drop the frame."""


class TritonDetector:
    """The people in frames, as the model psdiff of a Triton server finds them; for one thread at a time.

    Requests carry no state, so one that did not reach the server, or whose server went away, is sent again. One
    that a full queue refused is not, unless waits_when_busy: frames of a camera are better dropped.
    """

    def __init__(
        self,
        server: str,
        settings: SamplerSettings,
        folder: Path,
        *,
        deadline_s: float = 10.0,
        patience_s: float = 30.0,
        waits_when_busy: bool = False,
        shared_memory: bool | None = None,
    ) -> None:
        """Connect, and compare the server's bundle with the one in folder.

        server: HOST:PORT of its gRPC service. deadline_s: for one request, waiting in its queue included.
        patience_s: how long to try while the server is not there, or busy. shared_memory: hand images over in
        memory that both see; by default where the server is on this machine and allows it.
        Raises ServerError (not there, not ready), BundleError (it serves another bundle), ValueError (tritonclient
        not installed).
        """
        self._grpc, self._error = _client_library()
        self._server = server
        self._deadline_s = deadline_s
        self._patience_s = patience_s
        self._passing = (_GoneError, ServerBusyError) if waits_when_busy else (_GoneError,)
        self.settings = settings
        self._client = self._grpc.InferenceServerClient(server, channel_args=CHANNEL)
        self._images = SharedImages(
            self._client, self._error, _is_local(server) if shared_memory is None else shared_memory
        )
        try:
            self._retrying(partial(self._check_bundle, folder))
        except BaseException:
            self.close()
            raise

    def detect(
        self, frames: Sequence[Frame], steps: int = 4, seeds: Sequence[int] | None = None
    ) -> list[Detections]:
        """Find the people in each frame, as Detector.detect does; the server joins requests to batches.

        Raises ValueError on a bad argument, ServerError, and ServerBusyError where the server refused a frame.
        """
        timesteps_of(self.settings, steps)
        seeds = [0] * len(frames) if seeds is None else seeds
        if len(seeds) != len(frames):
            raise ValueError(f"seeds must be one per frame ({len(frames)}), got {len(seeds)}")
        canvases = [canvas_of(frame, self.settings, f"frames[{i}]") for i, frame in enumerate(frames)]
        if not canvases:
            return []
        parameters = [{"steps": steps, "seed": seed} for seed in seeds]
        results = self._retrying(partial(self._infer, canvases, parameters, {}, STREAM))
        return [self._detections(result) for result in results]

    def embed(
        self, frame: Frame, boxes_xyxy: NDArray[np.floating], steps: int = 4, seed: int = 0
    ) -> Float32Array:
        """Describe the people in given boxes, as Detector.embed does. Raises as detect."""
        timesteps_of(self.settings, steps)
        canvas = canvas_of(frame, self.settings)
        boxes = check_boxes(boxes_xyxy, canvas.letterbox.frame_width, canvas.letterbox.frame_height)
        if len(boxes) == 0:
            return np.zeros((0, self.settings.embedding_dim), np.float32)
        parameters, inputs = {"steps": steps, "seed": seed}, {"given_boxes": boxes[None]}
        [result] = self._retrying(partial(self._infer, [canvas], [parameters], inputs, INTERACTIVE))
        return self._detections(result).embeddings

    def close(self) -> None:
        """Give shared memory back and end the connection; a second call does nothing."""
        self._images.close()
        self._client.close()

    def _check_bundle(self, folder: Path) -> None:
        """Raise BundleError unless the server has the bundle in folder; the library's error if it is not there."""
        if not self._client.is_model_ready(MODEL, client_timeout=self._deadline_s):
            raise self._error(f"model {MODEL} is not ready", status="StatusCode.UNAVAILABLE")
        config = self._client.get_model_config(MODEL, client_timeout=self._deadline_s).config
        served, own = config.parameters[MANIFEST_SHA256].string_value, file_sha256(folder / MANIFEST)
        if served != own:
            raise BundleError(
                f"bundle must be the one that {self._server} serves, with a manifest of SHA-256 {served[:12]}..., "
                f"got {own[:12]}... in {folder}; give the same --bundle, or run psdiff triton-repo again"
            )

    def _retrying(self, call: partial[Any]) -> Any:  # noqa: ANN401 - whatever call returns
        """Call until the server is there, patience_s long."""
        wait_s, end = FIRST_WAIT_S, time.monotonic() + self._patience_s
        while True:
            try:
                return call()
            except self._error as error:
                told = self._told(error)
                if not isinstance(told, self._passing) or time.monotonic() + wait_s > end:
                    raise told from None
                logger.info("%s: %s; trying again", self._server, error.message())
                if isinstance(told, _GoneError):
                    self._images.forget()
            time.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _infer(
        self,
        canvases: Sequence[Canvas],
        parameters: Sequence[Mapping[str, int]],
        inputs: Mapping[str, NDArray[Any]],
        priority: int,
    ) -> list[Any]:
        """Send one request a canvas, all at once. Raises the first error, after leaving the others."""
        answers: queue.SimpleQueue[tuple[int, Any, Any]] = queue.SimpleQueue()
        images = self._images.inputs(self._grpc, [canvas.image[None] for canvas in canvases])
        calls = []
        for i, (canvas, image) in enumerate(zip(canvases, images, strict=True)):
            size = np.array([[canvas.letterbox.frame_width, canvas.letterbox.frame_height]], np.int32)
            others = [
                self._input(name, array) for name, array in ({"frame_size": size} | dict(inputs)).items()
            ]
            calls.append(
                self._client.async_infer(
                    MODEL,
                    [image, *others],
                    lambda result, error, i=i: answers.put((i, result, error)),
                    outputs=[
                        self._grpc.InferRequestedOutput(name) for name in OUTPUTS if name != "similarity"
                    ],
                    priority=priority,
                    timeout=round(self._deadline_s * 1e6),
                    client_timeout=self._deadline_s,
                    parameters=dict(parameters[i]),
                )
            )
        results: dict[int, Any] = {}
        for _ in calls:
            i, result, error = answers.get()
            if error is not None:
                for call in calls:
                    call.cancel()
                raise error
            results[i] = result
        return [results[i] for i in range(len(canvases))]

    def _input(self, name: str, array: NDArray[Any]) -> Any:  # noqa: ANN401 - a type of the library
        kind = {"f": "FP32", "i": "INT32"}[array.dtype.kind]
        tensor = self._grpc.InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        return tensor

    def _detections(self, result: Any) -> Detections:  # noqa: ANN401 - a type of the library
        try:
            num = int(result.as_numpy("num")[0, 0])
            parts = [result.as_numpy(name)[0, :num] for name in ("boxes_xyxy", "scores", "embeddings")]
        except (ValueError, TypeError, IndexError) as error:
            raise ServerError(
                f"answer of {self._server} must hold people, got one that cannot be read: {error}; a server from "
                "before NumPy 2 needs numpy < 2 beside psdiff"
            ) from None
        return Detections(*(np.ascontiguousarray(part) for part in parts))

    def _told(self, error: Any) -> Exception:  # noqa: ANN401 - the library's exception
        """The library's error as ours."""
        status, message = str(error.status()), str(error.message())
        place = f"server {self._server}"
        if "maximum queue size" in message or "Request timeout expired" in message:
            return ServerBusyError(f"{place} must have room in its queue, got: {message}; send fewer frames")
        if status.endswith("UNAVAILABLE") or "shared memory region" in message:
            return _GoneError(
                f"{place} must serve the model {MODEL}, got: {message}; is tritonserver running?"
            )
        if status.endswith("DEADLINE_EXCEEDED"):
            return ServerError(f"{place} must answer within {self._deadline_s:g} s, got no answer")
        if status.endswith("INVALID_ARGUMENT"):
            return ValueError(f"{place}: {message}")
        return ServerError(f"{place} must answer, got: {message} ({status})")


class _GoneError(ServerError):
    """The server is not there now; it may be later."""


def _client_library() -> tuple[ModuleType, Any]:
    try:
        import tritonclient.grpc as grpc
        from tritonclient.utils import InferenceServerException
    except ImportError as error:
        raise ValueError(
            f"backend triton must have the package tritonclient, got {error}; run pip install psdiff[triton]"
        ) from None
    return grpc, InferenceServerException


def _is_local(server: str) -> bool:
    return server.rpartition(":")[0] in ("localhost", "127.0.0.1", "[::1]")
