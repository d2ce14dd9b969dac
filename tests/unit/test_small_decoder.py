"""Small decoders as users meet them: files, latents by the name, pieces, tiles, memory. Numbers: parity tests."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from wanvideo_infinitetalk.cli.tiny_models import DECODER_WIDTHS, TinySet, decoder_weights
from wanvideo_infinitetalk.wanvideo.checkpoints.state_dict import owns_aligned_memory
from wanvideo_infinitetalk.wanvideo.encoders.small_decoder import SmallDecoder, denormalizes
from wanvideo_infinitetalk.wanvideo.encoders.vae import WanVAE
from wanvideo_infinitetalk.wanvideo.errors import CheckpointError, InputError

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return decoder_weights(dtype=torch.float32)


@pytest.fixture
def decoder(state: State) -> SmallDecoder:
    return SmallDecoder.from_state_dict(state, denormalize=False)


def latents(frames: int = 5, height: int = 4, width: int = 6, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 16, frames, height, width, generator=torch.Generator().manual_seed(1))


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_files_as_they_are_published(tmp_path: Path, state: State, decoder: SmallDecoder, suffix, prefix) -> None:
    """With the encoder that lies beside it, which is no line in the log."""
    content = {f"{prefix}{name}": t for name, t in (state | {"encoder.0.weight": torch.ones(64, 3, 3, 3)}).items()}
    path = tmp_path / f"taew2_1{suffix}"
    save_file(content, path) if suffix == ".safetensors" else torch.save(content, path)
    SmallDecoder.inspect(path)
    loaded = SmallDecoder.load(path)
    assert torch.equal(loaded.decode(latents()), decoder.decode(latents()))
    assert all(owns_aligned_memory(parameter) for parameter in loaded.model.parameters())
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


@pytest.mark.parametrize("widths", [(8, 8, 8, 8), (24, 16, 8, 4), DECODER_WIDTHS])
def test_widths_are_read_from_the_shapes(widths: tuple[int, ...]) -> None:
    loaded = SmallDecoder.from_state_dict(decoder_weights(widths), denormalize=False)
    assert loaded.width == widths[-1]
    assert loaded.decode(latents(2, 2, 2)).shape == (1, 3, 5, 16, 16)


def test_the_last_rows_of_a_longer_growth_count(state: State, decoder: SmallDecoder) -> None:
    longer = dict(state)
    for number in (7, 13, 19):
        name = f"decoder.{number}.conv.weight"
        longer[name] = torch.cat([torch.randn(state[name].shape[1], *state[name].shape[1:]), state[name]])
    loaded = SmallDecoder.from_state_dict(longer, denormalize=False)
    assert torch.equal(loaded.decode(latents()), decoder.decode(latents()))
    odd = state | {"decoder.13.conv.weight": torch.zeros(17, 8, 1, 1)}
    with pytest.raises(CheckpointError, match=r"decoder\.13\.conv\.weight as \[17, 8, 1, 1\], but"):
        SmallDecoder.from_state_dict(odd, denormalize=False)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.02), (torch.float16, 0.002)])
def test_16_bit_weights(state: State, decoder: SmallDecoder, dtype: torch.dtype, limit: float) -> None:
    half = SmallDecoder.from_state_dict(state, denormalize=False, dtype=dtype)
    frames, exact = half.decode(latents()), decoder.decode(latents())
    assert (half.dtype, frames.dtype) == (dtype, torch.float32)
    assert 0 < float((frames - exact).norm() / exact.norm()) < limit


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"decoder.1.weight": (16, 48, 3, 3)}, "latents of 48 channels, those of Wan2.1 have 16"),
        ({"decoder.22.weight": (12, 8, 3, 3)}, r"decoder\.22\.weight as \[12, 8, 3, 3\]"),
        ({"decoder.22.weight": None}, r"lacks 1 of 64 tensors, such as decoder\.22\.weight"),
        ({"decoder.7.conv.weight": None}, "is a file of unknown kind, not a small decoder"),
        ({"decoder.9.conv.4.scale": (1,)}, "which is a quantization that is not supported"),
        ({"decoder.8.bias": (8,)}, r"decoder\.8\.bias, which this model has no place for"),
    ],
)
def test_what_is_no_small_decoder_of_wan21(state: State, change: dict[str, tuple[int, ...] | None], words: str) -> None:
    changed = state | {name: torch.zeros(shape) for name, shape in change.items() if shape is not None}
    changed = {name: tensor for name, tensor in changed.items() if change.get(name, ()) is not None}
    with pytest.raises(CheckpointError, match=words):
        SmallDecoder.from_state_dict(changed, denormalize=False)


def test_an_unknown_layer_is_said(state: State, caplog: pytest.LogCaptureFixture) -> None:
    SmallDecoder.from_state_dict(state | {"decoder.23.weight": torch.ones(1)}, denormalize=False)
    assert "1 tensors are not used: decoder.23.weight" in caplog.text


# --- which latents ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("taew2_1.pth", False),
        ("taew2_1.safetensors", False),
        ("light/taew2_1.safetensors", False),
        ("lighttaew2_1.safetensors", True),
        ("LightTAEW2_1.pth", True),
    ],
)
def test_the_public_name_says_which_latents_it_takes(
    tmp_path: Path, tiny_set: TinySet, caplog: pytest.LogCaptureFixture, name: str, raw: bool
) -> None:
    """Those of the light ones are the VAE's own: the normalized ones times their deviation plus their mean."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    state = load_file(tiny_set.decoder)
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    with caplog.at_level(logging.INFO):
        loaded = SmallDecoder.load(path)
    assert denormalizes(path) == loaded.denormalize == raw
    says = (
        "decodes denormalized latents, as its name has"
        if raw
        else "decodes the model's own latents, as its name does not"
    )
    assert f"{path.name} {says}" in caplog.text
    vae = WanVAE.load(tiny_set.vae)  # states no others than the public mean and deviation
    mean, std = (moments.view(16, 1, 1, 1) for moments in (vae.latents_mean, vae.latents_std))
    plain = SmallDecoder.from_state_dict(state, denormalize=False)
    expected = plain.decode(latents() * std + mean if raw else latents())
    torch.testing.assert_close(loaded.decode(latents()), expected)


