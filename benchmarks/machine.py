"""What a measurement was made on, and how fast that machine multiplies: shared by all benchmarks."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchvision", "onnxruntime", "numpy")


def describe_machine() -> dict[str, Any]:
    """CPU, cores, versions and commit, as plain JSON values."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "commit": _commit(),
        "threads": torch.get_num_threads(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def median_ms(call: Callable[[], object], repeats: int, warmup: int = 1) -> float:
    """Median wall-clock milliseconds of a call."""
    for _ in range(warmup):
        call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


@torch.inference_mode()
def measured_peaks(repeats: int = 7) -> dict[str, float]:
    """GFLOP/s of a 1536^3 matrix product and of a 3x3 convolution, the ceiling for everything else."""
    matrix = torch.randn(1536, 1536)
    image = torch.randn(1, 128, 96, 160).to(memory_format=torch.channels_last)
    conv = torch.nn.Conv2d(128, 128, 3, padding=1).to(memory_format=torch.channels_last)
    matmul_ms = median_ms(lambda: matrix @ matrix, repeats)
    conv_ms = median_ms(lambda: conv(image), repeats)
    return {
        "matmul_gflops": 2 * 1536**3 / matmul_ms / 1e6,
        "conv_gflops": 2 * 128 * 128 * 9 * 96 * 160 / conv_ms / 1e6,
    }


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write benchmarks/results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _commit() -> str:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout.strip() or "unknown"
