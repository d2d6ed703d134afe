"""The two operations as PyTorch calls: which implementation runs is decided here, by device, and nowhere else.

On a CPU both run in PyTorch. On CUDA they run the kernels of csrc where the extension was built, else PyTorch's
reference; `implementation` says which. Under torch.export each stays one node, which export translates.
Legend: B images, N boxes an image, M = B*N regions, C channels, S pool size, P = S*S tokens, D dynamic width.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import reference
from .launches import POOL_SIZE, SAMPLING_RATIOS
from .roi_bags import multilevel_roi_align_bags

EPSILON = 1e-5
"""Of both LayerNorms, as in torch.nn.LayerNorm."""

# An extension that is there and does not load is an error, not a reason to run something slower.
_EXTENSION = "psdiff.kernels._C"
_cuda: ModuleType | None = import_module(_EXTENSION) if find_spec(_EXTENSION) else None


def has_cuda_kernels() -> bool:
    """Whether the extension was built."""
    return _cuda is not None


def implementation(device: torch.device | str) -> str:
    """What runs on a device, in words."""
    if torch.device(device).type == "cpu":
        return "PyTorch: embedding bags for ROIAlign, batched products for dynamic convolution"
    if _cuda is not None:
        return f"CUDA kernels, built for {', '.join(_cuda.architectures())}"
    return "PyTorch's own operators: the CUDA kernels are not built (PSDIFF_CUDA=1, see README)"


def multilevel_roi_align(
    features: Sequence[Tensor],
    boxes_xyxy: Tensor,
    *,
    pool_size: int,
    sampling_ratio: int,
    canonical_size: float,
) -> Tensor:
    """Pool (B, N, 4) boxes from (B, C, h, w) levels -> (B*N, S*S, C); see kernels.reference.

    On CUDA, features in channels_last memory are taken as they lie; others are copied first.
    """
    if torch.compiler.is_exporting():
        maps = [feature.permute(0, 2, 3, 1) for feature in features]
        return multilevel_roi_align_op(maps, boxes_xyxy, pool_size, sampling_ratio, canonical_size)
    settings = {"pool_size": pool_size, "sampling_ratio": sampling_ratio, "canonical_size": canonical_size}
    if boxes_xyxy.device.type == "cpu":
        return multilevel_roi_align_bags(features, boxes_xyxy, **settings)
    if _cuda is None or pool_size != POOL_SIZE or sampling_ratio not in SAMPLING_RATIOS:
        return reference.multilevel_roi_align(features, boxes_xyxy, **settings)
    maps = [feature.permute(0, 2, 3, 1).contiguous() for feature in features]
    boxes = boxes_xyxy.detach().float().contiguous()
    return multilevel_roi_align_op(maps, boxes, pool_size, sampling_ratio, canonical_size)


def dynamic_conv(
    tokens: Tensor, params: Tensor, norm1: tuple[Tensor, Tensor], norm2: tuple[Tensor, Tensor]
) -> Tensor:
    """Convolve (M, P, C) tokens with kernels of each region's own, (M, 2CD) -> (M, P, C); see kernels.reference."""
    if torch.compiler.is_exporting():
        return dynamic_conv_op(tokens, params, *(part.float() for part in (*norm1, *norm2)), EPSILON)
    if not _has_kernel_for(tokens, norm1[0]):
        return reference.dynamic_conv(tokens, params, norm1, norm2)
    # Tokens come out of a LayerNorm, which autocast leaves in float32: products are to run in half precision.
    autocast = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if autocast else tokens.dtype
    norms = [part.float() for part in (*norm1, *norm2)]
    return dynamic_conv_op(tokens.to(dtype).contiguous(), params.to(dtype).contiguous(), *norms, EPSILON)


def _has_kernel_for(tokens: Tensor, weight1: Tensor) -> bool:
    if _cuda is None or tokens.device.type != "cuda" or tokens.shape[1] != POOL_SIZE**2:
        return False
    return _cuda.has_dynamic_conv(tokens.shape[2], weight1.shape[0])


