"""The solvers against known numbers: schedule, exactness, orders; float64, no network."""

import itertools
import math

import numpy as np
import pytest
from psdiff.models.sampling import sampling_timesteps
from psdiff.models.solvers import (
    SOLVERS,
    Evaluation,
    SamplerOptions,
    Schedule,
    Stepper,
    cosine_alphas_cumprod,
    ddim,
    ddim_sigma,
    fresh_noise,
)

T = 1000
SCHEDULE = Schedule(T)

# t -> abar, sqrt(abar), sqrt(1 - abar), lambda.
LEVELS = {
    0: (0.9999587158, 0.9999793577, 0.006425280136, 5.047494),
    124: (0.957804591, 0.9786749159, 0.2054152112, 1.561166),
    249: (0.8470121613, 0.9203326362, 0.3911365985, 0.855678),
    374: (0.6842265658, 0.8271798872, 0.5619372155, 0.386632),
    499: (0.4938435904, 0.7027400589, 0.7114467018, -0.012313),
    624: (0.3043948894, 0.5517199375, 0.8340294423, -0.413228),
    749: (0.1442721024, 0.3798316764, 0.9250556187, -0.890126),
    874: (0.03747195477, 0.1935767413, 0.9810851366, -1.622985),
    998: (2.428766907e-6, 0.001558450162, 0.9999987856, -6.464062),
    999: (2.428766907e-9, 4.928252131e-5, 0.9999999988, -9.917941),
}


def grid_of(steps):
    return [*sampling_timesteps(steps, T, 1.0), -1]


def solve(solver, steps, model, x_t, eta=0.0, seed=0):
    """The states at the start of every step, and the result. model: (x_t, t) -> x_0."""
    stepper = Stepper(solver, SCHEDULE, model, eta)
    rng, states = np.random.default_rng(seed), [x_t]
    for t, t_next in itertools.pairwise(grid_of(steps)):
        noise = rng.standard_normal(x_t.shape)
        states.append(stepper.step(states[-1], model(states[-1], t), t, t_next, noise))
    return states


def linear_gaussian(x_t, t):
    """E[x_0 | x_t] where x_0 ~ N(0, 1/2): the perfect network for data that has a spread."""
    level, variance = SCHEDULE.at(t), 0.5
    return level.signal * variance * x_t / (level.abar * variance + 1 - level.abar)


@pytest.mark.parametrize("t", LEVELS)
def test_the_cosine_schedule_has_its_known_values(t):
    level = SCHEDULE.at(t)
    assert [level.abar, level.signal, level.noise] == pytest.approx(LEVELS[t][:3], rel=1e-9, abs=1e-15)
    assert level.log_snr == pytest.approx(LEVELS[t][3], abs=1e-6)


def test_only_the_last_beta_is_clipped():
    abar = cosine_alphas_cumprod(T)
    betas = 1 - abar / np.concatenate([[1.0], abar[:-1]])
    assert betas[[0, 499, 998, 999]] == pytest.approx(
        [4.128422482e-5, 0.00314588623, 0.749999393, 0.999], rel=1e-8
    )
    assert (betas >= 0.999 - 1e-12).sum() == 1


def test_minus_one_is_the_clean_signal():
    clean = SCHEDULE.at(-1)
    assert (clean.signal, clean.noise, clean.log_snr) == (1.0, 0.0, math.inf)


def test_lambda_falls_all_the_way_and_keeps_its_digits_near_pure_noise():
    lambdas = np.array([SCHEDULE.at(t).log_snr for t in range(-1, T)])
    assert (np.diff(lambdas) < 0).all()
    # Where the signal is tiny, lambda = ln sqrt(abar) - ln(1 - abar) / 2 = ln sqrt(abar) + abar / 2 + ...
    abar = SCHEDULE.at(999).abar
    assert lambdas[-1] == pytest.approx(math.log(math.sqrt(abar)) + abar / 2, abs=1e-14)


def test_ddim_with_eta_one_has_its_known_noise_shares():
    levels = [SCHEDULE.at(t) for t in grid_of(4)]
    sigmas = [ddim_sigma(now, after, 1.0) for now, after in itertools.pairwise(levels)]
    assert sigmas == pytest.approx([0.92505561, 0.64706486, 0.35500321, 0.0], abs=5e-9)
    shares = [
        ddim(Evaluation(np.ones(1), np.zeros(1), now), after, eta=1.0, noise=np.zeros(1)).item() * now.noise
        for now, after in itertools.pairwise(levels)
    ]
    assert shares == pytest.approx([1.1103e-4, 0.29574224, 0.16419670, 0.0], abs=5e-9)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 50])
