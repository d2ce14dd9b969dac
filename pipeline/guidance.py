"""Classifier-free guidance by text and by speech: which passes a step needs, and how their velocities combine.

A pass is one evaluation of the model: with the prompt or the negative one, with the speech or zeros, with or without
reference images. A formula is data, a base pass and weighted differences of passes:

    v = v[base] + sum of scale * (v[plus] - v[minus])

The public InfiniteTalk formula with text scale s_t and audio scale s_a is

    v = v_null + s_t (v_full - v_speech) + s_a (v_speech - v_null)

where `full` has prompt and speech, `speech` the negative prompt and the speech, `null` the negative prompt alone. With
s_t = 1 it takes two passes, `full` and `prompt` (the prompt alone): v = v_prompt + s_a (v_full - v_prompt).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..wanvideo.errors import InputError

__all__ = ["FORMULAS", "Formula", "Pass", "Projection", "Term", "cfg_schedule", "guide", "per_step"]

logger = logging.getLogger(__name__)

FORMULAS = ("additive", "nested")
"""`additive`: as above. `nested`: the text scale multiplies the audio term too, as older ComfyUI workflows expect:
v = v_null + s_t ((v_full - v_speech) + s_a (v_speech - v_null))."""

INTERPOLATIONS = ("linear", "ease_in", "ease_out")


@dataclass(frozen=True)
class Pass:
    """One evaluation of the model: with the prompt (or the negative one), the speech (or zeros), reference images."""

    prompt: bool
    speech: bool
    references: bool = True


FULL = Pass(prompt=True, speech=True)
SPEECH = Pass(prompt=False, speech=True)
PROMPT = Pass(prompt=True, speech=False)
NULL = Pass(prompt=False, speech=False)

Evaluate = Callable[[Pass], torch.Tensor]


@dataclass(frozen=True)
class Term:
    """`scale` times the difference of the velocities of two passes; `name` keeps its momentum from step to step."""

    name: str
    scale: float
    plus: Pass
    minus: Pass


@dataclass(frozen=True)
class Formula:
    """v = v[base] + sum of scale * (v[plus] - v[minus]), in the order of the terms."""

    base: Pass
    terms: tuple[Term, ...] = ()

    @property
    def passes(self) -> tuple[Pass, ...]:
        """Each pass once, in the order of evaluation: those of the terms, then the base."""
        named = [which for term in self.terms for which in (term.plus, term.minus)]
        return tuple(dict.fromkeys([*named, self.base]))

    def velocity(self, evaluate: Evaluate, projection: Projection | None = None) -> torch.Tensor:
        """The guided velocity, by one call of `evaluate` per pass."""
        return self.combine({which: evaluate(which) for which in self.passes}, projection)

    def combine(self, found: Mapping[Pass, torch.Tensor], projection: Projection | None = None) -> torch.Tensor:
        """The guided velocity of those of the passes."""
        base = velocity = found[self.base]
        for term in self.terms:
            difference = found[term.plus] - found[term.minus]
            if projection is not None:
                difference = projection(term.name, difference, base)
            velocity = velocity + term.scale * difference
        return velocity


def guide(text: float, audio: float, formula: str = "additive", *, projected: bool = False) -> Formula:
    """The formula of a step with these scales, without the passes that cancel.

    Args:
        text, audio: guidance scales; 1 is none.
        formula: one of `FORMULAS`.
        projected: the form for `Projection`: differences are added to v_full. Additive formula only.

    Raises InputError for another formula, or one that does not go with the projection.
    """
    if formula not in FORMULAS:
        raise InputError(f"There is no guidance formula '{formula}': choose one of {', '.join(FORMULAS)}.")
    if projected and formula != "additive":
        raise InputError("Adaptive projected guidance goes with the additive formula only: choose one of the two.")
    if formula == "nested":
        # v_null + s_t (...) is the additive formula with the product as audio scale.
        audio = audio * text
    if text == 1 and audio == 1:
        return Formula(FULL)
    if projected:
        by_text = () if text == 1 else (Term("text", text - 1, FULL, SPEECH),)
        plus, minus = (FULL, PROMPT) if text == 1 else (SPEECH, NULL)
        return Formula(FULL, (*by_text, Term("audio", audio - 1, plus, minus)))
    if text == 1:
        return Formula(PROMPT, (Term("audio", audio, FULL, PROMPT),))
    if audio == text:
        return Formula(NULL, (Term("text", text, FULL, NULL),))
    if audio == 1:
        return Formula(SPEECH, (Term("text", text, FULL, SPEECH),))
    return Formula(NULL, (Term("text", text, FULL, SPEECH), Term("audio", audio, SPEECH, NULL)))


class Projection:
    """Adaptive projected guidance (Sadat, Hilliges & Weber 2024, "Eliminating Oversaturation and Artifacts of High
    Guidance Scales in Diffusion Models"): differences gather momentum, are limited in norm, and lose their part along
    the base velocity. It remembers the steps before, so each window takes a new object.

    Args:
        momentum: share of the accumulated difference that is carried into the next step; negative holds back.
        norm_threshold: largest L2 norm of a difference over all latents.
    """

    def __init__(self, momentum: float = -0.75, norm_threshold: float = 55.0) -> None:
        self.momentum = momentum
        self.norm_threshold = norm_threshold
        self._sums: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, difference: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """The direction, shaped like `difference`, that takes its place; `name` says whose momentum it gathers."""
        if name in self._sums:
            difference = difference + self.momentum * self._sums[name]
        self._sums[name] = difference
        limit = self.norm_threshold / difference.norm().clamp_min(torch.finfo(difference.dtype).tiny)
        direction = difference * limit.clamp_max(1)
        along = base.double() / base.double().norm().clamp_min(1e-12)
        orthogonal: torch.Tensor = direction - ((direction.double() * along).sum() * along).to(direction)
        return orthogonal


def per_step(scale: float | Sequence[float], steps: int, what: str) -> list[float]:
    """One scale for each step: a single number for all, or a list with one for each (a shorter list's last goes on).

    Raises InputError for an empty list; `what` names the scale in the message.
    """
    if not isinstance(scale, Sequence):
        return [float(scale)] * steps
    scales = [float(s) for s in scale]
    if not scales:
        raise InputError(f"The {what} schedule is empty: give one number, or one for each of the {steps} steps.")
    if len(scales) > steps:
        logger.warning("%d of the %d numbers in the %s schedule are used, one for each step", steps, len(scales), what)
    return (scales + [scales[-1]] * (steps - len(scales)))[:steps]


def cfg_schedule(
    steps: int,
    start: float,
    end: float,
    interpolation: str,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    *,
    outside: float = 1.0,
) -> list[float]:
    """One guidance scale per step: from `start` to `end` within the given part of the run, `outside` of it 1 (none).

    Args:
        interpolation: "linear", "ease_in" (slow at first, t^2) or "ease_out" (slow at last, t (2 - t)).
        start_percent, end_percent: 0 to 1; the steps from int(steps * start) to below int(steps * end), at least one.

    Raises InputError for another interpolation, or a part that ends before it begins.
    """
    if interpolation not in INTERPOLATIONS:
        raise InputError(f"There is no interpolation '{interpolation}': choose one of {', '.join(INTERPOLATIONS)}.")
    if not 0 <= start_percent <= end_percent <= 1:
        raise InputError(f"The part from {start_percent} to {end_percent} is none: start below end, within 0 to 1.")
    first = min(int(steps * start_percent), steps - 1)
    last = max(first, int(steps * end_percent) - 1)
    scales = [outside] * steps
    for i in range(first, last + 1):
        t = (i - first) / (last - first) if last > first else 0.0
        eased = {"linear": t, "ease_in": t * t, "ease_out": t * (2 - t)}[interpolation]
        scales[i] = start + (end - start) * eased
    return scales
