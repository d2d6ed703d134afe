"""ROIAlign and dynamic convolution on a GPU: our kernels against PyTorch's operators, eager and compiled.

Every alternative runs inside a CUDA graph that goes round copies of its inputs larger than the L2 cache, so that
neither launches nor warm caches are measured. The bound is the time of the bytes that must move, at the bandwidth
of a copy in the same run. Legend: B images, N boxes an image, M = B*N regions, C channels, D dynamic width.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

if __name__ == "__main__" and not __package__:
    __package__ = "psdiff.benchmarks"

from ..kernels import ops, reference
from .machine import describe_machine, write_result

HEIGHT, WIDTH, CHANNELS = 640, 800, 256
RATIO, CANONICAL = 2, 224.0
COUNTS, BATCHES = (100, 300, 500, 1000), (1, 8)
CONV_SIZES = ((256, 64), (128, 64), (256, 8), (128, 8))
DTYPE = torch.float16

# Rounds of the inputs in one graph, and how often the graph is timed.
LEAST_CALLS, REPEATS = 20, 15

Case = tuple[Tensor, ...]


class Alternative(NamedTuple):
    """One way to compute an operation."""

    name: str
    call: Callable[..., Tensor]


def main(quick: bool = typer.Option(False, help="One batch size and two counts only.")) -> None:
    """Measure on this machine's GPU; prints a table and writes benchmarks/results/kernels.json."""
    if not torch.cuda.is_available() or not ops.has_cuda_kernels():
        typer.echo(f"a CUDA device with our kernels is needed, got: {ops.implementation('cuda')}", err=True)
        raise typer.Exit(1)
    bandwidth = copy_bandwidth()
    counts, batches = (COUNTS[:2], BATCHES[:1]) if quick else (COUNTS, BATCHES)
    rows = [row for batch in batches for count in counts for row in pooling_rows(batch, count)]
    for channels, width in CONV_SIZES:
        rows += [
            row for batch in batches for count in counts for row in conv_rows(batch * count, channels, width)
        ]
    for row in rows:
        row["bound_us"] = row["bytes"] / bandwidth * 1e6
        row["share_of_bound"] = row["bound_us"] / row["us"]
    result = {
        "machine": describe_machine(),
        "gpu": gpu_state(),
        "copy_gb_per_s": bandwidth / 1e9,
        "rows": rows,
    }
    write_result("kernels", result)
    _print(rows, bandwidth)


def pooling_rows(batch: int, count: int) -> list[dict[str, Any]]:
    """ROIAlign of B x N boxes from a pyramid of 256 channels."""
    cases = [_pooling_case(batch, count, seed) for seed in range(_copies(batch * 45e6))]
    tokens_bytes = batch * count * 49 * CHANNELS * cases[0][0].element_size()
    num_bytes = tokens_bytes + touched_bytes(cases[0])
    settings = {"pool_size": 7, "sampling_ratio": RATIO, "canonical_size": CANONICAL}

    def torchvision_levels(*case: Tensor) -> Tensor:
        # As a network without our kernels would: every box on every level, and the right one kept.
        return _every_level(case[:4], case[4])

    def ours(*case: Tensor) -> Tensor:
        return ops.multilevel_roi_align(
            [level.permute(0, 3, 1, 2) for level in case[:4]], case[4], **settings
        )

    return _measured(
        [Alternative("psdiff", ours), Alternative("torchvision, every level", torchvision_levels)],
        cases,
        {"operation": "roi_align", "batch": batch, "boxes": count, "channels": CHANNELS, "bytes": num_bytes},
    )


def conv_rows(regions: int, channels: int, width: int) -> list[dict[str, Any]]:
    """Dynamic convolution of M regions."""
    item = torch.tensor([], dtype=DTYPE).element_size()
    num_bytes = regions * (2 * channels * width + 2 * 49 * channels) * item
    cases = [_conv_case(regions, channels, width, seed) for seed in range(_copies(num_bytes))]
    compiled = torch.compile(_plain_conv, dynamic=False)
    return _measured(
        [
            Alternative("psdiff", lambda *case: ops.dynamic_conv_op(*case, ops.EPSILON)),
            Alternative("PyTorch", _plain_conv),
            Alternative("torch.compile", compiled),
        ],
        cases,
        {
            "operation": "dynamic_conv",
            "regions": regions,
            "channels": channels,
            "width": width,
            "bytes": num_bytes,
        },
    )


def _measured(
    alternatives: Sequence[Alternative], cases: Sequence[Case], about: dict[str, Any]
) -> list[dict[str, Any]]:
    rows = []
    for name, call in alternatives:
        us = graph_us(call, cases)
        rows.append(about | {"implementation": name, "us": us, "gb_per_s": about["bytes"] / us / 1e3})
    for row in rows:
        row["times_ours"] = row["us"] / rows[0]["us"]
    return rows


