"""From files to a video file: what the command and other programs call.

    result = make_video(Job(files=..., audio=("speech.wav",), image="portrait.png", out="talking.mp4"))

Whatever can be rejected is rejected before the first large file is read. The encoders are loaded, used and let go one
after the other, so that the largest part in memory next to the DiT is the VAE; where speech is encoded as it streams,
wav2vec2 stays too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..fp8_optimization import Quantization, how_linears_run, quantize_linears
from ..media.audio import TARGET_LUFS, load_speech, read_audio
from ..media.images import load_image, pad_image
from ..media.masks import load_mask
from ..media.mixing import arrange, mix
from ..media.video import OutputFiles, VideoFrames, VideoWriter, check_output
from ..multitalk.wav2vec import Wav2Vec2Features, wav2vec2_files
from ..multitalk.whisper import WhisperFeatures, whisper_file
from ..wanvideo.checkpoints.dit import inspect_dit, load_dit
from ..wanvideo.checkpoints.files import Progress
from ..wanvideo.checkpoints.lora import LoraSpec, apply_loras, inspect_loras
from ..wanvideo.checkpoints.state_dict import check_part
from ..wanvideo.encoders.clip import ClipVision
from ..wanvideo.encoders.small_decoder import SmallDecoder, denormalizes
from ..wanvideo.encoders.split import decode_split
from ..wanvideo.encoders.text import TextEncoder, text_quantization
from ..wanvideo.encoders.vae import VideoDecoder, WanVAE
from ..wanvideo.errors import CheckpointError, InfiniteTalkError, InputError
from ..wanvideo.kernels.layout import GuardStats
from ..wanvideo.modules.attention import canonical_mode, check_mode, count_kernels
from ..wanvideo.modules.model import WanConfig, WanModel
from ..wanvideo.runtime.compilation import (
    CompileSettings,
    check_compiler,
    check_with_block_swap,
    compile_limits,
    compile_model,
    described,
)
from ..wanvideo.runtime.offload import BlockSwap, Offloader
from ..wanvideo.runtime.parallel import ALONE, Mesh, check_tokens
from ..wanvideo.runtime.precision import fp16_accumulation
from .attention_policy import SAFER, bind
from .bounds import check_numbers, shown
from .conditioning import ClipLike, Conditioner, Conditioning, FrameSource, WindowConditioner, WindowSpeech
from .flashtalk import SAMPLES_A_FRAME, SpeechRing, SpeechRows, with_silence_around
from .humo import TRAINED_FRAMES, HuMoConditioner, References, plan_humo
from .journal import Journal, describe, describe_config, finished_windows
from .loaded_models import LoadedModels
from .long_video import Callbacks, generate_windows
from .plan import FLASHTALK, HUMO, MODES, GenerateConfig, Plan, mode_by_name, plan_video
from .processes import Processes, Seat
from .prompts import Piece, encode_pieces, parse_prompt
from .recorder import Discarder, Recorder
from .sampling import what_ran
from .techniques import cache_of, fitted

__all__ = ["DEFAULT_NEGATIVE", "DEFAULT_PROMPT", "Events", "Job", "ModelFiles", "Result", "choose_device", "make_video"]

logger = logging.getLogger(__name__)

DEFAULT_PROMPT = "A person is talking to the camera, with natural expressions and small movements of the head."
DEFAULT_NEGATIVE = (
    "still picture, blurry, low quality, overexposed, subtitles, watermark, deformed face, extra fingers, bad hands"
)

FPS = 25
"""Video frames per second that InfiniteTalk was trained with."""

FILES_OF_A_JOB = ("files", "audio", "image", "video", "masks", "references")
"""Fields of a `Job` where a string is a path."""

NOT_WHAT = (
    *("out", "comment", "resume", "config", "device", "text_encoder_device", "blocks_to_swap", "compile_settings"),
    *("gpus", "guidance_gpus"),
)
"""Fields of a `Job` which do not decide what is made, and the config, of which a part does."""

SOUND_RATE = 48000
"""Hz. Of the sound of several recordings together."""

NO_FILE = "-"
"""`Job.out` of a video that is handed out window by window, see `stream`."""


@dataclass(frozen=True)
class ModelFiles:
    """Checkpoint files.

    `wav2vec` and `clip_vision` are read for every model but HuMo, which reads `whisper` where there is a recording.
    `adapter` is None for a merged model; `tokenizer` where the text encoder carries its own. `decoder` is a small one
    that decodes in place of the VAE, which still encodes; None: the VAE decodes.
    """

    model: str | Path
    vae: str | Path
    text_encoder: str | Path
    wav2vec: str | Path | None = None
    clip_vision: str | Path | None = None
    adapter: str | Path | None = None
    tokenizer: str | Path | None = None
    decoder: str | Path | None = None
    whisper: str | Path | None = None


@dataclass(frozen=True)
class Job:
    """One video to make.

    Attributes:
        files: the checkpoints.
        audio: one recording per speaker, one to four; of HuMo one or none.
        out: the video file to write (.mp4). What is there is replaced when all of the new one is made. `NO_FILE` for
            the functions in `stream`, which write none.
        image: the image that speaks; or `video`: a source video whose movements are kept. One of the two, but for HuMo.
        references: images of what HuMo is to show: persons, clothes, things.
        one_after_the_other: each recording begins where the one before ends, instead of all at once.
        masks: one image per speaker, white where the speaker is (see `load_mask`); empty: speakers side by side.
        prompt, negative: what to show, and what not; `prompts` has the syntax of the first one.
        config: size, length of windows, steps, guidance, seed ...; its device and attention policy are set here.
        max_frames: where to stop although the recording goes on; None: nowhere.
        attention_mode: one of `ATTENTION_MODES`. attention_policy: one of `POLICIES`, which step uses it.
        quantization: one of `QUANTIZATIONS`.
        loras: LoRA files with their strengths. They are merged into weights of 16 and 32 bits, before these are
            quantized; a file that changes weights which came quantized is added to the layers' outputs.
        base_dtype: of weights and activations; None: bfloat16 on a GPU, float32 on the CPU.
        fp16_accumulation: with base_dtype float16, add up products in float16 too: less exact, faster on consumer GPUs.
        device: "auto" (the GPU if there is one), "cpu", "cuda", "cuda:1" ...
        text_encoder_device: where the prompts are encoded; "auto": on the device.
        text_encoder_quantization: how the text encoder's linears are stored, one of `TEXT_QUANTIZATIONS`.
        blocks_to_swap: transformer blocks that wait in host memory while others run.
        compile_settings: how the model is compiled by torch.compile, which may change the last bits; None: not at all.
        gpus: how many GPUs compute the video together, the device being the first of them; on a CPU, processes.
        guidance_gpus: among how many of them the passes of a step are divided (`gpus` is a multiple of it); the rest
            divide the tokens of each frame.
        resume: go on after the last finished window of an earlier run of this job that ended too early. What is made
            must be the same; devices, their number, blocks_to_swap, compile_settings and tiled_vae may differ.
        comment: a text that the video file carries in its metadata.
    """

    files: ModelFiles
    audio: Sequence[str | Path]
    out: str | Path
    image: str | Path | None = None
    video: str | Path | None = None
    one_after_the_other: bool = False
    masks: Sequence[str | Path] = ()
    references: Sequence[str | Path] = ()
    prompt: str = DEFAULT_PROMPT
    negative: str = DEFAULT_NEGATIVE
    config: GenerateConfig = field(default_factory=GenerateConfig)
    max_frames: int | None = None
    attention_mode: str = "auto"
    attention_policy: str = "default"
    quantization: str = "disabled"
    loras: Sequence[LoraSpec] = ()
    base_dtype: torch.dtype | None = None
    fp16_accumulation: bool = False
    device: str = "auto"
    text_encoder_device: str = "auto"
    text_encoder_quantization: str = "disabled"
    blocks_to_swap: int = 0
    compile_settings: CompileSettings | None = None
    gpus: int = 1
    guidance_gpus: int = 1
    resume: bool = False
    comment: str = ""


@dataclass(frozen=True)
class Result:
    """What `make_video` made, and what that took.

    Attributes:
        path: the file, of `frames` frames, `width` x `height` pixels.
        seconds: from the call on, loading included.
        guards: what the layout guards saw and copied while the frames were made.
        kernels: attention kernel -> its calls.
        linears: how linear layers of the blocks ran, and why not as asked for -> how many.
    """

    path: Path
    frames: int
    width: int
    height: int
    seconds: float
    guards: GuardStats
    kernels: Mapping[str, int]
    linears: Mapping[str, int]


@dataclass(frozen=True)
class Events:
    """Ways to follow and stop a job.

    Attributes:
        stage: what begins now, for people ("Loading the VAE").
        reading: (bytes read, bytes in all) while the DiT is loaded.
        part: ("Encoding" or "Decoding", parts done, parts in all) while the VAE, or a small decoder, works.
        step: (window, windows, step, steps) after each step, as in `Callbacks.progress`.
        window_done: (windows in the file, windows in all) for each of them, when its frames and its journal entry are
            on the disk; at the latest with the next evaluation of the model.
        check_interrupt: called before each evaluation of the model; what it raises ends the job, once the windows that
            are finished are in the file.
    """

    stage: Callable[[str], None] = lambda text: None
    reading: Progress = lambda done, total: None
    part: Callable[[str, int, int], None] = lambda text, done, total: None
    step: Callable[[int, int, int, int], None] = lambda window, windows, step, steps: None
    window_done: Callable[[int, int], None] = lambda done, windows: None
    check_interrupt: Callable[[], None] = lambda: None


def make_video(job: Job, events: Events | None = None, loaded: LoadedModels | None = None) -> Result:
    """Make the video of `job` with its sound.

    Args:
        loaded: models of the jobs before, which are reused where they are the same, and afterwards those of this one.
            None: everything is loaded, and let go.

    Finished windows are in `OutputFiles.of(job.out).partial`, playable, while later ones are made, and stay there when
    one of those fails or is interrupted.

    Raises:
        InputError, CheckpointError, BackendUnavailableError: before anything is generated; the message says what to do.
        InfiniteTalkError: while it runs, or when the file cannot be written.
    """
    events = events or Events()
    here = LoadedModels() if loaded is None else loaded
    try:
        return _make(job, events, here, ALONE) if job.gpus == 1 else _make_on_gpus(job, events, here)
    finally:
        if loaded is None:
            here.clear()


def _make(job: Job, events: Events, loaded: LoadedModels, mesh: Mesh) -> Result:
    """Make the video; where several processes do so together, each of them calls this, and the first one writes it."""
    begin = time.monotonic()

    # 1. Check everything, and plan size, windows, schedule and masks, before any weights are read.
    events.stage("Checking the inputs")
    job = named(job)
    if str(job.out) == NO_FILE:
        raise InputError(f"The video {NO_FILE} would be no file: name one, or take the windows of `stream_video`.")
    checked = check(job)
    device, plan = checked.device, checked.plan

    files = OutputFiles.of(job.out)
    with files.locked() if mesh.first else nullcontext(), torch.inference_mode(), explained_memory(device):
        journal = Journal(files, _what(job), _how(job, device))
        start = journal.start(job.resume)
        sound, rate = sound_of(job)
        written = None if start is None else start.written
        writer = VideoWriter(job.out, FPS, sound, rate, written=written, comment=job.comment)
        if start is not None and start.state.windows == len(plan.windows):
            if mesh.first:
                writer.close()  # it ended while the video was put in place
            seconds = time.monotonic() - begin
            return Result(Path(job.out), plan.total, plan.width, plan.height, seconds, GuardStats(), {}, {})

        # 2. Encode the conditions, and load the model.
        ready = make_ready(job, checked, events, loaded, mesh)

        # 3. Generate; each window is written while the next one is made.
        state = None if start is None else start.state
        events.stage("Generating" if job.compile_settings is None else "Generating, the first step compiles the model")
        with (
            count_kernels() as kernels,
            writer if mesh.first else nullcontext(),
            Recorder(writer, journal, kernels, events.window_done) if mesh.first else Discarder() as recorder,
            compile_limits(job.compile_settings),
            fp16_accumulation(job.fp16_accumulation),
        ):

            def check_interrupt() -> None:
                events.check_interrupt()
                recorder.check()

            callbacks = Callbacks(progress=events.step, check_interrupt=check_interrupt)
            parts = (ready.model, ready.vae, ready.conditioner, plan, callbacks, SAFER)
            for window in generate_windows(*parts, state, torch.uint8):
                recorder.add(window)

    # 4. Say what really ran.
    linears = how_linears_run(ready.model.blocks, device)
    logger.info("%s", what_ran(linears, job.attention_mode, job.attention_policy, kernels))
    seconds = time.monotonic() - begin
    return Result(Path(job.out), plan.total, plan.width, plan.height, seconds, kernels.guards, kernels, linears)


# -------------------------------------------------------------------------------------------------------- several GPUs


def _make_on_gpus(job: Job, events: Events, loaded: LoadedModels) -> Result:
    """`make_video` by processes of their own; where they fail, what is finished stays, and is named."""
    events.stage("Checking the inputs")
    checked = check(named(job))
    devices = devices_of(checked.device, job.gpus)
    loaded.begin({"processes": {"devices": str(devices), "guidance": str(job.guidance_gpus)}})
    processes = loaded.get("processes", lambda: Processes(devices, job.guidance_gpus, _make_in_process))
    kinds = {entry.name: getattr(events, entry.name) for entry in fields(Events)}
    try:
        result: Result = processes.call(job, lambda kind, value: kinds[kind](*value), events.check_interrupt)
    except InfiniteTalkError as error:
        loaded.clear()
        files = OutputFiles.of(job.out)
        if str(files.partial) not in str(error) and (windows := finished_windows(files)):
            error.args = (
                f"{error} {windows} finished windows are in {files.partial}, and resuming goes on from there.",
            )
        raise
    return result


def _make_in_process(seat: Seat, job: Job) -> Result | None:
    """The part of one of the processes; their models stay loaded."""
    names = [entry.name for entry in fields(Events)]
    first = seat.mesh.first

    def follow(kind: str, *values: object) -> None:
        if first and kind != "check_interrupt":
            seat.send(kind, values)
        seat.alive()

    events = Events(**{name: partial(follow, name) for name in names})
    loaded = seat.memory.setdefault("loaded", LoadedModels())
    result = _make(replace(job, device=str(seat.device)), events, loaded, seat.mesh)
    return replace(result, kernels=dict(result.kernels), linears=dict(result.linears)) if first else None


def devices_of(first: torch.device, gpus: int) -> tuple[torch.device, ...]:
    """The devices of so many processes: GPUs from this one on, or the CPU for all of them. Raises InputError."""
    if first.type != "cuda":
        return (first,) * gpus
    begin, there = first.index or 0, torch.cuda.device_count()
    if begin + gpus > there:
        raise InputError(f"{gpus} GPUs from number {begin} on are not here: this machine has {there}.")
    return tuple(torch.device("cuda", begin + number) for number in range(gpus))


@dataclass(frozen=True)
class Ready:
    """What makes the windows of a job; `speech` is what they are conditioned on."""

    model: WanModel
    vae: FollowedVae
    conditioner: Conditioner
    speech: Sequence[Tensor] | WindowSpeech


def make_ready(job: Job, checked: Checked, events: Events, loaded: LoadedModels, mesh: Mesh = ALONE) -> Ready:
    """Encode the conditions and load the model. Raises CheckpointError where they do not fit each other."""
    loaded.begin(_loaded_as(job, checked))
    audio = _speech_features(job, checked, events)
    context, negative = loaded.get("prompts", lambda: _encode_prompts(job, checked, events))
    events.stage("Loading the image encoder and the VAE" if job.files.clip_vision else "Loading the VAE")
    clip = loaded.get("image encoder", lambda: _load_image_encoder(job, checked))
    vae = loaded.get("VAE", lambda: _load_vae(job, checked))
    decoder = vae if job.files.decoder is None else loaded.get("decoder", lambda: _load_decoder(job, checked))
    model = loaded.get("model", lambda: _load_model(job, checked, events))
    _check_widths(checked.dit, context, audio)
    model.mesh = mesh
    followed = FollowedVae(vae, decoder, events, mesh)
    return Ready(model, followed, _conditioner(checked, followed, clip, context, negative, audio), audio)


@dataclass(frozen=True)
class FollowedVae:
    """A VAE, and what decodes, itself or a small decoder; `events` follow their work, which a mesh shares."""

    vae: WanVAE
    decoder: VideoDecoder
    events: Events
    mesh: Mesh = ALONE

    def encode(self, video: Tensor, *, tiled: bool = False) -> Tensor:
        return self.mesh.same(self.vae.encode(video, tiled=tiled, callback=partial(self.events.part, "Encoding")))

    def decode(self, latents: Tensor, *, tiled: bool = False) -> Tensor:
        callback = partial(self.events.part, "Decoding")
        if self.mesh.world is None:
            return self.decoder.decode(latents, tiled=tiled, callback=callback)
        return decode_split(self.decoder, latents, self.mesh.world, tiled=tiled, callback=callback)


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
        source: the image, or the frames of the source video; none of HuMo.
        references: HuMo's images, of the video's size [3, H, W] in [-1, 1].
        speech: 16 kHz waveform of each speaker, as far as frames are made of it; none where it is still to come.
        prompt: pieces of the prompt.
        plan: size, windows, schedule and masks.
    """

    device: torch.device
    text_encoder_device: torch.device
    dtype: torch.dtype
    dit: WanConfig
    source: FrameSource
    references: Sequence[Tensor]
    speech: Sequence[np.ndarray]
    prompt: Sequence[Piece]
    plan: Plan


