"""Inputs for the kernels, and checks against float64: shared by the tests, the seeded bugs and the GPU tests.

The bound everywhere: at most twice the error that PyTorch itself makes at the same precision.
"""

import torch
from kernels_on_host import NAMES, array
from psdiff.kernels.launches import dynamic_conv_launch, roi_align_grad_launch, roi_align_launch
from psdiff.kernels.reference import dynamic_conv, multilevel_roi_align

EPSILON = 1e-5
# What is left when PyTorch happens to make no error at all.
LEAST_ERROR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def pyramid(batch, channels, *, height=200, width=272, dtype=torch.float32, seed=1):
    """p2..p5 as (B, h, w, C)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, height // s, width // s, channels, generator=generator).to(dtype)
        for s in (1, 2, 4, 8)
    ]


def boxes_of_all_sizes(batch, count, *, height=800, width=1088, seed=2):
    """(B, N, 4): every level, partly outside; the first few empty, far outside, inverted, and as big as can be."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(batch, count, 2, generator=generator) * torch.tensor([width, height]) - 20
    size = torch.exp(torch.rand(batch, count, 2, generator=generator) * 6 + 1)
    boxes = torch.cat([corner, corner + size], dim=-1)
    awkward = torch.tensor(
        [[50.0, 50, 50, 50], [-500, -500, -400, -400], [90, 80, 60, 40], [-1e6, -1e6, 1e6, 1e6]]
    )
    if count > len(awkward):
        boxes[:, : len(awkward)] = awkward
    return boxes


def own_error(own, exact, dtype):
    return max((own.double() - exact).abs().max().item(), LEAST_ERROR[dtype])


def check_roi_align(kernels, *, dtype, ratio, count, channels=40, seed=0, height=200, width=272):
    """Pool on the host and compare; returns the tokens."""
    batch = 2
    levels = pyramid(batch, channels, dtype=dtype, height=height, width=width)
    boxes = boxes_of_all_sizes(batch, count, height=4 * height, width=4 * width)
    tokens = torch.full((batch * count, 49, channels), float("nan")).to(dtype)
    settings = {"sampling_ratio": ratio, "canonical_size": 224.0}
    kernels.run(roi_align_launch([array(x) for x in levels], array(boxes), array(tokens), **settings), seed)
    exact, own = (
        multilevel_roi_align(
            [level.to(kind).permute(0, 3, 1, 2) for level in levels], boxes.to(kind), pool_size=7, **settings
        )
        for kind in (torch.float64, torch.float32)
    )
    error = (tokens.double() - exact).abs().max().item()
    assert error <= 2 * own_error(own.to(dtype), exact, dtype)
    return tokens


def check_roi_align_grad(kernels, *, dtype=torch.float32, ratio=2, count=20, channels=8, seed=0):
    """The gradient that a kernel scatters, against autograd through the reference."""
    levels = pyramid(2, channels)
    boxes = boxes_of_all_sizes(2, count)
    upstream = torch.randn(2 * count, 49, channels, generator=torch.Generator().manual_seed(3)).to(dtype)
    grads = [torch.zeros_like(level) for level in levels]
    settings = {"sampling_ratio": ratio, "canonical_size": 224.0}
    arrays = [array(grad) for grad in grads]
    kernels.run(roi_align_grad_launch(array(upstream), array(boxes), arrays, **settings), seed)
    for kind in (torch.float64, torch.float32):
        inputs = [level.to(kind).permute(0, 3, 1, 2).requires_grad_() for level in levels]
        pooled = multilevel_roi_align(inputs, boxes.to(kind), pool_size=7, **settings)
        (pooled * upstream.to(kind)).sum().backward()
        wanted = [x.grad.permute(0, 2, 3, 1) for x in inputs if x.grad is not None]
        if kind == torch.float64:
            exact = wanted
    for grad, own, truth in zip(grads, wanted, exact, strict=True):
        assert (grad.double() - truth).abs().max() <= 2 * own_error(own, truth, torch.float32)


def conv_inputs(channels, width, regions, dtype, seed=1):
    """tokens, params, norm1, norm2 as dynamic_conv takes them; parameters of the size that training gives."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(regions, 49, channels, generator=generator).to(dtype)
    params = (torch.randn(regions, 2 * channels * width, generator=generator) * 0.06).to(dtype)
    norms = [
        (torch.rand(size, generator=generator) + 0.5, torch.randn(size, generator=generator) * 0.1)
        for size in (width, channels)
    ]
    return tokens, params, *norms


def check_dynamic_conv(kernels, *, channels, width, dtype, regions=2, seed=0, mean_only=False):
    """Convolve on the host and compare; returns the output."""
    tokens, params, norm1, norm2 = inputs = conv_inputs(channels, width, regions, dtype)
    shape = (regions, channels) if mean_only else (regions, 49, channels)
    out = torch.full(shape, float("nan")).to(dtype)
    arrays = [array(tokens), array(params), tuple(map(array, norm1)), tuple(map(array, norm2)), array(out)]
    kernels.run(dynamic_conv_launch(*arrays, epsilon=EPSILON), seed)
    exact, own = (conv_in(kind, inputs) for kind in (torch.float64, dtype))
    if mean_only:
        exact, own = exact.mean(1), own.mean(1)
    error = (out.double() - exact).abs().max().item()
    assert error <= 2 * own_error(own, exact, dtype), f"{NAMES[dtype]} misses by {error}"
    return out


def conv_in(kind, inputs):
    """The reference with everything in one precision."""
    tokens, params, norm1, norm2 = inputs
    norms = [tuple(part.to(kind) for part in norm) for norm in (norm1, norm2)]
    return dynamic_conv(tokens.to(kind), params.to(kind), *norms)
