"""What a server of psdiff is asked and answers: requests of arrays in, people out, several requests as one batch.

The contract is the same whatever carries the arrays. Legend: B images of one request, H, W canvas, N proposals,
E embedding dimension, n given boxes, M the most people in one image of the request.

inputs      image        u8  (B, H, W, 3)  RGB, laid on the canvas: models.detector.canvas_of
            frame_size   i32 (B, 2)        optional: width, height of the frame; boxes come in its pixels,
                                           without it in those of the canvas
            boxes_t      f32 (B, N, 4)     optional, together: where the diffusion starts, in signal space,
            emb_t        f32 (B, N, E)     at the first timestep of the grid; without them noise from the seed
            given_boxes  f32 (B, n, 4)     optional: describe the people in these boxes, find nobody else
            query        f32 (B, E)        optional: unit embedding of the person asked for
parameters  steps        K; the bundle's own number without it
            seed         of the noise of every image; 0 without it
outputs     num          i32 (B, 1)        people in each image; the rows behind them are zero
            boxes_xyxy   f32 (B, M, 4)     frame pixels, best score first; given boxes in their own order
            scores       f32 (B, M)        in [0, 1]; of a given box 1
            embeddings   f32 (B, M, E)     unit rows
            similarity   f32 (B, M)        with query alone: cosine times score, by which to rank
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..models.detections import Detections, Float32Array
from ..models.detector import PROPOSALS_PER_QUERY, Canvas, Detector, Start, timesteps_of
from ..models.preprocess import Letterbox
from ..models.sampling import SamplerSettings

Arrays = Mapping[str, NDArray[Any]]

# An image may bring more proposals than the model's own number; this bounds what a request can cost.
MOST_PROPOSALS = 500
MOST_GIVEN_BOXES = MOST_PROPOSALS // PROPOSALS_PER_QUERY

LARGEST_SEED = 2**63 - 1


class CancelledError(Exception):
    """Who asked does not wait for the answer any more."""


@dataclass(frozen=True, eq=False)
class Request:
    """One checked request."""

    canvases: Sequence[Canvas]
    steps: int
    seed: int
    start: Start | None
    given_boxes: Float32Array | None
    """(B, n, 4) frame pixels."""
    query: Float32Array | None
    """(B, E)."""
    is_cancelled: Callable[[], bool]


def read_request(
    inputs: Arrays,
    parameters: Mapping[str, Any],
    settings: SamplerSettings,
    default_steps: int,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> Request:
    """Check what was sent. inputs holds only what is there. Raises ValueError that names what is wrong."""
    unknown = sorted(set(parameters) - {"steps", "seed"})
    if unknown:
        raise ValueError(f"parameters must be steps and seed, got {', '.join(unknown)}")
    steps = _whole("steps", parameters.get("steps", default_steps), 1, max(settings.timesteps))
    timesteps_of(settings, steps)
    canvas_shape = (settings.height, settings.width, 3)
    image = _array(inputs, "image", np.uint8, (None, *canvas_shape))
    if image is None:
        raise ValueError(
            f"image must be sent, uint8 (B, {', '.join(map(str, canvas_shape))}), got no such input"
        )
    sizes = _array(inputs, "frame_size", np.int32, (len(image), 2))
    start = _start(inputs, len(image), settings)
    given = _array(inputs, "given_boxes", np.float32, (len(image), None, 4))
    if given is not None and start is not None:
        raise ValueError("given_boxes must come without boxes_t and emb_t, got all three")
    if given is not None and not 1 <= given.shape[1] <= MOST_GIVEN_BOXES:
        raise ValueError(f"given_boxes must be 1 to {MOST_GIVEN_BOXES} an image, got {given.shape[1]}")
    return Request(
        canvases=list(map(Canvas, image, _letterboxes(len(image), sizes, settings))),
        steps=steps,
        seed=_whole("seed", parameters.get("seed", 0), 0, LARGEST_SEED),
        start=start,
        given_boxes=given,
        query=_array(inputs, "query", np.float32, (len(image), settings.embedding_dim)),
        is_cancelled=is_cancelled,
    )


def answer(detector: Detector, requests: Sequence[Request]) -> list[dict[str, NDArray[Any]] | Exception]:
    """Answer requests, those of the same K as one batch. A request that fails has its error as the answer.

    Between two steps a batch is left when nobody waits for any of it: CancelledError.
    """
    answers: dict[int, dict[str, NDArray[Any]] | Exception] = {}
    for members in _batches(requests):
        batch = [requests[i] for i in members]

        def leave_if_nobody_waits(_: object, batch: Sequence[Request] = batch) -> None:
            if all(request.is_cancelled() for request in batch):
                raise CancelledError("every request of the batch was cancelled")

        try:
            leave_if_nobody_waits(None)
            people = _people(detector, batch, leave_if_nobody_waits)
        except (CancelledError, ValueError) as error:
            answers |= dict.fromkeys(members, error)
            continue
        for i, request in zip(members, batch, strict=True):
            own = list(itertools.islice(people, len(request.canvases)))
            cancelled = request.is_cancelled()
            answers[i] = CancelledError("cancelled") if cancelled else _outputs(own, request)
    return [answers[i] for i in range(len(requests))]


def _batches(requests: Sequence[Request]) -> Iterator[list[int]]:
    """Which requests go together: those of one K and one number of proposals; each with given boxes alone."""
    together: dict[tuple[int, int | None], list[int]] = {}
    for i, request in enumerate(requests):
        if request.given_boxes is not None:
            yield [i]
            continue
        proposals = None if request.start is None else request.start.boxes_t.shape[1]
        together.setdefault((request.steps, proposals), []).append(i)
    yield from together.values()


def _people(
    detector: Detector, batch: Sequence[Request], after_step: Callable[[object], None]
) -> Iterator[Detections]:
    [steps] = {request.steps for request in batch}
    if batch[0].given_boxes is not None:
        [request] = batch
        return iter(list(_described(detector, request, after_step)))
    canvases = [canvas for request in batch for canvas in request.canvases]
    seeds = [request.seed for request in batch for _ in request.canvases]
    starts = [request.start for request in batch if request.start is not None]
    start = Start(*map(np.concatenate, zip(*starts, strict=True))) if starts else None
    return iter(detector.detect_canvases(canvases, steps, seeds, start=start, after_step=after_step))


def _described(
    detector: Detector, request: Request, after_step: Callable[[object], None]
) -> Iterator[Detections]:
    assert request.given_boxes is not None
    for canvas, boxes in zip(request.canvases, request.given_boxes, strict=True):
        embeddings = detector.embed_canvas(canvas, boxes, request.steps, request.seed, after_step=after_step)
        yield Detections(boxes, np.ones(len(boxes), np.float32), embeddings)


def _outputs(people: Sequence[Detections], request: Request) -> dict[str, NDArray[Any]]:
    # At least one row: a tensor without elements is an error to some clients.
    rows = max(1, *(len(found) for found in people))
    outputs = {
        "num": np.array([[len(found)] for found in people], np.int32),
        "boxes_xyxy": _padded([found.boxes_xyxy for found in people], rows),
        "scores": _padded([found.scores for found in people], rows),
        "embeddings": _padded([found.embeddings for found in people], rows),
    }
    if request.query is not None:
        similarity = [found.similarity(query) for found, query in zip(people, request.query, strict=True)]
        outputs["similarity"] = _padded(similarity, rows)
    return outputs


def _padded(parts: Sequence[Float32Array], rows: int) -> Float32Array:
    padded = np.zeros((len(parts), rows, *parts[0].shape[1:]), np.float32)
    for i, part in enumerate(parts):
        padded[i, : len(part)] = part
    return padded


def _letterboxes(
    count: int, sizes: NDArray[np.int32] | None, settings: SamplerSettings
) -> Iterator[Letterbox]:
    canvas = settings.width, settings.height
    for width, height in [canvas] * count if sizes is None else sizes.tolist():
        if width < 1 or height < 1:
            raise ValueError(f"frame_size must be width, height >= 1, got {width}, {height}")
        yield Letterbox(width, height, *canvas)


def _start(inputs: Arrays, images: int, settings: SamplerSettings) -> Start | None:
    boxes_t = _array(inputs, "boxes_t", np.float32, (images, None, 4))
    emb_t = _array(inputs, "emb_t", np.float32, (images, None, settings.embedding_dim))
    if boxes_t is None and emb_t is None:
        return None
    if boxes_t is None or emb_t is None or boxes_t.shape[1] != emb_t.shape[1]:
        raise ValueError(
            f"boxes_t and emb_t must come together, for the same proposals, got {_shape(boxes_t)} and {_shape(emb_t)}"
        )
    if not 1 <= boxes_t.shape[1] <= MOST_PROPOSALS:
        raise ValueError(f"boxes_t must be 1 to {MOST_PROPOSALS} an image, got {boxes_t.shape[1]}")
    return Start(boxes_t, emb_t)


def _shape(array: NDArray[Any] | None) -> str:
    return "none" if array is None else str(array.shape)


def _array(inputs: Arrays, name: str, kind: type, shape: tuple[int | None, ...]) -> NDArray[Any] | None:
    """The input of that name, None where it was not sent; None in shape is any size."""
    array = inputs.get(name)
    if array is None:
        return None
    fits = array.ndim == len(shape) and all(
        want in (None, got) for want, got in zip(shape, array.shape, strict=True)
    )
    if array.dtype != kind or not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must be {np.dtype(kind)} ({wanted}), got {array.dtype} {array.shape}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(
            f"{name} must be finite, got {np.count_nonzero(~np.isfinite(array))} values that are not"
        )
    return array


def _whole(name: str, value: object, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, got {value!r}")
    return value
