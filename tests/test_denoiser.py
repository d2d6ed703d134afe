"""The network: counts, FLOPs, invariances and switches."""

import pytest
import torch
from psdiff.models.backbone import Backbone
from psdiff.models.config import PSDiffConfig, load_preset, preset_names
from psdiff.models.denoiser import Attention, DynamicConv, TimeEmbedding, apply_deltas
from psdiff.models.person_search import PSDiff
from torch.utils.flop_counter import FlopCounterMode

PAPER_GFLOPS = {1: 301, 2: 309, 4: 333, 8: 390}

# The form that fits the paper's "31M" alone, and a DiffusionDet-like one, as ablations of the default.
MEAN_POOLED = {"reduction": "mean", "position_code": False}
DIFFUSIONDET_LIKE = {
    "reduction": "linear",
    "position_code": False,
    "self_attention": "inter",
    "dynamic_dim": 64,
    "ffn_dim": 2048,
}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(config):
    with torch.device("meta"):
        return PSDiff(config)


def tiny(**changes):
    settings = {
        "backbone": "mobilenet_v2",
        "height": 64,
        "width": 96,
        "channels": 16,
        "separable_fpn": True,
        "num_proposals": 7,
        "embedding_dim": 12,
        "num_heads": 4,
        "dynamic_dim": 4,
        "ffn_dim": 32,
        "time_dim": 16,
        "time_hidden": 32,
        "canonical_size": 32.0,
    }
    torch.manual_seed(0)
    return PSDiff(PSDiffConfig.model_validate(settings | changes)).eval()


def step_inputs(model, batch=2, proposals=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    images = torch.randint(
        0, 256, (batch, config.height, config.width, 3), generator=generator, dtype=torch.uint8
    )
    boxes = torch.randn(batch, proposals, 4, generator=generator)
    embeddings = torch.randn(batch, proposals, config.embedding_dim, generator=generator)
    return images, boxes, embeddings, torch.full((batch,), 749), torch.full((batch,), 499)


@torch.no_grad()
def one_step(model, images, boxes, embeddings, t, t_next):
    return model.denoise_step(model.backbone(images), boxes, embeddings, t, t_next)


@pytest.mark.parametrize(
    ("changes", "total", "layer"),
    [
        ({}, 31_330_285, 4_530_989),
        (MEAN_POOLED, 31_010_261, 4_210_965),
        (MEAN_POOLED | {"ffn_dim": 0}, 30_746_837, 3_947_541),
        (DIFFUSIONDET_LIKE, 42_378_565, 15_579_269),
    ],
)
def test_the_r50_model_has_the_known_number_of_parameters(changes, total, layer):
    model = on_meta(load_preset("psdiff_r50").model_copy(update=changes))
    assert (count(model), count(model.denoiser)) == (total, layer)


def test_the_parts_have_the_known_number_of_parameters():
    r50 = on_meta(load_preset("psdiff_r50")).backbone
    assert count(r50.stages) == 23_454_912
    assert count(r50.fpn) == 3_344_384
    swin = on_meta(load_preset("psdiff_swin_b")).backbone
    # torchvision's body has one norm at its exit; ours has one after each of the first three stages too.
    assert count(swin.stages) == 86_743_224 + 2 * (128 + 256 + 512)


@pytest.mark.parametrize(
    ("size", "gflops"),
    [((768, 1344), 285.08), ((800, 1333), 295.80), ((800, 1344), 296.96), ((800, 1088), 240.40)],
)
def test_the_r50_pyramid_costs_the_known_flops(size, gflops):
    with torch.device("meta"):
        backbone = Backbone(load_preset("psdiff_r50"))
        images = torch.zeros(1, *size, 3, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        backbone(images)
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflops, abs=0.01)


def test_the_total_flops_are_within_2_5_percent_of_the_paper():
    model = load_preset("psdiff_r50")
    backbone = 285.08
    for steps, paper in PAPER_GFLOPS.items():
        total = backbone + steps * layer_gflops(model)
        assert abs(total - paper) / paper <= 0.025, (steps, total)


def layer_gflops(config, proposals=300):
    """FLOPs of one denoising step without ROIAlign's interpolation, which no FLOP count includes."""
    with torch.device("meta"):
        denoiser = PSDiff(config).denoiser
    tokens = torch.zeros(proposals, config.pool_size**2, config.channels, device="meta")
    denoiser._pool = lambda features, boxes: tokens
    boxes = torch.zeros(1, proposals, 4, device="meta")
    embeddings = torch.zeros(1, proposals, config.embedding_dim, device="meta")
    with FlopCounterMode(display=False) as counter:
        denoiser([], boxes, embeddings, torch.zeros(1, dtype=torch.int64, device="meta"))
    return counter.get_total_flops() / 1e9


def test_the_layer_of_the_mean_pooled_form_costs_the_known_flops_linear_in_n():
    config = load_preset("psdiff_r50").model_copy(update=MEAN_POOLED)
    assert layer_gflops(config) == pytest.approx(13.62, abs=0.02)
    assert layer_gflops(config, 600) == pytest.approx(2 * layer_gflops(config), rel=1e-3)


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_makes_a_pyramid_of_strides_4_to_32(preset):
    config = load_preset(preset)
    with torch.device("meta"):
        pyramid = PSDiff(config).backbone(torch.zeros(1, 128, 192, 3, dtype=torch.uint8))
    assert [tuple(level.shape) for level in pyramid] == [
        (1, config.channels, 128 // stride, 192 // stride) for stride in (4, 8, 16, 32)
    ]


def test_an_unknown_preset_names_the_closest():
    with pytest.raises(ValueError, match=r"preset must be one of .*, got psdif_r50; did you mean psdiff_r50"):
        load_preset("psdif_r50")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"self_attention": "inter"},
        {"self_attention": "none", "dynamic_conv": False, "cross_attention": False},
        {"dynamic_conv": False},
        {"cross_attention": False},
        {"head": "parallel"},
        {"head": "joint", "embedding_gain": "wiener"},
        {"reduction": "mean", "position_code": False},
        {"reduction": "linear", "ffn_dim": 0},
    ],
)
def test_every_switch_runs_and_reaches_the_outputs(changes):
    default, model = tiny(), tiny(**changes)
    inputs = step_inputs(model)
    outputs = one_step(model, *inputs)
    shapes = [tuple(output.shape) for output in outputs]
    assert shapes == [(2, 7, 4), (2, 7, 12), (2, 7, 4), (2, 7), (2, 7, 12)]
    assert all(output.isfinite().all() for output in outputs)
    if changes:
        assert not torch.equal(outputs[3], one_step(default, *inputs)[3])


