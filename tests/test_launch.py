"""Kernels started without torch: compiling, caching, and launches through the driver.

There is no GPU here. Launches run in a child process whose libcuda.so.1 is host_gpu/libcuda.cpp, a stand-in that runs
the kernel bodies on the CPU. The real cuda-python (or PyCUDA) calls it, with real cubins of NVRTC: this proves which
calls are made, in which order, with which bytes, streams and contexts. It does not prove that a cubin runs on a GPU.
"""

import ctypes
import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from psdiff.kernels import compile as compiling
from psdiff.kernels.compile import CompileError, cached_cubin, compile_nvcc, compile_nvrtc, write_whole
from psdiff.kernels.driver import CudaError, DriverNotFoundError, Memory, check_copy
from psdiff.kernels.launch import Kernels, open_driver
from psdiff.kernels.launches import DeviceArray, Launch, dynamic_conv_launch, roi_align_launch
from typer.testing import CliRunner

HOST = Path(__file__).parent / "host_gpu"
ARCH, SHIPPED_SIZE, OTHER_SIZE = "sm_87", (96, 8), (64, 16)
DTYPES = {"float32": "f32", "float16": "f16"}
ELF = b"\x7fELF"

NO_CUDA_PYTHON = "cuda-python is not installed: pip install 'psdiff[cuda]'"
needs_nvrtc = pytest.mark.skipif(
    importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None,
    reason=NO_CUDA_PYTHON,
)
needs_pycuda = pytest.mark.skipif(
    importlib.util.find_spec("pycuda") is None,
    reason="PyCUDA is not installed, and its build needs a CUDA toolkit",
)
LIBRARIES = ["cuda-python", pytest.param("pycuda", marks=needs_pycuda)]


# ---- what runs in the child process, on the stand-in ----


def upload(driver, array, dtype=None):
    """A NumPy array in device memory, as (array, what keeps it)."""
    memory = driver.allocate(array.nbytes)
    driver.copy(memory.pointer, array, array.nbytes)
    return memory.array(array.shape, dtype or DTYPES[array.dtype.name]), memory


def download(driver, array, dtype, stream=0):
    host = np.empty(array.shape, dtype)
    driver.copy(host, array.pointer, host.nbytes, stream=stream)
    return host


def pool(driver, kernels, inputs, stream=0):
    """Start ROIAlign on the arrays of a file; returns the output and what keeps the inputs."""
    arrays = [upload(driver, inputs[name]) for name in ("p2", "p3", "p4", "p5", "boxes")]
    *levels, boxes = (array for array, _ in arrays)
    shape = (boxes.shape[0] * boxes.shape[1], 49, levels[0].shape[-1])
    out = driver.allocate(int(np.prod(shape)) * inputs["p2"].itemsize)
    tokens = out.array(shape, levels[0].dtype)
    kernels.run(roi_align_launch(levels, boxes, tokens, sampling_ratio=2, canonical_size=224.0), stream)
    return tokens, [*arrays, out]


def open_kernels(library, folder):
    driver = open_driver(library)
    cubin = folder / "psdiff_sm_87_c96_d8.cubin"
    return driver, Kernels(driver, cubin=cubin, cache=folder / "cache")


def child_roi_align(library, folder):
    driver, kernels = open_kernels(library, folder)
    inputs = np.load(folder / "roi_align.npz")
    tokens, _keep = pool(driver, kernels, inputs)
    np.save(folder / "out.npy", download(driver, tokens, inputs["p2"].dtype))
    assert "torch" not in sys.modules


def child_dynamic_conv(library, folder):
    driver, kernels = open_kernels(library, folder)
    inputs = np.load(folder / "dynamic_conv.npz")
    names = ("tokens", "params", "weight1", "bias1", "weight2", "bias2")
    arrays = [upload(driver, inputs[name]) for name in names]
    tokens, params, weight1, bias1, weight2, bias2 = (array for array, _ in arrays)
    memory = driver.allocate(inputs["tokens"].nbytes)
    out = memory.array(tokens.shape, tokens.dtype)
    kernels.run(dynamic_conv_launch(tokens, params, (weight1, bias1), (weight2, bias2), out))
    np.save(folder / "out.npy", download(driver, out, inputs["tokens"].dtype))


def child_streams(library, folder):
    driver, kernels = open_kernels(library, folder)
    inputs = np.load(folder / "roi_align.npz")
    first, second = driver.create_stream(), driver.create_stream()
    if library == "pycuda":
        with pytest.raises(ValueError, match=r"stream must be 0 or a pycuda.driver.Stream, got 4096"):
            driver.copy(256, 512, 1, stream=4096)
    tokens, _keep = pool(driver, kernels, inputs, first)
    dtype = inputs["p2"].dtype
    # Nobody waited for the first stream: the output holds what memory held before, which is NaN.
    assert np.isnan(download(driver, tokens, dtype, second)).all()
    assert not np.isnan(download(driver, tokens, dtype, first)).any()
    tokens, _keep = pool(driver, kernels, inputs, first)
    copied = driver.allocate(tokens.shape[0] * 49 * 40 * dtype.itemsize)
    driver.copy(copied.pointer, tokens.pointer, copied.num_bytes, stream=first)
    assert not np.isnan(download(driver, copied.array(tokens.shape, "f16"), dtype, first)).any()


