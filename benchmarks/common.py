"""What the benchmarks share: timing side by side, random models of the public shapes, tables, goals, JSON.

Every figure that compares is a ratio of calls that took turns in one run, so that a clock that drifts moves both.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from wanvideo_infinitetalk.fp8_optimization import quantize_linears
from wanvideo_infinitetalk.wanvideo.kernels import selftest
from wanvideo_infinitetalk.wanvideo.kernels.packages import first_line, installed_version
from wanvideo_infinitetalk.wanvideo.modules.model import AudioConfig, WanConfig, WanModel
from wanvideo_infinitetalk.wanvideo.runtime.timing import per_call

__all__ = [
    "PUBLIC_14B",
    "PUBLIC_GRID",
    "SMALL",
    "SMALL_GRID",
    "Report",
    "begin",
    "choose_device",
    "environment",
    "interleaved",
    "parser",
    "random_inputs",
    "random_model",
    "ratio",
    "usable",
]

PUBLIC_14B = WanConfig(audio=AudioConfig())
"""Wan2.1 I2V 14B with InfiniteTalk's layers."""

PUBLIC_GRID = (21, 30, 52)
"""Tokens of 81 frames of 480 x 832: frames, rows, columns; 32,760 in all."""

SMALL = WanConfig(
    text_len=16,
    dim=128,
    ffn_dim=256,
    text_dim=32,
    num_heads=2,
    num_layers=4,
    clip_dim=32,
    audio=AudioConfig(intermediate_dim=32, output_dim=32, context_tokens=4, blocks=2, channels=16),
)
"""The same with everything small, to try a benchmark in seconds on a CPU."""

SMALL_GRID = (3, 8, 8)

PACKAGES = ("triton", "transformers", "diffusers", "comfy-kitchen", "sageattention", "sageattn3", "flash-attn")


# ------------------------------------------------------------------------------------------------- models and inputs


@torch.no_grad()
def random_model(
    config: WanConfig,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str = "disabled",
    attention_mode: str = "sdpa",
) -> WanModel:
    """A model whose random weights keep the magnitude of activations, made on `device` block by block."""
    with torch.device("meta"):
        model = WanModel(config, attention_mode=attention_mode)
    model.requires_grad_(False).eval()
    for child in model.children():
        if child is not model.blocks:
            _fill(child, device, dtype)
    for block in model.blocks:
        _fill(block, device, dtype)
        # The quantizer goes by the names of a model's blocks.
        quantize_linears(nn.ModuleDict({"blocks": nn.ModuleList([block])}), quantization, dtype)
    return model


def _fill(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    module.to(dtype).to_empty(device=device)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1 and not name.endswith("modulation"):
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.normal_(std=0.05)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)


def random_inputs(config: WanConfig, grid: tuple[int, int, int], device: torch.device) -> dict[str, torch.Tensor]:
    """Keyword arguments of `WanModel.forward` for one video with one speaker; no two tokens are alike."""
    frames, height, width = grid

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device)

    latents = (frames, 2 * height, 2 * width)
    given = {
        "x": random(config.out_dim, *latents),
        "t": torch.tensor([700.0], device=device),
        "context": random(config.text_len, config.text_dim),
        "y": random(1, config.in_dim - config.out_dim, *latents),
    }
    if config.model_type == "i2v":
        given["clip_fea"] = random(1, 257, config.clip_dim)
    if config.audio is not None:
        a = config.audio
        given["audio"] = random(1, a.vae_scale * (frames - 1) + 1, a.audio_window, a.blocks, a.channels)
    if config.humo is not None:
        h = config.humo
        given["humo_audio"] = random(frames, h.seq_len, h.blocks, h.channels)
    return given


# --------------------------------------------------------------------------------------------------------------- timing


def usable(
    forms: Mapping[str, Callable[..., Any]], call: tuple[Any, ...], of: str = ""
) -> dict[str, Callable[..., Any]]:
    """Those that can compute this call; the others are named with the first line of what they say."""
    found = {}
    for name, form in forms.items():
        try:
            form(*call)
        except Exception as error:  # noqa: BLE001 - whatever a package raises is the answer that is reported
            print(f"not measured: {name}{of} ({type(error).__name__}: {first_line(error)})")
        else:
            found[name] = form
    return found


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    warmup: int = 1,
    within: Mapping[str, Callable[[], AbstractContextManager[Any]]] | None = None,
    last: float = 0.0,
) -> dict[str, list[float]]:
    """name -> milliseconds per round; in every round each call once, the order turned around every other round.

    Args:
        warmup: rounds before those that count, at least one when `last` is given.
        within: name -> the context in which that call is timed; entering and leaving it is not.
        last: milliseconds for which each call is repeated before the next has its turn. A GPU under load runs at other
            clocks than one that comes from idling, and launches hide behind the work before them.
    """
    contexts = within or {}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(warmup + rounds):
        for name in list(calls)[:: 1 if i % 2 == 0 else -1]:
            with contexts.get(name, nullcontext)():
                repeats = max(1, round(last / times[name][-1])) if last and times[name] else 1
                times[name].append(per_call(calls[name], device, repeats))
    return {name: measured[warmup:] for name, measured in times.items()}


