"""The R50 model on a CPU, against what the CPU can do: backbone over conv peak, and what eight steps cost beside one.

All engines and the machine's own peak are measured in turn, a round after the other, with the same number of
threads. Of each quantity, the peak's too, the best round counts: what another process takes away is no property of
this one. The medians stand in the result beside it. Eight steps over one is the median of the rounds' own ratios, the
two being measured one after the other. FLOPs are those of convolutions and matrix products in PyTorch's
graph, a multiplication and its addition being two. Weights are random: they cost what trained ones do.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import rich.progress
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

if __name__ == "__main__" and not __package__:
    __package__ = "psdiff.benchmarks"

from ..models.detector import Detector
from ..models.person_search import PSDiff, TorchEngine, load_checkpoint, sampler_settings
from ..models.sampling import Engine
from ..runtime.detector import OnnxEngine
from ..runtime.openvino_engine import OpenVinoEngine
from .bench_detect import FRAME_SIZE, STEPS, bundle_of
from .machine import describe_machine, measured_peaks, write_result

PRESET = "psdiff_r50"
# As Linux names them: without one of these OpenVINO computes in float32 whatever it is asked.
BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, the best of which counts.")] = 8,
    threads: Annotated[int | None, typer.Option(min=1, help="Of all engines [default: one a core].")] = None,
    eager: Annotated[bool, typer.Option(help="Measure PyTorch, too.")] = True,
    name: Annotated[str, typer.Option(help="Name of the JSON file in benchmarks/results.")] = "r50",
) -> None:
    """Measure psdiff_r50 at 1344x768; prints a table and writes benchmarks/results/<name>.json."""
    torch.set_num_threads(threads or os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(Path(temporary), rounds, torch.get_num_threads(), with_eager=eager)
    path = write_result(name, result)
    Console().print(table(result))
    typer.echo(path)


def measure(folder: Path, rounds: int, threads: int, *, with_eager: bool) -> dict[str, Any]:
    """Rows of all engines, as JSON values."""
    bundle = bundle_of(PRESET, folder)
    model, _ = load_checkpoint(bundle / "weights.safetensors")
    engines: dict[str, Engine] = {
        "onnxruntime": OnnxEngine(bundle, threads),
        "openvino": OpenVinoEngine(bundle, threads),
        "openvino-bf16": OpenVinoEngine(bundle, threads, "bf16"),
    }
    if with_eager:
        engines["torch eager"] = TorchEngine(model)
    calls = {backend: _calls(engine, model) for backend, engine in engines.items()}
    peaks: list[dict[str, float]] = []
    times: dict[str, list[dict[str, float]]] = {backend: [] for backend in engines}
    for _ in rich.progress.track(range(rounds + 1), "measuring", console=Console(stderr=True)):
        for backend, own in calls.items():
            peaks.append(measured_peaks(repeats=3))
            times[backend].append({part: _milliseconds(call) for part, call in own.items()})
    peak = {key: max(one[key] for one in peaks) for key in peaks[0]}
    gflop = backbone_gflop(model)
    # The first round also pays for memory that the later ones find there.
    rows = [row(backend, own[1:], gflop, peak["conv_gflops"]) for backend, own in times.items()]
    return {
        "machine": describe_machine(),
        "bf16_instructions": has_bf16(),
        "peaks": peak,
        "preset": PRESET,
        "backbone_gflop": gflop,
        "rounds": rounds,
        "rows": rows,
    }


def _calls(engine: Engine, model: PSDiff) -> dict[str, Callable[[], object]]:
    settings = sampler_settings(model.config)
    frame = np.random.default_rng(0).integers(0, 255, (*FRAME_SIZE, 3), dtype=np.uint8)
    canvas = np.zeros((1, settings.height, settings.width, 3), np.uint8)
    detector = Detector(engine, settings)

    def total(steps: int) -> Callable[[], object]:
        return lambda: detector.detect([frame], steps)

    # The smallest and the largest K side by side: their ratio is to see the same load.
    middle = {f"k{steps}": total(steps) for steps in STEPS[1:-1]}
    ends = {f"k{steps}": total(steps) for steps in (STEPS[0], STEPS[-1])}
    return {"backbone": lambda: engine.backbone(canvas), **middle, **ends}


def _milliseconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - began)


def row(backend: str, rounds: list[dict[str, float]], gflop: float, conv_gflops: float) -> dict[str, Any]:
    """What one engine takes at best, and what that is compared with."""
    best = {part: min(one[part] for one in rounds) for part in rounds[0]}
    gflops = 1000 * gflop / best["backbone"]
    ratios = sorted(one["k8"] / one["k1"] for one in rounds)
    return {
        "backend": backend,
        "backbone_ms": best["backbone"],
        "backbone_gflops": gflops,
        "conv_peak_share": gflops / conv_gflops,
        "total_ms": {steps: best[f"k{steps}"] for steps in STEPS},
        "k8_over_k1": statistics.median(ratios),
        "k8_over_k1_range": [ratios[0], ratios[-1]],
        "median_ms": {part: statistics.median(one[part] for one in rounds) for part in best},
    }


def backbone_gflop(model: PSDiff) -> float:
    """GFLOP of backbone and pyramid for one canvas."""
    canvas = torch.zeros(1, model.config.height, model.config.width, 3, dtype=torch.uint8)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.backbone(canvas)
    return counter.get_total_flops() / 1e9


def has_bf16() -> bool:
    """Whether the processor multiplies in bfloat16; False where the system does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    return not words.isdisjoint(BF16_FLAGS)


def table(result: Mapping[str, Any]) -> Table:
    """The rows as people read them."""
    title = (
        f"{result['preset']}, ms, {result['machine']['threads']} threads, conv {result['peaks']['conv_gflops']:.0f} "
        f"GFLOP/s, backbone {result['backbone_gflop']:.0f} GFLOP"
    )
    shown = Table("backend", title=title, title_justify="left")
    for heading in ("backbone", "of peak", *(f"K={steps}" for steps in STEPS), "K8/K1"):
        shown.add_column(heading, justify="right")
    for each in result["rows"]:
        totals = (f"{ms:.0f}" for ms in each["total_ms"].values())
        share = f"{each['conv_peak_share']:.0%}"
        least, most = each["k8_over_k1_range"]
        ratio = f"{each['k8_over_k1']:.2f} ({least:.2f}-{most:.2f})"
        shown.add_row(each["backend"], f"{each['backbone_ms']:.0f}", share, *totals, ratio)
    return shown


if __name__ == "__main__":
    typer.run(main)
