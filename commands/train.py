"""psdiff train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..cli import app, reported_errors, usage


@app.command()
@reported_errors()
def train(
    recipe: Annotated[
        Path | None, typer.Option(help="YAML file of the run. Default: that of the shipped model.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, log and drawn frames.")] = Path(
        "psdiff-train"
    ),
    backbone_weights: Annotated[
        str | None,
        typer.Option(
            metavar="imagenet|FILE",
            help="Start the backbone from torchvision's ImageNet weights, or from a .pth file with its names.",
        ),
    ] = None,
    init: Annotated[Path | None, typer.Option(help="Go on from this checkpoint instead.")] = None,
    frames: Annotated[
        Path | None, typer.Option(help="Folder of drawn frames, to share between runs.")
    ] = None,
) -> None:
    """Train on the synthetic street; under torchrun, on several processes."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from ..training import train as training
    from ..training.recipe import RECIPES, load_recipe

    with usage():
        settings = load_recipe(recipe or RECIPES / "psdiff_mobile.yaml")
    columns = (
        TextColumn("stage {task.fields[stage]}"),
        BarColumn(),
        TextColumn(
            "loss {task.fields[loss]:.2f}  cos {task.fields[cosine]:.2f}  {task.fields[rate]:.1f} images/s"
        ),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not training.is_first_rank()) as bars:
        tasks = [
            bars.add_task("", total=1.0, stage=i, loss=0.0, cosine=0.0, rate=0.0, start=False)
            for i in range(len(settings.stages))
        ]

        def show(progress: training.Progress) -> None:
            task = tasks[progress.stage]
            if not bars.tasks[task].started:
                bars.start_task(task)
            bars.update(
                task,
                completed=progress.share,
                loss=progress.loss,
                cosine=progress.image_cosine,
                rate=progress.images_per_s,
            )

        with usage():
            checkpoint = training.train(
                settings,
                out,
                backbone_weights=backbone_weights,
                init=init,
                frames_folder=frames,
                on_progress=show,
            )
    if training.is_first_rank():
        typer.echo(f"wrote {checkpoint}; next: psdiff export {checkpoint} my-bundle")
