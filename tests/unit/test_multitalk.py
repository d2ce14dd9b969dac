"""Audio packing, speaker ranges, the reference map and the audio attention, besides their numbers in tests/parity."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from wanvideo_infinitetalk.multitalk import multitalk
from wanvideo_infinitetalk.multitalk.multitalk import (
    AudioProjModel,
    RotaryPositionalEmbedding1D,
    SingleStreamAttention,
    SingleStreamMultiAttention,
    calculate_x_ref_attn_map,
    get_attn_map_with_target,
    pack_audio_windows,
    speaker_ranges,
)
from wanvideo_infinitetalk.wanvideo.errors import BackendUnavailableError, InputError

GRID = (3, 2, 4)
FRAMES, PER_FRAME = 3, 8
TOKENS = FRAMES * PER_FRAME


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# ------------------------------------------------------------------------------------------------ audio tokens


def test_windows_are_packed_in_the_order_of_the_paper() -> None:
    frames = torch.arange(9).view(1, 9, 1, 1, 1)
    rows = torch.arange(5).view(1, 1, 5, 1, 1)
    first, later = pack_audio_windows((10 * frames + rows).expand(2, 9, 5, 3, 7))
    assert first.shape == (2, 1, 5, 3, 7)
    assert later.shape == (2, 2, 8, 3, 7)
    assert first[1, 0, :, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert later[1, 0, :, 2, 6].tolist() == [10, 11, 12, 22, 32, 42, 43, 44]
    assert later[1, 1, :, 0, 0].tolist() == [50, 51, 52, 62, 72, 82, 83, 84]


@pytest.mark.parametrize(("frames", "window"), [(8, 5), (0, 5), (9, 4)])
def test_windows_that_cannot_be_packed_are_rejected(frames: int, window: int) -> None:
    with pytest.raises(InputError, match=r"4\*n\+1 frames and an odd window"):
        pack_audio_windows(torch.zeros(1, frames, window, 2, 3))


def test_a_single_latent_frame_can_be_projected() -> None:
    module = AudioProjModel(5, 8, 2, 8, 16, 8, 4)
    first, later = pack_audio_windows(torch.randn(2, 1, 5, 2, 8))
    assert module(first, later).shape == (2, 1, 4, 8)
    _, four_frames_more = pack_audio_windows(torch.randn(2, 5, 5, 2, 8))
    torch.testing.assert_close(module(first, four_frames_more)[:, :1], module(first, later))


# --------------------------------------------------------------------------------------------- speaker ranges


def test_one_and_two_speakers_have_the_public_ranges() -> None:
    assert speaker_ranges(1) == [(0, 4)]
    assert speaker_ranges(2) == [(0, 4), (20, 24)]


@pytest.mark.parametrize("speakers", [1, 2, 3, 4])
@pytest.mark.parametrize(("class_range", "interval"), [(24, 4), (48, 6), (30, 5)])
def test_no_range_meets_the_background_or_another(speakers: int, class_range: int, interval: int) -> None:
    ranges = speaker_ranges(speakers, class_range, interval)
    assert len(ranges) == speakers
    background = class_range / 2
    for low, high in ranges:
        assert high - low == pytest.approx(interval)
        assert low >= 0
        assert high <= class_range
        assert high <= background - interval / 2 or low >= background + interval / 2
    for (_, end), (start, _) in itertools.pairwise(ranges):
        assert end <= start


def test_more_speakers_than_fit_are_rejected() -> None:
    with pytest.raises(InputError, match="1 to 4 speakers"):
        speaker_ranges(5)
    with pytest.raises(InputError):
        speaker_ranges(0)


@pytest.mark.parametrize("speakers", [2, 3, 4])
def test_positions_follow_the_largest_map(speakers: int) -> None:
    module = SingleStreamMultiAttention(16, 2)
    maps = torch.rand(speakers + 1, TOKENS)
    maps[:, 0] = 0  # every row's minimum and maximum are known: 0 and 1
    for row in range(speakers + 1):
        maps[row, row + 1] = 1
    positions, winner = module.query_positions(maps), maps.argmax(0)
    for i, (low, high) in enumerate(speaker_ranges(speakers)):
        assert positions[i + 1] == pytest.approx(high)
        torch.testing.assert_close(positions[winner == i], (low + maps[i] * (high - low))[winner == i])
    assert (positions[winner == speakers] == 12).all()
    keys = module.key_positions(speakers, 5)
    assert keys.tolist() == [(low + high) / 2 for low, high in speaker_ranges(speakers) for _ in range(5)]
    assert 12 not in keys


def test_a_flat_map_is_no_reason_to_fail() -> None:
    positions = SingleStreamMultiAttention(16, 2).query_positions(torch.ones(3, TOKENS))
    assert positions.isfinite().all()


# -------------------------------------------------------------------------------------------------- rotary 1-D


def test_rotary_embedding_is_a_complex_rotation() -> None:
    x, positions = torch.randn(2, 3, 5, 8), torch.tensor([0.0, 1.5, 2.0, 12.0, 23.9])
    y = RotaryPositionalEmbedding1D(8)(x, positions)
    angles = positions.double()[:, None] * 10000.0 ** (-torch.arange(4).double() / 4)
    turned = torch.view_as_complex(x.double().unflatten(-1, (4, 2))) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(y.double(), torch.view_as_real(turned).flatten(-2), rtol=0, atol=3e-6)
    assert torch.equal(y[:, :, 0], x[:, :, 0])
    assert y.is_contiguous()


# ---------------------------------------------------------------------------------------------- reference map


def _dense_map(q: torch.Tensor, k: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Straight from the formula, in float64, one head at a time."""
    q, k, masks = q.double(), k.double(), masks.double()
    heads = []
    for head in range(q.shape[2]):
        shares = torch.softmax(q[0, :, head] @ k[0, :, head].T / math.sqrt(q.shape[3]), dim=-1)
        heads.append(torch.stack([(shares * mask).sum(-1) / mask.sum() for mask in masks]))
    return torch.stack(heads).mean(0)


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("split", [1, 2, 4, 1000])
def test_every_head_counts_and_chunks_do_not(heads: int, split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(1, TOKENS, heads, 8), torch.randn(1, TOKENS, heads, 8)
    masks = (torch.rand(3, PER_FRAME) > 0.4).float()
    masks[:, 0] = 1
    expected = _dense_map(q, k[:, :PER_FRAME], masks)
    for budget in (multitalk.MAP_CHUNK_BYTES, 1):
        monkeypatch.setattr(multitalk, "MAP_CHUNK_BYTES", budget)
        result = get_attn_map_with_target(q, k, GRID, masks, split)
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-7)
        assert result.shape == (3, TOKENS)


