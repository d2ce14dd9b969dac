"""HuMo (arXiv 2509.08519): a video of people from a text, reference images and speech, in one window.

The reference images stand behind the video's latent frames and are dropped before decoding. The 17B model reads them in
its condition channels, with the latents of a gray video; the 1.7B model, which has no such channels, in x itself. So
its two forms differ by the channels that the patch embedding reads, and what a pass without references or
without speech is given is a matter of its inputs alone: the loop is that of every model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..media.color import COLOR_METHODS
from ..media.images import fit_size
from ..wanvideo.errors import InputError
from ..wanvideo.modules.humo import humo_audio_window
from .bounds import BOUNDS, check_numbers, check_window
from .conditioning import Encoder, Stage, WindowCondition
from .guidance import Formula, Pass, Term, per_step
from .plan import HUMO, MODES, GenerateConfig, Plan
from .sampling import ModelInputs, Overwrite, Schedule
from .schedulers import make_scheduler
from .windows import Window, latent_frames

__all__ = ["FORMULAS", "TRAINED_FRAMES", "HuMoConditioner", "References", "guide_humo", "plan_humo"]

FORMULAS = ("official", "wrapper")
"""`official`: that of HuMo's release. `wrapper`: the arithmetic of ComfyUI-WanVideoWrapper, for its saved workflows."""

TRAINED_FRAMES = 97
"""Video frames that HuMo was trained with; longer videos degrade."""

DEFAULT_SIZE = (832, 480)

EARLY = 980
"""Timestep above which the 17B model's negative pass sees the references (official formula)."""

LESS_TEXT = 2.0
"""By how much text counts less from there on; a constant of the release, whatever the scale."""


# ------------------------------------------------------------------------------------------------------------ guidance


def guide_humo(
    text: float,
    audio: float,
    image: float,
    t: float,
    *,
    channels: bool,
    references: bool,
    formula: str = "official",
    early: float = EARLY,
) -> Formula:
    """The formula of a step at timestep t. Scales of 1 do not make it one pass: see `plan_humo`.

    Args:
        text, audio, image: guidance scales. `image` is read for models without condition channels.
        channels: whether the model reads references in condition channels (17B) or in x (1.7B).
        references: whether there are any.
        formula: one of `FORMULAS`.
        early: timestep above which the negative pass of a model with condition channels sees the references.

    Raises InputError for another formula.
    """
    if formula not in FORMULAS:
        raise InputError(f"There is no guidance formula '{formula}' of HuMo: choose one of {', '.join(FORMULAS)}.")
    full, silent, null = (Pass(*which, references) for which in ((True, True), (True, False), (False, False)))
    bare, bare_silent, bare_null = (replace(which, references=False) for which in (full, silent, null))
    if formula == "wrapper":
        return (
            Formula(full)
            if text == 1
            else _wrapper(text, audio, t > early, channels, (full, silent, null), (bare, bare_silent, bare_null))
        )
    if references and channels:
        base, scale = (null, text) if t > early else (bare_null, text - LESS_TEXT)
        return Formula(base, (Term("text", scale, silent, base), Term("audio", audio, full, silent)))
    terms = (Term("text", text, bare_silent, bare_null), Term("audio", audio, bare, bare_silent))
    return Formula(bare_null, (*terms, Term("image", image, full, bare)) if references else terms)


def _wrapper(
    text: float,
    audio: float,
    early: bool,
    channels: bool,
    seeing: tuple[Pass, Pass, Pass],
    bare: tuple[Pass, Pass, Pass],
) -> Formula:
    """Its text scale is one of speech where there is no other; and its passes change roles against the release's."""
    full, silent, null = seeing
    bare_full, bare_silent, bare_null = bare
    if audio == 1:
        base = silent if channels else bare_silent
        return Formula(base, (Term("text", text, full, base),))
    if channels:
        other = bare_null if early else null
        terms = (Term("audio", audio, full, other), Term("text", text - LESS_TEXT, other, silent))
        return Formula(silent, terms)
    return Formula(
        bare_null,
        (
            Term("text", text, bare_silent, bare_null),
            Term("speech", text, bare_full, bare_silent),
            Term("image", audio, full, bare_full),
        ),
    )


def _silenced(formula: Formula) -> Formula:
    """The same with silence in place of the speech; terms of which nothing is left are dropped."""

    def silent(which: Pass) -> Pass:
        return replace(which, speech=False)

    terms = [replace(term, plus=silent(term.plus), minus=silent(term.minus)) for term in formula.terms]
    return Formula(silent(formula.base), tuple(term for term in terms if term.plus != term.minus))


