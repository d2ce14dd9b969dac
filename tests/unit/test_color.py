"""Color correction against known colors and its own definition."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from wanvideo_infinitetalk.media.color import COLOR_METHODS, lab_to_rgb, match_colors, rgb_to_lab

# sRGB and L*a*b* (D65, 2 degrees) of the primaries and grays, as tables of the color space give them.
KNOWN = [
    ((1, 1, 1), (100.0, 0.0, 0.0)),
    ((0, 0, 0), (0.0, 0.0, 0.0)),
    ((1, 0, 0), (53.24, 80.09, 67.20)),
    ((0, 1, 0), (87.73, -86.18, 83.18)),
    ((0, 0, 1), (32.30, 79.19, -107.86)),
    ((0.5, 0.5, 0.5), (53.39, 0.0, 0.0)),
]


def _frames(count: int = 3, size: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.rand(3, count, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(("rgb", "lab"), KNOWN)
def test_known_colors(rgb, lab) -> None:
    result = rgb_to_lab(torch.tensor(rgb, dtype=torch.float32)[:, None, None]).flatten()
    assert torch.allclose(result, torch.tensor(lab), atol=0.03)


def test_there_and_back() -> None:
    rgb = torch.rand(2, 3, 9, 9)
    assert torch.allclose(lab_to_rgb(rgb_to_lab(rgb)), rgb, atol=1e-5)


def test_means_and_deviations_become_those_of_the_reference() -> None:
    frames = 0.3 * _frames() - 0.2
    reference = 0.4 * _frames(1, 20, seed=1)[:, 0]
    matched = match_colors(frames, reference, 1.0)
    wanted = rgb_to_lab((reference + 1) / 2)
    for frame in matched.unbind(1):
        lab = rgb_to_lab((frame + 1) / 2)
        assert torch.allclose(lab.mean((1, 2)), wanted.mean((1, 2)), atol=0.05)
        assert torch.allclose(lab.std((1, 2), correction=0), wanted.std((1, 2), correction=0), atol=0.05)


def test_strength_blends_linearly() -> None:
    frames, reference = _frames(), _frames(1, 20, seed=1)[:, 0]
    full = match_colors(frames, reference, 1.0)
    assert torch.allclose(match_colors(frames, reference, 0.25), 0.75 * frames + 0.25 * full, atol=1e-6)
    assert match_colors(frames, reference, 0.0) is frames


def test_its_own_colors_change_nothing() -> None:
    frame = _frames(1)
    assert torch.allclose(match_colors(frame, frame[:, 0], 1.0), frame, atol=1e-4)


def test_a_flat_frame_becomes_the_reference_mean() -> None:
    reference = 0.4 * _frames(1, 20, seed=1)[:, 0]
    matched = match_colors(torch.zeros(3, 2, 8, 8), reference, 1.0)
    assert torch.isfinite(matched).all()
    lab = rgb_to_lab((matched[:, 0] + 1) / 2).mean((1, 2))
    assert torch.allclose(lab, rgb_to_lab((reference + 1) / 2).mean((1, 2)), atol=0.05)


def test_inputs_stay_and_results_are_in_range() -> None:
    frames, reference = _frames(), torch.ones(3, 4, 4)
    before = frames.clone()
    matched = match_colors(frames, reference, 1.0)
    assert torch.equal(frames, before)
    assert matched.min() >= -1
    assert matched.max() <= 1


GIVEN = json.loads((Path(__file__).parents[1] / "data/color_methods.json").read_text())
"""A frame and a reference in steps of 1/255, and what color-matcher 0.6.0 (PyPI) makes of them in [0, 1]."""


def _given(name: str) -> torch.Tensor:
    """[3, H, W] in [-1, 1]"""
    return torch.tensor(GIVEN[name]).permute(2, 0, 1).float() * 2 - 1


@pytest.mark.parametrize(
    ("method", "most"), [("mkl", 0.1), ("mvgd", 0.1), ("hm", 3.1), ("hm-mvgd-hm", 3.5), ("hm-mkl-hm", 3.5)]
)
def test_methods_give_what_the_library_of_that_name_gives(method: str, most: float) -> None:
    """In steps of 1/255. Its histograms have bins, ours have not, and these frames have 72 pixels."""
    ours = match_colors(_given("frame").unsqueeze(1), _given("reference"), 1.0, method)[:, 0]
    expected = _given(method).clamp(-1, 1)
    assert float((ours - expected).abs().max()) * 255 / 2 <= most
    assert float((ours - expected).abs().mean()) * 255 / 2 <= 0.6


@pytest.mark.parametrize("method", COLOR_METHODS)
def test_every_method_keeps_its_own_colors_and_takes_flat_frames(method: str) -> None:
    frames = _frames(6)
    assert torch.allclose(match_colors(frames[:, :1], frames[:, 0], 1.0, method), frames[:, :1], atol=1e-3)
    matched = match_colors(torch.zeros(3, 5, 8, 8), frames[:, 0] * 0.5, 1.0, method)
    assert torch.isfinite(matched).all()
    together = match_colors(frames, frames[:, 0] * 0.5, 1.0, method)
    one_by_one = [match_colors(frames[:, i : i + 1], frames[:, 0] * 0.5, 1.0, method) for i in range(6)]
    assert torch.allclose(together, torch.cat(one_by_one, 1), atol=1e-5)


def test_the_linear_map_gives_the_covariance_of_the_reference() -> None:
    frames, reference = 0.3 * _frames() - 0.2, 0.4 * _frames(1, 20, seed=1)[:, 0]
    reference[1] = 0.5 * reference[0] + 0.3 * reference[1]
    matched = match_colors(frames, reference, 1.0, "mkl")
    for frame in matched.unbind(1):
        assert torch.allclose(frame.mean((1, 2)), reference.mean((1, 2)), atol=1e-3)
        ours, wanted = (torch.cov(x.flatten(1), correction=0) for x in (frame, reference))
        assert torch.allclose(ours, wanted, atol=1e-3)


def test_histograms_give_the_values_of_the_reference() -> None:
    frames, reference = _frames(2, 20), 0.4 * _frames(1, 20, seed=1)[:, 0]
    matched = match_colors(frames, reference, 1.0, "hm")
    for frame in matched.unbind(1):
        ours, wanted = (x.flatten(1).sort(-1).values for x in (frame, reference))
        assert torch.allclose(ours, wanted, atol=1e-4)
