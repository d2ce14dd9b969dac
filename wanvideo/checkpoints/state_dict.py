"""Filling a library's module with the tensors of a public checkpoint, and saying clearly what does not fit.

The modules of transformers and diffusers are built on the meta device (no memory, no initialization), then every
parameter is replaced by a tensor of the file, in memory of its own and aligned for 16-byte kernels.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, some
from ..kernels.layout import ALIGNMENT
from .files import CheckpointFile, Stored, own_memory
from .reading import json_object

logger = logging.getLogger(__name__)

__all__ = [
    "PARTS",
    "bare_names",
    "check_complete",
    "check_heads",
    "check_part",
    "check_shape",
    "diffusers_name",
    "fill_module",
    "find_prefix",
    "kind_of",
    "layers_of",
    "owns_aligned_memory",
    "renamed",
    "size_of",
    "stated_config",
    "stated_number",
]

DIT_KIND = "a diffusion transformer (DiT)"

# A name that only this kind of model has -> what to call it. The first match wins.
_KINDS = (
    ("encoder.downsamples.0.downsamples.", "a Wan2.2 VAE"),
    ("encoder.downsamples.", "a Wan2.1 VAE"),
    ("first_stage_model.", "an image VAE"),
    ("decoder.up_blocks.", "a VAE in diffusers names"),
    ("decoder.7.conv.weight", "a small decoder"),
    ("condition_embedder.", DIT_KIND),
    ("patch_embedding.weight", DIT_KIND),  # CLIP has the name too, and is recognized before
    ("blocks.0.ffn.gate.0.", "a T5 text encoder"),
    ("enc.blk.0.", "a T5 text encoder"),
    ("encoder.block.0.layer.0.SelfAttention.", "a T5 text encoder"),
    ("visual.transformer.", "a CLIP vision model"),
    ("encoder.layers.0.self_attn_layer_norm.", "a Whisper model"),
    ("encoder.layers.0.self_attn.q_proj.", "a CLIP model"),  # Whisper has the name too, and is recognized before
    ("feature_extractor.conv_layers.", "a wav2vec2 model"),
    ("lora_", "a LoRA"),
    ("audio_cross_attn.", "an InfiniteTalk adapter"),
)


def kind_of(names: Iterable[str]) -> str:
    """What a checkpoint with these tensor names is, in words that follow "is"; for error messages only."""
    names = list(names)
    if any("cls_embedding" in name or "class_embedding" in name for name in names):
        return "a CLIP vision model"
    for mark, kind in _KINDS:
        if any(mark in name for name in names):
            return kind
    return "a file of unknown kind"


PARTS = {
    "adapter": "an InfiniteTalk adapter",
    "VAE": "a Wan2.1 VAE",
    "decoder": "a small decoder",
    "text encoder": "a T5 text encoder",
    "CLIP vision model": "a CLIP vision model",
    "wav2vec2 model": "a wav2vec2 model",
    "Whisper model": "a Whisper model",
}
"""What a file is given as -> what `kind_of` calls it."""


def check_part(path: str | Path, part: str) -> None:
    """Raise CheckpointError for a file that is given as another part, by the names of its tensors.

    What is of no known kind is left to the loader, which says what it lacks.
    """
    with CheckpointFile(path) as file:
        found = kind_of(file.names)
    if found not in (PARTS[part], kind_of(())):
        raise CheckpointError(f"{path}, given as the {part}, is {found}, not {PARTS[part]}.")


MAX_LAYERS = 1000

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


def diffusers_name(public: str) -> str:
    """diffusers' name of a layer of the DiT: "blocks.0.ffn.2" -> "blocks.0.ffn.net.2"."""
    for pattern, replacement in _DIFFUSERS_NAMES:
        public = re.sub(pattern, replacement, public)
    return public


def find_prefix(names: Iterable[str], anchor: str) -> str | None:
    """What stands before `anchor` in the shortest name that ends with it ("", "model."); None without such a name."""
    prefixes = [name[: -len(anchor)] for name in names if name == anchor or name.endswith("." + anchor)]
    return min(prefixes, key=len) if prefixes else None


def bare_names(names: Iterable[str], anchor: str) -> dict[str, str]:
    """Name without the prefix -> name in the file, for the part of the file that `anchor` belongs to; {} without it.

    Savers put "model.diffusion_model.", "diffusion_model." or "model." before every name; what stands before `anchor`
    is what goes. Names without that prefix belong to other models in the same file.
    """
    names = list(names)
    prefix = find_prefix(names, anchor)
    if prefix is None:
        return {}
    return {name[len(prefix) :]: name for name in names if name.startswith(prefix)}


