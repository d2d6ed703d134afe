"""psdiff demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..cli import UsageError, app, reported_errors


@app.command()
@reported_errors()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for clips, videos and hits.")] = Path("demo-out"),
    bundle: Annotated[
        Path | None, typer.Option(help="Folder of the model. Default: the one that comes with psdiff.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="K", help="Denoising steps. Default: the bundle's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Another seed, another street.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Length of the clips.")] = None,
) -> None:
    """Draw a street seen by two cameras and find a person of the first in the second."""
    from rich.console import Console

    from .. import demo as demonstration

    try:
        demonstration.run_demo(
            out,
            bundle=bundle,
            steps=steps,
            seed=demonstration.DEFAULT_SEED if seed is None else seed,
            duration_s=demonstration.DEFAULT_DURATION_S if seconds is None else seconds,
            console=Console(),
        )
    except demonstration.DemoError as error:
        raise UsageError(str(error)) from None
