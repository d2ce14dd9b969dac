"""The command `infinitetalk`.

COMMANDS lists the subcommands; each is a function that adds its options to a parser, and one that does the work. What a
user can cause ends as one sentence on stderr and exit code 2; an interruption ends with 130 (SIGTERM: 143), and what
was finished by then stays playable.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .. import __version__
from ..wanvideo.errors import BackendUnavailableError, InfiniteTalkError, InputError

if TYPE_CHECKING:
    from ..pipeline.make_video import Events, Job, ModelFiles
    from ..wanvideo.checkpoints.lora import LoraSpec

logger = logging.getLogger(__name__)

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

NEEDED_FILES = ("model", "vae", "text_encoder")
"""Model files without which there is no video."""


class Stopped(Exception):
    """Ended from outside; the message says what is left."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Signaled(KeyboardInterrupt):
    """A signal that asks the process to end, in the form of Ctrl-C, so that all clean up alike."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = 128 + number


@dataclass(frozen=True)
class Command:
    """`add(parser)` adds the options, `run(args)` does the work."""

    name: str
    summary: str
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


# ------------------------------------------------------------------------------------------------------------ generate


def _add_generate(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("input and output")
    source = what.add_mutually_exclusive_group()
    source.add_argument("--image", type=Path, metavar="P", help="image of the person who will speak (PNG, JPEG ...)")
    source.add_argument("--video", type=Path, metavar="V", help="a source video in its place (dubbing): --start-step")
    what.add_argument("--audio", type=Path, metavar="A", help="recording of speech (WAV, MP3, M4A ...)")
    for number in (2, 3, 4):
        what.add_argument(f"--audio-{number}", type=Path, metavar="A", help=f"the recording of speaker {number}")
    what.add_argument(
        "--one-after-the-other",
        action="store_true",
        default=None,
        help="each recording begins where the one before ends; otherwise all begin together",
    )
    what.add_argument(
        "--masks",
        type=Path,
        nargs="+",
        metavar="M",
        help="one image per speaker, white where they are; otherwise side by side, speaker 1 on the left",
    )
    what.add_argument(
        "--reference",
        type=Path,
        nargs="+",
        dest="references",
        metavar="P",
        help="with --mode humo: images of what is to be seen, persons, clothes or things, in place of --image",
    )
    what.add_argument("--prompt", metavar="T", help="what to show; 'a | b': one for each window (a person talking)")
    what.add_argument("--negative-prompt", metavar="T", help="what not to show; used where --cfg is not 1")
    what.add_argument(
        "--out",
        type=Path,
        default=Path("out.mp4"),
        metavar="V",
        help="video to write; -: a stream of MP4 on stdout, window by window (%(default)s)",
    )
    what.add_argument(
        "--resume",
        action="store_true",
        default=None,
        help="go on after the last finished window of a run that was interrupted",
    )

    _add_files(parser)
    _add_size(parser)
    _add_sampling(parser)
    _add_machine(parser)


def _add_files(parser: argparse.ArgumentParser, needed: bool = True) -> None:
    files = parser.add_argument_group("model files" if needed else "model files; without --model, the tiny ones")
    for option, text in (
        ("--model", "Wan2.1 I2V 14B (safetensors or GGUF), FlashTalk (its folder), or HuMo"),
        ("--adapter", "InfiniteTalk or MultiTalk (--mode); not needed where it is merged into the model"),
        ("--vae", "Wan2.1 VAE"),
        ("--decoder", "small decoder (taew2_1, lighttaew2_1) in place of the VAE's: for previews and streams"),
        ("--text-encoder", "UMT5-XXL encoder"),
        ("--clip-vision", "CLIP ViT-H vision model; not of HuMo"),
        ("--wav2vec", "chinese-wav2vec2-base, a folder or a file; not of HuMo"),
        ("--whisper", "the encoder of whisper-large-v3, a folder or a file; of HuMo"),
        ("--tokenizer", "folder, file or owner/name of the UMT5 tokenizer, where the text encoder carries none"),
    ):
        kind = str if option == "--tokenizer" else Path
        required = needed and option.removeprefix("--").replace("-", "_") in NEEDED_FILES
        files.add_argument(option, type=kind, required=required, metavar="F", help=text)
    files.add_argument(
        "--lora",
        type=_lora,
        action="append",
        dest="loras",
        metavar="F[:X]",
        help="a LoRA with its strength (1), as in style.safetensors:0.8; may be given several times",
    )


def _add_size(parser: argparse.ArgumentParser) -> None:
    size = parser.add_argument_group("size and length")
    _add_config(
        size,
        ("--width", "pixels, rounded to 16; default: from the image"),
        ("--height", "pixels, rounded to 16; default: from the image"),
        ("--frames", "frames per window, 4n + 1 (%(default)s)"),
        ("--motion-frames", "frames that a window begins with, of the one before, 4n + 1 (%(default)s)"),
    )
    _add_number(size, "--max-frames", "stop after so many frames, 25 per second; default: the whole recording")


def _lora(given: str) -> LoraSpec:
    """FILE or FILE:STRENGTH; what follows the last colon is the strength where it is a number."""
    from ..pipeline.bounds import parse_number
    from ..wanvideo.checkpoints.lora import LoraSpec

    path, colon, last = given.rpartition(":")
    try:
        float(last)
    except ValueError:
        path = ""
    if not (path and colon):
        return LoraSpec(given)
    try:
        return LoraSpec(path, cast(float, parse_number("lora_strength", last)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"the strength {error}") from None


def _add_config(group: Any, *options: tuple[str, str]) -> None:
    """Numeric options (name, help) of the `GenerateConfig`; its default stands for %(default)s."""
    from ..pipeline.plan import GenerateConfig

    for name, text in options:
        default = getattr(GenerateConfig, name.removeprefix("--").replace("-", "_"))
        _add_number(group, name, text.replace("%(default)s", str(default)))


def _add_number(group: Any, option: str, text: str) -> None:
    """An option for a number within its bounds; None where it is not given."""
    from ..pipeline.bounds import BOUNDS, parse_number

    name = option.removeprefix("--").replace("-", "_")

    def number(given: str) -> Any:
        try:
            return parse_number(name, given)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    group.add_argument(option, type=number, metavar="N" if BOUNDS[name].whole else "X", help=text)


def _presets() -> str:
    """What each preset stands for, in options."""
    from ..pipeline.presets import PRESETS

    def option(field: str, value: object) -> str:
        name = f"--{field.replace('_', '-')}"
        return name if value is True else f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"

    return "; ".join(
        f"{name}: {' '.join(option(*item) for item in values.items())}" for name, values in PRESETS.items()
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    from ..media.color import COLOR_METHODS
    from ..pipeline.plan import MODES, SPEECH_ENCODINGS, GenerateConfig
    from ..pipeline.presets import PRESETS
    from ..pipeline.schedulers import SCHEDULERS

    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help=f"options where they are not given. {_presets()}. fast needs a step LoRA or a distilled "
        "model, stream is for FlashTalk",
    )
    _add_config(
        group,
        ("--steps", "denoising steps per window (%(default)s); 4 to 8 with a step LoRA or a distilled model"),
        ("--shift", "shift of the noise schedule (%(default)s): 7 at 480p, 11 at 720p, with step LoRAs too"),
        ("--cfg", "guidance by the prompt, 1 is none; 5,4,3: one for each step (%(default)s)"),
        ("--audio-cfg", "guidance by the speech, likewise (%(default)s)"),
        ("--image-cfg", "of HuMo 1.7B: guidance by the reference images (%(default)s)"),
        ("--audio-scale", "how strongly the speech moves mouth and face (%(default)s)"),
        ("--seed", "the same seed gives the same video (%(default)s)"),
    )
    group.add_argument(
        "--apg", action="store_true", dest="use_apg", default=None, help="adaptive projected guidance, for high --cfg"
    )
    group.add_argument(
        "--scheduler", choices=SCHEDULERS, metavar="S", help=f"{', '.join(SCHEDULERS)} ({GenerateConfig.scheduler})"
    )
    group.add_argument(
        "--mode",
        choices=tuple(MODES),
        help="how windows follow each other, by the adapter: infinitetalk anchors each to the image, multitalk to the "
        "end of the one before; flashtalk, a distilled model without an adapter, has windows of a second; humo is a "
        f"model of its own, with one window ({GenerateConfig.mode})",
    )
    _add_config(
        group,
        ("--start-step", "with --video: steps left out; the more, the closer to the source (%(default)s)"),
        ("--color-correction", "0 to 1: how far colors are drawn to those of the image (%(default)s)"),
    )
    group.add_argument(
        "--speech-encoding",
        choices=SPEECH_ENCODINGS,
        help="with --mode flashtalk: stream, each window from the 8 s before its end, or once, the whole recording "
        "(stream)",
    )
    group.add_argument(
        "--color-method", choices=COLOR_METHODS, metavar="C", help=f"how: {', '.join(COLOR_METHODS)} (reinhard)"
    )


def _add_machine(parser: argparse.ArgumentParser, together: bool = True) -> None:
    """`together`: several GPUs may compute a video."""
    from ..fp8_optimization import QUANTIZATIONS
    from ..pipeline.attention_policy import POLICIES
    from ..wanvideo.encoders.text import TEXT_QUANTIZATIONS
    from ..wanvideo.modules.attention import ATTENTION_MODES
    from ..wanvideo.runtime.compilation import COMPILE_MODES
    from ..wanvideo.runtime.precision import PRECISIONS

    group = parser.add_argument_group("speed, precision and memory")
    group.add_argument("--attention-mode", metavar="M", help=f"{', '.join(ATTENTION_MODES)} (auto)")
    group.add_argument(
        "--attention-policy",
        choices=tuple(POLICIES),
        help="which steps use that mode. default: FP4 modes run the first and last step in FP8; ends_16bit: all "
        "low-precision modes run them in 16 bits; uniform: every step does",
    )
    group.add_argument(
        "--quantization", metavar="Q", help=f"of the transformer's weights: {', '.join(QUANTIZATIONS)} (disabled)"
    )
    group.add_argument(
        "--base-precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="what is not quantized; auto: bf16 on a GPU, fp32 on a CPU; fp16_fast: fp16 that also adds up in fp16, "
        "faster on consumer GPUs and less exact",
    )
    group.add_argument("--device", metavar="D", help="auto, cpu, cuda, cuda:1 ... (auto)")
    if together:
        _add_number(group, "--gpus", "how many GPUs compute the video together, --device being the first (1)")
        _add_number(group, "--guidance-gpus", "of them, how many divide a step's passes; the rest divide frames (1)")
    _add_number(group, "--blocks-to-swap", "of the model's 40 transformer blocks, how many wait in host memory (0)")
    group.add_argument(
        "--tiled-vae", action="store_true", default=None, help="encode and decode in tiles: slower, less GPU memory"
    )
    group.add_argument("--text-encoder-device", metavar="D", help="where prompts are encoded; auto: on --device (auto)")
    group.add_argument(
        "--text-encoder-quantization", metavar="Q", help=f"{', '.join(TEXT_QUANTIZATIONS)}: less memory (disabled)"
    )
    group.add_argument(
        "--compile",
        nargs="?",
        const="default",
        choices=COMPILE_MODES,
        metavar="MODE",
        help=f"compile the transformer blocks by torch.compile ({', '.join(COMPILE_MODES)}); the first step is slow",
    )


def _run_generate(args: argparse.Namespace) -> None:
    job = generate_job(args)
    if str(job.out) == "-":
        _run_stream(job)
    else:
        _run_job(job, again="; the same command with --resume goes on from there")


def generate_job(args: argparse.Namespace) -> Job:
    """What `infinitetalk generate` is asked for. Raises InputError."""
    from ..media.mixing import in_order
    from ..pipeline.presets import build_job, mode_defaults, stated_defaults

    audio = in_order(
        {"--audio": args.audio, "--audio-2": args.audio_2, "--audio-3": args.audio_3, "--audio-4": args.audio_4}
    )
    settings = _settings(args) | {"files": _model_files(args), "audio": tuple(audio)}
    defaults = mode_defaults(args.mode, args.model, args.preset) | stated_defaults(args.model)
    return build_job(settings, args.preset, defaults)


def _model_files(args: argparse.Namespace) -> ModelFiles:
    from ..pipeline.make_video import ModelFiles

    return ModelFiles(
        model=args.model,
        adapter=args.adapter,
        vae=args.vae,
        decoder=args.decoder,
        text_encoder=args.text_encoder,
        clip_vision=args.clip_vision,
        wav2vec=args.wav2vec,
        whisper=args.whisper,
        tokenizer=args.tokenizer,
    )


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of the job that options give; those that are not given (None) are left to presets and defaults."""
    from ..pipeline.make_video import Job
    from ..pipeline.plan import GenerateConfig
    from ..wanvideo.runtime.compilation import CompileSettings
    from ..wanvideo.runtime.precision import PRECISIONS

    named = {"negative_prompt": "negative"}
    known = {entry.name for kind in (Job, GenerateConfig) for entry in fields(kind)}
    settings = {named.get(name, name): value for name, value in vars(args).items() if value is not None}
    if args.base_precision != "auto":
        settings["base_dtype"] = PRECISIONS[args.base_precision]
        settings["fp16_accumulation"] = args.base_precision == "fp16_fast"
    if args.compile is not None:
        settings["compile_settings"] = CompileSettings(mode=args.compile)
    return {
        name: tuple(value) if name in ("masks", "references", "loras") else value
        for name, value in settings.items()
        if name in known and name != "audio"
    }


