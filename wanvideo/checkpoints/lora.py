"""LoRA files under every public naming, merged into the weights or added to the outputs of the layers.

A LoRA (Hu et al., arXiv 2106.09685) changes a weight W [N, K] by factor * B A with A [rank, K] and B [N, rank]; the
factor is strength * alpha / rank, or strength alone in a file without alpha. Distillation LoRAs also carry whole
differences of norms, biases and modulations.

Weights of 16 or 32 bits can be merged: W + change, summed over all files in float32 and rounded once. Quantized weights
(fp8, NVFP4, GGUF) are never merged, because quantizing a second time would cost more than it gains: there B (A x) is
added to the layer's output. That is also how `merge=False` runs, and it can be taken off again.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, InputError, some
from ..linear.base import QuantizedLinear, branched, unbranched
from ..modules.model import WanConfig, WanModel
from .files import CheckpointFile, Stored
from .reading import json_object
from .state_dict import diffusers_name, kind_of

__all__ = ["LoraSpec", "LowRankBranch", "active_loras", "apply_loras", "inspect_loras", "remove_loras"]

logger = logging.getLogger(__name__)

MAX_ALPHA = 1e6
"""Trainers' alphas are between 1 and a few hundred."""

MERGEABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LoraSpec:
    """One LoRA file to apply.

    Attributes:
        path: safetensors or PyTorch file.
        strength: factor on all its changes; 0 leaves the file out, negative values subtract.
        merge: fold it into weights of 16 and 32 bits; quantized weights stay unmerged anyway.
        blocks: only the layers of these transformer blocks; None for all layers of the model.
    """

    path: str | Path
    strength: float = 1.0
    merge: bool = True
    blocks: frozenset[int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))  # one type, so that equal specs compare equal
        if not math.isfinite(self.strength):
            raise InputError(f"The strength of the LoRA {self.name} is {self.strength}; give a finite number.")

    @property
    def name(self) -> str:
        return Path(self.path).name


# ---------------------------------------------------------------------------------------------------------- names

# The end of a tensor's name -> what the tensor is. peft puts an adapter's name between ("lora_A.default.weight").
_ENDINGS = (
    (re.compile(r"(\.lora_A(\.[^.]+)??|[._]lora[._]down)\.bias$"), "down_bias"),
    (re.compile(r"(\.lora_B(\.[^.]+)??|[._]lora[._]up)\.bias$"), "up_bias"),
    (re.compile(r"\.lora_A(\.[^.]+)??(\.weight)?$"), "down"),
    (re.compile(r"\.lora_B(\.[^.]+)??(\.weight)?$"), "up"),
    (re.compile(r"[._]lora[._]down(\.weight)?$"), "down"),
    (re.compile(r"[._]lora[._]up(\.weight)?$"), "up"),
    (re.compile(r"\.alpha$"), "alpha"),
    (re.compile(r"\.diff$"), "diff"),
    (re.compile(r"\.diff_b$"), "diff_b"),
    (re.compile(r"\.diff_m$"), "diff_m"),
)

# Parts of names that only another method has: leaving them out would give wrong numbers without a word.
_OTHER_METHODS = (
    ("dora_scale", "DoRA"),
    ("lora_magnitude_vector", "DoRA"),
    ("hada_w", "LoHa"),
    ("lokr_w", "LoKr"),
    ("oft_blocks", "OFT"),
)

_HALF = "half a pair"
"""A down without its up, or the reverse: it changes nothing."""

# What trainers put before a layer's name, any number of them in a row.
_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "pipe.dit.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    "model.",
    "dit.",
    "_",
)


