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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .. import __version__
from ..wanvideo.errors import BackendUnavailableError, InfiniteTalkError

if TYPE_CHECKING:
    from ..pipeline.make_video import Job
    from ..wanvideo.checkpoints.lora import LoraSpec

logger = logging.getLogger(__name__)

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

PRECISIONS = ("auto", "bf16", "fp16", "fp32")


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
    source = parser.add_argument_group("what to make").add_mutually_exclusive_group(required=True)
    source.add_argument("--image", type=Path, metavar="P", help="the image that will speak (PNG, JPEG, WebP ...)")
    source.add_argument("--video", type=Path, metavar="V", help="a source video instead; see --start-step")
    what = parser.add_argument_group("speech, speakers and prompt")
    what.add_argument("--audio", type=Path, required=True, metavar="A", help="the recording (WAV, FLAC, MP3, M4A ...)")
    for number in (2, 3, 4):
        what.add_argument(f"--audio-{number}", type=Path, metavar="A", help=f"the recording of speaker {number}")
    what.add_argument(
        "--one-after-the-other", action="store_true", help="each recording begins where the one before ends"
    )
    what.add_argument(
        "--masks", type=Path, nargs="+", default=[], metavar="M", help="one image per speaker, white where they are"
    )
    what.add_argument("--prompt", metavar="T", help="what to show; a | b: one for each window (a person talking)")
    what.add_argument("--negative-prompt", metavar="T", help="what not to show")
    what.add_argument("--out", type=Path, default=Path("out.mp4"), metavar="V", help="video to write (%(default)s)")
    what.add_argument(
        "--resume", action="store_true", help="go on after the last finished window of a run that was interrupted"
    )

    files = parser.add_argument_group("model files")
    for option, required, text in (
        ("--model", True, "Wan2.1 I2V 14B (safetensors or GGUF)"),
        ("--adapter", False, "InfiniteTalk or MultiTalk; not needed for a merged model"),
        ("--vae", True, "Wan2.1 VAE"),
        ("--decoder", False, "small decoder (taew2_1, lighttaew2_1) in place of the VAE's: for previews and streams"),
        ("--text-encoder", True, "UMT5-XXL encoder"),
        ("--clip-vision", True, "CLIP ViT-H vision model"),
        ("--wav2vec", True, "chinese-wav2vec2-base, a folder or a file"),
        ("--tokenizer", False, "folder, file or owner/name of the UMT5 tokenizer, where the text encoder carries none"),
    ):
        kind = str if option == "--tokenizer" else Path
        files.add_argument(option, type=kind, required=required, metavar="F", help=text)
    files.add_argument(
        "--lora",
        type=_lora,
        action="append",
        default=[],
        dest="loras",
        metavar="F[:X]",
        help="a LoRA with its strength (1), as in style.safetensors:0.8; several times for several",
    )

    size = parser.add_argument_group("size and length")
    _add_config(
        size,
        ("--width", "pixels, rounded to 16; default: from the image"),
        ("--height", "pixels, rounded to 16; default: from the image"),
        ("--frames", "frames per window, 4n + 1 (%(default)s)"),
        ("--motion-frames", "frames carried over (%(default)s)"),
    )
    _add_number(size, "--max-frames", "stop after so many frames, 25 per second")
    _add_sampling(parser)
    _add_machine(parser)


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


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    from ..pipeline.plan import MODES
    from ..pipeline.presets import PRESETS
    from ..pipeline.schedulers import SCHEDULERS

    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="settings where no option says otherwise; fast needs a step LoRA",
    )
    _add_config(
        group,
        ("--steps", "%(default)s; 4 to 8 with distilled models"),
        ("--shift", "of the noise schedule (%(default)s)"),
        ("--cfg", "text guidance, 1 is none; 5,4,3: one for each step (%(default)s)"),
        ("--audio-cfg", "speech guidance, likewise (%(default)s)"),
        ("--audio-scale", "weight of the speech (%(default)s)"),
        ("--seed", "of the random numbers (%(default)s)"),
    )
    group.add_argument(
        "--apg", action="store_true", dest="use_apg", default=None, help="adaptive projected guidance, for high --cfg"
    )
    group.add_argument("--scheduler", choices=SCHEDULERS, default="multitalk", metavar="S", help=", ".join(SCHEDULERS))
    group.add_argument("--mode", choices=tuple(MODES), default="infinitetalk", help="%(default)s")
    _add_config(
        group,
        ("--start-step", "with --video: how many steps to leave out"),
        ("--color-correction", "0 to 1, towards the image's (%(default)s)"),
    )


