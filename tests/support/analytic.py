"""A velocity and a VAE that are formulas, as the goldens of the public loops use them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class AnalyticModel:
    """0.3 x + 0.1 sin x + 0.05 mean(context) + 0.2 a / (1 + |a|) + 0.02 y[4:20] + 0.01 t / 1000, a = mean(audio)."""

    calls: list[dict[str, Any]] = field(default_factory=list)

    def __call__(
        self, x, t, context, clip_fea=None, y=None, audio=None, ref_target_masks=None, *, audio_scale=1.0,
        attention_mode=None,
    ):  # fmt: skip
        assert audio_scale == 1.0
        self.calls.append(dict(x=x, t=t, context=context, y=y, audio=audio, masks=ref_target_masks))
        a = audio.mean()
        v = 0.3 * x + 0.1 * torch.sin(x) + 0.05 * context.mean() + 0.2 * a / (1 + a.abs())
        return (v + 0.02 * y[0, 4:20] + 0.01 * t / 1000).unsqueeze(0)


@dataclass
class LinearVae:
    """latent = M x 8 x 8 block means (frame 0 alone, then means of four); decode = P z, repeated, clamped."""

    m: torch.Tensor
    p: torch.Tensor

    def encode(self, video, *, tiled=False):
        blocks = video[0].unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).mean(dim=(3, 5))  # [3, F, h, w]
        later = blocks[:, 1:].unflatten(1, (-1, 4)).mean(2) if blocks.shape[1] > 1 else blocks[:, 1:]
        return torch.einsum("ij,jthw->ithw", self.m, torch.cat([blocks[:, :1], later], 1)).unsqueeze(0)

    def decode(self, latents, *, tiled=False):
        small = torch.einsum("ij,jthw->ithw", self.p, latents[0])
        frames = torch.cat([small[:, :1], small[:, 1:].repeat_interleave(4, 1)], 1)
        return frames.repeat_interleave(8, 2).repeat_interleave(8, 3).clamp(-1, 1).unsqueeze(0)
