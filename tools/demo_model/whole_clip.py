"""The Wan VAE on a whole clip at once, with gradients: what `WanVAE` computes latent frame by latent frame.

A causal convolution over time, rows and columns becomes one over rows and columns with an output for each tap in time,
and the outputs of three frames are added: cuDNN is many times as fast at that with the few channels of the demo's VAE.
Tensors inside are [frames * B, C, H, W] in channels-last order, all clips' first frames first, so that a shift in time
is a slice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...wanvideo.encoders.vae import WanVAE
from ...wanvideo.modules.attention import attention

__all__ = ["decode", "encode"]


def encode(vae: WanVAE, video: Tensor) -> Tensor:
    """As `WanVAE.encode`: [B, 3, F, H, W] -> normalized latents [B, 16, T, h, w], float32."""
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
    """[B, C, F, H, W] -> [F * B, C, H, W], channels last as every input of a convolution here."""
    return clip.permute(2, 0, 1, 3, 4).flatten(0, 1).contiguous(memory_format=torch.channels_last)


def _clip(x: Tensor, batch: int) -> Tensor:
    frames: Tensor = x.unflatten(0, (-1, batch)).permute(1, 2, 0, 3, 4)
    return frames


def _conv(conv: Any, x: Tensor, batch: int) -> Tensor:
    """A 3-D convolution, causal: before the first frame are zeros."""
    taps = _taps(conv, x)
    out = taps[-1]
    if len(taps) == 3 and x.shape[0] > batch:
        second = out[batch : 2 * batch] + taps[1][:batch]
        later = out[2 * batch :] + taps[1][batch:-batch] + taps[0][: -2 * batch]
        out = torch.cat([out[:batch], second, later])
    return out if conv.bias is None else out + conv.bias.view(1, -1, 1, 1).to(out)


def _taps(conv: Any, x: Tensor) -> tuple[Tensor, ...]:
    """What each tap in time makes of each frame, without the bias."""
    weight = conv.weight  # [O, C, time, rows, columns]
    count, rows, columns = (int(n) for n in weight.shape[2:])
    flat = weight.permute(2, 0, 1, 3, 4).flatten(0, 1).contiguous(memory_format=torch.channels_last)  # like x
    return F.conv2d(x, flat, padding=(rows // 2, columns // 2)).chunk(count, dim=1)


def _norm(norm: Any, x: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp(min=1e-12)
    normed: Tensor = x * length.reciprocal().to(x) * (norm.scale * norm.gamma).view(1, -1, 1, 1).to(x)
    return normed


def _residual(layer: Any, x: Tensor, batch: int) -> Tensor:
    short = x if isinstance(layer.conv_shortcut, torch.nn.Identity) else _conv(layer.conv_shortcut, x, batch)
    x = _conv(layer.conv1, F.silu(_norm(layer.norm1, x)), batch)
    return short + _conv(layer.conv2, F.silu(_norm(layer.norm2, x)), batch)


def _middle(block: Any, x: Tensor, batch: int) -> Tensor:
    """Two residual blocks with attention among the positions of each frame between them."""
    x = _residual(block.resnets[0], x, batch)
    for layer, after in zip(block.attentions, block.resnets[1:], strict=True):
        qkv = layer.to_qkv(_norm(layer.norm, x)).flatten(2).transpose(1, 2).unsqueeze(2)
        q, k, v = qkv.chunk(3, dim=-1)  # [B * F, H * W, 1, C] each
        out = attention(q, k, v, "sdpa").squeeze(2).transpose(1, 2).unflatten(2, x.shape[2:])
        x = _residual(after, x + layer.proj(out), batch)
    return x


def _head(part: Any, x: Tensor, batch: int) -> Tensor:
    return _conv(part.conv_out, F.silu(_norm(part.norm_out, x)), batch)


def _down(layer: Any, x: Tensor, batch: int) -> Tensor:
    """Half the rows and columns; in time, the first frame as it is, then one for every two."""
    x = layer.resample(x)
    if not hasattr(layer, "time_conv") or x.shape[0] == batch:
        return x
    last = x.shape[0] // batch - 2
    picked = [tap.unflatten(0, (-1, batch))[at : at + last : 2] for at, tap in enumerate(_taps(layer.time_conv, x))]
    later = (picked[0] + picked[1] + picked[2]).flatten(0, 1) + layer.time_conv.bias.view(1, -1, 1, 1)
    return torch.cat([x[:batch], later.to(x)])


def _up(layer: Any, x: Tensor, batch: int) -> Tensor:
    """Twice the rows and columns; in time, the first frame as it is, then two for every one."""
    if hasattr(layer, "time_conv") and x.shape[0] > batch:
        twice = _conv(layer.time_conv, x[batch:], batch)  # [(F - 1) * B, 2 C, H, W]
        twice = twice.unflatten(0, (-1, batch)).unflatten(2, (2, -1)).transpose(1, 2)  # [F - 1, 2, B, C, H, W]
        # Again in the layout of `_frames`, whatever the parts had.
        x = torch.cat([x[:batch], twice.flatten(0, 2)]).contiguous(memory_format=torch.channels_last)
    resampled: Tensor = layer.resample(x)
    return resampled
