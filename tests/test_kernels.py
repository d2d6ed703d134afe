"""Multi-level ROIAlign: known values of the reference, and the bag form against it."""

import pytest
import torch
from psdiff.kernels.ops import multilevel_roi_align_op
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


def test_the_graph_node_passes_opcheck():
    features = [feature.detach() for feature in pyramid(64, 64)]
    boxes = torch.tensor([[[4.0, 4, 40, 60], [0.0, 0, 8, 8]]]).repeat(2, 1, 1)
    torch.library.opcheck(multilevel_roi_align_op, (features, boxes, 7, 2, 112.0))


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
