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
    int8 = "int8"
    trt = "trt"
    torch_tensorrt = "torch-tensorrt"


class Calibration(StrEnum):
    """export.calibration.Method, as the command line wants it."""

    entropy = "entropy"
    percentile = "percentile"
    minmax = "minmax"


class KeepFloat32(StrEnum):
    """export.int8.Keep, as the command line wants it."""

    auto = "auto"
    none = "none"


class GraphPrecision(StrEnum):
    """bundle.Precision, as the command line wants it, and int8, which engines are built in."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"


# Headings of --help.
INT8 = "With --target int8"
ENGINES = "With --target trt"


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
            help="Of the graphs beside fp32; repeat. Default: all. Of engines, int8 too: fp16 unless it is given."
        ),
    ] = None,
    target: Annotated[
        Target,
        typer.Option(
            help="onnx: the bundle alone. int8: its graphs in 8 bits, too. trt: TensorRT engines in plans. "
            "torch-tensorrt: modules for PyTorch there."
        ),
    ] = Target.onnx,
    frames: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER_OR_VIDEO",
            help="Pictures of the site, to find ranges on and, one in four, to judge them by.",
            rich_help_panel=INT8,
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        Calibration,
        typer.Option(
            help="What a range holds: all but one value in 10,000, most of the distribution, or all.",
            rich_help_panel=INT8,
        ),
    ] = Calibration.percentile,
    max_frames: Annotated[
        int, typer.Option(min=2, help="The most pictures, spread evenly.", rich_help_panel=INT8)
    ] = 64,
    keep_fp32: Annotated[
        KeepFloat32,
        typer.Option(
            help="auto: as many layers as it takes to pass psdiff verify. none: only those that must be.",
            rich_help_panel=INT8,
        ),
    ] = KeepFloat32.auto,
    sm: Annotated[
        int | None,
        typer.Option(
            help="GPU of the engines: 87 Orin, 89 L4, 90 H100 and H200. Default: that of this machine.",
            rich_help_panel=ENGINES,
        ),
    ] = None,
    plugins: Annotated[
        Path | None,
        typer.Option(
            help="libpsdiff_trt.so of make trt-plugin; without it TensorRT's own kernels.",
            rich_help_panel=ENGINES,
        ),
    ] = None,
    max_batch: Annotated[
        int, typer.Option(min=1, help="The most images at once.", rich_help_panel=ENGINES)
    ] = 8,
    max_proposals: Annotated[
        int, typer.Option(min=1, help="The most proposals an image.", rich_help_panel=ENGINES)
    ] = 500,
    unrolled: Annotated[
        str,
        typer.Option(
            metavar="K,...",
            help="Engines of K steps in one piece, for servers that cannot loop; not in int8.",
            rich_help_panel=ENGINES,
        ),
    ] = "1,2,4",
    workspace_mb: Annotated[
        int | None,
        typer.Option(min=1, help="The most scratch memory of an engine, in MB.", rich_help_panel=ENGINES),
    ] = None,
) -> None:
    """Turn a checkpoint into a bundle that psdiff run serves, and a bundle into engines for a GPU.

    A bundle is one file of weights and ONNX graphs that point into it: backbone and denoising step for
    runtimes that loop, and 1, 2, 4 and 8 steps in one piece for servers that cannot.

    psdiff export model.safetensors my-bundle

    psdiff export my-bundle --target int8 --frames lobby.mp4

    psdiff export my-bundle --target trt --sm 87
    """
    precisions = [each.value for each in precision or []]
    if "int8" in precisions and target is not Target.trt:
        raise UsageError(
            f"--precision int8 must go with --target trt, got {target}; graphs in 8 bits come from --target int8"
        )
    if (frames is not None) is not (target is Target.int8):
        raise UsageError(f"--frames and --target int8 must go together, got target {target}, frames {frames}")
    if "int8" in precisions and out is not None:
        raise UsageError(f"out must not be given with --precision int8, got {out}; quantise the bundle first")
    bundle = _written(source, out, model_id, precisions) if out is not None else source
    if target is Target.onnx and out is None:
        raise UsageError(f"out must be the folder of the bundle to write, got none for {source}")
    if frames is not None:
        _quantized(bundle, frames, max_frames, calibration.value, keep_fp32.value)
    if target in (Target.trt, Target.torch_tensorrt):
        _engines(
            target,
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


def _quantized(bundle: Path, frames: Path, max_frames: int, method: Any, keep_fp32: Any) -> None:  # noqa: ANN401
    from rich.console import Console

    from ..bundle import PRECISION_REPORT, load_manifest
    from ..export.int8 import QuantizationError, QuantizationOptions, quantize_bundle
    from ..export.precision_report import report_tables
    from ..runtime.detector import OnnxEngine, detector_of

    manifest = load_manifest(bundle)
    detector = detector_of(manifest, bundle)
    with _status() as tell:
        tell(f"reading {frames}")
        canvases = _canvases(frames, max_frames, manifest.width, manifest.height)
        try:
            report = quantize_bundle(
                bundle,
                detector,
                canvases,
                lambda folder: OnnxEngine(folder, None, "int8"),
                QuantizationOptions(method, keep_fp32),
                tell,
            )
        except QuantizationError as error:
            raise UsageError(str(error)) from None
    for table in report_tables(report):
        Console().print(table)
    chosen = sum(map(len, report.quantized.values()))
    typer.echo(
        f"wrote {chosen} of {report.num_candidates} layers in 8 bits; {bundle / PRECISION_REPORT} tells all"
    )
    if not report.holds:
        typer.echo(
            "warning: psdiff verify must pass before these graphs are served, and fails; "
            "--keep-fp32 auto keeps in float32 what it takes",
            err=True,
        )


def _canvases(frames: Path, most: int, width: int, height: int) -> list[Any]:
    from ..export.calibration import spread
    from ..models.preprocess import Letterbox
    from ..runtime.sources import open_source

    def letterboxed(picture: Any) -> Any:  # noqa: ANN401 - (h, w, 3) uint8 -> (height, width, 3) uint8
        return Letterbox(picture.shape[1], picture.shape[0], width, height).image(picture)

    with open_source(str(frames)) as source:
        return spread((letterboxed(frame.image) for frame in source), most)


def _engines(target: Target, bundle: Path, precisions: list[Any], sm: int | None, **options: Any) -> None:
    from ..export.engines import EngineOptions, build_engines, sm_of_this_machine
    from ..export.tensorrt_plan import EngineError

    build = build_engines
    for precision in precisions:
        with _status() as tell:
            try:
                if target is Target.torch_tensorrt:
                    build = _torch_tensorrt()
                gpu = sm_of_this_machine() if sm is None else sm
                folder = build(bundle, EngineOptions(gpu, precision, **options), tell)
            except EngineError as error:
                raise UsageError(str(error)) from None
        plans = [*folder.glob("*.plan"), *folder.glob("*.pt2")]
        typer.echo(
            f"wrote {folder}: {len(plans)} engines, {sum(p.stat().st_size for p in plans) / 1e6:.1f} MB"
        )


def _torch_tensorrt() -> Callable[..., Path]:
    """Before a GPU is looked for: what is not installed is the first thing to be told."""
    from ..export.torch_tensorrt_path import compile_modules, torch_tensorrt_module

    torch_tensorrt_module()
    return compile_modules


@contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    from rich.console import Console

    with Console(stderr=True).status("reading") as status:
        yield status.update
