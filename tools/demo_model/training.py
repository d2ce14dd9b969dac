"""What the trainings share: learning-rate schedule, weight average, captured steps, checkpoints in small files."""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = ["Schedule", "Trainer", "averaged_state", "load_shards", "save_shards", "training_parser"]

logger = logging.getLogger(__name__)

SHARD_BYTES = 15 * 2**20
"""A checkpoint is cut into files below 16 MiB."""


def training_parser(description: str | None, lr: float) -> argparse.ArgumentParser:
    """A parser with the options of every training; its progress is logged."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--finish", action="store_true")
    parser.add_argument("--no-capture", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser


@dataclass(frozen=True)
class Schedule:
    """Warm up, hold, and where `finish` is set fall to zero along a cosine in the last part of the run.

    A run ends after `steps` steps or `minutes` minutes, whichever comes first; the fall follows the same measure.
    """

    lr: float
    steps: int
    minutes: float
    finish: bool
    warmup: int = 300
    fall: float = 0.5  # share of the run

    def progress(self, step: int, began: float) -> float:
        return max(step / self.steps, (time.monotonic() - began) / 60 / self.minutes)

    def rate(self, step: int, progress: float) -> float:
        rate = self.lr * min(1.0, (step + 1) / self.warmup)
        if self.finish and progress > 1 - self.fall:
            rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 1 + self.fall) / self.fall)))
        return rate


class Trainer:
    """AdamW with gradient clipping and an average of the weights, the whole step captured in a CUDA graph per shape.

    Args:
        model: its parameters that want gradients are trained, in float32.
        loss: (tensors of one batch) -> scalar; must not wait for the GPU. Called under autocast to bfloat16 on CUDA.
        average: decay of the weight average per step.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        *,
        average: float = 0.999,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.98),
        clip: float = 1.0,
        capture: bool = True,
    ) -> None:
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters: list[Tensor] = list(self.named.values())
        self.device = self.parameters[0].device
        self.loss, self.decay, self.clip = loss, average, clip
        self.capture = capture and self.device.type == "cuda"
        self.lr = torch.tensor(0.0, device=self.device)
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=self.lr if self.capture else 0.0,
            betas=betas,
            weight_decay=weight_decay,
            capturable=self.capture,
        )
        self.average = [p.detach().clone() for p in self.parameters]
        self._pool: Any = None
        self._graphs: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def step(self, lr: float, *batch: Tensor) -> Tensor:
        """One step on `batch`; the loss, a scalar on the device that the next step overwrites."""
        if not self.capture:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            return self._step(batch)
        self.lr.fill_(lr)
        key = tuple(tensor.shape for tensor in batch)
        if key not in self._graphs:
            self._graphs[key] = self._record(batch)
        graph, static, loss = self._graphs[key]
        for place, tensor in zip(static, batch, strict=True):
            place.copy_(tensor)
        graph.replay()
        return loss

    def _step(self, batch: Iterable[Tensor]) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.loss(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip, foreach=True)
        self.optimizer.step()
        torch._foreach_lerp_(self.average, self.parameters, 1 - self.decay)
        return loss.detach()

    def _record(self, batch: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        static = [tensor.clone() for tensor in batch]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # one pool of memory for all: they run one after the other, and each leaves only its loss
        with torch.cuda.graph(graph, pool=self._pool):
            loss = self._step(static)
        self._pool = graph.pool()
        return graph, static, loss

    @torch.no_grad()
    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights by name."""
        return dict(zip(self.named, self.average, strict=True))

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """Weights and average in float32, moments in bfloat16: enough to go on."""
        state: dict[str, Tensor] = {}
        for (name, parameter), average in zip(self.named.items(), self.average, strict=True):
            state[f"weight/{name}"] = parameter.detach()
            state[f"average/{name}"] = average
            for key in ("exp_avg", "exp_avg_sq"):
                if parameter in self.optimizer.state:
                    state[f"{key}/{name}"] = self.optimizer.state[parameter][key].bfloat16()
        save_shards(folder, state)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Go on from `save`, or from the averages alone, which are small enough to carry about."""
        state = load_shards(folder)
        for (name, parameter), average in zip(self.named.items(), self.average, strict=True):
            average.copy_(state[f"average/{name}"])
            parameter.copy_(state.get(f"weight/{name}", average))
            if f"exp_avg/{name}" in state:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(1000.0, device=self.device if self.capture else "cpu"),
                    "exp_avg": state[f"exp_avg/{name}"].to(parameter),
                    "exp_avg_sq": state[f"exp_avg_sq/{name}"].to(parameter),
                }


def save_shards(folder: Path, state: dict[str, Tensor]) -> None:
    """`state` as safetensors files of at most 16 MiB each in `folder`; what it held before goes."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    shard: dict[str, Tensor] = {}
    size, number = 0, 0
    for name, tensor in [*state.items(), ("", torch.empty(0))]:
        nbytes = tensor.numel() * tensor.element_size()
        if shard and (not name or size + nbytes > SHARD_BYTES):
            save_file(shard, folder / f"{number:02}.safetensors")
            shard, size, number = {}, 0, number + 1
        if name:
            shard[name] = tensor.detach().cpu().contiguous()  # as safetensors asks
            size += nbytes


def load_shards(folder: Path) -> dict[str, Tensor]:
    """What `save_shards` wrote."""
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            state.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a dict
    if not state:
        raise FileNotFoundError(f"there is no checkpoint in {folder}")
    return state


def averaged_state(folder: Path) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint."""
    state = load_shards(folder)
    return {name.removeprefix("average/"): value for name, value in state.items() if name.startswith("average/")}