def child_errors(library, folder):
    driver, kernels = open_kernels(library, folder)
    inputs = np.load(folder / "roi_align.npz")
    boxes, _keep = upload(driver, inputs["boxes"])
    args = np.zeros(1, [("bytes", "u1", 96)])
    with pytest.raises(ValueError, match=r"entry must be a kernel of csrc/entries.cu, got 'psdiff_nothing'"):
        kernels.run(Launch("psdiff_nothing", (1, 1, 1), 32, args))
    too_wide = Launch("psdiff_roi_align_f16_r2", (1, 1, 1), 2048, args)
    fails(lambda: kernels.run(too_wide), "cuLaunchKernel", "INVALID_VALUE")
    fails(lambda: driver.allocate(1 << 50), "cuMemAlloc", "OUT_OF_MEMORY")
    host = np.zeros(4096, np.uint8)
    fails(lambda: driver.copy(boxes.pointer, host, host.nbytes), "cuMemcpyHtoDAsync", "INVALID_VALUE")
    fails(lambda: driver.load_module(b"not a cubin".ljust(64)), "cuModuleLoadData", "INVALID_IMAGE")
    with pytest.raises(CudaError, match=r"NO_BINARY_FOR_GPU: .*must be a cubin for sm_87 of a CUDA"):
        Kernels(driver, cubin=folder / "psdiff_sm_90_c96_d8.cubin")
    with pytest.raises(FileNotFoundError, match=r"got nowhere.cubin: python -m psdiff.kernels.compile"):
        Kernels(driver, cubin=Path("nowhere.cubin"))
    fails(lambda: open_driver(library, device=3), "cuDeviceGet", "INVALID_DEVICE")
    with pytest.raises(ValueError, match="num_bytes must be above 0, got 0"):
        driver.allocate(0)
    with pytest.raises(
        ValueError, match=r"destination or source must be a device pointer, got two host arrays"
    ):
        driver.copy(host, host, host.nbytes)


def fails(act, call, name):
    with pytest.raises(CudaError, match=f"^{call}") as caught:
        act()
    assert caught.value.name == f"CUDA_ERROR_{name}"


def child_memory(library, folder):
    libcuda = ctypes.CDLL("libcuda.so.1")
    driver, kernels = open_kernels(library, folder)
    inputs = np.load(folder / "roi_align.npz")
    before = free_bytes(libcuda)
    memory = driver.allocate(1000)
    assert free_bytes(libcuda) == before - 1000
    memory.free()
    memory.free()
    assert free_bytes(libcuda) == before
    results = []

    def work():
        tokens, _keep = pool(driver, kernels, inputs)
        results.append(download(driver, tokens, inputs["p2"].dtype))
        results.append(current_context(libcuda))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results[0].shape == (10, 49, 40)
    # No context is left behind in either thread, and dropped arrays are given back.
    assert results[1] == current_context(libcuda) is None
    assert free_bytes(libcuda) == before


def free_bytes(libcuda):
    context, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    libcuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
    libcuda.cuCtxPushCurrent_v2(context)
    assert libcuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0
    libcuda.cuCtxPopCurrent_v2(None)
    libcuda.cuDevicePrimaryCtxRelease_v2(0)
    return free.value


def current_context(libcuda):
    context = ctypes.c_void_p()
    libcuda.cuCtxGetCurrent(ctypes.byref(context))
    return context.value


def child_no_library(library, folder):
    sys.modules["cuda"] = sys.modules["pycuda"] = None
    with pytest.raises(DriverNotFoundError, match=r"PyCUDA or cuda-python must be installed.*psdiff\[cuda\]"):
        open_driver()
    with pytest.raises(DriverNotFoundError, match=r"^cuda-python must be installed"):
        open_driver("cuda-python")


def child_default_kernels(library, folder):
    driver = open_driver()
    for _ in range(2):
        Kernels(driver, cache=folder / "shipped")
    [kept] = (folder / "shipped").iterdir()
    assert kept.name.startswith("psdiff_sm_87_")
    assert kept.read_bytes()[:4] == ELF


