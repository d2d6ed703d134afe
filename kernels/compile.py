"""Compile csrc/entries.cu to a cubin: by NVRTC, which needs neither a GPU nor a toolkit, or by nvcc.

A cubin serves one architecture. `python -m psdiff.kernels.compile --arch sm_87 --out FOLDER` writes one to ship;
cached_cubin compiles where the kernels run, once. Legend: C channels and D width of a dynamic convolution.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TypeAlias

import typer

CSRC = Path(__file__).parent / "csrc"
ENTRIES = "entries.cu"

Size: TypeAlias = tuple[int, int] | None
"""(C, D) of the one dynamic convolution to build; None builds those that csrc/entries.cu lists."""

NVRTC_OPTIONS = ("-std=c++17",)
NVCC_OPTIONS = ("-std=c++17", "-O3")

LOG_CHARACTERS = 2000

EXAMPLES = """
[bold]Examples[/bold]

python -m psdiff.kernels.compile --arch sm_87 --out cubins/

python -m psdiff.kernels.compile --arch sm_87 --out cubins/ --channels 64 --width 16

[bold]Architectures[/bold]

sm_80: A100. sm_87: Jetson Orin. sm_89: L4. sm_90: H100, H200. sm_110: Jetson Thor.

[bold]On the device[/bold]

Kernels(open_driver(), cubin=Path("cubins/psdiff_sm_87.cubin")) of psdiff.kernels.launch loads the file.

A driver may refuse the cubin of a newer CUDA: JetPack 6 has CUDA 12.6, so compile for it with NVRTC or nvcc 12.
"""


class CompileError(RuntimeError):
    """The kernels cannot be compiled: no compiler, an architecture it does not know, or what it says of the text."""


def compile_nvrtc(arch: str, size: Size = None) -> bytes:
    """Compile by NVRTC (cuda-python); returns the cubin. arch: as sm_87. Raises CompileError."""
    nvrtc = _nvrtc()
    headers = {path.name: path.read_bytes() for path in _headers()}
    source = (CSRC / ENTRIES).read_bytes()
    names = [name.encode() for name in headers]
    program = _check(
        nvrtc.nvrtcCreateProgram(source, ENTRIES.encode(), len(headers), list(headers.values()), names)
    )
    try:
        options = [option.encode() for option in (f"-arch={arch}", *NVRTC_OPTIONS, *_defines(size))]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
            _check(nvrtc.nvrtcGetProgramLog(program, log))
            raise CompileError(_explain(arch, log.rstrip(b"\0").decode()))
        cubin = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
        _check(nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def compile_nvcc(arch: str, size: Size = None) -> bytes:
    """Compile by the nvcc on PATH; returns the cubin. arch: as sm_87. Raises CompileError."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise CompileError("nvcc must be on PATH, got none: install a CUDA toolkit, or leave out --nvcc")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [nvcc, *NVCC_OPTIONS, f"-arch={arch}", "-cubin", *_defines(size), "-I", CSRC, "-o", cubin]
        done = subprocess.run([*command, CSRC / ENTRIES], capture_output=True, text=True)
        if done.returncode:
            raise CompileError(_explain(arch, done.stderr))
        return cubin.read_bytes()


def cached_cubin(arch: str, folder: Path, size: Size = None) -> bytes:
    """Read the cubin for this text, architecture, size and NVRTC from a folder; the first time, compile it.

    Raises CompileError, and OSError where the folder cannot be written.
    """
    path = folder / f"{cubin_name(arch, size)[: -len('.cubin')]}_{_fingerprint(arch, size)}.cubin"
    if path.exists():
        return path.read_bytes()
    cubin = compile_nvrtc(arch, size)
    write_whole(path, cubin)
    return cubin


def cache_folder() -> Path:
    """Where cubins are kept unless told otherwise: psdiff under XDG_CACHE_HOME, or under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "psdiff"


def cubin_name(arch: str, size: Size = None) -> str:
    """Name the file of a cubin: psdiff_sm_87.cubin, or psdiff_sm_87_c64_d16.cubin."""
    return f"psdiff_{arch}{'_c{}_d{}'.format(*size) if size else ''}.cubin"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that other processes see whole or not at all, even if the power fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _headers() -> list[Path]:
    return sorted(CSRC.glob("*.cuh"))


def _defines(size: Size) -> tuple[str, ...]:
    return (f"-DPSD_CHANNELS={size[0]}", f"-DPSD_WIDTH={size[1]}") if size else ()


def _fingerprint(arch: str, size: Size) -> str:
    digest = hashlib.sha256(repr((arch, NVRTC_OPTIONS, size, _check(_nvrtc().nvrtcVersion()))).encode())
    for path in (*_headers(), CSRC / ENTRIES):
        text = path.read_bytes()
        digest.update(f"{path.name} {len(text)}\n".encode() + text)
    return digest.hexdigest()[:16]


def _nvrtc() -> ModuleType:
    try:
        from cuda.bindings import nvrtc  # pyright: ignore[reportAttributeAccessIssue, reportMissingImports]

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise CompileError(
            f"NVRTC must be installed to compile kernels, got {error}: pip install 'psdiff[cuda]', or ship a cubin "
            "that python -m psdiff.kernels.compile wrote elsewhere"
        ) from error
    return nvrtc


def _check(result: tuple[Any, ...]) -> Any:  # noqa: ANN401 - what the call gives
    """Return the values that a call of NVRTC gave; raises CompileError by its status."""
    status, *values = result
    if status.value:
        raise CompileError(f"NVRTC must compile the kernels, got {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


def _explain(arch: str, log: str) -> str:
    if re.search("gpu[- ]architecture", log):
        return (
            f"arch must be one that this compiler knows, as sm_87, got {arch}: {log.strip()[:LOG_CHARACTERS]}"
        )
    return f"csrc must compile for {arch}, got:\n{log.strip()[:LOG_CHARACTERS]}"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.command(epilog=EXAMPLES)
def main(
    arch: Annotated[str, typer.Option(help="Architecture of the GPU, as sm_87.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the cubin; made if missing.", show_default=False)],
    nvcc: Annotated[bool, typer.Option("--nvcc", help="Compile by the nvcc on PATH, not by NVRTC.")] = False,
    channels: Annotated[
        int | None,
        typer.Option(help="C of the one dynamic convolution to build.", show_default="the shipped sizes"),
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="D of that convolution.", show_default="the shipped sizes")
    ] = None,
) -> None:
    """Compile the kernels for devices without a compiler; needs no GPU."""
    if not re.fullmatch(r"sm_\d+[a-z]?", arch):
        raise typer.BadParameter(f"--arch must be sm_ and a number, as sm_87, got {arch}")
    if (channels is None) != (width is None):
        raise typer.BadParameter("--channels and --width must be given together")
    size = (channels, width) if channels is not None and width is not None else None
    try:
        cubin = compile_nvcc(arch, size) if nvcc else compile_nvrtc(arch, size)
        path = out / cubin_name(arch, size)
        write_whole(path, cubin)
    except (CompileError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{path}: {len(cubin)} bytes for {arch}")


if __name__ == "__main__":
    app()