def _run_job(job: Job, again: str = "") -> None:
    """Make the video with a progress bar, and say where it is; `again`: how to go on after an interruption."""
    from ..media.video import OutputFiles
    from ..pipeline.journal import finished_windows
    from ..pipeline.make_video import make_video
    from .terminal import ProgressBar

    with ProgressBar() as bar:
        try:
            result = make_video(job, bar.events)
        except KeyboardInterrupt as stop:
            files = OutputFiles.of(job.out)
            windows = finished_windows(files)
            kept = f"{windows} finished windows are in {files.partial}{again}" if windows else "nothing is finished"
            raise _stopped(stop, kept) from None
    logger.info("%d frames of %d x %d in %.1f s", result.frames, result.width, result.height, result.seconds)
    _say(f"video: {result.path}")


def _run_stream(job: Job) -> None:
    """Write the video to stdout as it is made."""
    from ..media.video import StreamWriter
    from ..pipeline.make_video import FPS
    from ..pipeline.stream import StreamRecorder, stream_video
    from .terminal import ProgressBar

    if sys.stdout is None or sys.stdout.isatty():
        raise InputError("--out - writes a video to stdout, which is none here: lead it into a player, or name a file.")
    begin = time.monotonic()
    # Without Python's buffer, which would be written once more, and fail, when Python ends.
    with open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) as stdout, ProgressBar() as bar:
        writer = StreamWriter(stdout, FPS)
        try:
            recorder = StreamRecorder(writer)
            windows = stream_video(job, replace(bar.events, check_interrupt=recorder.check))
            with recorder:
                for window in windows:
                    recorder.add(window)
        except KeyboardInterrupt as stop:
            raise _stopped(stop, f"{writer.written.frames} frames are in the stream") from None
    logger.info("%d frames in %.1f s, to stdout", writer.written.frames, time.monotonic() - begin)


