"""HuMo's modules besides their numbers in tests/parity."""

from __future__ import annotations

import pytest
import torch
from wanvideo_infinitetalk.wanvideo.errors import InputError
from wanvideo_infinitetalk.wanvideo.modules import humo
from wanvideo_infinitetalk.wanvideo.modules.humo import (
    AudioCrossAttentionWrapper,
    WanHuMoCrossAttention,
    humo_audio_window,
    resample_features,
)

GRID = (3, 2, 4)
TOKENS = 24


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_windows_reach_beyond_the_clip_with_zeros() -> None:
    features = torch.arange(1.0, 7.0).view(6, 1, 1)  # frame n holds n + 1
    windows, behind = humo_audio_window(features, 9, 2)
    assert behind == 11
    assert windows[:, :, 0, 0].tolist() == [
        [0, 0, 0, 1, 2, 3, 4, 5],
        [2, 3, 4, 5, 6, 0, 0, 0],
        [6, 0, 0, 0, 0, 0, 0, 0],
    ]
    single, _ = humo_audio_window(features, 1)
    assert single[:, :, 0, 0].tolist() == [[0, 0, 0, 0, 0, 1, 2, 3]]
    with pytest.raises(InputError, match="4n\\+1"):
        humo_audio_window(features, 8)


def test_resampling_keeps_the_ends() -> None:
    features = torch.linspace(0, 1, 50)[None, :, None]
    rows = resample_features(features, 50, 25)
    assert rows.shape == (1, 25, 1)
    torch.testing.assert_close(rows[0, :, 0], torch.linspace(0, 1, 25))
    assert resample_features(features, 50, 25, output_len=7).shape == (1, 7, 1)


def test_grids_as_tensor_or_ints_and_videos_in_a_batch() -> None:
    module = WanHuMoCrossAttention(16, 16, 2, kv_dim=8)
    x, audio = torch.randn(2, TOKENS, 16), torch.randn(2, 6, 8)
    both = module(x, audio, GRID)
    assert torch.equal(module(x, audio, torch.tensor([GRID, GRID])), both)
    for i in range(2):
        torch.testing.assert_close(module(x[i : i + 1], audio[i : i + 1], GRID), both[i : i + 1])
    # Each frame attends to its own tokens only.
    changed = audio.clone()
    changed[:, 4:] += 1
    difference = (module(x, changed, GRID) - both).abs().amax((0, 2))
    assert difference[:16].max() == 0
    assert difference[16:].min() > 0


def test_without_norms_and_with_other_widths() -> None:
    module = WanHuMoCrossAttention(16, 24, 2, kv_dim=None, qk_norm=False)
    assert not [name for name in module.state_dict() if "norm" in name]
    assert module(torch.randn(1, TOKENS, 16), torch.randn(1, 6, 16), GRID).shape == (1, TOKENS, 24)


def test_scale_weighs_what_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    module = AudioCrossAttentionWrapper(16, 16, 2, kv_dim=8)
    x, audio = torch.randn(1, TOKENS, 16), torch.randn(1, 6, 8)
    full = module(x, audio, GRID) - x
    torch.testing.assert_close(module(x, audio, GRID, 0.25) - x, 0.25 * full, rtol=1e-4, atol=1e-6)
    assert torch.equal(module(x, audio, GRID, 0.0), x)


def test_the_mode_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention_mode: str) -> torch.Tensor:
        modes.append(attention_mode)
        return torch.zeros(q.shape)

    monkeypatch.setattr(humo, "attention", spy)
    x, audio = torch.randn(1, TOKENS, 16), torch.randn(1, 6, 8)
    module = AudioCrossAttentionWrapper(16, 16, 2, kv_dim=8, attention_mode="sageattn_3")
    module(x, audio, GRID)
    module(x, audio, GRID, attention_mode="eager")
    assert modes == ["sageattn_3", "eager"]


def test_counts_that_do_not_fit_are_rejected() -> None:
    module = WanHuMoCrossAttention(16, 16, 2, kv_dim=8)
    x, audio = torch.zeros(1, TOKENS, 16), torch.zeros(1, 6, 8)
    for wrong in ((x[:, 1:], audio), (x, audio[:, 1:]), (x, torch.cat((audio, audio)))):
        with pytest.raises(InputError, match="do not fit a grid"):
            module(*wrong, GRID)
    with pytest.raises(InputError, match="share one grid"):
        module(x, audio, torch.tensor([GRID, (2, 3, 4)]))
    with pytest.raises(InputError, match="heads"):
        WanHuMoCrossAttention(16, 16, 3)