class _Targets:
    """The parameters of a model under every name that LoRA files use for them."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.parameters = dict(model.named_parameters())
        layers = {name.rpartition(".")[0] for name in self.parameters}
        layers |= {name for name in self.parameters if name.endswith("modulation")}
        self._names: dict[str, str] = {}
        for rename in (diffusers_name, str):  # public names win
            for layer in layers:
                self._names[rename(layer)] = layer
                self._names[rename(layer).replace(".", "_")] = layer

    def find(self, stem: str, kind: str) -> str | None:
        """Name of the parameter that a tensor of `kind` under `stem` changes, None where the model has none."""
        layer = self._layer(stem)
        if layer is None:
            return None
        last = {"diff_b": "bias", "up_bias": "bias", "diff_m": "modulation"}.get(kind, "weight")
        for name in (f"{layer}.{last}", layer):
            if name in self.parameters:
                return name
        return None

    def owner(self, parameter: str) -> tuple[nn.Module, str]:
        """(module that holds the parameter, its name there)."""
        module, _, last = parameter.rpartition(".")
        return self.modules[module], last

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Of the values: a quantized weight may be stored in another shape."""
        module, last = self.owner(parameter)
        if isinstance(module, nn.Linear) and last == "weight":
            return module.out_features, module.in_features
        return tuple(self.parameters[parameter].shape)

    def quantized(self, parameter: str) -> bool:
        module, last = self.owner(parameter)
        stored = isinstance(module, QuantizedLinear) and last == "weight"
        return stored or self.parameters[parameter].dtype not in MERGEABLE_DTYPES

    def _layer(self, stem: str) -> str | None:
        while True:
            if stem in self._names:
                return self._names[stem]
            prefix = next((p for p in _PREFIXES if stem.startswith(p)), None)
            if prefix is None:
                return None
            stem = stem[len(prefix) :]


# ---------------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class _Change:
    """One change of one parameter: a pair (down, up) or a whole difference, still in the file."""

    file: CheckpointFile
    spec: LoraSpec
    parameter: str
    names: Mapping[str, str]  # "down", "up" or "diff" -> name in the file
    factor: float

    def low_rank(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(A [rank, K], factor * B [N, rank]) in float32; the kernel axes of convolutions are part of K."""
        down = self.file.read(self.names["down"], device, torch.float32)
        up = self.file.read(self.names["up"], device, torch.float32)
        return down.flatten(1), up.flatten(1) * self.factor

    def whole(self, device: torch.device) -> Tensor:
        """The change as one float32 tensor."""
        if "diff" in self.names:
            return self.file.read(self.names["diff"], device, torch.float32) * self.factor
        down, up = self.low_rank(device)
        return up @ down


def _changes(file: CheckpointFile, spec: LoraSpec, targets: _Targets) -> tuple[list[_Change], list[str]]:
    """All changes that the file makes to the model, and the layers that do not exist here; rejects other shapes."""
    layers, foreign = _grouped(file)
    if not layers:
        raise CheckpointError(f"The LoRA {spec.name} is {kind_of(file.names)}, not a LoRA.")
    rules = _AlphaRules(file)
    changes, unmatched, outside = [], list(foreign), 0
    for stem, parts in layers.items():
        for kind, names in _pieces(parts):
            parameter = targets.find(stem, kind) if kind != _HALF else None
            if kind == "up_bias" and targets.find(stem, "pair") and not (parameter or "").endswith(".bias"):
                raise CheckpointError(f"The LoRA {spec.name} adds a bias to {stem}, which has none in this model.")
            if parameter is None:
                unmatched.append(f"{stem} ({kind})")
            elif not _selected(parameter, spec.blocks):
                outside += 1
            else:
                change = _Change(file, spec, parameter, names, spec.strength)
                _check_shape(change, targets.shape(parameter), file.shapes)
                _check_values(change)
                factor = rules.factor(stem, parts) if kind in ("pair", "up_bias") else 1.0
                changes.append(replace(change, factor=spec.strength * factor))
    if not changes and not outside:
        raise CheckpointError(
            f"The LoRA {spec.name} changes nothing in this model: none of its {len(unmatched)} layers, such as "
            f"{some(unmatched)}, exists here; it was made for another model."
        )
    return changes, unmatched


def _grouped(file: CheckpointFile) -> tuple[dict[str, dict[str, str]], list[str]]:
    """(layer's name in the file -> {kind: tensor's name}, names that are of no known kind)."""
    layers: dict[str, dict[str, str]] = {}
    foreign = []
    for name in file.names:
        method = next((method for mark, method in _OTHER_METHODS if mark in name), None)
        if method is not None:
            raise CheckpointError(f"{file.path} is a {method} file ({name}), which is not supported; use a LoRA.")
        for ending, kind in _ENDINGS:
            stem, found = ending.subn("", name)
            if found:
                other = layers.setdefault(stem, {}).setdefault(kind, name)
                if other != name:
                    raise CheckpointError(
                        f"The LoRA {file.path} holds both {other} and {name}, which change one layer twice; use a file "
                        "with one adapter."
                    )
                break
        else:
            foreign.append(name)
    for parts in layers.values():
        if "down_bias" in parts:
            raise CheckpointError(
                f"The LoRA {file.path} has a bias between its two matrices ({parts['down_bias']}), which is not "
                "supported; use a file without it."
            )
    return layers, foreign


def _pieces(parts: Mapping[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    """What one layer's tensors make: (kind, names)."""
    if "down" in parts and "up" in parts:
        yield "pair", {"down": parts["down"], "up": parts["up"]}
        if "up_bias" in parts:  # B (A x) + bias, all of it times the factor
            yield "up_bias", {"diff": parts["up_bias"]}
    elif parts.keys() & {"down", "up", "up_bias"}:
        yield _HALF, dict(parts)
    for kind in ("diff", "diff_b", "diff_m"):
        if kind in parts:
            yield kind, {"diff": parts[kind]}


