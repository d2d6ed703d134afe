"""psdiff export."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..cli import UsageError, app, reported_errors, usage


class Target(StrEnum):
    """For what graphs are written."""

    onnx = "onnx"
    trt = "trt"


class GraphPrecision(StrEnum):
    """bundle.Precision, as the command line wants it."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


@app.command()
@reported_errors()
def export(
    source: Annotated[
        Path,
        typer.Argument(help="A .safetensors file written by psdiff train, or a bundle.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Argument(help="Folder of the bundle; an older bundle there is replaced.", show_default=False),
    ] = None,
    model_id: Annotated[
        str | None, typer.Option(help="Name of the model. Default: the folder's name.")
    ] = None,
    precision: Annotated[
        list[GraphPrecision] | None,
        typer.Option(
            help="Of the graphs beside fp32; repeat. Default: all. Of engines: fp16 unless it is given."
        ),
    ] = None,
    target: Annotated[
        Target,
        typer.Option(help="onnx: the bundle alone. trt: TensorRT engines in its folder plans, too."),
    ] = Target.onnx,
    sm: Annotated[
        int | None,
        typer.Option(
            help="GPU of the engines: 87 Orin, 89 L4, 90 H100 and H200. Default: that of this machine."
        ),
    ] = None,
    plugins: Annotated[
        Path | None,
        typer.Option(help="libpsdiff_trt.so of make trt-plugin; without it TensorRT's own kernels."),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="The most images at once.")] = 8,
    max_proposals: Annotated[int, typer.Option(min=1, help="The most proposals an image.")] = 500,
    unrolled: Annotated[
        str,
        typer.Option(metavar="K,...", help="Engines of K steps in one piece, for servers that cannot loop."),
    ] = "1,2,4",
    workspace_mb: Annotated[
        int | None, typer.Option(min=1, help="The most scratch memory of an engine, in MB.")
    ] = None,
) -> None:
    """Turn a checkpoint into a bundle that psdiff run serves, and a bundle into engines for a GPU.

    A bundle is one file of weights and ONNX graphs that point into it: backbone and denoising step for
    runtimes that loop, and 1, 2, 4 and 8 steps in one piece for servers that cannot.

    psdiff export model.safetensors my-bundle

    psdiff export my-bundle --target trt --sm 87
    """
    precisions = [each.value for each in precision or []]
    bundle = _written(source, out, model_id, precisions) if out is not None else source
    if target is Target.onnx and out is None:
        raise UsageError(f"out must be the folder of the bundle to write, got none for {source}")
    if target is Target.trt:
        _engines(
            bundle,
            precisions or ["fp16"],
            sm,
            plugin_library=plugins,
            max_batch=max_batch,
            max_proposals=max_proposals,
            unrolled=_numbers(unrolled),
            workspace_bytes=workspace_mb and workspace_mb * 1_000_000,
        )


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part in ("1", "2", "4", "8") for part in parts):
        raise UsageError(f"unrolled must be some of 1,2,4,8, got {text}")
    return [int(part) for part in parts]


def _written(checkpoint: Path, out: Path, model_id: str | None, precisions: list[Any]) -> Path:
    from ..bundle import PRECISIONS
    from ..export.export import ExportError, export_bundle

    with _status() as tell, usage():
        try:
            manifest = export_bundle(
                checkpoint, out, model_id=model_id, precisions=precisions or PRECISIONS, on_step=tell
            )
        except ExportError as error:
            raise UsageError(str(error)) from None
    size = sum(path.stat().st_size for path in out.iterdir() if path.is_file()) / 1e6
    typer.echo(f"wrote {out}: {manifest.embedding_space}, {len(manifest.files) + 1} files, {size:.1f} MB")
    return out


def _engines(bundle: Path, precisions: list[Any], sm: int | None, **options: Any) -> None:
    from ..export.engines import EngineOptions, build_engines, sm_of_this_machine
    from ..export.tensorrt_plan import EngineError

    for precision in precisions:
        with _status() as tell:
            try:
                gpu = sm_of_this_machine() if sm is None else sm
                folder = build_engines(bundle, EngineOptions(gpu, precision, **options), tell)
            except EngineError as error:
                raise UsageError(str(error)) from None
        plans = list(folder.glob("*.plan"))
        typer.echo(
            f"wrote {folder}: {len(plans)} engines, {sum(p.stat().st_size for p in plans) / 1e6:.1f} MB"
        )


@contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    from rich.console import Console

    with Console(stderr=True).status("reading") as status:
        yield status.update
