"""Map the repository root to the package psdiff, and build the CUDA kernels where PSDIFF_CUDA=1 asks for them.

Metadata and tool settings stand in pyproject.toml. The kernels need nvcc and the installed PyTorch:
PSDIFF_CUDA=1 pip install --no-build-isolation -e .
"""

import os
import subprocess
from pathlib import Path

from setuptools import setup

PARTS = [
    "benchmarks",
    "commands",
    "export",
    "kernels",
    "models",
    "runtime",
    "runtime.soak",
    "training",
    "training.city",
    "training.datasets",
    "training.evaluation",
    "training.synthetic",
    "training.teacher",
]

# A100; A10, RTX 30; Orin; L4, RTX 40; H100, H200; B200; Thor; RTX 50. The toolkit at hand may know fewer.
ARCHITECTURES = ["8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "11.0", "12.0"]


def architectures() -> str:
    """Those of TORCH_CUDA_ARCH_LIST, or all of ours that nvcc can compile for, as "8.0;9.0"."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"].replace(" ", ";")
    known = subprocess.run(
        ["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True
    ).stdout.split()
    return ";".join(name for name in ARCHITECTURES if f"sm_{name.replace('.', '')}" in known)


def cuda_build() -> dict:
    """Arguments of setup for the extension psdiff.kernels._C. Whatever is missing is an error, never a skip."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CUDAExtension
    except ImportError as error:
        raise SystemExit(
            "PSDIFF_CUDA=1 must be built beside the installed PyTorch, got an environment without it: "
            "install torch and run PSDIFF_CUDA=1 pip install --no-build-isolation -e ."
        ) from error
    names = architectures()
    os.environ["TORCH_CUDA_ARCH_LIST"] = names
    extension = CUDAExtension(
        "psdiff.kernels._C",
        ["kernels/csrc/torch_ops.cu"],
        include_dirs=[str(Path("kernels/csrc").resolve())],
        depends=[str(path) for path in Path("kernels/csrc").glob("*.cu*")],
        extra_compile_args={"nvcc": ["-O3", f'-DPSD_ARCHITECTURES="{names}"']},
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(
    packages=["psdiff", *(f"psdiff.{part}" for part in PARTS)],
    package_dir={"psdiff": "."},
    include_package_data=False,
    package_data={
        "psdiff": ["py.typed"],
        "psdiff.kernels": ["csrc/*"],
        "psdiff.models": ["presets/*.json"],
        "psdiff.training": ["recipes/*.yaml"],
        "psdiff.runtime": ["bundles/*/*"],
    },
    # Without script_name, a wheel built by pip ships this file as psdiff/setup.py.
    script_name="setup.py",
    **(cuda_build() if os.environ.get("PSDIFF_CUDA") == "1" else {}),
)