class _AlphaRules:
    """alpha / rank of a file's layers: from the layer's `alpha`, else from the trainer's configuration, else 1.

    The configuration is peft's: in the safetensors header (as diffusers writes it), or in the `adapter_config.json` of
    the folder that peft wrote, whose weights it calls `adapter_model`. Rank-stabilized LoRAs (arXiv 2312.03732) divide
    by the square root of the rank.
    """

    def __init__(self, file: CheckpointFile) -> None:
        self.file = file
        self.what, stated = _stated(file)
        self.alpha = self._number(stated.get("lora_alpha"), "lora_alpha")
        self.rank_stabilized = stated.get("use_rslora") or False
        if not isinstance(self.rank_stabilized, bool):
            raise self._rejected("use_rslora", self.rank_stabilized)
        patterns = stated.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise self._rejected("alpha_pattern", patterns)
        self.alphas = {name: self._number(alpha, f"alpha_pattern {name}") for name, alpha in patterns.items()}

    def factor(self, stem: str, parts: Mapping[str, str]) -> float:
        rank = int(self.file.shapes[parts["down"]].shape[0])
        divisor = math.sqrt(rank) if self.rank_stabilized else rank
        if "alpha" in parts:
            return self._stored_alpha(parts["alpha"]) / divisor
        special = [alpha for name, alpha in self.alphas.items() if f".{stem}".endswith(f".{name}")]
        alpha = special[0] if special else self.alpha
        return float(rank if alpha is None else alpha) / divisor

    def _stored_alpha(self, name: str) -> float:
        stored = self.file.shapes[name]
        numbers = stored.shape.numel() == 1 and stored.dtype != torch.bool
        alpha = float(self.file.read(name).float().item()) if numbers else math.nan
        if not abs(alpha) <= MAX_ALPHA:
            raise CheckpointError(
                f"The LoRA {self.file.path} stores {name} as {list(stored.shape)} of {stored.dtype}, which is not one "
                "finite number of that kind; use another version of it."
            )
        return alpha

    def _number(self, value: Any, name: str) -> float | None:
        if value is None:
            return None
        if type(value) not in (int, float) or not abs(value) <= MAX_ALPHA:
            raise self._rejected(name, value)
        return float(value)

    def _rejected(self, name: str, value: object) -> CheckpointError:
        return CheckpointError(f"{self.what} states {name} = {str(value)[:40]}, which is no value of that kind.")


def _stated(file: CheckpointFile) -> tuple[str, dict[str, Any]]:
    """(what to call it, peft's configuration of a file); keys without the component's name ("transformer.")."""
    what = f"The configuration of the LoRA {file.path}"
    stated = json_object(file.metadata.get("lora_adapter_metadata"), what)
    if not stated and file.path.stem == "adapter_model":  # any other file's neighbor may be another LoRA's
        stated = json_object(file.path.with_name("adapter_config.json"))
    return what, {key.rpartition(".")[2]: value for key, value in stated.items()}


def _selected(parameter: str, blocks: frozenset[int] | None) -> bool:
    if blocks is None:
        return True
    block = re.match(r"blocks\.(\d+)\.", parameter)
    return block is not None and int(block[1]) in blocks


