"""Classifier-free guidance by text and by speech: which passes a step needs, and how their velocities combine.

A pass is the model with the prompt or the negative one, with the speech or without (zeros of one speaker). The public
InfiniteTalk formula with text scale s_t and audio scale s_a is

    v = v_null + s_t (v_full - v_speech) + s_a (v_speech - v_null)

where `full` has prompt and speech, `speech` the negative prompt and the speech, `null` the negative prompt alone. With
s_t = 1 it takes two passes, `full` and `prompt` (the prompt alone): v = v_prompt + s_a (v_full - v_prompt).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..wanvideo.errors import InputError

__all__ = ["FORMULAS", "PASSES", "Guidance", "Pass", "per_step"]

FORMULAS = ("additive", "nested")
"""`additive`: as above. `nested`: the text scale multiplies the audio term too, as older ComfyUI workflows expect:
v = v_null + s_t ((v_full - v_speech) + s_a (v_speech - v_null))."""


@dataclass(frozen=True)
class Pass:
    """One evaluation of the model: with the prompt (or the negative one), with the speech (or zeros)."""

    prompt: bool
    speech: bool


FULL = Pass(prompt=True, speech=True)
SPEECH = Pass(prompt=False, speech=True)
PROMPT = Pass(prompt=True, speech=False)
NULL = Pass(prompt=False, speech=False)
PASSES = (FULL, SPEECH, PROMPT, NULL)

Evaluate = Callable[[Pass], torch.Tensor]


class Guidance:
    """Guided velocities of one window. APG remembers the steps before, so each window takes a new object.

    Args:
        formula: one of `FORMULAS`.
        use_apg: adaptive projected guidance (Sadat, Hilliges & Weber 2024, "Eliminating Oversaturation and Artifacts of
            High Guidance Scales in Diffusion Models"): differences gather momentum, are limited in norm, and lose their
            part along v_full. Additive formula only.
        apg_momentum: share of the accumulated difference that is carried into the next step; negative holds back.
        apg_norm_threshold: largest L2 norm of a difference over all latents.
    """

    def __init__(
        self,
        formula: str = "additive",
        use_apg: bool = False,
        apg_momentum: float = -0.75,
        apg_norm_threshold: float = 55.0,
    ) -> None:
        if formula not in FORMULAS:
            raise InputError(f"There is no guidance formula '{formula}': choose one of {', '.join(FORMULAS)}.")
        if use_apg and formula != "additive":
            raise InputError("Adaptive projected guidance goes with the additive formula only: choose one of the two.")
        self.formula = formula
        self.use_apg = use_apg
        self.apg_momentum = apg_momentum
        self.apg_norm_threshold = apg_norm_threshold
        self._text_sum: torch.Tensor | None = None
        self._audio_sum: torch.Tensor | None = None

    def velocity(self, evaluate: Evaluate, text_scale: float, audio_scale: float) -> torch.Tensor:
        """The guided velocity, by one to three calls of `evaluate`; a pass whose weight is zero is not made."""
        if self.formula == "nested":
            # v_null + s_t (...) is the additive formula with the product as audio scale.
            audio_scale = audio_scale * text_scale
        full = evaluate(FULL)
        if text_scale == 1 and audio_scale == 1:
            return full
        if text_scale == 1:
            silent = evaluate(PROMPT)
            if not self.use_apg:
                return silent + audio_scale * (full - silent)
            return full + (audio_scale - 1) * self._audio_direction(full - silent, full)
        if audio_scale == text_scale and not self.use_apg:
            null = evaluate(NULL)
            return null + text_scale * (full - null)
        speech = evaluate(SPEECH)
        if audio_scale == 1 and not self.use_apg:
            return speech + text_scale * (full - speech)
        null = evaluate(NULL)
        if not self.use_apg:
            return null + text_scale * (full - speech) + audio_scale * (speech - null)
        text_direction = self._text_direction(full - speech, full)
        audio_direction = self._audio_direction(speech - null, full)
        return full + (text_scale - 1) * text_direction + (audio_scale - 1) * audio_direction

    def _text_direction(self, difference: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
        self._text_sum = self._gather(difference, self._text_sum)
        return self._limit_and_project(self._text_sum, full)

    def _audio_direction(self, difference: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
        self._audio_sum = self._gather(difference, self._audio_sum)
        return self._limit_and_project(self._audio_sum, full)

    def _gather(self, difference: torch.Tensor, accumulated: torch.Tensor | None) -> torch.Tensor:
        return difference if accumulated is None else difference + self.apg_momentum * accumulated

    def _limit_and_project(self, direction: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
        limit = self.apg_norm_threshold / direction.norm().clamp_min(torch.finfo(direction.dtype).tiny)
        direction = direction * limit.clamp_max(1)
        along = full.double() / full.double().norm().clamp_min(1e-12)
        return direction - ((direction.double() * along).sum() * along).to(direction)


def per_step(scale: float | Sequence[float], steps: int, what: str) -> list[float]:
    """One scale for each step: a single number for all, or a list with one for each (a shorter list's last goes on).

    Raises InputError for an empty list; `what` names the scale in the message.
    """
    if isinstance(scale, (int, float)):
        return [float(scale)] * steps
    scales = [float(s) for s in scale]
    if not scales:
        raise InputError(f"The {what} schedule is empty: give one number, or one for each of the {steps} steps.")
    return (scales + [scales[-1]] * (steps - len(scales)))[:steps]