# --- pieces, tiles, memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_pieces_are_what_the_whole_is(decoder: SmallDecoder, frames: int) -> None:
    z = latents(frames, batch=2)
    pieces = decoder.decode(z)
    decoder.at_once = True
    torch.testing.assert_close(decoder.decode(z), pieces, atol=1e-5, rtol=0)
    assert pieces.shape == (2, 3, 1 + 4 * (frames - 1), 32, 48)
    torch.testing.assert_close(decoder.decode(z[:1]), pieces[:1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_any_pieces_make_the_same_video(decoder: SmallDecoder) -> None:
    z = latents(6).movedim(1, -1)
    whole = decoder.model(z, {})
    for lengths in ([1] * 6, [2, 4], [3, 1, 2]):
        memory: dict = {}
        pieces = [decoder.model(part, memory) for part in z.split(lengths, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=0)
    assert not torch.allclose(decoder.model(z[:, 3:], {}), whole[:, 12:], atol=1e-3), "the past is not seen"


@torch.no_grad()
def test_memory_holds_one_frame_per_block_whatever_the_length(decoder: SmallDecoder) -> None:
    """And none of it is a view of something larger."""
    for frames in (1, 6):
        memory: dict = {}
        decoder.model(latents(frames).movedim(1, -1), memory)
        assert sorted(tuple(kept.shape) for kept in memory.values()) == sorted(
            (1, 1, 4 * scale, 6 * scale, width)
            for scale, width in zip((1, 2, 4), DECODER_WIDTHS, strict=False)
            for _ in range(3)
        )
        assert all(kept.untyped_storage().nbytes() == kept.nbytes for kept in memory.values())


def test_each_call_of_the_network_sees_one_latent_frame(decoder: SmallDecoder, monkeypatch) -> None:
    seen: list[int] = []
    handle = decoder.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    decoder.decode(latents(4))
    decoder.at_once = True
    calls: list[tuple[int, int]] = []
    decoder.decode(latents(4), callback=lambda *args: calls.append(args))
    handle.remove()
    assert seen == [1, 1, 1, 1, 4]
    assert calls == [(4, 4)]


def test_a_video_leaves_nothing_to_the_next(decoder: SmallDecoder) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise Stop

    first = decoder.decode(latents())
    with pytest.raises(Stop):
        decoder.decode(latents(), callback=stop)
    before = latents()
    z = before.clone()
    assert torch.equal(decoder.decode(z), first)
    assert torch.equal(z, before)


def test_tiles_are_close_to_the_whole_and_progress_is_said(decoder: SmallDecoder) -> None:
    z = latents(2, 24, 24)
    calls: list[tuple[int, int]] = []
    whole = decoder.decode(z)
    tiled = decoder.decode(z, tiled=True, tile_size=128, tile_overlap=96, callback=lambda *args: calls.append(args))
    assert float((tiled - whole).norm() / whole.norm()) < 0.05
    assert not torch.equal(tiled, whole)
    assert calls == [(i, len(calls)) for i in range(1, len(calls) + 1)]
    assert torch.equal(decoder.decode(z, tiled=True, tile_size=512), whole)


def test_out_of_memory_tries_again_in_tiles(decoder: SmallDecoder, caplog: pytest.LogCaptureFixture) -> None:
    z = latents(1, 8, 24)
    expected = decoder.decode(z, tiled=True, tile_size=96)

    def scarce(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[3] > 12:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = decoder.model.register_forward_pre_hook(scarce)
    decoded = decoder.decode(z, tile_size=192)
    handle.remove()
    assert torch.equal(decoded, expected)
    assert "Out of GPU memory while decoding: trying again in tiles of 96 pixels" in caplog.text


@pytest.mark.parametrize("shape", [(1, 4, 1, 4, 4), (16, 1, 4, 4), (1, 16, 0, 4, 4)])
def test_latents_that_cannot_be_decoded(decoder: SmallDecoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"decoded as floats of shape \[batch, 16, frames, height, width\]"):
        decoder.decode(torch.zeros(shape))
