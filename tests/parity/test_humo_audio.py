"""Whisper features against the golden item `humo_audio_features`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.goldens import relative_error
from wanvideo_infinitetalk.multitalk.whisper import WhisperFeatures, grouped
from wanvideo_infinitetalk.wanvideo.modules.humo import humo_audio_window, resample_features

SAME_INTERPOLATION = 1e-6
FEATURES = 5e-5
"""Where the numbers have been through 32 layers."""


@pytest.mark.parametrize("name", ["packing", "packing_odd"])
def test_groups_of_hidden_states_and_their_resampling(golden, name: str) -> None:
    item = golden("humo_audio_features")
    rows = grouped(item.inputs[f"{name}.hidden_states"])
    frames = resample_features(rows.flatten(2), 50, 25)[0].unflatten(-1, rows.shape[2:])
    assert relative_error(frames, item.outputs[f"{name}.features"]) <= SAME_INTERPOLATION


def test_windows_with_rows_for_the_reference_frames(golden) -> None:
    item = golden("humo_audio_features")
    for name, case in item.config["window_cases"].items():
        window, _ = humo_audio_window(item.outputs["packing.features"], case["frames"])
        window = torch.cat([window, window.new_zeros(case["reference_frames"], *window.shape[1:])])
        assert torch.equal(window, item.outputs[f"window.{name}"]), name


def test_the_encoder(golden) -> None:
    item = golden("humo_audio_features").float()
    features = WhisperFeatures.from_state_dict(item.weights, item.config["whisper"])
    waveform = item.inputs["whisper.waveform"]
    mel = features.log_mel(waveform)[0]
    assert float((mel[:, :320] - item.outputs["whisper.log_mel_first_320_columns"]).abs().max()) <= 1e-5
    padding = item.config["whisper"]["log_mel_padding_value"]
    assert float((mel[:, 320:] - padding).abs().max()) <= 1e-5
    (hidden,) = features.hidden_states(waveform)
    wanted = item.outputs["whisper.hidden_states"]
    assert relative_error(hidden[:, : wanted.shape[1]], wanted) <= 2e-5
    got = features(waveform)
    assert relative_error(got, item.outputs["whisper.features"]) <= FEATURES
    frames = (len(got) - 1) // 4 * 4 + 1
    window, _ = humo_audio_window(got, frames)
    window = torch.cat([window, window.new_zeros(1, *window.shape[1:])])
    assert relative_error(window, item.outputs["whisper.window_auto"]) <= FEATURES


def test_more_than_30_seconds(golden) -> None:
    item = golden("humo_audio_features").float()
    features = WhisperFeatures.from_state_dict(item.weights, item.config["whisper"])
    once, count = item.inputs["whisper.waveform"].numpy(), item.config["whisper_long"]["samples"]
    volume = np.linspace(0.2, 1, count).astype(np.float32)
    waveform = np.resize(once, count) * volume
    assert relative_error(features(waveform), item.outputs["whisper_long.features"]) <= FEATURES
