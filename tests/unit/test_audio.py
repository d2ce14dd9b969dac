"""Recordings of every kind, loudness, and wav2vec2 features compared with transformers' own use."""

from __future__ import annotations

import json
import logging

import av
import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file
from support.goldens import relative_error
from support.parts import TINY_WAV2VEC2, transformers_wav2vec2
from wanvideo_infinitetalk.media.audio import (
    LOUDEST,
    integrated_loudness,
    load_speech,
    normalize_loudness,
    read_audio,
)
from wanvideo_infinitetalk.media.video import VideoWriter
from wanvideo_infinitetalk.multitalk import wav2vec
from wanvideo_infinitetalk.multitalk.wav2vec import Wav2Vec2Features
from wanvideo_infinitetalk.wanvideo.checkpoints.state_dict import owns_aligned_memory
from wanvideo_infinitetalk.wanvideo.errors import CheckpointError, InputError


def tone(seconds: float = 1.0, rate: int = 16_000, hertz: float = 440.0, peak: float = 0.3) -> np.ndarray:
    return (peak * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(int(seconds * 16_000))).astype(np.float32)


def write_av(path, samples: np.ndarray, rate: int, codec: str = "aac", image: bool = False, sound: bool = True):
    """A container that libsndfile cannot read; `samples` [channels, n]."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=25) if image else None
        stream = (
            container.add_stream(codec, rate=rate, layout="stereo" if len(samples) == 2 else "mono") if sound else None
        )
        if video is not None:
            video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
            for _ in range(3):
                image_frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
                container.mux(video.encode(image_frame))
            container.mux(video.encode(None))
        if stream is not None:
            for begin in range(0, samples.shape[1], 1024):
                part = np.ascontiguousarray(samples[:, begin : begin + 1024])
                frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=stream.layout.name)
                frame.sample_rate, frame.pts = rate, begin
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3"])
def test_formats_of_libsndfile(tmp_path, name):
    soundfile.write(tmp_path / name, tone(rate=24_000), 24_000)
    samples, rate = read_audio(tmp_path / name)
    assert (samples.dtype, rate) == (np.float32, 24_000)
    assert abs(samples.size - 24_000) < 2400
    assert np.sqrt(np.mean(samples**2)) == pytest.approx(0.3 / 2**0.5, rel=0.1)


@pytest.mark.parametrize("name", ["a.m4a", "a.mp4", "a.mkv"])
@pytest.mark.parametrize("channels", [1, 2])
def test_formats_of_pyav(tmp_path, name, channels):
    write_av(tmp_path / name, np.stack([tone(rate=44_100)] * channels), 44_100, image=name != "a.m4a")
    samples, rate = read_audio(tmp_path / name)
    assert (samples.dtype, samples.ndim, rate) == (np.float32, 1, 44_100)
    assert abs(samples.size - 44_100) < 4410
    assert np.sqrt(np.mean(samples**2)) == pytest.approx(0.3 / 2**0.5, rel=0.1)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_U8", "FLOAT", "DOUBLE", "ULAW"])
def test_sample_formats(tmp_path, subtype):
    soundfile.write(tmp_path / "a.wav", tone(), 16_000, subtype=subtype)
    samples, _ = read_audio(tmp_path / "a.wav")
    assert np.abs(samples - tone()).max() < 0.02


def test_channels_are_averaged(tmp_path):
    stereo = np.stack([tone(), 3 * tone()], axis=1)
    soundfile.write(tmp_path / "a.wav", stereo, 16_000, subtype="FLOAT")
    samples, _ = read_audio(tmp_path / "a.wav")
    assert np.allclose(samples, 2 * tone(), atol=1e-6)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000])
def test_every_rate_becomes_16_khz(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", tone(2.0, rate), rate, subtype="FLOAT")
    speech = load_speech(tmp_path / "a.wav", target_lufs=None)
    assert speech.dtype == np.float32
    assert abs(speech.size - 32_000) <= 1
    middle = slice(4000, 28_000)
    assert np.abs(speech[middle] - tone(2.0)[middle]).max() < 0.01
    assert np.array_equal(load_speech(tone(2.0, rate), rate, target_lufs=None), speech)


def test_samples_of_any_shape_and_kind():
    mono = load_speech(tone(), 16_000)
    stereo = np.stack([tone(), tone()])
    assert np.allclose(load_speech(stereo, 16_000), mono, atol=1e-6)
    assert np.allclose(load_speech(torch.from_numpy(stereo).double(), 16_000), mono, atol=1e-6)
    with pytest.raises(InputError, match="transposed"):
        load_speech(stereo.T, 16_000)
    with pytest.raises(InputError, match="int16"):
        load_speech(np.zeros(16_000, np.int16), 16_000)
    with pytest.raises(InputError, match="int16"):
        load_speech(torch.zeros(16_000, dtype=torch.int16), 16_000)
    with pytest.raises(InputError, match="rate"):
        load_speech(tone())
    with pytest.raises(InputError, match="rate"):
        load_speech("a.wav", 16_000)


def test_the_callers_samples_stay(tmp_path):
    samples = tone()
    kept = samples.copy()
    load_speech(samples, 16_000)
    load_speech(samples, 16_000, target_lufs=None)[:] = 0
    assert np.array_equal(samples, kept)


def test_recordings_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.wav does not exist"):
        read_audio(tmp_path / "nowhere.wav")
    with pytest.raises(InputError, match="folder"):
        read_audio(tmp_path)
    (tmp_path / "empty.wav").touch()
    with pytest.raises(InputError, match="empty file"):
        read_audio(tmp_path / "empty.wav")
    (tmp_path / "text.wav").write_text("no sound at all " * 100)
    with pytest.raises(InputError, match="cannot be read as a recording"):
        read_audio(tmp_path / "text.wav")
    soundfile.write(tmp_path / "none.wav", np.zeros(0, np.float32), 16_000)
    with pytest.raises(InputError, match="no samples"):
        read_audio(tmp_path / "none.wav")
    write_av(tmp_path / "mute.mp4", np.zeros((1, 0)), 16_000, image=True, sound=False)
    with pytest.raises(InputError, match="holds no sound"):
        read_audio(tmp_path / "mute.mp4")


def test_a_truncated_recording_gives_what_is_there(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(), 16_000)
    content = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(content[: len(content) // 2])
    samples, _ = read_audio(tmp_path / "a.wav")
    assert 7_000 < samples.size < 9_000


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers(tmp_path, value):
    samples = tone()
    samples[8_000] = value
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    with pytest.raises(InputError, match=r"a\.wav has 1 samples .* at 0\.50 s"):
        load_speech(tmp_path / "a.wav")


@pytest.mark.parametrize("source", ["libsndfile", "FFmpeg", "array"])
def test_channels_that_cancel_each_other(tmp_path, source):
    """A microphone whose one side is the other upside down: their mean is silence."""

    def load(*channels):
        samples = np.stack(channels)
        if source == "array":
            return load_speech(samples, 16_000)
        path = tmp_path / ("a.wav" if source == "libsndfile" else "a.mkv")
        if source == "libsndfile":
            soundfile.write(path, samples.T, 16_000)
        else:
            write_av(path, samples, 16_000, codec="pcm_s16le")
        return load_speech(path)

    with pytest.raises(InputError, match="cancel each other"):
        load(noise(1.0), -noise(1.0))
    for other in (noise(1.0), 0 * noise(1.0), noise(1.0, seed=1), -0.9 * noise(1.0)):
        assert load(noise(1.0), other).any()
    assert not load(0 * noise(1.0), 0 * noise(1.0)).any()


@pytest.mark.parametrize("factor", [2**7, 2**15, 2**31])
@pytest.mark.parametrize("source", ["file", "array"])
def test_integers_that_were_taken_for_floats(tmp_path, factor, source):
    samples = (tone() / np.abs(tone()).max() * (factor - 1)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    with pytest.raises(InputError, match="has samples of up to"):
        load_speech(*((tmp_path / "a.wav",) if source == "file" else (samples, 16_000)))


def test_the_loudest_samples_can_be_written(tmp_path):
    """FFmpeg's AAC encoder does not end on larger ones (5e6, say)."""
    samples = np.where(tone() > 0, LOUDEST, -LOUDEST).astype(np.float32)
    assert load_speech(samples, 16_000).size == samples.size
    with VideoWriter(tmp_path / "a.mp4", 25, samples, 16_000) as writer:
        writer.append(torch.zeros(10, 32, 32, 3))
    assert read_audio(tmp_path / "a.mp4")[0].size > 0