def test_scores_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest(TorchFunctionMode):
        elements = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func in (torch.matmul, torch.softmax):
                self.elements = max(self.elements, out.numel())
            return out

    monkeypatch.setattr(multitalk, "MAP_CHUNK_BYTES", 64 * 1024)
    q, k = torch.randn(1, 2048, 4, 8), torch.randn(1, 256, 4, 8)
    with Largest() as largest:
        calculate_x_ref_attn_map(q, k, torch.ones(2, 256), split_num=1)
    assert 0 < 4 * largest.elements <= 64 * 1024  # all at once would be 8 MiB


def test_an_empty_mask_gives_zeros() -> None:
    q, k = torch.randn(1, TOKENS, 2, 8), torch.randn(1, PER_FRAME, 2, 8)
    masks = torch.ones(2, PER_FRAME)
    masks[0] = 0
    result = calculate_x_ref_attn_map(q, k, masks)
    assert torch.equal(result[0], torch.zeros(TOKENS))
    torch.testing.assert_close(result[1], torch.full((TOKENS,), 1 / PER_FRAME))
    assert torch.equal(calculate_x_ref_attn_map(q, k, masks.bool()), result)


def test_low_precision_tokens_give_a_float32_map() -> None:
    q, k = torch.randn(1, TOKENS, 2, 8).bfloat16(), torch.randn(1, PER_FRAME, 2, 8).bfloat16()
    masks = torch.ones(1, PER_FRAME).index_fill(1, torch.tensor([0, 3]), 0)
    result = calculate_x_ref_attn_map(q, k, masks)
    torch.testing.assert_close(result.double(), _dense_map(q, k, masks), rtol=1e-5, atol=1e-7)


