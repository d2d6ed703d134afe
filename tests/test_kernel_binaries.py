"""What the compiler made of the kernels: registers, shared memory and instructions, read off the machine code."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from kernels_on_host import CSRC

# Orin, H200 and Blackwell: the oldest instruction set that is built, the widest and the newest.
ARCHITECTURES = ["sm_87", "sm_90", "sm_120"]


def disassembler():
    """Triton's wheel, which comes with PyTorch, brings one."""
    triton = pytest.importorskip("triton", reason="triton is not installed; its wheel holds cuobjdump")
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not path.is_file():
        pytest.skip(f"cuobjdump is missing: {path}")
    return path


@pytest.fixture(scope="module", params=ARCHITECTURES)
def binary(request, tmp_path_factory):
    """(cubin, what ptxas says of each kernel) for one architecture."""
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is missing: install a CUDA toolkit from 13.0")
    cubin = tmp_path_factory.mktemp("cubin") / f"{request.param}.cubin"
    command = ["nvcc", "-std=c++17", "-O3", f"-arch={request.param}", "-cubin", "-Xptxas", "-v"]
    done = subprocess.run(
        [*command, "-I", CSRC, CSRC / "entries.cu", "-o", cubin], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    reports = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes "
        r"spill loads.*?Used (\d+) registers(.*?)(?=\n|$)",
        done.stderr,
        re.DOTALL,
    )
    return cubin, {name: (list(map(int, numbers)), rest) for name, *numbers, rest in reports}


def test_no_kernel_spills_or_needs_more_shared_memory_than_every_gpu_has(binary):
    _, reports = binary
    assert len(reports) >= 36
    for name, ((stack, stores, loads, registers), rest) in reports.items():
        shared = re.search(r"(\d+) bytes smem", rest)
        assert (stack, stores, loads) == (0, 0, 0), f"{name} spills"
        assert registers <= 255
        assert shared is None or int(shared[1]) <= 48 * 1024, f"{name} needs {shared[1]} bytes"


def instructions(cubin, kernel):
    listing = subprocess.run(
        [disassembler(), "-sass", "-fun", kernel, cubin],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", listing.stdout, re.MULTILINE)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("size", ["c128_d8", "c256_d64"])
def test_dynamic_conv_uses_tensor_cores_and_copies_beside_them(binary, dtype, size):
    names = instructions(binary[0], f"psdiff_dynamic_conv_{dtype}_{size}")
    assert sum(name.startswith("HMMA") for name in names) >= 16
    assert any(name.startswith("LDGSTS") and "128" in name for name in names)
    assert any(name.startswith("LDSM") for name in names)
    assert not any(name.startswith(("LDL", "STL")) for name in names)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_roi_align_moves_16_bytes_at_a_time(binary, dtype):
    names = instructions(binary[0], f"psdiff_roi_align_{dtype}_r2")
    feature_loads = [name for name in names if name.startswith("LDG") and "CONSTANT" in name]
    assert sum("128" in name for name in feature_loads) >= 16
    assert any(name.startswith("STG") and "128" in name for name in names)
    assert not any(name.startswith(("LDL", "STL")) for name in names)