def test_permuting_proposals_permutes_the_outputs():
    model = tiny()
    images, boxes, embeddings, t, t_next = step_inputs(model)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    plain = one_step(model, images, boxes, embeddings, t, t_next)
    permuted = one_step(model, images, boxes[:, order], embeddings[:, order], t, t_next)
    for a, b in zip(plain, permuted, strict=True):
        torch.testing.assert_close(a[:, order], b, atol=1e-5, rtol=1e-4)


def test_an_image_is_the_same_alone_and_in_a_batch():
    model = tiny()
    inputs = step_inputs(model)
    together = one_step(model, *inputs)
    for i in range(2):
        alone = one_step(model, *(part[i : i + 1] for part in inputs))
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i : i + 1], b, atol=1e-5, rtol=1e-4)


def test_images_of_one_batch_may_be_at_different_timesteps():
    model = tiny()
    images, boxes, embeddings, _, _ = step_inputs(model)
    t, t_next = torch.tensor([999, 249]), torch.tensor([499, -1])
    together = one_step(model, images, boxes, embeddings, t, t_next)
    for i in range(2):
        alone = one_step(model, *(part[i : i + 1] for part in (images, boxes, embeddings, t, t_next)))
        torch.testing.assert_close(together[0][i : i + 1], alone[0], atol=1e-5, rtol=1e-4)


def test_without_noise_left_the_state_is_the_clamped_prediction():
    model = tiny()
    images, boxes, embeddings, t, _ = step_inputs(model)
    outputs = one_step(model, images, boxes, embeddings, t, torch.full((2,), -1))
    torch.testing.assert_close(outputs[1], 3.0 * outputs[4], atol=1e-5, rtol=1e-5)
    assert outputs[0].abs().max() <= 2.0 + 1e-5


def test_the_wiener_gain_hides_pure_noise_and_keeps_a_clean_embedding():
    model = tiny(embedding_gain="wiener")
    noise = torch.randn(1, 3, 12)
    assert model.denoiser._gain(noise, torch.tensor([999])).abs().max() < 1e-3
    clean = 3.0 * torch.nn.functional.normalize(noise, dim=-1)
    rms = model.denoiser._gain(clean, torch.tensor([0])).square().mean().sqrt().item()
    assert rms == pytest.approx(1.0, rel=0.01)


def test_the_time_embedding_has_its_known_values():
    sinusoid = TimeEmbedding(256, 8, 4).sinusoid(torch.tensor([0, 1]))
    assert sinusoid[0].tolist() == [0.0] * 128 + [1.0] * 128
    picked = sinusoid[1][[0, 1, 127, 128]].tolist()
    assert picked == pytest.approx([0.841471, 0.801647, 1e-4, 0.540302], abs=1e-6)
    assert sinusoid.norm(dim=1).tolist() == pytest.approx([128**0.5] * 2, rel=1e-6)


def test_deltas_of_zero_keep_a_box_and_ln_two_doubles_it():
    box = torch.tensor([[0.2, 0.4, 0.4, 0.8]])
    torch.testing.assert_close(apply_deltas(box, torch.zeros(1, 4)), box)
    moved = apply_deltas(box, torch.tensor([[2.0, 2.0, 0.6931472, 0.6931472]]))
    torch.testing.assert_close(moved, torch.tensor([[0.3, 0.6, 0.7, 1.4]]), atol=1e-6, rtol=0)


def test_only_the_position_code_tells_a_shuffled_region_from_the_original():
    tokens, embedding = torch.randn(2, 49, 16), torch.randn(2, 16)
    shuffled = tokens[:, torch.randperm(49)]
    mean = DynamicConv(tiny(reduction="mean", position_code=False).config)
    torch.testing.assert_close(mean(tokens, embedding), mean(shuffled, embedding), atol=1e-5, rtol=1e-4)
    squeeze = DynamicConv(tiny().config)
    assert (squeeze(tokens, embedding) - squeeze(shuffled, embedding)).abs().max() > 1e-2


def test_attention_of_one_query_is_attention():
    torch.manual_seed(0)
    attention = Attention(16, 4)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    query, tokens = torch.randn(5, 16), torch.randn(5, 9, 16)
    torch.testing.assert_close(attention.of_one_query(query, tokens), attention(query[:, None], tokens)[:, 0])