# ---- the tests ----


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """The stand-in for libcuda, the kernels compiled by g++, and a cubin, in one folder."""
    host = pytest.importorskip("kernels_on_host", reason="torch, the reference, is not installed")
    if host.missing_compiler():
        pytest.skip(host.missing_compiler())
    pytest.importorskip("cuda.bindings.nvrtc", reason=NO_CUDA_PYTHON)
    folder = tmp_path_factory.mktemp("stand_in")
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-shared", "-fPIC"]
    command += [HOST / "libcuda.cpp", "-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so.1", "-ldl"]
    subprocess.run(command, check=True, timeout=300)
    libraries = []
    for channels, width in (SHIPPED_SIZE, OTHER_SIZE):
        part = folder / f"c{channels}"
        part.mkdir()
        flags = ("-O0", f"-DPSD_CHANNELS={channels}", f"-DPSD_WIDTH={width}")
        libraries.append(host.build(part, host.CSRC, *flags))
    done = run_compile("--arch", ARCH, "--out", folder, "--channels", 96, "--width", 8)
    assert done.exit_code == 0, done.output
    return SimpleNamespace(folder=folder, libraries=":".join(map(str, libraries)))


@pytest.fixture
def run_child(stand_in, tmp_path):
    """Run a child_ function on the stand-in, in a folder that holds the cubin."""
    [cubin] = stand_in.folder.glob("*.cubin")
    (tmp_path / cubin.name).symlink_to(cubin)

    def run(name, library="cuda-python"):
        paths = [str(stand_in.folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        environment = {"LD_LIBRARY_PATH": ":".join(paths), "PSD_HOST_KERNELS": stand_in.libraries}
        command = [sys.executable, __file__, name, library, tmp_path]
        done = subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-3000:]

    return run


def write_regions(folder):
    """Inputs of ROIAlign with boxes of every level, some partly outside; returns the reference's output."""
    import torch
    from psdiff.kernels.reference import multilevel_roi_align

    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(2, 64 >> k, 96 >> k, 40, generator=generator) for k in range(4)]
    levels = [level.half() for level in levels]
    corner = torch.rand(2, 5, 2, generator=generator) * 200 - 20
    sides = torch.tensor([20.0, 120, 230, 460, 90]).reshape(1, 5, 1)
    sides = sides * (1 + 0.02 * torch.rand(2, 5, 2, generator=generator))
    boxes = torch.cat([corner, corner + sides], dim=-1)
    named = dict(zip(("p2", "p3", "p4", "p5", "boxes"), (x.numpy() for x in (*levels, boxes)), strict=True))
    np.savez(folder / "roi_align.npz", **named)
    settings = {"pool_size": 7, "sampling_ratio": 2, "canonical_size": 224.0}
    return multilevel_roi_align([x.float().permute(0, 3, 1, 2) for x in levels], boxes, **settings).numpy()


@pytest.mark.parametrize("library", LIBRARIES)
def test_roi_align_started_by_the_driver_equals_the_reference(run_child, tmp_path, library):
    expected = write_regions(tmp_path)
    run_child("child_roi_align", library)
    # The output is rounded once, to 11 bits; positions of hundreds of pixels are exact to about 1e-5 of a cell.
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, rtol=2**-11, atol=1e-4)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_dynamic_convolution_of_a_new_size_is_compiled_once_and_equals_the_reference(
    run_child, tmp_path, library
):
    import torch
    from psdiff.kernels.reference import dynamic_conv

    for (channels, width), cached in ((SHIPPED_SIZE, 0), (OTHER_SIZE, 1), (OTHER_SIZE, 1)):
        generator = torch.Generator().manual_seed(channels)
        shapes = [(3, 49, channels), (3, 2 * channels * width), (width,), (width,), (channels,), (channels,)]
        tensors = [torch.randn(*shape, generator=generator) for shape in shapes]
        names = ("tokens", "params", "weight1", "bias1", "weight2", "bias2")
        np.savez(tmp_path / "dynamic_conv.npz", **{n: x.numpy() for n, x in zip(names, tensors, strict=True)})
        run_child("child_dynamic_conv", library)
        tokens, params, weight1, bias1, weight2, bias2 = (x.double() for x in tensors)
        expected = dynamic_conv(tokens, params, (weight1, bias1), (weight2, bias2)).numpy()
        np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, rtol=1e-4, atol=1e-4)
        assert len(list(tmp_path.glob("cache/psdiff_sm_87_c64_d16_*.cubin"))) == cached


@pytest.mark.parametrize("library", LIBRARIES)
def test_work_runs_on_the_stream_it_is_given(run_child, tmp_path, library):
    write_regions(tmp_path)
    run_child("child_streams", library)


@pytest.mark.parametrize("library", LIBRARIES)
def test_memory_is_given_back_and_no_context_is_left_behind_in_any_thread(run_child, tmp_path, library):
    write_regions(tmp_path)
    run_child("child_memory", library)


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_the_driver_refuses_raises_its_call_and_its_error(run_child, tmp_path, library):
    write_regions(tmp_path)
    write_whole(tmp_path / "psdiff_sm_90_c96_d8.cubin", compile_nvrtc("sm_90", SHIPPED_SIZE))
    run_child("child_errors", library)


