"""What psdiff run shows in a terminal: progress a source, and the table at the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from .events import RunSummary, SourceSummary
from .frames import Source
from .run import OnProgress

# Without a terminal a plain line tells now and then that the run is alive.
PLAIN_LINE_INTERVAL_S = 10.0


@contextmanager
def progress_of(sources: Sequence[Source], console: Console) -> Iterator[OnProgress]:
    """Show progress on the console: a bar a source in a terminal, plain lines otherwise."""
    if not console.is_terminal:
        yield PlainLines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[fps]:5.1f} fps  {task.fields[detections]} people"),
    )
    with Progress(*columns, console=console) as bars:
        tasks = {
            source.camera: bars.add_task(
                escape(source.camera), total=source.num_frames_hint, fps=0.0, detections=0
            )
            for source in sources
        }
        yield Bars(bars, tasks)


class Bars:
    """Rich bars, one a source."""

    def __init__(self, bars: Progress, tasks: dict[str, TaskID]) -> None:
        self._bars = bars
        self._tasks = tasks

    def __call__(self, summary: SourceSummary) -> None:
        """Move the source's bar."""
        task = self._tasks[summary.camera]
        counts = {"fps": summary.fps, "detections": summary.detections}
        # At the end the true number of frames is known, whatever the file had promised.
        total = {} if summary.status == "running" else {"total": summary.frames_decoded}
        self._bars.update(task, completed=summary.frames_decoded, **total, **counts)


class PlainLines:
    """A line about every source, at most one each PLAIN_LINE_INTERVAL_S a source."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._due: dict[str, float] = {}

    def __call__(self, summary: SourceSummary) -> None:
        """Print the line if it is due."""
        now = time.monotonic()
        if now < self._due.setdefault(summary.camera, now + PLAIN_LINE_INTERVAL_S):
            return
        self._due[summary.camera] = now + PLAIN_LINE_INTERVAL_S
        expected = f"/{summary.frames_expected}" if summary.frames_expected else ""
        self._console.print(
            f"{summary.camera}: frame {summary.frames_decoded}{expected}, {summary.fps:.1f} fps, "
            f"{summary.detections} people",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def result_table(summary: RunSummary) -> Table:
    """Return the table of a finished run, a row a source; columns of zeros are left out."""
    query = "" if summary.query is None else f", query {summary.query}"
    table = Table(title=escape(f"{summary.model.id}, K={summary.steps}{query}"), title_justify="left")
    table.add_column("camera", no_wrap=True)
    columns = {
        "frames": [_frames(source) for source in summary.sources],
        "people": [str(source.detections) for source in summary.sources],
        "fps": [f"{source.fps:.1f}" for source in summary.sources],
        "corrupt": [str(source.corrupt_packets) for source in summary.sources],
        "dropped": [str(source.frames_dropped) for source in summary.sources],
        "best cosine": [_best(source) for source in summary.sources] if summary.query is not None else [],
    }
    shown = {name: cells for name, cells in columns.items() if name == "people" or set(cells) - {"0"}}
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("status")
    for i, source in enumerate(summary.sources):
        table.add_row(escape(source.camera), *(cells[i] for cells in shown.values()), escape(_status(source)))
    return table


def _frames(source: SourceSummary) -> str:
    if source.frames_decoded == source.frames_processed:
        return str(source.frames_decoded)
    return f"{source.frames_processed} of {source.frames_decoded}"


def _best(source: SourceSummary) -> str:
    return (
        "-" if source.best_hit is None else f"{source.best_hit.cos:.2f} in frame {source.best_hit.frame_seq}"
    )


def _status(source: SourceSummary) -> str:
    expected = source.frames_expected
    # Some containers state a length that is a frame or two off; a file that was cut off lacks more.
    if source.status == "ended" and expected and source.frames_decoded < 0.98 * expected:
        return f"ended early, at frame {source.frames_decoded} of {expected}"
    return source.error or source.status


class WarningLines(logging.Handler):
    """Show the library's warnings as one line each, above the progress bars."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record."""
        text = f"{record.levelname.lower()}: {record.getMessage()}"
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def warnings_on(console: Console) -> Iterator[None]:
    """Show what psdiff logs as a warning on the console."""
    logger, handler = logging.getLogger("psdiff"), WarningLines(console)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def print_result(summary: RunSummary, out: Path) -> None:
    """Print the table and where the files are on stdout."""
    console = Console()
    console.print(result_table(summary))
    console.print(f"{', '.join(summary.files)} in {out}", markup=False, highlight=False, soft_wrap=True)
