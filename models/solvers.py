"""Solvers of the denoising process: from one noise level to a lower one along the predicted clean signal.

NumPy only, float64, pure functions but for Stepper's memory of one step. x_t is a signal at timestep t and x_0
the clean one that a network predicts from it; both may hold boxes, embeddings or the two side by side, always
in signal space. Everything here is element by element, so the shape is free.
Legend: T timesteps, abar cumulative alpha, lambda = ln(sqrt(abar) / sqrt(1 - abar)), h = lambda_after - lambda_now.
Sources: DDIM (arXiv:2010.02502), DPM-Solver (arXiv:2206.00927), DPM-Solver++ (arXiv:2211.01095).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]

Solver = Literal["ddim", "dpm1", "dpm2m", "dpm2s", "dpm++1", "dpm++2m"]
"""ddim, dpm1 and dpm++1 are one method in three forms; 2m uses the step before, 2s a second network call."""
SOLVERS: tuple[Solver, ...] = get_args(Solver)


@dataclass(frozen=True)
class SamplerOptions:
    """How the steps are taken. The defaults are those of PSDiff: DDIM, deterministic, inside the graph.

    Noise beyond the first draw depends on the image's seed, the step and the proposal alone (see fresh_noise),
    so no option makes a result depend on the batch. Raises ValueError on values that do not fit.
    """

    solver: Solver = "ddim"
    """Solvers other than ddim, and eta > 0, step on the host from the boxes and embeddings of each step."""
    eta: float = 0.0
    """Share of fresh noise in a DDIM step, in [0, 1]; ddim only."""
    renewal: float | None = None
    """After every step but the last, proposals with score <= this begin again from fresh noise, boxes and
    embeddings both. DiffusionDet (arXiv:2211.09788) renews boxes, at 0.5. In place of a 2M solver's extrapolation
    the next step of such a proposal is of first order."""
    ensemble: bool = False
    """Select from the outputs of all steps, the last one included, instead of from the last one's."""
    refresh: bool = False
    """Throw every step's result away: each step starts from new pure noise, x_t ~ N(0, I) for boxes and embeddings,
    while t walks the grid. A control: what K steps gain with this on, they gain without refining anything."""

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {self.solver}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {self.eta}")
        if self.eta > 0 and self.solver != "ddim":
            raise ValueError(f"eta must be 0 for the solver {self.solver}, got {self.eta}; use ddim")
        if self.renewal is not None and not 0 <= self.renewal <= 1:
            raise ValueError(f"renewal must be a score in [0, 1] or None, got {self.renewal}")
        if self.refresh and (self.on_host or self.renewal is not None):
            raise ValueError("refresh must be the only change of the steps, got a solver, eta or renewal too")

    @property
    def on_host(self) -> bool:
        """Whether steps are taken here instead of inside the graph."""
        return self.solver != "ddim" or self.eta > 0

    @property
    def changes_steps(self) -> bool:
        """Whether a step starts from anything but what the graph made of the step before."""
        return self.on_host or self.draws_noise

    @property
    def draws_noise(self) -> bool:
        """Whether steps need noise beyond that of the start."""
        return self.eta > 0 or self.renewal is not None or self.refresh


PLAIN = SamplerOptions()


def cosine_alphas_cumprod(num_timesteps: int) -> Float64Array:
    """abar_t for t = 0..T-1, (T,), with beta clipped at 0.999.

    Source: Nichol and Dhariwal (arXiv:2102.09672), eq. 17.
    """
    steps = np.arange(num_timesteps + 1) / num_timesteps
    level = np.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = np.minimum(1 - level[1:] / level[:-1], 0.999)
    return np.cumprod(1 - betas, dtype=np.float64)


@dataclass(frozen=True)
class Level:
    """How much signal and how much noise there is at timestep t."""

    t: int
    abar: float

    @property
    def signal(self) -> float:
        """Share of signal, sqrt(abar)."""
        return math.sqrt(self.abar)

    @property
    def noise(self) -> float:
        """Share of noise, sqrt(1 - abar)."""
        return math.sqrt(1 - self.abar)

    @property
    def log_snr(self) -> float:
        """Lambda: half the log of the signal-to-noise ratio; infinite for a clean signal."""
        # log1p: near t = T, 1 - abar rounds to 1 and its log would lose every digit.
        return math.inf if self.t < 0 else (math.log(self.abar) - math.log1p(-self.abar)) / 2


