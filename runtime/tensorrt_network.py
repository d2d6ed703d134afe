"""One TensorRT engine with its context: names and types checked at the door, shapes set, memory used again.

Everything runs on one stream: memory that is given back is used again by work that comes after. One thread at a time.
Legend: B images, C channels, h, w size of a map.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..bundle import BundleError
from ..kernels.driver import Driver, Memory, Stream
from ..plans import EngineRecord

# By TensorRT's names of types.
ITEM_BYTES = {"UINT8": 1, "HALF": 2, "BF16": 2, "FLOAT": 4, "INT32": 4, "INT64": 8}
HOST_TYPES: dict[str, type[np.generic]] = {"UINT8": np.uint8, "FLOAT": np.float32, "INT64": np.int64}

Shape = tuple[int, ...]


class TensorRtError(RuntimeError):
    """TensorRT refused an inference; its own log says why."""


class Tensor(NamedTuple):
    """An input or output of an engine."""

    is_input: bool
    dtype: str
    """TensorRT's word: UINT8, HALF, BF16, FLOAT, INT64."""


class MemoryPool:
    """Device memory that is used again: to allocate is to wait for the device."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._free: dict[int, list[Memory]] = defaultdict(list)

    def take(self, num_bytes: int) -> Memory:
        """Memory of this size. Raises CudaError."""
        free = self._free[num_bytes]
        return free.pop() if free else self._driver.allocate(num_bytes)

    def give_back(self, memory: Memory) -> None:
        """Let the memory be taken again."""
        self._free[memory.num_bytes].append(memory)


class DeviceTensor:
    """An array on the device, whose memory goes back to its pool when this object is dropped."""

    def __init__(self, pool: MemoryPool, shape: Shape, dtype: str) -> None:
        memory = pool.take(num_bytes(shape, dtype))
        self.pointer, self.num_bytes = memory.pointer, memory.num_bytes
        self.shape, self.dtype = shape, dtype
        weakref.finalize(self, pool.give_back, memory)


@dataclass(frozen=True)
class Gpu:
    """A device as TensorRT and the driver see it."""

    trt: ModuleType
    runtime: Any
    """A trt.Runtime."""
    driver: Driver
    stream: Stream

    @property
    def stream_handle(self) -> int:
        """The stream as TensorRT takes it."""
        return int(self.stream.handle)


class Network:
    """An engine that is ready to run."""

    def __init__(self, gpu: Gpu, path: Path, record: EngineRecord) -> None:
        """Load an engine from its file. Raises BundleError where it cannot be loaded here."""
        engine = gpu.runtime.deserialize_cuda_engine(path.read_bytes())
        # A context holds the scratch memory of the largest profile.
        context = engine.create_execution_context() if engine is not None else None
        if context is None:
            what = (
                "loads"
                if engine is None
                else f"has {record.scratch_bytes / 1e6:.0f} MB of scratch memory for"
            )
            raise BundleError(
                f"{path} must be an engine that {gpu.trt.__name__} {gpu.trt.__version__} {what} on "
                f"{gpu.driver.arch}, got none; TensorRT's own log says why. Build the engines again on this device, "
                "or with a smaller --max-batch"
            )
        self.tensors = _tensors(gpu.trt, engine)
        self._engine, self._context, self._path, self._record = engine, context, path, record
        self._gpu, self._pool, self._profile = gpu, MemoryPool(gpu.driver), 0

    def check(self, inputs: Mapping[str, str | None], outputs: Mapping[str, str | None]) -> None:
        """Raise BundleError unless the engine has these tensors, of these types; None is any float."""
        for what, is_input, wanted in (("inputs", True, inputs), ("outputs", False, outputs)):
            found = {name: each.dtype for name, each in self.tensors.items() if each.is_input == is_input}
            if set(found) != set(wanted):
                raise BundleError(
                    f"{self._path} must have the {what} {', '.join(wanted)}, got {', '.join(found)}; "
                    "build the engines again"
                )
            for name, dtype in wanted.items():
                allowed = (dtype,) if dtype else ("FLOAT", "HALF", "BF16")
                if found[name] not in allowed:
                    raise BundleError(
                        f"{name} of {self._path} must be {' or '.join(allowed)}, got {found[name]}; "
                        "build the engines again"
                    )

    def run(self, inputs: Mapping[str, NDArray[Any] | DeviceTensor]) -> dict[str, DeviceTensor]:
        """Queue one inference; its outputs hold what they should once the stream has come to them.

        Raises ValueError for a shape that no profile of the engine has, CudaError, TensorRtError.
        """
        self._take_profile({name: tuple(value.shape) for name, value in inputs.items()})
        # Inputs live until the inference is queued; what takes their memory then comes after it on the stream.
        arrays = {name: self._on_device(name, value) for name, value in inputs.items()}
        for name, array in arrays.items():
            self._must(self._context.set_input_shape(name, array.shape), f"shape {array.shape} of {name}")
        outputs = {name: self._output(name) for name, each in self.tensors.items() if not each.is_input}
        for name, array in (arrays | outputs).items():
            self._must(self._context.set_tensor_address(name, array.pointer), f"address of {name}")
        self._must(self._context.execute_async_v3(self._gpu.stream_handle), "inference")
        return outputs

    def download(self, tensor: DeviceTensor) -> NDArray[Any]:
        """Wait for an array and copy it to the host; float32, int64 or uint8. Raises CudaError."""
        host = np.empty(tensor.shape, HOST_TYPES[tensor.dtype])
        self._gpu.driver.copy(host, tensor.pointer, host.nbytes, stream=self._gpu.stream)
        return host

    def _on_device(self, name: str, value: NDArray[Any] | DeviceTensor) -> DeviceTensor:
        if isinstance(value, DeviceTensor):
            return value
        dtype = self.tensors[name].dtype
        host = np.ascontiguousarray(value, HOST_TYPES[dtype])
        array = DeviceTensor(self._pool, host.shape, dtype)
        self._gpu.driver.copy(array.pointer, host, host.nbytes, stream=self._gpu.stream)
        return array

    def _output(self, name: str) -> DeviceTensor:
        shape: Shape = tuple(self._context.get_tensor_shape(name))
        if name in self._record.channels_last:
            # TensorRT says (B, C, h, w) in vectors of eight channels; with a multiple of eight these are the bytes
            # of (B, h, w, C), which is how the step takes them.
            shape = (shape[0], *shape[2:], shape[1])
        return DeviceTensor(self._pool, shape, self.tensors[name].dtype)

    def _take_profile(self, shapes: Mapping[str, Shape]) -> None:
        index = profile_for(shapes, self._record.profiles, self._path)
        if index != self._profile:
            done = self._context.set_optimization_profile_async(index, self._gpu.stream_handle)
            self._must(done, f"profile {index}")
            self._profile = index

    def _must(self, done: bool, what: str) -> None:
        if not done:
            raise TensorRtError(
                f"{self._path.name} must take the {what}, got no; TensorRT's own log says why"
            )


def num_bytes(shape: Shape, dtype: str) -> int:
    """Bytes of an array without gaps."""
    return math.prod(shape) * ITEM_BYTES[dtype]


def profile_for(
    shapes: Mapping[str, Shape],
    profiles: Sequence[Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]],
    path: Path,
) -> int:
    """The first profile that these shapes are within. Raises ValueError that names the shape which is in none."""
    for index, profile in enumerate(profiles):
        if all(_is_within(shape, *profile[name][::2]) for name, shape in shapes.items()):
            return index
    largest = profiles[-1]
    for name, shape in shapes.items():
        smallest, _, most = largest[name]
        if not _is_within(shape, smallest, most):
            raise ValueError(
                f"{name} must have a shape from {tuple(smallest)} to {tuple(most)} in {path.name}, got {shape}; "
                "build engines with a larger --max-batch or --max-proposals"
            )
    raise ValueError(f"inputs of {path.name} must be within one profile, got {dict(shapes)}")


def _is_within(shape: Shape, smallest: Sequence[int], largest: Sequence[int]) -> bool:
    return len(shape) == len(smallest) and all(
        low <= side <= high for low, side, high in zip(smallest, shape, largest, strict=True)
    )


def _tensors(trt: ModuleType, engine: Any) -> dict[str, Tensor]:  # noqa: ANN401
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    return {
        name: Tensor(
            engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT, engine.get_tensor_dtype(name).name
        )
        for name in names
    }