@torch.library.custom_op("psdiff::multilevel_roi_align", mutates_args=())
def multilevel_roi_align_op(
    maps: Sequence[Tensor], boxes_xyxy: Tensor, pool_size: int, sampling_ratio: int, canonical_size: float
) -> Tensor:
    """Pool (B, N, 4) float32 boxes from four contiguous (B, h, w, C) maps -> (B*N, S*S, C).

    On CUDA pool_size must be 7 and sampling_ratio 1 or 2. Differentiable in the maps. Raises ValueError.
    """
    return _reference_on_maps(maps, boxes_xyxy, pool_size, sampling_ratio, canonical_size)


@multilevel_roi_align_op.register_kernel("cuda")
def _roi_align_on_cuda(
    maps: Sequence[Tensor], boxes_xyxy: Tensor, pool_size: int, sampling_ratio: int, canonical_size: float
) -> Tensor:
    return cuda_extension().roi_align(list(maps), boxes_xyxy, pool_size, sampling_ratio, canonical_size)


@multilevel_roi_align_op.register_fake
def _roi_align_shape(
    maps: Sequence[Tensor], boxes_xyxy: Tensor, pool_size: int, sampling_ratio: int, canonical_size: float
) -> Tensor:
    images, boxes = boxes_xyxy.shape[:2]
    return maps[0].new_empty(images * boxes, pool_size**2, maps[0].shape[3])


@torch.library.custom_op("psdiff::multilevel_roi_align_grad", mutates_args=())
def roi_align_grad_op(
    grad_tokens: Tensor,
    boxes_xyxy: Tensor,
    heights: Sequence[int],
    widths: Sequence[int],
    sampling_ratio: int,
    canonical_size: float,
) -> list[Tensor]:
    """(B*N, S*S, C) gradients of tokens -> float32 gradients of the (B, h, w, C) maps."""
    settings = {"sampling_ratio": sampling_ratio, "canonical_size": canonical_size}
    sizes = list(zip(heights, widths, strict=True))
    grads = reference.multilevel_roi_align_grad(grad_tokens.float(), boxes_xyxy, sizes, **settings)
    return [grad.permute(0, 2, 3, 1).contiguous() for grad in grads]


@roi_align_grad_op.register_kernel("cuda")
def _roi_align_grad_on_cuda(
    grad_tokens: Tensor,
    boxes_xyxy: Tensor,
    heights: Sequence[int],
    widths: Sequence[int],
    sampling_ratio: int,
    canonical_size: float,
) -> list[Tensor]:
    sizes = list(heights), list(widths)
    return cuda_extension().roi_align_grad(
        grad_tokens.contiguous(), boxes_xyxy, *sizes, sampling_ratio, canonical_size
    )


@roi_align_grad_op.register_fake
def _roi_align_grad_shape(
    grad_tokens: Tensor,
    boxes_xyxy: Tensor,
    heights: Sequence[int],
    widths: Sequence[int],
    sampling_ratio: int,
    canonical_size: float,
) -> list[Tensor]:
    return [
        grad_tokens.new_empty(boxes_xyxy.shape[0], h, w, grad_tokens.shape[2], dtype=torch.float32)
        for h, w in zip(heights, widths, strict=True)
    ]


