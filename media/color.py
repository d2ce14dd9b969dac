"""Color correction: frames take on the colors of a reference image, so that long videos do not drift.

`reinhard`: mean and deviation of every channel of CIE L*a*b* (D65, 2 degrees). Reinhard, Ashikhmin, Gooch & Shirley
2001, "Color Transfer between Images", equations 10-11.

`mkl`: mean and covariance of RGB, by the linear map that changes colors least. Pitie & Kokaram 2007, "The Linear
Monge-Kantorovitch Linear Colour Mapping for Example-Based Colour Transfer", equation 12. `mvgd` is the same map.

`hm`: the distribution of every channel of RGB (histogram matching), here without bins. `hm-mkl-hm`, `hm-mvgd-hm`: one
after the other.

`flashtalk`: Reinhard's by the constants of SoulX-FlashTalk, which differ from those of `reinhard` behind the fifth
digit: up to 2e-4 of the values in [-1, 1], 5e-3 of L*a*b*.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

__all__ = ["COLOR_METHODS", "FLASHTALK", "lab_to_rgb", "match_colors", "rgb_to_lab"]


@dataclass(frozen=True)
class Lab:
    """Constants of sRGB (IEC 61966-2-1) to L*a*b* under D65 (CIE 15), and back.

    Attributes:
        to_xyz, from_xyz: linear RGB to XYZ, and its inverse; None: the exact one.
        kappa: slope of L* at black.
        least: of X / Xn, Y / Yn, Z / Zn, which end at 1 where it is given.
    """

    to_xyz: tuple[tuple[float, ...], ...]
    from_xyz: tuple[tuple[float, ...], ...] | None = None
    kappa: float = 7.787 * 116
    least: float | None = None

    def matrix(self, like: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.to_xyz, dtype=torch.float64, device=like.device)

    def inverse(self, like: torch.Tensor) -> torch.Tensor:
        if self.from_xyz is None:
            return self.matrix(like).inverse()
        return torch.tensor(self.from_xyz, dtype=torch.float64, device=like.device)


CIE = Lab(((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227)))
FLASHTALK = Lab(
    ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041)),
    ((3.2404542, -1.5371385, -0.4985314), (-0.9692660, 1.8760108, 0.0415560), (0.0556434, -0.2040259, 1.0572252)),
    kappa=903.3,
    least=1e-8,
)
_WHITE = (0.95047, 1.0, 1.08883)
_LINEAR = 0.008856
"""Of X / Xn, below which f is linear."""

FRAMES_AT_ONCE = 4
"""Fewer launches than one frame at a time, and little memory; how many are best was not measured."""


def _planes(values: tuple[float, ...], x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=x.dtype, device=x.device)[:, None, None]


def rgb_to_lab(rgb: torch.Tensor, space: Lab = CIE) -> torch.Tensor:
    """sRGB in [0, 1] to L*a*b*, both [..., 3, H, W] float; L in [0, 100]."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055).clamp_min(0) ** 2.4, rgb / 12.92)
    xyz = torch.einsum("ij,...jhw->...ihw", space.matrix(rgb).to(rgb), linear) / _planes(_WHITE, rgb)
    if space.least is not None:
        xyz = xyz.clamp(space.least, 1)
    f = torch.where(xyz > _LINEAR, xyz.clamp_min(0) ** (1 / 3), (space.kappa * xyz + 16) / 116)
    x, y, z = f.unbind(-3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-3)


def lab_to_rgb(lab: torch.Tensor, space: Lab = CIE) -> torch.Tensor:
    """L*a*b* to sRGB clipped to [0, 1], both [..., 3, H, W] float."""
    lightness, a, b = lab.unbind(-3)
    y = (lightness + 16) / 116
    f = torch.stack([a / 500 + y, y, (y - b / 200).clamp_min(0)], dim=-3)
    xyz = torch.where(f > 0.2068966, f**3, (116 * f - 16) / space.kappa) * _planes(_WHITE, lab)
    linear = torch.einsum("ij,...jhw->...ihw", space.inverse(lab).to(lab), xyz)
    rgb = torch.where(linear > 0.0031308, 1.055 * linear.clamp_min(0) ** (1 / 2.4) - 0.055, 12.92 * linear)
    return rgb.clamp(0, 1)


