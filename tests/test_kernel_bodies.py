"""Every CUDA kernel body, run on the CPU: against float64, under permuted schedules, and with bugs put in."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import kernel_cases as cases
import kernels_on_host as host
import pytest
import torch
from psdiff.kernels.launches import DeviceArray, dynamic_conv_launch, roi_align_launch

ROI, CONV = "roi_align.cuh", "dynamic_conv.cuh"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(96, 8), (128, 8), (128, 64), (256, 8), (256, 64)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [1, 2])
@pytest.mark.parametrize("count", [1, 3, 150])
def test_roi_align_is_as_exact_as_pytorch(host_kernels, dtype, ratio, count):
    cases.check_roi_align(host_kernels, dtype=dtype, ratio=ratio, count=count)


@pytest.mark.parametrize("channels", [8, 64, 96, 264])
def test_roi_align_takes_channels_that_fill_no_slice(host_kernels, channels):
    cases.check_roi_align(host_kernels, dtype=torch.float16, ratio=2, count=3, channels=channels)


def test_roi_align_takes_maps_of_odd_sizes(host_kernels):
    cases.check_roi_align(host_kernels, dtype=torch.float32, ratio=2, count=20, height=51, width=37)


def test_roi_align_does_not_depend_on_the_schedule(host_kernels):
    first, *others = (
        cases.check_roi_align(host_kernels, dtype=torch.float16, ratio=2, count=20, seed=seed)
        for seed in (0, 7, 12345)
    )
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(("side", "level"), [(111.9, 0), (112, 1), (223.9, 1), (224, 2), (447, 2), (448, 3)])
def test_roi_align_pools_a_box_from_the_level_of_its_size(host_kernels, side, level):
    levels = [torch.full((1, 64 >> k, 64 >> k, 4), float(k)) for k in range(4)]
    boxes, tokens = torch.tensor([[[0.0, 0, side, side]]]), torch.empty(1, 49, 4)
    arrays = [host.array(x) for x in levels]
    settings = {"sampling_ratio": 2, "canonical_size": 224.0}
    host_kernels.run(roi_align_launch(arrays, host.array(boxes), host.array(tokens), **settings))
    # Only the first cells of a large box lie inside these small maps.
    assert tokens[0, 0].tolist() == [level] * 4


def test_boxes_that_are_no_numbers_pool_zeros(host_kernels):
    levels = cases.pyramid(1, 4, height=16, width=16)
    nothing, far = float("nan"), float("inf")
    boxes = torch.tensor([[[nothing] * 4, [0, 0, far, far], [-far, -far, far, far], [0, nothing, 9, 9]]])
    tokens = torch.full((4, 49, 4), 7.0)
    arrays = [host.array(x) for x in levels]
    settings = {"sampling_ratio": 2, "canonical_size": 224.0}
    host_kernels.run(roi_align_launch(arrays, host.array(boxes), host.array(tokens), **settings))
    assert not tokens.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [1, 2])
def test_the_gradient_of_roi_align_is_that_of_autograd(host_kernels, dtype, ratio):
    cases.check_roi_align_grad(host_kernels, dtype=dtype, ratio=ratio, seed=5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "width"), SIZES)
@pytest.mark.parametrize("mean_only", [False, True])
def test_dynamic_conv_is_as_exact_as_pytorch(host_kernels, dtype, channels, width, mean_only):
    settings = {"channels": channels, "width": width, "mean_only": mean_only}
    cases.check_dynamic_conv(host_kernels, dtype=dtype, seed=3, **settings)


@pytest.mark.parametrize("regions", [1, 3, 300])
def test_every_region_is_convolved_with_its_own_kernels(host_kernels, regions):
    cases.check_dynamic_conv(host_kernels, dtype=torch.float16, channels=96, width=8, regions=regions)


@pytest.mark.parametrize(("channels", "width"), [(128, 8), (256, 64)])
def test_dynamic_conv_does_not_depend_on_the_schedule(host_kernels, channels, width):
    first, *others = (
        cases.check_dynamic_conv(host_kernels, dtype=torch.float16, channels=channels, width=width, seed=seed)
        for seed in (0, 7, 12345)
    )
    assert all(torch.equal(first, other) for other in others)


def test_a_large_offset_does_not_cost_the_variance_its_digits(host_kernels):
    # Rows of hidden values around 1,000 with a spread of 1: the difference of squares would keep three digits.
    tokens, params = torch.zeros(1, 49, 96), torch.zeros(1, 2 * 96 * 8)
    tokens[:, :, 0] = 1.0
    params.view(1, 2, -1)[:, 0, :8] = 1000 + torch.linspace(-1, 1, 8)
    params.view(1, 2, -1)[:, 1] = torch.randn(96 * 8, generator=torch.Generator().manual_seed(0))
    norms = [(torch.ones(size), torch.zeros(size)) for size in (8, 96)]
    out = torch.empty(1, 49, 96)
    arrays = [host.array(tokens), host.array(params), *(tuple(map(host.array, n)) for n in norms)]
    host_kernels.run(dynamic_conv_launch(*arrays, host.array(out)))
    exact = cases.conv_in(torch.float64, (tokens, params, *norms))
    assert (out - exact).abs().max() < 1e-3


# ---- what a launch refuses ----


def good_roi_align():
    levels = [DeviceArray(16, (2, 8, 8, 64), "f16")] * 4
    return {
        "levels": levels,
        "boxes_xyxy": DeviceArray(16, (2, 5, 4), "f32"),
        "tokens": DeviceArray(16, (10, 49, 64), "f16"),
        "sampling_ratio": 2,
        "canonical_size": 224.0,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": []}, "levels must be 4 arrays, p2 to p5, got 0"),
        (
            {"levels": [DeviceArray(16, (2, 8, 8, 64), "u8")] * 4},
            "levels[0] must be f32 or f16 or bf16, got u8",
        ),
        (
            {"levels": [DeviceArray(16, (2, 8, 8, 60), "f16")] * 4},
            "channels must be a multiple of 8 in f16, got 60",
        ),
        (
            {"levels": [DeviceArray(8, (2, 8, 8, 64), "f16")] * 4},
            "levels[0] must start at a multiple of 16 bytes",
        ),
        (
            {"boxes_xyxy": DeviceArray(16, (2, 0, 4), "f32")},
            "boxes_xyxy must hold 1 to 1048576 regions, got 0",
        ),
        (
            {"boxes_xyxy": DeviceArray(16, (2, 600000, 4), "f32")},
            "must hold 1 to 1048576 regions, got 1200000",
        ),
        ({"boxes_xyxy": DeviceArray(16, (2, 5, 4), "f16")}, "boxes_xyxy must be f32, got f16"),
        (
            {"boxes_xyxy": DeviceArray(16, (3, 5, 4), "f32")},
            "boxes_xyxy must be of shape (2, 5, 4), got (3, 5, 4)",
        ),
        ({"tokens": DeviceArray(16, (10, 64, 49), "f16")}, "tokens must be of shape (10, 49, 64)"),
        ({"sampling_ratio": 0}, "sampling_ratio must be 1 or 2, got 0"),
        ({"canonical_size": float("nan")}, "canonical_size must be above 0, got nan"),
    ],
)
def test_a_launch_of_roi_align_names_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        roi_align_launch(**(good_roi_align() | change))


@pytest.mark.parametrize(
    ("position", "array", "message"),
    [
        (0, DeviceArray(16, (3, 48, 96), "f16"), "tokens must be of shape (3, 49, 96), got (3, 48, 96)"),
        (0, DeviceArray(16, (0, 49, 96), "f16"), "tokens must hold 1 to 1048576 regions, got 0"),
        (0, DeviceArray(16, (3, 49, 100), "f16"), "channels must be a multiple of 32, got 100"),
        (1, DeviceArray(16, (3, 1535), "f16"), "params must be of shape (3, 1536), got (3, 1535)"),
        (1, DeviceArray(16, (3, 1536), "f32"), "params must be f16, got f32"),
        (2, (DeviceArray(16, (9,), "f32"),) * 2, "norm1 must be over 8 values or a multiple of 16, got 9"),
        (3, (DeviceArray(16, (96,), "f16"),) * 2, "norm2 weight must be f32, got f16"),
        (4, DeviceArray(16, (3, 49, 95), "f16"), "out must be of shape (3, 49, 96), got (3, 49, 95)"),
    ],
)
def test_a_launch_of_dynamic_conv_names_what_is_wrong(position, array, message):
    good = [
        DeviceArray(16, (3, 49, 96), "f16"),
        DeviceArray(16, (3, 1536), "f16"),
        (DeviceArray(16, (8,), "f32"),) * 2,
        (DeviceArray(16, (96,), "f32"),) * 2,
        DeviceArray(16, (3, 49, 96), "f16"),
    ]
    with pytest.raises(ValueError, match=re.escape(message)):
        dynamic_conv_launch(*[array if place == position else x for place, x in enumerate(good)])


@pytest.mark.slow
def test_every_seeded_bug_is_caught(tmp_path):
    if host.missing_compiler():
        pytest.skip(host.missing_compiler())
    script = Path(__file__).parent / "kernel_bugs.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, tmp_path], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = dict(line.split(": ") for line in done.stdout.splitlines())
    controls = {name: outcomes.pop(name) for name in list(outcomes) if name.startswith("no bug")}
    assert len(controls) == 7
    assert set(controls.values()) == {"missed"}, controls
    assert len(outcomes) >= 27
    assert set(outcomes.values()) == {"caught"}, outcomes


def test_a_barrier_that_not_all_threads_reach_is_reported(tmp_path):
    if host.missing_compiler():
        pytest.skip(host.missing_compiler())
    shutil.copytree(host.CSRC, tmp_path / "csrc")
    path = tmp_path / "csrc" / ROI
    source = path.read_text(encoding="utf-8")
    changed = source.replace(
        "  __syncthreads();\n  return level;", "  if (threadIdx.x < 100) __syncthreads();\n  return level;"
    )
    path.write_text(changed, encoding="utf-8")
    kernels = host.HostKernels(host.build(tmp_path, tmp_path / "csrc", "-Wno-error"))
    with pytest.raises(RuntimeError, match="threads wait for each other in block 0"):
        cases.check_roi_align(kernels, dtype=torch.float32, ratio=2, count=1)


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_no_kernel_leaves_its_buffers(broken, tmp_path):
    if host.missing_compiler():
        pytest.skip(host.missing_compiler())
    runtime = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(runtime).is_file():
        pytest.skip("libasan is missing: install g++'s sanitizer library")
    shutil.copytree(host.CSRC, tmp_path / "csrc")
    flags, sizes = ["-fsanitize=address", "-g1", "-O1"], []
    if broken:
        # One size is enough to be seen.
        flags, sizes = [*flags, "-DPSD_CHANNELS=96", "-DPSD_WIDTH=8"], ["96", "8"]
        # Rows 49 to 63 of the last region lie behind its end; their values are thrown away, so only this sees it.
        path = tmp_path / "csrc" / CONV
        source = path.read_text(encoding="utf-8")
        path.write_text(
            source.replace("return row < kCells ? __ldg", "return true ? __ldg").replace(
                "x[half][block] = row < kCells ? ", "x[half][block] = true ? "
            ),
            encoding="utf-8",
        )
    library = host.build(tmp_path, tmp_path / "csrc", *flags)
    script = Path(__file__).parent / "host_gpu" / "under_sanitizer.py"
    environment = os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, script, library, *sizes],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if broken:
        assert done.returncode
        assert "heap-buffer-overflow" in done.stderr
    else:
        assert done.returncode == 0, done.stderr[-3000:]
        assert "every kernel ran" in done.stdout
