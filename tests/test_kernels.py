"""Multi-level ROIAlign: known values of the reference, and the bag form against it."""

import pytest
import torch
from psdiff.kernels.ops import (
    dynamic_conv_op,
    implementation,
    multilevel_roi_align_op,
    roi_align_grad_op,
)
from psdiff.kernels.reference import dynamic_conv, multilevel_roi_align, pyramid_levels
from psdiff.kernels.roi_bags import multilevel_roi_align_bags
from torchvision.ops import roi_align


def ramp(height, width):
    return torch.arange(width, dtype=torch.float32).expand(1, 1, height, width).contiguous()


def pyramid(height, width, channels=5, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, channels, height // s, width // s, generator=generator).requires_grad_()
        for s in (4, 8, 16, 32)
    ]


def test_roi_align_is_half_pixel_aligned():
    box = torch.tensor([[0.0, 2, 2, 8, 8]])
    columns = roi_align(ramp(12, 12), box, 3, 1.0, 2, aligned=True)[0, 0, 0]
    assert columns.tolist() == pytest.approx([2.5, 4.5, 6.5])


@pytest.mark.parametrize("pool", [multilevel_roi_align, multilevel_roi_align_bags])
def test_a_ramp_is_sampled_at_the_cell_centres_of_the_right_level(pool):
    # p2 holds the ramp: cells of 4 canvas pixels. The box of 24 pixels goes to p2 at a canonical size of 224.
    features = [ramp(16, 16), *(torch.full((1, 1, 16 >> k, 16 >> k), -1.0) for k in (1, 2, 3))]
    box = torch.tensor([[[8.0, 8, 32, 32]]])
    tokens = pool(features, box, pool_size=3, sampling_ratio=2, canonical_size=224.0)
    assert tokens[0, :3, 0].tolist() == pytest.approx([2.5, 4.5, 6.5])


@pytest.mark.parametrize("pool", [multilevel_roi_align, multilevel_roi_align_bags])
def test_an_empty_box_samples_its_point_and_a_far_box_gives_zero(pool):
    features = [ramp(16, 16), *(torch.zeros(1, 1, 16 >> k, 16 >> k) for k in (1, 2, 3))]
    boxes = torch.tensor([[[20.0, 20, 20, 20], [-900.0, -900, -890, -890]]])
    tokens = pool(features, boxes, pool_size=2, sampling_ratio=2, canonical_size=224.0)
    assert tokens[0].flatten().tolist() == pytest.approx([4.5] * 4)
    assert tokens[1].abs().max() == 0


@pytest.mark.parametrize(
    ("side", "level"),
    [(32, 2), (111.9, 2), (112, 3), (223.9, 3), (224, 4), (447, 4), (448, 5), (900, 5), (0, 2)],
)
def test_a_box_goes_to_the_level_of_its_size(side, level):
    assert pyramid_levels(torch.tensor([[5.0, 5, 5 + side, 5 + side]]), 224.0).item() + 2 == level


@pytest.mark.parametrize("ratio", [1, 2])
@pytest.mark.parametrize("count", [0, 1, 3, 60])
def test_bags_equal_torchvision_forward_and_backward(ratio, count):
    generator = torch.Generator().manual_seed(count)
    corner = torch.rand(2, count, 2, generator=generator) * 260 - 40
    boxes = torch.cat([corner, corner + torch.rand(2, count, 2, generator=generator) * 300], dim=-1)
    arguments = {"pool_size": 7, "sampling_ratio": ratio, "canonical_size": 112.0}
    gradients = []
    outputs = []
    for pool in (multilevel_roi_align, multilevel_roi_align_bags):
        features = pyramid(192, 224)
        tokens = pool(features, boxes, **arguments)
        weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(9))
        (tokens * weights).sum().backward()
        outputs.append(tokens)
        gradients.append([feature.grad for feature in features])
    torch.testing.assert_close(outputs[1], outputs[0], atol=2e-4, rtol=1e-4)
    for bags, reference in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(bags, reference, atol=1e-3, rtol=1e-4)


