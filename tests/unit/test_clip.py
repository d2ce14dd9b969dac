"""CLIP vision: both namings in its file, and the features compared with transformers' own use."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from support.goldens import relative_error
from support.parts import bare_clip_names, official_clip_names, transformers_clip
from wanvideo_infinitetalk.wanvideo.checkpoints.state_dict import owns_aligned_memory
from wanvideo_infinitetalk.wanvideo.encoders.clip import ClipVision
from wanvideo_infinitetalk.wanvideo.errors import CheckpointError, InputError

HEADS = {"num_attention_heads": 4}


@pytest.fixture(scope="module")
def reference():
    return transformers_clip()


@pytest.fixture(scope="module")
def state(reference):
    return bare_clip_names(reference)


@pytest.fixture(scope="module")
def clip(state):
    return ClipVision.from_state_dict(state, HEADS)


def image(batch: int = 2, height: int = 30, width: int = 50) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(2)) * 2 - 1


@torch.no_grad()
def test_agrees_with_the_librarys_own_use(reference, clip):
    states = reference(clip.preprocess(image()), output_hidden_states=True).hidden_states
    assert clip.encode(image()).shape == (2, 10, 64)
    assert relative_error(clip.encode(image()), states[-2]) <= 2e-6


def test_preprocessing_is_bicubic_and_normalized(clip):
    gray = clip.preprocess(torch.zeros(1, 3, 42, 42))  # 0.5 in [0, 1]
    expected = [(0.5 - 0.48145466) / 0.26862954, (0.5 - 0.4578275) / 0.26130258, (0.5 - 0.40821073) / 0.27577711]
    assert torch.allclose(gray[0, :, 0, 0], torch.tensor(expected), atol=1e-6)
    assert clip.preprocess(image()).shape == (2, 3, 42, 42)
    assert torch.allclose(
        clip.preprocess(image(1, 42, 42))[0, 0] * 0.26862954 + 0.48145466, image(1, 42, 42)[0, 0] / 2 + 0.5
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    ("prefix", "official"),
    [("", False), ("vision_model.", False), ("image_encoder.vision_model.", False), ("", True), ("visual.", True)],
)
def test_reads_files(tmp_path, suffix, prefix, official):
    model = transformers_clip(num_attention_heads=1)  # 64 channels a head: what a file without metadata means
    state = bare_clip_names(model)
    if official:
        tensors = {prefix + name: tensor for name, tensor in official_clip_names(state).items()}
        tensors |= {
            "log_scale": torch.ones(()),
            "textual.norm.weight": torch.ones(3),
            f"{prefix}head": torch.ones(64, 8),
        }
    else:
        tensors = {prefix + name: tensor for name, tensor in state.items()}
        tensors |= {"visual_projection.weight": torch.ones(8, 64), "text_model.final_layer_norm.bias": torch.ones(3)}
    path = tmp_path / f"clip{suffix}"
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    if suffix == ".pth":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    loaded = ClipVision.load(path)
    assert torch.equal(loaded.encode(image()), ClipVision.from_state_dict(state).encode(image()))
    assert all(owns_aligned_memory(parameter) for parameter in loaded.model.parameters())
    assert (loaded.image_size, loaded.hidden_size) == (42, 64)


def test_metadata_may_state_the_heads(tmp_path, state, clip):
    save_file(state, tmp_path / "clip.safetensors", metadata={"config": json.dumps(HEADS)})
    assert torch.equal(ClipVision.load(tmp_path / "clip.safetensors").encode(image()), clip.encode(image()))


@pytest.mark.parametrize(("width", "heads"), [(1280, 16), (1024, 16), (768, 12)])
def test_heads_of_the_public_towers(width, heads):
    from wanvideo_infinitetalk.wanvideo.encoders.clip import _config

    shapes = {
        "embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "embeddings.position_embedding.weight": (257, width),
        "encoder.layers.0.mlp.fc1.weight": (4 * width, width),
        "encoder.layers.1.mlp.fc1.weight": (4 * width, width),
    }
    config = _config({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, {}, "The file")
    assert (config["num_attention_heads"], config["image_size"], config["hidden_act"]) == (heads, 224, "gelu")


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_16_bit_weights(state, clip, dtype, limit):
    half = ClipVision.from_state_dict(state, HEADS, dtype=dtype)
    got, expected = half.encode(image()), clip.encode(image())
    assert (half.dtype, got.dtype) == (dtype, torch.float32)
    assert (got - expected).norm() < limit * expected.norm()


def test_inputs_stay_and_may_lie_anywhere(clip):
    pixels = image()
    kept = pixels.clone()
    odd = torch.empty(pixels.numel() + 1)[1:].view(2, 30, 50, 3).permute(0, 3, 1, 2).copy_(pixels)
    assert torch.allclose(clip.encode(odd), clip.encode(pixels), atol=1e-6)
    assert torch.equal(pixels, kept)


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 4, 4, 4), (1, 3, 0, 4)])
def test_pictures_that_cannot_be_seen(clip, shape):
    with pytest.raises(InputError):
        clip.encode(torch.zeros(shape))


def test_models_that_are_refused(state):
    with pytest.raises(CheckpointError, match=r"Wan2\.1 VAE"):
        ClipVision.from_state_dict({"encoder.downsamples.0.residual.0.gamma": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="text encoder"):
        ClipVision.from_state_dict({"encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="lacks"):
        ClipVision.from_state_dict({"embeddings.class_embedding": torch.zeros(64)})
    with pytest.raises(CheckpointError, match="lacks 1 of"):
        ClipVision.from_state_dict({k: v for k, v in state.items() if "layers.1.mlp.fc1.bias" not in k}, HEADS)
    with pytest.raises(CheckpointError, match="5 attention heads"):
        ClipVision.from_state_dict(state, {"num_attention_heads": 5})
