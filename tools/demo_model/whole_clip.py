"""The Wan VAE on a whole clip at once, with gradients: what `WanVAE` computes latent frame by latent frame.

A causal convolution over time, rows and columns becomes one over rows and columns whose channels are those of three
frames: cuDNN is ten times as fast at that with the few channels of the demo's VAE. Tensors inside are
[B * frames, C, H, W] in channels-last order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...wanvideo.vae import WanVAE

__all__ = ["decode", "encode"]


def encode(vae: WanVAE, video: Tensor) -> Tensor:
    """As `WanVAE.encode`: [B, 3, F, H, W] -> normalised latents [B, 16, T, h, w], float32."""
    batch = int(video.shape[0])
    encoder = vae.model.encoder
    x = _conv(encoder.conv_in, _frames(video), batch)
    for layer in encoder.down_blocks:
        x = _down(layer, x, batch) if hasattr(layer, "resample") else _residual(layer, x, batch)
    x = _head(encoder, _middle(encoder.mid_block, x, batch), batch)
    x = _clip(_conv(vae.model.quant_conv, x, batch), batch)[:, : vae.z_dim]
    mean, std = vae._constants(x.device)
    return (x.float() - mean) / std


def decode(vae: WanVAE, latents: Tensor) -> Tensor:
    """As `WanVAE.decode` without the clamp: [B, 16, T, h, w] -> [B, 3, F, H, W], float32."""
    batch = int(latents.shape[0])
    decoder = vae.model.decoder
    mean, std = vae._constants(latents.device)
    x = _conv(vae.model.post_quant_conv, _frames((latents * std + mean).to(vae.dtype)), batch)
    x = _middle(decoder.mid_block, _conv(decoder.conv_in, x, batch), batch)
    for level in decoder.up_blocks:
        for layer in level.resnets:
            x = _residual(layer, x, batch)
        for layer in level.upsamplers or ():
            x = _up(layer, x, batch)
    return _clip(_head(decoder, x, batch), batch).float()


def _frames(clip: Tensor) -> Tensor:
    """[B, C, F, H, W] -> [B * F, C, H, W]"""
    return clip.transpose(1, 2).flatten(0, 1).to(memory_format=torch.channels_last)


def _clip(x: Tensor, batch: int) -> Tensor:
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def _conv(conv: Any, x: Tensor, batch: int, stride: int = 1, causal: bool = True) -> Tensor:
    """A 3-D convolution, zeros before the first frame where `causal`, every `stride`-th frame."""
    weight = conv.weight  # [O, C, time, rows, columns]
    taps, rows, columns = (int(n) for n in weight.shape[2:])
    if taps > 1:
        clip = x.unflatten(0, (batch, -1))
        if causal:
            clip = F.pad(clip, (0, 0) * 3 + (taps - 1, 0))
        count = (int(clip.shape[1]) - taps) // stride + 1
        shifted = [clip[:, tap : tap + stride * (count - 1) + 1 : stride] for tap in range(taps)]
        x = torch.cat(shifted, dim=2).flatten(0, 1).to(memory_format=torch.channels_last)
    flat = weight.transpose(1, 2).flatten(1, 2).to(memory_format=torch.channels_last)
    return F.conv2d(x, flat, conv.bias, padding=(rows // 2, columns // 2))


def _norm(norm: Any, x: Tensor) -> Tensor:
    return F.normalize(x, dim=1) * norm.scale * norm.gamma.view(1, -1, 1, 1)


def _residual(layer: Any, x: Tensor, batch: int) -> Tensor:
    short = x if isinstance(layer.conv_shortcut, torch.nn.Identity) else _conv(layer.conv_shortcut, x, batch)
    x = _conv(layer.conv1, F.silu(_norm(layer.norm1, x)), batch)
    return short + _conv(layer.conv2, F.silu(_norm(layer.norm2, x)), batch)


def _middle(block: Any, x: Tensor, batch: int) -> Tensor:
    """Two residual blocks with attention among the positions of each frame between them."""
    x = _residual(block.resnets[0], x, batch)
    for attention, after in zip(block.attentions, block.resnets[1:], strict=True):
        qkv = attention.to_qkv(_norm(attention.norm, x)).flatten(2).transpose(1, 2).unsqueeze(1)
        out = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))  # [B * F, 1, H * W, C]
        out = out.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])
        x = _residual(after, x + attention.proj(out), batch)
    return x


def _head(part: Any, x: Tensor, batch: int) -> Tensor:
    return _conv(part.conv_out, F.silu(_norm(part.norm_out, x)), batch)


def _down(layer: Any, x: Tensor, batch: int) -> Tensor:
    """Half the rows and columns; in time, the first frame as it is, then one for every two."""
    x = layer.resample(x)
    if not hasattr(layer, "time_conv"):
        return x
    clip = x.unflatten(0, (batch, -1))
    if clip.shape[1] == 1:
        return x
    later = _conv(layer.time_conv, x, batch, stride=2, causal=False).unflatten(0, (batch, -1))
    return torch.cat([clip[:, :1], later], dim=1).flatten(0, 1)


def _up(layer: Any, x: Tensor, batch: int) -> Tensor:
    """Twice the rows and columns; in time, the first frame as it is, then two for every one."""
    if hasattr(layer, "time_conv"):
        clip = x.unflatten(0, (batch, -1))
        if clip.shape[1] > 1:
            twice = _conv(layer.time_conv, clip[:, 1:].flatten(0, 1), batch)  # [B * (F - 1), 2 C, H, W]
            twice = twice.unflatten(1, (2, -1)).flatten(0, 1)
            x = torch.cat([clip[:, :1], twice.unflatten(0, (batch, -1))], dim=1).flatten(0, 1)
    return layer.resample(x)
