"""The noise process against known numbers and identities."""

import itertools

import numpy as np
import pytest
import torch
from psdiff.models.diffusion import (
    NoiseSchedule,
    boxes_to_signal,
    cosine_alphas_cumprod,
    ddim_sigma,
    ddim_step,
    embeddings_to_signal,
    pad_people,
    q_sample,
    signal_to_boxes,
)
from psdiff.models.sampling import sampling_timesteps

T = 1000

ABAR = {
    0: 0.9999587158,
    124: 0.957804591,
    249: 0.8470121613,
    374: 0.6842265658,
    499: 0.4938435904,
    624: 0.3043948894,
    749: 0.1442721024,
    874: 0.03747195477,
    998: 2.428766907e-6,
    999: 2.428766907e-9,
}


def levels(schedule, *timesteps):
    return [schedule.at(torch.tensor([t])) for t in timesteps]


def test_the_cosine_schedule_has_its_known_values():
    abar = cosine_alphas_cumprod(T)
    assert abar.dtype == torch.float64
    for t, value in ABAR.items():
        assert abar[t].item() == pytest.approx(value, rel=1e-9, abs=1e-15), t


def test_only_the_last_beta_is_clipped():
    abar = cosine_alphas_cumprod(T)
    betas = 1 - abar / torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    assert betas[[0, 499, 998, 999]].tolist() == pytest.approx(
        [4.128422482e-5, 0.00314588623, 0.749999393, 0.999], rel=1e-6
    )
    assert (betas >= 0.999 - 1e-12).sum() == 1


def test_levels_leave_the_schedule_as_float32_and_minus_one_is_clean():
    schedule = NoiseSchedule(T)
    clean, noisy = levels(schedule, -1, 999)
    assert clean.signal.dtype == noisy.noise.dtype == torch.float32
    assert (clean.signal.item(), clean.noise.item()) == (1.0, 0.0)
    assert noisy.signal.item() == pytest.approx(4.928252131e-5, rel=1e-6)