def _keep_for_roi_align(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    maps, boxes_xyxy, _, ctx.sampling_ratio, ctx.canonical_size = inputs
    ctx.sizes = [level.shape[1] for level in maps], [level.shape[2] for level in maps]
    ctx.dtype = maps[0].dtype
    ctx.save_for_backward(boxes_xyxy)


def _roi_align_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # noqa: ANN401
    (boxes_xyxy,) = ctx.saved_tensors
    grads = roi_align_grad_op(grad, boxes_xyxy, *ctx.sizes, ctx.sampling_ratio, ctx.canonical_size)
    return [level.to(ctx.dtype) for level in grads], None, None, None, None


multilevel_roi_align_op.register_autograd(_roi_align_backward, setup_context=_keep_for_roi_align)


@torch.library.custom_op("psdiff::dynamic_conv", mutates_args=())
def dynamic_conv_op(
    tokens: Tensor,
    params: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    epsilon: float,
) -> Tensor:
    """Tokens (M, P, C), params (M, 2CD) of one dtype, LayerNorms of D and of C in float32 -> (M, P, C).

    On CUDA P must be 49 and (C, D) one of the sizes that were built. Differentiable in every tensor.
    """
    norms = [part.to(tokens.dtype) for part in (weight1, bias1, weight2, bias2)]
    return reference.dynamic_conv(tokens, params, (norms[0], norms[1]), (norms[2], norms[3]), epsilon)


@dynamic_conv_op.register_kernel("cuda")
def _dynamic_conv_on_cuda(
    tokens: Tensor,
    params: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    epsilon: float,
) -> Tensor:
    return cuda_extension().dynamic_conv(tokens, params, weight1, bias1, weight2, bias2, epsilon, False)


@dynamic_conv_op.register_fake
def _dynamic_conv_shape(
    tokens: Tensor,
    params: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    epsilon: float,
) -> Tensor:
    return torch.empty_like(tokens)


def _keep_for_dynamic_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    *tensors, ctx.epsilon = inputs
    ctx.save_for_backward(*tensors)


def _dynamic_conv_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # noqa: ANN401
    """Computes the hidden rows again: keeping them would cost more memory than everything that is kept."""
    tokens, params, weight1, bias1, weight2, bias2 = ctx.saved_tensors
    (regions, _, channels), width = tokens.shape, weight1.shape[0]
    kernel1, kernel2 = params.split(channels * width, dim=1)
    kernel1, kernel2 = kernel1.view(regions, channels, width), kernel2.view(regions, width, channels)
    rows1 = (tokens @ kernel1).float()
    normed1, mean1, scale1 = torch.ops.aten.native_layer_norm(rows1, [width], weight1, bias1, ctx.epsilon)
    hidden = normed1.relu().to(tokens.dtype)
    rows2 = (hidden @ kernel2).float()
    normed2, mean2, scale2 = torch.ops.aten.native_layer_norm(rows2, [channels], weight2, bias2, ctx.epsilon)

    grad2 = grad.float() * (normed2 > 0)
    grad2, grad_weight2, grad_bias2 = _layer_norm_backward(grad2, rows2, mean2, scale2, weight2, bias2)
    grad2 = grad2.to(tokens.dtype)
    grad_kernel2 = hidden.mT @ grad2
    grad1 = (grad2 @ kernel2.mT).float() * (normed1 > 0)
    grad1, grad_weight1, grad_bias1 = _layer_norm_backward(grad1, rows1, mean1, scale1, weight1, bias1)
    grad1 = grad1.to(tokens.dtype)
    grad_kernel1 = tokens.mT @ grad1
    grad_params = torch.cat([grad_kernel1.flatten(1), grad_kernel2.flatten(1)], dim=1)
    norms = (grad_weight1, grad_bias1, grad_weight2, grad_bias2)
    return (grad1 @ kernel1.mT, grad_params, *norms, None)


def _layer_norm_backward(
    grad: Tensor, rows: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    backward = torch.ops.aten.native_layer_norm_backward
    return backward(grad, rows, list(weight.shape), mean, scale, weight, bias, [True, True, True])


dynamic_conv_op.register_autograd(_dynamic_conv_backward, setup_context=_keep_for_dynamic_conv)


def _reference_on_maps(
    maps: Sequence[Tensor], boxes_xyxy: Tensor, pool_size: int, sampling_ratio: int, canonical_size: float
) -> Tensor:
    return reference.multilevel_roi_align(
        [level.permute(0, 3, 1, 2) for level in maps],
        boxes_xyxy,
        pool_size=pool_size,
        sampling_ratio=sampling_ratio,
        canonical_size=canonical_size,
    )


def cuda_extension() -> ModuleType:
    """The built extension; raises RuntimeError that says how to build it."""
    if _cuda is None:
        raise RuntimeError(
            "psdiff.kernels._C must be built to run this operation on CUDA, got an install without it; "
            "run PSDIFF_CUDA=1 pip install --no-build-isolation -e ."
        )
    return _cuda