def match_colors(
    frames: torch.Tensor, reference: torch.Tensor, strength: float, method: str = "reinhard"
) -> torch.Tensor:
    """Each frame in the colors of the reference.

    Args:
        frames: [3, F, H, W] float32 in [-1, 1].
        reference: [3, H', W'] float32 in [-1, 1].
        strength: share of the corrected frame in the result; 0 gives the frames as they are (the same object).
        method: one of `COLOR_METHODS`.

    Returns:
        [3, F, H, W] float32 in [-1, 1].
    """
    if strength == 0:
        return frames
    wanted = (reference.float() + 1) / 2
    matched = torch.empty(frames.shape, dtype=torch.float32, device=frames.device)
    # Statistics need more than the 16 bits that frames may come in; few frames at a time keep the memory small.
    for few, made in zip(frames.split(FRAMES_AT_ONCE, 1), matched.split(FRAMES_AT_ONCE, 1), strict=True):
        rgb = (few.float().transpose(0, 1) + 1) / 2  # [n, 3, H, W]
        corrected = rgb
        for name in method.split("-"):
            corrected = METHODS[name](corrected, wanted)
        corrected = corrected.clamp(0, 1)
        made.copy_((((1 - strength) * rgb + strength * corrected) * 2 - 1).transpose(0, 1))
    return matched


def _reinhard(rgb: torch.Tensor, wanted: torch.Tensor, space: Lab = CIE) -> torch.Tensor:
    """[n, 3, H, W] and [3, H', W'] in [0, 1] -> the first in the colors of the second; likewise below.

    A channel without any deviation becomes the reference's mean.
    """
    wanted_mean, wanted_std = _statistics(rgb_to_lab(wanted, space))
    lab = rgb_to_lab(rgb, space)
    mean, std = _statistics(lab)
    scale = torch.where(std > 0, wanted_std / std, torch.zeros_like(std))
    return lab_to_rgb((lab - mean) * scale + wanted_mean, space)


def _statistics(lab: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and population deviation of each channel of [..., 3, H, W], as [..., 3, 1, 1]."""
    # In double precision, in which equal values have their own mean: the rest would be taken for a deviation.
    mean = lab.mean(dim=(-2, -1), keepdim=True, dtype=torch.float64).to(lab)
    square = (lab - mean).square().mean(dim=(-2, -1), keepdim=True, dtype=torch.float64)
    return mean, square.sqrt().to(lab)


def _monge_kantorovitch(rgb: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    mean, covariance = _moments(rgb)
    wanted_mean, wanted_covariance = _moments(wanted)
    root, inverse = _powers(covariance, 0.5), _powers(covariance, -0.5)
    matrix = inverse @ _powers(root @ wanted_covariance @ root, 0.5) @ inverse  # [n, 3, 3]
    moved = matrix.to(rgb) @ (rgb.flatten(2) - mean.to(rgb)) + wanted_mean.to(rgb)
    return moved.reshape(rgb.shape)


def _moments(rgb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [..., 3, 1] and covariance [..., 3, 3] of the colors of [..., 3, H, W], float64."""
    colors = rgb.flatten(-2)
    mean = colors.mean(-1, keepdim=True)
    apart = colors - mean
    covariance = (apart @ apart.transpose(-1, -2)).double() / colors.shape[-1]
    return mean.double(), covariance


def _powers(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    """A power of symmetric matrices [..., 3, 3]; of directions without any deviation it is 0."""
    values, vectors = torch.linalg.eigh(matrix)
    least = 1e-9 * values.amax(-1, keepdim=True).clamp_min(1e-12)
    powers = torch.where(values > least, values.clamp_min(least) ** exponent, 0.0)
    power: torch.Tensor = (vectors * powers.unsqueeze(-2)) @ vectors.transpose(-1, -2)
    return power


def _histograms(rgb: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The value of a pixel becomes that of the same rank in the reference; equal values stay equal."""
    values = rgb.flatten(2).contiguous()  # [n, 3, N]; searchsorted copies and warns where its inputs are strided
    ranked = values.sort(-1).values.contiguous()  # likewise
    rank = torch.searchsorted(ranked, values, right=True) / values.shape[-1]  # of the last equal one
    sorted_wanted = wanted.flatten(1).sort(-1).values  # [3, M]
    last = sorted_wanted.shape[-1] - 1
    place = (rank * (last + 1) - 1).clamp(0, last)
    low = place.floor().long()
    share = place - low
    lows = sorted_wanted.expand(len(rgb), -1, -1)
    below, above = lows.gather(-1, low), lows.gather(-1, (low + 1).clamp(max=last))
    return (below + share * (above - below)).reshape(rgb.shape)


METHODS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "reinhard": _reinhard,
    "mkl": _monge_kantorovitch,
    "mvgd": _monge_kantorovitch,
    "hm": _histograms,
    "flashtalk": partial(_reinhard, space=FLASHTALK),
}
"""Name of a method -> its function."""

COLOR_METHODS = (*METHODS, "hm-mvgd-hm", "hm-mkl-hm")
"""What a video may ask for; methods joined by - follow each other."""