# ------------------------------------------------------------------------------------------------------------ the plan


def official_sigmas(steps: int, shift: float) -> list[float]:
    """The noise levels of the release: evenly spaced from 0.999, shifted once, and 0."""
    u = 0.999 * (1 - np.arange(steps) / steps)
    return [*(shift * u / (1 + (shift - 1) * u)).tolist(), 0.0]


def plan_humo(
    config: GenerateConfig,
    frames: int,
    references: int,
    *,
    channels: bool,
    formula: str = "official",
    speech_span: tuple[float, float] = (0.0, 1.0),
) -> Plan:
    """The plan of one window of `frames` video frames, fewer where that is not 4n + 1.

    Args:
        config: a step whose cfg is 1 has no negative pass: it takes one pass, or two where its audio_cfg is not 1.
            `image_cfg` is read where there are references and no condition channels.
        references: number of reference images.
        channels, formula: see `guide_humo`; `formula` decides the noise levels of `unipc`, too.
        speech_span: part of the steps outside of which every pass is without speech.

    Raises InputError for settings that do not fit.
    """
    check_numbers(**{name: value for name, value in vars(config).items() if name in BOUNDS})
    if config.color_method not in COLOR_METHODS:
        raise InputError(f"There is no color method '{config.color_method}': choose one of {', '.join(COLOR_METHODS)}.")
    if frames < 1:
        raise InputError("The recording is shorter than a video frame: give a longer one.")
    if config.start_step:
        raise InputError("HuMo begins from noise alone: leave the start step at 0.")
    if config.techniques:
        raise InputError("Step caches, Enhance-A-Video and skipped layers were not tried with HuMo: leave them out.")
    total = (frames - 1) // 4 * 4 + 1
    width, height = fit_size(DEFAULT_SIZE, config.width, config.height, DEFAULT_SIZE[0] * DEFAULT_SIZE[1])
    check_window(total + 4 * references, width, height)
    sigmas = config.sigmas
    if config.scheduler == "unipc" and sigmas is None and formula == "official":
        sigmas = official_sigmas(config.steps, config.shift)
    grid = make_scheduler(config.scheduler, config.steps, config.shift, sigmas)
    scales = zip(
        per_step(config.cfg, len(grid), "cfg"),
        per_step(config.audio_cfg, len(grid), "audio cfg"),
        grid.timesteps.tolist(),
        strict=True,
    )

    def of_step(text: float, audio: float, t: float) -> Formula:
        full, silent = Pass(True, True, references > 0), Pass(True, False, references > 0)
        if text == 1 and formula == "official":
            return Formula(full) if audio == 1 else Formula(silent, (Term("audio", audio, full, silent),))
        return guide_humo(
            text, audio, config.image_cfg, t, channels=channels, references=references > 0, formula=formula
        )

    formulas = [of_step(*scale) for scale in scales]
    for step in range(len(grid)):
        if not speech_span[0] <= step / len(grid) <= speech_span[1]:
            formulas[step] = _silenced(formulas[step])
    # There is no image whose colors the video should have.
    config = replace(config, frames=total, total_frames=total, motion_frames=1, mode=HUMO, color_correction=0.0)
    schedule = Schedule(grid, tuple(formulas), 0, len(grid))
    window = Window(0, 0, total, 0, total, is_last=True)
    return Plan(config, MODES[HUMO], width, height, total, (window,), schedule, 1, torch.zeros(0, 0, 0))


# ------------------------------------------------------------------------------------------- what a pass is given


@dataclass(frozen=True)
class References:
    """What to generate from.

    Attributes:
        context, negative: prompt embeddings [n, text_dim].
        audio: one row of Whisper features per video frame [rows, 5, C]; None: silence.
        images: reference images [3, H, W] in [-1, 1], of the video's size (`media.images.pad_image`).
    """

    context: Tensor
    negative: Tensor
    audio: Tensor | None
    images: Sequence[Tensor]


