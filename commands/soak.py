"""psdiff soak."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TextIO

import typer

from ..cli import FAILED, UsageError, app, reported_errors


@app.command()
@reported_errors()
def soak(
    minutes: Annotated[float, typer.Option(min=0.1, help="How long.")] = 30.0,
    seed: Annotated[int, typer.Option(help="Order and details of the faults.")] = 0,
    cameras: Annotated[int, typer.Option(min=2, max=30, help="Cameras, besides two special ones.")] = 3,
    isolation: Annotated[
        str | None, typer.Option(metavar="thread|process", help="ingest.isolation of the site.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The result as JSON; the service's log stands beside it.")] = Path(
        "psdiff-soak.json"
    ),
    write_docs: Annotated[
        Path | None, typer.Option(metavar="FILE.md", help="Write the table as Markdown, too.")
    ] = None,
) -> None:
    """Run a service with cameras of its own and let faults happen to it: networks, servers, clocks, overload.

    Prints which were survived, and ends with 1 where one was not. Needs GStreamer's RTSP server (Debian packages
    gir1.2-gst-rtsp-server-1.0, python3-gi, gstreamer1.0-plugins-base, gstreamer1.0-plugins-good, gstreamer1.0-rtsp).

    Ctrl-C ends it early and prints the table so far.
    """
    import tempfile

    from rich.console import Console

    from ..runtime.heaps import share_heaps

    try:
        from ..runtime.soak.endurance import endure
        from ..runtime.soak.report import document, table
        from ..runtime.soak.servers import ServerMissingError
    except ImportError as error:
        raise UsageError(f"psdiff soak must have psutil, got {error}; run pip install psdiff[soak]") from None

    share_heaps()
    changes = {"ingest": {"isolation": isolation}} if isolation else None
    with (
        _logged(out.with_suffix(".log")) as terminal,
        tempfile.TemporaryDirectory() as folder,
        Console(file=terminal).status("starting the cameras") as status,
    ):

        def on_fault(fault, records, elapsed_s) -> None:  # noqa: ANN001 - types of a part that is imported above
            runs, passed = (sum(getattr(each, name) for each in records) for name in ("runs", "passed"))
            status.update(
                f"{elapsed_s / 60:.1f} of {minutes:g} min, {passed} of {runs} passed; now: {fault.title}"
            )

        try:
            report = endure(
                Path(folder),
                seconds=60 * minutes,
                cameras=cameras,
                seed=seed,
                changes=changes,
                on_fault=on_fault,
            )
        except ServerMissingError as error:
            raise UsageError(str(error)) from None
    out.write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    if write_docs is not None:
        write_docs.write_text(document(report, minutes), encoding="utf-8")
    Console().print(table(report))
    slope = report.slope_mb_per_h
    typer.echo(
        f"memory {report.rss_mb[0]:.0f} to {report.rss_mb[1]:.0f} MB"
        f"{'' if slope is None else f' ({slope:+.1f} MB/h)'}, threads {report.threads[0]} to {report.threads[1]}, "
        f"files {report.files[0]} to {report.files[1]}, unaccounted frames {report.unaccounted}"
    )
    for complaint in report.complaints:
        typer.echo(f"failed: {complaint}", err=True)
    if report.complaints:
        raise typer.Exit(FAILED)


@contextmanager
def _logged(path: Path) -> Iterator[TextIO]:
    """Send what the service and its workers tell on stderr to a file: every fault is reported, and here it is wanted.

    Gives the terminal.
    """
    kept = os.dup(2)
    with path.open("w", encoding="utf-8") as log, os.fdopen(os.dup(kept), "w", encoding="utf-8") as terminal:
        os.dup2(log.fileno(), 2)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        try:
            yield terminal
        finally:
            os.dup2(kept, 2)
            os.close(kept)
