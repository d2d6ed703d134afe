"""Warm against cold starts on synthetic video: mAP, top-1, AP50, newcomers and milliseconds, for docs/warm_start.md.

Two sets of clips, so that the noise between sets is known; --tune compares settings of the warm start on a set of
its own. The text of the document is written by hand; what stands between its markers is replaced.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress

if __name__ == "__main__" and not __package__:
    __package__ = "psdiff.benchmarks"

from ..models.detector import Detector
from ..runtime.detector import open_detector
from ..runtime.warm_start import WarmSettings
from ..training.evaluation.clips import EvaluationSet
from .machine import describe_machine, write_result
from .warm_clips import (
    FRAMES_AFTER,
    ClipSet,
    Viewer,
    Way,
    load_clips,
    queries_of,
    scores_of,
    threshold_of,
    watch,
)

DOCUMENT = Path(__file__).parents[1] / "docs" / "warm_start.md"
PLOT = DOCUMENT.parent / "warm_start" / "warm_start.png"

CLIPS = EvaluationSet(streets=4, people=8, duration_s=12.0, clip_fps=5.0, every=1)
SEEDS = (4_000_000, 4_100_000)
TUNING_SEED = 3_000_000

DEFAULT = WarmSettings()
WAYS = {f"cold, K = {k}": Way(k) for k in (1, 2, 4, 8)} | {f"warm, K = {k}": Way(k, DEFAULT) for k in (1, 2)}
SETTINGS = {
    "as shipped": DEFAULT,
    "t_w = 199": replace(DEFAULT, timestep=199),
    "t_w = 499": replace(DEFAULT, timestep=499),
    "30 % fresh": replace(DEFAULT, fresh_share=0.3),
    "70 % fresh": replace(DEFAULT, fresh_share=0.7),
    "one proposal a person": replace(DEFAULT, most_copies=1),
    "Gaussian fresh boxes": replace(DEFAULT, fresh="gaussian"),
}
VARIANTS = {f"K = {k}, {name}": Way(k, settings) for k in (1, 2) for name, settings in SETTINGS.items()}

# Frames whose milliseconds are measured, in every way in turn.
TIMED_FRAMES = 60

Row = dict[str, Any]


def main(
    clips: Annotated[Path, typer.Option(help="Folder that keeps the clips from run to run.")] = Path(
        "psdiff-evaluation/warm"
    ),
    tune: Annotated[
        bool, typer.Option("--tune", help="Compare settings of the warm start instead, on the tuning clips.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Measure on this machine; prints a table, and writes benchmarks/results, docs/warm_start.md and its plot."""
    detector = open_detector(threads=threads)
    assert isinstance(detector, Detector)
    began = time.perf_counter()
    with Progress(console=Console(stderr=True)) as bars:

        def ticking(label: str, total: int) -> Callable[[], None]:
            task = bars.add_task(label, total=total)
            return lambda: bars.advance(task)

        seeds = (TUNING_SEED,) if tune else SEEDS
        sets = [load_clips(replace(CLIPS, seed=seed), clips) for seed in seeds]
        result: Row = {"ms": {} if tune else milliseconds(detector, sets[0], ticking("timing", TIMED_FRAMES))}
        result["rows"] = measured(detector, sets, VARIANTS if tune else WAYS, ticking)
    result |= {
        "machine": describe_machine(),
        "inference_threads": threads,
        "clips": asdict(CLIPS),
        "seeds": seeds,
        "minutes": round((time.perf_counter() - began) / 60, 1),
    }
    text = table(result)
    Console().print(Markdown(text))
    replace_between("tuning" if tune else "table", text)
    if not tune:
        write_plot(result)
    typer.echo(write_result("warm_start_tuning" if tune else "warm_start", result))


def measured(
    detector: Detector,
    sets: Sequence[ClipSet],
    ways: Mapping[str, Way],
    ticking: Callable[[str, int], Callable[[], None]],
) -> list[Row]:
    """One row a way, its scores a list with one entry a set of clips."""
    rows: list[Row] = [
        {
            "way": name,
            "steps": way.steps,
            "warm": way.warm is not None,
            "threshold": threshold_of(way, detector),
            "starts": [],
            "scores": [],
        }
        for name, way in ways.items()
    ]
    for number, clips in enumerate(sets):
        watched = watch(detector, clips, ways, ticking(f"clips {number + 1}", len(clips.images)))
        queries = queries_of(clips, detector)
        for row in rows:
            seen = watched[row["way"]]
            row["scores"].append(asdict(scores_of(clips, seen.people, queries, row["threshold"])))
            row["starts"].append(dict(seen.starts))
    return rows


