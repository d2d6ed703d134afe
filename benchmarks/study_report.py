"""From the runs of the study to benchmarks/results/study.json, the tables of docs/study.md and its plots.

The text of docs/study.md is written by hand; what stands between its markers is replaced.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .machine import describe_machine, write_result
from .study_variants import BASE, PLAIN_SAMPLING, QUESTIONS, SAMPLINGS, STEPS, Question

DOCUMENT = Path(__file__).parents[1] / "docs" / "study.md"
PLOTS = DOCUMENT.parent / "study"
MARKERS = "<!-- tables: made by benchmarks/study.py report -->", "<!-- end of the tables -->"

# The K at which settings are compared; the default of the shipped model.
COMPARED = "4"
METRICS = {"map": "mAP", "top1": "top-1", "ap50": "AP50"}

Run = dict[str, Any]


def write(runs_folder: Path) -> list[Path]:
    """Collect the runs; returns what was written. Raises ValueError where there is no run of the base."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(runs_folder.glob("*.json"))]
    base = _of(runs, BASE)
    if not base:
        raise ValueError(
            f"runs must hold the base, got {len(runs)} runs in {runs_folder}; study.py run first"
        )
    result = write_result("study", {"machine": describe_machine(), "noise": _noise(runs), "runs": runs})
    tables = "\n\n".join(
        [_steps_table(base), *(_question_table(q, runs) for q in QUESTIONS), _sampling_table(base)]
    )
    text = DOCUMENT.read_text(encoding="utf-8")
    start, end = (re.escape(marker) for marker in MARKERS)
    replaced = f"{MARKERS[0]}\n\n{tables}\n\n{MARKERS[1]}"
    text = re.sub(f"{start}.*{end}", lambda _: replaced, text, flags=re.DOTALL)
    DOCUMENT.write_text(text, encoding="utf-8")
    return [result, DOCUMENT, *_plots(runs)]


def _of(runs: Sequence[Run], variant: str) -> list[Run]:
    return [run for run in runs if run["variant"] == variant]


def _values(runs: Sequence[Run], steps: str, metric: str) -> list[float]:
    return [run["scores"][steps][metric] for run in runs]


def _noise(runs: Sequence[Run]) -> dict[str, float]:
    """Standard deviation of one run at K = COMPARED, pooled over all variants with several seeds."""
    noise = {}
    for metric in METRICS:
        groups = [_values(_of(runs, name), COMPARED, metric) for name in {run["variant"] for run in runs}]
        repeated = [statistics.variance(values) for values in groups if len(values) > 1]
        noise[metric] = math.sqrt(statistics.fmean(repeated)) if repeated else math.nan
    return noise


def _steps_table(base: Sequence[Run]) -> str:
    lines = [
        f"### Number of steps (base, {len(base)} seeds)",
        "",
        "| K | mAP | top-1 | AP50 | recall | paper: mAP / top-1 on CUHK-SYSU |",
        "|---|---|---|---|---|---|",
    ]
    paper = {1: "90.8 / 92.1", 2: "92.5 / 93.8", 4: "94.7 / 95.1", 8: "95.1 / 95.3"}
    for steps in STEPS:
        cells = [_spread(_values(base, str(steps), metric)) for metric in (*METRICS, "recall")]
        lines.append(f"| {steps} | {' | '.join(cells)} | {paper[steps]} |")
    return "\n".join(lines)


def _question_table(question: Question, runs: Sequence[Run]) -> str:
    reference = _of(runs, question.reference)
    lines = [
        f"### {question.title}",
        "",
        f"| setting | paper | {' | '.join(f'mAP K = {k}' for k in STEPS)} | top-1 | AP50 | against the first row |",
        f"|---|---|{'---|' * len(STEPS)}---|---|---|",
        _row(f"**{question.base_is}** ({question.reference})", question.base_paper, reference, ""),
    ]
    for variant in question.variants:
        found = _of(runs, variant.name)
        lines.append(_row(variant.name, variant.paper, found, _verdict(found, reference, _noise(runs))))
    return "\n".join(lines)


def _row(name: str, paper: str, runs: Sequence[Run], verdict: str) -> str:
    if not runs:
        return f"| {name} | {paper} | {'not run | ' * len(STEPS)} | | |"
    cells = [_spread(_values(runs, str(steps), "map")) for steps in STEPS]
    others = [_spread(_values(runs, COMPARED, metric)) for metric in ("top1", "ap50")]
    return f"| {name} | {paper} | {' | '.join([*cells, *others])} | {verdict} |"