def named(job: Job) -> Job:
    """The job with its attention mode and quantizations under their own names. Raises InputError for unknown ones."""
    return replace(
        job,
        attention_mode=canonical_mode(job.attention_mode),
        quantization=Quantization.parse(job.quantization).name,
        text_encoder_quantization=text_quantization(job.text_encoder_quantization).name,
    )


def check(job: Job, *, live: bool = False) -> Checked:
    """Reject what cannot work, and plan the rest. Reads recordings, images and the headers of the checkpoints.

    Args:
        live: the speech comes later, and the plan is that of its first window.
    """
    device = choose_device(job.device)
    text_encoder_device = device if job.text_encoder_device == "auto" else choose_device(job.text_encoder_device)
    dtype = job.base_dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    check_numbers(max_frames=job.max_frames, blocks_to_swap=job.blocks_to_swap)
    check_numbers(gpus=job.gpus, guidance_gpus=job.guidance_gpus)
    check_with_block_swap(job.compile_settings, _swap(job))
    for lora in job.loras:
        check_numbers(lora_strength=lora.strength)
    prompt = parse_prompt(job.prompt)
    _check_paths(job)
    _check_missing(job)
    if str(job.out) != NO_FILE:
        check_output(Path(job.out), input_files(job))
    _check_kinds_of_files(job.files)
    dit = inspect_dit(job.files.model, job.files.adapter, job.quantization)
    policy = bind(job.attention_policy, job.attention_mode, dit.num_layers)
    job = replace(job, config=replace(job.config, device=device, attention_policy=policy))
    check_mode(job.attention_mode, dit.num_heads, dit.head_dim, device, dtype)
    planned = _plan_humo(job, dit) if job.config.mode == HUMO else _plan_talking(job, dit, live)
    plan, source, references, speech = planned
    if len(prompt) > len(plan.windows) and job.config.mode == HUMO:
        raise InputError("HuMo makes one window, and the prompt has pieces for several: leave out the '|'.")
    if len(prompt) > 1 and plan.mode.distilled:
        raise InputError(f"The mode {job.config.mode} has one prompt for the whole video: leave out the '|'.")
    _check_encoders(job.files)
    inspect_loras(dit, job.loras)
    _check_gpus(job, plan, dit)
    check_compiler(job.compile_settings, device)  # the last check, which takes seconds
    return Checked(device, text_encoder_device, dtype, dit, source, references, speech, prompt, plan)


