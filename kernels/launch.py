"""Run the kernels of csrc without torch: for devices where only the CUDA driver and NumPy are installed.

    driver = open_driver()
    kernels = Kernels(driver)
    memory = driver.allocate(levels[0].nbytes)
    driver.copy(memory.pointer, levels[0], levels[0].nbytes, stream=stream)
    ...
    kernels.run(roi_align_launch([memory.array((1, 200, 272, 96), "f16"), ...], ...), stream)

launches.py checks and packs the arguments; device_array.py takes arrays that another library holds.
"""

from __future__ import annotations

import ctypes
import re
from functools import cache
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from .compile import cache_folder, cached_cubin
from .driver import CudaError, Driver, DriverNotFoundError, Function, Module, Stream
from .launches import Launch

# What a driver says of a cubin that is not for it.
REFUSALS = {
    "CUDA_ERROR_INVALID_IMAGE",
    "CUDA_ERROR_NO_BINARY_FOR_GPU",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
}

Library: TypeAlias = Literal["cuda-python", "pycuda"]


def open_driver(library: Library | None = None, device: int = 0) -> Driver:
    """Open a device through cuda-python or PyCUDA; None takes the first of them that is installed.

    device: ordinal, from 0. The same arguments give the same object. Raises DriverNotFoundError, which says what is
    missing; CudaError where the driver has no such device; ValueError for another library.
    """
    if library not in (None, *get_args(Library)):
        raise ValueError(f"library must be {' or '.join(get_args(Library))}, got {library!r}")
    return _open(library, device)


class Kernels:
    """The kernels of csrc on one device. Used by one thread at a time."""

    def __init__(self, driver: Driver, *, cubin: Path | None = None, cache: Path | None = None) -> None:
        """Load the cubin that psdiff.kernels.compile wrote, or compile one and keep it in the cache folder.

        cache: default compile.cache_folder(). Raises CudaError where the driver refuses the cubin, CompileError,
        and OSError where a file cannot be read or the cache not be written.
        """
        self._driver, self._cache = driver, cache or cache_folder()
        if cubin is not None and not cubin.is_file():
            raise FileNotFoundError(
                f"cubin must be a file, got {cubin}: python -m psdiff.kernels.compile --arch {driver.arch} --out "
                "FOLDER writes one"
            )
        image = cubin.read_bytes() if cubin else cached_cubin(driver.arch, self._cache)
        self._modules = [self._load(image)]
        self._functions: dict[str, Function] = {}

    def run(self, launch: Launch, stream: Stream = 0) -> None:
        """Start a kernel on a stream, and return at once; arrays must live until it has ended.

        The first launch of a dynamic convolution of a size that the cubin lacks compiles it, by NVRTC. Raises
        CudaError, CompileError, ValueError.
        """
        function = self._functions.get(launch.entry)
        if function is None:
            function = self._functions[launch.entry] = self._find(launch.entry)
        self._driver.launch(function, launch.grid, launch.threads, launch.args.tobytes(), stream=stream)

    def _find(self, entry: str) -> Function:
        for module in self._modules:
            try:
                return module(entry)
            except KeyError:
                continue
        size = re.fullmatch(r"psdiff_dynamic_conv_\w+_c(\d+)_d(\d+)", entry)
        if size is None:
            raise ValueError(f"entry must be a kernel of csrc/entries.cu, got {entry!r}")
        channels, width = map(int, size.groups())
        self._modules.append(self._load(cached_cubin(self._driver.arch, self._cache, (channels, width))))
        return self._modules[-1](entry)

    def _load(self, image: bytes) -> Module:
        try:
            return self._driver.load_module(image)
        except CudaError as error:
            if error.name not in REFUSALS:
                raise
            wanted = f"it must be a cubin for {self._driver.arch} of a CUDA that is not newer than the driver"
            raise CudaError(error.call, error.name, f"{error.description}; {wanted}") from error


@cache
def _open(library: Library | None, device: int) -> Driver:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DriverNotFoundError(
            f"libcuda.so.1 must be on this machine, got {error}: install the NVIDIA driver; in a container, start it "
            "with the NVIDIA runtime (docker run --gpus all)"
        ) from error
    if library == "pycuda":
        return _open_pycuda(device)
    try:
        return _open_cuda_python(device)
    except DriverNotFoundError:
        if library is not None:
            raise
    return _open_pycuda(device)


def _open_cuda_python(device: int) -> Driver:
    try:
        from .cuda_driver import CudaPythonDriver
    except ImportError as error:
        raise DriverNotFoundError(
            f"cuda-python must be installed, got {error}: pip install 'psdiff[cuda]' (on JetPack 6, which has CUDA "
            "12.6: pip install 'cuda-bindings<13')"
        ) from error
    return CudaPythonDriver(device)


def _open_pycuda(device: int) -> Driver:
    try:
        from .pycuda_driver import PyCudaDriver
    except ImportError as error:
        raise DriverNotFoundError(
            f"PyCUDA or cuda-python must be installed, got {error}: pip install 'psdiff[cuda]' for cuda-python; "
            "pip install pycuda builds PyCUDA, and needs a CUDA toolkit"
        ) from error
    return PyCudaDriver(device)
