"""From the sampler's widgets to one call of the library, for long videos and for single windows."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..fp8_optimization import how_linears_run
from ..media.frame_folder import FrameFolder
from ..media.masks import latent_masks, speaker_planes
from ..media.video import OutputFiles, VideoWriter, check_output
from ..pipeline.attention_policy import SAFER, bind, overridden
from ..pipeline.bounds import BOUNDS, check_numbers
from ..pipeline.conditioning import Conditioning, WindowInputs, window_audio, with_silence
from ..pipeline.humo import HuMoConditioner, References, plan_humo
from ..pipeline.journal import Journal, describe, describe_config, digest_of_weights
from ..pipeline.long_video import Callbacks, FinishedWindow, generate
from ..pipeline.nonfinite import FallbackModes
from ..pipeline.plan import FLASHTALK, GenerateConfig, Plan, plan_schedule, plan_video
from ..pipeline.recorder import Recorder
from ..pipeline.sampling import Schedule, denoise, what_ran
from ..pipeline.schedulers import SCHEDULERS, make_scheduler
from ..pipeline.techniques import Technique, fitted
from ..pipeline.windows import latent_frames, plan_windows
from ..wanvideo.errors import InputError
from ..wanvideo.modules.attention import count_kernels
from ..wanvideo.runtime.compilation import compile_limits, described
from ..wanvideo.runtime.precision import fp16_accumulation
from . import comfyui
from .models import VideoModel
from .types import ClipEmbeds, HuMoVideo, LongVideo, OneWindow, SigmaLevel, SpeechEmbeds, TextEmbeds

logger = logging.getLogger(__name__)

# What to choose in place of public schedulers that we do not run.
INSTEAD = {
    "longcat_distill_euler": "euler",
    "deis": "dpm++",
    "er_sde": "dpm++_sde",
    "flowmatch_causvid": "flowmatch_distill",
    "flowmatch_pusa": "euler",
    "sa_ode_stable": "unipc",
    "rcm": "lcm",
    "vibt_unipc": "unipc",
}

GUIDANCE_OF_HUMO = {"official": "those of its release", "wrapper": "those of ComfyUI-WanVideoWrapper"}

Latent = dict[str, Any]


def check_scheduler(name: str) -> None:
    """Raise InputError for a scheduler that is not run here, naming one that is."""
    if name in INSTEAD:
        raise InputError(f"The scheduler {name} is not part of this pack: choose {INSTEAD[name]} instead.")
    if name not in SCHEDULERS:
        raise InputError(f"There is no scheduler '{name}': choose one of {', '.join(SCHEDULERS)}.")


def check_riflex(index: int) -> None:
    """Raise InputError where RIFLEx is on."""
    if index:
        raise InputError("RIFLEx is not part of this pack: set riflex_freq_index to 0; windows make long videos.")


@dataclass(frozen=True)
class SamplerSettings:
    """The widgets of the sampler."""

    steps: int
    cfg: float | Sequence[float]
    shift: float
    seed: int
    scheduler: str
    sigmas: Tensor | None = None
    denoise: float = 1.0
    start_step: int = 0
    end_step: int = -1
    add_noise: bool = False
    riflex: int = 0
    techniques: tuple[Technique, ...] = ()

    def __post_init__(self) -> None:
        check_scheduler(self.scheduler)
        check_riflex(self.riflex)
        check_numbers(denoise_strength=self.denoise)
        check_numbers(steps=self.steps, cfg=self.cfg, shift=self.shift, seed=self.seed, sigmas=self.levels)
        for name in ("start_step", "end_step"):
            object.__setattr__(self, name, self._step(getattr(self, name)))
        check_numbers(start_step=self.start_step, end_step=self.end_step)
        if self.schedule_steps > BOUNDS["steps"].most:
            raise InputError(
                f"A denoise_strength of {self.denoise} makes a schedule of {self.schedule_steps:,} steps, of which the "
                f"last {self.steps} run: set it higher, or fewer steps."
            )

    def _step(self, step: int | SigmaLevel) -> int:
        """`step`; where it is a `SigmaLevel`, the first one of the steps to run whose sigma is at or below it."""
        if not isinstance(step, SigmaLevel):
            return step
        grid = make_scheduler(self.scheduler, self.schedule_steps, self.shift, self.levels).sigmas
        return max(0, int((grid > float(step)).sum()) - (self.schedule_steps - self.steps))

    @property
    def levels(self) -> list[float] | None:
        return None if self.sigmas is None else [float(sigma) for sigma in self.sigmas]

    @property
    def schedule_steps(self) -> int:
        """Steps of the whole schedule; with denoise_strength below 1 its last `steps` are run."""
        return self.steps if self.denoise == 1 else max(self.steps, round(self.steps / self.denoise))

    @property
    def first_step(self) -> int:
        return self.start_step + self.schedule_steps - self.steps


def check_request(
    what: LongVideo | OneWindow | HuMoVideo,
    settings: SamplerSettings,
    *,
    text: TextEmbeds | None,
    speech: SpeechEmbeds | None,
    start: Latent | None,
) -> None:
    """Raise InputError for inputs that are missing or do not fit together, whatever the model."""
    if text is None:
        raise InputError("There is no prompt: connect text_embeds (InfiniteTalk Text Encode).")
    _negative(text, settings)
    if isinstance(what, HuMoVideo):
        _only(text.positive)
        if speech is not None:
            raise InputError("HuMo takes its speech from InfiniteTalk HuMo: disconnect multitalk_embeds.")
        if start is not None or settings.first_step > 0 or settings.end_step != -1:
            raise InputError(
                "HuMo begins from noise and runs all steps: disconnect samples, and leave the steps whole."
            )
        _humo_plan(what, settings, channels=True)
        return
    if isinstance(what, OneWindow):
        _only(text.positive)
        _schedule(settings, speech)
        _first_latents(start, settings, _shape(what))
        return
    if speech is None:
        raise InputError("There is no speech: connect multitalk_embeds (InfiniteTalk Silence for a silent person).")
    if settings.end_step != -1:
        raise InputError("end_step stops within a window, a long video has many: set it to -1.")
    if what.clip is not None and what.clip.negative is not None:
        raise InputError(
            "A negative_image has no effect on long videos: disconnect it (InfiniteTalk CLIP Vision Encode)."
        )
    frames_folder(what.output_path)
    lengths = [len(rows) for rows in speech.speakers] or [speech.num_frames]
    _plan(_config(what, settings, speech), _source(what, start), lengths, speech)


def sample(
    model: VideoModel,
    what: LongVideo | OneWindow | HuMoVideo,
    settings: SamplerSettings,
    *,
    text: TextEmbeds | None,
    speech: SpeechEmbeds | None,
    start: Latent | None,
) -> tuple[Latent, Latent]:
    """(samples, denoised samples), both LATENT. Raises InputError for inputs that do not fit together."""
    check_request(what, settings, text=text, speech=speech, start=start)
    assert text is not None
    if model.model.config.humo is not None and not isinstance(what, HuMoVideo):
        raise InputError(f"{model.name} is HuMo: connect InfiniteTalk HuMo as image_embeds, or load another model.")
    settings = replace(settings, techniques=fitted(settings.techniques, model.model.config, model.name))
    begin = time.monotonic()
    with (
        comfyui.ordinary_tensors(),
        count_kernels() as kernels,
        fp16_accumulation(model.precision == "fp16_fast"),
        compile_limits(model.compile_settings),
    ):
        if isinstance(what, LongVideo):
            assert speech is not None
            result = _long_video(model, what, settings, text, speech, start)
        elif isinstance(what, HuMoVideo):
            result = _humo(model, what, settings, text)
        else:
            result = _one_window(model, what, settings, text, speech, start)
    linears = how_linears_run(model.model.blocks, comfyui.device())
    line = what_ran(linears, model.attention_mode, model.attention_policy, kernels)
    logger.info("%s, %s, %.1f s: %s", model.name, model.precision, time.monotonic() - begin, line)
    return result


def _policy(model: VideoModel) -> Any:
    return overridden(bind(model.attention_policy, model.attention_mode, len(model.model.blocks)), model.overrides)


class _Reporter:
    """Progress and preview of a run on ComfyUI's node."""

    def __init__(self, device: torch.device) -> None:
        self._progress = comfyui.Progress(1, device)
        self._clean: Tensor | None = None

    def guess(self, clean: Tensor, window: int, step: int) -> None:
        self._clean = clean

    def step(self, window: int, windows: int, step: int, steps: int) -> None:
        self._progress(window * steps + step, windows * steps, self._clean)