Planned = tuple[Plan, FrameSource, Sequence[Tensor], Sequence[np.ndarray]]
"""A plan, the source frames, the reference images, and the 16 kHz speech that frames are made of."""


def _plan_talking(job: Job, dit: WanConfig, live: bool) -> Planned:
    """Of an image or a source video that speaks."""
    _check_model_can_speak(dit, job)
    speaker = job.files.adapter or job.files.model
    if mode_by_name(speaker) not in (None, job.config.mode):
        logger.warning(
            "%s is for mode %s by its name; the windows follow each other in mode %s.",
            Path(speaker).name,
            mode_by_name(speaker),
            job.config.mode,
        )
    if job.references:
        raise InputError(f"Reference images are read in the mode {HUMO} alone: give the person's as the image.")
    if not job.audio and not live:
        raise InputError("Give a recording of speech: one for each speaker.")
    if job.video is not None and job.config.mode == FLASHTALK:
        raise InputError(f"The mode {FLASHTALK} animates an image, not a source video: give an image.")
    source = _open_source(job)
    masks = [load_mask(path) for path in job.masks]
    # As it streams, speech is brought to one loudness window by window.
    loudness = None if encodes_streams(job.config) else TARGET_LUFS
    speech = [load_speech(path, target_lufs=loudness) for path in job.audio]
    if job.one_after_the_other and speech:
        speech = arrange(speech, one_after_the_other=True)
    if job.max_frames is not None:
        speech = [waveform[: Wav2Vec2Features.samples_of(job.max_frames, FPS)] for waveform in speech]
    frames = [Wav2Vec2Features.frames_of(len(waveform), FPS) for waveform in speech]
    if live:
        frames = [max(1, job.config.frames - job.config.motion_frames)]
    techniques = fitted(job.config.techniques, dit, Path(job.files.model).name)
    config = replace(job.config, total_frames=max(frames, default=0), techniques=techniques)
    return plan_video(config, load_image(source[0]).size, frames, masks or None), source, (), speech


