"""CLIP ViT-H/14's vision tower: what the DiT's image attention sees of the image.

transformers' CLIPVisionModel without its last block: the features that Wan2.1 uses are those after all blocks but one
(31 of 32), all tokens, not normalized.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoints.files import CheckpointFile
from ..checkpoints.quantized import Weights
from ..checkpoints.reading import fitting
from ..checkpoints.state_dict import (
    check_heads,
    fill_module,
    find_prefix,
    layers_of,
    renamed,
    size_of,
    stated_config,
    stated_number,
)
from ..errors import CheckpointError, InputError
from .base import Encoder, check_tensors, check_unused, empty_transformer

__all__ = ["IMAGE_MEAN", "IMAGE_STD", "ClipVision", "transformers_names"]

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
"""Statistics of CLIP's training images, RGB in [0, 1]."""

_HEADS = {1280: 16, 1664: 16}  # the widths whose heads are not 64 channels: ViT-H, ViT-bigG

_OFFICIAL = {
    "pre_norm.": "pre_layrnorm.",  # so named in the library
    "post_norm.": "post_layernorm.",
    "patch_embedding.": "embeddings.patch_embedding.",
}
_OFFICIAL_LAYER = {
    "norm1.": "layer_norm1.",
    "norm2.": "layer_norm2.",
    "attn.proj.": "self_attn.out_proj.",
    "mlp.0.": "mlp.fc1.",
    "mlp.2.": "mlp.fc2.",
}


def transformers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official tensors (`cls_embedding`, `transformer.N.attn.to_qkv...`) by the names of transformers.

    The fused q|k|v rows become three tensors (views). Tensors that the vision tower does not have are left out.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "cls_embedding":
            out["embeddings.class_embedding"] = tensor.reshape(-1)
        elif name == "pos_embedding":
            out["embeddings.position_embedding.weight"] = tensor.reshape(tensor.shape[-2:])
        elif name.startswith("transformer."):
            _, number, rest = name.split(".", 2)
            stem = f"encoder.layers.{number}."
            if rest.startswith("attn.to_qkv."):
                kind = rest.rpartition(".")[2]
                for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                    out[f"{stem}self_attn.{part}_proj.{kind}"] = rows
            else:
                out[stem + renamed(rest, _OFFICIAL_LAYER)] = tensor
        else:
            out[renamed(name, _OFFICIAL)] = tensor
    return out


_ANCHORS = ("cls_embedding", "embeddings.class_embedding")
"""Of official names and of transformers'."""


def _weights(source: CheckpointFile | Mapping[str, Tensor], what: str) -> Weights:
    return Weights.of(source, _ANCHORS, kind="a CLIP vision model", what=what)


def _vision_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vision tower's tensors in transformers' names without a prefix, from official or transformers' names."""
    return transformers_names(state) if _ANCHORS[0] in state else dict(state)


