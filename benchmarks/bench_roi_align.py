"""Multi-level ROIAlign on the CPU: weighted embedding bags against torchvision, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table

if __name__ == "__main__" and not __package__:
    __package__ = "psdiff.benchmarks"

from ..kernels.reference import multilevel_roi_align
from ..kernels.roi_bags import multilevel_roi_align_bags
from .machine import describe_machine, median_ms, write_result

# Four 640x384 frames with 120 proposals each: one training step of psdiff_mobile.
BATCH, PROPOSALS, CHANNELS, HEIGHT, WIDTH = 4, 120, 96, 384, 640


def main(repeats: int = 9) -> None:
    """Measure both implementations in one run; prints a table and writes benchmarks/results/roi_align.json."""
    rows = [row for ratio in (1, 2) for row in ratio_rows(ratio, repeats)]
    write_result("roi_align", {"machine": describe_machine(), "repeats": repeats, "rows": rows})
    table = Table("implementation", "ratio", "forward ms", "forward + backward ms")
    for row in rows:
        table.add_row(
            row["implementation"],
            str(row["sampling_ratio"]),
            f"{row['forward_ms']:.1f}",
            f"{row['both_ms']:.1f}",
        )
    Console().print(table)


def ratio_rows(ratio: int, repeats: int) -> list[dict[str, Any]]:
    """Times of both implementations at one sampling ratio."""
    features, boxes = inputs()
    rows = []
    for name, pool in (("torchvision", multilevel_roi_align), ("bags", multilevel_roi_align_bags)):

        def forward(pool: Any = pool) -> torch.Tensor:  # noqa: ANN401 - either of the two functions
            return pool(features, boxes, pool_size=7, sampling_ratio=ratio, canonical_size=112.0)

        def both() -> None:
            forward().sum().backward()

        rows.append(
            {
                "implementation": name,
                "sampling_ratio": ratio,
                "forward_ms": median_ms(forward, repeats),
                "both_ms": median_ms(both, repeats),
            }
        )
    return rows


def inputs() -> tuple[list[torch.Tensor], torch.Tensor]:
    """A pyramid as the backbone gives it (channels last) and random boxes in canvas pixels."""
    torch.manual_seed(0)
    features = [
        torch.randn(BATCH, CHANNELS, HEIGHT // s, WIDTH // s)
        .to(memory_format=torch.channels_last)
        .requires_grad_()
        for s in (4, 8, 16, 32)
    ]
    corner = torch.rand(BATCH, PROPOSALS, 2) * 0.8
    boxes = torch.cat([corner, corner + 0.02 + torch.rand(BATCH, PROPOSALS, 2) * 0.5], dim=-1)
    return features, boxes * torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])


if __name__ == "__main__":
    typer.run(main)
