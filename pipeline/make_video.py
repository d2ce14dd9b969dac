"""From files to a video file: what the command and other programs call.

    result = make_video(Job(files=..., audio=("speech.wav",), image="portrait.png", out="talking.mp4"))

Whatever can be rejected is rejected before the first large file is read. The encoders are loaded, used and let go one
after the other, so that the largest part in memory next to the DiT is the VAE.
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

from ..fp8_optimization import summary
from ..media.audio import load_speech, read_audio
from ..media.images import load_image
from ..media.masks import load_mask
from ..media.mixing import arrange, mix
from ..media.video import VideoFrames, VideoWriter, check_path
from ..multitalk.wav2vec import Wav2Vec2Features, wav2vec2_files
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
from .conditioning import Conditioning, FrameSource
from .long_video import Callbacks, generate
from .plan import GenerateConfig, Plan, plan_video

__all__ = ["DEFAULT_NEGATIVE", "DEFAULT_PROMPT", "Events", "Job", "ModelFiles", "Result", "choose_device", "make_video"]

logger = logging.getLogger(__name__)

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
        image: the image that speaks; or `video`: a source video whose movements are kept. One of the two.
        masks: one image per speaker, white where the speaker is; empty: speakers side by side.
        prompt, negative: what to show, and what not.
        config: size, length of windows, steps, guidance, seed ...; its device and attention policy are set here.
        max_frames: where to stop although the recording goes on; None: nowhere.
        attention_mode: one of `ATTENTION_MODES`. attention_policy: one of `POLICIES`, which step uses it.
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

    # 1. Check everything, and plan size, windows, schedule and masks, before any weights are read.
    events.stage("Checking the inputs")
    checked = check(job)
    device, dtype, plan = checked.device, checked.dtype, checked.plan

    with torch.inference_mode(), _explained_memory(device):
        # 2. Encode the conditions.
        audio = _speech_features(job, checked, events)
        context, negative = _encode_prompts(job, checked, events)
        events.stage("Loading the image encoder and the VAE")
        clip = ClipVision.load(job.files.clip_vision, dtype=dtype, device=device)
        vae = WanVAE.load(job.files.vae, dtype=torch.bfloat16 if dtype == torch.float16 else dtype, device=device)

        # 3. Load the model.
        model = _load_model(job, checked, events)
        _check_widths(checked.dit, context, audio)

        # 4. Generate, and write each window as it comes.
        conditioning = Conditioning(context, negative, audio, checked.source)
        callbacks = Callbacks(progress=events.step, check_interrupt=events.check_interrupt)
        windows = generate(model, vae, clip, conditioning, plan, callbacks)
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

    # 5. Say what really ran.
    logger.info(
        "Attention %s (policy %s) by %s; linears %s; guard copies %d of %d calls (%.1f MiB)",
        job.attention_mode,
        job.attention_policy,
        ", ".join(f"{name} ({calls} calls)" for name, calls in kernels.most_common()),
        summary(model.blocks),
        guards.copies,
        guards.calls,
        guards.bytes / 2**20,
    )
    return Result(Path(job.out), plan.total, plan.width, plan.height, time.monotonic() - begin, guards, kernels)


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


@dataclass(frozen=True)
class Checked:
    """A job that can be run.

    Attributes:
        dit: shapes of the model, as its files state them.
        source: the image, or the frames of the source video.
        speech: 16 kHz waveform of each speaker.
        plan: size, windows, schedule and masks.
    """

    device: torch.device
    dtype: torch.dtype
    dit: WanConfig
    source: FrameSource
    speech: Sequence[np.ndarray]
    plan: Plan


def check(job: Job) -> Checked:
    """Reject what cannot work, and plan the rest. Reads recordings, images and the headers of the checkpoints."""
    device = choose_device(job.device)
    dtype = job.base_dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if job.max_frames is not None and job.max_frames < 1:
        raise InputError(f"A video of {job.max_frames} frames cannot be made: give at least 1.")
    if job.blocks_to_swap < 0:
        raise InputError(f"{job.blocks_to_swap} blocks cannot be swapped: give 0 or more.")
    _check_out(Path(job.out))
    _check_kinds_of_files(job.files)
    dit = inspect_dit(job.files.model, job.files.adapter, job.quantization)
    _check_model_can_speak(dit, job.files)
    _check_attention(job.attention_mode, dit, device, dtype)

    source = _open_source(job)
    masks = [load_mask(path) for path in job.masks]
    speech = [load_speech(path) for path in job.audio]
    frames = [Wav2Vec2Features.frames_of(len(waveform), FPS) for waveform in speech]
    longest = max(frames, default=0)
    config = replace(
        job.config,
        total_frames=longest if job.max_frames is None else min(longest, job.max_frames),
        device=device,
        attention_policy=bind(job.attention_policy, job.attention_mode, dit.num_layers),
    )
    plan = plan_video(config, load_image(source[0]).size, frames, masks or None)
    _check_encoders(job.files)
    return Checked(device, dtype, dit, source, speech, plan)


def _open_source(job: Job) -> FrameSource:
    """The image as the only frame, or the frames of the source video."""
    if job.image is not None and job.video is None:
        return [load_image(job.image)]
    if job.video is not None and job.image is None:
        return VideoFrames(job.video)
    raise InputError("Give either an image or a source video, and not both.")


def _check_kinds_of_files(files: ModelFiles) -> None:
    """Reject a file given in the place of another, by the names of its tensors."""
    for option, path, kind in (
        ("VAE", files.vae, "a Wan2.1 VAE"),
        ("text encoder", files.text_encoder, "a T5 text encoder"),
        ("CLIP vision model", files.clip_vision, "a CLIP vision model"),
        ("wav2vec2 model", files.wav2vec, "a wav2vec2 model"),
    ):
        if option == "wav2vec2 model":
            path, _, _ = wav2vec2_files(path)  # maybe of a folder
        with CheckpointFile(path) as file:
            found = kind_of(file.names)
        # What is of no known kind is left to the loader, which says what it lacks.
        if found not in (kind, UNKNOWN_KIND):
            raise CheckpointError(f"{path}, given as the {option}, is {found}, not {kind}.")


def _check_encoders(files: ModelFiles) -> None:
    """Reject encoders whose tensors do not make a model, by the headers of their files."""
    WanVAE.inspect(files.vae)
    TextEncoder.inspect(files.text_encoder, files.tokenizer)
    ClipVision.inspect(files.clip_vision)
    Wav2Vec2Features.inspect(files.wav2vec)


def _check_out(out: Path) -> None:
    """Reject a place that cannot be written to now, not after an hour."""
    check_path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        existed = out.exists()
        with out.open("ab"):
            pass
        if not existed:
            out.unlink()
    except OSError as error:
        raise InputError(f"The video cannot be written to {out}: {error.strerror or error}.") from error


def _check_model_can_speak(config: WanConfig, files: ModelFiles) -> None:
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


def _check_attention(mode: str, config: WanConfig, device: torch.device, dtype: torch.dtype) -> None:
    """One small call, so that a mode that cannot run here is rejected with its reasons before the weights are read."""
    canonical_mode(mode)
    q = torch.zeros(1, 32, config.num_heads, config.head_dim, dtype=dtype, device=device)
    attention(q, q.clone(), q.clone(), mode)


def _sound(recordings: Sequence[str | Path]) -> tuple[np.ndarray, int]:
    """The sound of the video: the recordings as they are, all at once; mono samples and their rate in Hz."""
    waves = [read_audio(path) for path in recordings]
    if len(waves) == 1:
        return waves[0]
    import soxr

    return mix(arrange([soxr.resample(w, r, SOUND_RATE) for w, r in waves], one_after_the_other=False)), SOUND_RATE


# ------------------------------------------------------------------------------------------------------------- loading


def _speech_features(job: Job, checked: Checked, events: Events) -> list[Tensor]:
    """Features [frames, layers, hidden] of each recording; the encoder is let go."""
    events.stage("Encoding the recording" if len(checked.speech) == 1 else "Encoding the recordings")
    features = Wav2Vec2Features.load(job.files.wav2vec, dtype=torch.float32, device=checked.device)
    return [features(waveform) for waveform in checked.speech]


def _encode_prompts(job: Job, checked: Checked, events: Events) -> tuple[Tensor, Tensor]:
    """Embeddings of the prompt and of the negative one, float32 on the CPU; the encoder is let go."""
    events.stage("Encoding the prompt")
    encoder = TextEncoder.load(
        job.files.text_encoder, tokenizer=job.files.tokenizer, dtype=checked.dtype, device=checked.device
    )
    prompt, negative = encoder.encode([job.prompt, job.negative])
    return prompt.float().cpu(), negative.float().cpu()


def _load_model(job: Job, checked: Checked, events: Events) -> WanModel:
    events.stage("Loading the model")
    swap = BlockSwap(blocks=job.blocks_to_swap) if job.blocks_to_swap else None
    model = load_dit(
        job.files.model,
        job.files.adapter,
        base_dtype=checked.dtype,
        quantization=job.quantization,
        device="cpu" if swap else checked.device,
        attention_mode=job.attention_mode,
        progress=events.reading,
    )
    if swap is not None:
        Offloader(model, checked.device, swap).load()
    return model


def _check_widths(config: WanConfig, context: Tensor, audio: Sequence[Tensor]) -> None:
    if context.shape[1] != config.text_dim:
        raise CheckpointError(
            f"The text encoder gives tokens of {context.shape[1]} numbers, the model reads {config.text_dim}; "
            "Wan2.1 needs UMT5-XXL."
        )
    assert config.audio is not None
    given = tuple(audio[0].shape[1:])
    if given[0] * given[1] != config.audio.blocks * config.audio.channels:
        raise CheckpointError(
            f"wav2vec2 gives {given[0]} x {given[1]} features per frame, the adapter reads {config.audio.blocks} x "
            f"{config.audio.channels}; InfiniteTalk needs chinese-wav2vec2-base."
        )


@contextmanager
def _explained_memory(device: torch.device) -> Iterator[None]:
    """Out of memory becomes an InfiniteTalkError that says what helps."""
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