def _config(state: Mapping[str, Tensor], fields: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Arguments of transformers' CLIPVisionConfig from the shapes, one block less than the file has."""
    layers = layers_of(state, "encoder.layers.", what)
    if layers < 2:
        raise CheckpointError(f"{what} is no whole CLIP vision model: it lacks blocks (it has {layers}).")
    width, _, _, size = size_of(state, "embeddings.patch_embedding.weight", 4, what)
    positions, _ = size_of(state, "embeddings.position_embedding.weight", 2, what)
    heads = stated_number(fields, "num_attention_heads", _HEADS.get(width, width // 64), what)
    check_heads(width, heads, what)
    return {
        "hidden_size": width,
        "intermediate_size": size_of(state, "encoder.layers.0.mlp.fc1.weight", 2, what)[0],
        "num_hidden_layers": layers - 1,
        "num_attention_heads": heads,
        "image_size": round((positions - 1) ** 0.5) * size,
        "patch_size": size,
        "hidden_act": "gelu",  # exact; the library's default, quick_gelu, is OpenAI's and is wrong here
        "layer_norm_eps": 1e-5,
    }


def _empty_model(weights: Weights, fields: Mapping[str, Any]) -> tuple[Any, str]:
    """transformers' model that the weights fill, on the meta device, and what it puts before each name."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    what = weights.what
    with fitting(what):
        tensors = _vision_tensors(weights.blank())
        config = _config(tensors, fields, what)
        # 257 tokens once per window: eager is fast enough.
        model = empty_transformer(CLIPVisionModel, CLIPVisionConfig(**config))
    # Some releases of the library put the whole tower behind "vision_model.".
    outer = find_prefix(model.state_dict(), _ANCHORS[1]) or ""
    unused = rf"({re.escape(outer)})?(encoder\.layers\.{config['num_hidden_layers']}\..*|embeddings\.position_ids|head)"
    named = {outer + name: tensor for name, tensor in tensors.items()}
    check_tensors(model, named, what)
    check_unused(named, model.state_dict(), unused, what)
    return model, outer


class ClipVision(Encoder):
    """Images to CLIP features."""

    @classmethod
    def load(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> ClipVision:
        """Read a ViT-H vision tower in official or transformers names. Raises CheckpointError for anything else."""
        with CheckpointFile(path) as file:
            what = f"The CLIP vision file {path}"
            return cls._filled(_weights(file, what), stated_config(file.metadata, str(path)), dtype, device)

    @staticmethod
    def inspect(path: str | Path) -> None:
        """Raise what `load` raises, without reading a weight."""
        with CheckpointFile(path) as file:
            _empty_model(_weights(file, f"The CLIP vision file {path}"), stated_config(file.metadata, str(path)))

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Tensor],
        fields: Mapping[str, Any] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        what: str = "The CLIP vision model",
    ) -> ClipVision:
        """The same from tensors. `fields` may hold `num_attention_heads`, which shapes do not show (16 in ViT-H)."""
        return cls._filled(_weights(state, what), fields or {}, dtype, device)

    @classmethod
    def _filled(
        cls, weights: Weights, fields: Mapping[str, Any], dtype: torch.dtype, device: str | torch.device
    ) -> ClipVision:
        model, outer = _empty_model(weights, fields)
        tensors = _vision_tensors(dict(weights))
        named = {outer + name: tensor for name, tensor in tensors.items()}
        fill_module(model, named, what=weights.what, dtype=dtype, device=device)
        for module in model.modules():
            if isinstance(getattr(module, "position_ids", None), Tensor):  # no tensor of the file: made anew
                count = tensors["embeddings.position_embedding.weight"].shape[0]
                module.position_ids = torch.arange(count, device=device)[None]
        return cls(model)

    @property
    def image_size(self) -> int:
        """Pixels of the square that the tower sees (224)."""
        return int(self.model.config.image_size)

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.hidden_size)

    def preprocess(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, 3, image_size, image_size], normalized: bicubic, squeezed, not cropped."""
        size = (self.image_size, self.image_size)
        pixels = F.interpolate(image.float(), size=size, mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(values, device=image.device).view(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
        return (pixels * 0.5 + 0.5 - mean) / std

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """Features [B, tokens, hidden], float32, of preprocessed `pixels` [B, 3, h, w].

        Sizes other than `image_size` (multiples of the patch) get an interpolated position table, as in CLIP.
        """
        other_size = tuple(pixels.shape[-2:]) != (self.image_size, self.image_size)
        output = self.model(pixels.to(self.device, self.dtype), interpolate_pos_encoding=other_size)
        hidden: Tensor = output.last_hidden_state.float()
        return hidden

    def encode(self, image: Tensor) -> Tensor:
        """Features [B, 257, 1280], float32 on the tower's device, of RGB images [B, 3, H, W] floats in [-1, 1].

        Raises InputError for another shape.
        """
        if image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point() or 0 in image.shape:
            raise InputError(
                f"CLIP takes float images of shape [batch, 3, height, width]; it got {list(image.shape)} of "
                f"{image.dtype}."
            )
        return self.features(self.preprocess(image.to(self.device)))
