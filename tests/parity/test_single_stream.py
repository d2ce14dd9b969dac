"""Audio cross attention against the golden items `single_stream_attention` and `single_stream_multi_attention`.

Relative error at most 5e-6 (modules), 1e-6 (rotary positions). One and two speakers agree with the public code exactly.
Three and more differ by design, because the public ranges meet the background's position (`speaker_ranges`); there the
attention is compared at the golden's own positions, and our positions as places inside each speaker's range.
"""

from __future__ import annotations

import pytest
import torch
from support.goldens import Golden, relative_error
from wanvideo_infinitetalk.multitalk.multitalk import (
    SingleStreamAttention,
    SingleStreamMultiAttention,
    speaker_ranges,
)

MODULE, POSITIONS = 5e-6, 1e-6


@torch.no_grad()
def test_single_stream(golden) -> None:
    g = golden("single_stream_attention").float()
    c = g.config
    module = SingleStreamAttention(c["dim"], c["encoder_hidden_states_dim"], c["num_heads"], c["qkv_bias"])
    module.load_state_dict(g.weights)
    y = module(g.inputs["x"], g.inputs["encoder_hidden_states"], tuple(c["shape"]))
    assert relative_error(y, g.outputs["y"]) <= MODULE


def _multi(g: Golden) -> SingleStreamMultiAttention:
    c = g.config
    module = SingleStreamMultiAttention(
        c["dim"],
        c["num_heads"],
        encoder_hidden_states_dim=c["encoder_hidden_states_dim"],
        class_range=c["class_range"],
        class_interval=c["class_interval"],
    )
    module.load_state_dict(g.weights)
    return module


@torch.no_grad()
def test_one_and_two_speakers(golden) -> None:
    g = golden("single_stream_multi_attention").float()
    module, shape = _multi(g), tuple(g.config["shape"])
    cases = {name: n for name, n in g.config["human_num"].items() if n <= 2}
    assert set(cases.values()) == {1, 2}
    for name, speakers in cases.items():
        audio, maps = g.inputs[f"{name}.encoder_hidden_states"], g.inputs.get(f"{name}.x_ref_attn_map")
        y = module(g.inputs["x"], audio, shape, maps, speakers)
        assert relative_error(y, g.outputs[f"{name}.y"]) <= MODULE
        if maps is not None:
            keys = module.key_positions(speakers, audio.shape[2] // speakers).repeat(shape[0])
            assert relative_error(module.query_positions(maps), g.outputs[f"{name}.q_positions"]) <= POSITIONS
            assert relative_error(keys, g.outputs[f"{name}.k_positions"]) <= POSITIONS


@torch.no_grad()
def test_one_speaker_is_the_single_stream(golden) -> None:
    g = golden("single_stream_multi_attention").float()
    c = g.config
    single = SingleStreamAttention(c["dim"], c["encoder_hidden_states_dim"], c["num_heads"], True)
    single.load_state_dict(g.weights)
    name = next(name for name, n in c["human_num"].items() if n == 1)
    y = single(g.inputs["x"], g.inputs[f"{name}.encoder_hidden_states"][0], tuple(c["shape"]))
    assert relative_error(y, g.outputs[f"{name}.y"]) <= MODULE


@torch.no_grad()
def test_extra_frame_hears_nothing(golden) -> None:
    g = golden("single_stream_multi_attention").float()
    module, (frames, height, width) = _multi(g), g.config["shape"]
    audio = g.inputs["two.encoder_hidden_states"][:, :-1]
    maps = g.inputs["two.x_ref_attn_map"][:, : (frames - 1) * height * width]
    y = module(g.inputs["x"], audio, (frames, height, width), maps, 2)
    assert relative_error(y, g.outputs["two_extra.y"]) <= MODULE
    assert torch.count_nonzero(y[:, -height * width :]) == 0


@torch.no_grad()
def test_more_speakers(golden) -> None:
    g = golden("single_stream_multi_attention").float()
    module, shape = _multi(g), tuple(g.config["shape"])
    cases = {name: n for name, n in g.config["human_num"].items() if n > 2}
    if not cases:
        pytest.skip("this folder has no case with three speakers or more")
    for name, speakers in cases.items():
        audio, maps = g.inputs[f"{name}.encoder_hidden_states"], g.inputs[f"{name}.x_ref_attn_map"]
        theirs, their_keys = g.outputs[f"{name}.q_positions"], g.outputs[f"{name}.k_positions"]
        y = module._attend(g.inputs["x"], audio[0], shape, None, theirs, their_keys[: audio.shape[2]])
        assert relative_error(y, g.outputs[f"{name}.y"]) <= MODULE

        # The same places inside each speaker's range, counted from 0 to 1; the background where the public code has it.
        ours, winner = module.query_positions(maps), maps.argmax(0)
        interval = g.config["class_interval"]
        for i, (low, high) in enumerate(speaker_ranges(speakers, g.config["class_range"], interval)):
            won = winner == i
            assert won.any()
            place = (ours[won] - low) / (high - low)
            torch.testing.assert_close(place, (theirs[won] - interval * i) / interval, rtol=0, atol=2e-6)
        background = winner == speakers
        assert torch.equal(ours[background], theirs[background])
