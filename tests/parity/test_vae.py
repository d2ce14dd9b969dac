"""The VAE against golden item 12. Limit: rel 2e-5 of the whole model in float32."""

from __future__ import annotations

import pytest
import torch
from support.goldens import relative_error
from wanvideo_infinitetalk.wanvideo.encoders.vae import WanVAE

LIMIT = 2e-5


@pytest.fixture
def case(golden):
    item = golden("vae_tiny").float()
    vae = WanVAE.from_state_dict(
        item.weights, latents_mean=item.inputs["mean"].tolist(), latents_std=item.inputs["std"].tolist()
    )
    return item, vae


def test_configuration_is_read_from_the_shapes(case):
    item, vae = case
    config = item.config
    assert vae.config.base_dim == config["dim"]
    assert vae.config.z_dim == config["z_dim"]
    assert list(vae.config.dim_mult) == config["dim_mult"]
    assert vae.config.num_res_blocks == config["num_res_blocks"]
    assert list(vae.config.temporal) == config["temperal_downsample"]


def test_latents(case):
    item, vae = case
    video = item.inputs["video"]
    assert relative_error(vae.encode(video), item.outputs["latents"]) <= LIMIT
    assert relative_error(vae.encode(video[:, :, :1]), item.outputs["latents_1frame"]) <= LIMIT
    shorter = item.outputs["latents_of_first_T_minus_2_frames"]
    assert relative_error(vae.encode(video[:, :, :-2]), shorter) <= LIMIT


def test_raw_mean(case):
    item, vae = case
    mean, std = (item.inputs[name].view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    assert relative_error(vae.encode(item.inputs["video"]) * std + mean, item.outputs["mu_raw"]) <= LIMIT


@pytest.mark.parametrize(
    ("latents", "expected"),
    [
        ("latents", "reconstruction_unclamped"),
        ("latents", "reconstruction"),
        ("latents_1frame", "reconstruction_1frame_unclamped"),
        ("random_z", "decode_random_z_unclamped"),
    ],
)
def test_frames(case, latents, expected):
    item, vae = case
    z = item.inputs[latents] if latents in item.inputs else item.outputs[latents]
    reference = item.outputs[expected]
    frames = vae.decode(z)
    error = float((frames.double() - reference.double().clamp(-1, 1)).abs().max())
    assert frames.shape == reference.shape
    assert error <= LIMIT * float(reference.double().square().mean().sqrt())


def test_frames_of_unnormalized_latents(golden):
    item = golden("vae_tiny").float()
    vae = WanVAE.from_state_dict(item.weights)
    if vae.z_dim == 16:
        pytest.skip("16 latent channels take the constants of Wan2.1")
    assert torch.equal(vae.latents_mean, torch.zeros(vae.z_dim))
    reference = item.outputs["reconstruction_from_raw_mu_unscaled"]
    error = float((vae.decode(item.outputs["mu_raw"]) - reference.clamp(-1, 1)).abs().max())
    assert error <= LIMIT * float(reference.double().square().mean().sqrt())
