"""psdiff synth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..cli import app, reported_errors, usage


@app.command()
@reported_errors()
def synth(
    out: Annotated[Path, typer.Argument(help="Folder for the clips and their truth.")],
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another street.")] = 7,
    people: Annotated[int, typer.Option(min=1)] = 10,
    cameras: Annotated[int, typer.Option(min=1)] = 2,
    seconds: Annotated[float, typer.Option(min=0.1)] = 20.0,
    fps: Annotated[float, typer.Option(min=0.1)] = 10.0,
    width: Annotated[int, typer.Option(min=64)] = 640,
    height: Annotated[int, typer.Option(min=64)] = 384,
) -> None:
    """Render clips of a synthetic street, one H.264 file a camera, with ground truth beside it."""
    from rich.console import Console
    from rich.progress import Progress

    from ..training.synthetic.clips import write_clip
    from ..training.synthetic.street import Street

    out.mkdir(parents=True, exist_ok=True)
    with usage(), Progress(console=Console(stderr=True)) as bars:
        street = Street(
            seed, num_people=people, cameras=cameras, width=width, height=height, duration_s=seconds
        )
        for camera in range(cameras):
            path = out / f"camera{camera + 1}.mp4"
            task = bars.add_task(path.name, total=round(seconds * fps))
            write_clip(street, camera, path, fps=fps, on_frame=lambda task=task: bars.advance(task))
            typer.echo(path)
