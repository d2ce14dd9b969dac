"""The tiny sets: the same bytes each time, public key names, and files that pass through the public loaders."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from wanvideo_infinitetalk.cli import tiny_models as tiny
from wanvideo_infinitetalk.cli.tiny_models import TinySet, make_tiny
from wanvideo_infinitetalk.multitalk.wav2vec import Wav2Vec2Features
from wanvideo_infinitetalk.tools.demo_model.faces import draw, random_faces, rest
from wanvideo_infinitetalk.wanvideo.checkpoints.dit import load_dit
from wanvideo_infinitetalk.wanvideo.checkpoints.files import read_state_dict
from wanvideo_infinitetalk.wanvideo.encoders.clip import ClipVision
from wanvideo_infinitetalk.wanvideo.encoders.small_decoder import SmallDecoder
from wanvideo_infinitetalk.wanvideo.encoders.text import TextEncoder
from wanvideo_infinitetalk.wanvideo.encoders.vae import WanVAE
from wanvideo_infinitetalk.wanvideo.errors import InputError


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def talking_set(tmp_path_factory: pytest.TempPathFactory) -> TinySet:
    return make_tiny(tmp_path_factory.mktemp("talking"))


def test_the_talking_set_is_small_and_its_trained_files_fit_into_12_mib(talking_set: TinySet) -> None:
    brought = Path(tiny.__file__).parents[1] / "assets/talking"
    assert {path.stem for path in brought.glob("*.safetensors")} == set(tiny.TALKING_PARTS)
    assert sum(path.stat().st_size for path in brought.glob("*.safetensors")) <= tiny.TALKING_BYTES == 12 * 2**20
    assert sum(map(len, files_of(talking_set.model.parent).values())) < 16e6


def test_the_talking_set_has_the_names_of_the_public_files(talking_set: TinySet, tiny_set: TinySet) -> None:
    def names(path: Path) -> set[str]:
        return {re.sub(r"blocks\.\d+\.", "blocks.", name) for name in read_state_dict(path)}

    assert not talking_set.decoder.exists()
    for role in ("model", "adapter", "vae", "text_encoder", "clip_vision", "wav2vec_file"):
        unlike = names(getattr(talking_set, role)) ^ names(getattr(tiny_set, role))
        assert unlike <= {"wav2vec2.masked_spec_embed"}, role


def test_the_talking_set_passes_through_the_loaders(talking_set: TinySet) -> None:
    model = load_dit(talking_set.model, talking_set.adapter, base_dtype=torch.float32)
    assert (model.config.head_dim, model.config.num_layers, model.config.clip_dim) == (64, 6, tiny.TALKING_CLIP_DIM)
    clip = ClipVision.load(talking_set.clip_vision, dtype=torch.float32)
    assert clip.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 257, tiny.TALKING_CLIP_DIM)
    assert Wav2Vec2Features.load(talking_set.wav2vec)(torch.randn(16000)).shape == (25, 2, 128)
    face = draw([random_faces(1, torch.Generator().manual_seed(1))], [rest(1)], 128, 128)
    vae = WanVAE.load(talking_set.vae, dtype=torch.float32)
    latents = vae.encode(face.expand(-1, -1, 5, -1, -1))
    assert 0.5 < float(latents.std()) < 1.5
    error = (vae.decode(latents) - face).square().mean()
    assert float(-10 * torch.log10(error / 4)) > 25  # dB, a face that training did not see


def test_two_sets_are_the_same_bytes(tiny_set: TinySet, tmp_path: Path) -> None:
    make_tiny(tmp_path, random=True)
    first, second = files_of(tiny_set.model.parent), files_of(tmp_path)
    assert list(first) == list(second)
    assert [name for name in first if first[name] != second[name]] == []


def test_small(tiny_set: TinySet) -> None:
    assert sum(map(len, files_of(tiny_set.model.parent).values())) < 50e6


def test_no_tensor_is_constant_or_wild(tiny_set: TinySet) -> None:
    roles = ("model", "adapter", "vae", "decoder", "text_encoder", "wav2vec_file")
    for path in (getattr(tiny_set, role) for role in roles):
        for name, tensor in read_state_dict(path).items():
            if tensor.is_floating_point():
                values = tensor.float()
                assert 1e-3 < float(values.std()) < 2, name
                assert float(values.abs().max()) < 8, name


@pytest.mark.parametrize(
    ("role", "names"),
    [
        ("model", ["patch_embedding.weight", "blocks.1.cross_attn.norm_k_img.weight", "head.modulation"]),
        ("adapter", ["audio_proj.proj1_vf.weight", "blocks.1.audio_cross_attn.kv_linear.bias", "blocks.0.norm_x.bias"]),
        ("vae", ["conv2.weight", "decoder.upsamples.4.shortcut.weight", "encoder.downsamples.8.time_conv.weight"]),
        ("decoder", ["decoder.3.conv.0.weight", "decoder.13.conv.weight", "decoder.22.bias"]),
        ("text_encoder", ["blocks.0.pos_embedding.embedding.weight", "spiece_model", "norm.weight"]),
        ("clip_vision", ["vision_model.pre_layrnorm.weight", "vision_model.encoder.layers.1.mlp.fc2.bias"]),
        ("wav2vec_file", ["wav2vec2.encoder.pos_conv_embed.conv.weight_g", "wav2vec2.masked_spec_embed"]),
    ],
)
def test_public_names(tiny_set: TinySet, role: str, names: list[str]) -> None:
    held = read_state_dict(getattr(tiny_set, role))
    assert set(names) <= set(held)


def test_the_model_loads_and_gives_sane_velocities(tiny_set: TinySet) -> None:
    model = load_dit(tiny_set.model, tiny_set.adapter, base_dtype=torch.float32)
    assert model.config.head_dim == 64
    audio = model.config.audio
    assert audio is not None
    velocity = model(
        torch.randn(16, 3, 4, 6),
        torch.tensor([700.0]),
        [torch.randn(7, model.config.text_dim)],
        torch.randn(1, 257, model.config.clip_dim),
        torch.randn(20, 3, 4, 6),
        torch.randn(1, 9, 5, audio.blocks, audio.channels),
    )
    assert velocity.shape == (1, 16, 3, 4, 6)
    assert 0.1 < float(velocity.std()) < 3


def test_the_vae_loads(tiny_set: TinySet) -> None:
    vae = WanVAE.load(tiny_set.vae, dtype=torch.float32)
    latents = vae.encode(torch.rand(1, 3, 5, 16, 24) * 2 - 1)
    assert latents.shape == (1, 16, 2, 2, 3)
    assert 0.01 < float(latents.std()) < 10
    frames = vae.decode(latents)
    assert frames.shape == (1, 3, 5, 16, 24)
    assert 0.05 < float(frames.std()) < 0.95


def test_the_small_decoder_loads(tiny_set: TinySet) -> None:
    frames = SmallDecoder.load(tiny_set.decoder).decode(torch.randn(1, 16, 2, 2, 3))
    assert frames.shape == (1, 3, 5, 16, 24)
    assert 0.05 < float(frames.std()) < 0.95


def test_the_text_encoder_loads_and_its_tokenizer_is_real(tiny_set: TinySet) -> None:
    encoder = TextEncoder.load(tiny_set.text_encoder, dtype=torch.float32)
    short, long = encoder.encode(["A woman", "A woman looks into the camera and speaks 你好"])
    assert short.shape[1] == long.shape[1] == 64
    assert 2 < len(short) < len(long)  # words become pieces, and a sentence ends with </s>
    ids = encoder.tokenize("A woman looks")
    assert ids[-1] == 1
    assert 2 not in encoder.tokenize("☃ unheard")  # bytes stand in for what the vocabulary lacks
    assert 0.1 < float(long.std()) < 5


def test_clip_loads(tiny_set: TinySet) -> None:
    tokens = ClipVision.load(tiny_set.clip_vision, dtype=torch.float32).encode(torch.rand(1, 3, 40, 30) * 2 - 1)
    assert tokens.shape == (1, 257, 1280)
    assert 0.1 < float(tokens.std()) < 10


def test_wav2vec2_is_the_same_as_folder_and_as_file(tiny_set: TinySet) -> None:
    waveform = torch.sin(torch.arange(16000) * 0.05) * 0.3
    folder = Wav2Vec2Features.load(tiny_set.wav2vec, do_normalize=False)(waveform)
    file = Wav2Vec2Features.load(tiny_set.wav2vec_file)(waveform)
    assert folder.shape == (25, 2, 128)
    assert torch.equal(folder, file)
    assert 0.1 < float(folder.std()) < 5


def test_a_place_that_cannot_be_written_to_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "file"))):
        make_tiny(tmp_path / "file" / "set")