# --- long videos -------------------------------------------------------------------------------------------------


class _Images:
    """IMAGE [N, H, W, 3] as a source of frames."""

    def __init__(self, images: Tensor) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int, /) -> Any:
        return self._images[index, ..., :3].float().cpu().numpy()


class _FixedClip:
    """CLIP features that were made beforehand, whatever the image."""

    def __init__(self, embeds: ClipEmbeds) -> None:
        self._embeds = embeds

    def encode(self, image: Tensor) -> Tensor:
        return self._embeds.positive


def _long_video(
    model: VideoModel,
    what: LongVideo,
    settings: SamplerSettings,
    text: TextEmbeds,
    speech: SpeechEmbeds,
    start: Latent | None,
) -> tuple[Latent, Latent]:
    """All windows: decoded frames in the LATENT's "video", the last window's latents as its samples."""
    source = _source(what, start)
    resident = model.weights.resident
    mode = model.mode if what.mode == "auto" else what.mode
    if mode == FLASHTALK and model.adapter_mode is not None:
        raise InputError(f"FlashTalk's audio layers are in its model: leave the adapter of {model.name} out.")
    config = replace(
        _config(what, settings, speech), mode=mode, attention_policy=_policy(model), device=resident.device
    )
    features = _features(model, speech)
    plan = _plan(config, source, [len(rows) for rows in features], speech)
    conditioning = Conditioning(text.positive, _negative(text, settings), features, _Images(source), text.nag)
    reporter = _Reporter(resident.device)
    callbacks = Callbacks(
        progress=reporter.step,
        preview=reporter.guess,
        check_interrupt=comfyui.stop_if_interrupted,
        stage=_stages(model, model.working_bytes(what.frames, what.height, what.width), what.offload_between),
    )
    clip = None if what.clip is None else _FixedClip(what.clip)
    windows = partial(generate, model.model, what.vae, clip, conditioning, plan)
    folder = frames_folder(what.output_path)
    if folder is not None:
        result = _write_frames(windows(callbacks, frames_dtype=torch.uint8), folder)
    elif what.output_path:
        what_is_made = _described(model, what, conditioning, plan, speech)
        how = {
            "torch": torch.__version__,
            "tiling of the VAE": str(what.tiled),
            "compilation": described(model.compile_settings),
        }
        result = _write(windows, callbacks, what, speech, len(plan.windows), what_is_made, how)
    else:
        result = _collect(windows(callbacks), speech)
    what.vae.unload()
    return result, result


