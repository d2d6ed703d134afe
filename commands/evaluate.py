"""psdiff evaluate."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..cli import app, reported_errors, usage


@app.command()
@reported_errors()
def evaluate(
    bundle: Annotated[
        Path | None, typer.Argument(help="Folder of a bundle. Default: the one that comes with psdiff.")
    ] = None,
    steps: Annotated[str, typer.Option(metavar="K,K,...", help="Numbers of denoising steps.")] = "1,2,4,8",
    streets: Annotated[int, typer.Option(min=1, help="How many held-out streets, two clips each.")] = 8,
    clips: Annotated[Path, typer.Option(help="Folder of the clips; drawn at the first use.")] = Path(
        "psdiff-evaluation"
    ),
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Choose the thresholds first, on streets of their own.")
    ] = False,
    record: Annotated[
        bool, typer.Option("--record", help="Write scores and thresholds into the bundle's manifest.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON on stdout.")] = False,
) -> None:
    """Score a bundle on held-out synthetic clips: detection AP50 and cross-camera search top-1."""
    from rich.console import Console
    from rich.progress import Progress

    from ..bundle import load_manifest, write_manifest
    from ..runtime.detector import detector_of, shipped_bundle
    from ..training.evaluation import clips as evaluation

    folder = bundle or shipped_bundle()
    manifest = load_manifest(folder)
    with usage():
        detector = detector_of(manifest, folder, "onnxruntime")
        wanted = [int(part) for part in steps.split(",")]
        for count in wanted:
            detector.detect([], count)
    settings = evaluation.EvaluationSet(streets=streets)
    with Progress(console=Console(stderr=True)) as bars:

        def images_of(chosen: evaluation.EvaluationSet, name: str) -> list[evaluation.LabelledImage]:
            task = bars.add_task(f"drawing clips for {name}", total=chosen.num_frames)
            paths = evaluation.render_evaluation_set(chosen, clips, lambda: bars.advance(task))
            bars.update(task, completed=chosen.num_frames)
            return evaluation.load_evaluation_set(chosen, paths)

        if calibrate:
            chosen = evaluation.EvaluationSet(streets=4, seed=evaluation.CALIBRATION_SEED)
            calibration = images_of(chosen, "calibration")
            found = {count: evaluation.calibrate(detector, calibration, count) for count in wanted}
            usual = found.get(manifest.default_steps) or found[max(found)]
            update = {
                "score_threshold": round(usual.score, 3),
                "score_thresholds": {count: round(best.score, 3) for count, best in found.items()},
                "match_threshold": round(usual.match, 3),
            }
            manifest = manifest.model_copy(update=update)
        images = images_of(settings, "evaluation")
        scores = []
        for count in wanted:
            task = bars.add_task(f"K = {count}", total=len(images))
            scores.append(evaluation.evaluate(detector, images, count, lambda task=task: bars.advance(task)))
    if record:
        measurements = evaluation.with_scores(manifest.measurements, scores, settings)
        manifest = manifest.model_copy(update={"measurements": measurements})
        write_manifest(folder, manifest)
    if as_json:
        result = {"dataset": settings.description(), "scores": [asdict(row) for row in scores]}
        typer.echo(json.dumps(result, indent=2))
        return
    Console().print(evaluation.scores_table(scores, settings))
    by_steps = ", ".join(f"{value:.3f} at K = {count}" for count, value in manifest.score_thresholds.items())
    typer.echo(
        f"score threshold {by_steps or manifest.score_threshold}; match threshold {manifest.match_threshold}"
    )
