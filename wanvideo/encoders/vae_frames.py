"""The convolutional stacks of the Wan VAE on frames with channels last, one chunk of a video after the other.

The weights and the numbers are those of diffusers' modules; the way through memory is another. Frames stay
[B, T, H, W, C] throughout, as the tensor cores read them; a bias and a residual are not added where they arise but by
the one kernel that also norms, activates, pads and remembers (`kernels.frames`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import frames as triton_kernels
from ..kernels import reference
from ..modules.attention import attention

__all__ = ["ALIGNED_CHANNELS", "FrameDecoder", "FrameEncoder"]

HISTORY = 2
"""Frames that a convolution over three frames reads before its own."""

ALIGNED_CHANNELS = 8
"""cuDNN reads channels 16 bytes at a time; the first and last convolution have 3 or 16, padded with zeros to that."""

TILE = 128
"""Output channels that cuDNN's kernels for Hopper compute at a time. Where little of a tile is missing it is computed
whole: for 96 channels cuDNN takes an older kernel instead, 1.5 times as slow on an H200."""


class Pending:
    """The sum y + bias + residual, not added up yet: [B, T, H, W, C], [C] or None, like y or None.

    Taken once, by the kernel that adds it up: its parts, the largest tensors there are, do not outlive that call.
    """

    def __init__(self, y: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
        self._parts = [(y, bias, residual)]

    def take(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self._parts.pop()


class _Stack:
    """What encoder and decoder share. One object per video: it holds the frames that convolutions remember."""

    def __init__(self, module: Any) -> None:
        self.module = module
        # Eager PyTorch computes the same on a CPU.
        self._kernels: Any = triton_kernels if module.conv_in.weight.is_cuda else reference
        self._history: dict[nn.Module, Tensor | None] = {}
        self._weights: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}

    def _parameters(self, layer: Any, channels: int) -> tuple[Tensor, Tensor | None]:
        """Weight with channels last and bias of a convolution that is given so many channels.

        What is given beyond the weight's own are zeros; what it gives is padded to `ALIGNED_CHANNELS` or a `TILE`.
        """
        if layer not in self._weights:
            weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
            spare_in, spare_out = channels - weight.shape[1], -weight.shape[0] % ALIGNED_CHANNELS
            if -weight.shape[0] % TILE <= TILE // 4:
                spare_out = -weight.shape[0] % TILE
            if spare_out or spare_in:
                weight = F.pad(weight, (0, 0) * (weight.ndim - 2) + (0, spare_in, 0, spare_out))
            order = torch.channels_last_3d if weight.ndim == 5 else torch.channels_last
            self._weights[layer] = (weight.to(memory_format=order), bias)
        return self._weights[layer]

    def _convolve(self, layer: Any, padded: Tensor) -> Pending:
        """A convolution of `padded` [B, T, H, W, C] without padding of its own; its bias is left to the next kernel."""
        weight, bias = self._parameters(layer, padded.shape[-1])
        if weight.ndim == 5:
            y = F.conv3d(padded.movedim(-1, 1), weight, stride=layer.stride).movedim(1, -1)
        else:
            images = padded.flatten(0, 1).movedim(-1, 1)
            y = F.conv2d(images, weight, stride=layer.stride).movedim(1, -1).unflatten(0, padded.shape[:2])
        # cuDNN answers with channels last; on a CPU a library may not, and one copy keeps the promise.
        return Pending(y.contiguous()[..., : layer.out_channels], bias)

    def _pad(
        self, x: Pending, layer: nn.Module | None, gamma: Tensor | None, kept: int, before: int, after: int, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The padded input of `layer`, and the sum itself where it is to be kept."""
        history = self._history.get(layer) if layer is not None else None
        padded, sums, remembered = self._kernels.pad_frames(*x.take(), gamma, history, kept, before, after, keep)
        if layer is not None and kept:
            self._history[layer] = remembered
        return padded, sums

    def _residual_block(self, block: Any, x: Pending) -> Pending:
        gamma1, gamma2 = (norm.gamma.detach().flatten() for norm in (block.norm1, block.norm2))
        padded, sums = self._pad(x, block.conv1, gamma1, HISTORY, 1, 1, keep=True)
        hidden = self._convolve(block.conv1, padded)
        del padded  # not two of them at a time
        padded, _ = self._pad(hidden, block.conv2, gamma2, HISTORY, 1, 1, keep=False)
        y, bias, _ = self._convolve(block.conv2, padded).take()
        shortcut = block.conv_shortcut
        if sums is not None and isinstance(shortcut, nn.Conv3d):
            sums = F.linear(sums, shortcut.weight.detach().flatten(1), shortcut.bias)
        return Pending(y, bias, sums)

    def _attention(self, block: Any, x: Pending) -> Pending:
        """Self-attention of the pixels of each frame, one head."""
        _, sums = self._pad(x, None, None, 0, 0, 0, keep=True)
        assert sums is not None
        gamma = block.norm.gamma.detach().flatten().float()
        exact = F.normalize(sums.float(), dim=-1) * (sums.shape[-1] ** 0.5) * gamma
        tokens = exact.to(sums.dtype).flatten(2, 3).flatten(0, 1)  # [B T, H W, C]
        qkv = F.linear(tokens, block.to_qkv.weight.detach().flatten(1), block.to_qkv.bias)
        q, k, v = (part.unsqueeze(2) for part in qkv.chunk(3, dim=-1))
        attended = attention(q, k, v, "sdpa").squeeze(2)
        out = F.linear(attended, block.proj.weight.detach().flatten(1))
        return Pending(out.view(sums.shape), block.proj.bias, sums)

    def _middle(self, block: Any, x: Pending) -> Pending:
        x = self._residual_block(block.resnets[0], x)
        for middle, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            x = self._residual_block(resnet, self._attention(middle, x))
        return x

    def _first(self, layer: nn.Module, frames: Tensor) -> Pending:
        """The first convolution, of frames [B, c, T, H, W]."""
        spare = -frames.shape[1] % ALIGNED_CHANNELS
        # Without spare channels F.pad gives the strides of `frames`, not channels last.
        y = F.pad(frames.movedim(1, -1), (0, spare)).contiguous()
        padded, _ = self._pad(Pending(y), layer, None, HISTORY, 1, 1, keep=False)
        return self._convolve(layer, padded)

    def _last(self, x: Pending) -> Tensor:
        """Norm, SiLU and the last convolution: [B, c, T, H, W]."""
        layer = self.module.conv_out
        gamma = self.module.norm_out.gamma.detach().flatten()
        padded, _ = self._pad(x, layer, gamma, HISTORY, 1, 1, keep=False)
        y, bias, _ = self._convolve(layer, padded).take()
        return (y if bias is None else y + bias).movedim(-1, 1)


