"""psdiff triton-repo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..cli import UsageError, app, reported_errors
from .export import GraphPrecision


@app.command()
@reported_errors()
def triton_repo(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The model repository; versions that it has stay.")] = Path(
        "models"
    ),
    backend: Annotated[
        str, typer.Option(help="What the model psdiff computes with: a backend of psdiff run.")
    ] = "onnxruntime",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of an instance. Default: one a core.")
    ] = None,
    instances: Annotated[int, typer.Option(min=1, help="Of psdiff, side by side.")] = 1,
    max_batch: Annotated[int, typer.Option(min=1, help="The most images of a batch.")] = 8,
    queue_delay_ms: Annotated[
        float, typer.Option(min=0, help="How long an image waits for others to share its batch.")
    ] = 2.0,
    queue_size: Annotated[int, typer.Option(min=1, help="Requests that wait; one more is refused.")] = 64,
    queue_timeout_ms: Annotated[
        float, typer.Option(min=1, help="A request that has waited as long is refused.")
    ] = 1000.0,
    precision: Annotated[
        GraphPrecision, typer.Option(help="Of the engines that become psdiff_k1, psdiff_k2, ...")
    ] = GraphPrecision.fp16,
    version: Annotated[
        int | None, typer.Option(min=1, help="Of the models. Default: one more than the highest.")
    ] = None,
) -> None:
    """Lay out a bundle for Triton Inference Server: one request is a frame and K steps.

    The model psdiff takes K, seed, start and given boxes with each request. Engines that the bundle has
    (psdiff export --target trt) become psdiff_k1, psdiff_k2, ... beside it. The server's Python needs psdiff.

    psdiff triton-repo my-bundle --out models

    psdiff run entrance.mp4 --backend triton --bundle my-bundle
    """
    from ..export.triton_config import RepositoryError, RepositoryOptions
    from ..export.triton_repository import write_repository
    from ..runtime.backends import BACKENDS

    if backend not in BACKENDS:
        raise UsageError(f"backend must be one of {', '.join(BACKENDS)}, got {backend}")
    if precision.value == "int8":
        raise UsageError(
            "precision must be fp16, bf16 or fp32, got int8, which has no graphs of K steps in one piece"
        )
    try:
        options = RepositoryOptions(
            backend=backend,
            threads=threads,
            instances=instances,
            max_batch=max_batch,
            queue_delay_ms=queue_delay_ms,
            queue_size=queue_size,
            queue_timeout_ms=queue_timeout_ms,
            precision=precision.value,
            version=version,
        )
        written = write_repository(bundle, out, options)
    except RepositoryError as error:
        raise UsageError(str(error)) from None
    for folder in written:
        typer.echo(f"wrote {folder}")
    typer.echo(f"serve it: tritonserver --model-repository {out} --disable-auto-complete-config")
