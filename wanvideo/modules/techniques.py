"""Changes of a forward that need no training; all of them are off unless a forward is asked for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels.rope import Grid
from ..runtime.parallel import TokenSplit

__all__ = ["BlockResidual", "NormalizedAttention", "cross_frame_gain", "normalized_guidance"]


@dataclass(frozen=True, eq=False)
class NormalizedAttention:
    """A prompt to move away from inside the text attention, see `normalized_guidance`.

    Attributes:
        negative: its embedding [n, text_dim].
        scale: how far, 1 is not at all.
        tau: largest ratio of L1 norms of what comes out and of the attention to the prompt.
        alpha: share of what comes out in the result, 0 to 1.
    """

    negative: torch.Tensor
    scale: float = 11.0
    tau: float = 2.5
    alpha: float = 0.25


@dataclass(eq=False)
class BlockResidual:
    """What all blocks of a model together added to the tokens in a forward, for another one.

    Attributes:
        value: [B, L, C]; set by a forward that computes it.
        reuse: add `value` in place of running the blocks.
    """

    value: torch.Tensor | None = None
    reuse: bool = False


def normalized_guidance(
    positive: torch.Tensor, negative: torch.Tensor, scale: float, tau: float, alpha: float
) -> torch.Tensor:
    """Normalized attention guidance (Chen et al. 2025, arXiv 2505.21179, algorithm 1), of the attention to two prompts.

        g = scale z+ - (scale - 1) z-,   g' = g min(1, tau |z+|_1 / |g|_1),   z = alpha g' + (1 - alpha) z+

    Args:
        positive, negative: attended tokens [B, L, H, D]; norms are over all channels of a token.

    Returns:
        [B, L, H, D] of `positive`'s dtype; computed in float32.
    """
    z = positive.float()
    guided = torch.lerp(negative.float(), z, scale)
    sizes = [x.abs().sum((-2, -1), keepdim=True) for x in (z, guided)]
    limit = (tau * sizes[0] / sizes[1].clamp_min(1e-7)).clamp_max(1)
    return torch.lerp(z, guided.mul_(limit), alpha).to(positive.dtype)  # `guided` is fresh, and as large as all tokens


def cross_frame_gain(
    q: torch.Tensor, k: torch.Tensor, grid: Grid, weight: float, split: TokenSplit | None = None, places: int = 0
) -> torch.Tensor:
    """The factor by which Enhance-A-Video (Luo et al. 2025, arXiv 2502.07508) strengthens an attention's output.

    The cross-frame intensity is the mean of what a place of the image attends to itself in the other frames, were there
    no other places: the off-diagonal mean of softmax(q k^T / sqrt(D)) over time. The gain is that times
    (frames + weight), and at least 1.

    Args:
        q, k: [B, L, H, D], L = frames * rows * columns of the grid.
        weight: the temperature; larger is stronger.
        split: how the `places` of a frame are divided, where q and k are a share of them.

    Returns:
        [B, 1, 1, 1] float32.
    """
    frames = grid[0]
    if frames == 1:
        return torch.ones(q.shape[0], 1, 1, 1, device=q.device)

    def by_place(x: torch.Tensor) -> torch.Tensor:
        places: torch.Tensor = x.unflatten(1, (frames, -1))
        return places.permute(0, 2, 3, 1, 4)  # [B, places, H, frames, D]

    scores = by_place(q) @ by_place(k).transpose(-1, -2)  # [B, places, H, frames, frames]
    shares = (scores.float() * q.shape[-1] ** -0.5).softmax(-1)
    itself = shares.diagonal(dim1=-2, dim2=-1).sum(-1)  # of `frames`, which all shares add up to
    intensity: torch.Tensor = ((frames - itself) / (frames * (frames - 1))).mean((1, 2))
    if split is not None:
        intensity = split.mean(intensity, places)
    return (intensity * (frames + weight)).clamp_min(1)[:, None, None, None]
