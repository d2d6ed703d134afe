"""The study: which of the paper's claims hold on the synthetic city, with a small model, two seeds each.

python benchmarks/study.py run, then python benchmarks/study.py report. A run of one variant and one seed takes
minutes on one core and leaves a JSON file in the work folder: an interrupted study goes on where it stopped.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

if __name__ == "__main__" and not __package__:
    __package__ = "psdiff.benchmarks"

from ..models.detector import Detector
from ..models.person_search import PSDiff
from ..models.sampling import sampling_timesteps
from ..models.solvers import PLAIN, SamplerOptions
from ..training.city.sets import write_set
from ..training.city.writing import Plan
from ..training.datasets.images import read_image
from ..training.datasets.prw import load_prw
from ..training.datasets.schema import LabelledImage, PersonSearchSet
from ..training.evaluation.person_search import evaluate_person_search
from ..training.matcher import People
from ..training.recipe import Recipe
from ..training.teacher.cache import truth_cache
from . import study_report
from .study_model import (
    HEIGHT,
    PROJECTION_FRAMES,
    WIDTH,
    Frames,
    canvas_of,
    frozen_backbone,
    load_features,
    save_features,
    study_config,
    study_detector,
    train_denoiser,
)
from .study_variants import (
    BASE,
    BASE_RECIPE,
    PLAIN_SAMPLING,
    SAMPLINGS,
    SEEDS,
    STEPS,
    Sampling,
    Variant,
    variants,
)

CITY_SEED, CITY_IMAGES, CITY_PEOPLE = 11, 5000, 500
TEST_IMAGES, QUERIES = 240, 120

# A dozen samplers at every K are compared on fewer.
SAMPLING_IMAGES, SAMPLING_QUERIES = 120, 60

# Every variant sees the same 6,000 images, whatever the load of the machine.
ITERATIONS, BATCH_SIZE, LEARNING_RATE, WARMUP = 1500, 4, 2e-3, 100

app = typer.Typer(help=__doc__, no_args_is_help=True)
Work = Annotated[Path, typer.Option(help="Folder of the city, the features and the runs.")]


@app.command()
def run(
    work: Work = Path("psdiff-study"),
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time, one core each.")] = os.cpu_count() or 1,
    only: Annotated[str, typer.Option(metavar="NAME,...", help="These variants alone.")] = "",
) -> None:
    """Draw the city, compute features, and train and score every variant that has no result yet."""
    console = Console(stderr=True)
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as bars:
        prepare(work, bars)
        wanted = [variant for variant in variants() if not only or variant.name in only.split(",")]
        # The base first: what everything else is compared with.
        jobs = sorted(
            ((variant, seed) for seed in SEEDS for variant in wanted), key=lambda job: job[0].name != BASE
        )
        task = bars.add_task("runs", total=len(jobs))
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            running = [pool.submit(run_variant, work, variant, seed) for variant, seed in jobs]
            for finished in as_completed(running):
                bars.console.print(finished.result())
                bars.advance(task)


@app.command()
def report(work: Work = Path("psdiff-study")) -> None:
    """Write benchmarks/results/study.json, docs/study.md and its plots from the runs."""
    for path in study_report.write(work / "runs"):
        typer.echo(path)


def prepare(work: Path, bars: Progress) -> None:
    """Draw the city and compute the features of its training frames, where they are not there yet."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "city").exists():
        task = bars.add_task("drawing the city", total=CITY_IMAGES)
        plan = Plan(
            CITY_IMAGES,
            CITY_PEOPLE,
            seed=CITY_SEED,
            width=WIDTH,
            height=HEIGHT,
            workers=os.cpu_count() or 1,
            report=lambda done, total: bars.update(task, completed=done, total=total),
        )
        write_set("prw", work / "city", plan)
    if not (work / "features" / "p5.npy").is_file():
        images = load_prw(work / "city").train
        task = bars.add_task("features", total=len(images))
        backbone = frozen_backbone(
            work / "projections.npz", lambda: _canvases(images[:: len(images) // PROJECTION_FRAMES])
        )
        save_features(backbone, _canvases(images), work / "features", lambda: bars.advance(task))


def _canvases(images: Sequence[LabelledImage]) -> NDArray[np.uint8]:
    return np.stack([canvas_of(read_image(image))[1] for image in images])


def run_variant(work: Path, variant: Variant, seed: int) -> str:
    """Train and score one variant with one seed, unless its result is there; returns a line about it."""
    path = work / "runs" / f"{variant.name}-{seed}.json"
    if path.is_file():
        return f"{path.stem}: already there"
    path.parent.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    dataset = load_prw(work / "city")
    config = study_config(variant.network)
    settings = BASE_RECIPE | variant.recipe | {"seed": seed, "stages": [_stage()]}
    backbone = frozen_backbone(work / "projections.npz", lambda: np.zeros((0, HEIGHT, WIDTH, 3), np.uint8))
    frames = Frames(load_features(work / "features"), _people(work, dataset))
    model, curve = train_denoiser(backbone, frames, config, Recipe.model_validate(settings))
    test = first_images(dataset, TEST_IMAGES, QUERIES)
    memory: dict[int, list[torch.Tensor]] = {}
    scores = {str(steps): score(study_detector(model, memory), test, steps) for steps in STEPS}
    result: dict[str, Any] = {
        "variant": variant.name,
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in model.denoiser.parameters()),
        "curve": curve,
        "scores": scores,
    }
    if variant.name == BASE:
        smaller = first_images(dataset, SAMPLING_IMAGES, SAMPLING_QUERIES)
        sampled = [_sampled(model, memory, smaller, sampling) for sampling in (PLAIN_SAMPLING, *SAMPLINGS)]
        names = [sampling.name for sampling in (PLAIN_SAMPLING, *SAMPLINGS)]
        result["samplings"] = dict(zip(names, sampled, strict=True))
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
    four = scores["4"]
    return f"{path.stem}: K = 4 mAP {four['map']:.3f} top-1 {four['top1']:.3f} AP50 {four['ap50']:.3f}"


def _stage() -> dict[str, Any]:
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "batch_size": BATCH_SIZE,
        "iterations": ITERATIONS,
        "learning_rate": LEARNING_RATE,
        "warmup_iterations": WARMUP,
    }


