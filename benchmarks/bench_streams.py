"""Many RTSP cameras on one machine: scheduling, recovery, stalls, and the latency with the real bundle.

GStreamer's RTSP server plays synthetic clips of 640x360 at five frames a second; what runs is the service of
psdiff serve, in this process.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

if __name__ == "__main__" and not __package__:
    __package__ = "psdiff.benchmarks"

from ..runtime.inherited_logs import tell_children
from ..runtime.soak.clips import write_clip
from ..runtime.soak.servers import ServerMissingError
from . import stream_faults, stream_load
from .stream_load import FPS, Setting

PARTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "scheduling": stream_load.scheduling,
    "recovery": stream_faults.recovery,
    "stall": stream_faults.stall,
    "latency": stream_load.latency,
}


def main(
    part: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(PARTS)}.")] = ",".join(PARTS),
    seconds: Annotated[float, typer.Option(min=1, help="How long a load is measured.")] = 60.0,
    cameras: Annotated[int, typer.Option(min=1, help="Of scheduling, recovery and stall.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="How often the server dies in recovery.")] = 3,
    cycles: Annotated[int, typer.Option(min=1, help="Connections that are lost in stall.")] = 200,
    counts: Annotated[str, typer.Option(help="Numbers of cameras in latency.")] = "1,2,4,8",
    isolation: Annotated[
        str | None, typer.Option(metavar="thread|process", help="ingest.isolation. Default: the site's.")
    ] = None,
    suffix: Annotated[str, typer.Option(help="Of the files' names: streams_<part><suffix>.json.")] = "",
) -> None:
    """Measure on this machine; prints tables and writes benchmarks/results/streams_<part>.json."""
    unknown = set(part.split(",")) - set(PARTS)
    if unknown:
        raise typer.BadParameter(f"part must be of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    # The service tells every lost connection; here they are lost on purpose.
    logging.getLogger("psdiff").setLevel(logging.CRITICAL)
    tell_children("text", "critical")
    missed = []
    with tempfile.TemporaryDirectory() as folder, progress() as advance:
        setting = Setting(
            folder=Path(folder),
            clip=write_clip(Path(folder) / "clip.mp4", seconds=20, fps=FPS, repeat=90),
            seconds=seconds,
            cameras=cameras,
            repeats=repeats,
            cycles=cycles,
            counts=[int(count) for count in counts.split(",")],
            isolation=isolation,
            advance=advance,
        )
        for name in part.split(","):
            try:
                result = PARTS[name](setting)
            except ServerMissingError as error:
                typer.echo(f"error: {error}", err=True)
                raise typer.Exit(2) from None
            missed += report(name, f"streams_{name}{suffix}", result, isolation)
    for each in missed:
        typer.echo(f"missed: {each}", err=True)
    if missed:
        raise typer.Exit(1)


def report(name: str, file: str, result: dict[str, Any], isolation: str | None) -> list[str]:
    """Print and write a result; returns the bars that it missed."""
    # torch, which the machine's description asks, would count as the service's memory if it were there before.
    from .machine import RESULTS, describe_machine, write_result

    result = {"machine": describe_machine(), "isolation": isolation or "as the site", **result}
    path = write_result(file, result)
    Console().print(table(name, result["rows"]))
    if name == "latency":
        stream_load.plot(result["rows"], RESULTS / f"{file}.png")
    typer.echo(path)
    return [f"{name}: {bar}" for bar, is_met in result.get("bars", {}).items() if not is_met]


def table(name: str, rows: list[dict[str, Any]]) -> Table:
    """One column a measurement: there are few of them, and many quantities."""
    title = f"{name}, {FPS} frames a second and camera; milliseconds as p50 / p95 / p99"
    result = Table(title=title, title_justify="left", show_header=False)
    for quantity in rows[0]:
        result.add_row(quantity.replace("_", " "), *(told(row[quantity]) for row in rows))
    return result


def told(value: object) -> str:
    """A value of a row as people read it."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {each}" for key, each in value.items()) or "-"
    if isinstance(value, list):
        return " / ".join(str(each) for each in value) or "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """A bar on stderr: give it what is done, and its share."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=1)
        yield lambda what, share: bar.update(task, description=what, completed=share)


if __name__ == "__main__":
    typer.run(main)
