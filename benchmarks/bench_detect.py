"""Milliseconds per frame of detection, stage by stage: model x steps x backend, beside Faster R-CNN.

One run measures everything, so that rows may be compared as ratios; the machine's own peaks stand in the result.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torchvision.models.detection import fasterrcnn_resnet50_fpn

if __name__ == "__main__" and not __package__:
    __package__ = "psdiff.benchmarks"

from ..export.export import export_bundle
from ..models.config import load_preset
from ..models.detector import Detector
from ..models.person_search import PSDiff, TorchEngine, load_checkpoint, sampler_settings, save_checkpoint
from ..models.preprocess import Letterbox, seeded_noise
from ..models.sampling import Engine, SamplerSettings, denoise
from ..runtime.detector import OnnxEngine, shipped_bundle
from .machine import describe_machine, measured_peaks, median_ms, write_result

PRESETS = ("psdiff_r50", "psdiff_mobile")
STEPS = (1, 2, 4, 8)
FRAME_SIZE = (1080, 1920)


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls per row, of which the median counts.")] = 9,
    presets: Annotated[str, typer.Option(help="Comma-separated presets.")] = ",".join(PRESETS),
    name: Annotated[str, typer.Option(help="Name of the JSON file in benchmarks/results.")] = "detect",
) -> None:
    """Measure detection on this machine; prints a table and writes benchmarks/results/<name>.json."""
    chosen = presets.split(",")
    rows: list[dict[str, Any]] = []
    peaks = measured_peaks()
    with tempfile.TemporaryDirectory() as temporary, Progress(console=Console(stderr=True)) as bars:
        task = bars.add_task("measuring", total=len(chosen) * (2 * len(STEPS) + 1))
        for preset in chosen:
            for row in preset_rows(preset, Path(temporary), repeats):
                rows.append(row)
                bars.advance(task)
    result = {
        "machine": describe_machine(),
        "peaks": peaks,
        "frame": FRAME_SIZE,
        "repeats": repeats,
        "rows": rows,
    }
    path = write_result(name, result)
    Console().print(table(rows, peaks))
    typer.echo(path)


def preset_rows(preset: str, folder: Path, repeats: int) -> Sequence[dict[str, Any]]:
    """All rows of one preset; the slow models are called fewer times."""
    bundle = bundle_of(preset, folder)
    model, _ = load_checkpoint(bundle / "weights.safetensors")
    settings = sampler_settings(model.config)
    repeats = repeats if preset == "psdiff_mobile" else max(2, repeats // 3)
    frame = np.random.default_rng(0).integers(0, 255, (*FRAME_SIZE, 3), dtype=np.uint8)
    engines: dict[str, Engine] = {"onnxruntime": OnnxEngine(bundle), "torch eager": TorchEngine(model)}
    rows = [
        {"model": preset, "backend": backend, "input": [settings.height, settings.width], "steps": steps}
        | stage_times(engine, settings, frame, steps, repeats)
        for backend, engine in engines.items()
        for steps in STEPS
    ]
    return [*rows, faster_rcnn_row(settings, repeats)]


def bundle_of(preset: str, folder: Path) -> Path:
    """The shipped bundle where it has this preset; otherwise one with random weights."""
    if preset == "psdiff_mobile" and shipped_bundle().is_dir():
        return shipped_bundle()
    torch.manual_seed(0)
    checkpoint = folder / f"{preset}.safetensors"
    save_checkpoint(PSDiff(load_preset(preset)), checkpoint, {"weights": "random"})
    export_bundle(checkpoint, folder / preset, precisions=["fp32"])
    return folder / preset


def stage_times(
    engine: Engine, settings: SamplerSettings, frame: np.ndarray, steps: int, repeats: int
) -> dict[str, float]:
    """Median milliseconds of each stage and of the whole `detect` call, one frame at a time."""
    letterbox = Letterbox(frame.shape[1], frame.shape[0], settings.width, settings.height)
    image = letterbox.image(frame)[None]
    boxes_t, emb_t = seeded_noise(0, settings.num_proposals, settings.embedding_dim)
    features = engine.backbone(image)
    grid = settings.timesteps[steps]
    detector = Detector(engine, settings)
    calls: dict[str, Callable[[], object]] = {
        "preprocess_ms": lambda: letterbox.image(frame),
        "backbone_ms": lambda: engine.backbone(image),
        "steps_ms": lambda: denoise(engine, features, boxes_t[None], emb_t[None], grid),
        "total_ms": lambda: detector.detect([frame], steps),
    }
    times = {name: median_ms(call, repeats) for name, call in calls.items()}
    return {**times, "frames_per_s": 1000 / times["total_ms"]}


def faster_rcnn_row(settings: SamplerSettings, repeats: int) -> dict[str, Any]:
    """Torchvision's fasterrcnn_resnet50_fpn on a canvas of the same size, random weights."""
    net = fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=settings.height, max_size=settings.width
    ).eval()
    image = torch.rand(3, settings.height, settings.width)
    with torch.inference_mode():
        total_ms = median_ms(lambda: net([image]), repeats)
    return {
        "model": "fasterrcnn_resnet50_fpn",
        "backend": "torch eager",
        "input": [settings.height, settings.width],
        "total_ms": total_ms,
        "frames_per_s": 1000 / total_ms,
    }


def table(rows: Sequence[dict[str, Any]], peaks: dict[str, float]) -> Table:
    """The rows as people read them."""
    title = f"matmul {peaks['matmul_gflops']:.0f} GFLOP/s, conv {peaks['conv_gflops']:.0f} GFLOP/s"
    result = Table(title=title, title_justify="left")
    for heading in (
        "model",
        "input",
        "backend",
        "K",
        "preprocess",
        "backbone",
        "K steps",
        "total ms",
        "frames/s",
    ):
        result.add_column(heading, justify="left" if heading in ("model", "backend") else "right")
    for row in rows:
        times = (
            row.get(key) for key in ("preprocess_ms", "backbone_ms", "steps_ms", "total_ms", "frames_per_s")
        )
        height, width = row["input"]
        cells = ("" if value is None else f"{value:.1f}" for value in times)
        result.add_row(row["model"], f"{width}x{height}", row["backend"], str(row.get("steps", "")), *cells)
    return result


if __name__ == "__main__":
    typer.run(main)
