"""Loudness and wav2vec2 features against golden item 10. Limit: rel 2e-5 for the model, 1e-6 for the loudness."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.goldens import relative_error
from wanvideo_infinitetalk.media.audio import integrated_loudness, normalize_loudness
from wanvideo_infinitetalk.multitalk.wav2vec import Wav2Vec2Features

LIMIT = 2e-5
OLD, NEW = "weight_", "parametrizations.weight."


@pytest.fixture(params=["old weight norm", "new weight norm", "wav2vec2. prefix"])
def weights(request, golden):
    """The golden holds both forms of the positional convolution: one is left."""
    weights = golden("wav2vec2").float().weights
    dropped = NEW if request.param == "old weight norm" else "pos_conv_embed.conv." + OLD
    prefix = "wav2vec2." if request.param.startswith("wav2vec2") else ""
    return {prefix + name: tensor for name, tensor in weights.items() if dropped not in name}


def fields(item):
    return {name: item.config[name] for name in ("num_attention_heads", "conv_stride", "do_stable_layer_norm")}


@pytest.mark.parametrize("do_normalize", [False, True])
def test_embedding(golden, weights, do_normalize):
    item = golden("wav2vec2").float()
    model = Wav2Vec2Features.from_state_dict(weights, fields(item), do_normalize=do_normalize)
    name = "embedding_do_normalize" if do_normalize else "embedding"
    source = item.inputs["input_values"][0]
    frames = item.config["seq_len"]
    assert model.frames_of(source.numel(), item.config["fps"]) == frames
    assert relative_error(model(source, frames), item.outputs[name]) <= LIMIT
    assert torch.equal(model(source), model(source, frames))


def test_configuration_from_shapes(golden, weights):
    item = golden("wav2vec2")
    config = Wav2Vec2Features.from_state_dict(weights, fields(item)).model.config
    names = set(item.config) - {"seq_len", "sample_rate", "fps", "target_lufs", "pyloudnorm", "transformers"}
    got = {name: getattr(config, name) for name in names}
    assert {n: list(v) if isinstance(v, tuple) else v for n, v in got.items()} == {n: item.config[n] for n in names}


def test_steps_before_the_transformer(golden, weights):
    item = golden("wav2vec2").float()
    model = Wav2Vec2Features.from_state_dict(weights, fields(item))
    rows = model._convolve(item.inputs["input_values"][0])
    assert relative_error(rows.transpose(1, 2), item.outputs["extract_features_raw"]) <= LIMIT
    resized = F.interpolate(rows.transpose(1, 2), size=item.config["seq_len"], mode="linear", align_corners=True)
    assert relative_error(resized.transpose(1, 2), item.outputs["extract_features_resized"]) <= LIMIT
    effective = model.model.encoder.pos_conv_embed.conv.weight
    assert relative_error(effective, item.outputs["pos_conv_effective_weight"]) <= 5e-6


def test_loudness(golden):
    item = golden("wav2vec2")
    rate, target = item.config["sample_rate"], item.config["target_lufs"]
    waveform = item.inputs["waveform"].float().numpy()
    out = item.outputs
    before, after = out["loudness.lufs"].tolist()
    normal = normalize_loudness(waveform, rate, target)
    assert integrated_loudness(waveform, rate) == pytest.approx(before, abs=1e-4)
    assert integrated_loudness(normal, rate) == pytest.approx(after, abs=1e-4)
    for name, factor in (("normalized", 1.0), ("x0.02", 0.02)):
        got = torch.from_numpy(normalize_loudness(waveform * factor, rate, target))
        assert got.dtype == torch.float32
        assert relative_error(got, out[f"loudness.{name}"]) <= 1e-6
    for name, factor in (("silence", 0.0), ("quiet_x1e-6", 1e-6)):
        got = torch.from_numpy(normalize_loudness(waveform * factor, rate, target))
        assert torch.equal(got, out[f"loudness.{name}"].float())
