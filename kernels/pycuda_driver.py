"""The CUDA driver through PyCUDA, for devices where it is installed already: see driver.Driver.

PyCUDA can start work on streams that it made, and on the default stream, and on no other: pass the
pycuda.driver.Stream itself, and its `handle` to TensorRT. For streams of torch or TensorRT take cuda-python.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pycuda.driver as cuda  # pyright: ignore[reportMissingImports]

from .driver import CudaError, Function, Memory, Module, Place, Stream, check_copy, check_num_bytes

Handle: TypeAlias = Any
"""An object of PyCUDA."""

# Codes of CUresult end below this.
ERROR_CODES = range(1, 1000)


class PyCudaDriver:
    """A device of the CUDA driver by its ordinal. Raises CudaError, also where there is no such device."""

    def __init__(self, device: int) -> None:
        with _cuda_errors():
            cuda.init()
            handle = cuda.Device(device)
            self.arch = "sm_{}{}".format(*handle.compute_capability())
            self._context = handle.retain_primary_context()
        # Left to its destructor, PyCUDA would detach a context that it only borrowed.
        weakref.finalize(self, self._context.detach)

    def allocate(self, num_bytes: int) -> Memory:
        """Reserve device memory: see Driver."""
        check_num_bytes(num_bytes)
        with self._current():
            allocation = cuda.mem_alloc(num_bytes)
        return Memory(int(allocation), num_bytes, partial(self._free, allocation))

    def load_module(self, image: bytes) -> Module:
        """Load a cubin: see Driver."""
        with self._current():
            module = cuda.module_from_buffer(image)
        return partial(self._function, module)

    def create_stream(self) -> Stream:
        """Make a stream: see Driver."""
        with self._current():
            # CU_STREAM_NON_BLOCKING, for which PyCUDA has no name.
            return cuda.Stream(1)

    def launch(
        self, function: Function, grid: tuple[int, int, int], threads: int, args: bytes, *, stream: Stream = 0
    ) -> None:
        """Start a kernel: see Driver; of streams, those of PyCUDA."""
        # PyCUDA passes an array by value, as its bytes.
        struct = np.frombuffer(args, np.uint8)
        with self._current():
            function(struct, grid=grid, block=(threads, 1, 1), stream=_stream(stream))

    def copy(self, destination: Place, source: Place, num_bytes: int, *, stream: Stream = 0) -> None:
        """Copy bytes: see Driver; of streams, those of PyCUDA."""
        check_copy(destination, source, num_bytes)
        own = _stream(stream)
        with self._current():
            if isinstance(source, np.ndarray):
                cuda.memcpy_htod_async(destination, source, own)
            elif isinstance(destination, np.ndarray):
                cuda.memcpy_dtoh_async(destination, source, own)
            else:
                cuda.memcpy_dtod_async(destination, source, num_bytes, own)
                return
            (own or cuda.Context).synchronize()

    def _function(self, module: Handle, entry: str) -> Function:
        try:
            with self._current():
                return module.get_function(entry)
        except CudaError as error:
            if error.name == "CUDA_ERROR_NOT_FOUND":
                raise KeyError(entry) from error
            raise

    def _free(self, allocation: Handle) -> None:
        with self._current():
            allocation.free()

    @contextmanager
    def _current(self) -> Iterator[None]:
        with _cuda_errors():
            self._context.push()
            try:
                yield
            finally:
                cuda.Context.pop()


def _stream(stream: Stream) -> Handle | None:
    """Return PyCUDA's word for a stream: None is the default one. Raises ValueError."""
    if isinstance(stream, cuda.Stream):
        return stream
    if getattr(stream, "handle", stream) != 0:
        raise ValueError(
            f"stream must be 0 or a pycuda.driver.Stream, got {stream!r}: PyCUDA cannot use a stream that it did not "
            "make; open_driver('cuda-python') can"
        )
    return None


@contextmanager
def _cuda_errors() -> Iterator[None]:
    try:
        yield
    except cuda.Error as error:
        # PyCUDA says "cuModuleLoadDataEx failed: device kernel image is invalid - log of the driver".
        call, _, description = str(error).partition(" failed: ")
        raise CudaError(
            call, _error_name(description.partition(" - ")[0]), description.rstrip(" -")
        ) from error


def _error_name(description: str) -> str:
    """Find the name of the error that the driver describes so: PyCUDA keeps neither name nor number."""
    libcuda = ctypes.CDLL("libcuda.so.1")
    text = ctypes.c_char_p()
    for code in ERROR_CODES:
        if libcuda.cuGetErrorString(code, ctypes.byref(text)) or text.value != description.encode():
            continue
        if not libcuda.cuGetErrorName(code, ctypes.byref(text)) and text.value:
            return text.value.decode()
    return "CUDA_ERROR_UNKNOWN"