def _config(what: LongVideo, settings: SamplerSettings, speech: SpeechEmbeds) -> GenerateConfig:
    """All settings that do not depend on the model."""
    return GenerateConfig(
        width=what.width,
        height=what.height,
        frames=what.frames,
        motion_frames=what.motion_frames,
        total_frames=speech.num_frames,
        steps=settings.schedule_steps,
        shift=settings.shift,
        scheduler=settings.scheduler,
        sigmas=settings.levels,
        start_step=settings.first_step,
        cfg=settings.cfg,
        audio_cfg=speech.audio_cfg,
        audio_scale=speech.audio_scale,
        seed=settings.seed,
        mode="infinitetalk" if what.mode == "auto" else what.mode,
        color_correction=0.0 if what.color_match == "disabled" else 1.0,
        color_method="reinhard" if what.color_match == "disabled" else what.color_match,
        tiled_vae=what.tiled,
        speech_encoding="once",
        techniques=settings.techniques,
    )


def _plan(config: GenerateConfig, source: Tensor, lengths: Sequence[int], speech: SpeechEmbeds) -> Plan:
    """The plan of a video from `source` frames [N, H, W, 3] with recordings of these lengths in frames."""
    return plan_video(config, (source.shape[2], source.shape[1]), lengths, _planes(speech))


