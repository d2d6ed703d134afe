"""Kernel launches as data: entry, grid, block and the bytes of the argument, checked; NumPy only.

Whoever starts kernels without torch (the driver through cuda-python or PyCUDA, the tests on a CPU) hands over what
these functions return. Each argument struct mirrors the one of the same name in csrc, field by field.
Legend: B images, N boxes an image, M = B*N regions, C channels, D dynamic width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LEVELS = 4
POOL_SIZE = 7
CELLS = POOL_SIZE**2
SAMPLING_RATIOS = (1, 2)

# Bytes of one load of the kernels, and of the channels that one block of ROIAlign pools.
VECTOR_BYTES = 16
SLICE_BYTES = 128

# A million regions of 49 x 256 half-precision tokens are 26 GB: more is a mistake of shapes.
MAX_REGIONS = 2**20

ITEM_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "u8": 1, "i32": 4}

ROI_ALIGN_ARGS = np.dtype(
    [
        ("levels", "u8", LEVELS),
        ("boxes_xyxy", "u8"),
        ("tokens", "u8"),
        ("heights", "i4", LEVELS),
        ("widths", "i4", LEVELS),
        ("boxes_per_image", "i4"),
        ("channels", "i4"),
        ("canonical_size", "f4"),
    ],
    align=True,
)
ROI_ALIGN_GRAD_ARGS = np.dtype(
    [
        ("grad_tokens", "u8"),
        ("boxes_xyxy", "u8"),
        ("grad_levels", "u8", LEVELS),
        ("heights", "i4", LEVELS),
        ("widths", "i4", LEVELS),
        ("boxes_per_image", "i4"),
        ("channels", "i4"),
        ("canonical_size", "f4"),
    ],
    align=True,
)
DYNAMIC_CONV_ARGS = np.dtype(
    [
        *((name, "u8") for name in ("tokens", "params", "weight1", "bias1", "weight2", "bias2", "out")),
        ("epsilon", "f4"),
        ("mean_only", "i4"),
    ],
    align=True,
)


class DeviceArray(NamedTuple):
    """A contiguous array in the memory of a device, in row-major order."""

    pointer: int
    shape: tuple[int, ...]
    dtype: str
    """f32, f16, bf16, u8 or i32."""


@dataclass(frozen=True)
class Launch:
    """One kernel to start."""

    entry: str
    """Name of the kernel in csrc/entries.cu."""
    grid: tuple[int, int, int]
    threads: int
    """Per block."""
    args: NDArray[np.void]
    """The one argument, a struct: (1,) of its dtype."""


def roi_align_launch(
    levels: Sequence[DeviceArray],
    boxes_xyxy: DeviceArray,
    tokens: DeviceArray,
    *,
    sampling_ratio: int,
    canonical_size: float,
) -> Launch:
    """Pool boxes from a pyramid; the arithmetic is that of kernels.reference.multilevel_roi_align.

    levels: p2..p5 of (B, h, w, C), one dtype of f32, f16, bf16. boxes_xyxy: (B, N, 4) f32 canvas pixels.
    tokens: (B*N, 49, C) of the levels' dtype, written. sampling_ratio: 1 or 2. Raises ValueError.
    """
    _check_pyramid("levels", levels, ("f32", "f16", "bf16"))
    regions = _check_boxes(levels, boxes_xyxy, sampling_ratio, canonical_size)
    channels, dtype = levels[0].shape[3], levels[0].dtype
    check_array("tokens", tokens, (regions, CELLS, channels), dtype)
    args = np.zeros(1, ROI_ALIGN_ARGS)
    args["levels"] = [level.pointer for level in levels]
    args["tokens"] = tokens.pointer
    _fill_pooling(args, levels, boxes_xyxy, canonical_size)
    return Launch(f"psdiff_roi_align_{dtype}_r{sampling_ratio}", _pooling_grid(regions, tokens), 224, args)


def roi_align_grad_launch(
    grad_tokens: DeviceArray,
    boxes_xyxy: DeviceArray,
    grad_levels: Sequence[DeviceArray],
    *,
    sampling_ratio: int,
    canonical_size: float,
) -> Launch:
    """Add the gradient of pooled tokens to the gradient of the pyramid, which starts at zero.

    grad_tokens: (B*N, 49, C) of f32, f16 or bf16. grad_levels: four (B, h, w, C) f32, summed into. The rest as in
    roi_align_launch.
    """
    _check_pyramid("grad_levels", grad_levels, ("f32",))
    check_dtype("grad_tokens", grad_tokens, ("f32", "f16", "bf16"))
    _check_vectors(grad_levels[0].shape[3], grad_tokens.dtype)
    regions = _check_boxes(grad_levels, boxes_xyxy, sampling_ratio, canonical_size)
    check_array("grad_tokens", grad_tokens, (regions, CELLS, grad_levels[0].shape[3]), grad_tokens.dtype)
    args = np.zeros(1, ROI_ALIGN_GRAD_ARGS)
    args["grad_levels"] = [level.pointer for level in grad_levels]
    args["grad_tokens"] = grad_tokens.pointer
    _fill_pooling(args, grad_levels, boxes_xyxy, canonical_size)
    entry = f"psdiff_roi_align_grad_{grad_tokens.dtype}_r{sampling_ratio}"
    return Launch(entry, _pooling_grid(regions, grad_tokens), 224, args)


def dynamic_conv_launch(
    tokens: DeviceArray,
    params: DeviceArray,
    norm1: tuple[DeviceArray, DeviceArray],
    norm2: tuple[DeviceArray, DeviceArray],
    out: DeviceArray,
    *,
    epsilon: float = 1e-5,
) -> Launch:
    """Convolve regions with kernels of their own; the arithmetic is that of kernels.reference.dynamic_conv.

    tokens: (M, 49, C) of f32, f16 or bf16. params: (M, 2CD), the same dtype. norm1, norm2: LayerNorm (weight,
    bias) of D and of C, f32. out: (M, 49, C), or (M, C) for the mean over the tokens, written. C must be a
    multiple of 32, D 8 or a multiple of 16. Raises ValueError.
    """
    check_dtype("tokens", tokens, ("f32", "f16", "bf16"))
    dtype = tokens.dtype
    regions, _, channels = tokens.shape if len(tokens.shape) == 3 else (0, 0, 0)
    check_array("tokens", tokens, (regions, CELLS, channels), dtype)
    _check_regions("tokens", regions)
    width = norm1[0].shape[0] if norm1[0].shape else 0
    if channels % 32 or not channels:
        raise ValueError(f"channels must be a multiple of 32, got {channels}")
    if width != 8 and (width % 16 or not width):
        raise ValueError(f"norm1 must be over 8 values or a multiple of 16, got {width}")
    check_array("params", params, (regions, 2 * channels * width), dtype)
    for name, norm, size in (("norm1", norm1, width), ("norm2", norm2, channels)):
        for part, array in zip(("weight", "bias"), norm, strict=True):
            check_array(f"{name} {part}", array, (size,), "f32")
    mean_only = len(out.shape) == 2
    check_array("out", out, (regions, channels) if mean_only else (regions, CELLS, channels), dtype)
    args = np.zeros(1, DYNAMIC_CONV_ARGS)
    for name, array in zip(
        DYNAMIC_CONV_ARGS.names or (), (tokens, params, *norm1, *norm2, out), strict=False
    ):
        args[name] = array.pointer
    args["epsilon"], args["mean_only"] = epsilon, mean_only
    return Launch(f"psdiff_dynamic_conv_{dtype}_c{channels}_d{width}", (regions, 1, 1), 128, args)


def check_array(name: str, array: DeviceArray, shape: tuple[int, ...], dtype: str) -> None:
    """Raise ValueError unless an array has this shape and dtype and starts where kernels may load 16 bytes."""
    check_dtype(name, array, (dtype,))
    if array.shape != shape:
        raise ValueError(f"{name} must be of shape {shape}, got {array.shape}")
    if array.pointer % VECTOR_BYTES:
        raise ValueError(f"{name} must start at a multiple of {VECTOR_BYTES} bytes, got {array.pointer:#x}")


def check_dtype(name: str, array: DeviceArray, dtypes: tuple[str, ...]) -> None:
    """Raise ValueError unless an array has one of these dtypes."""
    if array.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(dtypes)}, got {array.dtype}")


def _check_pyramid(name: str, levels: Sequence[DeviceArray], dtypes: tuple[str, ...]) -> None:
    if len(levels) != LEVELS:
        raise ValueError(f"{name} must be {LEVELS} arrays, p2 to p5, got {len(levels)}")
    check_dtype(f"{name}[0]", levels[0], dtypes)
    batch, channels = levels[0].shape[0], levels[0].shape[-1]
    for number, level in enumerate(levels):
        height, width = level.shape[1:3] if len(level.shape) == 4 else (0, 0)
        check_array(f"{name}[{number}]", level, (batch, height, width, channels), levels[0].dtype)
        if height < 1 or width < 1:
            raise ValueError(f"{name}[{number}] must have cells, got {level.shape}")
    _check_vectors(channels, levels[0].dtype)


def _check_vectors(channels: int, dtype: str) -> None:
    vector = VECTOR_BYTES // ITEM_BYTES[dtype]
    if channels % vector or not channels:
        raise ValueError(f"channels must be a multiple of {vector} in {dtype}, got {channels}")


def _check_boxes(
    levels: Sequence[DeviceArray], boxes_xyxy: DeviceArray, sampling_ratio: int, canonical_size: float
) -> int:
    """The number of regions."""
    batch = levels[0].shape[0]
    boxes_per_image = boxes_xyxy.shape[1] if len(boxes_xyxy.shape) == 3 else 0
    check_array("boxes_xyxy", boxes_xyxy, (batch, boxes_per_image, 4), "f32")
    _check_regions("boxes_xyxy", batch * boxes_per_image)
    if sampling_ratio not in SAMPLING_RATIOS:
        raise ValueError(f"sampling_ratio must be 1 or 2, got {sampling_ratio}")
    if not canonical_size > 0:
        raise ValueError(f"canonical_size must be above 0, got {canonical_size}")
    return batch * boxes_per_image


def _fill_pooling(
    args: NDArray[np.void], levels: Sequence[DeviceArray], boxes_xyxy: DeviceArray, canonical_size: float
) -> None:
    args["boxes_xyxy"] = boxes_xyxy.pointer
    args["heights"] = [level.shape[1] for level in levels]
    args["widths"] = [level.shape[2] for level in levels]
    args["boxes_per_image"], args["channels"] = boxes_xyxy.shape[1], levels[0].shape[3]
    args["canonical_size"] = canonical_size


def _pooling_grid(regions: int, tokens: DeviceArray) -> tuple[int, int, int]:
    return regions, -(-tokens.shape[2] * ITEM_BYTES[tokens.dtype] // SLICE_BYTES), 1


def _check_regions(name: str, regions: int) -> None:
    if not 0 < regions <= MAX_REGIONS:
        raise ValueError(f"{name} must hold 1 to {MAX_REGIONS} regions, got {regions}")