@torch.inference_mode()
def graph_us(call: Callable[..., Tensor], cases: Sequence[Case]) -> float:
    """Median microseconds of one call, over the cases in turn, replayed as one CUDA graph."""
    calls = math.ceil(LEAST_CALLS / len(cases)) * len(cases)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for case in cases:
            call(*case)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for number in range(calls):
            call(*cases[number % len(cases)])
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(end) / calls)
    return sorted(times)[len(times) // 2]


def copy_bandwidth() -> float:
    """Bytes per second of a copy on the device, read and written, the ceiling of this run."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    us = graph_us(lambda x: target.copy_(x), [(source,)])
    return 2 * source.numel() / us * 1e6


def touched_bytes(case: Case) -> int:
    """Bytes of the feature cells that any sample of these boxes reads, each counted once."""
    sizes = [(level.shape[1], level.shape[2]) for level in case[:4]]
    ones = torch.ones(case[4].shape[0] * case[4].shape[1], 49, 1)
    grads = reference.multilevel_roi_align_grad(
        ones, case[4].cpu(), sizes, sampling_ratio=RATIO, canonical_size=CANONICAL
    )
    return sum(int((grad != 0).sum()) for grad in grads) * CHANNELS * case[0].element_size()


def gpu_state() -> dict[str, str]:
    """Name, driver, clocks and power limit, as nvidia-smi gives them."""
    fields = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
    said = subprocess.run(
        ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    return dict(zip(fields, (value.strip() for value in said.stdout.splitlines()[0].split(",")), strict=True))


def _copies(num_bytes: float) -> int:
    """So many cases that together they are twice the largest L2 cache, 60 MB, or more."""
    return max(2, math.ceil(2 * 60e6 / num_bytes))


def _pooling_case(batch: int, count: int, seed: int) -> Case:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    options = {"generator": generator, "device": "cuda"}
    levels = [
        torch.randn(batch, HEIGHT // s, WIDTH // s, CHANNELS, dtype=DTYPE, **options) for s in (4, 8, 16, 32)
    ]
    corner = torch.rand(batch, count, 2, **options) * 0.8
    # People are upright: a third as wide as high, from a tenth of the frame to most of it.
    height = 0.1 + 0.7 * torch.rand(batch, count, 1, **options) ** 2
    size = torch.cat([height / 3, height], dim=-1)
    boxes = torch.cat([corner, corner + size], dim=-1) * torch.tensor([WIDTH, HEIGHT] * 2, device="cuda")
    return (*levels, boxes.contiguous())


def _conv_case(regions: int, channels: int, width: int, seed: int) -> Case:
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

    tokens = values(regions, 49, channels, dtype=DTYPE)
    params = 0.06 * values(regions, 2 * channels * width, dtype=DTYPE)
    return tokens, params, values(width), values(width), values(channels), values(channels)


def _plain_conv(
    tokens: Tensor, params: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> Tensor:
    half = (part.to(tokens.dtype) for part in (weight1, bias1, weight2, bias2))
    weight1, bias1, weight2, bias2 = half
    return reference.dynamic_conv(tokens, params, (weight1, bias1), (weight2, bias2))


def _every_level(maps: Sequence[Tensor], boxes_xyxy: Tensor) -> Tensor:
    """ROIAlign by torchvision without reading sizes back to the host, which a CUDA graph forbids."""
    from torchvision.ops import roi_align

    batch, count = boxes_xyxy.shape[:2]
    image = torch.arange(batch, device=boxes_xyxy.device).repeat_interleave(count)
    rois = torch.cat([image[:, None].float(), boxes_xyxy.flatten(0, 1)], dim=1)
    chosen = reference.pyramid_levels(rois[:, 1:], CANONICAL)
    pooled = torch.zeros((), device=boxes_xyxy.device)
    for level, feature in enumerate(maps):
        # torchvision wants one type for maps and boxes; half-precision boxes would miss by cells.
        channels_first = feature.permute(0, 3, 1, 2).float()
        region = roi_align(channels_first, rois, 7, 0.25 / 2**level, RATIO, aligned=True)
        pooled = torch.where((chosen == level)[:, None, None, None], region, pooled)
    return pooled.flatten(2).transpose(1, 2).to(maps[0].dtype)


def _print(rows: Sequence[dict[str, Any]], bandwidth: float) -> None:
    table = Table(
        "operation", "size", "implementation", "us", "GB/s", "share of bound", "x ours",
        title=f"bound: {bandwidth / 1e9:.0f} GB/s of a copy in this run",
    )  # fmt: skip
    for row in rows:
        pooled = row["operation"] == "roi_align"
        size = (
            f"B {row['batch']} N {row['boxes']}"
            if pooled
            else f"M {row['regions']} C {row['channels']} D {row['width']}"
        )
        numbers = (
            f"{row['us']:.1f}",
            f"{row['gb_per_s']:.0f}",
            f"{row['share_of_bound']:.0%}",
            f"{row['times_ours']:.2f}",
        )
        table.add_row(row["operation"], size, row["implementation"], *numbers)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