# --------------------------------------------------------------------------------------------------------------- batch


def _add_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "jobs",
        type=Path,
        metavar="JOBS.jsonl",
        help='a job on each line: {"image": "a.png", "audio": "a.wav", '
        '"out": "a.mp4", "steps": 8}; paths start from this file\'s folder',
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep videos that are there, and go on with those that were begun"
    )
    _add_files(parser)
    _add_size(parser)
    _add_sampling(parser)
    _add_machine(parser)


def _run_batch(args: argparse.Namespace) -> None:
    from ..service.batch import Line, read_jobs, run_jobs
    from .terminal import ProgressBar

    base = _settings(args) | {"files": _model_files(args), "preset": args.preset}
    lines = read_jobs(args.jobs, {name: value for name, value in base.items() if name != "resume"})
    failed = []
    with ProgressBar() as bar:

        def follow(line: Line) -> Events:
            logger.info("Line %d of %s: %s", line.number, args.jobs, line.job.out)
            return bar.events

        try:
            for line, made in run_jobs(lines, follow, resume=args.resume):
                if isinstance(made, InfiniteTalkError):
                    failed.append(str(line.number))
                    logger.error("Line %d of %s failed: %s", line.number, args.jobs, made)
                else:
                    _say(f"video: {line.job.out}")
        except KeyboardInterrupt as stop:
            raise _stopped(stop, "the same command with --resume goes on from there") from None
    if failed:
        raise InfiniteTalkError(
            f"{len(failed)} of {len(lines)} jobs failed: line{'s' * (len(failed) > 1)} "
            f"{', '.join(failed)} of {args.jobs}; the log says why."
        )