def channels_last(features):
    return [feature.detach().permute(0, 2, 3, 1).contiguous().requires_grad_() for feature in features]


# opcheck itself reads .grad of the copies that it makes.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("count", [0, 2])
def test_roi_align_is_a_sound_operator(count):
    boxes = torch.tensor([[[4.0, 4, 40, 60], [0.0, 0, 8, 8]]]).repeat(2, 1, 1)[:, :count]
    maps = channels_last(pyramid(64, 64))
    torch.library.opcheck(multilevel_roi_align_op, (maps, boxes, 7, 2, 112.0))
    upstream = torch.randn(2 * count, 49, 5)
    sizes = [16, 8, 4, 2]
    torch.library.opcheck(roi_align_grad_op, (upstream, boxes, sizes, sizes, 2, 112.0))


def test_the_gradient_of_the_roi_align_operator_is_that_of_the_reference():
    boxes = torch.tensor([[[4.0, 4, 40, 60], [0.0, 0, 200, 180]]]).repeat(2, 1, 1)
    features = pyramid(64, 64)
    settings = {"pool_size": 7, "sampling_ratio": 2, "canonical_size": 112.0}
    expected = multilevel_roi_align(features, boxes, **settings)
    maps = channels_last(features)
    tokens = multilevel_roi_align_op(maps, boxes, *settings.values())
    assert torch.equal(tokens, expected)
    weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))
    (expected * weights).sum().backward()
    (tokens * weights).sum().backward()
    for feature, level in zip(features, maps, strict=True):
        torch.testing.assert_close(level.grad.permute(0, 3, 1, 2), feature.grad)


def convolution(regions, channels, width, dtype):
    """tokens, params, weight1, bias1, weight2, bias2, all to be differentiated."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(regions, 49, channels), (regions, 2 * channels * width), (width,), (width,)]
    values = [
        torch.randn(*shape, generator=generator, dtype=dtype) for shape in (*shapes, (channels,), (channels,))
    ]
    return [value.requires_grad_() for value in values]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_dynamic_conv_is_a_sound_operator():
    for regions in (0, 2):
        torch.library.opcheck(dynamic_conv_op, (*convolution(regions, 32, 8, torch.float32), 1e-5))


def test_the_gradient_of_the_dynamic_conv_operator_is_that_of_the_reference():
    ours, plain = convolution(3, 32, 8, torch.float32), convolution(3, 32, 8, torch.float32)
    upstream = torch.randn(3, 49, 32, generator=torch.Generator().manual_seed(1))
    out = dynamic_conv_op(*ours, 1e-5)
    reference = dynamic_conv(*plain[:2], plain[2:4], plain[4:])
    assert torch.equal(out, reference)
    out.backward(upstream)
    reference.backward(upstream)
    for name, got, wanted in zip(("x", "p", "w1", "b1", "w2", "b2"), ours, plain, strict=True):
        torch.testing.assert_close(
            got.grad, wanted.grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_processor_without_the_extension_says_what_it_runs():
    assert "embedding bags" in implementation("cpu")
    assert "kernels" in implementation("cuda")


def test_dynamic_conv_is_two_matrix_products_with_norm_and_relu():
    generator = torch.Generator().manual_seed(0)
    tokens, params = torch.randn(2, 9, 6, generator=generator), torch.randn(2, 2 * 6 * 3, generator=generator)
    norms = [
        (torch.rand(size, generator=generator), torch.rand(size, generator=generator)) for size in (3, 6)
    ]
    result = dynamic_conv(tokens, params, *norms)
    for region in range(2):
        hidden = tokens[region]
        kernels = params[region, :18].view(6, 3), params[region, 18:].view(3, 6)
        for kernel, (weight, bias) in zip(kernels, norms, strict=True):
            hidden = hidden @ kernel
            centred = hidden - hidden.mean(1, keepdim=True)
            hidden = centred / (hidden.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt() * weight + bias
            hidden = hidden.clamp(min=0)
        torch.testing.assert_close(result[region], hidden)
