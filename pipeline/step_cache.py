"""Step caches: passes of a step that are not computed, because what they add has changed little since an earlier step.

A cache decides once per step, before its first pass, and all passes of the step follow. What is reused is either what
the model adds to its input, v - x, or what its blocks add to the tokens, which the head then turns into the velocity of
this step. A pass that has not been computed yet always is. The first step that runs is computed.

Everything a cache saves it pays in error, and runs of few steps have little to reuse: all are off by default.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..wanvideo.errors import InputError
from ..wanvideo.modules.model import WanConfig
from ..wanvideo.modules.techniques import BlockResidual
from .guidance import Pass

__all__ = ["PROFILES", "EasyCache", "MagCache", "Reuse", "StepCache", "TeaCache", "profiled"]

Compute = Callable[..., Tensor]
"""Options of the forward -> the velocity [16, T, h, w] of the pass."""


@dataclass(frozen=True)
class StepCache:
    """What all caches have.

    Attributes:
        threshold: the accumulated estimate of the error below which a step is not computed; 0 computes all.
        start_step, end_step: first and last step that may be left out, counted from 0 in the whole schedule; -1 is the
            last one.
        on_host: keep what is reused in host memory.
    """

    threshold: float
    start_step: int = 1
    end_step: int = -1
    on_host: bool = True

    def may_reuse(self, step: int, steps: int) -> bool:
        last = steps - 1 if self.end_step == -1 else self.end_step
        return self.threshold > 0 and max(self.start_step, 1) <= step <= last

    def begin(self, model: Any, steps: int) -> Reuse:
        """What the steps of one window are run through; `model` is called like `WanModel.forward`."""
        raise NotImplementedError


class Reuse:
    """One window under a cache.

    Attributes:
        reused, passes: how many passes were not computed, of how many.
    """

    def __init__(self, cache: StepCache, steps: int) -> None:
        self.cache, self.steps = cache, steps
        self.reused = self.passes = 0
        self._step = -1
        self._lead: Pass | None = None  # the first pass of the step
        self._skips = False

    def velocity(self, which: Pass, step: int, x: Tensor, t: Tensor, compute: Compute) -> Tensor:
        """The velocity of a pass [16, T, h, w] at latents x of that shape and timestep t [1]."""
        if step != self._step:
            self._step, self._lead = step, which
            self._skips = self.known(which) and self.small_change(x, t) and self.cache.may_reuse(step, self.steps)
            if not self._skips:
                self.computed_anew()
        self.passes += 1
        reuse = self._skips and self.known(which)
        self.reused += reuse
        return self.made(which, x, compute, reuse=reuse)

    def known(self, which: Pass) -> bool:
        """Whether there is something of this pass to reuse."""
        raise NotImplementedError

    def small_change(self, x: Tensor, t: Tensor) -> bool:
        """Whether the estimate of the error stays below the threshold; called once per step, to accumulate it."""
        raise NotImplementedError

    def computed_anew(self) -> None:
        """This step is computed: the estimate begins at nothing."""
        raise NotImplementedError

    def made(self, which: Pass, x: Tensor, compute: Compute, *, reuse: bool) -> Tensor:
        raise NotImplementedError

    def stored(self, x: Tensor) -> Tensor:
        return x.cpu() if self.cache.on_host else x


# --- by what the model adds --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EasyCache(StepCache):
    """Zhou et al. 2025 (arXiv 2507.02860): at the last computed step i the transformation rate is

        k = |v_i - v_(i-1)| / |x_i - x_(i-1)|,

    and the estimate of a step grows by k |x_t - x_(t-1)| / |v_(t-1)|, with mean absolute values; a step that is left
    out has v = x + (v_i - x_i). It needs nothing measured beforehand.
    """

    threshold: float = 0.015
    start_step: int = 10

    def begin(self, model: Any, steps: int) -> Reuse:
        return _ByOffset(self, steps)


def _size(x: Tensor) -> float:
    return float(x.float().abs().mean())


class _ByOffset(Reuse):
    def __init__(self, cache: StepCache, steps: int) -> None:
        super().__init__(cache, steps)
        self._offsets: dict[Pass, Tensor] = {}
        self._before: tuple[Tensor, Tensor] | None = None  # x and v of the first pass, a step ago
        self._rate = math.inf
        self._error = 0.0

    def known(self, which: Pass) -> bool:
        return which in self._offsets

    def small_change(self, x: Tensor, t: Tensor) -> bool:
        if self._before is None:
            return False
        x_before, v_before = self._before
        self._error += self._rate * _size(x - x_before) / max(_size(v_before), 1e-12)
        return self._error < self.cache.threshold  # NaN, of 0 times infinity, is not

    def computed_anew(self) -> None:
        self._error = 0.0

    def made(self, which: Pass, x: Tensor, compute: Compute, *, reuse: bool) -> Tensor:
        v = x + self._offsets[which].to(x) if reuse else compute()
        if not reuse:
            self._offsets[which] = self.stored(v - x)
        if which == self._lead:
            if not reuse and self._before is not None:
                moved = _size(x - self._before[0])
                self._rate = _size(v - self._before[1]) / moved if moved else math.inf
            self._before = (x, v)
        return v


# --- by what the blocks add --------------------------------------------------------------------------------------


class _ByResidual(Reuse):
    def __init__(self, cache: StepCache, steps: int) -> None:
        super().__init__(cache, steps)
        self._residuals: dict[Pass, Tensor] = {}

    def known(self, which: Pass) -> bool:
        return which in self._residuals

    def made(self, which: Pass, x: Tensor, compute: Compute, *, reuse: bool) -> Tensor:
        residual = BlockResidual(self._residuals[which], reuse=True) if reuse else BlockResidual()
        v = compute(residual=residual)
        if not reuse and residual.value is not None:
            self._residuals[which] = self.stored(residual.value)
        return v


@dataclass(frozen=True)
class TeaCache(StepCache):
    """Liu et al. 2024 (arXiv 2411.19108): the estimate of a step grows by p(d), where d is the relative L1 distance of
    the timestep's embedding to that of the step before, and p a polynomial that was fitted to a model.

    Attributes:
        coefficients: of p, the highest degree first; None: p(d) = d, for which thresholds are about ten times smaller.
        projected: d is that of the projection for the blocks, not of the embedding itself.
    """

    threshold: float = 0.3
    coefficients: tuple[float, ...] | None = None
    projected: bool = False

    def begin(self, model: Any, steps: int) -> Reuse:
        return _ByEmbedding(self, steps, model.embed_time)


class _ByEmbedding(_ByResidual):
    def __init__(self, cache: TeaCache, steps: int, embed_time: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> None:
        super().__init__(cache, steps)
        self._tea, self._embed_time = cache, embed_time
        self._before: Tensor | None = None
        self._error = 0.0

    def velocity(self, which: Pass, step: int, x: Tensor, t: Tensor, compute: Compute) -> Tensor:
        if step != self._step:
            self._measure(t)
        return super().velocity(which, step, x, t, compute)

    def _measure(self, t: Tensor) -> None:
        now = self._embed_time(t, 1)[1 if self._tea.projected else 0]
        if self._before is not None:
            distance = _size(now - self._before) / max(_size(self._before), 1e-12)
            terms = self._tea.coefficients or (1.0, 0.0)
            self._error += sum(c * distance**power for power, c in enumerate(reversed(terms)))
        self._before = now

    def small_change(self, x: Tensor, t: Tensor) -> bool:
        return self._error < self.cache.threshold

    def computed_anew(self) -> None:
        self._error = 0.0


@dataclass(frozen=True)
class MagCache(StepCache):
    """Ma et al. 2025 (arXiv 2506.09045): g is the ratio of the sizes of what the blocks add, of a step to the step
    before, measured for a model once. Over the steps left out since the last computed one, the estimate is the sum of
    |1 - product of g|.

    Attributes:
        most_in_a_row: steps that may be left out one after the other.
        ratios: g of each step of some schedule, the first one 1; the nearest is taken in schedules of other lengths.
    """

    threshold: float = 0.02
    most_in_a_row: int = 4
    ratios: tuple[float, ...] = ()

    def begin(self, model: Any, steps: int) -> Reuse:
        if not self.ratios:
            raise InputError("MagCache has no ratios for this model: use EasyCache, which needs none.")
        return _ByRatio(self, steps)


class _ByRatio(_ByResidual):
    def __init__(self, cache: MagCache, steps: int) -> None:
        super().__init__(cache, steps)
        self._mag = cache
        self.computed_anew()

    def small_change(self, x: Tensor, t: Tensor) -> bool:
        ratios = self._mag.ratios
        place = round(self._step * (len(ratios) - 1) / max(self.steps - 1, 1))
        self._product *= ratios[place]
        self._error += abs(1 - self._product)
        self._row += 1
        return self._error < self.cache.threshold and self._row <= self._mag.most_in_a_row

    def computed_anew(self) -> None:
        self._product, self._error, self._row = 1.0, 0.0, 0


# --- what was measured -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """What was measured of one model, and published: polynomials of TeaCache (TeaCache4Wan2.1, for distances of the
    embedding and of its projection) and ratios of MagCache (MagCache4Wan2.1, of the passes with the prompt)."""

    embedding: tuple[float, ...]
    projection: tuple[float, ...]
    ratios: tuple[float, ...] = ()


# fmt: off
PROFILES: dict[str, Profile] = {
    "t2v 1.3B": Profile(
        (2.39676752e03, -1.31110545e03, 2.01331979e02, -8.29855975e00, 1.37887774e-01),
        (-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02),
    ),
    "t2v 14B": Profile(
        (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
        (-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01),
        (1.0, 1.02504, 1.00025, 0.9985, 0.99779, 0.9966, 0.99482, 0.99467, 0.99664, 0.99434, 0.99533, 0.99468, 0.99438,
         0.99516, 0.99384, 0.99404, 0.99517, 0.99409, 0.99428, 0.99347, 0.99418, 0.99271, 0.99313, 0.99215, 0.99218,
         0.99216, 0.99163, 0.99138, 0.98982, 0.98996, 0.9887, 0.98772, 0.98767, 0.98573, 0.98501, 0.9838, 0.98177,
         0.98037, 0.97678, 0.97546, 0.97184, 0.96711, 0.96349, 0.95629, 0.94926, 0.93964, 0.92511, 0.90693, 0.8796,
         0.86111),
    ),
    "i2v 14B 480p": Profile(
        (-3.02331670e02, 2.23948934e02, -5.25463970e01, 5.87348440e00, -2.01973289e-01),
        (2.57151496e05, -3.54229917e04, 1.40286849e03, -1.35890334e01, 1.32517977e-01),
        (1.0, 0.98783, 0.97559, 0.98311, 0.98202, 0.9888, 0.98762, 0.98957, 0.99052, 0.99383, 0.98857, 0.99065, 0.98845,
         0.99057, 0.98957, 0.98601, 0.98823, 0.98756, 0.98808, 0.98721, 0.98571, 0.98543, 0.98157, 0.98411, 0.97952,
         0.98149, 0.9774, 0.97825, 0.97355, 0.97085, 0.97056, 0.96588, 0.96113, 0.9567, 0.94961, 0.93973, 0.93217,
         0.91878, 0.90955, 0.92617),
    ),
    "i2v 14B 720p": Profile(
        (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
        (8.10705460e03, 2.13393892e03, -3.72934672e02, 1.66203073e01, -4.17769401e-02),
        (1.0, 0.99428, 0.98588, 0.98273, 0.99018, 0.98911, 0.98646, 0.99454, 0.9891, 0.99124, 0.99102, 0.99215, 0.99515,
         0.99576, 0.99068, 0.99097, 0.99166, 0.99041, 0.99201, 0.99101, 0.98599, 0.98845, 0.98848, 0.98862, 0.98718,
         0.98497, 0.98264, 0.98389, 0.97938, 0.97535, 0.97498, 0.973, 0.96827, 0.96261, 0.95335, 0.94649, 0.93397,
         0.91636, 0.89088, 0.8679),
    ),
}
# fmt: on
"""Model -> what was measured of it, without speech."""


def _profile_of(config: WanConfig, name: str) -> Profile | None:
    if config.dim == 1536 and config.model_type == "t2v":
        return PROFILES["t2v 1.3B"]
    if config.dim != 5120:
        return None
    if config.model_type == "t2v":
        return PROFILES["t2v 14B"]
    return PROFILES["i2v 14B 720p" if "720" in name else "i2v 14B 480p"]


def profiled(cache: StepCache, config: WanConfig, name: str) -> StepCache:
    """The cache with what was measured of the model, where it needs that; it must then be a `MagCache` or a `TeaCache`
    with empty `coefficients`.

    Args:
        name: of the model's file; 720 in it tells the 720p model from the 480p one, which have the same shapes.

    Raises InputError where nothing was measured of such a model.
    """
    needs_ratios = isinstance(cache, MagCache) and not cache.ratios
    needs_polynomial = isinstance(cache, TeaCache) and cache.coefficients == ()
    if not needs_ratios and not needs_polynomial:
        return cache
    profile = _profile_of(config, name)
    if isinstance(cache, MagCache) and profile is not None and profile.ratios:
        return replace(cache, ratios=profile.ratios)
    if isinstance(cache, TeaCache) and profile is not None:
        return replace(cache, coefficients=profile.projection if cache.projected else profile.embedding)
    what, instead = (
        ("MagCache has no ratios", "use EasyCache, which needs none")
        if needs_ratios
        else ("TeaCache has no coefficients", "turn use_coefficients off and set rel_l1_thresh ten times smaller")
    )
    raise InputError(f"{what} for a model like {name} ({config.model_type}, width {config.dim}): {instead}.")