class Schedule:
    """The cosine schedule by timestep; t = -1 is the clean signal."""

    def __init__(self, num_timesteps: int) -> None:
        self._abar = cosine_alphas_cumprod(num_timesteps)

    def at(self, t: int) -> Level:
        """The level at timestep t in [-1, T)."""
        return Level(t, 1.0 if t < 0 else float(self._abar[t]))

    def midpoint(self, now: Level, after: Level) -> Level | None:
        """The level at the whole timestep nearest to the middle of the two lambdas.

        A network knows whole timesteps only: the fractional one, from interpolating ln sqrt(abar), is rounded.
        None where the step ends clean or no timestep lies between.
        """
        if after.t < 0 or now.t - after.t < 2:
            return None
        middle = (now.log_snr + after.log_snr) / 2
        log_signal = -np.logaddexp(0, -2 * middle) / 2
        # np.interp wants ascending abscissae, and abar falls with t.
        t = np.interp(log_signal, np.log(self._abar[::-1]) / 2, np.arange(len(self._abar))[::-1])
        return self.at(min(max(round(float(t)), after.t + 1), now.t - 1))


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One call of the network: what it saw, x_t, and the clean signal x_0 that it predicted."""

    x_t: Float64Array
    x_0: Float64Array
    level: Level

    @property
    def noise(self) -> Float64Array:
        """The noise that x_0 implies: what x_t holds besides its share of x_0."""
        return (self.x_t - self.level.signal * self.x_0) / self.level.noise


def ddim(
    current: Evaluation, after: Level, *, eta: float = 0.0, noise: Float64Array | None = None
) -> Float64Array:
    """DDIM (eq. 12). eta in [0, 1] mixes in fresh standard normal noise, which is then required (ValueError)."""
    if eta == 0:
        return after.signal * current.x_0 + after.noise * current.noise
    if noise is None:
        raise ValueError("noise must be given where eta > 0, got None")
    sigma = ddim_sigma(current.level, after, eta)
    direction = math.sqrt(max(1 - after.abar - sigma**2, 0.0))
    return after.signal * current.x_0 + direction * current.noise + sigma * noise


def ddim_sigma(now: Level, after: Level, eta: float) -> float:
    """Standard deviation of the fresh noise of a DDIM step (eq. 16)."""
    return eta * math.sqrt((1 - now.abar / after.abar) * (1 - after.abar) / (1 - now.abar))


def dpm_solver(x_t: Float64Array, noise: Float64Array, now: Level, after: Level) -> Float64Array:
    """DPM-Solver-1: exact where the predicted noise stays as it is along the step."""
    grown = math.expm1(after.log_snr - now.log_snr)
    return after.signal / now.signal * x_t - after.noise * grown * noise


def dpm_solver_pp(x_t: Float64Array, x_0: Float64Array, now: Level, after: Level) -> Float64Array:
    """DPM-Solver++ of first order: exact where the predicted x_0 stays as it is along the step."""
    shrunk = math.expm1(now.log_snr - after.log_snr)
    return after.noise / now.noise * x_t - after.signal * shrunk * x_0


def dpm_solver_2s(current: Evaluation, middle: Evaluation, after: Level) -> Float64Array:
    """DPM-Solver-2, general r_1: the slope of the noise comes from a call inside the step."""
    now = current.level
    ratio = (middle.level.log_snr - now.log_snr) / (after.log_snr - now.log_snr)
    noise = current.noise + (middle.noise - current.noise) / (2 * ratio)
    return dpm_solver(current.x_t, noise, now, after)


def extrapolate(current: Float64Array, previous: Float64Array, ratio: float) -> Float64Array:
    """The prediction half a step ahead, on the line through two; ratio = h_previous / h.

    Source: DPM-Solver++ (2M); DPM-Solver-2M is the same with the noise in place of x_0.
    """
    return current + (current - previous) / (2 * ratio)


class Stepper:
    """Moves a signal from timestep to timestep with one solver; remembers the step before for 2M.

    The first step is of first order, the last one, to t = -1, returns x_0 as it is: with one or two steps all
    solvers agree. K steps take K network calls; dpm2s takes a second one inside every step but the first and the
    last, 2K - 2 in all for K >= 2 (a step between neighbouring timesteps is of first order too and saves its own).
    """

    def __init__(
        self,
        solver: Solver,
        schedule: Schedule,
        predict: Callable[[Float64Array, int], Float64Array],
        eta: float = 0.0,
    ) -> None:
        """predict: (x_t, t) -> x_0, the network; called by dpm2s alone. eta: see ddim, for that solver alone."""
        self._solver: Solver = solver
        self._schedule = schedule
        self._predict = predict
        self._eta = eta
        self._previous: Evaluation | None = None
        self._forgotten: NDArray[np.bool_] | None = None

    def step(
        self, x_t: Float64Array, x_0: Float64Array, t: int, t_next: int, noise: Float64Array | None = None
    ) -> Float64Array:
        """Move x_t to t_next in [-1, t). x_0: what the network said of x_t. noise: standard normal, for eta > 0."""
        current, after = Evaluation(x_t, x_0, self._schedule.at(t)), self._schedule.at(t_next)
        x_next = x_0 if t_next < 0 else self._advance(current, after, noise)
        self._previous, self._forgotten = current, None
        return x_next

    def forget(self, rows: NDArray[np.bool_]) -> None:
        """Make the next step of some proposals one of first order: what they were before is another signal's.

        rows: True where to forget; broadcast to x_t.
        """
        self._forgotten = rows

    def _advance(self, current: Evaluation, after: Level, noise: Float64Array | None) -> Float64Array:
        x_t, now = current.x_t, current.level
        match self._solver:
            case "ddim":
                return ddim(current, after, eta=self._eta, noise=noise)
            case "dpm1" | "dpm2m":
                return dpm_solver(x_t, self._slanted(current, after, lambda call: call.noise), now, after)
            case "dpm++1" | "dpm++2m":
                return dpm_solver_pp(x_t, self._slanted(current, after, lambda call: call.x_0), now, after)
            case "dpm2s":
                return self._two_calls(current, after)

    def _slanted(
        self, current: Evaluation, after: Level, quantity: Callable[[Evaluation], Float64Array]
    ) -> Float64Array:
        """The quantity as predicted now, or for 2M extrapolated where there is a step before."""
        value, previous = quantity(current), self._previous
        if previous is None or not self._solver.endswith("2m"):
            return value
        now = current.level.log_snr
        ratio = (now - previous.level.log_snr) / (after.log_snr - now)
        ahead = extrapolate(value, quantity(previous), ratio)
        return ahead if self._forgotten is None else np.where(self._forgotten, value, ahead)

    def _two_calls(self, current: Evaluation, after: Level) -> Float64Array:
        middle = self._schedule.midpoint(current.level, after)
        # From pure noise e^h is in the thousands, and multiplies every difference between two predictions: boxes
        # of the shipped model were thrown to 50 in a signal space of [-2, 2].
        if self._previous is None or middle is None:
            return dpm_solver(current.x_t, current.noise, current.level, after)
        x_middle = dpm_solver(current.x_t, current.noise, current.level, middle)
        return dpm_solver_2s(current, Evaluation(x_middle, self._predict(x_middle, middle.t), middle), after)


def boxes_to_signal(boxes_norm: Float32Array, box_scale: float) -> Float32Array:
    """(..., 4) xyxy normalised on the canvas -> (..., 4) cxcywh in the signal range [-box_scale, box_scale]."""
    top_left, bottom_right = boxes_norm[..., :2], boxes_norm[..., 2:]
    boxes = np.concatenate([(top_left + bottom_right) / 2, bottom_right - top_left], axis=-1)
    return np.clip(box_scale * (2 * boxes - 1), -box_scale, box_scale).astype(np.float32)


def join_signal(boxes: Float32Array, emb: Float32Array) -> Float64Array:
    """Boxes (..., 4) and embeddings (..., E) of the signal space side by side, (..., 4 + E)."""
    return np.concatenate([boxes, emb], axis=-1, dtype=np.float64)


def split_signal(x: Float64Array) -> tuple[Float32Array, Float32Array]:
    """Undo join_signal."""
    return x[..., :4].astype(np.float32), x[..., 4:].astype(np.float32)


def fresh_noise(seeds: Sequence[int], step: int, shape: tuple[int, ...]) -> Float64Array:
    """Standard normal noise to mix in after a step >= 1: (B, *shape), one seed per image.

    An image's noise comes from the Philox stream of its seed, 2^128 draws further on with every step. So it never
    meets the noise of the start (models.preprocess.seeded_noise), and it is the same in any batch.
    """
    streams = (np.random.Generator(np.random.Philox(seed).jumped(step)) for seed in seeds)
    return np.stack([stream.standard_normal(shape) for stream in streams])