# --------------------------------------------------------------------------------------------------------------- serve


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="where queue, uploads and videos are kept")
    network = parser.add_argument_group("service")
    network.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen to (%(default)s)")
    network.add_argument("--port", type=int, default=8000, metavar="N", help="0: a free one (%(default)s)")
    network.add_argument(
        "--tokens", type=Path, metavar="F", help="file with NAME TOKEN of a client on each line; needed for other hosts"
    )
    network.add_argument(
        "--retries", type=int, default=1, metavar="N", help="deaths of a worker that a job survives (%(default)s)"
    )
    network.add_argument("--page", action="store_true", help="show a page for browsers, too (Gradio)")
    cluster = parser.add_argument_group("many machines")
    cluster.add_argument(
        "--cluster", metavar="ADDRESS", help="make the videos on a Ray cluster: HOST:PORT of its head, or auto"
    )
    cluster.add_argument(
        "--storage", metavar="URL", help="folder or fsspec address that all its machines reach (DIR/storage)"
    )
    cluster.add_argument(
        "--workers", type=int, metavar="N", help="how many; they wait for their place (as many as find one)"
    )
    cluster.add_argument(
        "--worker-gpus", type=float, metavar="N", help="that a worker asks for, 0 to 1 (1, with --device cpu 0)"
    )
    _add_files(parser, needed=False)
    _add_size(parser)
    _add_sampling(parser)
    _add_machine(parser, together=False)