def _source(what: LongVideo, start: Latent | None) -> Tensor:
    """Images that the video starts from: a source video's frames come with the latents of InfiniteTalk Encode."""
    frames: Tensor | None = None if start is None else start.get("source_frames")
    if start is not None and frames is None:
        raise InputError("samples of a long video must come from InfiniteTalk Encode: connect its output.")
    if what.start_images is not None and (frames is None or len(what.start_images) > 1):
        return what.start_images
    if frames is not None:
        return frames
    raise InputError("There is no image: connect start_image of InfiniteTalk Long Video.")


def _stages(
    model: VideoModel, working_bytes: int, offload_between: bool
) -> Callable[[str], contextlib.AbstractContextManager[None]]:
    """Brings the model to the device where it is used; the VAE does so by itself."""

    @contextlib.contextmanager
    def stage(name: str) -> Iterator[None]:
        if name == "model":
            model.to_device(working_bytes)
        yield
        if name == "model" and offload_between:
            model.unload()

    return stage


def _collect(windows: Iterator[FinishedWindow], speech: SpeechEmbeds) -> Latent:
    """The frames of all windows, in memory."""
    video: Tensor | None = None
    done = 0
    latents = torch.empty(0)
    for window in windows:
        if video is None:
            video = torch.empty(speech.num_frames, *window.frames.shape[1:])
        video[done : done + len(window.frames)] = window.frames
        done += len(window.frames)
        latents = window.latents
    assert video is not None
    return {"samples": latents.cpu()[None], "video": video, "output_path": ""}


def frames_folder(output_path: str) -> Path | None:
    """The folder of frames that `output_path` names; None: it is empty, or the name of a video by its ending.

    Raises InputError when it leads outside ComfyUI's output folder.
    """
    if not output_path:
        return None
    path = comfyui.output_path(output_path)
    return None if path.suffix else path


def _write_frames(windows: Iterator[FinishedWindow], folder: Path) -> Latent:
    """The frames of all windows as images in a folder."""
    with FrameFolder(folder) as frames:
        for window in windows:
            frames.append(window.frames)
            latents, last = window.latents, window.frames / 255
    return {"samples": latents.cpu()[None], "video": last, "output_path": str(folder)}


def _write(
    windows: Callable[..., Iterator[FinishedWindow]],
    callbacks: Callbacks,
    what: LongVideo,
    speech: SpeechEmbeds,
    count: int,
    what_is_made: dict[str, str],
    how: dict[str, str],
) -> Latent:
    """The windows appended to a file as they come, behind those of an interrupted run of the same video."""
    path = comfyui.output_path(what.output_path)
    check_output(path)
    sound, rate = (None, None) if speech.audio is None else (speech.audio["waveform"][0], speech.audio["sample_rate"])
    if sound is not None and len(sound) > 2:  # as of a film
        sound = sound.mean(0)
    with OutputFiles.of(path).locked() as files, count_kernels() as kernels:
        journal = Journal(files, what_is_made, how)
        start = None
        try:
            start = journal.start(resume=True)
        except InputError as error:
            logger.warning("The video begins anew. %s", error)
        state = None if start is None else start.state
        with VideoWriter(path, speech.fps, sound, rate, written=None if start is None else start.written) as writer:
            if state is not None:
                samples, frames = state.latents, ((state.carried + 1) / 2).permute(1, 2, 3, 0)
            if state is None or state.windows < count:
                with Recorder(writer, journal, kernels) as recorder:

                    def check() -> None:
                        comfyui.stop_if_interrupted()
                        recorder.check()

                    callbacks = replace(callbacks, check_interrupt=check)
                    for window in windows(callbacks, start=state, frames_dtype=torch.uint8):
                        recorder.add(window)
                        samples, frames = window.latents, window.frames / 255
    return {"samples": samples.cpu()[None], "video": frames, "output_path": str(path)}


def _described(
    model: VideoModel, what: LongVideo, given: Conditioning, plan: Plan, speech: SpeechEmbeds
) -> dict[str, str]:
    """Name -> value, or digest, of all that decides what the video is."""
    clip = what.clip
    facts = {
        "model": digest_of_weights(model.model),
        "LoRAs": model.loras,
        "precision": model.precision,
        "attention mode": model.attention_mode,
        "attention policy": model.attention_policy,
        "attention overrides": model.overrides,
        "prompt": given.context,
        "negative prompt": given.negative,
        "normalized attention guidance": given.nag,
        "speech": given.audio,
        "masks": plan.masks,
        "image": [torch.as_tensor(given.source[index]) for index in range(len(given.source))],
        "image tokens": None if clip is None else clip.positive,
        "sound": None if speech.audio is None else speech.audio["waveform"],
        "frames per second": speech.fps,
    }
    parts: dict[str, str] = describe_config(plan.config) | what.vae.described()
    for name, value in facts.items():
        parts |= describe(name, value)
    return parts


