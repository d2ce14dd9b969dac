"""From files to a video file: what the command and other programs call.

    result = make_video(Job(files=..., audio=("speech.wav",), image="portrait.png", out="talking.mp4"))

Everything that can be refused is refused before the first large file is read. The encoders are loaded, used and let go
one after the other, so that the largest part in memory beside the DiT is the VAE.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..fp8_optimization import Quantization, summary
from ..media.audio import load_speech, read_audio
from ..media.images import fit_size, load_picture
from ..media.masks import MAX_SPEAKERS, latent_masks
from ..media.mixing import arrange, mix
from ..media.video import VideoFrames, VideoWriter, refuse_path
from ..multitalk.wav2vec import Wav2Vec2Features
from ..wanvideo.checkpoints.dit import inspect_dit, load_dit
from ..wanvideo.checkpoints.files import CheckpointFile, Progress
from ..wanvideo.checkpoints.state_dict import kind_of
from ..wanvideo.encoders.clip import ClipVision
from ..wanvideo.encoders.text import TextEncoder
from ..wanvideo.encoders.vae import WanVAE
from ..wanvideo.errors import CheckpointError, InfiniteTalkError, InputError
from ..wanvideo.kernels.layout import GuardStats, count_guards
from ..wanvideo.modules.attention import attention, canonical_mode, count_kernels
from ..wanvideo.modules.model import WanConfig, WanModel
from ..wanvideo.runtime.offload import BlockSwap, Offloader
from .attention_policy import bind
from .long_video import Callbacks, Conditioning, FrameSource, GenerateConfig, generate
from .schedulers import make_scheduler
from .windows import plan_windows

__all__ = ["DEFAULT_NEGATIVE", "DEFAULT_PROMPT", "Events", "Job", "ModelFiles", "Result", "choose_device", "make_video"]

log = logging.getLogger(__name__)

DEFAULT_PROMPT = "A person is talking to the camera, with natural expressions and small movements of the head."
DEFAULT_NEGATIVE = (
    "still picture, blurry, low quality, overexposed, subtitles, watermark, deformed face, extra fingers, bad hands"
)

FPS = 25
"""Video frames per second that InfiniteTalk was trained with."""

UNKNOWN_KIND = kind_of(())

SOUND_RATE = 48000
"""Hz. Of the sound of several recordings together."""


@dataclass(frozen=True)
class ModelFiles:
    """Checkpoint files. `adapter` is None for a merged model; `tokenizer` where the text encoder carries its own."""

    model: str | Path
    vae: str | Path
    text_encoder: str | Path
    wav2vec: str | Path
    clip_vision: str | Path
    adapter: str | Path | None = None
    tokenizer: str | Path | None = None


@dataclass(frozen=True)
class Job:
    """One video to make.

    Attributes:
        files: the checkpoints.
        audio: one recording per speaker, one to four.
        out: the video file to write (.mp4).
        image: the picture; or `video`: a source video whose movements are kept. One of the two.
        masks: one picture per speaker, white where the speaker is; empty: speakers side by side.
        prompt, negative: what to show, and what not.
        config: size, length of windows, steps, guidance, seed ...; its device and attention policy are set here.
        max_frames: where to stop although the recording goes on; None: nowhere.
        attention_mode: one of `ATTENTION_MODES`. attention_policy: one of `policy.POLICIES`, which step uses it.
        quantization: one of `QUANTIZATIONS`.
        base_dtype: of weights and activations; None: bfloat16 on a GPU, float32 on the CPU.
        device: "auto" (the GPU if there is one), "cpu", "cuda", "cuda:1" ...
        blocks_to_swap: transformer blocks that wait in host memory while others run.
    """

    files: ModelFiles
    audio: Sequence[str | Path]
    out: str | Path
    image: str | Path | None = None
    video: str | Path | None = None
    masks: Sequence[str | Path] = ()
    prompt: str = DEFAULT_PROMPT
    negative: str = DEFAULT_NEGATIVE
    config: GenerateConfig = field(default_factory=GenerateConfig)
    max_frames: int | None = None
    attention_mode: str = "auto"
    attention_policy: str = "default"
    quantization: str = "disabled"
    base_dtype: torch.dtype | None = None
    device: str = "auto"
    blocks_to_swap: int = 0


@dataclass(frozen=True)
class Result:
    """What `make_video` made, and what that took.

    Attributes:
        path: the file, of `frames` frames, `width` x `height` pixels.
        seconds: from the call on, loading included.
        guards: what the layout guards saw and copied while the frames were made.
        kernels: attention kernel -> its calls.
    """

    path: Path
    frames: int
    width: int
    height: int
    seconds: float
    guards: GuardStats
    kernels: Mapping[str, int]


@dataclass(frozen=True)
class Events:
    """Ways to follow and stop a job.

    Attributes:
        stage: what begins now, for people ("Loading the VAE").
        reading: (bytes read, bytes in all) while the DiT is loaded.
        step: (window, windows, step, steps) after each step, as in `Callbacks.progress`.
        window_done: (windows in the file, windows in all) whenever there is one more.
        check_interrupt: called before each evaluation of the model; what it raises ends the job.
    """

    stage: Callable[[str], None] = lambda text: None
    reading: Progress = lambda done, total: None
    step: Callable[[int, int, int, int], None] = lambda window, windows, step, steps: None
    window_done: Callable[[int, int], None] = lambda done, windows: None
    check_interrupt: Callable[[], None] = lambda: None


def make_video(job: Job, events: Events | None = None) -> Result:
    """Make the video of `job` with its sound.

    Finished windows are in the file already, playable, when a later one fails or is interrupted.

    Raises:
        InputError, CheckpointError, BackendUnavailableError: before anything is generated; the message says what to do.
        InfiniteTalkError: while it runs, or when the file cannot be written.
    """
    events = events or Events()
    begin = time.monotonic()
    device = choose_device(job.device)
    dtype = job.base_dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)

    events.stage("Checking the inputs")
    dit = _check_settings(job, device, dtype)
    source = _open_source(job)
    masks = [_load_mask(path) for path in job.masks]
    speech = [load_speech(path) for path in job.audio]
    total = _check_length(job, speech)
    first = load_picture(source[0])
    width, height = fit_size(first.size, job.config.width, job.config.height, job.config.area)
    latent_masks(masks or None, len(speech), first.size, width, height)  # refuses masks that cannot be used

    with torch.inference_mode(), _sentences_for_torch(device):
        audio = _hear(job, speech, device, events)
        context, negative = _read_prompts(job, device, dtype, events)
        events.stage("Loading the picture encoder and the VAE")
        clip = ClipVision.load(job.files.clip_vision, dtype=dtype, device=device)
        vae = WanVAE.load(job.files.vae, dtype=torch.bfloat16 if dtype == torch.float16 else dtype, device=device)
        model = _load_model(job, device, dtype, events)
        _check_widths(dit, context, audio)
        config = replace(
            job.config,
            width=width,
            height=height,
            total_frames=total,
            device=device,
            attention_policy=bind(job.attention_policy, job.attention_mode, dit.num_layers),
        )
        conditioning = Conditioning(context, negative, audio, source, masks or None)
        callbacks = Callbacks(progress=events.step, check_interrupt=events.check_interrupt)
        windows = generate(model, vae, clip, conditioning, config, callbacks)
        events.stage("Generating")
        sound, rate = _sound(job.audio)
        with (
            count_guards() as guards,
            count_kernels() as kernels,
            VideoWriter(job.out, FPS, sound, rate) as writer,
        ):
            for window in windows:
                writer.append(window.frames)
                events.window_done(window.index + 1, window.count)
    log.info(
        "Attention %s (policy %s) by %s; linears %s; guard copies %d of %d calls (%.1f MiB)",
        job.attention_mode,
        job.attention_policy,
        ", ".join(f"{name} ({calls} calls)" for name, calls in kernels.most_common()),
        summary(model.blocks),
        guards.copies,
        guards.calls,
        guards.bytes / 2**20,
    )
    return Result(Path(job.out), total, width, height, time.monotonic() - begin, guards, kernels)


def choose_device(name: str) -> torch.device:
    """ "auto" is the GPU if there is one. Raises InputError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(
            f"There is no device '{name}': choose auto, cpu or cuda (cuda:1 for the second GPU)."
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"Device '{name}' needs an NVIDIA GPU and a CUDA build of torch; there is none: choose cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"There is no GPU number {device.index}: this machine has {torch.cuda.device_count()}.")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"Device '{name}' is not supported: choose auto, cpu or cuda.")
    return device


# ------------------------------------------------------------------------------------------------ before anything runs


def _check_settings(job: Job, device: torch.device, dtype: torch.dtype) -> WanConfig:
    """Refuse what cannot work, and read the DiT's shapes."""
    if not 1 <= len(job.audio) <= MAX_SPEAKERS:
        raise InputError(f"{len(job.audio)} recordings are given: give one to {MAX_SPEAKERS}, one per speaker.")
    if (job.image is None) == (job.video is None):
        raise InputError("Give either a picture or a source video, and not both.")
    if job.masks and len(job.masks) != len(job.audio):
        raise InputError(f"{len(job.masks)} masks for {len(job.audio)} speakers: give one mask to each, in order.")
    Quantization.parse(job.quantization)
    _check_out(Path(job.out))
    if job.blocks_to_swap < 0:
        raise InputError(f"{job.blocks_to_swap} blocks cannot be swapped: give 0 or more.")
    _refuse_mixed_up_files(job.files)
    config = inspect_dit(job.files.model, job.files.adapter)
    _refuse_silent_models(config, job.files)
    _try_attention(job.attention_mode, config, device, dtype)
    return config


def _check_length(job: Job, speech: Sequence[np.ndarray]) -> int:
    """Frames of the video; refuses lengths and schedules that cannot be."""
    total = max(Wav2Vec2Features.frames_of(len(waveform), FPS) for waveform in speech)
    if job.max_frames is not None:
        if job.max_frames < 1:
            raise InputError(f"A video of {job.max_frames} frames cannot be made: give at least 1.")
        total = min(total, job.max_frames)
    config = job.config
    plan_windows(total, config.frames, config.motion_frames)
    steps = len(make_scheduler(config.scheduler, config.steps, config.shift, config.sigmas))
    if not 0 <= config.start_step < steps:
        raise InputError(f"The start step {config.start_step} leaves none of {steps} steps: set it below that.")
    return total


def _refuse_mixed_up_files(files: ModelFiles) -> None:
    """Look at the names in each file: the mistakes that are easily made with six of them."""
    for option, path, kind in (
        ("VAE", files.vae, "a Wan2.1 VAE"),
        ("text encoder", files.text_encoder, "a T5 text encoder"),
        ("CLIP vision model", files.clip_vision, "a CLIP vision model"),
        ("wav2vec2 model", files.wav2vec, "a wav2vec2 model"),
    ):
        path = Path(path).expanduser()
        if path.is_dir() and option == "wav2vec2 model":
            continue
        with CheckpointFile(path) as file:
            found = kind_of(file.names)
        # What is of no known kind is left to the loader, which says what it lacks.
        if found not in (kind, UNKNOWN_KIND):
            raise CheckpointError(f"{path}, given as the {option}, is {found}, not {kind}.")


def _check_out(out: Path) -> None:
    """Find out now, not after an hour, that the video cannot be written."""
    refuse_path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        existed = out.exists()
        with out.open("ab"):
            pass
        if not existed:
            out.unlink()
    except OSError as error:
        raise InputError(f"The video cannot be written to {out}: {error.strerror or error}.") from error


def _refuse_silent_models(config: WanConfig, files: ModelFiles) -> None:
    name = Path(files.model).name
    if config.humo is not None:
        raise CheckpointError(
            f"The model {name} is HuMo, which this command does not run; InfiniteTalk needs Wan2.1 I2V 14B."
        )
    if config.model_type != "i2v":
        raise CheckpointError(
            f"The model {name} is a text-to-video model ({config.in_dim} input channels); InfiniteTalk needs the "
            "image-to-video one, Wan2.1 I2V 14B."
        )
    if config.audio is None:
        raise CheckpointError(
            f"The model {name} has no audio layers; give the InfiniteTalk file as the adapter, or a merged model."
        )


def _try_attention(mode: str, config: WanConfig, device: torch.device, dtype: torch.dtype) -> None:
    """One small call, so that a mode that cannot run here is refused with its reasons before the weights are read."""
    canonical_mode(mode)
    q = torch.zeros(1, 32, config.num_heads, config.head_dim, dtype=dtype, device=device)
    attention(q, q.clone(), q.clone(), mode)


def _open_source(job: Job) -> FrameSource:
    if job.video is not None:
        return VideoFrames(job.video)
    assert job.image is not None
    return [load_picture(job.image)]


def _load_mask(path: str | Path) -> Tensor:
    """White where the speaker is: [H, W] float32 in [0, 1]."""
    grey = load_picture(path).convert("L")
    return torch.from_numpy(np.asarray(grey, dtype=np.float32) / 255)


def _sound(recordings: Sequence[str | Path]) -> tuple[np.ndarray, int]:
    """What the video sounds like: the recordings as they are, all at once; mono samples and their rate in Hz."""
    waves = [read_audio(path) for path in recordings]
    if len(waves) == 1:
        return waves[0]
    import soxr

    return mix(arrange([soxr.resample(w, r, SOUND_RATE) for w, r in waves], one_after_the_other=False)), SOUND_RATE


# ------------------------------------------------------------------------------------------------------------- loading


def _hear(job: Job, speech: Sequence[np.ndarray], device: torch.device, events: Events) -> list[Tensor]:
    """Features [frames, layers, hidden] of each recording."""
    events.stage("Listening to the recording" if len(speech) == 1 else "Listening to the recordings")
    features = Wav2Vec2Features.load(job.files.wav2vec, dtype=torch.float32, device=device)
    return [features(waveform) for waveform in speech]


def _read_prompts(job: Job, device: torch.device, dtype: torch.dtype, events: Events) -> tuple[Tensor, Tensor]:
    """Embeddings of the prompt and of the negative one, float32 on the CPU; the encoder is let go."""
    events.stage("Reading the prompt")
    encoder = TextEncoder.load(job.files.text_encoder, tokenizer=job.files.tokenizer, dtype=dtype, device=device)
    prompt, negative = encoder.encode([job.prompt, job.negative])
    return prompt.float().cpu(), negative.float().cpu()


def _load_model(job: Job, device: torch.device, dtype: torch.dtype, events: Events) -> WanModel:
    events.stage("Loading the model")
    swap = BlockSwap(blocks=job.blocks_to_swap) if job.blocks_to_swap else None
    model = load_dit(
        job.files.model,
        job.files.adapter,
        base_dtype=dtype,
        quantization=job.quantization,
        device="cpu" if swap else device,
        attention_mode=job.attention_mode,
        progress=events.reading,
    )
    if swap is not None:
        Offloader(model, device, swap).load()
    return model


def _check_widths(config: WanConfig, context: Tensor, audio: Sequence[Tensor]) -> None:
    if context.shape[1] != config.text_dim:
        raise CheckpointError(
            f"The text encoder gives tokens of {context.shape[1]} numbers, the model reads {config.text_dim}; "
            "Wan2.1 needs UMT5-XXL."
        )
    assert config.audio is not None
    heard = tuple(audio[0].shape[1:])
    if heard[0] * heard[1] != config.audio.blocks * config.audio.channels:
        raise CheckpointError(
            f"wav2vec2 gives {heard[0]} x {heard[1]} features per frame, the adapter reads {config.audio.blocks} x "
            f"{config.audio.channels}; InfiniteTalk needs chinese-wav2vec2-base."
        )


@contextmanager
def _sentences_for_torch(device: torch.device) -> Iterator[None]:
    """Out of memory, in words that say what helps."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # torch says it of the host's memory, and of a library's, in words only.
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            if "can't allocate memory" in str(error):
                device = torch.device("cpu")
            elif "ALLOC_FAILED" not in str(error):  # of cuBLAS and its like
                raise
        raise InfiniteTalkError(
            f"The memory of {device} does not suffice; try a smaller size, fewer frames per window, a quantization "
            "such as fp8_e4m3fn_scaled, blocks that are swapped out, or a tiled VAE."
        ) from error
