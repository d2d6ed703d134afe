"""Images per second of training: the parts of a step, the whole loop, and the loader alone.

One process measures both canvases of the shipped recipe with the recipe's threads (its run has one such process
a core), on frames of the street that were drawn before. Every quantity is measured once a round and the medians
count, so that a noisy machine hits all of them alike; the machine's own peaks are among them.
FLOPs are those of matrix products, convolutions and attention; pooling and element-wise work count as none.
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import cv2
import rich.progress
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

if __name__ == "__main__" and not __package__:
    __package__ = "psdiff.benchmarks"

from ..models.backbone import freeze_stages
from ..models.person_search import PSDiff
from ..training.dataset import Batch, CanvasFrames, FramePool, frame_batches
from ..training.noising import image_generator
from ..training.objective import denoising_objective
from ..training.progress import Progress
from ..training.recipe import RECIPES, Recipe, Stage, load_recipe
from ..training.start import resized, start
from ..training.train import ENDLESS, WARMUP_START, train
from .machine import describe_machine, measured_peaks, write_result

RECIPE = "psdiff_mobile"
WORKERS = (0, 1)

# In the order in which a step passes them.
PARTS = ("backbone", "noise", "denoiser", "matching and loss", "backward", "optimizer")


def main(
    *,
    frames: Annotated[
        int, typer.Option(min=4, help="Frames in the pool; each loader reads all of them.")
    ] = 48,
    iterations: Annotated[int, typer.Option(min=1, help="Timed steps of each canvas in a round.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, whose median counts.")] = 3,
    threads: Annotated[
        int | None, typer.Option(min=1, help="PyTorch's threads [default: the recipe's].")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where drawn frames are kept [default: nowhere].")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the JSON file in benchmarks/results.")] = "train",
) -> None:
    """Measure training on this machine; prints tables and writes benchmarks/results/<name>.json."""
    recipe = load_recipe(RECIPES / f"{RECIPE}.yaml")
    data = recipe.data.model_copy(update={"frames": frames})
    recipe = recipe.model_copy(update={"data": data, "threads": threads or recipe.threads})
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(recipe, folder or Path(temporary), rounds=rounds, iterations=iterations)
    path = write_result(name, result)
    for shown in (summary(result), split(result)):
        Console().print(shown)
    for row in result["rows"]:
        typer.echo(verdict(row, result["loader_workers"]))
    typer.echo(path)


def measure(recipe: Recipe, folder: Path, *, rounds: int, iterations: int) -> dict[str, Any]:
    """Everything about the stages of a recipe, as JSON values; frames are drawn into the folder first."""
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    # As in a worker. A pool of OpenCV's threads in this process would also not survive the fork of a worker, which
    # then waits for those threads for ever.
    cv2.setNumThreads(1)
    torch.manual_seed(recipe.seed)
    source = FramePool(folder, recipe.seed, recipe.data.frames)
    canvases = [Canvas(recipe, stage, source) for stage in recipe.stages]
    peaks: list[dict[str, float]] = []
    readings: list[list[dict[str, Any]]] = []
    for _ in rich.progress.track(range(rounds), "measuring", console=Console(stderr=True)):
        peaks.append(measured_peaks(repeats=3))
        readings.append([canvas.read(folder, iterations) for canvas in canvases])
    peak = {key: statistics.median(one[key] for one in peaks) for key in peaks[0]}
    rows = [
        canvas.row(list(own), peak) for canvas, own in zip(canvases, zip(*readings, strict=True), strict=True)
    ]
    return {
        "machine": describe_machine(),
        "peaks": peak,
        "preset": recipe.preset,
        "frames": recipe.data.frames,
        "rounds": rounds,
        "iterations": iterations,
        "loader_workers": recipe.loader_workers,
        "rows": rows,
    }


class MeteredStep:
    """A training step as training.train takes it, with a meter that is read between its parts."""

    def __init__(self, model: PSDiff, recipe: Recipe, stage: Stage) -> None:
        self.model, self.recipe = model.train(), recipe
        freeze_stages(model.backbone, recipe.frozen_stages)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # The rate of the first iteration: a few steps from random weights, and the cost is that of any rate.
        rate = WARMUP_START * stage.learning_rate
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=recipe.weight_decay)
        self.meter: Callable[[], float] = time.perf_counter
        self.readings: list[float] = []
        model.denoiser.register_forward_pre_hook(lambda *_: self._read())
        model.denoiser.register_forward_hook(lambda *_: self._read())

    def take(self, batch: Batch, meter: Callable[[], float] = time.perf_counter) -> list[float]:
        """Take one step; return by how much the meter went on in each of PARTS."""
        self.meter, self.readings = meter, [meter()]
        loss = self._loss(batch)
        loss.backward()
        self._read()
        nn.utils.clip_grad_norm_(self.parameters, self.recipe.max_gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._read()
        return [after - before for before, after in itertools.pairwise(self.readings)]

    def _loss(self, batch: Batch) -> Tensor:
        generators = [image_generator(self.recipe.seed, sample) for sample in batch.samples]
        features = self.model.backbone(batch.images)
        self._read()
        objective = denoising_objective(self.model.denoiser, features, batch.people, self.recipe, generators)
        self._read()
        return objective.loss.total

    def _read(self) -> None:
        self.readings.append(self.meter())


class Canvas:
    """One stage of the recipe: what is measured of it in a round, and the row of the result."""

    def __init__(self, recipe: Recipe, stage: Stage, source: FramePool) -> None:
        self.recipe, self.stage, self.source = recipe, stage, source
        model, _ = start(recipe, None, None)
        self.step = MeteredStep(
            resized(model, stage.width, stage.height, reference=model.config), recipe, stage
        )
        # One pass draws every frame of the pool, so that the loaders find all of them.
        self.batch_count = math.ceil(recipe.data.frames / stage.batch_size)
        self.batches = itertools.cycle(list(itertools.islice(self._load(0), self.batch_count)))
        self.flops = step_flops(self.step, next(self.batches))

    def read(self, folder: Path, iterations: int) -> dict[str, Any]:
        """One round: seconds of the parts of each step, rates of the loaders and of the whole loop."""
        self.step.take(next(self.batches))
        return {
            "seconds": [self.step.take(next(self.batches)) for _ in range(iterations)],
            "loader": [self._loader_rate(workers) for workers in WORKERS],
            "loop": end_to_end(self.recipe, self.stage, folder, iterations),
        }

    def row(self, readings: Sequence[dict[str, Any]], peaks: dict[str, float]) -> dict[str, Any]:
        """Medians over the rounds, shares, and what they are compared with."""
        steps = [seconds for reading in readings for seconds in reading["seconds"]]
        rate = self.stage.batch_size / statistics.median(map(sum, steps))
        gflop = sum(self.flops) / 1e9 / self.stage.batch_size
        loaders = [statistics.median(rates) for rates in zip(*(r["loader"] for r in readings), strict=True)]
        loop, waited = (
            statistics.median(values) for values in zip(*(r["loop"] for r in readings), strict=True)
        )
        return {
            "input": [self.stage.height, self.stage.width],
            "batch_size": self.stage.batch_size,
            "images_per_s": rate,
            "gflop_per_image": gflop,
            "gflops": gflop * rate,
            "conv_peak_share": gflop * rate / peaks["conv_gflops"],
            "matmul_peak_share": gflop * rate / peaks["matmul_gflops"],
            "parts": self._parts(steps),
            "end_to_end": {"images_per_s": loop, "loader_share": waited},
            "loader": [
                {"workers": workers, "images_per_s": own, "ratio": own / rate}
                for workers, own in zip(WORKERS, loaders, strict=True)
            ],
        }

    def _parts(self, steps: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
        seconds = [statistics.median(part) for part in zip(*steps, strict=True)]
        return [
            {"part": part, "ms": 1000 * own, "share": own / sum(seconds), "gflops": flops / 1e9 / own}
            for part, own, flops in zip(PARTS, seconds, self.flops, strict=True)
        ]

    def _loader_rate(self, workers: int) -> float:
        """Images/s from the first batch to the last: starting a worker is no part of it."""
        batches = self._load(workers)
        next(batches)
        began = time.perf_counter()
        images = sum(len(batch.samples) for batch in itertools.islice(batches, self.batch_count))
        return images / (time.perf_counter() - began)

    def _load(self, workers: int) -> Iterator[Batch]:
        frames = CanvasFrames(
            self.source,
            range(ENDLESS),
            seed=self.recipe.seed,
            width=self.stage.width,
            height=self.stage.height,
        )
        return frame_batches(frames, batch_size=self.stage.batch_size, workers=workers)


def end_to_end(recipe: Recipe, stage: Stage, folder: Path, iterations: int) -> tuple[float, float]:
    """Images/s of training.train and its share of waiting for the loader, both from its own Progress.

    The first iteration, in which the loader starts, comes before what is counted.
    """
    alone = stage.model_copy(update={"iterations": iterations + 1, "minutes": None})
    seen: list[Progress] = []
    with tempfile.TemporaryDirectory() as out:
        train(
            recipe.model_copy(update={"stages": (alone,)}),
            Path(out),
            frames_folder=folder,
            on_progress=seen.append,
        )
    images = [own.iteration * stage.batch_size for own in (seen[0], seen[-1])]
    seconds = [count / own.images_per_s for count, own in zip(images, (seen[0], seen[-1]), strict=True)]
    waited = [own.loader_share * time_s for own, time_s in zip((seen[0], seen[-1]), seconds, strict=True)]
    duration = seconds[1] - seconds[0]
    return (images[1] - images[0]) / duration, (waited[1] - waited[0]) / duration


def step_flops(step: MeteredStep, batch: Batch) -> list[float]:
    """FLOPs of each of PARTS; a multiplication and its addition are two."""
    mapping = {torch.ops.aten.convolution_backward: conv_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        return step.take(batch, counter.get_total_flops)


def conv_backward_flops(
    grad_shape: list[int], input_shape: list[int], weight_shape: list[int], *args: Any, **_: Any
) -> int:
    """FLOPs of a convolution's two gradients, each as much as the convolution.

    PyTorch's own count takes the weight's gradient of a grouped convolution for that of a full one, which is
    `groups` times too much: most of the total for MobileNetV2's depthwise layers.
    """
    output_mask: Sequence[bool] = args[-1]
    return sum(output_mask[:2]) * conv_flop_count(input_shape, weight_shape, grad_shape)


def summary(result: dict[str, Any]) -> Table:
    """Rates and what they are compared with, a column for each canvas."""
    rows, peaks, threads = result["rows"], result["peaks"], result["machine"]["threads"]
    title = (
        f"{threads} thread(s), conv {peaks['conv_gflops']:.0f}, matmul {peaks['matmul_gflops']:.0f} GFLOP/s"
    )
    table = Table(result["preset"], title=title, title_justify="left")
    for row in rows:
        table.add_column(_size(row), justify="right")
    table.add_row("batch", *(f"{row['batch_size']}" for row in rows))
    table.add_row("steps, images/s", *(f"{row['images_per_s']:.2f}" for row in rows))
    table.add_row("whole loop, images/s", *(f"{row['end_to_end']['images_per_s']:.2f}" for row in rows))
    table.add_row("  waiting for images", *(f"{row['end_to_end']['loader_share']:.1%}" for row in rows))
    for number, workers in enumerate(WORKERS):
        rates = (row["loader"][number]["images_per_s"] for row in rows)
        table.add_row(f"loader, {workers} workers, images/s", *(f"{rate:.1f}" for rate in rates))
    table.add_row("GFLOP/image", *(f"{row['gflop_per_image']:.2f}" for row in rows))
    table.add_row("GFLOP/s", *(f"{row['gflops']:.1f}" for row in rows))
    table.add_row("  of the conv peak", *(f"{row['conv_peak_share']:.0%}" for row in rows))
    table.add_row("  of the matmul peak", *(f"{row['matmul_peak_share']:.0%}" for row in rows))
    return table


def split(result: dict[str, Any]) -> Table:
    """Where the time of a step goes, a column for each canvas."""
    table = Table("part", title="ms of a step, share, GFLOP/s", title_justify="left")
    for row in result["rows"]:
        table.add_column(_size(row), justify="right")
    for number, part in enumerate(PARTS):
        parts = [row["parts"][number] for row in result["rows"]]
        cells = (f"{own['ms']:.0f} {own['share']:6.1%} {own['gflops']:6.1f}" for own in parts)
        table.add_row(part, *cells)
    return table


def verdict(row: dict[str, Any], workers: int) -> str:
    """Whether the loader keeps up, with as many workers as the recipe has."""
    ratio = next(own["ratio"] for own in row["loader"] if own["workers"] == workers)
    is_slower = "is not" if ratio > 1 else "is"
    return f"{_size(row)}: the loader {is_slower} the bottleneck; it makes {ratio:.1f} images for each one trained on"


def _size(row: dict[str, Any]) -> str:
    height, width = row["input"]
    return f"{width}x{height}"


if __name__ == "__main__":
    typer.run(main)
