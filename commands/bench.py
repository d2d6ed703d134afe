"""psdiff bench."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..cli import UsageError, app, reported_errors, usage


@app.command()
@reported_errors()
def bench(
    bundle: Annotated[
        Path | None, typer.Argument(help="Folder of the bundle. Default: the one that comes with psdiff.")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="onnxruntime, onnxruntime-int8, openvino, openvino-bf16, tensorrt.")
    ] = "onnxruntime",
    steps: Annotated[str, typer.Option(metavar="K,...", help="Numbers of steps.")] = "1,2,4,8",
    batch: Annotated[int, typer.Option(min=1, help="Images a call.")] = 1,
    frame: Annotated[str, typer.Option(metavar="WxH", help="Size of the frames.")] = "1920x1080",
    seconds: Annotated[float, typer.Option(min=0.1, help="How long each K is measured.")] = 5.0,
    cameras: Annotated[
        str | None,
        typer.Option(
            metavar="NxFPS", help="Open loop: as many cameras, which do not wait; 16x5 for example."
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: one a core.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Write K -> ms into the manifest.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Measure how long a bundle takes on this machine, stage by stage, or under the load of cameras.

    psdiff bench my-bundle --steps 1,2,4 --record

    psdiff bench my-bundle --steps 2 --cameras 4x5
    """
    import numpy as np
    from rich.console import Console
    from rich.progress import track

    from ..bundle import load_manifest
    from ..runtime.detector import backend_version, detector_of, shipped_bundle
    from ..runtime.latency import closed_loop, open_loop, record_latencies
    from ..runtime.verified import machine

    width, height = (int(side) for side in _pair(frame, "frame", "WxH, 1920x1080 for example"))
    load = _pair(cameras, "cameras", "NxFPS, 16x5 for example") if cameras else None
    if record and load:
        raise UsageError("--record must stand without --cameras: the manifest holds what one call takes")
    folder = bundle or shipped_bundle()
    manifest = load_manifest(folder)
    with usage():
        wanted = [int(part) for part in steps.split(",")]
        detector = detector_of(manifest, folder, backend, threads=threads)
        for each in wanted:
            detector.detect([], each)
    picture = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    closed, opened = [], []
    for each in track(wanted, "measuring", console=Console(stderr=True), transient=True):
        if load is None:
            closed.append(closed_loop(detector, picture, steps=each, batch=batch, seconds=seconds))
        else:
            detect = partial(detector.detect, [picture], each)
            opened.append(open_loop(detect, steps=each, cameras=int(load[0]), fps=load[1], seconds=seconds))
    told = {"model": manifest.model_id, "backend": backend_version(backend), "machine": machine()}
    if record:
        record_latencies(folder, manifest, closed, told["backend"], told["machine"])
    result = {**told, "frame": [width, height], "rows": [asdict(row) for row in (*closed, *opened)]}
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        Console().print(_table(result, is_open=load is not None))


def _table(result: dict[str, Any], *, is_open: bool) -> Table:
    def told(stage: dict[str, float]) -> str:
        return " / ".join(f"{stage[name]:.1f}" for name in ("p50", "p95", "p99"))

    form = "{} by {}, frames of {}x{}; milliseconds as p50 / p95 / p99"
    table = Table(
        title=form.format(result["model"], result["backend"], *result["frame"]), title_justify="left"
    )
    stages = ("total", "backbone", "denoising", "host") if not is_open else ("latency",)
    others = ("images_per_s", "peak_memory_mb") if not is_open else ("frames_per_s", "waiting")
    for heading in ("K", *stages, *(name.replace("_", " ") for name in others)):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        numbers = (f"{row[name]:.1f}" if isinstance(row[name], float) else str(row[name]) for name in others)
        table.add_row(str(row["steps"]), *(told(row[stage]) for stage in stages), *numbers)
    return table


def _pair(text: str, name: str, form: str) -> tuple[float, float]:
    found = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)", text)
    if found is None or not all(float(part) > 0 for part in found.groups()):
        raise UsageError(f"{name} must be {form}, got {text}")
    return float(found[1]), float(found[2])