def _check_shape(change: _Change, expected: tuple[int, ...], shapes: Mapping[str, Stored]) -> None:
    """Raises CheckpointError unless the change has the parameter's shape, up to axes of size 1."""
    lora = f"The LoRA {change.spec.name}"
    stored = {part: shapes[name] for part, name in change.names.items()}
    for part, tensor in stored.items():
        if not tensor.is_floating_point() or 0 in tensor.shape or (part != "diff" and len(tensor.shape) < 2):
            raise CheckpointError(
                f"{lora} stores {change.names[part]} as {list(tensor.shape)} of {tensor.dtype}, which is no matrix of "
                "floating-point numbers; it is damaged or of an unknown kind."
            )
    if "diff" in stored:
        got = tuple(stored["diff"].shape)
        fits = _without_ones(got) == _without_ones(expected)
    else:
        down, up = stored["down"].shape, stored["up"].shape
        if math.prod(up[1:]) != down[0]:
            raise CheckpointError(
                f"{lora} has matrices of two ranks for {change.parameter}, {list(down)} and {list(up)}; it is damaged."
            )
        got = (up[0], *down[1:])
        flat = (expected[0], math.prod(expected[1:]))
        fits = up[0] == expected[0] and (_without_ones(got) == _without_ones(expected) or got == flat)
    if not fits:
        raise CheckpointError(
            f"{lora} was made for another model: it changes {change.parameter} by {list(got)}, which is "
            f"{list(expected)} here."
        )


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _check_values(change: _Change) -> None:
    """Raises CheckpointError where the change is not finite, before anything is applied."""
    for name in change.names.values():
        if not torch.isfinite(change.file.read(name, dtype=torch.float32)).all():
            raise CheckpointError(
                f"The LoRA {change.spec.name} holds NaN or infinite values in {name}; download it again or use another."
            )


# -------------------------------------------------------------------------------------------------------- applying


class LowRankBranch(nn.Module):
    """Adds to a linear layer's output: the low-rank changes of all LoRAs as one pair, and whole differences if any.

    A child of the layer, so that it moves with it; not part of the state dict.
    """

    down: Tensor | None
    up: Tensor | None
    whole: Tensor | None

    def __init__(self, down: Tensor | None, up: Tensor | None, whole: Tensor | None) -> None:
        """down [R, K] and up [N, R] (factors included), whole [N, K]; R is the sum of all ranks."""
        super().__init__()
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)
        self.register_buffer("whole", whole, persistent=False)

    def forward(self, input: Tensor, output: Tensor) -> Tensor:
        """input [..., K], output [..., N] of the layer -> the changed output, a new tensor in its dtype."""
        dtype = output.dtype
        x = input.to(dtype)
        if self.down is not None and self.up is not None:
            output = output + F.linear(F.linear(x, self.down.to(dtype)), self.up.to(dtype))
        if self.whole is not None:
            output = output + F.linear(x, self.whole.to(dtype))
        return output


@dataclass
class _Record:
    """What was done to a model; kept on it as `lora_record`."""

    merged: list[LoraSpec]
    unmerged: list[LoraSpec]
    branched: list[nn.Linear]
    before: list[tuple[nn.Parameter, Tensor]]  # small parameters that were changed, and what they were


@torch.no_grad()
def apply_loras(model: nn.Module, specs: Iterable[LoraSpec], compute_device: str | torch.device | None = None) -> None:
    """Let `model` compute with the changes of all `specs`, in place.

    Afterwards the unmerged LoRAs are those of `specs` alone. Merged ones stay merged and are not merged a
    second time, so calling this again with the same specs changes nothing. A file that changes any quantized weight
    stays unmerged as a whole, so that it can be taken off again as a whole.

    Args:
        model: with weights of 16 or 32 bits, quantized ones, or both. Call this before block swap packs its tensors,
            and before `quantize_linears` where the weights are to be quantized after merging.
        specs: in any order; the result does not depend on it.
        compute_device: where merging is computed; None for where each weight lies.

    Raises:
        CheckpointError: a file is missing, damaged, not a LoRA, or made for another model; `model` is unchanged then.
            (A file that fits in part is applied, with one warning that counts the rest.)
    """
    already = Counter(_record(model).merged)
    wanted = list((Counter(spec for spec in specs if spec.strength != 0) - already).elements())
    targets = _Targets(model)
    with ExitStack() as stack:
        files = [stack.enter_context(CheckpointFile(spec.path)) for spec in wanted]
        by_spec = []
        for file, spec in zip(files, wanted, strict=True):
            changes, unmatched = _changes(file, spec, targets)
            by_spec.append(changes)
            if unmatched:
                logger.warning(
                    "LoRA %s: %d of its layers do not exist here: %s", spec.name, len(unmatched), some(unmatched)
                )
        remove_loras(model)
        record = _record(model)
        merging: dict[str, list[_Change]] = {}
        attaching: dict[str, list[_Change]] = {}
        for spec, changes in zip(wanted, by_spec, strict=True):
            merge = spec.merge and not any(targets.quantized(change.parameter) for change in changes)
            (record.merged if merge else record.unmerged).append(spec)
            for change in changes:
                (merging if merge else attaching).setdefault(change.parameter, []).append(change)
            way = "merged" if merge else "not merged"
            logger.info("LoRA %s: strength %g, %d changes, %s", spec.name, spec.strength, len(changes), way)
        for name, group in merging.items():
            _merge(targets.parameters[name], group, compute_device)
        for name, group in attaching.items():
            _attach(targets, name, group, record, compute_device)


