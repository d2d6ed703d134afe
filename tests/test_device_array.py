"""Arrays that other libraries hold in device memory: real capsules of torch and NumPy, said to lie on a device."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from psdiff.kernels.device_array import device_array
from psdiff.kernels.launches import DeviceArray


class OnDevice:
    """An array of the host that says it lies on a device: DLPack types, 2 is CUDA. The capsule is its own."""

    def __init__(self, array, device_type=2):
        self.array, self.device_type = array, device_type

    def __dlpack_device__(self):
        return self.device_type, 0

    def __dlpack__(self, *, stream=None):
        assert stream == -1
        return self.array.__dlpack__()


def test_tensors_are_taken_by_dlpack_with_type_shape_and_place():
    torch = pytest.importorskip("torch", reason="torch, which makes the capsules, is not installed")
    names = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "uint8": "u8", "int32": "i32"}
    for name, expected in names.items():
        tensor = torch.zeros(4, 3, 5, dtype=getattr(torch, name))[1:]
        assert device_array(OnDevice(tensor)) == DeviceArray(tensor.data_ptr(), (3, 3, 5), expected)
    column = torch.zeros(5, 1).as_strided((1, 5), (77, 1))
    assert device_array(OnDevice(column)).shape == (1, 5)
    assert device_array(OnDevice(torch.zeros(()))).shape == ()


@pytest.mark.parametrize(
    ("make", "device_type", "message"),
    [
        (
            lambda torch: torch.zeros(3, 4).T,
            2,
            r"x must be contiguous, got strides \(1, 4\) for shape \(4, 3\)",
        ),
        (lambda torch: torch.zeros(3).long(), 2, r"x must be f32 or .*got DLPack type code 0 of 64 bits"),
        (lambda torch: torch.zeros(3), 1, r"x must be in CUDA device memory, got host memory: copy it there"),
        (lambda torch: torch.zeros(3), 3, r"got pinned host memory"),
        (lambda torch: torch.zeros(3), 10, r"got memory of DLPack device type 10"),
    ],
)
def test_tensors_that_kernels_cannot_read_are_refused(make, device_type, message):
    torch = pytest.importorskip("torch", reason="torch, which makes the capsules, is not installed")
    with pytest.raises(ValueError, match=message):
        device_array(OnDevice(make(torch), device_type))


def test_reading_a_capsule_gives_the_memory_back():
    array = np.zeros((2, 3), np.float32)
    before = sys.getrefcount(array)
    assert device_array(OnDevice(array)) == DeviceArray(array.ctypes.data, (2, 3), "f32")
    assert sys.getrefcount(array) == before


def interface(**changes):
    described = {
        "shape": (2, 3),
        "typestr": "<f2",
        "data": (4096, False),
        "strides": None,
        "version": 3,
        **changes,
    }
    return SimpleNamespace(__cuda_array_interface__=described)


def test_arrays_are_taken_by_the_cuda_array_interface():
    expected = DeviceArray(4096, (2, 3), "f16")
    assert device_array(interface()) == device_array(interface(strides=(6, 2))) == expected
    with pytest.raises(ValueError, match=r"x must be contiguous, got strides \(2, 4\)"):
        device_array(interface(strides=(2, 4)))
    with pytest.raises(ValueError, match="x must be f32 or f16 or u8 or i32, got <f8"):
        device_array(interface(typestr="<f8"))
    with pytest.raises(TypeError, match=r"x must be an array on a CUDA device.*got list"):
        device_array([1.0])
    with pytest.raises(ValueError, match="got host memory"):
        device_array(np.zeros(3, np.float32))