class FrameDecoder(_Stack):
    """diffusers' WanDecoder3d, one latent frame per call."""

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Latents [B, z, 1, h, w] -> frames [B, 3, 1, 8 h, 8 w] at first, then [B, 3, 4, 8 h, 8 w]."""
        x = self._first(self.module.conv_in, latents)
        x = self._middle(self.module.mid_block, x)
        for block in self.module.up_blocks:
            for resnet in block.resnets:
                x = self._residual_block(resnet, x)
            if block.upsamplers is not None:
                x = self._upsample(block.upsamplers[0], x)
        return self._last(x)

    def _upsample(self, layer: Any, x: Pending) -> Pending:
        split = 1
        if layer.mode == "upsample3d":
            if layer.time_conv in self._history:
                padded, _ = self._pad(x, layer.time_conv, None, HISTORY, 0, 0, keep=False)
                x, split = self._convolve(layer.time_conv, padded), 2
            else:  # the first latent frame stands for one frame, and no convolution over time reads it
                self._history[layer.time_conv] = None
        padded = self._kernels.upsample_frames(*x.take(), split)
        return self._convolve(layer.resample[1], padded)


class FrameEncoder(_Stack):
    """diffusers' WanEncoder3d, one latent frame's worth of frames per call."""

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Tensor:
        """Frames [B, 3, 1 or 4, H, W] -> [B, 2 z, 1, H / 8, W / 8]."""
        x = self._first(self.module.conv_in, frames)
        for layer in self.module.down_blocks:
            x = self._downsample(layer, x) if hasattr(layer, "resample") else self._residual_block(layer, x)
        x = self._middle(self.module.mid_block, x)
        return self._last(x)

    def _downsample(self, layer: Any, x: Pending) -> Pending:
        padded, _ = self._pad(x, None, None, 0, 0, 1, keep=False)
        x = self._convolve(layer.resample[1], padded)
        if layer.mode == "downsample3d":
            first = layer.time_conv not in self._history
            padded, sums = self._pad(x, layer.time_conv, None, 1, 0, 0, keep=first)
            x = Pending(sums) if sums is not None else self._convolve(layer.time_conv, padded)
        return x
