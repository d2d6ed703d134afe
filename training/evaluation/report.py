"""The scores of a person search evaluation for people to read: a table, JSON, and plots as PNG files.

Legend: K denoising steps.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from .detection import IOU_THRESHOLD, RECALL_LEVELS
from .person_search import LOWEST_SCORE, PersonSearchScores
from .search import SearchScores

QUERY_MODES = {
    "gt": "query described by its given box",
    "iou": "query described by the detection that covers its box best",
}
RANKINGS = {"cosine": "cosine", "cws": "cosine x detection score"}
AP50 = f"AP50: COCO, 101 points, greedy by score, IoU >= {IOU_THRESHOLD:g}"
AP_RECALL = (
    f"AP x R: AP x recall of the person search papers, best-placed detection, IoU >= {IOU_THRESHOLD:g}"
)


@dataclass(frozen=True)
class Report:
    """The scores of one model on one data set, one entry per K, all under the same protocol."""

    model: str
    dataset: str
    num_images: int
    scores: Sequence[PersonSearchScores]

    def protocol(self) -> str:
        """Return what a reader must know to compare the numbers."""
        one = self.scores[0]
        return (
            f"{QUERY_MODES[one.query_mode]}; ranked by {RANKINGS[one.rank_by]}; searched among detections with "
            f"score >= {one.score_threshold:g}; detection from score {LOWEST_SCORE:g} on; {AP50}; {AP_RECALL}; "
            "ms: per image, detection alone"
        )


def report_as_json(report: Report) -> dict[str, Any]:
    """Return the report as plain JSON values; shares are in [0, 1]."""
    return {
        "model": report.model,
        "dataset": report.dataset,
        "images": report.num_images,
        "protocol": report.protocol(),
        "machine": _machine(),
        "scores": [_as_json(row) for row in report.scores],
    }


def report_table(report: Report) -> Table:
    """Return the report as people read it, 80 columns wide; shares in percent, as the papers print them."""
    found = report.scores[0].search
    title = f"{report.model} on {report.dataset}: {report.num_images} images, {found.num_queries} queries"
    if found.num_without_truth:
        title += f" ({found.num_without_truth} more left out: nowhere in their gallery)"
    table = Table(
        title=title,
        caption=report.protocol(),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("K", "gallery", "mAP", "top-1", "top-5", "top-10"):
        table.add_column(heading, justify="right")
    for heading in ("AP50", "AP x R", "recall", "ms"):
        table.add_column(heading, justify="right")
    for row in report.scores:
        detection = (row.detection.curve.ap, row.detection.ap_recall, row.detection.recall)
        per_image = [*map(_percent, detection), f"{row.ms_per_image:.0f}"]
        table.add_row(str(row.steps), *_search_cells(row.search), *per_image)
        for scores in row.other_galleries.values():
            table.add_row("", *_search_cells(scores))
    return table


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write report.json and the plots that the scores allow; each file appears whole or not at all.

    precision_recall.png, and with several K steps.png, with several galleries gallery_size.png.
    Returns the paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report_as_json(report), indent=2) + "\n"
    paths = [_write(folder / "report.json", lambda file: file.write(text.encode()))]
    plots = {"precision_recall.png": _draw_precision_recall}
    if len(report.scores) > 1:
        plots["steps.png"] = _draw_steps
    if any(row.other_galleries for row in report.scores):
        plots["gallery_size.png"] = _draw_gallery_size
    for name, draw in plots.items():
        figure = Figure(figsize=(6.4, 4.8), layout="constrained")
        axes = figure.add_subplot()
        draw(axes, report.scores)
        axes.set_title(f"{report.model} on {report.dataset}")
        axes.grid(alpha=0.3)
        axes.legend()
        paths.append(_write(folder / name, lambda file, figure=figure: figure.savefig(file, format="png")))
    return paths


def _draw_precision_recall(axes: Axes, scores: Sequence[PersonSearchScores]) -> None:
    for row in scores:
        label = f"K = {row.steps}, AP50 {row.detection.curve.ap:.3f}"
        axes.plot(RECALL_LEVELS, row.detection.curve.precision, label=label)
    axes.set(
        xlabel=f"recall (share of people, IoU >= {IOU_THRESHOLD:g})", ylabel="precision (share of detections)"
    )
    axes.set(xlim=(0, 1), ylim=(0, 1.02))


def _draw_steps(axes: Axes, scores: Sequence[PersonSearchScores]) -> None:
    ordered = sorted(scores, key=lambda row: row.steps)
    steps = [row.steps for row in ordered]
    axes.plot(steps, [100 * row.search.map for row in ordered], marker="o", label="search mAP")
    axes.plot(steps, [100 * row.search.top1 for row in ordered], marker="s", label="search top-1")
    axes.plot(steps, [100 * row.detection.curve.ap for row in ordered], marker="^", label="detection AP50")
    axes.set(xlabel="denoising steps K", ylabel="score (%)", xticks=steps)


def _draw_gallery_size(axes: Axes, scores: Sequence[PersonSearchScores]) -> None:
    for number, row in enumerate(scores):
        curve = sorted([row.search, *row.other_galleries.values()], key=lambda found: found.gallery_size)
        sizes = [found.gallery_size for found in curve]
        for name, style, field in (("mAP", "-o", "map"), ("top-1", "--s", "top1")):
            values = [100 * getattr(found, field) for found in curve]
            axes.plot(sizes, values, style, color=f"C{number}", label=f"K = {row.steps}, {name}")
        axes.set(xscale="log", xticks=sizes, xticklabels=[f"{size:.0f}" for size in sizes])
    axes.minorticks_off()
    axes.set(xlabel="gallery size (images)", ylabel="score (%)")


def _write(path: Path, write: Callable[[IO[bytes]], object]) -> Path:
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        write(file)
    return temporary.replace(path)


def _search_cells(scores: SearchScores) -> list[str]:
    shares = (scores.map, scores.top1, scores.top5, scores.top10)
    return [f"{scores.gallery_size:.0f}", *map(_percent, shares)]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _as_json(row: PersonSearchScores) -> dict[str, Any]:
    curve = row.detection.curve
    return {
        "steps": row.steps,
        "query_mode": row.query_mode,
        "score_threshold": row.score_threshold,
        "rank_by": row.rank_by,
        "search": _search_as_json(row.search),
        "other_galleries": {size: _search_as_json(found) for size, found in row.other_galleries.items()},
        "detection": {
            "ap50": round(curve.ap, 4),
            "ap50_recall": round(curve.recall, 4),
            "ap_recall": round(row.detection.ap_recall, 4),
            "recall": round(row.detection.recall, 4),
            "people": row.detection.num_people,
            "precision_at_101_recalls": curve.precision.round(4).tolist(),
        },
        "ms_per_image": round(row.ms_per_image, 1),
    }


def _search_as_json(scores: SearchScores) -> dict[str, Any]:
    shares = {name: round(getattr(scores, name), 4) for name in ("map", "top1", "top5", "top10")}
    counts = {"queries": scores.num_queries, "queries_left_out": scores.num_without_truth}
    return {**shares, **counts, "gallery_size": round(scores.gallery_size, 1)}


def _machine() -> dict[str, Any]:
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
