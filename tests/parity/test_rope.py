"""Rotary tables and their application against golden item `rope`: relative error at most 1e-6."""

from __future__ import annotations

import torch
from support.goldens import relative_error
from wanvideo_infinitetalk.wanvideo.kernels.rope import axis_pairs, rotate, rotation_3d

TOLERANCE = 1e-6


def test_split_of_the_planes(golden) -> None:
    for head_dim, pairs in golden("rope").config["split_complex"].items():
        assert list(axis_pairs(int(head_dim))) == pairs


def test_rotation(golden) -> None:
    g = golden("rope").float()
    grid = tuple(g.config["grid"])
    for head_dim in g.config["head_dims"]:
        rotation = rotation_3d(grid, head_dim)
        y = rotate(g.inputs[f"x{head_dim}"], rotation)
        assert relative_error(y, g.outputs[f"y{head_dim}"]) <= TOLERANCE
        cos, sin = rotation
        matrices = torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2)).unsqueeze(0)
        assert relative_error(matrices, g.outputs[f"comfy_freqs{head_dim}"]) <= TOLERANCE


def test_tables(golden) -> None:
    g = golden("rope")
    length = g.config["stored_positions"]
    for head_dim in g.config["head_dims"]:
        columns = torch.arange(head_dim // 2).split(axis_pairs(head_dim))
        for axis, grid in enumerate([(length, 1, 1), (1, length, 1), (1, 1, length)]):
            cos, sin = (part[:, 0, columns[axis]] for part in rotation_3d(grid, head_dim))
            assert relative_error(cos, g.outputs[f"freqs{head_dim}_cos"][:, columns[axis]]) <= TOLERANCE
            assert relative_error(sin, g.outputs[f"freqs{head_dim}_sin"][:, columns[axis]]) <= TOLERANCE