@pytest.mark.parametrize(
    ("solver", "eta"), [*((solver, 0.0) for solver in SOLVERS), ("ddim", 0.5), ("ddim", 1.0)]
)
def test_a_perfect_model_gives_the_exact_result_for_every_solver_k_and_eta(solver, eta, steps):
    rng = np.random.default_rng(0)
    x_0, x_t = rng.standard_normal((2, 3, 5))
    result = solve(solver, steps, lambda x_t, t: x_0, x_t, eta)[-1]
    np.testing.assert_array_equal(result, x_0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_with_a_perfect_model_every_state_keeps_the_first_noise(solver):
    rng = np.random.default_rng(1)
    x_0, noise = rng.standard_normal((2, 3, 5))
    start = SCHEDULE.at(999)
    states = solve(solver, 8, lambda x_t, t: x_0, start.signal * x_0 + start.noise * noise)
    for state, t in zip(states, grid_of(8), strict=True):
        level = SCHEDULE.at(t)
        np.testing.assert_allclose(state, level.signal * x_0 + level.noise * noise, rtol=0, atol=1e-10)


@pytest.mark.parametrize("steps", [2, 3, 4, 8, 50])
def test_ddim_and_both_first_order_solvers_are_one_method(steps):
    x_t = np.random.default_rng(2).standard_normal((3, 5))
    wanted = solve("ddim", steps, linear_gaussian, x_t)
    for solver in ("dpm1", "dpm++1"):
        for state, other in zip(wanted, solve(solver, steps, linear_gaussian, x_t), strict=True):
            np.testing.assert_allclose(other, state, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("solver", "steps", "expected"),
    [
        *((solver, 1, "2.464126e-05") for solver in SOLVERS),
        *((solver, 2, "0.3319537") for solver in SOLVERS),
        ("ddim", 4, "0.5032825"),
        ("dpm++2m", 4, "0.5437604"),
        ("dpm2m", 4, "0.5426271"),
        ("ddim", 8, "0.5989040"),
        ("dpm++2m", 8, "0.6726968"),
        ("dpm2m", 8, "0.6600728"),
        ("ddim", 50, "0.6886383"),
        ("dpm++2m", 50, "0.7075907"),
        ("dpm2m", 50, "0.7061142"),
    ],
)
def test_a_linear_gaussian_model_has_its_known_results(solver, steps, expected):
    result = solve(solver, steps, linear_gaussian, np.ones(1))[-1].item()
    assert f"{result:.7g}" == f"{float(expected):.7g}"


def test_results_of_a_linear_model_scale_with_the_noise():
    for solver in SOLVERS:
        one, three = (solve(solver, 8, linear_gaussian, np.full(1, x))[-1].item() for x in (1.0, 3.0))
        assert three == pytest.approx(3 * one, rel=1e-12)


def test_two_calls_a_step_beat_two_steps_of_one_call():
    """All aim at sqrt(1/2), the spread of the data, which the exact path gives a start of one."""
    errors = {
        solver: abs(solve(solver, 8, linear_gaussian, np.ones(1))[-1].item() - math.sqrt(0.5))
        for solver in SOLVERS
    }
    sixteen = abs(solve("ddim", 16, linear_gaussian, np.ones(1))[-1].item() - math.sqrt(0.5))
    assert errors["dpm2s"] < sixteen < errors["ddim"]


@pytest.mark.parametrize(("steps", "calls"), [(1, 1), (2, 2), (3, 4), (4, 6), (8, 14)])
def test_2s_calls_the_network_a_second_time_inside_all_but_the_first_and_the_last_step(steps, calls):
    seen = []

    def model(x_t, t):
        seen.append(t)
        return linear_gaussian(x_t, t)

    solve("dpm2s", steps, model, np.ones(1))
    assert len(seen) == calls
    assert sorted(seen, reverse=True) == seen
    assert set(sampling_timesteps(steps, T, 1.0)) <= set(seen)


def test_the_midpoint_is_the_whole_timestep_nearest_to_the_middle_of_lambda():
    now, after = SCHEDULE.at(749), SCHEDULE.at(499)
    wanted = (now.log_snr + after.log_snr) / 2
    nearest = min(range(500, 749), key=lambda t: abs(SCHEDULE.at(t).log_snr - wanted))
    middle = SCHEDULE.midpoint(now, after)
    assert middle == SCHEDULE.at(nearest)
    assert SCHEDULE.midpoint(SCHEDULE.at(11), SCHEDULE.at(10)) is None
    assert SCHEDULE.midpoint(SCHEDULE.at(11), SCHEDULE.at(9)) == SCHEDULE.at(10)
    assert SCHEDULE.midpoint(SCHEDULE.at(11), SCHEDULE.at(-1)) is None


def test_2s_between_neighbouring_timesteps_is_of_first_order():
    calls = []
    stepper = Stepper("dpm2s", SCHEDULE, lambda x_t, t: calls.append(t))
    x_t = stepper.step(np.ones(1), linear_gaussian(np.ones(1), 500), 500, 400)
    x_next = stepper.step(x_t, linear_gaussian(x_t, 400), 400, 399)
    current = Evaluation(x_t, linear_gaussian(x_t, 400), SCHEDULE.at(400))
    np.testing.assert_allclose(x_next, ddim(current, SCHEDULE.at(399)), atol=1e-12)
    assert calls == []


@pytest.mark.parametrize("solver", ["dpm2m", "dpm++2m"])
def test_2m_forgets_the_rows_it_is_told_to_and_no_others(solver):
    rng = np.random.default_rng(3)
    x_t, renewed = rng.standard_normal((2, 2, 4, 5))
    rows = np.array([[True, False, False, True], [False, False, True, False]])[..., None]

    def second_step(forget):
        stepper = Stepper(solver, SCHEDULE, linear_gaussian)
        x_middle = stepper.step(x_t, linear_gaussian(x_t, 999), 999, 749)
        if forget:
            x_middle = np.where(rows, renewed, x_middle)
            stepper.forget(rows)
        return x_middle, stepper.step(x_middle, linear_gaussian(x_middle, 749), 749, 499)

    (x_middle, forgetful), (_, remembering) = second_step(True), second_step(False)
    first_order = ddim(
        Evaluation(x_middle, linear_gaussian(x_middle, 749), SCHEDULE.at(749)), SCHEDULE.at(499)
    )
    rows = np.broadcast_to(rows, x_t.shape)
    np.testing.assert_allclose(forgetful[rows], first_order[rows], atol=1e-12)
    np.testing.assert_array_equal(forgetful[~rows], remembering[~rows])
    assert np.abs(remembering - first_order)[~rows].min() > 1e-6


def test_eta_above_zero_asks_for_noise():
    with pytest.raises(ValueError, match="noise must be given where eta > 0, got None"):
        ddim(Evaluation(np.ones(1), np.ones(1), SCHEDULE.at(999)), SCHEDULE.at(499), eta=0.5)


def test_fresh_noise_is_normal_and_differs_by_seed_and_step_alone():
    noise = fresh_noise([5, 6], 1, (300, 20))
    assert noise.mean() == pytest.approx(0, abs=0.03)
    assert noise.std() == pytest.approx(1, abs=0.03)
    np.testing.assert_array_equal(noise[1:], fresh_noise([6], 1, (300, 20)))
    values = [fresh_noise([seed], step, (300, 20)).ravel() for seed in (5, 6) for step in (1, 2)]
    values.append(np.random.Generator(np.random.Philox(5)).standard_normal(6000))
    for one, other in itertools.combinations(values, 2):
        assert not np.isin(one, other).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"solver": "euler"},
            "solver must be one of ddim, dpm1, dpm2m, dpm2s, dpm\\+\\+1, dpm\\+\\+2m, got euler",
        ),
        ({"eta": -0.1}, r"eta must be in \[0, 1\], got -0.1"),
        ({"eta": math.nan}, r"eta must be in \[0, 1\], got nan"),
        ({"eta": 0.5, "solver": "dpm2m"}, "eta must be 0 for the solver dpm2m, got 0.5; use ddim"),
        ({"renewal": 1.5}, r"renewal must be a score in \[0, 1\] or None, got 1.5"),
        ({"refresh": True, "solver": "dpm1"}, "refresh must be the only change of the steps"),
        ({"refresh": True, "eta": 1.0}, "refresh must be the only change of the steps"),
        ({"refresh": True, "renewal": 0.5}, "refresh must be the only change of the steps"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SamplerOptions(**options)
