"""What is settled before any weights are read: size, windows, schedule, guidance of each step, masks.

`plan_video` checks a configuration once, for the command, the nodes and the library; everything after it reads the
`Plan`. Single windows, which have neither a recording nor windows to plan, take the schedule alone (`plan_schedule`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..media.color import COLOR_METHODS
from ..media.images import DEFAULT_AREA, fit_size
from ..media.masks import latent_masks
from ..wanvideo.errors import InputError
from .bounds import BOUNDS, check_numbers, check_window
from .guidance import guide, per_step
from .nonfinite import AttentionPolicy
from .sampling import Schedule
from .schedulers import make_scheduler
from .techniques import Technique, check_techniques
from .windows import Window, plan_windows

__all__ = [
    "FLASHTALK",
    "HUMO",
    "MODES",
    "RING_FRAMES",
    "SPEECH_ENCODINGS",
    "GenerateConfig",
    "Mode",
    "Plan",
    "mode_by_name",
    "plan_schedule",
    "plan_video",
]


@dataclass(frozen=True)
class Mode:
    """How the windows of a long video follow from one another.

    Attributes:
        carried_condition: condition channels and image tokens of later windows are those of the frames carried over,
            not of the source frame where the window starts.
        first_motion: the source image's latents stand at the front of the first window.
        noised: the latents at the front are noised to each step's sigma; otherwise they stay clean.
        draws: in later windows, noise of their shape is drawn at each step, used or not.
        early: the first window too gives out none of its motion frames, and begins so many before the video.
        distilled: made for one speaker and one pass of each step, from one image and one prompt; all else is rejected.
        speech: how the speech may be encoded, one of `SPEECH_ENCODINGS`; the first one is the usual.
    """

    carried_condition: bool = False
    first_motion: bool = True
    noised: bool = False
    draws: bool = True
    early: bool = False
    distilled: bool = False
    speech: tuple[str, ...] = ("once",)


HUMO = "humo"
"""A model of its own, whose videos have one window: see `humo.plan_humo`."""

FLASHTALK = "flashtalk"
"""InfiniteTalk distilled to four steps and windows of a second, see `flashtalk`."""

SPEECH_ENCODINGS = ("once", "stream")
"""`once`: the whole recording. `stream`: for each window the last `RING_FRAMES` video frames of it, as it comes."""

RING_FRAMES = 200
"""8 s."""

MODES: dict[str, Mode] = {
    "infinitetalk": Mode(),
    "multitalk": Mode(carried_condition=True, first_motion=False, noised=True),
    HUMO: Mode(first_motion=False, draws=False),
    FLASHTALK: Mode(draws=False, early=True, distilled=True, speech=("stream", "once")),
}


def mode_by_name(path: str | Path) -> str | None:
    """The row of `MODES` that the name of an adapter or a merged model speaks of; None: of none."""
    name = Path(path).name.lower()
    if FLASHTALK in name:
        return FLASHTALK
    return "infinitetalk" if "infinite" in name else "multitalk" if "multitalk" in name else None


@dataclass(frozen=True)
class GenerateConfig:
    """How to generate. Defaults are the public ones of InfiniteTalk at 480p, bounds of all numbers in `bounds.BOUNDS`.

    Attributes:
        width, height: of the video, pixels; rounded to multiples of 16. A missing one follows the image's aspect;
            without both, the aspect is kept within `area` pixels.
        frames, motion_frames: length of a window and how much of it is carried over, both 4n + 1.
        total_frames: length of the video; None: as long as the longest recording.
        steps, shift, scheduler, sigmas: see `make_scheduler`.
        start_step: steps left out at the front. Above 0 the latents begin as those of the source video, noised to that
            step's sigma (video to video): the higher, the closer to the source.
        cfg: text guidance scale, or one for each step. 1 is none (distilled models), the public scale is 5.
        audio_cfg: audio guidance scale likewise. The public scale is 4.
        image_cfg: of HuMo 1.7B: guidance scale of the reference images.
        guidance: formula that combines them, one of `guidance.FORMULAS`.
        use_apg, apg_momentum, apg_norm_threshold: adaptive projected guidance, see `guidance.Projection`.
        audio_scale: factor on what the speech adds inside the model.
        seed: of all random numbers.
        mode: one of `MODES`.
        color_correction: 0 to 1, how far each frame takes on the colors of the first condition image.
        color_method: how, one of `COLOR_METHODS`.
        speech_encoding: one of `SPEECH_ENCODINGS` that the mode has; None: its usual one.
        attention_policy: mode of the attention kernels, or (step, steps) -> mode. None: the model's own.
        tiled_vae: encode and decode in tiles, for small GPUs.
        techniques: what else changes the passes of a step, see `techniques`.
        device: where latents live and the model is called.
    """

    width: int | None = None
    height: int | None = None
    area: int = DEFAULT_AREA
    frames: int = 81
    motion_frames: int = 9
    total_frames: int | None = None
    steps: int = 40
    shift: float = 7.0
    scheduler: str = "multitalk"
    sigmas: Sequence[float] | None = None
    start_step: int = 0
    cfg: float | Sequence[float] = 5.0
    audio_cfg: float | Sequence[float] = 4.0
    image_cfg: float = 4.0
    guidance: str = "additive"
    use_apg: bool = False
    apg_momentum: float = -0.75
    apg_norm_threshold: float = 55.0
    audio_scale: float = 1.0
    seed: int = 42
    mode: str = "infinitetalk"
    color_correction: float = 1.0
    color_method: str = "reinhard"
    speech_encoding: str | None = None
    attention_policy: AttentionPolicy | None = None
    tiled_vae: bool = False
    techniques: tuple[Technique, ...] = ()
    device: str | torch.device = "cpu"


@dataclass(frozen=True)
class Plan:
    """A checked generation.

    Attributes:
        config: what it was planned from.
        mode: row of `MODES`.
        width, height: of the video, pixels, multiples of 16.
        total: frames of the video.
        windows: that make them, in order.
        schedule: steps of every window.
        speakers: number of recordings.
        masks: where each speaker is, then the background, [speakers + 1, height / 8, width / 8] of 0 and 1; see
            `latent_masks` for one speaker.
    """

    config: GenerateConfig
    mode: Mode
    width: int
    height: int
    total: int
    windows: tuple[Window, ...]
    schedule: Schedule
    speakers: int
    masks: torch.Tensor

    @property
    def speech_encoding(self) -> str:
        return self.config.speech_encoding or self.mode.speech[0]


def plan_video(
    config: GenerateConfig,
    image: tuple[int, int],
    speech: Sequence[int],
    masks: Sequence[torch.Tensor] | None = None,
) -> Plan:
    """The plan of a long video, of any mode but `HUMO`.

    Args:
        image: (width, height) of the image, or of the source video's first frame, pixels.
        speech: for each speaker, the length of the recording in video frames.
        masks: one plane [H, W] per speaker; None puts speakers side by side.

    Raises InputError for settings, lengths and masks that do not fit.
    """
    if config.mode not in MODES or config.mode == HUMO:
        long = ", ".join(mode for mode in MODES if mode != HUMO)
        raise InputError(f"There is no mode '{config.mode}' of long videos: choose one of {long}.")
    if config.color_method not in COLOR_METHODS:
        raise InputError(f"There is no color method '{config.color_method}': choose one of {', '.join(COLOR_METHODS)}.")
    check_numbers(**{name: value for name, value in vars(config).items() if name in BOUNDS})
    mode = MODES[config.mode]
    if config.speech_encoding not in (None, *mode.speech):
        raise InputError(
            f"The mode {config.mode} has no speech encoding '{config.speech_encoding}': choose "
            f"{' or '.join(mode.speech)}."
        )
    if mode.distilled:
        _check_distilled(config, len(speech), masks)
    width, height = fit_size(image, config.width, config.height, config.area)
    check_window(config.frames, width, height)
    planes = latent_masks(masks, len(speech), image, width, height)
    total = max(speech) if config.total_frames is None else config.total_frames
    windows = plan_windows(total, config.frames, config.motion_frames, early=mode.early)
    schedule = plan_schedule(
        config.scheduler,
        config.steps,
        config.shift,
        sigmas=config.sigmas,
        start_step=config.start_step,
        cfg=config.cfg,
        audio_cfg=config.audio_cfg,
        guidance=config.guidance,
        apg=(config.apg_momentum, config.apg_norm_threshold) if config.use_apg else None,
        techniques=config.techniques,
    )
    plan = Plan(config, mode, width, height, total, tuple(windows), schedule, len(speech), planes)
    if plan.speech_encoding == "stream" and config.frames > RING_FRAMES:
        raise InputError(
            f"Windows of {config.frames} frames are longer than the {RING_FRAMES} whose speech is read: set fewer, or "
            "the speech encoding to once."
        )
    return plan


def _check_distilled(config: GenerateConfig, speakers: int, masks: Sequence[torch.Tensor] | None) -> None:
    """Raise InputError for what a model that was distilled to one pass was not made for."""
    what = f"The mode {config.mode}"
    scales = [
        scale
        for value in (config.cfg, config.audio_cfg)
        for scale in (value if isinstance(value, Sequence) else [value])
    ]
    if any(scale != 1 for scale in scales):
        raise InputError(f"{what} makes one pass of each step, without guidance: set cfg and audio_cfg to 1.")
    if config.start_step:
        raise InputError(f"{what} begins from noise alone: leave the start step at 0.")
    if speakers > 1:
        raise InputError(f"{what} has one speaker, not {speakers}: give one recording, or mix them into one.")
    if masks is not None:
        raise InputError(f"{what} has one speaker, who is not confined: give no masks.")


def plan_schedule(
    scheduler: str,
    steps: int,
    shift: float,
    *,
    sigmas: Sequence[float] | None = None,
    start_step: int = 0,
    end_step: int | None = None,
    cfg: float | Sequence[float] = 1.0,
    audio_cfg: float | Sequence[float] = 1.0,
    guidance: str = "additive",
    apg: tuple[float, float] | None = None,
    techniques: tuple[Technique, ...] = (),
) -> Schedule:
    """The steps of a window with the guidance of each; arguments as in `GenerateConfig`.

    Args:
        end_step: the first step that is not run; None runs to the end.

    Raises InputError for numbers outside of `bounds.BOUNDS`, and for a scheduler, a start or a guidance that cannot be.
    """
    check_numbers(
        steps=steps, shift=shift, sigmas=sigmas, start_step=start_step, end_step=-1 if end_step is None else end_step
    )
    check_numbers(cfg=cfg, audio_cfg=audio_cfg)
    grid = make_scheduler(scheduler, steps, shift, sigmas)
    scales = zip(per_step(cfg, len(grid), "cfg"), per_step(audio_cfg, len(grid), "audio cfg"), strict=True)
    formulas = tuple(guide(text, audio, guidance, projected=apg is not None) for text, audio in scales)
    end = len(grid) if end_step is None else min(end_step, len(grid))
    check_techniques(techniques, formulas)
    return Schedule(grid, formulas, start_step, end, apg, techniques)
