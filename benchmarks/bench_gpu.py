"""PSDiff on a GPU: milliseconds per batch of the backbone and of K steps, each replayed as one CUDA graph.

With our kernels and, where a step can be captured without them, beside PyTorch's operators. Random weights: the
time does not depend on them. Legend: B images, K steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

if __name__ == "__main__" and not __package__:
    __package__ = "psdiff.benchmarks"

from ..kernels import ops
from ..models.config import load_preset
from ..models.person_search import PSDiff
from ..models.sampling import sampling_timesteps
from .bench_kernels import gpu_state
from .machine import describe_machine, write_result

STEPS = (1, 2, 4, 8)
BATCHES = (1, 8)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
REPEATS = 30


def main(
    presets: Annotated[str, typer.Option(metavar="NAME,...")] = "psdiff_mobile,psdiff_r50",
    dtype: Annotated[str, typer.Option(help="fp16 or bf16, by autocast.")] = "fp16",
) -> None:
    """Measure on this machine's GPU; prints a table and writes benchmarks/results/gpu.json."""
    if not torch.cuda.is_available() or not ops.has_cuda_kernels():
        typer.echo(f"a CUDA device with our kernels is needed, got: {ops.implementation('cuda')}", err=True)
        raise typer.Exit(1)
    rows = [
        row for preset in presets.split(",") for batch in BATCHES for row in preset_rows(preset, batch, dtype)
    ]
    write_result("gpu", {"machine": describe_machine(), "gpu": gpu_state(), "dtype": dtype, "rows": rows})
    table = Table("model", "batch", "part", "ms per batch", "images/s")
    for row in rows:
        rate = 1000 * row["batch"] / row["ms"]
        table.add_row(row["preset"], str(row["batch"]), row["part"], f"{row['ms']:.2f}", f"{rate:.0f}")
    Console().print(table)


@torch.inference_mode()
def preset_rows(preset: str, batch: int, dtype: str) -> list[dict[str, Any]]:
    """Times of one network at one batch size."""
    config = load_preset(preset)
    model = PSDiff(config).eval().cuda().to(memory_format=torch.channels_last)
    images = torch.randint(0, 256, (batch, config.height, config.width, 3), dtype=torch.uint8, device="cuda")
    boxes_t = torch.randn(batch, config.num_proposals, 4, device="cuda")
    emb_t = torch.randn(batch, config.num_proposals, config.embedding_dim, device="cuda")

    def backbone() -> list[Tensor]:
        return list(model.backbone(images))

    with torch.autocast("cuda", DTYPES[dtype], cache_enabled=False):
        features = backbone()
        rows = [{"part": "backbone", "ms": graph_ms(backbone)}]
        for steps in STEPS:
            times = _times(sampling_timesteps(steps, config.num_timesteps, config.grid_power), batch)
            ms = graph_ms(lambda times=times: _steps(model, features, boxes_t, emb_t, times))
            rows.append({"part": f"K = {steps}", "ms": ms})
    return [{"preset": preset, "batch": batch, **row} for row in rows]


def _times(grid: list[int], batch: int) -> list[tuple[Tensor, Tensor]]:
    """(t, t_next) of every step, on the device before anything is captured."""
    pairs = zip(grid, [*grid[1:], -1], strict=True)
    return [tuple(torch.full((batch,), t, device="cuda") for t in pair) for pair in pairs]  # pyright: ignore


def _steps(
    model: PSDiff, features: list[Tensor], boxes_t: Tensor, emb_t: Tensor, times: list[tuple[Tensor, Tensor]]
) -> Tensor:
    scores = boxes_t
    for t, t_next in times:
        boxes_t, emb_t, _, scores, _ = model.denoise_step(features, boxes_t, emb_t, t, t_next)
    return scores


def graph_ms(call: Callable[[], object]) -> float:
    """Median milliseconds of a call captured as one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


if __name__ == "__main__":
    typer.run(main)