def ratio(times: Mapping[str, Sequence[float]], name: str, baseline: str) -> float:
    """Median over the rounds of what `name` takes over what `baseline` takes."""
    return statistics.median(a / b for a, b in zip(times[name], times[baseline], strict=True))


# ------------------------------------------------------------------------------------------------------------ reporting


def choose_device(small: bool) -> torch.device:
    """The GPU; the CPU for a small run where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if not small:
        sys.exit("This benchmark needs an NVIDIA GPU; --small tries it on the CPU.")
    return torch.device("cpu")


def environment(device: torch.device) -> dict[str, str]:
    """GPU, driver and versions, as strings."""
    facts = {"date": dt.date.today().isoformat(), "system": platform.platform()}
    facts |= selftest.environment(None, device)
    versions = {package: installed_version(package) for package in PACKAGES}
    return facts | {package: version for package, version in versions.items() if version is not None}


def parser(description: str | None, rounds: int | None = None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark, `--small` and `--json F`; `--rounds` where it has a default."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--small", action="store_true", help="small sizes, to try the benchmark itself; on any machine")
    made.add_argument("--json", type=Path, metavar="F", help="write the figures there, for tools/cuda_results.py")
    if rounds is not None:
        made.add_argument("--rounds", type=int, default=rounds, help="of timing (%(default)s)")
    return made


@dataclass(frozen=True)
class Goal:
    """`value` should be at most `limit`; a small run is not judged (`met` None)."""

    what: str
    value: float
    limit: float
    met: bool | None


@dataclass
class Report:
    """Tables and goals of one benchmark."""

    benchmark: str
    title: str
    device: torch.device
    small: bool
    tables: list[dict[str, Any]] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def table(self, title: str, rows: Sequence[Mapping[str, str | int | float]]) -> None:
        """Print and keep a table; the keys of the first row are its columns."""
        self.tables.append({"title": title, "rows": [dict(row) for row in rows]})
        print(f"\n{title}\n")
        print(markdown_table(rows), flush=True)

    def lasting(self, milliseconds: float) -> float:
        """For how long `interleaved` repeats a call: a small run calls once."""
        return 0.0 if self.small else milliseconds

    def goal(self, what: str, value: float, limit: float) -> None:
        """Print and keep whether `value` is at most `limit`."""
        met = None if self.small else value <= limit
        self.goals.append(Goal(what, value, limit, met))
        print(f"\n{what}: {shown(value)} (goal: at most {shown(limit)}{'' if met is not False else ', MISSED'})")

    def failed(self, sentence: str) -> None:
        """Print and keep something that must not be, whatever the size of the run."""
        self.failures.append(sentence)
        print(f"\nFAILED: {sentence}")

    def _command(self) -> str:
        """What was called, without the place that the figures go to."""
        pairs = pairwise(["", *sys.argv[1:]])
        words = [word for before, word in pairs if not (word.startswith("--json") or before == "--json")]
        return " ".join(["python -m", f"benchmarks.{self.benchmark}", *words])

    def finish(self, path: Path | None) -> int:
        """Write the JSON file, and return the exit status: 1 when a goal was missed or something failed."""
        if path is not None:
            content = {
                "benchmark": self.benchmark,
                "title": self.title,
                "command": self._command(),
                "small": self.small,
                "environment": environment(self.device),
                "tables": self.tables,
                "goals": [asdict(goal) for goal in self.goals],
                "failures": self.failures,
            }
            path.write_text(json.dumps(content, indent=1) + "\n")
        return int(bool(self.failures) or any(goal.met is False for goal in self.goals))


def begin(options: argparse.ArgumentParser, benchmark: str, title: str) -> tuple[Report, argparse.Namespace]:
    """Read the command line; the report that the benchmark fills, and the options."""
    arguments = options.parse_args()
    return Report(benchmark, title, choose_device(arguments.small), arguments.small), arguments


def shown(value: object) -> str:
    """A number with four digits, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """The rows as a Markdown table that also reads well on a terminal."""
    columns = list(rows[0])
    cells = [columns, *([shown(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