def renamed(name: str, table: Mapping[str, str]) -> str:
    """`name` with its beginning replaced by the first entry of `table` (old beginning -> new) that fits."""
    for old, new in table.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def layers_of(names: Iterable[str], stem: str, what: str = "The file") -> int:
    """How many of `stem0.`, `stem1.`, ... there are (`stem` is "encoder.layers.", say).

    Raises CheckpointError for a gap, and for more than MAX_LAYERS: no public model has a tenth of them.
    """
    pattern = re.compile(re.escape(stem) + r"([0-9]+)\.")
    numbers = {match[1] for name in names if (match := pattern.match(name))}
    if len(numbers) > MAX_LAYERS:
        raise CheckpointError(f"{what} has {len(numbers)} layers {stem}*, more than any model; it is damaged.")
    expected = {str(number) for number in range(len(numbers))}
    if numbers != expected:
        gap, odd = (min(group, key=lambda n: (len(n), n)) for group in (expected - numbers, numbers - expected))
        raise CheckpointError(
            f"{what} has a layer {stem}{odd[:20]}, but no {stem}{gap}; it is incomplete, damaged or another model."
        )
    return len(numbers)


def size_of(state: Mapping[str, Any], name: str, rank: int, what: str) -> tuple[int, ...]:
    """The shape of the tensor `name`; CheckpointError unless it has `rank` dimensions, none of them empty."""
    if name not in state:
        raise CheckpointError(f"{what} lacks {name}; it is incomplete or another model.")
    shape = tuple(int(size) for size in state[name].shape)
    if len(shape) != rank or 0 in shape:
        raise CheckpointError(
            f"{what} stores {name} as {list(shape)} instead of {rank} dimensions of 1 or more; it is damaged or "
            "another model."
        )
    return shape


def stated_number(fields: Mapping[str, Any], name: str, otherwise: int, what: str) -> int:
    """The whole number `name` of a model's configuration, `otherwise` where it is not stated.

    Raises CheckpointError for what is no whole number from 1 to 2**31.
    """
    value = fields.get(name)
    if value is None:
        return otherwise
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**31:
        raise CheckpointError(
            f"{what} is configured with {name} = {str(value)[:40]}, which is no number of that kind; download it again."
        )
    return value


def stated_config(metadata: Mapping[str, str], what: str) -> dict[str, Any]:
    """The JSON object under "config" in the metadata of a file, {} without one.

    Our small test models state there what shapes do not (the number of heads, say). Public files have none.
    """
    return json_object(metadata.get("config") or None, f"{what}: the 'config' in its metadata")


def check_heads(width: int, heads: int, what: str) -> None:
    """Raise CheckpointError unless `width` channels divide into `heads` attention heads."""
    if heads < 1 or width < 1 or width % heads:
        raise CheckpointError(f"{what} is {width} wide, which does not divide into {heads} attention heads.")


def check_complete(expected: Iterable[str], names: Mapping[str, Any], what: str) -> None:
    """Raise CheckpointError where `names` lacks some of the `expected` ones."""
    expected = list(expected)
    missing = [name for name in expected if name not in names]
    if missing:
        raise CheckpointError(
            f"{what} lacks {len(missing)} of {len(expected)} tensors, such as {some(missing)}; "
            "it is incomplete or another model."
        )


def check_shape(name: str, stored: Stored, expected: torch.Size, what: str) -> None:
    """Raise CheckpointError unless the tensor `name` has the shape that the others imply."""
    if stored.shape != expected:
        raise CheckpointError(
            f"{what} stores {name} as {list(stored.shape)}, but its other tensors ask for {list(expected)}; "
            "it is damaged or another model."
        )


def owns_aligned_memory(tensor: Tensor) -> bool:
    """True when `tensor` is contiguous, starts its own storage, shares it with nothing, and is 16-byte aligned."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor.is_contiguous() and whole and tensor.data_ptr() % ALIGNMENT == 0


def fill_module(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    what: str,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    float32_names: Callable[[str], bool] = lambda name: False,
) -> None:
    """Give every parameter and buffer of `module` its tensor of `tensors`, then freeze it in evaluation mode.

    Args:
        module: on the meta device; its state-dict names are the names in `tensors`.
        tensors: may hold more than the module needs. Nothing here is written to; a tensor that is already as it should
            be (device, dtype, memory of its own) becomes the parameter itself.
        what: names the file in errors ("the VAE wan_2.1_vae.safetensors").
        float32_names: parameters that stay float32 whatever `dtype` says.

    Raises CheckpointError naming the first tensors that are missing or of another shape.
    """
    expected = module.state_dict()
    check_complete(expected, tensors, what)
    filled = {}
    for name, blank in expected.items():
        tensor = tensors[name]
        check_shape(name, tensor, blank.shape, what)
        filled[name] = _placed(tensor, device, torch.float32 if float32_names(name) else dtype)
    unused = len(tensors) - len(expected)
    if unused > 0:
        logger.debug("%s: %d tensors are not needed", what, unused)
    module.load_state_dict(filled, strict=True, assign=True)
    module.eval().requires_grad_(False)


def _placed(tensor: Tensor, device: str | torch.device, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype` on `device`: itself when it is so already and owns its memory, otherwise one copy."""
    if not tensor.is_floating_point():
        dtype = tensor.dtype
    device = torch.device(device)
    same_device = tensor.device.type == device.type and device.index in (None, tensor.device.index)
    if same_device and tensor.dtype == dtype and owns_aligned_memory(tensor):
        return tensor.detach()
    return own_memory(tensor.detach(), device, dtype)
