"""Rotary position embedding: angles per position, and the rotation itself.

RoFormer (arXiv 2104.09864), section 3.4, with interleaved pairs: channels (2j, 2j+1) form the j-th plane. Wan spreads
the planes of one head over three axes (time, height, width), each with frequencies of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["Grid", "Rotation", "RotationTables", "axis_pairs", "rotate", "rotation_1d", "rotation_3d"]

Grid = tuple[int, int, int]
"""Latent frames, token rows, token columns: plain Python ints."""

THETA = 10000.0


class Rotation(NamedTuple):
    """Cosine and sine per position and plane, float32, broadcastable to [..., L, H, D/2]."""

    cos: torch.Tensor
    sin: torch.Tensor


def rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Turn the planes of every head: (a, b) -> (a cos - b sin, a sin + b cos), in float32.

    Args:
        x: [..., L, H, D], any float dtype; not written to.
        rotation: cos and sin that broadcast against [..., L, H, D/2].

    Returns:
        [..., L, H, D], contiguous, of x's dtype.
    """
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


def rotation_1d(positions: torch.Tensor, head_dim: int) -> Rotation:
    """Angles position * 10000^(-2j/head_dim) of real-valued positions.

    Args:
        positions: [L], any real dtype.
        head_dim: channels of one head, even.

    Returns:
        cos and sin, each [L, 1, head_dim/2] float32: one rotation for all heads.
    """
    frequencies = _frequencies(head_dim, positions.device).float()
    angles = positions.float()[:, None, None] * frequencies  # [L, 1, D/2]
    return Rotation(angles.cos(), angles.sin())


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Planes of one head that belong to time, height and width: 64 -> (12, 10, 10), 128 -> (22, 21, 21)."""
    spatial = head_dim // 6
    return head_dim // 2 - 2 * spatial, spatial, spatial


def rotation_3d(grid: Grid, head_dim: int, device: torch.device | str | None = None) -> Rotation:
    """Angles of the tokens of a grid, ordered time, then row, then column, positions counted from 0.

    Computed in float64, because float32 angles of a long clip are off by 1e-5 and more.

    Returns:
        cos and sin, each [T*H*W, 1, head_dim/2] float32.
    """
    angles = []
    for axis, (length, pairs) in enumerate(zip(grid, axis_pairs(head_dim), strict=True)):
        positions = torch.arange(length, dtype=torch.float64, device=device)
        along_axis = torch.outer(positions, _frequencies(2 * pairs, device))  # [length, pairs]
        view = [1, 1, 1, pairs]
        view[axis] = length
        angles.append(along_axis.view(view).expand(*grid, pairs))
    table = torch.cat(angles, dim=-1).flatten(0, 2).unsqueeze(1)  # [L, 1, D/2]
    return Rotation(table.cos().float(), table.sin().float())


class RotationTables:
    """The rotations of the last few grids, so that the steps of one clip share one table.

    Belongs to one model: nothing is shared between models, and nobody writes to a table.
    """

    def __init__(self, head_dim: int, keep: int = 2) -> None:
        self.head_dim = head_dim
        self.keep = keep
        self._tables: dict[tuple[Grid, torch.device], Rotation] = {}

    def get(self, grid: Grid, device: torch.device) -> Rotation:
        """The rotation of `grid` on `device`, see `rotation_3d`."""
        key = (grid, device)
        if key not in self._tables:
            while len(self._tables) >= self.keep:
                del self._tables[next(iter(self._tables))]
            self._tables[key] = rotation_3d(grid, self.head_dim, device)
        return self._tables[key]


def _frequencies(channels: int, device: torch.device | str | None) -> torch.Tensor:
    exponents = torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels
    return THETA**-exponents  # [channels/2] float64
