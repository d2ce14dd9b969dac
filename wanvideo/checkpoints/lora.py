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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, some
from ..linear.base import QuantizedLinear, branched, unbranched
from .files import CheckpointFile, Stored
from .state_dict import json_object

__all__ = ["LoraSpec", "LowRankBranch", "active_loras", "apply_loras", "remove_loras"]

logger = logging.getLogger(__name__)

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

    @property
    def name(self) -> str:
        return Path(self.path).name


# ---------------------------------------------------------------------------------------------------------- names

# The end of a tensor's name -> what the tensor is. peft puts an adapter's name between ("lora_A.default.weight").
_ENDINGS = (
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

# Public name -> the name of the same layer in diffusers' WanTransformer3DModel. The first part that fits is replaced,
# then the next: a block's layer has one of each group.
_DIFFUSERS_NAMES = (
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"(attn\d)\.([qkv])$", r"\1.to_\2"),
    (r"(attn\d)\.o$", r"\1.to_out.0"),
    (r"(attn\d)\.([kv])_img$", r"\1.add_\2_proj"),
    (r"(attn\d)\.norm_k_img$", r"\1.norm_added_k"),
    (r"\.ffn\.0$", ".ffn.net.0.proj"),
    (r"\.ffn\.2$", ".ffn.net.2"),
    (r"^(blocks\.\d+)\.norm3$", r"\1.norm2"),
    (r"^text_embedding\.0$", "condition_embedder.text_embedder.linear_1"),
    (r"^text_embedding\.2$", "condition_embedder.text_embedder.linear_2"),
    (r"^time_embedding\.0$", "condition_embedder.time_embedder.linear_1"),
    (r"^time_embedding\.2$", "condition_embedder.time_embedder.linear_2"),
    (r"^time_projection\.1$", "condition_embedder.time_proj"),
    (r"^img_emb\.proj\.0$", "condition_embedder.image_embedder.norm1"),
    (r"^img_emb\.proj\.1$", "condition_embedder.image_embedder.ff.net.0.proj"),
    (r"^img_emb\.proj\.3$", "condition_embedder.image_embedder.ff.net.2"),
    (r"^img_emb\.proj\.4$", "condition_embedder.image_embedder.norm2"),
    (r"^head\.head$", "proj_out"),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"\.modulation$", ".scale_shift_table"),
)


def _diffusers_name(public: str) -> str:
    for pattern, replacement in _DIFFUSERS_NAMES:
        public = re.sub(pattern, replacement, public)
    return public


class _Targets:
    """The parameters of a model under every name that LoRA files use for them."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.parameters = dict(model.named_parameters())
        layers = {name.rpartition(".")[0] for name in self.parameters}
        layers |= {name for name in self.parameters if name.endswith("modulation")}
        self._names: dict[str, str] = {}
        for rename in (_diffusers_name, str):  # public names win
            for layer in layers:
                self._names[rename(layer)] = layer
                self._names[rename(layer).replace(".", "_")] = layer

    def find(self, stem: str, kind: str) -> str | None:
        """Name of the parameter that a tensor of `kind` under `stem` changes, None where the model has none."""
        layer = self._layer(stem)
        if layer is None:
            return None
        last = {"diff_b": "bias", "diff_m": "modulation"}.get(kind, "weight")
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


def _changes(file: CheckpointFile, spec: LoraSpec, targets: _Targets) -> list[_Change]:
    """All changes that the file makes to the model; warns of layers that do not exist here, rejects other shapes."""
    layers, foreign = _grouped(file)
    rules = _AlphaRules(file)
    changes, unmatched, outside = [], list(foreign), 0
    for stem, parts in layers.items():
        for kind, names in _pieces(parts):
            parameter = targets.find(stem, kind) if kind != _HALF else None
            if parameter is None:
                unmatched.append(f"{stem} ({kind})")
            elif not _selected(parameter, spec.blocks):
                outside += 1
            else:
                factor = spec.strength * (rules.factor(stem, parts) if kind == "pair" else 1.0)
                change = _Change(file, spec, parameter, names, factor)
                _check_shape(change, targets.shape(parameter), file.shapes)
                changes.append(change)
    if not changes and not outside:
        raise CheckpointError(
            f"The LoRA {spec.name} changes nothing in this model: none of its {len(unmatched)} layers, such as "
            f"{some(unmatched)}, exists here; it was made for another model."
        )
    if unmatched:
        logger.warning("LoRA %s: %d of its layers do not exist here: %s", spec.name, len(unmatched), some(unmatched))
    return changes


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
                layers.setdefault(stem, {})[kind] = name
                break
        else:
            foreign.append(name)
    return layers, foreign


def _pieces(parts: Mapping[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    """What one layer's tensors make: (kind, names)."""
    if "down" in parts and "up" in parts:
        yield "pair", {"down": parts["down"], "up": parts["up"]}
    elif "down" in parts or "up" in parts:
        yield _HALF, dict(parts)
    for kind in ("diff", "diff_b", "diff_m"):
        if kind in parts:
            yield kind, {"diff": parts[kind]}