def _spread(values: Sequence[float]) -> str:
    """Mean, and half the range over the seeds, in per cent."""
    mean = f"{100 * statistics.fmean(values):.1f}"
    return f"{mean} ± {50 * (max(values) - min(values)):.1f}" if len(values) > 1 else f"{mean} (one seed)"


def _verdict(found: Sequence[Run], reference: Sequence[Run], noise: dict[str, float]) -> str:
    """Tell where mAP and AP50 at K = COMPARED differ by more than two standard errors."""
    if not found or not reference:
        return ""
    words = []
    for metric in ("map", "ap50"):
        mine, theirs = (_values(runs, COMPARED, metric) for runs in (found, reference))
        difference = statistics.fmean(mine) - statistics.fmean(theirs)
        error = noise[metric] * math.sqrt(1 / len(mine) + 1 / len(theirs))
        # With a single seed everywhere there is no measure of noise, and nothing to say.
        word = "unknown" if math.isnan(error) else "within noise"
        if abs(difference) > 2 * error:
            word = f"{'better' if difference > 0 else 'worse'} ({100 * difference:+.1f})"
        words.append(f"{METRICS[metric]} {word}")
    return ", ".join(words)


def _sampling_table(base: Sequence[Run]) -> str:
    lines = [
        f"### Samplers and options, on the weights of the base ({len(base)} seeds)",
        "",
        f"| sampler | paper | {' | '.join(f'mAP K = {k}' for k in STEPS)} | "
        f"{' | '.join(f'AP50 K = {k}' for k in STEPS)} |",
        f"|---|---|{'---|' * 2 * len(STEPS)}",
    ]
    for sampling in (PLAIN_SAMPLING, *SAMPLINGS):
        scores = [run["samplings"][sampling.name] for run in base]
        lines.append(_sampling_row(sampling.name, sampling.paper, scores))
    return "\n".join(lines)


def _sampling_row(name: str, paper: str, scores: Sequence[dict[str, Any]]) -> str:
    cells = [
        f"{100 * statistics.fmean(one[str(steps)][metric] for one in scores):.1f}"
        for metric in ("map", "ap50")
        for steps in STEPS
    ]
    return f"| {name} | {paper} | {' | '.join(cells)} |"


def _plots(runs: Sequence[Run]) -> list[Path]:
    PLOTS.mkdir(exist_ok=True)
    return [_plot_steps(runs), _plot_variants(runs)]


def _plot_steps(runs: Sequence[Run]) -> Path:
    """The curves over K that the paper's claim is about: its sampler against fresh noise at each step."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    base = _of(runs, BASE)
    curves = {}
    # All on the same frames: the base's own scores are of more of them.
    for name in (
        PLAIN_SAMPLING.name,
        "even grid",
        "ensemble",
        "fresh noise each step",
        "fresh noise + ensemble",
        "2x the proposals",
    ):
        curves[name] = [run["samplings"][name] for run in base]
    left, right = figure.subplots(1, 2)
    for axes, metric, title in ((left, "map", "search mAP"), (right, "ap50", "AP50")):
        for name, scores in curves.items():
            means = [100 * statistics.fmean(one[str(k)][metric] for one in scores) for k in STEPS]
            axes.plot(range(len(STEPS)), means, marker="o", label=name.replace("*", ""))
        axes.set_xticks(range(len(STEPS)), [str(steps) for steps in STEPS])
        axes.set(xlabel="steps K", ylabel=f"{title} (%)")
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center")
    return _save(figure, "steps.png")


def _plot_variants(runs: Sequence[Run]) -> Path:
    """Every variant against the base at K = COMPARED, one dot a seed."""
    names = [
        variant.name for question in QUESTIONS for variant in question.variants if _of(runs, variant.name)
    ]
    figure = Figure(figsize=(9, 0.8 + 0.26 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, metric in ((left, "map"), (right, "ap50")):
        base = statistics.fmean(_values(_of(runs, BASE), COMPARED, metric))
        noise = _noise(runs)[metric]
        if not math.isnan(noise):
            axes.axvspan(-200 * noise, 200 * noise, color="0.9")
        axes.axvline(0, color="0.4", linewidth=1)
        for row, name in enumerate(names):
            differences = [100 * (value - base) for value in _values(_of(runs, name), COMPARED, metric)]
            axes.plot(differences, [row] * len(differences), "o")
        axes.set(xlabel=f"{METRICS[metric]} at K = {COMPARED} against the base (points)")
        axes.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    return _save(figure, "variants.png")


def _save(figure: Figure, name: str) -> Path:
    temporary = PLOTS / f".{name}"
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(PLOTS / name)
    return PLOTS / name
