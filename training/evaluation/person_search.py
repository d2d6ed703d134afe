"""Run a detector over a person search set and score it by the published protocols; no torch here.

Works on any Detector, so the same numbers come from PyTorch and from a bundle.
Legend: Q queries, n detections of one image, E embedding dimension.
"""

from __future__ import annotations

import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from ...models.detections import Detections, box_iou
from ...models.detector import Detector
from ...models.preprocess import Frame
from ...models.solvers import PLAIN, SamplerOptions
from ..datasets.schema import DatasetError, LabelledImage, PersonSearchSet, Query
from .detection import DetectionScores, evaluate_detection, scored_from
from .search import SCORE_THRESHOLD, RankBy, SearchScores, gallery_curve, search

QueryMode = Literal["gt", "iou"]

# Average precision needs the doubtful detections too, which the operating threshold would hide.
LOWEST_SCORE = 0.05


@dataclass(frozen=True)
class PersonSearchScores:
    """What a detector achieved on a person search set at one number of steps, and under which protocol."""

    steps: int
    query_mode: QueryMode
    score_threshold: float
    """Of the search; detection is scored from LOWEST_SCORE on."""
    rank_by: RankBy
    search: SearchScores
    other_galleries: Mapping[int, SearchScores]
    """The same queries in the other galleries that were asked for."""
    detection: DetectionScores
    ms_per_image: float
    """Wall-clock milliseconds of detection, without reading the image."""


def evaluate_person_search(
    detector: Detector,
    dataset: PersonSearchSet,
    steps: int,
    *,
    read_image: Callable[[LabelledImage], Frame],
    query_mode: QueryMode = "gt",
    score_threshold: float = SCORE_THRESHOLD,
    rank_by: RankBy = "cosine",
    other_galleries: Mapping[int, Sequence[Query]] | None = None,
    options: SamplerOptions = PLAIN,
    batch_size: int = 8,
    on_image: Callable[[], None] = lambda: None,
) -> PersonSearchScores:
    """Detect in every test image once, describe the queries, and score search and detection at K = steps.

    read_image: the RGB uint8 pixels of an image. query_mode: "gt" describes the query by its given box (OIM,
    NAE, SeqNet), "iou" takes the embedding of the detection that covers it best, at whatever score (AlignPS,
    PSTR); the two do not compare. score_threshold, rank_by: as in `search`. other_galleries: size -> the
    set's queries with other galleries, in the same order. options: how detection samples; given boxes are
    described with its solver and eta alone. on_image: called after each test image.
    The noise of an image is seeded by its name: order and batch size do not change the result.
    Raises ValueError on a bad argument, DatasetError where there is nothing to search for.
    """
    _check(dataset, query_mode, batch_size, other_galleries or {})
    found = detect_and_describe(
        detector,
        dataset,
        steps,
        read_image=read_image,
        query_mode=query_mode,
        options=options,
        batch_size=batch_size,
        on_image=on_image,
    )
    people, embeddings = found.detections, found.query_embeddings
    return PersonSearchScores(
        steps,
        query_mode,
        score_threshold,
        rank_by,
        search(people, dataset.queries, embeddings, score_threshold=score_threshold, rank_by=rank_by),
        gallery_curve(
            people, other_galleries or {}, embeddings, score_threshold=score_threshold, rank_by=rank_by
        ),
        evaluate_detection(people, dataset.test),
        1000 * found.seconds / len(dataset.test),
    )


class Found(NamedTuple):
    """What a detector saw in the test images of a set."""

    detections: list[Detections]
    """One per test image, from LOWEST_SCORE on."""
    query_embeddings: NDArray[np.float32]
    """(Q, E) unit rows; NaN for a query in whose image nothing was found (query mode "iou")."""
    seconds: float
    """Spent on detection."""


def detect_and_describe(
    detector: Detector,
    dataset: PersonSearchSet,
    steps: int,
    *,
    read_image: Callable[[LabelledImage], Frame],
    query_mode: QueryMode = "gt",
    options: SamplerOptions = PLAIN,
    batch_size: int = 8,
    on_image: Callable[[], None] = lambda: None,
) -> Found:
    """Read every test image once: detect the people in it and describe its queries."""
    eager = without_threshold(detector)
    pinned = SamplerOptions(solver=options.solver, eta=options.eta)
    queries_of = defaultdict(list)
    for number, query in enumerate(dataset.queries):
        queries_of[query.image].append(number)
    embeddings = np.full((len(dataset.queries), detector.settings.embedding_dim), np.nan, np.float32)
    detections, seconds = [], 0.0
    for start in range(0, len(dataset.test), batch_size):
        images = dataset.test[start : start + batch_size]
        frames, seeds = [read_image(image) for image in images], [image_seed(image) for image in images]
        began = time.perf_counter()
        found = eager.detect(frames, steps, seeds, options=options)
        seconds += time.perf_counter() - began
        for index, (frame, seed, people) in enumerate(zip(frames, seeds, found, strict=True), start):
            for number in queries_of[index]:
                box = dataset.queries[number].box_xyxy[None]
                if query_mode == "gt":
                    embeddings[number] = eager.embed(frame, box, steps, seed, options=pinned)[0]
                elif len(people):
                    embeddings[number] = people.embeddings[box_iou(people.boxes_xyxy, box)[:, 0].argmax()]
            detections.append(scored_from(LOWEST_SCORE, people))
            on_image()
    return Found(detections, embeddings, seconds)


def without_threshold(detector: Detector, score_threshold: float = 0.0) -> Detector:
    """Return the same detector with one low score threshold for every K."""
    settings = replace(detector.settings, score_threshold=score_threshold, score_thresholds={})
    return Detector(detector.engine, settings)


def image_seed(image: LabelledImage) -> int:
    """Return the seed of an image's noise: the CRC-32 of its name, the same on every machine."""
    return zlib.crc32(image.name.encode())


def _check(
    dataset: PersonSearchSet,
    query_mode: str,
    batch_size: int,
    other_galleries: Mapping[int, Sequence[Query]],
) -> None:
    if query_mode not in get_args(QueryMode):
        raise ValueError(f"query_mode must be one of {', '.join(get_args(QueryMode))}, got {query_mode}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be a whole number >= 1, got {batch_size}")
    if len(dataset.test) == 0 or len(dataset.queries) == 0:
        found = f"{len(dataset.test)} and {len(dataset.queries)}"
        raise DatasetError(f"{dataset.name} must have test images and queries, got {found}")
    who = [(query.image, query.box_xyxy.tolist()) for query in dataset.queries]
    for size, queries in other_galleries.items():
        if [(query.image, query.box_xyxy.tolist()) for query in queries] != who:
            raise ValueError(
                f"other_galleries[{size}] must hold the queries of {dataset.name} in the same order, "
                f"got others ({len(queries)} queries, wanted {len(who)})"
            )
