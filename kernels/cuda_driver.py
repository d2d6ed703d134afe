"""The CUDA driver through cuda-python (cuda.bindings), NVIDIA's own library: see driver.Driver."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from cuda.bindings import driver as cuda  # pyright: ignore[reportAttributeAccessIssue, reportMissingImports]

from .driver import (
    CudaError,
    Function,
    Memory,
    Module,
    OwnedStream,
    Place,
    Stream,
    check_copy,
    check_num_bytes,
)

Handle: TypeAlias = Any
"""An object of cuda.bindings that wraps a handle of the driver."""

MAJOR = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
MINOR = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR


class CudaPythonDriver:
    """A device of the CUDA driver by its ordinal. Raises CudaError, also where there is no such device."""

    def __init__(self, device: int) -> None:
        _call(cuda.cuInit, 0)
        handle = _call(cuda.cuDeviceGet, device)
        self.arch = "sm_" + "".join(
            str(_call(cuda.cuDeviceGetAttribute, part, handle)) for part in (MAJOR, MINOR)
        )
        self._context = _call(cuda.cuDevicePrimaryCtxRetain, handle)
        weakref.finalize(self, _call, cuda.cuDevicePrimaryCtxRelease, handle)

    def allocate(self, num_bytes: int) -> Memory:
        """Reserve device memory: see Driver."""
        check_num_bytes(num_bytes)
        with self._current():
            pointer = _call(cuda.cuMemAlloc, num_bytes)
        return Memory(int(pointer), num_bytes, partial(self._free, pointer))

    def load_module(self, image: bytes) -> Module:
        """Load a cubin: see Driver."""
        with self._current():
            module = _call(cuda.cuModuleLoadData, image)
        return partial(self._function, module)

    def create_stream(self) -> Stream:
        """Make a stream: see Driver."""
        with self._current():
            handle = _call(cuda.cuStreamCreate, cuda.CUstream_flags.CU_STREAM_NON_BLOCKING.value)
        return OwnedStream(int(handle), partial(self._destroy, handle))

    def launch(
        self, function: Function, grid: tuple[int, int, int], threads: int, args: bytes, *, stream: Stream = 0
    ) -> None:
        """Start a kernel: see Driver."""
        struct = ctypes.create_string_buffer(args, len(args))
        params = (ctypes.c_void_p * 1)(ctypes.addressof(struct))
        block, shared_bytes, extra = (threads, 1, 1), 0, 0
        with self._current():
            _call(
                cuda.cuLaunchKernel,
                function,
                *grid,
                *block,
                shared_bytes,
                _stream(stream),
                ctypes.addressof(params),
                extra,
            )

    def copy(self, destination: Place, source: Place, num_bytes: int, *, stream: Stream = 0) -> None:
        """Copy bytes: see Driver."""
        check_copy(destination, source, num_bytes)
        handle = _stream(stream)
        with self._current():
            if isinstance(source, np.ndarray):
                _call(cuda.cuMemcpyHtoDAsync, destination, source.ctypes.data, num_bytes, handle)
            elif isinstance(destination, np.ndarray):
                _call(cuda.cuMemcpyDtoHAsync, destination.ctypes.data, source, num_bytes, handle)
            else:
                _call(cuda.cuMemcpyDtoDAsync, destination, source, num_bytes, handle)
                return
            _call(cuda.cuStreamSynchronize, handle)

    def _function(self, module: Handle, entry: str) -> Function:
        with self._current():
            try:
                return _call(cuda.cuModuleGetFunction, module, entry.encode())
            except CudaError as error:
                if error.name == "CUDA_ERROR_NOT_FOUND":
                    raise KeyError(entry) from error
                raise

    def _free(self, pointer: Handle) -> None:
        with self._current():
            _call(cuda.cuMemFree, pointer)

    def _destroy(self, stream: Handle) -> None:
        with self._current():
            _call(cuda.cuStreamDestroy, stream)

    @contextmanager
    def _current(self) -> Iterator[None]:
        # Pushed and popped around each call: torch and TensorRT find on this thread the context they left there.
        _call(cuda.cuCtxPushCurrent, self._context)
        try:
            yield
        finally:
            _call(cuda.cuCtxPopCurrent)


def _stream(stream: Stream) -> Handle:
    return cuda.CUstream(int(getattr(stream, "handle", stream)))


def _call(function: Callable[..., tuple[Any, ...]], *args: Any) -> Handle:
    """Call a function of the driver; returns what it gives besides its status. Raises CudaError."""
    status, *values = function(*args)
    if status != cuda.CUresult.CUDA_SUCCESS:
        _, text = cuda.cuGetErrorString(status)
        description = text.decode() if text else "no description"
        raise CudaError(function.__name__, status.name, description)
    return values[0] if values else None