def encodes_streams(config: GenerateConfig) -> bool:
    """Whether speech is encoded window by window, as it comes."""
    mode = MODES.get(config.mode)  # whether there is such a mode is said by `plan_video`
    return mode is not None and (config.speech_encoding or mode.speech[0]) == "stream"


def _plan_humo(job: Job, dit: WanConfig) -> Planned:
    """Of a video that HuMo makes from the prompt, reference images and a recording, whichever there are."""
    if dit.humo is None:
        raise CheckpointError(
            f"The model {Path(job.files.model).name} is not HuMo: choose another --mode, or its file."
        )
    for name, given in (("neither image nor source video", job.image or job.video), ("no masks", job.masks)):
        if given:
            raise InputError(f"HuMo takes {name}: give reference images.")
    if len(job.audio) > 1:
        raise InputError(f"HuMo takes one recording, not {len(job.audio)}: mix them into one.")
    if job.audio and job.files.whisper is None:
        raise InputError("HuMo hears the recording through Whisper: give the encoder of whisper-large-v3.")
    if job.audio and job.files.whisper is not None:
        width = WhisperFeatures.inspect(job.files.whisper)
        if width != dit.humo.channels:
            raise CheckpointError(
                f"Whisper gives features of {width} numbers, the model reads {dit.humo.channels}; HuMo needs "
                "whisper-large-v3."
            )
    # As loud as it is: HuMo was trained without a loudness step.
    speech = [load_speech(path, target_lufs=None) for path in job.audio]
    frames = WhisperFeatures.frames_of(len(speech[0])) if speech else job.max_frames or TRAINED_FRAMES
    frames = min(frames, job.max_frames or frames)
    if frames > TRAINED_FRAMES:
        logger.warning(
            "HuMo was trained on %d frames; %d at once take more memory, and degrade: max_frames ends the video.",
            TRAINED_FRAMES,
            frames,
        )
    images = [load_image(path) for path in job.references]
    plan = plan_humo(job.config, frames, len(images), channels=dit.in_dim > dit.out_dim)
    return plan, (), [pad_image(image, plan.width, plan.height) for image in images], speech