def _run_serve(args: argparse.Namespace) -> None:
    from ..pipeline.plan import HUMO
    from ..service.server import check_packages, serve

    check_packages("web" if args.page else "serve")
    cluster = {"address": args.cluster, "storage": args.storage, "count": args.workers, "gpus": args.worker_gpus}
    if args.cluster is None:
        for name in ("storage", "workers", "worker_gpus"):
            if getattr(args, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{option} is for many machines: give --cluster ADDRESS too, or leave it out.")
    others = ("whisper",) if args.mode == HUMO else ("clip_vision", "wav2vec")
    given = {name: getattr(args, name) for name in (*NEEDED_FILES, *others)}
    if not any(given.values()):
        from .tiny_models import make_tiny

        files = make_tiny(args.folder / "tiny-models").model_files
        logger.info("No models are given: the tiny ones make drawn faces speak, and show that everything works here.")
    elif all(given.values()):
        files = _model_files(args)
    else:
        missing = [f"--{name.replace('_', '-')}" for name, path in given.items() if path is None]
        raise InputError(f"Model files are missing: give {', '.join(missing)} too, or none for the tiny models.")
    serve(
        args.folder,
        _settings(args) | {"files": files, "preset": args.preset},
        host=args.host,
        port=args.port,
        tokens=args.tokens,
        device=args.device or "auto",
        retries=args.retries,
        page=args.page,
        cluster=None if args.cluster is None else cluster,
        verbose=args.verbose,
        started=lambda address: _say(f"service: {address}"),
    )


# -------------------------------------------------------------------------------------------------- make-tiny and demo


def _add_make_tiny(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to write them (14 MB; 47 MB with --random)")
    parser.add_argument(
        "--random", action="store_true", help="random weights, which paint noise, in place of the trained"
    )


def _run_make_tiny(args: argparse.Namespace) -> None:
    from .tiny_models import ONLY_RANDOM, make_tiny

    for name, path in vars(make_tiny(args.folder, random=args.random)).items():
        if args.random or name not in ONLY_RANDOM:
            _say(f"{name}: {path}")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    from ..fp8_optimization import QUANTIZATIONS
    from ..wanvideo.modules.attention import ATTENTION_MODES

    parser.add_argument("--out", type=Path, default=Path("demo.mp4"), metavar="V", help="video to write (%(default)s)")
    parser.add_argument("--attention-mode", default="auto", metavar="M", help=f"{', '.join(ATTENTION_MODES)} (auto)")
    parser.add_argument(
        "--quantization", default="disabled", metavar="Q", help=f"{', '.join(QUANTIZATIONS)} (disabled)"
    )
    parser.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:1 ... (%(default)s)")
    parser.add_argument("--image", type=Path, metavar="P", help="another image of a drawn face, which will speak")
    parser.add_argument("--audio", type=Path, metavar="A", help="another recording of speech")
    parser.add_argument("--models", type=Path, metavar="DIR", help="folder to keep the tiny models in")


def _run_demo(args: argparse.Namespace) -> None:
    from .demo import demo_job

    with demo_job(
        args.out,
        image=args.image,
        audio=args.audio,
        models=args.models,
        attention_mode=args.attention_mode,
        quantization=args.quantization,
        device=args.device,
    ) as job:
        logger.info("The demo's models are tiny: they make drawn faces speak, and show that everything works here.")
        _run_job(job)


# -------------------------------------------------------------------------------------------------------------- doctor


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:1 ... (%(default)s)")
    parser.add_argument("--report", type=Path, metavar="F", help="write everything as JSON, for a bug report")
    parser.add_argument("--fresh", action="store_true", help="try packages again whose verdict is known")


def _run_doctor(args: argparse.Namespace) -> None:
    from rich.console import Console

    from ..pipeline.make_video import choose_device
    from ..wanvideo.kernels.selftest import cache_file
    from .doctor import examine
    from .terminal import doctor_tables

    if args.fresh:
        cache_file().unlink(missing_ok=True)
    report = examine(choose_device(args.device))
    out = Console(width=None if sys.stdout.isatty() else 160)
    with _stdout("the report"):
        out.print(*doctor_tables(report), sep="\n")
    if args.report is not None:
        args.report.write_text(json.dumps(report.as_json(), indent=1) + "\n")
        _say(f"report: {args.report}")
    if not report.healthy:
        lacking = ", ".join(name for name, supported in report.precisions.items() if not supported)
        raise BackendUnavailableError(f"No attention mode of {lacking} is supported here; the table says why.")


# ------------------------------------------------------------------------------------------------------------- measure


def _add_measure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", type=Path, metavar="VIDEO", help="any video of people who talk")
    parser.add_argument(
        "--audio",
        type=Path,
        nargs="+",
        default=[],
        metavar="A",
        help="what is said, from the video's beginning: one recording, or one for each face from left to right; "
        "otherwise the video's own sound",
    )
    parser.add_argument("--reference", type=Path, metavar="P", help="the image it was made from; otherwise frame 1")
    parser.add_argument(
        "--face",
        type=_box,
        action="append",
        default=[],
        dest="faces",
        metavar="L,T,R,B",
        help="box of a face that keeps still, in pixels of the video, in place of landmarks; repeatable",
    )
    _add_number(parser, "--frames", "frames per window, of the command that made it: where joins are")
    _add_number(parser, "--motion-frames", "frames that a window begins with, of the one before (with --frames: 9)")
    parser.add_argument("--json", action="store_true", help="write JSON to stdout in place of tables")
    parser.add_argument("--report", type=Path, metavar="H", help="write a page with plots, such as out.html")


def _box(given: str) -> tuple[float, float, float, float]:
    try:
        left, top, right, bottom = (float(side) for side in given.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{given!r} is no box: give left,top,right,bottom in pixels") from None
    return left, top, right, bottom


def _run_measure(args: argparse.Namespace) -> None:
    from rich.console import Console

    from ..measure.footage import read_video
    from ..measure.report import as_json, as_page
    from ..pipeline.plan import GenerateConfig
    from .terminal import measure_tables

    if args.motion_frames is not None and args.frames is None:
        raise InputError("--motion-frames alone does not say where joins are: give --frames too.")
    if args.report is not None and args.report.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"The page {args.report} would not be read as one: let its name end in .html.")
    if args.report is not None and not args.report.absolute().parent.is_dir():
        raise InputError(f"The folder of the page {args.report} does not exist: make it first.")
    motion = GenerateConfig.motion_frames if args.motion_frames is None else args.motion_frames
    footage = read_video(
        args.video,
        args.audio,
        reference=args.reference,
        faces=args.faces,
        window=args.frames,
        motion=motion,
    )
    if args.report is not None:
        args.report.write_text(as_page(footage), encoding="utf-8")
        logger.info("The page with plots is %s", args.report)
    if args.json:
        _say(json.dumps(as_json(footage), indent=1, ensure_ascii=False))
        return
    out = Console(width=None if sys.stdout.isatty() else 160)
    with _stdout("what was measured"):
        out.print(*measure_tables(footage), sep="\n")


# ---------------------------------------------------------------------------------------------------------------- main

COMMANDS = (
    Command("generate", "make a talking video from an image and a recording", _add_generate, _run_generate),
    Command("batch", "make many videos, with models that stay loaded", _add_batch, _run_batch),
    Command(
        "serve", "make videos for clients: a queue, workers with loaded models, an HTTP API", _add_serve, _run_serve
    ),
    Command("demo", "make a small video with tiny models, to see that everything works", _add_demo, _run_demo),
    Command("doctor", "try every attention mode and quantization on this machine", _add_doctor, _run_doctor),
    Command(
        "measure", "see whether the mouths of a video follow the speech, and what drifts", _add_measure, _run_measure
    ),
    Command("make-tiny", "write the demo's tiny models, in the public formats", _add_make_tiny, _run_make_tiny),
)


def parser(given: Collection[str] | None = None) -> argparse.ArgumentParser:
    """The parser of the whole command.

    Args:
        given: the arguments; a subcommand that is not among them gets no options, whose choices and defaults would
            import torch for seconds.
    """
    top = argparse.ArgumentParser(
        prog="infinitetalk", description="An image and a recording of speech become a talking video."
    )
    top.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = commands.add_parser(command.name, help=command.summary, description=command.summary)
        if given is None or command.name in given:
            command.add(sub)
        sub.add_argument("-v", "--verbose", action="store_true", help="log more, and show where an error arose")
        sub.set_defaults(run=command.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    0; 2 for what the user can correct; 130 when interrupted, 143 when terminated.
    """
    _prepare_streams()
    argv = sys.argv[1:] if argv is None else argv
    args = parser(argv).parse_args(argv)
    try:
        with _signals_as_interrupts():
            from .terminal import log_to_stderr  # imports torch

            log_to_stderr(args.verbose)
            args.run(args)
    except InfiniteTalkError as error:
        return _end(str(error), EXIT_USER_ERROR, args.verbose)
    except Stopped as stopped:
        return _end(str(stopped), stopped.code, False)
    except KeyboardInterrupt as stop:
        ended = _stopped(stop)
        return _end(str(ended), ended.code, False)
    except OSError as error:
        return _end(_os_sentence(error), EXIT_USER_ERROR, args.verbose)
    return 0


@contextlib.contextmanager
def _stdout(what: str) -> Iterator[None]:
    """Writes to stdout; where that takes nothing (a full disk, a closed pipe), it is said on stderr."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        # What waits in the buffer would fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise InfiniteTalkError(f"Standard output takes nothing ({error.strerror}); it was to say: {what}") from error


def _say(line: str) -> None:
    with _stdout(line):
        print(line)


def _prepare_streams() -> None:
    """Keep files that are opened later from the numbers of closed streams; print any name in any encoding."""
    with contextlib.suppress(OSError):
        while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(spare)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Signaled` in the main thread, where nobody else has taken or ignored them."""

    def stop(number: int, frame: object) -> None:
        raise Signaled(number)

    taken = []
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, stop)
                taken.append(number)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _stopped(stop: KeyboardInterrupt, kept: str = "") -> Stopped:
    how, code = ("Terminated", stop.code) if isinstance(stop, Signaled) else ("Interrupted", EXIT_INTERRUPTED)
    return Stopped(f"{how}{kept and ': '}{kept}.", code)


def _os_sentence(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "The disk is full; make room and try again. Windows that were finished are kept."
    return f"{error.filename or 'A file'} cannot be used: {error.strerror or error}."


def _end(sentence: str, code: int, with_traceback: bool) -> int:
    if with_traceback:
        logger.exception("What went wrong:")
    print(f"infinitetalk: {sentence}", file=sys.stderr)
    return code
