"""Color correction: frames take on the colors of a reference image, so that long videos do not drift.

Reinhard, Ashikhmin, Gooch & Shirley 2001, "Color Transfer between Images", equations 10-11, in CIE L*a*b* (D65, 2
degrees).
"""

from __future__ import annotations

import torch

__all__ = ["lab_to_rgb", "match_colors", "rgb_to_lab"]

# IEC 61966-2-1 (sRGB), linear RGB to XYZ; CIE 15 white point D65 of the 2 degree observer.
_RGB_TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_WHITE = (0.95047, 1.0, 1.08883)

FRAMES_AT_ONCE = 4
"""A GPU takes as long to launch the work on a frame of 480 x 832 as to do it."""


def _matrix(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(_RGB_TO_XYZ, dtype=torch.float64, device=x.device)


def _planes(values: tuple[float, ...], x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=x.dtype, device=x.device)[:, None, None]


def rgb_to_lab(rgb: torch.Tensor) -> torch.Tensor:
    """sRGB in [0, 1] to L*a*b*, both [..., 3, H, W] float; L in [0, 100]."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055).clamp_min(0) ** 2.4, rgb / 12.92)
    xyz = torch.einsum("ij,...jhw->...ihw", _matrix(rgb).to(rgb), linear) / _planes(_WHITE, rgb)
    f = torch.where(xyz > 0.008856, xyz.clamp_min(0) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(-3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-3)


def lab_to_rgb(lab: torch.Tensor) -> torch.Tensor:
    """L*a*b* to sRGB clipped to [0, 1], both [..., 3, H, W] float."""
    lightness, a, b = lab.unbind(-3)
    y = (lightness + 16) / 116
    f = torch.stack([a / 500 + y, y, (y - b / 200).clamp_min(0)], dim=-3)
    xyz = torch.where(f > 0.2068966, f**3, (f - 16 / 116) / 7.787) * _planes(_WHITE, lab)
    linear = torch.einsum("ij,...jhw->...ihw", _matrix(lab).inverse().to(lab), xyz)
    rgb = torch.where(linear > 0.0031308, 1.055 * linear.clamp_min(0) ** (1 / 2.4) - 0.055, 12.92 * linear)
    return rgb.clamp(0, 1)


def match_colors(frames: torch.Tensor, reference: torch.Tensor, strength: float) -> torch.Tensor:
    """Each frame with the mean and deviation of the reference in every L*a*b* channel.

    Args:
        frames: [3, F, H, W] float32 in [-1, 1].
        reference: [3, H', W'] float32 in [-1, 1].
        strength: share of the corrected frame in the result; 0 gives the frames as they are (the same object).

    Returns:
        [3, F, H, W] float32 in [-1, 1]. A channel without any deviation becomes the reference's mean.
    """
    if strength == 0:
        return frames
    # Statistics need more than the 16 bits that frames may come in; few frames at a time keep the memory small.
    wanted = rgb_to_lab((reference.float() + 1) / 2)
    wanted_mean, wanted_std = _statistics(wanted)
    matched = torch.empty(frames.shape, dtype=torch.float32, device=frames.device)
    for few, made in zip(frames.split(FRAMES_AT_ONCE, 1), matched.split(FRAMES_AT_ONCE, 1), strict=True):
        rgb = (few.float().transpose(0, 1) + 1) / 2  # [n, 3, H, W]
        lab = rgb_to_lab(rgb)
        mean, std = _statistics(lab)
        scale = torch.where(std > 0, wanted_std / std, torch.zeros_like(std))
        corrected = lab_to_rgb((lab - mean) * scale + wanted_mean)
        made.copy_((((1 - strength) * rgb + strength * corrected) * 2 - 1).transpose(0, 1))
    return matched


def _statistics(lab: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and population deviation of each channel of [..., 3, H, W], as [..., 3, 1, 1]."""
    std, mean = torch.std_mean(lab, dim=(-2, -1), correction=0, keepdim=True)
    return mean, std