@pytest.mark.parametrize("samples", [0, 1, 300, 639])
def test_too_short(samples):
    with pytest.raises(InputError, match="too short"):
        load_speech(tone()[:samples], 16_000)


def test_silence_passes_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        speech = load_speech(np.zeros(8_000, np.float32), 8_000)
    assert speech.shape == (16_000,)
    assert not speech.any()
    assert "silent" in caplog.text


def test_loudness():
    for gain in (0.01, 1.0, 3.0):
        assert integrated_loudness(load_speech(gain * noise(3.0), 16_000)) == pytest.approx(-23.0, abs=0.05)
    assert integrated_loudness(load_speech(noise(3.0), 16_000, target_lufs=-30.0)) == pytest.approx(-30.0, abs=0.05)
    short = tone(0.1)
    assert np.array_equal(normalize_loudness(short), short)


# --- wav2vec2 --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["base", "large"])
def reference(request):
    """The base model's layout, and that of the large ones (layer norms in the convolutions and before each layer)."""
    if request.param == "base":
        return transformers_wav2vec2()
    return transformers_wav2vec2(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)


@pytest.fixture(scope="module")
def features(reference):
    return Wav2Vec2Features.from_state_dict(reference.state_dict(), {"num_attention_heads": 2})


@torch.no_grad()
def test_agrees_with_the_librarys_own_use(reference, features):
    """Asked for as many frames as the convolutions give, the resize does nothing."""
    samples = torch.from_numpy(noise(2.0))
    output = reference.eval()(samples[None], output_hidden_states=True)
    # Releases of transformers differ on whether the last state of the large layout is before or after the closing norm.
    expected = torch.stack((*output.hidden_states[1:-1], output.last_hidden_state), dim=2)[0]
    assert relative_error(features(samples, expected.shape[0]), expected) <= 2e-5
    assert features.model.config._attn_implementation == "eager"