def _people(work: Path, dataset: PersonSearchSet) -> list[People]:
    cache = truth_cache(work / "city" / "truth.npz", dataset.train)
    return [
        # Drawn at the size of the canvas: pixels of a frame are pixels of the canvas.
        People(
            torch.from_numpy(image.boxes_xyxy) / torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT]),
            torch.from_numpy(cache.embeddings(image)),
        )
        for image in dataset.train
    ]


def first_images(dataset: PersonSearchSet, num_images: int, num_queries: int) -> PersonSearchSet:
    """The first test images, and the first queries among them whose person is seen again among them."""
    queries = []
    for query in dataset.queries:
        truth = {image: boxes for image, boxes in query.truth.items() if image < num_images}
        if query.image < num_images and truth:
            queries.append(replace(query, truth=truth, gallery=query.gallery[query.gallery < num_images]))
    return replace(dataset, test=dataset.test[:num_images], queries=queries[:num_queries])


def score(
    detector: Detector, dataset: PersonSearchSet, steps: int, options: SamplerOptions = PLAIN
) -> dict[str, float]:
    """Search by the regular PRW protocol and detection, without a score threshold: CWS ranks instead.

    Scores of a model trained for minutes are low, and a threshold would compare calibrations.
    """
    found = evaluate_person_search(
        detector, dataset, steps, read_image=read_image, score_threshold=0.05, rank_by="cws", options=options
    )
    return {
        "map": found.search.map,
        "top1": found.search.top1,
        "ap50": found.detection.curve.ap,
        "recall": found.detection.curve.recall,
        "ms_per_image": found.ms_per_image,
    }


def _sampled(
    model: PSDiff, memory: dict[int, list[torch.Tensor]], dataset: PersonSearchSet, sampling: Sampling
) -> dict[str, dict[str, float]]:
    detector = study_detector(model, memory)
    settings = detector.settings
    if sampling.grid_power is not None:
        grids = {
            steps: sampling_timesteps(steps, model.config.num_timesteps, sampling.grid_power)
            for steps in settings.timesteps
        }
        settings = replace(settings, timesteps=grids)
    if sampling.num_proposals is not None:
        settings = replace(settings, num_proposals=sampling.num_proposals)
    detector = Detector(detector.engine, settings)
    return {str(steps): score(detector, dataset, steps, sampling.options) for steps in STEPS}


if __name__ == "__main__":
    app()
