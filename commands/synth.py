"""psdiff synth."""

from __future__ import annotations

import os
from enum import StrEnum
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..cli import app, reported_errors, usage

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

CLIP_PEOPLE = 10


class Format(StrEnum):
    """What can be written: clips, or one of the sets of training/city/sets.py, or all sets."""

    CLIPS = "clips"
    CUHK_SYSU = "cuhk-sysu"
    PRW = "prw"
    POSETRACK21 = "posetrack21"
    CROWDHUMAN = "crowdhuman"
    EUROCITY = "eurocity"
    MARKET1501 = "market1501"
    DUKEMTMC = "dukemtmc"
    CUHK03_NP = "cuhk03-np"
    CUHK03 = "cuhk03"
    MSMT17 = "msmt17"
    LUPERSON = "luperson"
    ALL = "all"


SETS = tuple(one for one in Format if one not in (Format.CLIPS, Format.ALL))

# An empty line between two sentences starts a new line on the screen.
EPILOG = """
[bold]What is written[/bold]

clips: cameraN.mp4, and cameraN.truth.json with boxes, people and visibility of every frame.

cuhk-sysu, prw, posetrack21: the files of the release, and truth.npz with the appearance of every person.

crowdhuman, eurocity: the files of the release; boxes only, nobody has a name.

market1501, dukemtmc, cuhk03-np, cuhk03, msmt17, luperson: crops of people; --frames counts crops.

all: each of these sets, in a folder of its name.

The same options give the same bytes, with any number of workers.

A set appears when it is complete. One that psdiff synth wrote before is replaced, other folders are refused.

[bold]Examples[/bold]

psdiff synth street/ --seconds 30 --cameras 3

psdiff synth data/cuhk --format cuhk-sysu --frames 4000 --people 1000

psdiff synth data/small --format all --frames 200 --width 320 --height 192 --seed 3
"""


# Headings of --help.
IN_CLIPS = "With --format clips"
IN_SETS = "With the other formats"


@app.command(epilog=EPILOG)
@reported_errors()
def synth(
    out: Annotated[Path, typer.Argument(help="Folder for what is written.")],
    data_format: Annotated[
        Format, typer.Option("--format", help="Clips of a street, or a data set in its published files.")
    ] = Format.CLIPS,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another street.")] = 7,
    people: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default="10 in clips; as many as fit the images in sets",
            help="People with a name; detection sets have none.",
        ),
    ] = None,
    width: Annotated[int, typer.Option(min=64, help="Of frames, in pixels.")] = 640,
    height: Annotated[int, typer.Option(min=64, help="Of frames, in pixels.")] = 384,
    cameras: Annotated[int, typer.Option(min=1, help="A file each.", rich_help_panel=IN_CLIPS)] = 2,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each clip.", rich_help_panel=IN_CLIPS)] = 20.0,
    fps: Annotated[float, typer.Option(min=0.1, help="Frames in a second.", rich_help_panel=IN_CLIPS)] = 10.0,
    frames: Annotated[
        int, typer.Option(min=4, help="Images of all splits together.", rich_help_panel=IN_SETS)
    ] = 1000,
    workers: Annotated[
        int | None,
        typer.Option(min=1, show_default="one a core", help="Processes that draw.", rich_help_panel=IN_SETS),
    ] = None,
) -> None:
    """Render a synthetic street with ground truth: clips of its cameras, or a data set in a published format."""
    size = {"width": width, "height": height}
    with usage(), _progress() as bars:
        if data_format is Format.CLIPS:
            _write_clips(
                out, bars, cameras=cameras, fps=fps, seconds=seconds, seed=seed, people=people, **size
            )
            return
        names = [one.value for one in SETS] if data_format is Format.ALL else [data_format.value]
        for name in names:
            folder = out / name if data_format is Format.ALL else out
            _write_set(name, folder, bars, images=frames, people=people, workers=workers, seed=seed, **size)
            typer.echo(folder)


def _progress() -> Progress:
    """Make a bar on stderr that tells the rate and the time that is left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    return Progress(*columns, console=Console(stderr=True))


def _show(bars: Progress, task: TaskID, done: int, total: int) -> None:
    speed = bars.tasks[task].speed
    bars.update(task, completed=done, total=total, rate=f"{speed:.0f} images/s" if speed else "")


def _write_clips(
    out: Path,
    bars: Progress,
    *,
    cameras: int,
    fps: float,
    seconds: float,
    seed: int,
    people: int | None,
    width: int,
    height: int,
) -> None:
    """Write a clip a camera, and print their paths."""
    from ..training.synthetic.clips import write_clip
    from ..training.synthetic.street import Street

    street = Street(
        seed,
        num_people=people or CLIP_PEOPLE,
        cameras=cameras,
        width=width,
        height=height,
        duration_s=seconds,
    )
    out.mkdir(parents=True, exist_ok=True)
    total = round(seconds * fps)
    for camera in range(cameras):
        path = out / f"camera{camera + 1}.mp4"
        task = bars.add_task(path.name, total=total, rate="")
        done = count(1)
        write_clip(
            street,
            camera,
            path,
            fps=fps,
            on_frame=lambda task=task, done=done: _show(bars, task, next(done), total),
        )
        typer.echo(path)


def _write_set(
    name: str,
    out: Path,
    bars: Progress,
    *,
    images: int,
    people: int | None,
    workers: int | None,
    seed: int,
    width: int,
    height: int,
) -> None:
    """Write one data set."""
    from ..training.city.sets import usual_people, write_set
    from ..training.city.writing import Plan

    task = bars.add_task(name, total=None, rate="")
    usual = usual_people(name, images)
    plan = Plan(
        images=images,
        people=people if people and usual else usual,
        seed=seed,
        width=width,
        height=height,
        workers=workers or os.cpu_count() or 1,
        report=lambda done, total: _show(bars, task, done, total),
    )
    write_set(name, out, plan)
