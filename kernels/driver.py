"""What starting kernels needs of a CUDA driver: five functions, device memory, and the errors.

cuda_driver.py and pycuda_driver.py implement Driver; launch.py opens one of them. No torch, no TensorRT: both use
the primary context of a device, as torch and TensorRT do, so that pointers and streams of one process are shared.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .launches import ITEM_BYTES, DeviceArray

Place: TypeAlias = int | NDArray[Any]
"""Where bytes lie: an int is a pointer into device memory, a NumPy array is host memory."""

Stream: TypeAlias = Any
"""The int handle of a CUDA stream (0 is the default one), or an object that has it as `handle`."""

Function: TypeAlias = Any
"""A kernel, in the words of the library that loaded it."""

Module: TypeAlias = Callable[[str], Function]
"""Name of a kernel -> the kernel; raises KeyError where the module has none of that name."""


class CudaError(RuntimeError):
    """A call of the CUDA driver failed: `call` is its name, `name` the error's, as CUDA_ERROR_INVALID_VALUE."""

    def __init__(self, call: str, name: str, description: str) -> None:
        super().__init__(f"{call} failed with {name}: {description}")
        self.call, self.name, self.description = call, name, description


class DriverNotFoundError(RuntimeError):
    """libcuda, or the Python library that calls it, is not on this machine."""


class Driver(Protocol):
    """A CUDA device by five functions. Each may be called from any thread, whatever context is current there."""

    @property
    def arch(self) -> str:
        """What cubins for this device are compiled for, as sm_87."""
        ...

    def allocate(self, num_bytes: int) -> Memory:
        """Reserve device memory, aligned to 256 bytes and not cleared. Raises CudaError, ValueError."""
        ...

    def load_module(self, image: bytes) -> Module:
        """Load a cubin; it stays loaded as long as the process runs. Raises CudaError."""
        ...

    def create_stream(self) -> Stream:
        """Make a stream that does not wait for the default one, destroyed when it is dropped. Raises CudaError.

        Its `handle`, an int, is what other libraries take for the stream.
        """
        ...

    def launch(
        self, function: Function, grid: tuple[int, int, int], threads: int, args: bytes, *, stream: Stream = 0
    ) -> None:
        """Start a kernel whose one argument is a struct of these bytes; returns at once. Raises CudaError.

        What the pointers in args point to must live until the kernel has ended.
        """
        ...

    def copy(self, destination: Place, source: Place, num_bytes: int, *, stream: Stream = 0) -> None:
        """Copy between host and device, either way, or within the device, in the order of the stream.

        A copy that involves the host has ended when this returns, and with it all earlier work of the stream; one
        within the device is only queued. A host array must be contiguous and of num_bytes bytes. Raises CudaError,
        ValueError.
        """
        ...


class Memory:
    """Device memory, freed by free() or when this object is dropped: keep it until the kernels on it have ended."""

    def __init__(self, pointer: int, num_bytes: int, free: Callable[[], None]) -> None:
        self.pointer, self.num_bytes = pointer, num_bytes
        self.free = weakref.finalize(self, free)

    def array(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        """View the start of this memory as an array, which does not keep it alive. Raises ValueError."""
        if dtype not in ITEM_BYTES:
            raise ValueError(f"dtype must be one of {', '.join(ITEM_BYTES)}, got {dtype!r}")
        needed = math.prod(shape) * ITEM_BYTES[dtype]
        if needed > self.num_bytes:
            raise ValueError(f"shape must fit {self.num_bytes} bytes, got {shape} of {dtype}: {needed} bytes")
        return DeviceArray(self.pointer, shape, dtype)


class OwnedStream:
    """A stream that is destroyed when this object is dropped."""

    def __init__(self, handle: int, destroy: Callable[[], None]) -> None:
        self.handle = handle
        self.destroy = weakref.finalize(self, destroy)


def check_num_bytes(num_bytes: int) -> None:
    """Raise ValueError unless memory of this size can be allocated."""
    if num_bytes < 1:
        raise ValueError(f"num_bytes must be above 0, got {num_bytes}")


def check_copy(destination: Place, source: Place, num_bytes: int) -> None:
    """Raise ValueError unless Driver.copy can take these."""
    for name, place in (("destination", destination), ("source", source)):
        if not isinstance(place, np.ndarray):
            continue
        if place.nbytes != num_bytes or not place.flags.c_contiguous:
            layout = "contiguous" if place.flags.c_contiguous else "strided"
            raise ValueError(
                f"{name} must be a contiguous array of {num_bytes} bytes, got {layout} {place.nbytes} bytes"
            )
        if name == "destination" and not place.flags.writeable:
            raise ValueError("destination must be writeable, got a read-only array: copy it first")
    if isinstance(destination, np.ndarray) and isinstance(source, np.ndarray):
        raise ValueError(
            "destination or source must be a device pointer, got two host arrays: use numpy.copyto"
        )