class _AlphaRules:
    """alpha / rank of a file's layers: from the layer's `alpha`, else from the trainer's configuration, else 1.

    The configuration is peft's: in the safetensors header (as diffusers writes it) or in `adapter_config.json` next
    to the file. Rank-stabilized LoRAs (arXiv 2312.03732) divide by the square root of the rank.
    """

    def __init__(self, file: CheckpointFile) -> None:
        self.file = file
        stated = _stated(file)
        self.alpha = stated.get("lora_alpha")
        self.rank_stabilized = bool(stated.get("use_rslora", False))
        self.alphas: dict[str, float] = stated.get("alpha_pattern") or {}

    def factor(self, stem: str, parts: Mapping[str, str]) -> float:
        rank = int(self.file.shapes[parts["down"]].shape[0])
        divisor = math.sqrt(rank) if self.rank_stabilized else rank
        if "alpha" in parts:
            return float(self.file.read(parts["alpha"]).float().item()) / divisor
        special = [alpha for name, alpha in self.alphas.items() if stem.endswith(name)]
        alpha = special[0] if special else self.alpha
        return float(rank if alpha is None else alpha) / divisor


def _stated(file: CheckpointFile) -> dict[str, Any]:
    """peft's configuration of a file, {} without one; keys without the component's name ("transformer.")."""
    text: str | bytes | None = file.metadata.get("lora_adapter_metadata")
    neighbor = file.path.with_name("adapter_config.json")
    if text is None and neighbor.is_file():
        text = neighbor.read_bytes()
    stated = json_object(text, f"The configuration of the LoRA {file.path}")
    return {key.rpartition(".")[2]: value for key, value in stated.items()}


def _selected(parameter: str, blocks: frozenset[int] | None) -> bool:
    if blocks is None:
        return True
    block = re.match(r"blocks\.(\d+)\.", parameter)
    return block is not None and int(block[1]) in blocks


def _check_shape(change: _Change, expected: tuple[int, ...], shapes: Mapping[str, Stored]) -> None:
    """Raises CheckpointError unless the change has the parameter's number of rows and columns."""
    if "diff" in change.names:
        got = tuple(shapes[change.names["diff"]].shape)
        fits = math.prod(got) == math.prod(expected)
    else:
        down, up = (shapes[change.names[part]] for part in ("down", "up"))
        got = (int(up.shape[0]), math.prod(down.shape[1:]))
        fits = got == (expected[0], math.prod(expected[1:])) and math.prod(up.shape[1:]) == down.shape[0]
    if not fits:
        raise CheckpointError(
            f"The LoRA {change.spec.name} was made for another model: it changes {change.parameter} by {list(got)}, "
            f"which is {list(expected)} here."
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
        by_spec = [_changes(file, spec, targets) for file, spec in zip(files, wanted, strict=True)]
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
