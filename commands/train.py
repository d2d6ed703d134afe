"""psdiff train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..cli import FAILED, UsageError, app, fail, reported_errors, usage

if TYPE_CHECKING:
    from rich.progress import Progress as Bars


class DataFormat(StrEnum):
    """What is learnt from: drawn frames, or a data set."""

    STREET = "street"
    CUHK_SYSU = "cuhk-sysu"
    PRW = "prw"
    POSETRACK21 = "posetrack21"


class Device(StrEnum):
    """What computes."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


# Above this share of the time, more loader workers are worth their memory.
LARGE_LOADER_SHARE = 0.05

# An empty line between two sentences starts a new line on the screen.
EPILOG = """
[bold]What is written[/bold]

model.safetensors, for psdiff export and evaluate; log.jsonl and tensorboard/ with the curves; recipe.yaml with every
setting; resume.pt, from which --resume goes on to the same weights as if nothing had stopped the run.

[bold]Examples[/bold]

The shipped model, on drawn frames and a CPU (hours; needs no data):

psdiff train --backbone-weights imagenet --out my-run

PRW with the embeddings of a teacher (psdiff teacher embed), on 4 GPUs; a step of the optimizer sees the batches of
all processes, so set accumulate to 1 in the recipe, which is for one GPU:

torchrun --nproc-per-node 4 -m psdiff train --recipe training/recipes/prw.yaml --data /data/prw --embeddings FILE.npz
--teacher my-teacher/teacher.safetensors --backbone-weights imagenet --out my-run

The network of the shipped model on a city that psdiff synth drew; its truth.npz stands for a teacher:

psdiff train --format prw --data city/ --embeddings city/truth.npz --out my-run

Go on after Ctrl-C or a power cut, with the same number of processes and the settings in my-run/recipe.yaml:

psdiff train --resume --out my-run
"""

# Headings of --help.
DATA = "What is learnt from (otherwise as the recipe says)"
START = "What training starts from"


@app.command(epilog=EPILOG)
@reported_errors()
def train(
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of settings. Default: the shipped model's; with --resume, the run's own."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("psdiff-train"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    device: Annotated[Device, typer.Option(help="auto takes the GPU where there is one.")] = Device.AUTO,
    data_format: Annotated[
        DataFormat | None, typer.Option("--format", help="street is drawn.", rich_help_panel=DATA)
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="ROOT", help="Folder of the data set.", rich_help_panel=DATA)
    ] = None,
    embeddings: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What psdiff teacher embed wrote, or the truth.npz of a synthetic city.",
            rich_help_panel=DATA,
        ),
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Refuse embeddings of any other teacher than this.", rich_help_panel=DATA
        ),
    ] = None,
    frames: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where drawn frames are kept, to share between runs. Default: --out.",
            rich_help_panel=DATA,
        ),
    ] = None,
    backbone_weights: Annotated[
        str | None,
        typer.Option(
            metavar="imagenet|FILE",
            help="Torchvision's ImageNet weights, or a .pth file with its names. Default: random weights.",
            rich_help_panel=START,
        ),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A checkpoint; its network takes the place of the recipe's preset.",
            rich_help_panel=START,
        ),
    ] = None,
) -> None:
    """Train on drawn frames or a data set; under torchrun, on several processes."""
    from ..training import processes
    from ..training.progress import Progress
    from ..training.recipe import load_recipe, with_data
    from ..training.train import NonFiniteLossError
    from ..training.train import train as run_training

    with usage():
        settings = load_recipe(recipe or _default_recipe(out, resume=resume))
        changes = {"format": data_format, "root": data, "embeddings": embeddings, "teacher": teacher}
        settings = with_data(settings, changes)
    throughputs: dict[int, str] = {}
    with _user_errors(), _bars(enabled=processes.is_first()) as bars:
        tasks = [
            bars.add_task("", total=1.0, stage=i + 1, loss=0.0, cosine=0.0, rate=0.0, waited=0.0, start=False)
            for i in range(len(settings.stages))
        ]

        def show(progress: Progress) -> None:
            task, rate, waited = tasks[progress.stage], progress.images_per_s, progress.loader_share
            throughputs[progress.stage] = _throughput(rate, waited, settings.loader_workers)
            if not bars.tasks[task].started:
                bars.start_task(task)
            bars.update(
                task,
                completed=progress.share,
                loss=progress.loss,
                cosine=progress.image_cosine,
                rate=rate,
                waited=waited,
            )

        try:
            checkpoint = run_training(
                settings,
                out,
                backbone_weights=backbone_weights,
                init=init,
                frames_folder=frames,
                resume=resume,
                device=_device(device),
                on_progress=show,
            )
        except NonFiniteLossError as error:
            fail(str(error), FAILED)
    if processes.is_first():
        for stage, throughput in throughputs.items():
            typer.echo(f"stage {stage + 1}: {throughput}")
        typer.echo(
            f"wrote {checkpoint}; next: {_next_command(checkpoint, settings.data.format, settings.data.root)}"
        )


def _default_recipe(out: Path, *, resume: bool) -> Path:
    from ..training.recipe import RECIPES
    from ..training.resume import RECIPE

    own = out / RECIPE
    return own if resume and own.is_file() else RECIPES / "psdiff_mobile.yaml"


def _device(device: Device) -> str:
    import torch

    if device is Device.CUDA and not torch.cuda.is_available():
        raise UsageError("--device must be cpu where PyTorch finds no GPU, got cuda")
    if device is Device.AUTO:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device.value


@contextmanager
def _user_errors() -> Iterator[None]:
    """Tell mistakes in arguments and files from bugs, which keep their traceback."""
    from ..training.datasets.schema import DatasetError
    from ..training.recipe import RecipeError
    from ..training.resume import ResumeError
    from ..training.start import StartError
    from ..training.teacher.cache import CacheError

    try:
        yield
    except (CacheError, DatasetError, RecipeError, ResumeError, StartError) as error:
        raise UsageError(str(error)) from None


def _bars(*, enabled: bool) -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("stage {task.fields[stage]}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.2f}  image cosine {task.fields[cosine]:.2f}"),
        TextColumn("{task.fields[rate]:.1f} images/s, {task.fields[waited]:.0%} loading"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not enabled)


def _throughput(images_per_s: float, loader_share: float, workers: int) -> str:
    line = f"{images_per_s:.1f} images/s, {loader_share:.0%} of the time spent waiting for images"
    if loader_share > LARGE_LOADER_SHARE:
        line += f"; loader_workers above {workers} in the recipe would help where cores are free"
    return line


def _next_command(checkpoint: Path, data_format: str, root: Path | None) -> str:
    export = f"psdiff export {checkpoint} my-bundle"
    if data_format == DataFormat.STREET:
        return export
    return f"psdiff evaluate {checkpoint} --format {data_format} --data {root}, {export}"