@dataclass(frozen=True)
class _Inputs:
    """Called with a pass, what that one is given.

    Attributes:
        y, y_bare: condition channels [1, 20, T, h, w] with the references, and without them; None for 1.7B.
        given: latents [16, R, h, w] of the references.
        audio: windows of speech features [T, 8, 5, C].
    """

    context: Tensor
    negative: Tensor
    audio: Tensor
    audio_scale: float
    given: Tensor
    y: Tensor | None
    y_bare: Tensor | None

    def __call__(self, which: Pass) -> ModelInputs:
        own = None
        if self.y is None:
            own = Overwrite(self.given if which.references else torch.zeros_like(self.given), at_end=True)
        return ModelInputs(
            self.context if which.prompt else self.negative,
            y=self.y if which.references else self.y_bare,
            humo_audio=self.audio if which.speech else torch.zeros_like(self.audio),
            audio_scale=self.audio_scale,
            overwrite=own,
        )


class HuMoConditioner:
    """The condition of the one window of a planned video: `conditioner(window, None)`.

    Args:
        channels: whether the model reads references in condition channels (17B) or in x (1.7B).
        features: (groups, width) of the speech features that the model reads.
        stage: entered around each use of the VAE.

    Attributes:
        reference: an image [3, H, W] whose colors may be kept: the first reference, or gray.

    Raises InputError for inputs that are not finite or do not fit the plan.
    """

    def __init__(
        self, vae: Encoder, given: References, plan: Plan, stage: Stage, *, channels: bool, features: tuple[int, int]
    ) -> None:
        size = (3, plan.height, plan.width)
        if any(tuple(image.shape) != size for image in given.images):
            raise InputError(f"Reference images are not {size[1]} x {size[2]} pixels high and wide: fit them first.")
        if given.audio is not None and tuple(given.audio.shape[1:]) != features:
            raise InputError(
                f"Speech features {tuple(given.audio.shape)} do not fit: the model reads [rows, *{features}]."
            )
        named = {"prompt": given.context, "negative": given.negative, "speech features": given.audio}
        for name, tensor in named.items():
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise InputError(f"The {name} embedding holds NaN or infinite values: check the encoder and its input.")
        self.vae, self.given, self.plan, self.stage = vae, given, plan, stage
        self.channels, self.features = channels, features
        self.device = torch.device(plan.config.device)
        self.reference = given.images[0] if given.images else torch.zeros(size)

    @torch.no_grad()
    def __call__(self, window: Window, carried: Tensor | None) -> WindowCondition:
        frames, count = latent_frames(window.frames), max(1, len(self.given.images))
        latents = [self._encode(image.unsqueeze(1)) for image in self.given.images]  # each alone: one latent frame
        if latents:
            given = torch.cat(latents, dim=1)
        else:
            given = torch.zeros(16, 1, self.plan.height // 8, self.plan.width // 8, device=self.device)
        y, bare = self._channels(given, frames) if self.channels else (None, None)
        config = self.plan.config
        inputs = _Inputs(
            self.given.context.to(self.device),
            self.given.negative.to(self.device),
            self._speech(window.frames, count),
            config.audio_scale,
            given,
            y,
            bare,
        )
        return WindowCondition(inputs, (16, frames + count, *given.shape[2:]), behind=count)

    def prepare(self, window: Window) -> None:
        """Nothing: there is one window."""

    def _channels(self, given: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """(y with the references, y without); in both the mask says that the frames behind the video are given."""
        count = given.shape[1]
        pixels = torch.zeros(3, 4 * (frames + count) - 3, self.plan.height, self.plan.width)
        gray = self._encode(pixels)  # [16, T + R, h, w]
        mask = gray.new_zeros(4, *gray.shape[1:])
        mask[:, frames:] = 1
        bare = torch.cat([mask, gray]).unsqueeze(0)
        if not self.given.images:
            return bare, bare
        return torch.cat([mask, torch.cat([gray[:, :frames], given], dim=1)]).unsqueeze(0), bare

    def _speech(self, frames: int, references: int) -> Tensor:
        """Windows of speech features [T + R, 8, groups, C]: zeros for the reference frames, and without speech."""
        rows = self.given.audio
        if rows is None:
            rows = torch.zeros(frames, *self.features)
        windows, _ = humo_audio_window(rows, frames)
        return torch.cat([windows, windows.new_zeros(references, *windows.shape[1:])]).to(self.device)

    def _encode(self, frames: Tensor) -> Tensor:
        """[3, F, H, W] -> [16, T, h, w]"""
        with self.stage("vae"):
            latents = self.vae.encode(frames.unsqueeze(0).to(self.device), tiled=self.plan.config.tiled_vae)
        return latents[0].to(self.device, torch.float32)