def test_ddim_sigma_with_eta_one_has_its_known_values():
    schedule = NoiseSchedule(T)
    grid = levels(schedule, 999, 749, 499, 249, -1)
    sigmas = [ddim_sigma(now, after, 1.0).item() for now, after in itertools.pairwise(grid)]
    assert sigmas == pytest.approx([0.92505561, 0.64706486, 0.35500321, 0.0], abs=1e-6)
    companions = [
        max(after.noise.item() ** 2 - sigma**2, 0) ** 0.5
        for after, sigma in zip(grid[1:], sigmas, strict=True)
    ]
    # The first is the square root of a difference of 1e-8 between float32 numbers: loose on purpose.
    assert companions[1:] == pytest.approx([0.29574224, 0.16419670, 0.0], abs=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_perfect_model_gives_the_exact_result_for_every_k_and_eta(steps, eta):
    schedule, generator = NoiseSchedule(T), torch.Generator().manual_seed(0)
    x_0, x_t, noise = (torch.randn(1, 5, 4, generator=generator) for _ in range(3))
    grid = [*sampling_timesteps(steps, T, 1.0), -1]
    for t, t_next in itertools.pairwise(grid):
        x_t = ddim_step(x_t, x_0, *levels(schedule, t, t_next), eta=eta, noise=noise)
    torch.testing.assert_close(x_t, x_0, atol=1e-5, rtol=0)


def test_with_eta_zero_and_a_perfect_model_the_noise_direction_never_changes():
    schedule, generator = NoiseSchedule(T), torch.Generator().manual_seed(1)
    x_0, noise = (torch.randn(1, 5, 4, generator=generator) for _ in range(2))
    x_t = q_sample(x_0, noise, *levels(schedule, 999))
    for t, t_next in ((999, 749), (749, 499), (499, 249)):
        x_t = ddim_step(x_t, x_0, *levels(schedule, t, t_next))
        torch.testing.assert_close(x_t, q_sample(x_0, noise, *levels(schedule, t_next)), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("steps", "expected"), [(1, 2.464126e-5), (2, 0.3319537), (4, 0.5032825), (8, 0.5989040), (50, 0.6886383)]
)
def test_ddim_on_a_linear_gaussian_model_has_its_known_results(steps, expected):
    abar = torch.cat([torch.ones(1, dtype=torch.float64), cosine_alphas_cumprod(T)])
    x_t, variance = torch.ones(1, 1, 1, dtype=torch.float64), 0.5
    grid = [*sampling_timesteps(steps, T, 1.0), -1]
    schedule = NoiseSchedule(T)
    schedule.signal, schedule.noise = abar.sqrt(), (1 - abar).sqrt()
    for t, t_next in itertools.pairwise(grid):
        now, after = levels(schedule, t, t_next)
        x_0 = now.signal * variance * x_t / (now.signal**2 * variance + now.noise**2)
        x_t = ddim_step(x_t, x_0, now, after)
    assert x_t.item() == pytest.approx(expected, rel=1e-6)


def test_eta_above_zero_asks_for_noise():
    schedule, x = NoiseSchedule(T), torch.zeros(1, 1, 4)
    with pytest.raises(ValueError, match="noise must be given where eta > 0, got None"):
        ddim_step(x, x, *levels(schedule, 999, 499), eta=0.5)


def test_a_whole_frame_box_has_its_known_signal_and_boxes_invert():
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    assert boxes_to_signal(whole, 2.0).tolist() == [[0.0, 0.0, 2.0, 2.0]]
    boxes = torch.tensor([[0.1, 0.2, 0.4, 0.9], [0.0, 0.0, 0.01, 0.5]])
    torch.testing.assert_close(signal_to_boxes(boxes_to_signal(boxes, 2.0), 2.0), boxes)


def test_noise_decodes_to_boxes_with_the_known_statistics_and_no_side_is_zero():
    noise = torch.randn(200_000, 4, generator=torch.Generator().manual_seed(0))
    unit = (noise.clamp(-2, 2) / 2 + 1) / 2
    assert unit.mean().item() == pytest.approx(0.5, abs=2e-3)
    assert unit.std().item() == pytest.approx(0.2398, abs=2e-3)
    assert (unit == 0).float().mean().item() == pytest.approx(0.02275, abs=1e-3)
    boxes = signal_to_boxes(noise, 2.0)
    assert (boxes[:, 2:] - boxes[:, :2]).min().item() >= 0.9e-4


@pytest.mark.parametrize(
    ("t", "energy", "cosine"),
    [(0, 9.010, 0.9994), (249, 46.79, 0.404), (499, 134.0, 0.182), (999, 256.0, 9.2e-6)],
)
def test_noised_embeddings_have_the_known_energy_and_cosine(t, energy, cosine):
    generator = torch.Generator().manual_seed(t)
    clean = embeddings_to_signal(torch.randn(1, 4000, 256, generator=generator), 3.0)
    noised = q_sample(clean, torch.randn(1, 4000, 256, generator=generator), *levels(NoiseSchedule(T), t))
    assert noised.square().sum(-1).mean().item() == pytest.approx(energy, rel=0.01)
    assert torch.cosine_similarity(noised, clean, dim=-1).mean().item() == pytest.approx(cosine, abs=0.005)


def padded(people, padding, proposals=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(people, 2, generator=generator) / 2
    boxes = torch.cat([corner, corner + 0.2], dim=1)
    embeddings = torch.nn.functional.normalize(torch.randn(people, 8, generator=generator), dim=1)
    result = pad_people(
        boxes,
        embeddings,
        proposals,
        box_scale=2.0,
        embedding_scale=3.0,
        padding=padding,
        generator=generator,
    )
    return boxes, embeddings, result


def test_repeat_shares_the_proposals_evenly_with_one_index_for_box_and_embedding():
    boxes, embeddings, result = padded(7, "repeat")
    counts = np.bincount(result.origin.numpy(), minlength=7)
    assert sorted(counts.tolist()) == [42] + [43] * 6
    torch.testing.assert_close(result.boxes_0, boxes_to_signal(boxes, 2.0)[result.origin])
    torch.testing.assert_close(result.emb_0, 3.0 * embeddings[result.origin])


@pytest.mark.parametrize(("padding", "count"), [("gaussian", 7), ("mixed", 150)])
def test_gaussian_proposals_carry_no_embedding(padding, count):
    _, _, result = padded(7, padding)
    assert (result.origin >= 0).sum() == count
    assert result.emb_0[result.origin < 0].abs().max() == 0


def test_more_people_than_proposals_takes_a_subset_and_nobody_gives_gaussian_boxes():
    _, _, crowded = padded(12, "repeat", proposals=5)
    assert len(set(crowded.origin.tolist())) == 5
    _, _, empty = padded(0, "repeat", proposals=5)
    assert empty.origin.tolist() == [-1] * 5
    assert empty.emb_0.abs().max() == 0


def test_padding_depends_on_its_generator_alone():
    first, second, other = padded(7, "mixed"), padded(7, "mixed"), padded(7, "mixed", seed=1)
    assert torch.equal(first[2].boxes_0, second[2].boxes_0)
    assert not torch.equal(first[2].boxes_0, other[2].boxes_0)