def test_a_copy_takes_host_arrays_that_are_whole_and_fit():
    whole, pointer = np.zeros((4, 4), np.float32), 4096
    check_copy(pointer, whole, 64)
    check_copy(whole, pointer, 64)
    check_copy(pointer, pointer, 64)
    with pytest.raises(
        ValueError, match="source must be a contiguous array of 64 bytes, got strided 64 bytes"
    ):
        check_copy(pointer, whole.T, 64)
    with pytest.raises(
        ValueError, match="destination must be a contiguous array of 60 bytes, got contiguous 64"
    ):
        check_copy(whole, pointer, 60)
    whole.flags.writeable = False
    with pytest.raises(
        ValueError, match="destination must be writeable, got a read-only array: copy it first"
    ):
        check_copy(whole, pointer, 64)


def test_memory_is_viewed_as_an_array_that_fits():
    memory = Memory(4096, 100, lambda: None)
    assert memory.array((5, 10), "bf16") == DeviceArray(4096, (5, 10), "bf16")
    with pytest.raises(ValueError, match=r"shape must fit 100 bytes, got \(5, 11\) of f16: 110 bytes"):
        memory.array((5, 11), "f16")
    with pytest.raises(ValueError, match="dtype must be one of f32, f16, bf16, u8, i32, got 'float32'"):
        memory.array((5,), "float32")


def test_a_missing_library_is_named_with_what_to_install(run_child):
    run_child("child_no_library")


def test_a_missing_driver_is_named_with_what_to_install():
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(DriverNotFoundError, match=r"libcuda.so.1 must be on this machine.*NVIDIA driver"):
            open_driver()
    else:
        pytest.skip("this machine has the CUDA driver")


def test_an_unknown_library_is_refused():
    with pytest.raises(ValueError, match=r"library must be cuda-python or pycuda, got 'cupy'"):
        open_driver("cupy")


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_nvrtc_compiles_every_kernel_with_no_header_but_ours(arch):
    """For the stand-in's sm_87 the test below does, at the first start."""
    assert compile_nvrtc(arch)[:4] == ELF


@pytest.mark.slow
def test_the_shipped_kernels_are_compiled_at_the_first_start_only(run_child):
    run_child("child_default_kernels")


@needs_nvrtc
def test_a_cubin_is_compiled_once_for_each_text_architecture_and_size(tmp_path, monkeypatch):
    source, folder = tmp_path / "csrc", tmp_path / "cache"
    source.mkdir()
    (source / "platform.cuh").write_text("#define VALUE 1\n")
    text = '#include "platform.cuh"\nextern "C" __global__ void k(int* p) { *p = VALUE; }\n'
    (source / "entries.cu").write_text(text)
    monkeypatch.setattr(compiling, "CSRC", source)
    first = cached_cubin("sm_87", folder)
    [kept] = folder.iterdir()
    assert kept.read_bytes() == first
    kept.write_bytes(b"kept")
    assert cached_cubin("sm_87", folder) == b"kept"
    cached_cubin("sm_90", folder)
    cached_cubin("sm_87", folder, (64, 16))
    (source / "platform.cuh").write_text("#define VALUE 2\n")
    assert cached_cubin("sm_87", folder) not in (first, b"kept")
    assert len(list(folder.iterdir())) == 4


def test_a_file_that_cannot_be_replaced_leaves_nothing_behind(tmp_path):
    (tmp_path / "x.cubin").mkdir()
    with pytest.raises(OSError, match=r"x\.cubin"):
        write_whole(tmp_path / "x.cubin", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["x.cubin"]


def run_compile(*arguments):
    return CliRunner().invoke(compiling.app, [str(argument) for argument in arguments])


@needs_nvrtc
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--arch", "sm_99"), 1, "arch must be one that this compiler knows, as sm_87, got sm_99"),
        (("--arch", "orin"), 2, "--arch must be sm_ and a number"),
        (("--arch", "sm_87", "--channels", 33, "--width", 8), 1, "C must be a multiple of 32"),
        (("--arch", "sm_87", "--channels", 64), 2, "must be given together"),
    ],
)
def test_what_cannot_be_compiled_is_explained(tmp_path, arguments, code, said):
    done = run_compile(*arguments, "--out", tmp_path)
    assert done.exit_code == code
    assert said in " ".join(done.output.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_a_missing_nvcc_is_explained(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CompileError, match="nvcc must be on PATH, got none: install a CUDA toolkit"):
        compile_nvcc("sm_87")


if __name__ == "__main__":
    # PyCUDA links to more of the driver than the stand-in has: what nothing calls need not be there.
    sys.setdlopenflags(os.RTLD_LAZY)
    globals()[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