# --- one window --------------------------------------------------------------------------------------------------


def _one_window(
    model: VideoModel,
    what: OneWindow,
    settings: SamplerSettings,
    text: TextEmbeds,
    speech: SpeechEmbeds | None,
    start: Latent | None,
) -> tuple[Latent, Latent]:
    device = model.weights.resident.device
    schedule = _schedule(settings, speech)
    generator = torch.Generator("cpu").manual_seed(int(settings.seed))
    noise = torch.randn(_shape(what), generator=generator)
    x = _first_latents(start, settings, _shape(what))
    if x is None:
        x = noise
    elif settings.add_noise or settings.denoise < 1:
        x = schedule.scheduler.add_noise(x, noise, schedule.start)
    model.to_device(model.working_bytes(what.num_frames, what.height, what.width))
    reporter = _Reporter(device)

    def report(step: int, clean: Tensor) -> None:
        reporter.guess(clean, 0, step)
        reporter.step(0, 1, step + 1 - schedule.start, schedule.end - schedule.start)

    x, clean = denoise(
        model.model,
        schedule,
        x.to(device),
        _window_inputs(model, what, settings, text, speech, device),
        generator=generator,
        modes=FallbackModes(model.model, _policy(model), SAFER, schedule.steps, device),
        report=report,
        check_interrupt=comfyui.stop_if_interrupted,
    )
    return {"samples": x.cpu()[None]}, {"samples": clean.cpu()[None]}


def _shape(what: OneWindow) -> tuple[int, int, int, int]:
    """Of the latents [16, T, h, w]."""
    return 16, latent_frames(what.num_frames), what.height // 8, what.width // 8


def _schedule(settings: SamplerSettings, speech: SpeechEmbeds | None) -> Schedule:
    return plan_schedule(
        settings.scheduler,
        settings.schedule_steps,
        settings.shift,
        sigmas=settings.levels,
        start_step=settings.first_step,
        end_step=None if settings.end_step == -1 else settings.end_step,
        cfg=settings.cfg,
        audio_cfg=1.0 if speech is None else speech.audio_cfg,
        techniques=settings.techniques,
    )


def _first_latents(start: Latent | None, settings: SamplerSettings, shape: tuple[int, ...]) -> Tensor | None:
    """The latents to start from, of that shape; None: the window starts from noise."""
    if start is None:
        if settings.first_step > 0:
            raise InputError("Starting behind the first step needs latents to start from: connect samples.")
        return None
    given: Tensor = start["samples"][0].float()
    if tuple(given.shape) != shape:
        raise InputError(
            f"samples {list(given.shape)} do not have the size of the video {list(shape)}: encode at its size."
        )
    return given


def _window_inputs(
    model: VideoModel,
    what: OneWindow,
    settings: SamplerSettings,
    text: TextEmbeds,
    speech: SpeechEmbeds | None,
    device: torch.device,
) -> WindowInputs:
    clip = what.clip
    audio, masks, audio_scale = None, None, 1.0
    if speech is not None:
        window = plan_windows(what.num_frames, what.num_frames, 1)[0]
        audio = window_audio(_features(model, speech), window, what.num_frames).to(device)
        masks = latent_masks(_planes(speech), len(audio), (what.width, what.height), what.width, what.height).to(device)
        audio = with_silence(audio, masks)
        check_numbers(audio_scale=speech.audio_scale)
        audio_scale = speech.audio_scale
    return WindowInputs(
        context=_only(text.positive).to(device),
        negative=_negative(text, settings).to(device),
        y=None if what.condition is None else what.condition.to(device),
        clip=None if clip is None else clip.positive.to(device),
        negative_clip=None if clip is None or clip.negative is None else clip.negative.to(device),
        audio=audio,
        masks=masks,
        audio_scale=audio_scale,
        nag=None if text.nag is None else replace(text.nag, negative=text.nag.negative.to(device)),
    )