def inspect_loras(config: WanConfig, specs: Iterable[LoraSpec]) -> None:
    """Raise what `apply_loras` raises for a model of that configuration, before one is loaded."""
    with torch.device("meta"):
        targets = _Targets(WanModel(config))
    for spec in specs:
        if spec.strength != 0:
            with CheckpointFile(spec.path) as file:
                _changes(file, spec, targets)


@torch.no_grad()
def remove_loras(model: nn.Module) -> list[LoraSpec]:
    """Take off the unmerged LoRAs: the model computes bit for bit what it did before them.

    Returns those that were merged, and so can only be removed by loading the model again.
    """
    record = _record(model)
    for layer in record.branched:
        layer.__class__ = unbranched(type(layer))
        del layer.lora
    for parameter, value in record.before:
        parameter.data = value.to(parameter.device)
    record.branched, record.before, record.unmerged = [], [], []
    return list(record.merged)


def active_loras(model: nn.Module) -> list[LoraSpec]:
    """The LoRAs that `model` computes with, merged ones first."""
    record = _record(model)
    return [*record.merged, *record.unmerged]


def _record(model: nn.Module) -> _Record:
    record = getattr(model, "lora_record", None)
    if record is None:
        record = _Record([], [], [], [])
        model.lora_record = record  # type: ignore[assignment]
    return record


def _changed(parameter: Tensor, changes: Sequence[_Change], device: str | torch.device | None) -> Tensor:
    """`parameter` with all `changes`, summed in float32 and rounded once; a fresh tensor."""
    place = torch.device(device) if device is not None else parameter.device
    total = parameter.detach().to(place, torch.float32, copy=True)
    for change in changes:
        total += change.whole(place).reshape(total.shape)
    return total.to(parameter.device, parameter.dtype)


def _merge(parameter: nn.Parameter, changes: Sequence[_Change], device: str | torch.device | None) -> None:
    parameter.data = _changed(parameter, changes, device)


def _attach(
    targets: _Targets, name: str, changes: Sequence[_Change], record: _Record, device: str | torch.device | None
) -> None:
    module, last = targets.owner(name)
    parameter = targets.parameters[name]
    if not (isinstance(module, nn.Linear) and last == "weight"):
        record.before.append((parameter, parameter.data))
        parameter.data = _changed(parameter, changes, device)
        return
    module.lora = _branch(changes, parameter.device, _compute_dtype(module))
    module.__class__ = branched(type(module))
    record.branched.append(module)


def _branch(changes: Sequence[_Change], device: torch.device, dtype: torch.dtype) -> LowRankBranch:
    """One branch for all `changes` of a linear layer's weight."""
    pairs = [change.low_rank(device) for change in changes if "diff" not in change.names]
    wholes = [change.whole(device) for change in changes if "diff" in change.names]
    return LowRankBranch(
        torch.cat([down for down, _ in pairs]).to(dtype) if pairs else None,
        torch.cat([up for _, up in pairs], dim=1).to(dtype) if pairs else None,
        torch.stack(wholes).sum(0).to(dtype) if wholes else None,
    )


def _compute_dtype(linear: nn.Linear) -> torch.dtype:
    if isinstance(linear, QuantizedLinear):
        return linear.base_dtype
    if linear.weight.dtype in MERGEABLE_DTYPES:
        return linear.weight.dtype
    # An fp8 weight as it came from the file: the layer will compute in the dtype of what is not quantized.
    return linear.bias.dtype if linear.bias is not None else torch.bfloat16
