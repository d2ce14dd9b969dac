"""Sigma grids and solvers for flow matching: x_sigma = (1 - sigma) x0 + sigma noise, velocity v = noise - x0.

A `Scheduler` is a grid of sigmas, the timesteps that the model is given, and a solver that moves the latents from one
sigma to the next. `make_scheduler(name, steps, shift)` gives the named ones; `name/beta` spaces the same range by
quantiles of Beta(0.6, 0.6) (Lee et al. 2024, "Beta Sampling is All You Need").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

import numpy as np
import torch
from scipy.special import betaincinv

from ..wanvideo.errors import InputError
from .bounds import check_numbers

__all__ = ["SCHEDULERS", "Scheduler", "make_scheduler"]


class Scheduler:
    """First-order steps along the velocity (Euler). The other solvers derive from this class.

    Args:
        sigmas: [steps + 1] float32, strictly falling, within [0, 1]; the last one is where the latents end (0 = clean).
        timesteps: [steps], what the model is given at each step (1000 = pure noise).

    Multistep solvers remember the steps before. A step that does not follow the last one (a new window, a window that
    starts over, a later start) begins a new history by itself.
    """

    needs_noise: ClassVar[bool] = False
    """Whether `step` wants fresh Gaussian noise."""

    def __init__(self, sigmas: torch.Tensor, timesteps: torch.Tensor) -> None:
        self.sigmas = sigmas
        self.timesteps = timesteps
        self._grid: list[float] = sigmas.tolist()
        self._last_index = -1

    def __len__(self) -> int:
        return len(self.timesteps)

    def step(self, v: torch.Tensor, i: int, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Latents at `sigmas[i + 1]`, from latents `x` at `sigmas[i]` and the model's velocity `v` (all of one shape).

        `noise` (standard normal, like x) is needed where `needs_noise` and a later sigma is not zero.
        """
        if i == 0 or i != self._last_index + 1:
            self._forget()
        self._last_index = i
        return self._advance(v, i, x, noise)

    def clean(self, v: torch.Tensor, i: int, x: torch.Tensor) -> torch.Tensor:
        """The clean latents as the model predicts them: x0 = x - sigma v. Used for previews and by x0 solvers."""
        return x - self._grid[i] * v

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, i: int) -> torch.Tensor:
        """Clean latents brought to `sigmas[i]`, where a run that starts at step i begins."""
        sigma = self._grid[i]
        return (1 - sigma) * clean + sigma * noise

    def _forget(self) -> None:
        """Drop what multistep solvers remember: the x0 of the step before, and more in some."""
        self._previous: torch.Tensor | None = None

    def _advance(self, v: torch.Tensor, i: int, x: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        return x + (self._grid[i + 1] - self._grid[i]) * v


class LCM(Scheduler):
    """Predict the clean latents, then noise them afresh to the next sigma (Luo et al. 2023, algorithm 3)."""

    needs_noise = True

    def _advance(self, v: torch.Tensor, i: int, x: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        x0, sigma_next = self.clean(v, i, x), self._grid[i + 1]
        if sigma_next == 0:
            return x0
        return sigma_next * _given(noise) + (1 - sigma_next) * x0


class DPMSolver2M(Scheduler):
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2, midpoint form): second order on x0, first order at either end."""

    def _advance(self, v: torch.Tensor, i: int, x: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        x0 = self.clean(v, i, x)
        estimate, self._previous = self._extrapolate(x0, i), x0
        sigma, sigma_next = self._grid[i], self._grid[i + 1]
        h = self._log_snr_step(i)
        return (sigma_next / sigma) * x - (1 - sigma_next) * math.expm1(-h) * estimate

    def _extrapolate(self, x0: torch.Tensor, i: int) -> torch.Tensor:
        """x0 half a step ahead, by the line through this x0 and the one before."""
        if self._previous is None or self._grid[i + 1] == 0:
            return x0
        ratio = self._log_snr_step(i) / self._log_snr_step(i - 1)
        return x0 + 0.5 * ratio * (x0 - self._previous)

    def _log_snr_step(self, i: int) -> float:
        """h = lambda[i + 1] - lambda[i] with lambda = ln((1 - sigma) / sigma); infinite towards sigma 0 or from 1."""
        return _log_snr(self._grid[i + 1]) - _log_snr(self._grid[i])


class DPMSolver2MSDE(DPMSolver2M):
    """The stochastic form of DPM-Solver++ 2M (Lu et al. 2022, section 5: SDE-DPM-Solver++)."""

    needs_noise = True

    def _advance(self, v: torch.Tensor, i: int, x: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        x0 = self.clean(v, i, x)
        estimate, self._previous = self._extrapolate(x0, i), x0
        sigma, sigma_next = self._grid[i], self._grid[i + 1]
        h = self._log_snr_step(i)
        renewed = -math.expm1(-2 * h)  # the share of the variance that is drawn anew
        moved = (sigma_next / sigma) * math.exp(-h) * x + (1 - sigma_next) * renewed * estimate
        return moved if sigma_next == 0 else moved + sigma_next * math.sqrt(renewed) * _given(noise)


class UniPC(DPMSolver2M):
    """UniPC of order 2 with B(h) = e^h - 1 on x0 (Zhao et al. 2023, section 3 and appendix E).

    Its predictor of order 2 is the step of DPM-Solver++ 2M. From the second step on, each new prediction first corrects
    the latents that it was made from.
    """

    def _forget(self) -> None:
        super()._forget()
        self._before_previous: torch.Tensor | None = None
        self._start: torch.Tensor | None = None
        self._order = 0

    def _advance(self, v: torch.Tensor, i: int, x: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        x0 = self.clean(v, i, x)
        if self._previous is not None and self._start is not None:
            x = self._correct(self._start, self._previous, x0, i - 1)
        self._order = 1 if self._previous is None or self._grid[i + 1] == 0 else 2
        estimate = self._extrapolate(x0, i)
        self._before_previous, self._previous, self._start = self._previous, x0, x
        sigma, sigma_next = self._grid[i], self._grid[i + 1]
        return (sigma_next / sigma) * x - (1 - sigma_next) * math.expm1(-self._log_snr_step(i)) * estimate

    def _correct(self, x: torch.Tensor, x0: torch.Tensor, x0_next: torch.Tensor, i: int) -> torch.Tensor:
        """Step i once more, from its own start `x` and prediction `x0`, now that the prediction at its end is known."""
        h = self._log_snr_step(i)
        sigma, sigma_next = self._grid[i], self._grid[i + 1]
        if self._order < 2 or self._before_previous is None:
            slope = 0.5 * (x0_next - x0)
        else:
            r = -self._log_snr_step(i - 1) / h
            # The weights make the update exact for x0 linear and quadratic in lambda: phi functions of -h over B(h).
            phi1 = math.expm1(-h) / -h - 1
            phi2 = phi1 / -h - 0.5
            b1, b2 = phi1 / math.expm1(-h), 2 * phi2 / math.expm1(-h)
            back = (b1 - b2) / (1 - r)
            slope = (back / r) * (self._before_previous - x0) + (b1 - back) * (x0_next - x0)
        return (sigma_next / sigma) * x - (1 - sigma_next) * math.expm1(-h) * (x0 + slope)


class ResMultistep(Scheduler):
    """Second-order exponential multistep on x0 (Zhang et al. 2023, "Improved Order Analysis and Design of Exponential
    Integrator for Diffusion Models Sampling"), with time -ln sigma; first order at either end."""

    def _advance(self, v: torch.Tensor, i: int, x: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        x0, previous = self.clean(v, i, x), self._previous
        self._previous = x0
        sigma, sigma_next = self._grid[i], self._grid[i + 1]
        decay = sigma_next / sigma  # e^-h
        moved = decay * x + (1 - decay) * x0
        if previous is None or sigma_next == 0:
            return moved
        h, h_last = math.log(sigma / sigma_next), math.log(self._grid[i - 1] / sigma)
        return moved + ((h - (1 - decay)) / h_last) * (x0 - previous)


def _given(noise: torch.Tensor | None) -> torch.Tensor:
    if noise is None:
        raise ValueError("this scheduler draws noise at each step: pass it as `noise`")
    return noise


def _log_snr(sigma: float) -> float:
    if sigma == 0:
        return math.inf
    return -math.inf if sigma == 1 else math.log((1 - sigma) / sigma)


# --- Sigma grids -----------------------------------------------------------------------------------------------------


_Sigmas = TypeVar("_Sigmas", np.ndarray, torch.Tensor)


def _shifted(u: _Sigmas, shift: float) -> _Sigmas:
    """Sigma after the resolution shift (Esser et al. 2024, section 5.3.2): s u / (1 + (s - 1) u)."""
    return shift * u / (1 + (shift - 1) * u)


def _solver_grid(steps: int, shift: float) -> np.ndarray:
    # The training grid's first sigma is shifted already, and the steps below it are shifted once more.
    first = float(_shifted(torch.tensor(1 - 0.001, dtype=torch.float32), shift))
    return _shifted(np.linspace(first, 0, steps + 1)[:-1], shift)


def _euler_grid(steps: int, shift: float) -> np.ndarray:
    last = float(_shifted(torch.tensor(1.0) / 1000, shift))
    return _shifted(np.linspace(1000, 1000 * last, steps) / 1000, shift)


def _multitalk_grid(steps: int, shift: float) -> np.ndarray:
    return _shifted(np.linspace(1000, 1, steps, dtype=np.float32) / np.float32(1000), shift)


def _distill_grid(steps: int, shift: float) -> np.ndarray:
    if steps != 4:
        raise InputError(f"The scheduler flowmatch_distill has 4 steps, not {steps}: set steps to 4.")
    return _shifted(np.array([0.999, 0.75, 0.5, 0.25], dtype=np.float32), shift)


def _flashtalk_grid(steps: int, shift: float) -> np.ndarray:
    levels = {4: [1000, 750, 500, 250], 2: [1000, 500]}.get(steps)
    u = np.linspace(1000, 1, steps) if levels is None else np.array(levels)
    return _shifted(u.astype(np.float32) / np.float32(1000), shift)


def _res_grid(steps: int, shift: float) -> np.ndarray:
    training = _shifted(torch.linspace(1, 0.003 / 1.002, 1000), shift)
    sigmas: np.ndarray = training[[min(round(i * 1000 / steps), 999) for i in range(steps)]].numpy()
    return sigmas


def _beta_spaced(sigmas: np.ndarray) -> np.ndarray:
    quantiles = betaincinv(0.6, 0.6, 1 - np.linspace(0, 1, len(sigmas)))
    spaced: np.ndarray = sigmas[-1] + quantiles * (sigmas[0] - sigmas[-1])
    return spaced


_Grid = Callable[[int, float], np.ndarray]
_PLAIN: dict[str, tuple[type[Scheduler], _Grid]] = {
    "unipc": (UniPC, _solver_grid),
    "dpm++": (DPMSolver2M, _solver_grid),
    "dpm++_sde": (DPMSolver2MSDE, _solver_grid),
    "euler": (Scheduler, _euler_grid),
    "lcm": (LCM, _euler_grid),
    "flowmatch_distill": (Scheduler, _distill_grid),
    "multitalk": (Scheduler, _multitalk_grid),
    "res_multistep": (ResMultistep, _res_grid),
    "flashtalk": (LCM, _flashtalk_grid),
}
_WITH_BETA = ("unipc", "dpm++", "dpm++_sde", "euler", "lcm")
_WHOLE_TIMESTEPS = (_solver_grid,)

SCHEDULERS: tuple[str, ...] = tuple(
    variant for name in _PLAIN for variant in ((name, f"{name}/beta") if name in _WITH_BETA else (name,))
)
"""Names that `make_scheduler` takes."""


def make_scheduler(name: str, steps: int, shift: float, sigmas: Sequence[float] | None = None) -> Scheduler:
    """The named scheduler.

    Args:
        name: one of `SCHEDULERS`.
        steps: number of model evaluations.
        shift: resolution shift; larger spends more steps on the layout (InfiniteTalk: 7 at 480p, 11 at 720p).
        sigmas: the grid itself in place of the one that `steps` and `shift` give: falling, within [0, 1], the final
            sigma included (0 to finish).

    Raises:
        InputError: an unknown name, or numbers that make no grid.
    """
    if name not in SCHEDULERS:
        raise InputError(f"There is no scheduler '{name}': choose one of {', '.join(SCHEDULERS)}.")
    solver, grid = _PLAIN[name.removesuffix("/beta")]
    if sigmas is not None:
        levels = _checked(sigmas)
    else:
        check_numbers(steps=steps, shift=shift)
        with np.errstate(all="ignore"):  # a grid that does not fall is rejected below
            start = grid(steps, shift)
            levels = np.append(_beta_spaced(start) if name.endswith("/beta") else start, start.dtype.type(0))
    rounded = torch.from_numpy(levels).float()
    if not bool((rounded.diff() < 0).all()):
        raise InputError(
            f"The scheduler {name} has no {steps} different noise levels at shift {shift}: set fewer steps, or a shift "
            "nearer to 7."
        )
    if grid in _WHOLE_TIMESTEPS:
        # Truncated before the rounding to float32, which could lift a sigma over the border.
        timesteps = torch.from_numpy((levels[:-1] * 1000).astype(np.int64))
    else:
        timesteps = rounded[:-1] * 1000
    return solver(rounded, timesteps)


def _checked(sigmas: Sequence[float]) -> np.ndarray:
    levels = np.asarray([float(s) for s in sigmas], dtype=np.float64)
    if len(levels) < 2 or not (np.diff(levels) < 0).all() or levels[0] > 1 or levels[-1] < 0:
        raise InputError(
            f"The sigmas {levels.tolist()} are no grid: give two or more, each below the one before, from at most 1 "
            "down to at least 0."
        )
    return levels
