"""psdiff export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..cli import UsageError, app, reported_errors, usage


@app.command()
@reported_errors()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A .safetensors file written by psdiff train.")],
    out: Annotated[Path, typer.Argument(help="Folder of the bundle; an older bundle there is replaced.")],
    model_id: Annotated[
        str | None, typer.Option(help="Name of the model. Default: the folder's name.")
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            help="Precision of the graphs beside fp32: fp16, bf16, or fp32 for none; repeat. Default: both."
        ),
    ] = None,
) -> None:
    """Turn a checkpoint into a bundle that psdiff run serves.

    One file of weights, and graphs in ONNX that point into it: backbone and denoising step for runtimes that
    loop, and 1, 2, 4 and 8 steps in one piece for servers that cannot.
    """
    from rich.console import Console

    from ..bundle import PRECISIONS
    from ..export.export import ExportError, export_bundle

    wanted = tuple(name for name in PRECISIONS if precision is None or name in precision)
    if unknown := set(precision or ()) - set(PRECISIONS):
        raise UsageError(f"precision must be one of {', '.join(PRECISIONS)}, got {min(unknown)}")
    console = Console(stderr=True)
    with console.status("reading the checkpoint") as status, usage():
        try:
            manifest = export_bundle(
                checkpoint,
                out,
                model_id=model_id,
                precisions=wanted,
                on_step=lambda step: status.update(step),
            )
        except ExportError as error:
            raise UsageError(str(error)) from None
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    typer.echo(f"wrote {out}: {manifest.embedding_space}, {len(manifest.files) + 1} files, {size:.1f} MB")