def _add_machine(parser: argparse.ArgumentParser) -> None:
    from ..fp8_optimization import QUANTIZATIONS
    from ..pipeline.attention_policy import POLICIES
    from ..wanvideo.modules.attention import ATTENTION_MODES

    group = parser.add_argument_group("the machine")
    group.add_argument("--attention-mode", default="auto", metavar="M", help=f"{', '.join(ATTENTION_MODES)} (auto)")
    group.add_argument(
        "--attention-policy", choices=tuple(POLICIES), default="default", help="which step uses the mode"
    )
    group.add_argument("--quantization", metavar="Q", help=f"{', '.join(QUANTIZATIONS)} (disabled)")
    group.add_argument("--base-precision", choices=PRECISIONS, default="auto", help="auto: bf16 on a GPU, fp32 else")
    group.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:1 ... (%(default)s)")
    group.add_argument(
        "--text-encoder-device", default="auto", metavar="D", help="cpu: leave the GPU to others (%(default)s)"
    )
    _add_number(group, "--blocks-to-swap", "blocks that wait in host memory (0)")
    group.add_argument(
        "--tiled-vae", action="store_true", default=None, help="encode and decode in tiles, for small GPUs"
    )


def _run_generate(args: argparse.Namespace) -> None:
    from ..media.mixing import in_order
    from ..pipeline.make_video import ModelFiles

    audio = in_order(
        {"--audio": args.audio, "--audio-2": args.audio_2, "--audio-3": args.audio_3, "--audio-4": args.audio_4}
    )
    files = ModelFiles(
        model=args.model,
        adapter=args.adapter,
        vae=args.vae,
        decoder=args.decoder,
        text_encoder=args.text_encoder,
        clip_vision=args.clip_vision,
        wav2vec=args.wav2vec,
        tokenizer=args.tokenizer,
    )
    _run_job(_job(args, files, audio), again="; the same command with --resume goes on from there")


def _job(args: argparse.Namespace, files: Any, audio: Sequence[Path]) -> Job:
    """The job of the options that are given."""
    import torch

    from ..pipeline.make_video import Job
    from ..pipeline.plan import GenerateConfig
    from ..pipeline.presets import build_job, stated_defaults

    dtypes = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    named = {"negative_prompt": "negative", "base_precision": "base_dtype"}
    known = {entry.name for kind in (Job, GenerateConfig) for entry in fields(kind)}
    settings = {named.get(name, name): value for name, value in vars(args).items() if value is not None}
    settings["base_dtype"] = dtypes[args.base_precision]
    settings |= {"files": files, "audio": tuple(audio), "masks": tuple(args.masks), "loras": tuple(args.loras)}
    settings = {name: value for name, value in settings.items() if name in known}
    return build_job(settings, args.preset, stated_defaults(args.model))


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


# -------------------------------------------------------------------------------------------------- make-tiny and demo


def _add_make_tiny(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to write them (14 MB; 39 MB with --random)")
    parser.add_argument(
        "--random", action="store_true", help="random weights, which paint noise, in place of the trained"
    )


def _run_make_tiny(args: argparse.Namespace) -> None:
    from .tiny_models import make_tiny

    for name, path in vars(make_tiny(args.folder, random=args.random)).items():
        if args.random or name != "decoder":
            _say(f"{name}: {path}")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    from ..fp8_optimization import QUANTIZATIONS
    from ..wanvideo.modules.attention import ATTENTION_MODES

    parser.add_argument("--out", type=Path, default=Path("demo.mp4"), metavar="V", help="video to write (%(default)s)")
    parser.add_argument("--attention-mode", default="auto", metavar="M", help=f"{', '.join(ATTENTION_MODES)} (auto)")
    parser.add_argument("--quantization", default="disabled", metavar="Q", help=", ".join(QUANTIZATIONS))
    parser.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:1 ... (%(default)s)")
    parser.add_argument("--image", type=Path, metavar="P", help="another image that will speak, a drawn face")
    parser.add_argument("--audio", type=Path, metavar="A", help="another recording")
    parser.add_argument("--models", type=Path, metavar="DIR", help="keep the tiny models there")


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


# ---------------------------------------------------------------------------------------------------------------- main

COMMANDS = (
    Command("generate", "make a talking video from an image and a recording", _add_generate, _run_generate),
    Command("demo", "make a small video with tiny models, to see that everything works", _add_demo, _run_demo),
    Command("doctor", "try every attention mode and quantization on this machine", _add_doctor, _run_doctor),
    Command("make-tiny", "write the demo's tiny models, in the public formats", _add_make_tiny, _run_make_tiny),
)


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    top = argparse.ArgumentParser(
        prog="infinitetalk", description="An image and a recording of speech become a talking video."
    )
    top.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = commands.add_parser(command.name, help=command.summary, description=command.summary)
        command.add(sub)
        sub.add_argument("-v", "--verbose", action="store_true", help="log more, and show where an error arose")
        sub.set_defaults(run=command.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    0; 2 for what the user can correct; 130 when interrupted, 143 when terminated.
    """
    _prepare_streams()
    args = parser().parse_args(argv)
    try:
        with _signals_as_interrupts():
            _log_to_stderr(args.verbose)
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


def _log_to_stderr(verbose: bool) -> None:
    from .terminal import log_handler

    package = logging.getLogger(__package__.rpartition(".")[0])
    package.handlers = [log_handler(verbose)]
    package.setLevel(logging.DEBUG if verbose else logging.INFO)