@pytest.mark.parametrize("seconds", [4.02, 9.3, 13.0])
def test_pieces_hear_what_the_whole_hears(features, monkeypatch, seconds):
    """Stated error of the piecewise way: rel 2e-5."""
    samples = noise(seconds)
    pieces = features(samples)
    monkeypatch.setattr(wav2vec, "PIECE_FRAMES", 10**9)
    assert pieces.shape == (int(seconds * 25), 3, 64)
    assert relative_error(pieces, features(samples)) <= 2e-5


def test_long_recordings_hear_everything_too(features, monkeypatch):
    """Stated error of the attention for length against the eager one: rel 2e-5."""
    samples = noise(8.0)
    eager = features(samples)
    monkeypatch.setattr(wav2vec, "EAGER_TOKENS", 10)
    assert relative_error(features(samples), eager) <= 2e-5
    twin = features._encoder_for_length()
    shared = twin.layers[0].attention.q_proj.weight
    assert shared.data_ptr() == features.model.encoder.layers[0].attention.q_proj.weight.data_ptr()
    assert twin.config._attn_implementation == "sdpa"


def test_no_piece_is_longer_than_4_seconds(features):
    seen = []
    handle = features.model.feature_extractor.conv_layers[0].conv.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[-1])
    )
    features(noise(21.0))
    handle.remove()
    assert max(seen) <= 4 * 16_000 + 400
    assert len(seen) > 5


def test_a_silent_recording_gives_finite_features(features):
    assert torch.isfinite(features(np.zeros(16_000, np.float32))).all()
    assert torch.isfinite(features(np.zeros(16_000 * 5, np.float32))).all()


def test_frames_and_shapes(features):
    assert features(noise(1.0)).shape == (25, 3, 64)
    assert features(noise(1.0), fps=30).shape == (30, 3, 64)
    assert features(noise(1.0), 7).shape == (7, 3, 64)
    assert features(noise(0.04)).shape == (1, 3, 64)
    assert features(torch.from_numpy(noise(1.0)).double()).dtype == torch.float32
    assert (features.layers, features.hidden_size) == (3, 64)


@pytest.mark.parametrize("samples", [np.zeros(100), np.zeros((2, 16_000)), np.zeros(16_000, np.int16)])
def test_samples_that_cannot_be_heard(features, samples):
    with pytest.raises(InputError):
        features(samples)
    with pytest.raises(InputError, match="NaN"):
        features(np.full(16_000, np.nan, np.float32))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize("seconds", [1.0, 5.0])
def test_16_bit_weights(reference, features, dtype, limit, seconds):
    half = Wav2Vec2Features.from_state_dict(reference.state_dict(), {"num_attention_heads": 2}, dtype=dtype)
    expected = features(noise(seconds))
    got = half(noise(seconds))
    assert half.dtype == dtype
    assert (got - expected).norm() < limit * expected.norm()