# --- HuMo --------------------------------------------------------------------------------------------------------


def _humo_plan(what: HuMoVideo, settings: SamplerSettings, *, channels: bool) -> Plan:
    config = GenerateConfig(
        width=what.width,
        height=what.height,
        steps=settings.steps,
        shift=settings.shift,
        scheduler=settings.scheduler,
        sigmas=settings.levels,
        cfg=settings.cfg,
        audio_cfg=what.audio_cfg,
        audio_scale=what.audio_scale,
        seed=settings.seed,
        tiled_vae=what.tiled,
        techniques=settings.techniques,
    )
    return plan_humo(
        config, what.frames, len(what.images), channels=channels, formula=what.guidance, speech_span=what.span
    )


def _humo(model: VideoModel, what: HuMoVideo, settings: SamplerSettings, text: TextEmbeds) -> tuple[Latent, Latent]:
    config = model.model.config
    if config.humo is None:
        raise InputError(f"{model.name} is not HuMo: load a HuMo model, or connect InfiniteTalk Long Video.")
    channels = config.in_dim > config.out_dim
    if channels and what.vae is None:
        raise InputError("The 17B model of HuMo needs the VAE for its condition: connect vae of InfiniteTalk HuMo.")
    device = model.weights.resident.device
    plan = _humo_plan(what, settings, channels=channels)
    plan = replace(plan, config=replace(plan.config, device=device, attention_policy=_policy(model)))
    logger.info("HuMo's guidance and noise levels are %s", GUIDANCE_OF_HUMO[what.guidance])
    given = References(_only(text.positive), _negative(text, settings), what.audio, what.images)
    features = (config.humo.blocks, config.humo.channels)
    conditioner = HuMoConditioner(what.vae, given, plan, Callbacks().stage, channels=channels, features=features)
    condition = conditioner(plan.windows[0], None)
    generator = torch.Generator("cpu").manual_seed(int(settings.seed))
    x = torch.randn(condition.shape, generator=generator)
    model.to_device(model.working_bytes(what.frames + 4 * condition.behind, what.height, what.width))
    reporter = _Reporter(device)
    steps = plan.schedule.steps
    kept = condition.shape[1] - condition.behind

    def report(step: int, clean: Tensor) -> None:
        reporter.guess(clean[:, :kept], 0, step)
        reporter.step(0, 1, step + 1, steps)

    x, clean = denoise(
        model.model,
        plan.schedule,
        x.to(device),
        condition.inputs,
        generator=generator,
        modes=FallbackModes(model.model, _policy(model), SAFER, steps, device),
        report=report,
        check_interrupt=comfyui.stop_if_interrupted,
    )
    return {"samples": x[:, :kept].cpu()[None]}, {"samples": clean[:, :kept].cpu()[None]}


# --- both --------------------------------------------------------------------------------------------------------


def _negative(text: TextEmbeds, settings: SamplerSettings) -> Tensor:
    if text.negative is not None:
        return text.negative
    if settings.cfg != 1:
        raise InputError("A cfg above 1 needs a negative prompt: connect one, or set cfg to 1.")
    return text.positive[0]


def _only(pieces: Sequence[Tensor]) -> Tensor:
    """The prompt of a single window."""
    if len(pieces) > 1:
        raise InputError(
            f"The prompt has {len(pieces)} pieces for a video of one window: remove the | from it, or make a long "
            "video with InfiniteTalk Long Video."
        )
    return pieces[0]


def _features(model: VideoModel, speech: SpeechEmbeds) -> tuple[Tensor, ...]:
    """Features of the speakers; of nobody speaking, where there is none."""
    if speech.speakers:
        return speech.speakers
    audio = model.model.config.audio
    if audio is None:
        raise InputError(f"{model.name} has no audio layers: connect multitalk_model to its loader.")
    return (torch.zeros(speech.num_frames, audio.blocks, audio.channels),)


def _planes(speech: SpeechEmbeds) -> list[Tensor] | None:
    """Masks of the speakers, without the background that some workflows add behind them."""
    if speech.masks is None or not speech.speakers:
        return None
    return speaker_planes(speech.masks, len(speech.speakers))
