"""The command line: psdiff COMMAND, or python -m psdiff COMMAND.

Each command imports its part inside its function, so that running needs no training code and --help is quick.
"""

from __future__ import annotations

import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from .cli import FAILED, UsageError, app, reported_errors, usage

# Importing a command's module registers it.
from .commands import bench as bench
from .commands import config as config
from .commands import demo as demo
from .commands import doctor as doctor
from .commands import evaluate as evaluate
from .commands import export as export
from .commands import serve as serve
from .commands import soak as soak
from .commands import synth as synth
from .commands import teacher as teacher
from .commands import train as train
from .commands import triton_repo as triton_repo
from .commands import verify as verify

RUN_EXAMPLES = """
[bold]Examples[/bold]

psdiff run entrance.mp4

psdiff run entrance.mp4 lobby.mp4 --query person.jpg --save-video

psdiff run entrance.mp4 --query group.jpg --box 310,40,420,380 --steps 2

psdiff run rtsp://admin:password@10.0.0.11/stream1 photos/ --every 5

[bold]Output[/bold] in the folder --out; files of the same names from an earlier run are replaced:

events.jsonl   one CloudEvents line a detection

summary.json   what became of each source

hits.png       with --query: the best hits of every camera

CAMERA.mp4     with --save-video: the frames with their boxes

Ctrl-C ends a run in order: what was found so far is kept.
"""


@app.command(epilog=RUN_EXAMPLES)
@reported_errors()
def run(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Video files, images, folders of images, rtsp:// URLs.",
            show_default=False,
        ),
    ],
    query: Annotated[Path | None, typer.Option(help="An image of the person to find.")] = None,
    box: Annotated[
        str | None, typer.Option(metavar="X1,Y1,X2,Y2", help="Where the person is in --query, in pixels.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="K", help="Denoising steps: fewer are faster, more are better. Default: the bundle's."
        ),
    ] = None,
    every: Annotated[int, typer.Option(metavar="N", min=1, help="Look at each N-th frame only.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the output.")] = Path("psdiff-out"),
    save_video: Annotated[
        bool, typer.Option("--save-video", help="Write each source with its boxes.")
    ] = False,
    bundle: Annotated[
        Path | None, typer.Option(help="Folder of the model. Default: the one that comes with psdiff.")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="onnxruntime, onnxruntime-int8, openvino, openvino-bf16, tensorrt, triton.")
    ] = "onnxruntime",
    server: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="With --backend triton: its gRPC service.")
    ] = "localhost:8001",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: one a core.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Changes the noise of every frame.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout.")] = False,
) -> None:
    """Detect the people in videos and cameras, and find one of them by an image."""
    from rich.console import Console

    from .bundle import load_manifest
    from .runtime import console as terminal
    from .runtime.detector import shipped_bundle
    from .runtime.query import load_query
    from .runtime.run import run as run_pipeline
    from .runtime.sources import camera_names, open_source
    from .runtime.verified import open_proven

    # A service manager stops a program by SIGTERM: it ends the run in order, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    query_box = _parse_box(box, query)
    cameras = camera_names(sources)
    _check_output(out, cameras, [*map(Path, sources), *([query] if query else [])], save_video)
    folder = bundle or shipped_bundle()
    manifest = load_manifest(folder)
    steps = manifest.default_steps if steps is None else steps
    errors = Console(stderr=True)
    with ExitStack() as stack, terminal.warnings_on(errors):
        with usage():
            detector = open_proven(manifest, folder, backend, threads=threads, server=server)
            detector.detect([], steps)
        opened = [
            stack.enter_context(open_source(uri, camera=camera, every=every))
            for uri, camera in zip(sources, cameras, strict=True)
        ]
        person = load_query(detector, query, query_box, steps) if query else None
        on_progress = stack.enter_context(terminal.progress_of(opened, errors))
        summary = run_pipeline(
            opened,
            detector,
            manifest,
            out=out,
            steps=steps,
            query=person,
            save_video=save_video,
            seed=seed,
            on_progress=on_progress,
        )
    if summary.interrupted:
        typer.echo("interrupted: what was found so far is kept", err=True)
    if as_json:
        typer.echo(summary.model_dump_json(indent=2))
    else:
        terminal.print_result(summary, out)
    if any(source.status == "failed" for source in summary.sources):
        raise typer.Exit(FAILED)


def _parse_box(text: str | None, query: Path | None) -> tuple[float, float, float, float] | None:
    if text is None:
        return None
    if query is None:
        raise UsageError("--box must come with --query, got --box alone")
    try:
        x1, y1, x2, y2 = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--box must be x1,y1,x2,y2 in pixels, got {text}") from None
    return x1, y1, x2, y2


def _check_output(out: Path, cameras: list[str], inputs: list[Path], save_video: bool) -> None:
    from .runtime.run import output_paths

    if out.exists() and not out.is_dir():
        raise UsageError(f"--out must be a folder, got the file {out}")
    read = {path.resolve() for path in inputs}
    for path in output_paths(out, cameras, query=True, save_video=save_video):
        if path.resolve() in read:
            raise UsageError(
                f"--out must be a folder whose files are not read by this run, got {path} as input"
            )


if __name__ == "__main__":
    sys.exit(app())