def write_folder(folder, model, weights="model.safetensors", prefix="", do_normalize=True, **config):
    folder.mkdir()
    state = {prefix + name: tensor.clone() for name, tensor in model.state_dict().items()}
    if weights.endswith(".bin"):
        torch.save(state, folder / weights)
    else:
        save_file(state, folder / weights)
    fields = {"model_type": "wav2vec2", **TINY_WAV2VEC2, **config}
    (folder / "config.json").write_text(json.dumps(fields))
    if do_normalize is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": do_normalize}))
    return folder


@pytest.fixture(scope="module")
def base():
    return transformers_wav2vec2()


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin", "other.safetensors"])
@pytest.mark.parametrize("prefix", ["", "wav2vec2."])
def test_reads_a_folder(tmp_path, base, weights, prefix):
    loaded = Wav2Vec2Features.load(write_folder(tmp_path / "w", base, weights, prefix))
    direct = Wav2Vec2Features.from_state_dict(base.state_dict(), TINY_WAV2VEC2, do_normalize=True)
    assert torch.equal(loaded(noise(1.0)), direct(noise(1.0)))
    assert all(owns_aligned_memory(parameter) for parameter in loaded.model.parameters())


def test_do_normalize_is_read_from_the_folder(tmp_path, base):
    for number, (stated, override, expected) in enumerate(
        [(True, None, True), (False, None, False), (None, None, False), (True, False, False), (False, True, True)]
    ):
        folder = write_folder(tmp_path / str(number), base, do_normalize=stated)
        assert Wav2Vec2Features.load(folder, do_normalize=override).do_normalize is expected
    file = tmp_path / "0" / "model.safetensors"
    assert Wav2Vec2Features.load(file).do_normalize is False


def test_reads_one_file_with_metadata(tmp_path, base):
    state = {f"wav2vec2.{name}": tensor.clone() for name, tensor in base.state_dict().items()}
    state["lm_head.weight"] = torch.zeros(3, 64)
    state["quantizer.codevectors"] = torch.zeros(1, 2)
    save_file(state, tmp_path / "w.safetensors", metadata={"config": json.dumps({"num_attention_heads": 2})})
    loaded = Wav2Vec2Features.load(tmp_path / "w.safetensors")
    assert loaded.model.config.num_attention_heads == 2
    direct = Wav2Vec2Features.from_state_dict(base.state_dict(), TINY_WAV2VEC2)
    assert torch.equal(loaded(noise(1.0)), direct(noise(1.0)))


def test_every_spelling_of_the_weight_norm(base):
    state = base.state_dict()
    stem = "encoder.pos_conv_embed.conv."
    g, v = state.pop(f"{stem}parametrizations.weight.original0"), state.pop(f"{stem}parametrizations.weight.original1")
    expected = Wav2Vec2Features.from_state_dict(base.state_dict(), TINY_WAV2VEC2)(noise(1.0))
    old = Wav2Vec2Features.from_state_dict({**state, f"{stem}weight_g": g, f"{stem}weight_v": v}, TINY_WAV2VEC2)
    assert torch.equal(old(noise(1.0)), expected)
    folded = v * g / v.norm(dim=(0, 1), keepdim=True)
    plain = Wav2Vec2Features.from_state_dict({**state, f"{stem}weight": folded}, TINY_WAV2VEC2)
    assert relative_error(plain(noise(1.0)), expected) < 1e-5


def test_models_that_are_rejected(tmp_path, base):
    with pytest.raises(CheckpointError, match="hubert"):
        Wav2Vec2Features.load(write_folder(tmp_path / "h", base, model_type="hubert"))
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        Wav2Vec2Features.load(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere"):
        Wav2Vec2Features.load(tmp_path / "nowhere.safetensors")
    with pytest.raises(CheckpointError, match="diffusion transformer"):
        Wav2Vec2Features.from_state_dict({"patch_embedding.weight": torch.zeros(1)})
    state = base.state_dict()
    with pytest.raises(CheckpointError, match="lacks 4 of"):
        Wav2Vec2Features.from_state_dict(
            {k: v for k, v in state.items() if "layers.1.attention.k" not in k and "layers.2.attention.k" not in k}
        )
    with pytest.raises(CheckpointError, match="strides"):
        Wav2Vec2Features.from_state_dict(
            {**state, "feature_extractor.conv_layers.6.conv.weight": torch.zeros(16, 16, 5)}
        )
    with pytest.raises(CheckpointError, match="5 attention heads"):
        Wav2Vec2Features.from_state_dict(state, {"num_attention_heads": 5})
    folder = write_folder(tmp_path / "j", base)
    for broken in (b"{", b"", b"\xff{}"):
        (folder / "config.json").write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"config\.json is no valid JSON"):
            Wav2Vec2Features.load(folder)
