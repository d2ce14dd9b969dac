"""The diffusion transformer from its checkpoint files: what they hold, whether they fit together, and the loading.

Sizes are read from shapes; a file states only what shapes do not ("config" in the safetensors metadata: the tiny test
models use it). Files of other models are rejected by name. The reading itself is in `files.py`.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...fp8_optimization import Quantization, quantize_linear, reject_second_quantization, stored_summary
from ..errors import CheckpointError, some
from ..linear.base import QuantizedLinear, store_buffers, store_weight, take_over
from ..linear.gguf import GGUFLinear, GGUFTensor
from ..linear.nvfp4 import NVFP4Linear
from ..modules.attention import AttentionMode
from ..modules.model import AudioConfig, HuMoConfig, WanConfig, WanModel
from .files import CheckpointFile, Progress, Stored
from .quantized import StoredWeight, Weights
from .reading import fitting
from .state_dict import (
    DIT_KIND,
    bare_names,
    check_complete,
    check_heads,
    check_shape,
    diffusers_name,
    kind_of,
    layers_of,
    renamed,
    size_of,
    stated_config,
    stated_number,
)

__all__ = [
    "DitFiles",
    "dit_config",
    "inspect_dit",
    "load_dit",
    "public_names",
]

logger = logging.getLogger(__name__)

Shaped = Stored | StoredWeight

HEAD_DIM = 128
"""Of all public Wan models."""

DIT_ANCHOR = "patch_embedding.weight"
ADAPTER_ANCHOR = "blocks.0.audio_cross_attn.q_linear.weight"
HUMO_ANCHOR = "audio_proj.audio_proj_glob_1.layer.weight"

# A part of a name that only this model has -> what to call it.
OTHER_MODELS = (
    ("vace_blocks.", "a VACE model"),
    ("vace_patch_embedding.", "a VACE model"),
    ("audio_injector.", "a Wan2.2 S2V model"),
    ("pose_patch_embedding.", "a Wan2.2 Animate model"),
    ("control_adapter.", "a camera-control model"),
    ("ref_conv.", "a Fun-Control model"),
    ("img_emb.emb_pos", "a first-and-last-frame model (FLF2V)"),
)

NO_QUANTIZATION = Quantization.parse("disabled")

# Format of a stored weight -> what `fp8_optimization.stored_format` says of a linear that keeps it.
KEPT = {"float8_e4m3fn": "fp8_e4m3fn", "float8_e5m2": "fp8_e5m2", "nvfp4": "fp4", "gguf": "gguf"}


# ------------------------------------------------------------------------------------------------ what a file holds


def public_names(names: Iterable[str], anchor: str) -> dict[str, str]:
    """As `bare_names`; `multitalk_audio_proj.` is another name of `audio_proj.`, and diffusers' names become public."""
    bare = bare_names(names, anchor)
    table = _public_layers(bare) if any(name.startswith("condition_embedder.") for name in bare) else {}
    return {_public_name(name, table): stored for name, stored in bare.items()}


def _public_name(bare: str, table: Mapping[str, str]) -> str:
    if bare in table:  # a modulation: a parameter of its own
        return table[bare]
    layer, dot, last = bare.rpartition(".")
    return renamed(table.get(layer, layer) + dot + last, {"multitalk_audio_proj.": "audio_proj."})


def _public_layers(names: Iterable[str]) -> dict[str, str]:
    """diffusers' name -> public name, of every layer (and modulation) of a DiT with the blocks that `names` have."""
    with torch.device("meta"):
        model = WanModel(WanConfig(model_type="i2v", in_dim=36, dim=HEAD_DIM, ffn_dim=8, num_heads=1, num_layers=1))
    layers = {name if name.endswith("modulation") else name.rpartition(".")[0] for name in model.state_dict()}
    blocks = layers_of(names, "blocks.")
    every = {
        layer.replace("blocks.0.", f"blocks.{number}.", 1)
        for layer in layers
        for number in range(blocks if layer.startswith("blocks.") else 1)
    }
    return {diffusers_name(layer): layer for layer in every}