def milliseconds(detector: Detector, clips: ClipSet, on_frame: Callable[[], None]) -> dict[str, float]:
    """Median of a whole look at a frame, tracks included; the ways take turns, so that all see the same machine."""
    viewers = {name: Viewer(detector, way, detector) for name, way in WAYS.items()}
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(TIMED_FRAMES):
        for name, viewer in viewers.items():
            began = time.perf_counter()
            viewer.look(clips.images[number].image, number / clips.fps, number)
            times[name].append(1000 * (time.perf_counter() - began))
        on_frame()
    return {name: round(statistics.median(each), 2) for name, each in times.items()}


def table(result: Row) -> str:
    """The rows in Markdown, and how they were made."""
    machine, ms = result["machine"], result["ms"]
    first = result["rows"][0]["scores"]
    queries, entrances = (sum(scores[name] for scores in first) for name in ("queries", "entrances"))
    headings = ["start", "mAP", "top-1", "AP50", "precision", "recall", *map(str, FRAMES_AFTER)]
    headings += ["ms", "ratio"] if ms else ["best threshold"]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for row in result["rows"]:
        cells = _cells(row)
        if ms:
            cells += [f"{ms[row['way']]:.0f}", f"{ms[row['way']] / next(iter(ms.values())):.2f}"]
        else:
            cells.append(", ".join(f"{scores['best_threshold']:.2f}" for scores in row["scores"]))
        lines.append(f"| {' | '.join(cells)} |")
    frames = round(CLIPS.duration_s * CLIPS.clip_fps / CLIPS.every) * 2 * CLIPS.streets
    command = f"python -m psdiff.benchmarks.bench_warm_start{'' if ms else ' --tune'}"
    return "\n".join(
        [
            *lines,
            "",
            f"{len(result['seeds'])} x {frames} frames, {queries} queries, "
            f"{entrances} entrances. `{command}`, {machine['cpu']}, {machine['cores']} cores, "
            f"{result['inference_threads']} thread, onnxruntime {machine['packages']['onnxruntime']}.",
        ]
    )


def _cells(row: Row) -> list[str]:
    names = ("map", "top1", "ap50", "precision", "recall")
    values = [[scores[name] for scores in row["scores"]] for name in names]
    values += [[scores["entered"][after] for scores in row["scores"]] for after in FRAMES_AFTER]
    return [row["way"], *map(_spread, values)]


def _spread(values: Sequence[float]) -> str:
    """Mean, and half the range over the sets, in per cent."""
    mean = f"{100 * statistics.fmean(values):.1f}"
    return f"{mean} ± {50 * (max(values) - min(values)):.1f}" if len(values) > 1 else mean


def replace_between(name: str, text: str) -> None:
    """Put a table between its markers in the document."""
    document = DOCUMENT.read_text(encoding="utf-8")
    start, end = f"<!-- {name}: made by benchmarks/bench_warm_start.py -->", f"<!-- end of {name} -->"
    pattern = f"{re.escape(start)}.*{re.escape(end)}"
    replaced = re.sub(pattern, lambda _: f"{start}\n\n{text}\n\n{end}", document, flags=re.DOTALL)
    DOCUMENT.write_text(replaced, encoding="utf-8")


def write_plot(result: Row) -> None:
    """Scores against milliseconds, and newcomers against frames since they entered."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    base = result["ms"][next(iter(WAYS))]
    for is_warm, label, style in ((False, "cold", "o-"), (True, "warm", "s--")):
        rows = [row for row in result["rows"] if row["warm"] == is_warm]
        ratio = [result["ms"][row["way"]] / base for row in rows]
        for axis, name, title in ((axes[0], "map", "mAP (%)"), (axes[1], "ap50", "AP50 (%)")):
            values = [[100 * scores[name] for scores in row["scores"]] for row in rows]
            means = [statistics.fmean(each) for each in values]
            spread = [(max(each) - min(each)) / 2 for each in values]
            axis.errorbar(ratio, means, yerr=spread, fmt=style, capsize=3, label=label)
            for row, x, y in zip(rows, ratio, means, strict=True):
                axis.annotate(f"K = {row['steps']}", (x, y), textcoords="offset points", xytext=(6, -10))
            axis.set(xlabel="time, cold K = 1 is 1", ylabel=title)
            axis.legend()
        for row in rows:
            found = [
                100 * statistics.fmean(scores["entered"][after] for scores in row["scores"])
                for after in FRAMES_AFTER
            ]
            axes[2].plot(FRAMES_AFTER, found, style, label=row["way"])
    axes[2].set(xlabel="frames since the entrance", ylabel="newcomers found (%)")
    axes[2].legend(fontsize=8)
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=110)


if __name__ == "__main__":
    typer.run(main)
