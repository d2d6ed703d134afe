"""psdiff verify."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..cli import REFUSED, UsageError, app, reported_errors, usage
from .evaluate import DataFormat

# Points of AP50 and top-1 that a backend may be away from float32.
LARGEST_CHANGE, LARGEST_CHANGE_INT8 = 0.2, 0.5


@app.command()
@reported_errors()
def verify(
    bundle: Annotated[
        Path | None, typer.Argument(help="Folder of the bundle. Default: the one that comes with psdiff.")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="onnxruntime, onnxruntime-int8, openvino, openvino-bf16, tensorrt.")
    ] = "onnxruntime",
    cosine: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Smallest cosine of embeddings. Default: 0.999, in int8 0.99.",
            show_default=False,
        ),
    ] = None,
    labelled: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Labelled images: AP50 and top-1 may change by 0.2 points, in int8 by 0.5.",
            show_default=False,
        ),
    ] = None,
    data_format: Annotated[
        DataFormat, typer.Option("--format", help="Of --labelled; clips that are missing are drawn.")
    ] = DataFormat.CLIPS,
    streets: Annotated[int, typer.Option(min=1, help="With --format clips: how many held-out streets.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print the proof as JSON.")] = False,
) -> None:
    """Prove that a bundle computes on this machine what PyTorch computed, to half a pixel.

    psdiff run does the same at the first start, and refuses a bundle that fails. Exit code 3: it fails.

    psdiff verify my-bundle --backend onnxruntime-int8 --labelled clips
    """
    from dataclasses import replace

    from rich.console import Console

    from ..bundle import load_manifest
    from ..runtime.detector import detector_of, shipped_bundle
    from ..runtime.verified import tolerance_of
    from ..runtime.verified import verify as prove

    if labelled is not None and labelled.exists() and not labelled.is_dir():
        raise UsageError(f"--labelled must be a folder, got the file {labelled}")
    folder = bundle or shipped_bundle()
    manifest = load_manifest(folder)
    with usage():
        detector = detector_of(manifest, folder, backend)
    tolerance = tolerance_of(backend)
    if cosine is not None:
        tolerance = replace(tolerance, cosine=cosine)
    proof = prove(detector, manifest, folder, backend, tolerance)
    change = labelled and _change(folder, manifest, detector, backend, labelled, data_format, streets)
    if as_json:
        typer.echo(
            json.dumps(
                proof.model_dump(mode="json") | ({"change": asdict(change)} if change else {}), indent=2
            )
        )
    else:
        Console().print(_table(proof))
        if change:
            Console().print(change.table())
    faults = [*proof.faults, *(change.faults if change else [])]
    for fault in faults:
        typer.echo(f"error: {fault}", err=True)
    if faults:
        raise typer.Exit(REFUSED)


def _table(proof: Any) -> Any:  # noqa: ANN401 - a Proof -> a rich Table, imported in the function only
    from rich.table import Table

    table = Table(title=f"{proof.model_id} by {proof.backend} against PyTorch float32, last step of each K")
    for column in ("K", "the same", "largest box difference", "smallest cosine", "largest score difference"):
        table.add_column(column, justify="right")
    for each in proof.comparisons:
        numbers = (f"{each.box_px:.4f} px", f"{each.cosine:.6f}", f"{each.score:.5f}")
        table.add_row(str(each.steps), f"{each.matched:.1%}", *numbers)
    return table


def _change(
    folder: Path,
    manifest: Any,  # noqa: ANN401
    detector: Any,  # noqa: ANN401
    backend: str,
    labelled: Path,
    data_format: DataFormat,
    streets: int,
) -> Any:  # noqa: ANN401 - a Change, imported in the function only
    from rich.console import Console
    from rich.progress import Progress

    from ..runtime.backends import INT8_BACKENDS
    from ..runtime.detector import detector_of
    from ..training.datasets.schema import DatasetError
    from ..training.evaluation.change import change_on_clips, change_on_data_set

    pair = detector_of(manifest, folder), detector
    bound = LARGEST_CHANGE_INT8 if backend in INT8_BACKENDS else LARGEST_CHANGE
    with Progress(console=Console(stderr=True), transient=True) as bars:

        def tick(name: str, total: int) -> Any:  # noqa: ANN401
            task = bars.add_task(name, total=total)
            return lambda: bars.advance(task)

        rest = {"steps": manifest.default_steps, "bound": bound, "tick": tick}
        if data_format is DataFormat.CLIPS:
            return change_on_clips(labelled, streets, pair, **rest)
        try:
            with usage():
                return change_on_data_set(labelled, data_format.value, pair, **rest)
        except DatasetError as error:
            raise UsageError(str(error)) from None
