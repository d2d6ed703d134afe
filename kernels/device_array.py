"""Take device memory that another library holds: DLPack, or the CUDA array interface; no import of that library.

torch (bfloat16 too), CuPy and TensorRT's users speak DLPack, PyCUDA's GPUArray the CUDA array interface. numpy has no
word for memory of a device, so the DLPack struct is read here by ctypes (dlpack.h, DLManagedTensor; its layout is
fixed for capsules that are named "dltensor").
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol, TypeAlias, runtime_checkable

from .launches import DeviceArray

KINDS_OF_DLPACK = {(2, 32): "f32", (2, 16): "f16", (4, 16): "bf16", (1, 8): "u8", (0, 32): "i32"}
KINDS_OF_INTERFACE = {"<f4": "f32", "<f2": "f16", "|u1": "u8", "<i4": "i32"}

# DLDeviceType: memory that kernels of this process may use. Managed memory is on both sides.
DLPACK_CUDA, DLPACK_CUDA_MANAGED = 2, 13
DLPACK_DEVICES = {1: "host memory", 3: "pinned host memory"}

# Order nothing: see device_array.
NO_STREAM = -1


Capsule: TypeAlias = Any
"""A PyCapsule, which Python has no type for."""


@runtime_checkable
class _SpeaksDLPack(Protocol):
    def __dlpack__(self, *, stream: int | None = None) -> Capsule: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


@runtime_checkable
class _SpeaksCuda(Protocol):
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("type_code", ctypes.c_uint8),
        ("type_bits", ctypes.c_uint8),
        ("type_lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def device_array(x: object) -> DeviceArray:
    """View a contiguous array in CUDA memory, without a copy; f32, f16, bf16, u8 or i32.

    The view does not own the memory: keep x until the kernels that use it have ended. It orders nothing: what fills x
    must be on the stream of the launch, or have ended. Raises TypeError for what is no array, ValueError for one in
    host memory, of another type, or with gaps between its elements; what x raises passes through.
    """
    if isinstance(x, _SpeaksDLPack):
        return _of_dlpack(x)
    if isinstance(x, _SpeaksCuda):
        return _of_interface(x.__cuda_array_interface__)
    raise TypeError(
        f"x must be an array on a CUDA device, with __dlpack__ or __cuda_array_interface__, got {type(x).__name__}"
    )


def _of_dlpack(x: _SpeaksDLPack) -> DeviceArray:
    kind = int(x.__dlpack_device__()[0])
    if kind not in (DLPACK_CUDA, DLPACK_CUDA_MANAGED):
        where = DLPACK_DEVICES.get(kind, f"memory of DLPack device type {kind}")
        raise ValueError(f"x must be in CUDA device memory, got {where}: copy it there, as by Driver.copy")
    # The capsule is only read; dropped unused, it gives its reference to the memory of x back.
    capsule = x.__dlpack__(stream=NO_STREAM)
    tensor = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    kind_name = KINDS_OF_DLPACK.get((tensor.type_code, tensor.type_bits))
    if kind_name is None or tensor.type_lanes != 1:
        got = f"DLPack type code {tensor.type_code} of {tensor.type_bits} bits"
        raise ValueError(f"x must be {' or '.join(KINDS_OF_DLPACK.values())}, got {got}")
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None
    _check_contiguous(shape, strides, unit=1)
    return DeviceArray((tensor.data or 0) + tensor.byte_offset, shape, kind_name)


def _of_interface(interface: dict[str, Any]) -> DeviceArray:
    dtype = KINDS_OF_INTERFACE.get(interface["typestr"])
    if dtype is None:
        raise ValueError(f"x must be {' or '.join(KINDS_OF_INTERFACE.values())}, got {interface['typestr']}")
    shape, strides = tuple(interface["shape"]), interface.get("strides")
    _check_contiguous(shape, strides, unit=int(interface["typestr"][2:]))
    return DeviceArray(int(interface["data"][0]), shape, dtype)


def _check_contiguous(shape: tuple[int, ...], strides: tuple[int, ...] | None, unit: int) -> None:
    """Raise ValueError unless strides, in steps of which `unit` make an element, are those of row-major order."""
    expected = unit
    for size, stride in zip(reversed(shape), reversed(strides or ()), strict=False):
        if size > 1 and stride != expected:
            raise ValueError(f"x must be contiguous, got strides {strides} for shape {shape}: copy it first")
        expected *= size


def _capsule_pointer(capsule: Capsule, name: bytes) -> int:
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    return get_pointer(capsule, name)