def dit_config(
    state_dict: Mapping[str, Shaped],
    metadata: Mapping[str, str] | None = None,
    what: str = "The file",
    audio_what: str | None = None,
) -> WanConfig:
    """The configuration of a DiT from the shapes of its tensors (bare public names; the meta device will do).

    Args:
        state_dict: of a T2V or I2V model, with or without the layers of an InfiniteTalk adapter or of HuMo.
        metadata: of the safetensors file; its "config" may state `num_heads`, `text_len` and `audio_blocks`.
        what: names the file in errors.
        audio_what: names the file that the audio layers come from, where that is another.

    Raises:
        CheckpointError: the tensors are those of another model, or do not fit each other.
    """
    stated = stated_config(metadata or {}, what)
    _check_model(state_dict, what)

    def shape(name: str, rank: int = 2) -> tuple[int, ...]:
        return size_of(state_dict, name, rank, what)

    dim, in_dim, *kernel = shape(DIT_ANCHOR, 5)
    humo = HUMO_ANCHOR in state_dict
    image = "img_emb.proj.1.weight" in state_dict
    _check_sizes(dim, in_dim, image, humo, what)
    heads = stated_number(stated, "num_heads", dim // HEAD_DIM, what)
    check_heads(dim, heads, what)
    with fitting(what):
        config = WanConfig(
            model_type="i2v" if image else "t2v",
            patch_size=(kernel[0], kernel[1], kernel[2]),
            text_len=stated_number(stated, "text_len", 512, what),
            in_dim=in_dim,
            dim=dim,
            ffn_dim=shape("blocks.0.ffn.0.weight")[0],
            freq_dim=shape("time_embedding.0.weight")[1],
            text_dim=shape("text_embedding.0.weight")[1],
            out_dim=shape("head.head.weight")[0] // math.prod(kernel),
            num_heads=heads,
            num_layers=layers_of(state_dict, "blocks.", what),
            humo=_humo_config(state_dict, what) if humo else None,
            clip_dim=shape("img_emb.proj.1.weight")[1] if image else WanConfig.clip_dim,
        )
    if humo:
        return config
    with fitting(audio_what or what):
        return replace(config, audio=_audio_config(state_dict, stated, audio_what or what))


def _check_model(names: Iterable[str], what: str) -> None:
    names = set(names)
    for mark, kind in OTHER_MODELS:
        if any(mark in name for name in names):
            raise CheckpointError(f"{what} is {kind}, which is not supported; InfiniteTalk needs Wan2.1 I2V 14B.")
    kind = kind_of(names)
    if DIT_ANCHOR not in names or kind != DIT_KIND:
        raise CheckpointError(
            f"{what} is {kind}, not a Wan2.1 diffusion transformer; InfiniteTalk needs Wan2.1 I2V 14B."
        )
    if "blocks.0.self_attn.q.weight" not in names:
        raise CheckpointError(
            f"{what} is a diffusion transformer without blocks.0.self_attn.q.weight: it is incomplete or no Wan2.1; "
            "InfiniteTalk needs Wan2.1 I2V 14B."
        )


def _check_sizes(dim: int, in_dim: int, image: bool, humo: bool, what: str) -> None:
    kind = None
    if dim == 3072 or (in_dim == 48 and not image):
        kind = "Wan2.2 5B, which works on 48 latent channels of another VAE"
    elif dim == 4096:
        kind = "a LongCat model"
    elif in_dim == 36 and not image and not humo:
        kind = "Wan2.2 I2V, which has no image cross-attention"
    elif in_dim not in (16, 36):
        kind = f"a model that takes {in_dim} input channels (text-to-video takes 16, image-to-video 36)"
    elif image and in_dim != 36:
        kind = f"an image model that takes {in_dim} input channels instead of 36"
    if kind is not None:
        raise CheckpointError(f"{what} is {kind}; it is not supported, InfiniteTalk needs Wan2.1 I2V 14B.")


def _audio_config(state: Mapping[str, Shaped], stated: Mapping[str, Any], what: str) -> AudioConfig | None:
    """Of the InfiniteTalk layers, None where the file has none.

    proj1 reads `window` rows per first frame and proj1_vf `window + vae_scale - 1` rows per later latent frame.
    """
    if not any(name.startswith("audio_proj.proj1.") for name in state):
        return None
    vae_scale = 4
    hidden, first = size_of(state, "audio_proj.proj1.weight", 2, what)
    later = size_of(state, "audio_proj.proj1_vf.weight", 2, what)[1]
    features = (later - first) // (vae_scale - 1)
    output_dim = size_of(state, "blocks.0.audio_cross_attn.kv_linear.weight", 2, what)[1]
    # All public ones read the twelve layers of wav2vec2-base.
    blocks = stated_number(stated, "audio_blocks", 12 if features % 12 == 0 else 1, what)
    if features < 1 or first % features or features % blocks:
        raise CheckpointError(f"{what} has an audio projection of {first} and {later} inputs, which fit no window.")
    return AudioConfig(
        audio_window=first // features,
        intermediate_dim=hidden,
        output_dim=output_dim,
        context_tokens=size_of(state, "audio_proj.proj3.weight", 2, what)[0] // output_dim,
        vae_scale=vae_scale,
        norm_output_audio="audio_proj.norm.weight" in state,
        blocks=blocks,
        channels=features // blocks,
    )


def _humo_config(state: Mapping[str, Shaped], what: str) -> HuMoConfig:
    """Of HuMo's layers: eight rows per latent frame, of the five groups of whisper layers that all public ones read."""
    seq_len, blocks = HuMoConfig.seq_len, HuMoConfig.blocks
    hidden, features = size_of(state, HUMO_ANCHOR, 2, what)
    (output_dim,) = size_of(state, "audio_proj.audio_proj_glob_norm.layer.weight", 1, what)
    return HuMoConfig(
        seq_len=seq_len,
        blocks=blocks,
        channels=features // (seq_len * blocks),
        intermediate_dim=hidden,
        output_dim=output_dim,
        context_tokens=size_of(state, "audio_proj.audio_proj_glob_3.layer.weight", 2, what)[0] // output_dim,
    )


# ------------------------------------------------------------------------------------------------------- loading


class DitFiles:
    """The one or two files of a model, opened: their tensors under public names, and what they make together.

    Raises CheckpointError where a file is of another kind, lacks tensors or has some of another shape, or the adapter
    was made for another model; the sentence names the file at fault. No weight is read before `read`.
    """

    def __init__(self, path: str | Path, adapter: str | Path | None = None) -> None:
        self._stack = ExitStack()
        self._where: dict[str, tuple[CheckpointFile, Weights]] = {}  # public name -> file, its weights
        try:
            base = self._stack.enter_context(CheckpointFile(path))
            self.what = self.audio_what = f"The model {base.path.name}"
            if public_names(base.names, ADAPTER_ANCHOR) and not public_names(base.names, DIT_ANCHOR):
                raise CheckpointError(
                    f"{self.what} is an InfiniteTalk adapter, not the model itself; give it as the adapter, and "
                    "Wan2.1 I2V 14B as the model."
                )
            names = public_names(base.names, DIT_ANCHOR) or {name: name for name in base.names}
            _check_model(names, self.what)
            self._add(base, names, self.what)
            # By itself first, so that what is wrong with one file is not said of the other.
            self.config = dit_config(self.shapes, base.metadata, self.what)
            if adapter is not None:
                self._add_adapter(base, Path(adapter))
        except BaseException:
            self.close()
            raise

    @property
    def shapes(self) -> dict[str, StoredWeight]:
        """Public name -> how it is stored; scales and marks are parts of their weights."""
        return {name: weights.stored[name] for name, (_, weights) in self._where.items()}

    def weights(self, name: str) -> Weights:
        """Those of the file that has `name`."""
        return self._where[name][1]

    def mapped(self, name: str) -> Stored:
        """The tensor as it lies in the file, perhaps unaligned: for the packed ones of a GGUF file."""
        file, weights = self._where[name]
        return file.mapped(weights.stored[name].name)

    def what_of(self, name: str) -> str:
        """The file that holds the tensor `name`, or should, in words for errors."""
        if name in self._where:
            return self._where[name][1].what
        return self.audio_what if _is_audio(name) else self.what

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> DitFiles:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _add(self, file: CheckpointFile, names: Mapping[str, str], what: str) -> None:
        weights = Weights(file.shapes, file.read, file.metadata, what=what, names=names)
        self._where.update(dict.fromkeys(weights, (file, weights)))

    def _add_adapter(self, base: CheckpointFile, path: Path) -> None:
        """Put the adapter's layers in (over those of a merged file)."""
        file = self._stack.enter_context(CheckpointFile(path))
        what = f"The adapter {file.path.name}"
        names = public_names(file.names, ADAPTER_ANCHOR)
        _check_adapter(what, names, file, self.what, self.config)
        for name in [name for name in self._where if _is_audio(name)]:  # all of a merged file's
            del self._where[name]
        self._add(file, names, what)
        self.audio_what = what
        metadata = _joined(base.metadata, file.metadata, what)
        self.config = dit_config(self.shapes, metadata, self.what, what)


def _is_audio(name: str) -> bool:
    """Whether a tensor is one of the InfiniteTalk layers."""
    return name.startswith("audio_proj.") or ".audio_cross_attn." in name or ".norm_x." in name


def _joined(base: Mapping[str, str], adapter: Mapping[str, str], what: str) -> dict[str, str]:
    """Metadata of both files, where the "config" of the adapter (`what`) comes on top."""
    return {**base, "config": json.dumps({**stated_config(base, ""), **stated_config(adapter, what)})}


def _check_adapter(what: str, names: Mapping[str, str], file: CheckpointFile, base_what: str, base: WanConfig) -> None:
    if not any(name.startswith("audio_proj.proj1.") for name in names):
        raise CheckpointError(
            f"{what} is {kind_of(file.names)}, not an InfiniteTalk or MultiTalk adapter (it has no audio_cross_attn)."
            if not names
            else f"{what} is an InfiniteTalk adapter without audio_proj.proj1: it is incomplete."
        )
    if DIT_ANCHOR in names:
        raise CheckpointError(f"{what} is a whole model with audio layers; give it as the model, without an adapter.")
    if base.humo is not None:
        raise CheckpointError(f"{base_what} is HuMo, which takes no InfiniteTalk adapter; give Wan2.1 I2V 14B.")
    (width,) = size_of({bare: file.shapes[stored] for bare, stored in names.items()}, "blocks.0.norm_x.weight", 1, what)
    sizes = (width, layers_of(names, "blocks.", what))
    if sizes != (base.dim, base.num_layers):
        raise CheckpointError(
            f"{what} was made for a model {sizes[0]} wide with {sizes[1]} blocks, but t{base_what[1:]} is "
            f"{base.dim} wide with {base.num_layers}; the 14B adapter needs Wan2.1 I2V 14B."
        )


def inspect_dit(path: str | Path, adapter: str | Path | None = None, quantization: str = "disabled") -> WanConfig:
    """The configuration of the model that these files make, without reading a weight; raises like `load_dit`."""
    with DitFiles(path, adapter) as files:
        _Filler(_empty_model(files), files, wanted=Quantization.parse(quantization)).check()
        return files.config


def _empty_model(files: DitFiles, attention_mode: AttentionMode = "sdpa") -> WanModel:
    with torch.device("meta"):
        model = WanModel(files.config, attention_mode=attention_mode)
    return model.requires_grad_(False).eval()


def load_dit(
    path: str | Path,
    adapter: str | Path | None = None,
    *,
    base_dtype: torch.dtype = torch.bfloat16,
    quantization: str = "disabled",
    device: str | torch.device = "cpu",
    attention_mode: AttentionMode = "sdpa",
    progress: Progress | None = None,
) -> WanModel:
    """The model, in evaluation mode and without gradients, each weight once in memory.

    Args:
        path: one file: safetensors, .pth or GGUF; with or without the audio layers.
        adapter: an InfiniteTalk or MultiTalk file; its audio layers replace those that `path` may hold.
        base_dtype: float32, bfloat16 or float16: what everything is computed in, and what 16- and 32-bit weights
            become.
        quantization: one of `fp8_optimization.QUANTIZATIONS`, for the linears of the blocks. Weights that the file
            stores quantized stay so.
        device: where the weights lie in the end.
        progress: called with (bytes read, bytes in all).

    Raises:
        CheckpointError: missing, damaged or foreign files, and files that do not fit together.
        InputError: an unknown quantization, or one that the file's own contradicts.
    """
    begin = time.monotonic()
    wanted = Quantization.parse(quantization)
    with DitFiles(path, adapter) as files:
        model = _empty_model(files, attention_mode)
        filler = _Filler(model, files, base_dtype, torch.device(device), wanted, progress)
        filler.check()
        filler.fill()
        unpacked = filler.unpacked()
    logger.info(
        "Loaded %s%s: %d blocks of %d, %.2f GiB in %.1f s; linear layers: %s%s",
        Path(path).name,
        f" with {Path(adapter).name}" if adapter is not None else "",
        files.config.num_layers,
        files.config.dim,
        sum(t.nbytes for t in (*model.parameters(), *model.buffers())) / 2**30,
        time.monotonic() - begin,
        stored_summary(model),
        f", unpacked from {unpacked}" if unpacked else "",
    )
    return model


class _Filler:
    """Moves the tensors of the files into a model on the meta device, one at a time."""

    def __init__(
        self,
        model: WanModel,
        files: DitFiles,
        base_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | None = None,
        wanted: Quantization = NO_QUANTIZATION,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.files, self.base_dtype = model, files, base_dtype
        self.device = device or torch.device("cpu")
        self.wanted = wanted
        self.progress = progress
        self.stored = files.shapes
        self.linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}

    def check(self) -> None:
        """Raise CheckpointError unless the files fill the model, InputError for a second quantization."""
        expected, what_of = self.model.state_dict(), self.files.what_of
        for what in dict.fromkeys((self.files.what, self.files.audio_what)):
            check_complete([name for name in expected if what_of(name) == what], self.stored, what)
            unexpected = [name for name in self.stored if name not in expected and what_of(name) == what]
            if unexpected:
                raise CheckpointError(
                    f"{what} holds {len(unexpected)} tensors that Wan2.1 has no place for, such as {some(unexpected)}; "
                    "it is another model."
                )
        for name, blank in expected.items():
            stored = self.stored[name]
            if not stored.fits(blank.shape):
                check_shape(name, stored.stored, blank.shape, what_of(name))
            if not stored.is_floating_point():
                raise CheckpointError(
                    f"{what_of(name)} stores {name} as {stored.dtype} without saying how to unpack it; use another "
                    "version of the file, in 16 bits for instance."
                )
        reject_second_quantization(
            [KEPT.get(self.stored[f"{name}.weight"].format or "") for name in self.linears if _in_blocks(name)],
            self.wanted,
        )

    def fill(self) -> None:
        expected = self.model.state_dict()
        total = sum(self.stored[name].nbytes for name in expected)
        done = 0
        for name in expected:
            layer, _, last = name.rpartition(".")
            linear = self.linears.get(layer) if last == "weight" else None
            if linear is None or not self._fill_quantized(name, linear):
                self._fill_plain(name, linear)
            if linear is not None and _in_blocks(layer):
                # At once, so that no more than one layer is ever held in 16 bits.
                quantize_linear(linear, self.wanted, self.base_dtype)
            if isinstance(linear, QuantizedLinear):
                linear.full_precision = self.stored[name].full_precision
            done += self.stored[name].nbytes
            if self.progress is not None:
                self.progress(done, total)

    def unpacked(self) -> str:
        """How many linears of the blocks are stored in which formats that no layer keeps; "" without any."""
        formats = Counter(self.stored[f"{name}.weight"].format for name in self.linears if _in_blocks(name))
        return ", ".join(f"{count} x {form}" for form, count in formats.items() if form and form not in KEPT)

    def _fill_plain(self, name: str, linear: nn.Linear | None) -> None:
        """A tensor that ends in the base dtype, unpacked where it is quantized."""
        tensor = self.files.weights(name).read(name, self.device)
        # What is quantized next is rounded once, from what the file holds.
        if linear is None or self.wanted.format == "disabled" or not _in_blocks(name):
            tensor = tensor.to(self.base_dtype)
        self._assign(name, tensor)

    def _fill_quantized(self, name: str, linear: nn.Linear) -> bool:
        """Take a linear's weight as the file stores it, where a layer runs it so; False where none does."""
        form, weights = self.stored[name].format, self.files.weights(name)
        if form == "nvfp4":
            packed, block_scales, scale = weights.nvfp4(name, self.device)
            take_over(linear, NVFP4Linear, self.base_dtype)
            store_weight(linear, packed)
            store_buffers(linear, weight_scale=block_scales, weight_scale_2=scale)
            return True
        if form not in KEPT or not _in_blocks(name):
            return False
        if form == "gguf":
            blocks = self.files.mapped(name)
            assert isinstance(blocks, GGUFTensor)
            GGUFLinear.adopt(linear, blocks.to(self.device), self.base_dtype)
            return True
        self._assign(name, weights.as_stored(name, self.device))
        scale_weight = weights.scale(name, self.device)
        if scale_weight is not None:
            store_buffers(linear, scale_weight=scale_weight)
        return True

    def _assign(self, name: str, tensor: Tensor) -> None:
        module, _, last = name.rpartition(".")
        self.model.get_submodule(module).register_parameter(last, nn.Parameter(tensor, requires_grad=False))


def _in_blocks(name: str) -> bool:
    return name.startswith("blocks.")
