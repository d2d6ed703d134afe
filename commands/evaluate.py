"""psdiff evaluate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..cli import UsageError, app, reported_errors, usage


class DataFormat(StrEnum):
    """How the data to evaluate on is laid out."""

    CLIPS = "clips"
    CUHK_SYSU = "cuhk-sysu"
    PRW = "prw"
    POSETRACK21 = "posetrack21"


class QueryModes(StrEnum):
    """How a query is described: by its given box, or by the detection that covers it best."""

    GT = "gt"
    IOU = "iou"


class Rankings(StrEnum):
    """What detections are ranked by."""

    COSINE = "cosine"
    CWS = "cws"


# Headings of --help.
CLIPS = "With --format clips"
DATA_SET = "With the other formats"


@app.command()
@reported_errors()
def evaluate(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="[BUNDLE|CHECKPOINT]",
            help="Folder of a bundle, or a .safetensors file (needs torch). Default: the bundle in psdiff.",
        ),
    ] = None,
    steps: Annotated[str, typer.Option(metavar="K,K,...", help="Numbers of denoising steps.")] = "1,2,4,8",
    data_format: Annotated[
        DataFormat, typer.Option("--format", help="What to evaluate on; clips are drawn, the others read.")
    ] = DataFormat.CLIPS,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON on stdout.")] = False,
    streets: Annotated[
        int, typer.Option(min=1, help="How many held-out streets, two clips each.", rich_help_panel=CLIPS)
    ] = 8,
    clips: Annotated[
        Path, typer.Option(help="Folder of the clips; drawn at the first use.", rich_help_panel=CLIPS)
    ] = Path("psdiff-evaluation"),
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Choose the thresholds first, on streets of their own.",
            rich_help_panel=CLIPS,
        ),
    ] = False,
    record: Annotated[
        bool,
        typer.Option(
            "--record",
            help="Write scores and thresholds into the bundle's manifest.",
            rich_help_panel=CLIPS,
        ),
    ] = False,
    data: Annotated[
        Path | None, typer.Option(metavar="ROOT", help="Folder of the data set.", rich_help_panel=DATA_SET)
    ] = None,
    gallery_size: Annotated[
        str | None,
        typer.Option(
            metavar="G,G,...",
            help="Images in a gallery (cuhk-sysu): 50, 100, 500, 1000, 2000, 4000. Default: 100.",
            rich_help_panel=DATA_SET,
        ),
    ] = None,
    cross_camera: Annotated[
        bool,
        typer.Option(
            "--cross-camera", help="Search in the other cameras only (prw).", rich_help_panel=DATA_SET
        ),
    ] = False,
    query_mode: Annotated[
        QueryModes,
        typer.Option(
            help="Describe a query by its given box, or by the detection with the largest IoU.",
            rich_help_panel=DATA_SET,
        ),
    ] = QueryModes.GT,
    score_threshold: Annotated[
        float,
        typer.Option(min=0, max=1, help="Search among detections from here.", rich_help_panel=DATA_SET),
    ] = 0.5,
    rank_by: Annotated[
        Rankings,
        typer.Option(help="Cosine, or cosine x detection score (cws).", rich_help_panel=DATA_SET),
    ] = Rankings.COSINE,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.", rich_help_panel=DATA_SET)] = 8,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write report.json and plots here.", rich_help_panel=DATA_SET),
    ] = None,
) -> None:
    """Score a model on held-out synthetic clips, or on a person search set by its published protocol."""
    if data_format is DataFormat.CLIPS:
        if data is not None or out is not None:
            raise UsageError(
                "--data and --out must go with --format cuhk-sysu, prw or posetrack21, got clips"
            )
        _on_clips(model, steps, streets, clips, calibrate=calibrate, record=record, as_json=as_json)
        return
    if calibrate or record:
        raise UsageError(f"--calibrate and --record must go with --format clips, got {data_format}")
    if data is None:
        raise UsageError(f"--data must be the folder of the data set with --format {data_format}, got none")
    if cross_camera and data_format is not DataFormat.PRW:
        raise UsageError(f"--cross-camera must go with --format prw, got {data_format}")
    if gallery_size and data_format is not DataFormat.CUHK_SYSU:
        raise UsageError(f"--gallery-size must go with --format cuhk-sysu, got {data_format}")
    _on_data_set(
        model,
        steps,
        data,
        data_format,
        gallery_sizes=_whole_numbers("--gallery-size", gallery_size or "100"),
        cross_camera=cross_camera,
        query_mode=query_mode,
        score_threshold=score_threshold,
        rank_by=rank_by,
        batch_size=batch_size,
        out=out,
        as_json=as_json,
    )


def _open(model: Path | None, steps: str):  # noqa: ANN202 - its types are imported in the function only
    """Return the detector, its folder and manifest (None for a checkpoint), and the numbers of steps."""
    from ..bundle import load_manifest
    from ..runtime.detector import detector_of, shipped_bundle

    folder = model or shipped_bundle()
    wanted = _whole_numbers("--steps", steps)
    with usage():
        if folder.suffix == ".safetensors":
            from ..models.person_search import load_checkpoint, torch_detector

            manifest, detector = None, torch_detector(load_checkpoint(folder)[0])
        else:
            manifest = load_manifest(folder)
            detector = detector_of(manifest, folder, "onnxruntime")
        for count in wanted:
            detector.detect([], count)
    return detector, folder, manifest, wanted


def _whole_numbers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{name} must be whole numbers with commas between them, got {text}") from None


def _on_clips(
    model: Path | None,
    steps: str,
    streets: int,
    clips: Path,
    *,
    calibrate: bool,
    record: bool,
    as_json: bool,
) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from ..bundle import write_manifest
    from ..training.evaluation import clips as evaluation

    detector, folder, manifest, wanted = _open(model, steps)
    if manifest is None and (calibrate or record):
        raise UsageError(f"--calibrate and --record must go with a bundle, got the checkpoint {folder}")
    settings = evaluation.EvaluationSet(streets=streets)
    with Progress(console=Console(stderr=True)) as bars:

        def images_of(chosen: evaluation.EvaluationSet, name: str) -> list[evaluation.LabelledImage]:
            task = bars.add_task(f"drawing clips for {name}", total=chosen.num_frames)
            paths = evaluation.render_evaluation_set(chosen, clips, lambda: bars.advance(task))
            bars.update(task, completed=chosen.num_frames)
            return evaluation.load_evaluation_set(chosen, paths)

        if manifest and calibrate:
            chosen = evaluation.EvaluationSet(streets=4, seed=evaluation.CALIBRATION_SEED)
            calibration = images_of(chosen, "calibration")
            found = {count: evaluation.calibrate(detector, calibration, count) for count in wanted}
            manifest = evaluation.with_thresholds(manifest, found)
        images = images_of(settings, "evaluation")
        scores = []
        for count in wanted:
            task = bars.add_task(f"K = {count}", total=len(images))
            scores.append(evaluation.evaluate(detector, images, count, lambda task=task: bars.advance(task)))
    if manifest and record:
        measurements = evaluation.with_scores(manifest.measurements, scores, settings)
        manifest = manifest.model_copy(update={"measurements": measurements})
        write_manifest(folder, manifest)
    if as_json:
        result = {"dataset": settings.description(), "scores": [asdict(row) for row in scores]}
        typer.echo(json.dumps(result, indent=2))
        return
    Console().print(evaluation.scores_table(scores, settings))
    if manifest:
        by_steps = [f"{value:.3f} at K = {count}" for count, value in manifest.score_thresholds.items()]
        score = ", ".join(by_steps) or manifest.score_threshold
        typer.echo(f"score threshold {score}; match threshold {manifest.match_threshold}")


def _on_data_set(
    model: Path | None,
    steps: str,
    data: Path,
    data_format: DataFormat,
    *,
    gallery_sizes: Sequence[int],
    cross_camera: bool,
    query_mode: QueryModes,
    score_threshold: float,
    rank_by: Rankings,
    batch_size: int,
    out: Path | None,
    as_json: bool,
) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from ..training.datasets.images import read_image
    from ..training.datasets.load import load_person_search
    from ..training.datasets.schema import DatasetError
    from ..training.evaluation import report as reports
    from ..training.evaluation.person_search import evaluate_person_search

    detector, folder, _, wanted = _open(model, steps)
    with usage():
        load = partial(load_person_search, data_format.value, data, cross_camera=cross_camera)
        dataset, *more = (load(gallery_size=size) for size in gallery_sizes)
    others = {size: other.queries for size, other in zip(gallery_sizes[1:], more, strict=True)}
    scores = []
    try:
        with Progress(console=Console(stderr=True)) as bars:
            for count in wanted:
                task = bars.add_task(f"K = {count}", total=len(dataset.test))
                scores.append(
                    evaluate_person_search(
                        detector,
                        dataset,
                        count,
                        read_image=read_image,
                        query_mode=query_mode.value,
                        score_threshold=score_threshold,
                        rank_by=rank_by.value,
                        other_galleries=others,
                        batch_size=batch_size,
                        on_image=lambda task=task: bars.advance(task),
                    )
                )
    except DatasetError as error:
        raise UsageError(str(error)) from None
    report = reports.Report(folder.name, dataset.name, len(dataset.test), scores)
    if out is not None:
        reports.write_report(report, out)
    if as_json:
        typer.echo(json.dumps(reports.report_as_json(report), indent=2))
    else:
        Console().print(reports.report_table(report))
