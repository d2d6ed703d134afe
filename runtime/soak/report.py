"""The table of a soak, for a terminal and for docs/faults.md."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version

from rich.table import Table

from .endurance import MOST_MB_PER_H, Record, Report

HEAD = """# Faults that a service survives

Written by `psdiff soak --minutes {minutes:g} --seed {seed} --write-docs docs/faults.md`; each fault is a test in
`tests/faults/`, too. One service watches {cameras} cameras (GStreamer's RTSP server, 640x360 at 10 frames a second,
each behind a proxy) with a detector that takes as long as it is told, so that every box can be checked. The faults
come in random order, each kind once before any comes again. Recovery is the time from the end of the fault to three
new frames of every camera that it hit.

{verdict}, {when} on {machine}: {minutes_run:.1f} minutes, psdiff {version}.

"""

TAIL = """
Memory after the warm-up: {rss[0]:.0f} to {rss[1]:.0f} MB, {slope}; at most {most:g} MB/h are promised.
Threads {threads[0]} to {threads[1]}, files {files[0]} to {files[1]}; they differ by what is being connected.
Frames that are not accounted for: {unaccounted}. Frames whose time went back: {backwards}.
"""


def table(report: Report) -> Table:
    """The faults and what became of them."""
    result = Table(title=f"{report.seconds / 60:.1f} minutes, seed {report.seed}", title_justify="left")
    for heading in ("#", "fault", "runs", "passed", "worst recovery"):
        result.add_column(heading, justify="left" if heading == "fault" else "right")
    for each in report.records:
        style = "red" if each.failures else "dim" if each.missing or not each.runs else None
        result.add_row(*_cells(each), style=style)
    return result


def document(report: Report, minutes: float) -> str:
    """docs/faults.md."""
    slope = report.slope_mb_per_h
    lines = ["| # | fault | what must hold | runs | passed | worst recovery |", "|--:|---|---|--:|--:|--:|"]
    for each in report.records:
        number, title, *rest = _cells(each)
        lines.append(f"| {number} | {title} | {each.criterion} | {' | '.join(rest)} |")
    head = HEAD.format(
        minutes=minutes,
        seed=report.seed,
        cameras=report.cameras,
        verdict="All passed" if not report.complaints else f"**{len(report.complaints)} failed**",
        when=time.strftime("%Y-%m-%d", time.gmtime()),
        machine=f"{platform.machine()}, {_cores()} cores, {platform.system()}, Python {platform.python_version()}",
        minutes_run=report.seconds / 60,
        version=_version(),
    )
    tail = TAIL.format(
        rss=report.rss_mb,
        slope="too short for a slope" if slope is None else f"a slope of {slope:+.2f} MB/h",
        most=MOST_MB_PER_H,
        threads=report.threads,
        files=report.files,
        unaccounted=report.unaccounted,
        backwards=report.backwards,
    )
    complaints = "".join(f"- {each}\n" for each in report.complaints)
    return head + "\n".join(lines) + "\n" + tail + (f"\nFailed:\n\n{complaints}" if complaints else "")


def _cells(record: Record) -> tuple[str, ...]:
    number, title = str(record.number), record.title
    if record.missing:
        return number, title, "-", "-", record.missing
    return (
        number,
        title,
        str(record.runs),
        str(record.passed),
        f"{record.worst_s:.1f} s" if record.passed else "-",
    )


def _cores() -> int:

    return os.cpu_count() or 1


def _version() -> str:
    try:
        return version("psdiff")
    except PackageNotFoundError:
        return "unknown"
