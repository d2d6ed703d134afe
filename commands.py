"""The commands that make and judge a model: train, export, evaluate, synth, demo."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .cli import UsageError, app, reported_errors, usage


@app.command()
@reported_errors()
def train(
    recipe: Annotated[
        Path | None, typer.Option(help="YAML file of the run. Default: that of the shipped model.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, log and drawn frames.")] = Path(
        "psdiff-train"
    ),
    backbone_weights: Annotated[
        str | None,
        typer.Option(
            metavar="imagenet|FILE",
            help="Start the backbone from torchvision's ImageNet weights, or from a .pth file with its names.",
        ),
    ] = None,
    init: Annotated[Path | None, typer.Option(help="Go on from this checkpoint instead.")] = None,
    frames: Annotated[
        Path | None, typer.Option(help="Folder of drawn frames, to share between runs.")
    ] = None,
) -> None:
    """Train on the synthetic street; under torchrun, on several processes."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from .training import train as training
    from .training.recipe import RECIPES, load_recipe

    with usage():
        settings = load_recipe(recipe or RECIPES / "psdiff_mobile.yaml")
    columns = (
        TextColumn("stage {task.fields[stage]}"),
        BarColumn(),
        TextColumn(
            "loss {task.fields[loss]:.2f}  cos {task.fields[cosine]:.2f}  {task.fields[rate]:.1f} images/s"
        ),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not training.is_first_rank()) as bars:
        tasks = [
            bars.add_task("", total=1.0, stage=i, loss=0.0, cosine=0.0, rate=0.0, start=False)
            for i in range(len(settings.stages))
        ]

        def show(progress: training.Progress) -> None:
            task = tasks[progress.stage]
            if not bars.tasks[task].started:
                bars.start_task(task)
            bars.update(
                task,
                completed=progress.share,
                loss=progress.loss,
                cosine=progress.image_cosine,
                rate=progress.images_per_s,
            )

        with usage():
            checkpoint = training.train(
                settings,
                out,
                backbone_weights=backbone_weights,
                init=init,
                frames_folder=frames,
                on_progress=show,
            )
    if training.is_first_rank():
        typer.echo(f"wrote {checkpoint}; next: psdiff export {checkpoint} my-bundle")


@app.command()
@reported_errors()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A .safetensors file written by psdiff train.")],
    out: Annotated[Path, typer.Argument(help="Folder of the bundle; an older bundle there is replaced.")],
    model_id: Annotated[
        str | None, typer.Option(help="Name of the model. Default: the folder's name.")
    ] = None,
) -> None:
    """Turn a checkpoint into a bundle that psdiff run serves."""
    from rich.console import Console

    from .export.export import ExportError, export_bundle

    console = Console(stderr=True)
    with console.status("reading the checkpoint") as status, usage():
        try:
            manifest = export_bundle(
                checkpoint, out, model_id=model_id, on_step=lambda step: status.update(step)
            )
        except ExportError as error:
            raise UsageError(str(error)) from None
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    typer.echo(f"wrote {out}: {manifest.embedding_space}, {len(manifest.files) + 1} files, {size:.1f} MB")


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

    from .bundle import load_manifest, write_manifest
    from .runtime.detector import detector_of, shipped_bundle
    from .training import evaluate as evaluation

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


@app.command()
@reported_errors()
def synth(
    out: Annotated[Path, typer.Argument(help="Folder for the clips and their truth.")],
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another street.")] = 7,
    people: Annotated[int, typer.Option(min=1)] = 10,
    cameras: Annotated[int, typer.Option(min=1)] = 2,
    seconds: Annotated[float, typer.Option(min=0.1)] = 20.0,
    fps: Annotated[float, typer.Option(min=0.1)] = 10.0,
    width: Annotated[int, typer.Option(min=64)] = 640,
    height: Annotated[int, typer.Option(min=64)] = 384,
) -> None:
    """Render clips of a synthetic street, one H.264 file a camera, with ground truth beside it."""
    from rich.console import Console
    from rich.progress import Progress

    from .training.synthetic.clips import write_clip
    from .training.synthetic.street import Street

    out.mkdir(parents=True, exist_ok=True)
    with usage(), Progress(console=Console(stderr=True)) as bars:
        street = Street(
            seed, num_people=people, cameras=cameras, width=width, height=height, duration_s=seconds
        )
        for camera in range(cameras):
            path = out / f"camera{camera + 1}.mp4"
            task = bars.add_task(path.name, total=round(seconds * fps))
            write_clip(street, camera, path, fps=fps, on_frame=lambda task=task: bars.advance(task))
            typer.echo(path)


@app.command()
@reported_errors()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for clips, videos and hits.")] = Path("demo-out"),
    bundle: Annotated[
        Path | None, typer.Option(help="Folder of the model. Default: the one that comes with psdiff.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="K", help="Denoising steps. Default: the bundle's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Another seed, another street.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Length of the clips.")] = None,
) -> None:
    """Draw a street seen by two cameras and find a person of the first in the second."""
    from rich.console import Console

    from . import demo as demonstration

    try:
        demonstration.run_demo(
            out,
            bundle=bundle,
            steps=steps,
            seed=demonstration.DEFAULT_SEED if seed is None else seed,
            duration_s=demonstration.DEFAULT_DURATION_S if seconds is None else seconds,
            console=Console(),
        )
    except demonstration.DemoError as error:
        raise UsageError(str(error)) from None
