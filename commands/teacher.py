"""psdiff teacher train and psdiff teacher embed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..cli import UsageError, app, reported_errors, usage

teacher_app = typer.Typer(no_args_is_help=True)
app.add_typer(
    teacher_app, name="teacher", help="Train a re-identification teacher, and describe people with it."
)

Root = Annotated[Path, typer.Argument(help="Folder of the data set's release.")]


@teacher_app.command()
@reported_errors()
def train(
    dataset: Annotated[
        str, typer.Argument(help="A person search or re-identification set, such as prw or market1501.")
    ],
    root: Root,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML file of the run. Default: the settings of HHCL.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoint and log.")] = Path("psdiff-teacher"),
    backbone_weights: Annotated[
        str | None,
        typer.Option(
            metavar="imagenet|FILE",
            help="Start the body from torchvision's ImageNet weights, or from a .pth file with its names.",
        ),
    ] = None,
    init: Annotated[Path | None, typer.Option(help="Go on from this teacher instead.")] = None,
) -> None:
    """Train on the true identities of a data set, on the GPU if there is one, and score it on the test people."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from ..models.reid_teacher import load_teacher, teacher_hash
    from ..training.teacher.crops import load_people
    from ..training.teacher.recipe import TeacherRecipe, load_teacher_recipe
    from ..training.teacher.train import TeacherProgress, train_teacher

    with usage():
        settings = load_teacher_recipe(recipe) if recipe else TeacherRecipe()
        data = load_people(dataset, root)
    columns = (
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.2f}  {task.fields[rate]:.0f} images/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("", total=settings.epochs * settings.iterations, epoch=1, loss=0.0, rate=0.0)

        def show(progress: TeacherProgress) -> None:
            done = progress.epoch * settings.iterations + progress.iteration
            rate = progress.images_per_s
            bars.update(task, completed=done, epoch=progress.epoch + 1, loss=progress.loss, rate=rate)

        with usage():
            checkpoint = train_teacher(
                settings,
                data,
                out,
                backbone_weights=backbone_weights,
                init=init,
                on_progress=show,
            )
    trained, notes = load_teacher(checkpoint)
    if "scores" in notes:
        scores = notes["scores"]
        typer.echo(f"mAP {scores['map']:.3f}  top-1 {scores['top1']:.3f}  ({scores['queries']} queries)")
    typer.echo(
        f"wrote {checkpoint}, teacher {teacher_hash(trained)}; next: psdiff teacher embed {checkpoint} DATASET ROOT"
    )


@teacher_app.command()
@reported_errors()
def embed(
    checkpoint: Annotated[Path, typer.Argument(help="A teacher that psdiff teacher train wrote.")],
    dataset: Annotated[str, typer.Argument(help="A person search set, such as cuhk-sysu or prw.")],
    root: Root,
    out: Annotated[Path, typer.Option(help="Folder for the embeddings.")] = Path("psdiff-embeddings"),
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 4,
) -> None:
    """Describe every person in the training images of a person search set once, for PSDiff to learn from."""
    from rich.console import Console
    from rich.progress import Progress

    from ..models.reid_teacher import load_teacher
    from ..training.datasets.schema import PersonSearchSet
    from ..training.teacher.cache import write_cache
    from ..training.teacher.crops import load_people
    from ..training.teacher.embedding import default_device

    with usage():
        teacher, _ = load_teacher(checkpoint)
        data = load_people(dataset, root)
    if not isinstance(data, PersonSearchSet):
        raise UsageError(f"dataset must be a person search set with whole frames, got {dataset}")
    teacher.to(default_device())
    boxes = sum(len(image.boxes_xyxy) for image in data.train)
    with usage(), Progress(console=Console(stderr=True)) as bars:
        task = bars.add_task("embedding", total=boxes)
        path = write_cache(
            out,
            teacher,
            data.train,
            dataset=data.name,
            workers=workers,
            on_progress=lambda done: bars.update(task, completed=done),
        )
    typer.echo(path)
