"""psdiff verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..cli import REFUSED, app, reported_errors, usage


@app.command()
@reported_errors()
def verify(
    bundle: Annotated[
        Path | None, typer.Argument(help="Folder of the bundle. Default: the one that comes with psdiff.")
    ] = None,
    backend: Annotated[str, typer.Option(help="onnxruntime, openvino or openvino-bf16.")] = "onnxruntime",
    cosine: Annotated[
        float, typer.Option(min=0, max=1, help="Smallest cosine of embeddings: 0.999, in int8 0.99.")
    ] = 0.999,
    as_json: Annotated[bool, typer.Option("--json", help="Print the proof as JSON.")] = False,
) -> None:
    """Prove that a bundle computes on this machine what PyTorch computed, to half a pixel.

    psdiff run does the same at the first start, and refuses a bundle that fails. Exit code 3: it fails.
    """
    from rich.console import Console
    from rich.table import Table

    from ..bundle import load_manifest
    from ..models.verification import Tolerance
    from ..runtime.detector import detector_of, shipped_bundle
    from ..runtime.verified import verify as prove

    folder = bundle or shipped_bundle()
    manifest = load_manifest(folder)
    with usage():
        detector = detector_of(manifest, folder, backend)
    proof = prove(detector, manifest, folder, backend, Tolerance(cosine=cosine))
    if as_json:
        typer.echo(proof.model_dump_json(indent=2))
    else:
        table = Table(
            title=f"{manifest.model_id} by {proof.backend} against PyTorch float32, last step of each K"
        )
        for column in (
            "K",
            "the same",
            "largest box difference",
            "smallest cosine",
            "largest score difference",
        ):
            table.add_column(column, justify="right")
        for each in proof.comparisons:
            numbers = (f"{each.box_px:.4f} px", f"{each.cosine:.6f}", f"{each.score:.5f}")
            table.add_row(str(each.steps), f"{each.matched:.1%}", *numbers)
        Console().print(table)
    for fault in proof.faults:
        typer.echo(f"error: {fault}", err=True)
    if proof.faults:
        raise typer.Exit(REFUSED)
