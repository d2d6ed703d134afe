"""psdiff doctor."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from ..cli import FAILED, app


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    part: str
    state: str
    """ok, absent (an option that is not installed), or broken."""
    detail: str


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON on stdout.")] = False,
) -> None:
    """Say what this machine can run: libraries, devices, and which implementation of the kernels.

    Ends with 1 where something that is installed does not work.
    """
    findings = examine()
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print(findings)
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(FAILED)


def examine() -> list[Finding]:
    """Look at every part, in the order in which a frame meets them."""
    parts: list[tuple[str, Callable[[], str]]] = [
        ("machine", _machine),
        ("video decoding", _decoding),
        ("shipped model", _shipped_model),
        ("onnxruntime", _onnxruntime),
        ("PyTorch", _torch),
        ("kernels on the CPU", lambda: _kernels("cpu")),
        ("kernels on CUDA", lambda: _kernels("cuda")),
        ("CUDA compiler", _nvcc),
        ("CUDA driver from Python", lambda: _version("cuda-bindings")),
        ("TensorRT", lambda: _version("tensorrt")),
    ]
    findings = [_examined(part, look) for part, look in parts]
    after = 1 + next(i for i, finding in enumerate(findings) if finding.part == "video decoding")
    return [*findings[:after], *_decoders(findings[after - 1]), *findings[after:]]


class _AbsentError(Exception):
    """An optional part is not installed; the message says how to get it."""


def _examined(part: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(part, "ok", look())
    except (_AbsentError, PackageNotFoundError, ModuleNotFoundError) as absence:
        return Finding(part, "absent", str(absence))
    # Whatever else a broken installation may raise, the rest of the report is still wanted.
    except Exception as error:
        return Finding(part, "broken", f"{type(error).__name__}: {error}")


def _machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"


def _decoding() -> str:
    libraries = import_module("av").library_versions
    return f"PyAV {version('av')}, libavcodec {'.'.join(map(str, libraries['libavcodec']))}"


def _decoders(library: Finding) -> list[Finding]:
    """Every decoder of live cameras, best first, and why it is or is not usable here."""
    if library.state != "ok":
        return []
    from ..runtime.decoders import probe_decoders

    return [
        Finding(f"decoder {found.name}", "ok" if found.is_usable else "absent", found.reason)
        for found in probe_decoders()
    ]


def _shipped_model() -> str:
    from ..bundle import load_manifest
    from ..runtime.detector import shipped_bundle

    manifest = load_manifest(shipped_bundle())
    return f"{manifest.model_id}, {manifest.width}x{manifest.height}"


def _onnxruntime() -> str:
    runtime = import_module("onnxruntime")
    return f"{runtime.__version__}: {', '.join(runtime.get_available_providers())}"


def _torch() -> str:
    torch = import_module("torch")
    if not torch.cuda.is_available():
        return f"{torch.__version__}, no CUDA device"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{torch.__version__}, {', '.join(names)}"


def _kernels(device: str) -> str:
    import_module("torch")
    ops = import_module("..kernels.ops", __package__)
    if device == "cuda" and not ops.has_cuda_kernels():
        raise _AbsentError(ops.implementation(device))
    return ops.implementation(device)


def _nvcc() -> str:
    if shutil.which("nvcc") is None:
        raise _AbsentError("nvcc is not on the PATH; only building the kernels needs it")
    said = subprocess.run(
        ["nvcc", "--version"], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    return said.strip().splitlines()[-1]


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        raise _AbsentError(f"{distribution} is not installed") from None


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    colours = {"ok": "green", "absent": "yellow", "broken": "red"}
    table = Table("part", "state", "what was found", title="psdiff doctor")
    for finding in findings:
        table.add_row(finding.part, f"[{colours[finding.state]}]{finding.state}[/]", finding.detail)
    Console().print(table)
