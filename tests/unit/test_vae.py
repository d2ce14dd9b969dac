"""The VAE as users meet it: files, dtypes, tiles, interruption, memory. Numbers against the library's own use."""

from __future__ import annotations

import json
import logging
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file
from support.goldens import relative_error
from support.parts import diffusers_vae, public_vae_names, randomize
from wanvideo_infinitetalk.wanvideo.checkpoints.state_dict import owns_aligned_memory
from wanvideo_infinitetalk.wanvideo.encoders import vae as vae_module
from wanvideo_infinitetalk.wanvideo.encoders.vae import WanVAE, diffusers_names, vae_config
from wanvideo_infinitetalk.wanvideo.errors import CheckpointError, InputError


@pytest.fixture(scope="module")
def reference():
    model = diffusers_vae()
    randomize(model)
    return model


@pytest.fixture(scope="module")
def state(reference):
    return public_vae_names(reference.state_dict(), 1)


@pytest.fixture(scope="module")
def vae(state):
    return WanVAE.from_state_dict(state)


def video(frames: int = 9, height: int = 32, width: int = 48, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def constants(reference) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = reference.config.latents_mean, reference.config.latents_std
    return torch.tensor(mean).view(1, -1, 1, 1, 1), torch.tensor(std).view(1, -1, 1, 1, 1)


@torch.no_grad()
def test_agrees_with_the_librarys_own_use(vae, reference):
    frames = video(batch=2)
    mean, std = constants(reference)
    latents = (reference.encode(frames).latent_dist.mode() - mean) / std
    assert relative_error(vae.encode(frames), latents) <= 2e-5
    assert relative_error(vae.decode(latents), reference.decode(latents * std + mean).sample) <= 2e-5


@pytest.mark.parametrize("base_dim", [24, 32])  # 24: lightvaew2_1, a quarter of the public widths
@pytest.mark.parametrize("num_res_blocks", [1, 2])
@pytest.mark.parametrize("dim_mult", [[1, 2, 4, 4], [1, 1, 2], [1, 2, 2, 2]])
def test_names_and_configuration_for_every_layout(num_res_blocks, dim_mult, base_dim):
    temporal = [False, True, True][: len(dim_mult) - 1]
    with torch.device("meta"):
        model = diffusers_vae(
            base_dim=base_dim, dim_mult=dim_mult, num_res_blocks=num_res_blocks, temperal_downsample=temporal
        )
    public = public_vae_names(model.state_dict(), num_res_blocks)
    config = vae_config(public)
    assert (config.base_dim, list(config.dim_mult)) == (base_dim, dim_mult)
    assert (config.num_res_blocks, list(config.temporal)) == (num_res_blocks, temporal)
    assert {diffusers_names(name, num_res_blocks) for name in public} == set(model.state_dict())


def test_production_names():
    """A few names of the published file, written out."""
    expected = {
        "conv1.weight": "quant_conv.weight",
        "conv2.bias": "post_quant_conv.bias",
        "encoder.conv1.weight": "encoder.conv_in.weight",
        "encoder.downsamples.5.time_conv.weight": "encoder.down_blocks.5.time_conv.weight",
        "encoder.downsamples.6.shortcut.bias": "encoder.down_blocks.6.conv_shortcut.bias",
        "encoder.middle.1.to_qkv.weight": "encoder.mid_block.attentions.0.to_qkv.weight",
        "encoder.middle.2.residual.3.gamma": "encoder.mid_block.resnets.1.norm2.gamma",
        "decoder.head.0.gamma": "decoder.norm_out.gamma",
        "decoder.head.2.weight": "decoder.conv_out.weight",
        "decoder.upsamples.3.resample.1.weight": "decoder.up_blocks.0.upsamplers.0.resample.1.weight",
        "decoder.upsamples.4.shortcut.weight": "decoder.up_blocks.1.resnets.0.conv_shortcut.weight",
        "decoder.upsamples.14.residual.6.bias": "decoder.up_blocks.3.resnets.2.conv2.bias",
    }
    assert {name: diffusers_names(name, 2) for name in expected} == expected


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("prefix", ["", "model.", "first_stage_model."])
def test_reads_files(tmp_path, state, vae, suffix, prefix):
    path = tmp_path / f"vae{suffix}"
    tensors = {prefix + name: tensor.clone() for name, tensor in state.items()}
    if suffix == ".pth":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    loaded = WanVAE.load(path)
    assert loaded.z_dim == 16
    assert torch.equal(loaded.encode(video(1)), vae.encode(video(1)))
    assert all(owns_aligned_memory(parameter) for parameter in loaded.model.parameters())
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_metadata_may_state_the_latent_statistics(tmp_path, state):
    config = {"latents_mean": [0.5] * 16, "latents_std": [2.0] * 16}
    save_file(state, tmp_path / "vae.safetensors", metadata={"config": json.dumps(config)})
    loaded = WanVAE.load(tmp_path / "vae.safetensors")
    assert loaded.latents_mean.tolist() == [0.5] * 16
    assert loaded.latents_std.tolist() == [2.0] * 16


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2."""
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_16_bit_weights(state, vae, dtype, limit):
    half = WanVAE.from_state_dict(state, dtype=dtype)
    assert half.dtype == dtype
    frames = video(5)
    latents, frames_again = half.encode(frames), half.decode(vae.encode(frames))
    assert latents.dtype == frames_again.dtype == torch.float32
    assert distance(latents, vae.encode(frames)) < limit
    assert distance(frames_again, vae.decode(vae.encode(frames))) < limit


def test_views_are_given_memory_of_their_own(state):
    """Tensors that start at odd bytes of one storage, as views into a mapped file do."""
    odd = {}
    for name, tensor in state.items():
        storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        odd[name] = storage[1:].view(tensor.shape).copy_(tensor)
    loaded = WanVAE.from_state_dict(odd)
    assert all(owns_aligned_memory(parameter) for parameter in loaded.model.parameters())


# --- what is rejected ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"patch_embedding.weight": (8, 16, 1, 2, 2)}, "diffusion transformer"),
        ({"encoder.downsamples.0.downsamples.0.residual.2.weight": (8, 8, 3, 3, 3)}, "Wan2.2 VAE"),
        ({"encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8)}, "text encoder"),
        ({"vision_model.embeddings.class_embedding": (8,)}, "CLIP vision"),
    ],
)
def test_another_kind_of_model_is_named(names, words):
    with pytest.raises(CheckpointError, match=words):
        WanVAE.from_state_dict({name: torch.zeros(shape) for name, shape in names.items()})


def test_incomplete_and_damaged_files(state):
    short = {name: tensor for name, tensor in state.items() if not name.startswith("decoder.middle.1")}
    with pytest.raises(CheckpointError, match=r"lacks 5 of .*decoder\.mid_block\.attentions\.0"):
        WanVAE.from_state_dict(short)
    with pytest.raises(CheckpointError, match="other tensors ask for"):
        WanVAE.from_state_dict({**state, "decoder.head.2.weight": torch.zeros(3, 4, 3, 3, 3)})
    with pytest.raises(CheckpointError, match="levels have"):
        WanVAE.from_state_dict({k: v for k, v in state.items() if not k.startswith("encoder.downsamples.2.")})


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors"):
        WanVAE.load(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("shape", [(1, 3, 5, 30, 32), (1, 4, 5, 32, 32), (3, 5, 32, 32), (1, 3, 0, 32, 32)])
def test_videos_that_cannot_be_encoded(vae, shape):
    with pytest.raises(InputError):
        vae.encode(torch.zeros(shape))


def test_latents_that_cannot_be_decoded(vae):
    with pytest.raises(InputError):
        vae.decode(torch.zeros(1, 4, 1, 4, 4))
    with pytest.raises(InputError):
        vae.decode(torch.zeros(1, 16, 1, 4, 4, dtype=torch.int64))


def test_spare_frames_are_left_out_and_said(vae, caplog):
    frames = video(8)
    with caplog.at_level(logging.WARNING):
        latents = vae.encode(frames)
    assert "the last 3 are left out" in caplog.text
    assert torch.equal(latents, vae.encode(frames[:, :, :5]))


# --- streaming, tiles, interruption ----------------------------------------------------------------------------------


def test_each_step_sees_one_latent_frame(vae, monkeypatch):
    """Working memory does not depend on the length: no call to the networks is longer than a chunk."""
    seen: dict[str, list[int]] = {"encoder": [], "decoder": []}
    handles = [
        getattr(vae.model, part).register_forward_pre_hook(lambda _, args, p=part: seen[p].append(args[0].shape[2]))
        for part in seen
    ]
    vae.decode(vae.encode(video(13, 16, 16)))
    for handle in handles:
        handle.remove()
    assert seen == {"encoder": [1, 4, 4, 4], "decoder": [1, 1, 1, 1]}


def test_nothing_is_written_to_the_inputs(vae):
    frames = video(5)
    before = frames.clone()
    latents = vae.encode(frames, tiled=True, tile_size=32, tile_overlap=16)
    kept = latents.clone()
    vae.decode(latents, tiled=True, tile_size=32, tile_overlap=16)
    assert torch.equal(frames, before)
    assert torch.equal(latents, kept)


def test_strided_and_offset_inputs(vae):
    latents = torch.randn(1, 16, 3, 4, 6)
    odd = torch.empty(latents.numel() + 1)[1:].view(1, 3, 4, 6, 16).permute(0, 4, 1, 2, 3).copy_(latents)
    assert torch.equal(vae.decode(odd), vae.decode(latents))


@pytest.mark.parametrize("length", [1, 3, 7, 16, 33])
@pytest.mark.parametrize(("size", "overlap"), [(4, 2), (8, 3), (5, 0), (64, 8), (1, 0)])
def test_spans_cover_everything_and_blend_to_one(length, size, overlap):
    spans = vae_module._spans(length, size, overlap)
    total = torch.zeros(length)
    for begin, end, before, after in spans:
        weight = vae_module._ramp(end - begin, before, after, torch.device("cpu"))
        assert (weight > 0).all()
        total[begin:end] += weight
    assert spans[0][0] == 0
    assert spans[-1][1] == length
    assert (total > 0).all()
    for (_, end, _, after), (begin, _, before, _) in pairwise(spans):
        assert end - begin == before == after >= 0


def test_a_canvas_returns_what_was_painted():
    image = torch.rand(1, 2, 3, 40, 56)
    tiles = vae_module._tiles((40, 56), 16, 6, 1)
    canvas = vae_module._Canvas(image.shape, tiles, 1, "cpu")
    for tile in tiles:
        canvas.add(tile, 0, image[..., tile.top : tile.bottom, tile.left : tile.right])
    assert torch.allclose(canvas.finish(), image, atol=1e-6)


def test_one_tile_is_the_whole(vae):
    frames = video(5)
    latents = vae.encode(frames)
    assert torch.equal(vae.encode(frames, tiled=True, tile_size=512), latents)
    assert torch.equal(vae.decode(latents, tiled=True, tile_size=512), vae.decode(latents))


def test_tiles_are_close_to_the_whole(state):
    """Far from borders a tile knows all that the whole image knows, but for the attention of the middle block."""
    local = {name: torch.zeros_like(t) if "middle.1.proj" in name else t for name, t in state.items()}
    vae = WanVAE.from_state_dict(local)
    latents = torch.randn(1, 16, 1, 20, 20)
    whole = vae.decode(latents)
    tiled = vae.decode(latents, tiled=True, tile_size=128, tile_overlap=96)
    assert tiled.shape == whole.shape
    assert 0 < distance(tiled, whole) < 0.05
    frames = video(1, 128, 128)
    latents, again = vae.encode(frames), vae.encode(frames, tiled=True, tile_size=96, tile_overlap=64)
    assert 0 < distance(again, latents) < 0.05


def test_progress_is_reported_per_chunk_and_tile(vae):
    calls: list[tuple[int, int]] = []
    latents = vae.encode(video(9, 32, 32), callback=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    calls.clear()
    vae.decode(latents, tiled=True, tile_size=16, tile_overlap=0, callback=lambda *args: calls.append(args))
    assert calls == [(i, 12) for i in range(1, 13)]


def test_an_interruption_passes_and_leaves_no_trace(vae):
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise Stop

    frames = video(9)
    latents = vae.encode(frames)
    decoded = vae.decode(latents)
    with pytest.raises(Stop):
        vae.encode(frames, callback=stop)
    with pytest.raises(Stop):
        vae.decode(latents, callback=stop)
    assert torch.equal(vae.encode(frames), latents)
    assert torch.equal(vae.decode(latents), decoded)


def short_of_memory(part, limit: int):
    """A hook: `part` has no memory for inputs wider than `limit`."""

    def check(_, args):
        if args[0].shape[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return part.register_forward_pre_hook(check)


def test_out_of_memory_tries_again_in_tiles(vae, caplog):
    latents = torch.randn(1, 16, 1, 8, 24)
    frames = video(1, 64, 192)
    expected = vae.decode(latents, tiled=True, tile_size=96)
    expected_latents = vae.encode(frames, tiled=True, tile_size=96)
    handles = [short_of_memory(vae.model.decoder, 12), short_of_memory(vae.model.encoder, 96)]
    with caplog.at_level(logging.WARNING):
        decoded, encoded = vae.decode(latents, tile_size=192), vae.encode(frames, tile_size=192)
    for handle in handles:
        handle.remove()
    assert torch.equal(decoded, expected)
    assert torch.equal(encoded, expected_latents)
    assert "Out of GPU memory while decoding: trying again in tiles of 96 pixels" in caplog.text
    assert "Out of GPU memory while encoding" in caplog.text


def test_out_of_memory_in_the_smallest_tiles_is_passed_on(vae):
    handle = short_of_memory(vae.model.decoder, 1)
    with pytest.raises(torch.OutOfMemoryError):
        vae.decode(torch.randn(1, 16, 1, 32, 32))
    handle.remove()


def test_bad_tiles_are_refused(vae):
    with pytest.raises(InputError, match="tile"):
        vae.decode(torch.randn(1, 16, 1, 4, 4), tiled=True, tile_size=4)
