"""The kernels of csrc on a CPU: g++ compiles the very text, every CUDA thread is a fiber, blocks run in turn.

This is execution of the kernel bodies on the host, with real barriers and real fragment layouts; it is no GPU. See
host_gpu/device_on_host.h for what it finds and what it cannot find.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import psdiff
import torch
from psdiff.kernels.launches import DeviceArray

CSRC = Path(psdiff.__file__).parent / "kernels" / "csrc"
HOST = Path(__file__).parent / "host_gpu"

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "u8": torch.uint8}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LIBRARY = "kernels_on_host.so"


class HostKernels:
    """A compiled library of the kernels, and the one call that runs a Launch; prefix: before each entry's name."""

    def __init__(self, library, prefix=""):
        self.library, self.prefix = ctypes.CDLL(str(library)), prefix
        self.library.launch_on_host.restype = ctypes.c_char_p

    def run(self, launch, seed=0):
        """Run every block; seed 0 takes threads in order, others permute them. Raises on a stuck barrier."""
        args, entry = launch.args, f"{self.prefix}{launch.entry}"
        assert args.nbytes == ctypes.c_int.in_dll(self.library, f"{entry}_size").value
        assert launch.threads == ctypes.c_int.in_dll(self.library, f"{entry}_threads").value
        problem = self.library.launch_on_host(
            getattr(self.library, entry),
            (ctypes.c_uint * 3)(*launch.grid),
            launch.threads,
            args.ctypes.data_as(ctypes.c_void_p),
            seed,
        )
        if problem:
            raise RuntimeError(problem.decode())


def build(folder, csrc=CSRC, *flags):
    """Compile the kernels under `csrc` into `folder`; returns the library's path."""
    library = Path(folder) / LIBRARY
    command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unknown-pragmas", *flags, "-x", "c++", "-I", HOST, "-I", csrc, HOST / "launch.cpp"]
    done = subprocess.run([*command, "-o", library], capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr[:2000])
    return library


def missing_compiler():
    """Why the kernels cannot be compiled here, or an empty string."""
    return "" if shutil.which("g++") else "g++ is missing: install a C++17 compiler"


def array(tensor):
    """A contiguous CPU tensor as kernels see it."""
    assert tensor.is_contiguous()
    return DeviceArray(tensor.data_ptr(), tuple(tensor.shape), NAMES[tensor.dtype])