def test_maps_that_cannot_be_made_are_rejected() -> None:
    q, k, masks = torch.zeros(1, TOKENS, 2, 8), torch.zeros(1, PER_FRAME, 2, 8), torch.ones(2, PER_FRAME)
    for wrong in ((q.expand(2, -1, -1, -1), k, masks), (q, k[:, :, :1], masks), (q, k, masks[:, 1:])):
        with pytest.raises(InputError, match="attention map of queries"):
            calculate_x_ref_attn_map(*wrong)
    with pytest.raises(InputError, match="ref_target_masks"):
        get_attn_map_with_target(q, k, GRID)


# ------------------------------------------------------------------------------------------- audio attention


def _attention_by_hand(module: SingleStreamAttention, x: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
    """[1, T*S, C] and [T, N, Ca], one frame and one head at a time, in float64."""
    module = module.double()
    frames = []
    for tokens, speech in zip(x[0].double().unflatten(0, (FRAMES, PER_FRAME)), audio.double(), strict=True):
        q, (k, v) = module.q_linear(tokens), module.kv_linear(speech).chunk(2, dim=-1)
        heads = [
            torch.softmax(qh @ kh.T / math.sqrt(module.head_dim), dim=-1) @ vh
            for qh, kh, vh in zip(*(y.split(module.head_dim, dim=-1) for y in (q, k, v)), strict=True)
        ]
        frames.append(module.proj(torch.cat(heads, dim=-1)))
    out = torch.cat(frames).unsqueeze(0)
    module.float()
    return out


@pytest.mark.parametrize("bias", [True, False])
def test_single_stream_attends_inside_each_frame(bias: bool) -> None:
    module = SingleStreamAttention(16, 8, 2, bias)
    x, audio = torch.randn(1, TOKENS, 16), torch.randn(FRAMES, 5, 8)
    torch.testing.assert_close(module(x, audio, GRID).double(), _attention_by_hand(module, x, audio))
    by_tensors = module(x, audio, tuple(torch.tensor(n) for n in GRID))
    assert torch.equal(by_tensors, module(x, audio, GRID))


def test_several_speakers_without_a_map_are_voiced_alike() -> None:
    module = SingleStreamMultiAttention(16, 2, encoder_hidden_states_dim=8)
    x, audio = torch.randn(1, TOKENS, 16), torch.randn(1, FRAMES, 10, 8)
    y = module(x, audio, GRID, None, 2)
    torch.testing.assert_close(y.double(), _attention_by_hand(module, x, audio[0]))
    maps = torch.rand(3, TOKENS)
    routed = module(x, audio, GRID, maps, 2)
    assert (routed - y).abs().max() > 1e-3
    assert torch.equal(module(x, audio, GRID, maps), routed), "the number of speakers is read off the map"


@pytest.mark.parametrize("speakers", [1, 2, 3, 4])
def test_a_frame_without_audio_receives_zero(speakers: int) -> None:
    module = SingleStreamMultiAttention(16, 2, encoder_hidden_states_dim=8)
    x, audio = torch.randn(1, TOKENS, 16), torch.randn(1, FRAMES - 1, 3 * speakers, 8)
    maps = torch.rand(speakers + 1, TOKENS)
    voiced = TOKENS - PER_FRAME
    y = module(x, audio, GRID, maps, speakers)
    assert torch.count_nonzero(y[:, voiced:]) == 0
    alone = module(x[:, :voiced], audio, (FRAMES - 1, *GRID[1:]), maps[:, :voiced], speakers)
    torch.testing.assert_close(y[:, :voiced], alone)
    torch.testing.assert_close(module(x, audio, GRID, maps[:, :voiced], speakers), y)


@pytest.mark.parametrize("speakers", [2, 3, 4])
def test_a_token_listens_most_to_its_own_speaker(speakers: int) -> None:
    """Keys and queries that are equal before the rotation: nearer positions must weigh more."""
    module = SingleStreamMultiAttention(64, 1, encoder_hidden_states_dim=8)
    module.q_linear.weight.zero_()
    module.q_linear.bias.fill_(1.0)
    module.kv_linear.weight.zero_()
    module.kv_linear.bias.zero_()
    module.kv_linear.bias[:64] = 1.0
    for i in range(speakers):  # the value of speaker i is the unit vector i
        module.kv_linear.weight[64 + i, i] = 1.0
    module.proj.weight.copy_(torch.eye(64))
    module.proj.bias.zero_()
    audio = torch.eye(8)[:speakers].expand(1, FRAMES, -1, -1)
    maps = torch.full((speakers + 1, TOKENS), 0.01)
    for token in range(TOKENS):
        maps[token % (speakers + 1), token] = 1.0 if token > speakers else 0.9
    y = module(torch.zeros(1, TOKENS, 64), audio, GRID, maps, speakers)[0, :, :speakers]
    for token in range(TOKENS):
        owner = token % (speakers + 1)
        if owner < speakers:
            assert int(y[token].argmax()) == owner


def test_an_explicit_mode_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    x, audio = torch.randn(1, TOKENS, 16), torch.randn(FRAMES, 5, 8)
    with pytest.raises(BackendUnavailableError):
        SingleStreamAttention(16, 8, 2, True, attention_mode="no_such_mode")(x, audio, GRID)
    modes: list[str] = []

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention_mode: str) -> torch.Tensor:
        modes.append(attention_mode)
        return torch.zeros(q.shape)

    monkeypatch.setattr(multitalk, "attention", spy)
    single = SingleStreamAttention(16, 8, 2, True, attention_mode="sageattn_3_fp4")
    multi = SingleStreamMultiAttention(16, 2, encoder_hidden_states_dim=8, attention_mode="sageattn_3_fp8")
    single(x, audio, GRID)
    multi(x, audio[None], GRID)
    multi(x, audio[None], GRID, attention_mode="eager")
    assert modes == ["sageattn_3_fp4", "sageattn_3_fp8", "eager"]


def test_shapes_that_do_not_fit_are_rejected() -> None:
    x, audio = torch.zeros(1, TOKENS, 16), torch.zeros(FRAMES, 6, 8)
    single = SingleStreamAttention(16, 8, 2, True)
    for wrong in ((x[:, 1:], audio), (x, audio[:1]), (x, torch.cat((audio, audio))), (torch.cat((x, x)), audio)):
        with pytest.raises(InputError, match="image tokens"):
            single(*wrong, GRID)
    multi = SingleStreamMultiAttention(16, 2, encoder_hidden_states_dim=8)
    with pytest.raises(InputError, match="give 3 maps"):
        multi(x, audio[None], GRID, torch.ones(4, TOKENS), 2)
    with pytest.raises(InputError, match="same number of tokens"):
        multi(x, audio[None, :, :5], GRID, torch.ones(3, TOKENS), 2)
    with pytest.raises(InputError, match="audio tokens"):
        multi(x, audio, GRID)
    with pytest.raises(InputError, match="heads"):
        SingleStreamAttention(16, 8, 3, True)