def _check_gpus(job: Job, plan: Plan, dit: WanConfig) -> None:
    """Reject what several GPUs cannot compute together."""
    if job.gpus == 1 and job.guidance_gpus == 1:
        return
    if job.gpus % job.guidance_gpus:
        raise InputError(
            f"{job.guidance_gpus} GPUs for the passes do not divide {job.gpus}: give a number that does, such as 1."
        )
    if job.compile_settings is not None:
        raise InputError("A compiled model runs on one GPU: leave out compilation, or the number of GPUs.")
    if job.guidance_gpus > 1 and cache_of(job.config.techniques) is not None:
        raise InputError("A step cache decides from pass to pass: divide tokens alone, or leave out the cache.")
    places = (plan.height // 8 // dit.patch_size[1]) * (plan.width // 8 // dit.patch_size[2])
    check_tokens(job.gpus // job.guidance_gpus, dit.num_heads, places)


def _check_missing(job: Job) -> None:
    """Name all files at once that do not exist; a single one is left to its reader, which says more about it."""
    given: dict[str, object] = {entry.name: getattr(job.files, entry.name) for entry in fields(job.files)}
    if not Path(str(job.files.tokenizer)).suffix:
        del given["tokenizer"]  # maybe a name of the hub
    given |= {"image": job.image, "video": job.video}
    for name, values in (("recording", job.audio), ("mask", job.masks)):
        given |= {name if len(values) == 1 else f"{name} {number}": path for number, path in enumerate(values, 1)}
    given |= {f"LoRA {number}": lora.path for number, lora in enumerate(job.loras, 1) if lora.strength}
    missing = [
        f"{name.replace('_', ' ')} {path}"
        for name, value in given.items()
        for path in _paths(value, strings=True)
        if not path.expanduser().exists()
    ]
    if len(missing) > 1:
        raise InputError(f"{len(missing)} files do not exist: {', '.join(missing)}; check the paths.")


def _open_source(job: Job) -> FrameSource:
    """The image as the only frame, or the frames of the source video."""
    if job.image is not None and job.video is None:
        return [load_image(job.image)]
    if job.video is not None and job.image is None:
        return VideoFrames(job.video)
    raise InputError("Give either an image or a source video, and not both.")


def _check_paths(job: Job) -> None:
    """Reject paths that lead nowhere on this machine: too long, of an unknown user, in a folder that is closed ..."""
    for entry in fields(job):
        if entry.name != "out":  # `check_output` looks at it
            for path in _paths(getattr(job, entry.name), entry.name in FILES_OF_A_JOB):
                try:
                    path.expanduser().stat()
                except (FileNotFoundError, NotADirectoryError):
                    pass  # whoever reads it says what is missing
                except RuntimeError as error:
                    raise InputError(
                        f"The home folder in {shown(str(path))} is not known here: write the path without ~."
                    ) from error
                except (OSError, ValueError) as error:
                    reason = getattr(error, "strerror", None) or str(error).rstrip(".")
                    raise InputError(f"The path {shown(str(path))} cannot be used ({reason}): check it.") from error


def _check_kinds_of_files(files: ModelFiles) -> None:
    """Reject a file given in the place of another, by the names of its tensors."""
    check_part(files.vae, "VAE")
    if files.decoder is not None:
        check_part(files.decoder, "decoder")
    check_part(files.text_encoder, "text encoder")
    if files.clip_vision is not None:
        check_part(files.clip_vision, "CLIP vision model")
    if files.wav2vec is not None:
        check_part(wav2vec2_files(files.wav2vec)[0], "wav2vec2 model")  # maybe of a folder
    if files.whisper is not None:
        check_part(whisper_file(files.whisper), "Whisper model")


def _check_encoders(files: ModelFiles) -> None:
    """Reject encoders whose tensors do not make a model, by the headers of their files."""
    WanVAE.inspect(files.vae)
    if files.decoder is not None:
        SmallDecoder.inspect(files.decoder)
    TextEncoder.inspect(files.text_encoder, files.tokenizer)
    if files.clip_vision is not None:
        ClipVision.inspect(files.clip_vision)
    if files.wav2vec is not None:
        Wav2Vec2Features.inspect(files.wav2vec)


def _what(job: Job) -> dict[str, str]:
    """Name -> value, or digest of the file, of all that decides what the video is."""
    parts = describe_config(job.config)
    for name, value in vars(job).items():
        if name not in NOT_WHAT:
            parts |= describe(name.replace("_", " "), value, files=name in FILES_OF_A_JOB)
    if job.files.decoder is not None:  # the name of its file decides, too
        parts["scale of the decoder's latents"] = "raw" if denormalizes(job.files.decoder) else "normalized"
    return parts


def _how(job: Job, device: torch.device) -> dict[str, str]:
    """Likewise of what decides where and when it is computed, and the last bits."""
    gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return {
        "the device": f"{device.type}{gpu}",
        "the text encoder's device": job.text_encoder_device,
        "the number of swapped blocks": str(job.blocks_to_swap),
        "tiling of the VAE": str(job.config.tiled_vae),
        "compilation": described(job.compile_settings),
        "the number of GPUs": str(job.gpus),
        "torch": torch.__version__,
    }


def input_files(job: Job) -> Iterator[Path]:
    """Every file that the job reads, those in folders of models included."""
    for entry in fields(job):
        if entry.name != "out":
            for path in _paths(getattr(job, entry.name), entry.name in FILES_OF_A_JOB):
                path = path.expanduser()
                yield from path.iterdir() if path.is_dir() else (path,)


def _paths(value: object, strings: bool) -> Iterator[Path]:
    """The paths in a value, and in what it is made of; where `strings`, strings are paths too."""
    if isinstance(value, Path) or (strings and isinstance(value, str)):
        yield Path(value)
    elif is_dataclass(value):
        for entry in fields(value):
            yield from _paths(getattr(value, entry.name), strings)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _paths(item, strings)


def _check_model_can_speak(config: WanConfig, job: Job) -> None:
    files, name = job.files, Path(job.files.model).name
    if job.config.mode == FLASHTALK:
        if files.adapter is not None:
            raise InputError(
                f"FlashTalk's audio layers are in its model: leave out the adapter {Path(files.adapter).name}."
            )
        if config.model_type == "i2v" and config.audio is None:
            raise CheckpointError(f"The model {name} has no audio layers, which FlashTalk's has: give its folder.")
        if any(lora.strength for lora in job.loras):
            logger.warning(
                "FlashTalk is distilled to few steps already: a step LoRA on top of it spoils it, and other LoRAs were "
                "not tried."
            )
    if config.humo is not None:
        raise CheckpointError(f"The model {name} is HuMo: choose the mode {HUMO}; InfiniteTalk needs Wan2.1 I2V 14B.")
    if config.model_type != "i2v":
        raise CheckpointError(
            f"The model {name} is a text-to-video model ({config.in_dim} input channels); InfiniteTalk needs the "
            "image-to-video one, Wan2.1 I2V 14B."
        )
    if config.audio is None:
        raise CheckpointError(
            f"The model {name} has no audio layers; give the InfiniteTalk file as the adapter, or a merged model."
        )
    for what, path in (("wav2vec2", files.wav2vec), ("CLIP vision", files.clip_vision)):
        if path is None:
            raise InputError(f"InfiniteTalk needs a {what} model: give its file.")


def sound_of(job: Job) -> tuple[np.ndarray, int] | tuple[None, None]:
    """The sound of the video: the recordings as they are, on one time line; mono samples and their rate in Hz."""
    waves = [read_audio(path) for path in job.audio]
    if not waves:
        return None, None
    if len(waves) == 1:
        return waves[0]
    import soxr

    resampled = [soxr.resample(wave, rate, SOUND_RATE) for wave, rate in waves]
    return mix(arrange(resampled, one_after_the_other=job.one_after_the_other)), SOUND_RATE


# ------------------------------------------------------------------------------------------------------------- loading


FILES_OF_MODELS = frozenset(entry.name for entry in fields(ModelFiles))
"""Fields of a `ModelFiles`: their strings are paths."""


def _loaded_as(job: Job, checked: Checked) -> dict[str, dict[str, str]]:
    """Part of `LoadedModels` -> all that decides what it is.

    Speech and text encoder are none of them: they are used once a job, and beside the DiT there may be no room.
    """
    files = job.files
    place = {"device": str(checked.device), "dtype": str(checked.dtype)}

    def of(**values: object) -> dict[str, str]:
        parts = dict(place)
        for name, value in values.items():
            parts |= describe(name, value, files=name in FILES_OF_MODELS)
        return parts

    parts = {
        "prompts": of(
            text_encoder=files.text_encoder,
            tokenizer=files.tokenizer,
            quantization=job.text_encoder_quantization,
            text_encoder_device=checked.text_encoder_device,
            prompt=job.prompt,
            negative=job.negative,
        ),
        "image encoder": of(clip_vision=files.clip_vision),
        "VAE": of(vae=files.vae),
        "model": of(
            model=files.model,
            adapter=files.adapter,
            loras=job.loras,
            quantization=job.quantization,
            attention_mode=job.attention_mode,
            blocks_to_swap=job.blocks_to_swap,
            compile_settings=job.compile_settings,
        ),
    }
    if files.decoder is not None:  # the name of its file decides, too
        parts["decoder"] = of(decoder=files.decoder, raw=denormalizes(files.decoder))
    return parts


def _load_image_encoder(job: Job, checked: Checked) -> ClipVision | None:
    if job.files.clip_vision is None:
        return None
    return ClipVision.load(job.files.clip_vision, dtype=checked.dtype, device=checked.device)


def _load_vae(job: Job, checked: Checked) -> WanVAE:
    dtype = torch.bfloat16 if checked.dtype == torch.float16 else checked.dtype
    return WanVAE.load(job.files.vae, dtype=dtype, device=checked.device)


def _load_decoder(job: Job, checked: Checked) -> SmallDecoder:
    assert job.files.decoder is not None
    return SmallDecoder.load(job.files.decoder, dtype=checked.dtype, device=checked.device)


def _speech_features(job: Job, checked: Checked, events: Events) -> Sequence[Tensor] | WindowSpeech:
    """Features [frames, layers, hidden] of each recording, after which the encoder goes; or FlashTalk's windows."""
    if not checked.speech and job.config.mode == HUMO:
        return []
    events.stage("Encoding the recordings" if len(checked.speech) > 1 else "Encoding the recording")
    if job.config.mode == HUMO:
        assert job.files.whisper is not None
        whisper = WhisperFeatures.load(job.files.whisper, dtype=_whisper_dtype(checked.device), device=checked.device)
        return [whisper(waveform) for waveform in checked.speech]
    assert job.files.wav2vec is not None
    features = Wav2Vec2Features.load(job.files.wav2vec, dtype=torch.float32, device=checked.device)
    if job.config.mode == FLASHTALK:
        plan = checked.plan
        if not checked.speech:
            return SpeechRing(features)
        speech = checked.speech[0][: plan.total * SAMPLES_A_FRAME]
        if plan.speech_encoding == "stream":
            return SpeechRing(features, speech)
        lead = plan.config.motion_frames
        return SpeechRows(features(with_silence_around(speech, lead, plan.windows[-1].end)), lead)
    return [features(waveform) for waveform in checked.speech]


def _whisper_dtype(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.float32


def _conditioner(
    checked: Checked,
    vae: FollowedVae,
    clip: ClipLike | None,
    context: Sequence[Tensor],
    negative: Tensor,
    audio: Sequence[Tensor] | WindowSpeech,
) -> Conditioner:
    """What gives each window its condition."""
    stage, humo = Callbacks().stage, checked.dit.humo
    if humo is None:
        return WindowConditioner(vae, clip, Conditioning(context, negative, audio, checked.source), checked.plan, stage)
    assert isinstance(audio, Sequence)
    given = References(context[0], negative, audio[0] if audio else None, checked.references)
    channels = checked.dit.in_dim > checked.dit.out_dim
    return HuMoConditioner(vae, given, checked.plan, stage, channels=channels, features=(humo.blocks, humo.channels))


def _encode_prompts(job: Job, checked: Checked, events: Events) -> tuple[tuple[Tensor, ...], Tensor]:
    """Embeddings of the prompt's pieces and of the negative one, float32 on the CPU; the encoder is let go."""
    events.stage("Encoding the prompt")
    encoder = TextEncoder.load(
        job.files.text_encoder,
        tokenizer=job.files.tokenizer,
        dtype=checked.dtype,
        device=checked.text_encoder_device,
        quantization=job.text_encoder_quantization,
    )

    def encode(texts: Sequence[str]) -> list[Tensor]:
        # One by one: a longer text in the same batch would change the last bits of the others.
        return [encoder.encode([text])[0].float().cpu() for text in texts]

    return encode_pieces(checked.prompt, encode), encode([job.negative])[0]


def _swap(job: Job) -> BlockSwap | None:
    return BlockSwap(blocks=job.blocks_to_swap) if job.blocks_to_swap else None


def _load_model(job: Job, checked: Checked, events: Events) -> WanModel:
    events.stage("Loading the model")
    swap = _swap(job)
    home = "cpu" if swap else checked.device
    after_merging = job.quantization != "disabled" and any(lora.merge and lora.strength for lora in job.loras)
    model = load_dit(
        job.files.model,
        job.files.adapter,
        base_dtype=checked.dtype,
        quantization="disabled" if after_merging else job.quantization,
        device="cpu" if after_merging else home,  # the GPU may hold the quantized weights only
        attention_mode=job.attention_mode,
        progress=events.reading,
    )
    if job.loras:
        apply_loras(model, job.loras, checked.device)
    if after_merging:
        quantize_linears(model, job.quantization, checked.dtype)  # so that weights are rounded once
        model.to(home)
    if job.compile_settings is not None:
        compile_model(model, job.compile_settings)
    if swap is not None:
        Offloader(model, checked.device, swap).load()
    return model


def _check_widths(config: WanConfig, context: Sequence[Tensor], audio: Sequence[Tensor] | WindowSpeech) -> None:
    if context[0].shape[1] != config.text_dim:
        raise CheckpointError(
            f"The text encoder gives tokens of {context[0].shape[1]} numbers, the model reads {config.text_dim}; "
            "Wan2.1 needs UMT5-XXL."
        )
    if config.audio is None:
        return
    given = tuple(audio[0].shape[1:]) if isinstance(audio, Sequence) else audio.shape
    if given[0] * given[1] != config.audio.blocks * config.audio.channels:
        raise CheckpointError(
            f"wav2vec2 gives {given[0]} x {given[1]} features per frame, the adapter reads {config.audio.blocks} x "
            f"{config.audio.channels}; InfiniteTalk needs chinese-wav2vec2-base."
        )


@contextmanager
def explained_memory(device: torch.device) -> Iterator[None]:
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
