"""Color correction against known colors and its own definition."""

from __future__ import annotations

import pytest
import torch
from wanvideo_infinitetalk.media.color import lab_to_rgb, match_colors, rgb_to_lab

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
