"""Small random models of the parts around the DiT, as state dicts in the names of the public checkpoints."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn


def randomize(module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Fill every parameter so that signals keep their size: matrices ~ 1/sqrt(fan in), norms ~ 1, biases ~ 0.1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith(("weight", "gamma")):
                parameter.copy_(1 + 0.1 * noise)
            elif parameter.squeeze().ndim <= 1:
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    module.eval()
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def replace(names: dict[str, Tensor], *rules: tuple[str, str]) -> dict[str, Tensor]:
    """The same tensors with every (pattern, replacement) applied to the names, in order."""
    out = {}
    for name, tensor in names.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        out[name] = tensor
    return out


def diffusers_vae(**changes) -> Any:
    from diffusers import AutoencoderKLWan

    options = {
        "base_dim": 8,
        "z_dim": 16,
        "dim_mult": [1, 2, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    }
    return AutoencoderKLWan(**{**options, **changes})


def public_vae_names(state: dict[str, Tensor], num_res_blocks: int) -> dict[str, Tensor]:
    """diffusers' names -> those of Wan2.1_VAE.pth."""
    stride = num_res_blocks + 2

    def upsample(match: re.Match[str]) -> str:
        position = num_res_blocks + 1 if match[2] == "upsamplers" else int(match[3])
        return f"decoder.upsamples.{int(match[1]) * stride + position}."

    out = {}
    for name, tensor in state.items():
        name = re.sub(r"^decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", upsample, name)
        out[name] = tensor
    return replace(
        out,
        (r"^quant_conv", "conv1"),
        (r"^post_quant_conv", "conv2"),
        (r"down_blocks", "downsamples"),
        (r"mid_block\.resnets\.0", "middle.0"),
        (r"mid_block\.attentions\.0", "middle.1"),
        (r"mid_block\.resnets\.1", "middle.2"),
        (r"^(encoder|decoder)\.conv_in", r"\1.conv1"),
        (r"^(encoder|decoder)\.norm_out", r"\1.head.0"),
        (r"^(encoder|decoder)\.conv_out", r"\1.head.2"),
        (r"(middle\.[02]|samples\.\d+)\.norm1", r"\1.residual.0"),
        (r"(middle\.[02]|samples\.\d+)\.conv1", r"\1.residual.2"),
        (r"(middle\.[02]|samples\.\d+)\.norm2", r"\1.residual.3"),
        (r"(middle\.[02]|samples\.\d+)\.conv2", r"\1.residual.6"),
        (r"conv_shortcut", "shortcut"),
    )


TINY_WAV2VEC2 = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "conv_dim": [16] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


def transformers_wav2vec2(**changes) -> nn.Module:
    """Random weights; its state dict has the public names (without "wav2vec2.")."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(**{**TINY_WAV2VEC2, **changes})
    model = Wav2Vec2Model._from_config(config, attn_implementation="eager")
    randomize(model)
    return model


def transformers_t5(**changes) -> nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    options = {"vocab_size": 120, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
    config = UMT5Config(**{**options, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, **changes})
    model = UMT5EncoderModel._from_config(config, attn_implementation="eager")
    randomize(model)
    return model


def hugging_face_t5_names(model: Any) -> dict[str, Tensor]:
    """As the published files: `shared.weight` once, `encoder.block...`."""
    stack = {f"encoder.{name}": tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    stack["shared.weight"] = stack.pop("encoder.embed_tokens.weight")
    return stack


_T5 = (
    ("norm1", "layer.0.layer_norm"),
    ("attn", "layer.0.SelfAttention"),
    ("pos_embedding.embedding", "layer.0.SelfAttention.relative_attention_bias"),
    ("norm2", "layer.1.layer_norm"),
    ("ffn.gate.0", "layer.1.DenseReluDense.wi_0"),
    ("ffn.fc1", "layer.1.DenseReluDense.wi_1"),
    ("ffn.fc2", "layer.1.DenseReluDense.wo"),
)


def official_to_hugging_face_t5(state: dict[str, Tensor]) -> dict[str, Tensor]:
    rules = [(rf"^blocks\.(\d+)\.{re.escape(old)}\.", rf"encoder.block.\1.{new}.") for old, new in _T5]
    return replace(state, *rules, (r"^token_embedding", "shared"), (r"^norm\.", "encoder.final_layer_norm."))


def hugging_face_to_official_t5(state: dict[str, Tensor]) -> dict[str, Tensor]:
    # The position table before the attention that it is part of.
    rules = [(rf"^encoder\.block\.(\d+)\.{re.escape(new)}\.", rf"blocks.\1.{old}.") for old, new in reversed(_T5)]
    return replace(state, *rules, (r"^shared", "token_embedding"), (r"^encoder\.final_layer_norm", "norm"))


def transformers_clip(**changes) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    options = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = CLIPVisionConfig(**{**options, "image_size": 42, "patch_size": 14, "hidden_act": "gelu", **changes})
    model = CLIPVisionModel._from_config(config, attn_implementation="eager")
    randomize(model)
    return model


def bare_clip_names(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("vision_model."): tensor.clone() for name, tensor in model.state_dict().items()}


def official_clip_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names without prefix -> those of the official file, q|k|v fused."""
    fused: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            parts = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            fused[name.replace("self_attn.q_proj", "attn.to_qkv")] = torch.cat(parts)
        else:
            fused[name] = tensor
    out = replace(
        fused,
        (r"^encoder\.layers\.", "transformer."),
        (r"layer_norm([12])", r"norm\1"),
        (r"self_attn\.out_proj", "attn.proj"),
        (r"mlp\.fc1", "mlp.0"),
        (r"mlp\.fc2", "mlp.2"),
        (r"^pre_layrnorm", "pre_norm"),
        (r"^post_layernorm", "post_norm"),
        (r"^embeddings\.patch_embedding", "patch_embedding"),
    )
    out["cls_embedding"] = out.pop("embeddings.class_embedding")[None, None]
    out["pos_embedding"] = out.pop("embeddings.position_embedding.weight")[None]
    return out
