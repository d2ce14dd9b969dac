"""The VAE on a GPU: the kernels between its convolutions, and both ways through memory against float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from unit.test_vae_frames import padding_cases, upsampling_cases
from wanvideo_infinitetalk.benchmarks.vram import PUBLIC_VAE, random_vae
from wanvideo_infinitetalk.wanvideo.encoders.vae import WanVAE
from wanvideo_infinitetalk.wanvideo.kernels import frames, reference
from wanvideo_infinitetalk.wanvideo.linear.base import relative_l2

pytestmark = pytest.mark.cuda

GPU = torch.device("cuda")


def on_gpu(call: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.to(GPU) if isinstance(x, Tensor) else x for x in call)


@pytest.mark.parametrize(("channels", "dtype"), [(96, torch.bfloat16), (384, torch.bfloat16), (24, torch.float16)])
@torch.no_grad()
def test_kernels_and_eager_forms_differ_by_one_rounding(channels: int, dtype: torch.dtype) -> None:
    step = torch.finfo(dtype).eps
    for call in map(on_gpu, list(padding_cases(channels, dtype))[::2]):  # each is a compilation
        before = [x.clone() for x in call if isinstance(x, Tensor)]
        for got, wanted in zip(frames.pad_frames(*call), reference.pad_frames(*call), strict=True):
            assert (got is None) == (wanted is None)
            if got is not None:
                torch.testing.assert_close(got, wanted, rtol=2 * step, atol=2 * step)
        assert all(map(torch.equal, before, (x for x in call if isinstance(x, Tensor))))
    for call in map(on_gpu, upsampling_cases(channels, dtype)):
        assert torch.equal(frames.upsample_frames(*call), reference.upsample_frames(*call))


@pytest.mark.parametrize("tiled", [False, True])
@torch.no_grad()
def test_channels_last_is_no_further_from_float32_than_the_way_of_diffusers(tiled: bool) -> None:
    vae = random_vae(PUBLIC_VAE, GPU, torch.bfloat16)
    for name, parameter in vae.model.named_parameters():
        if "gamma" in name:
            parameter.data.normal_(1, 0.2)
        elif name.endswith("bias"):
            parameter.data.normal_(0, 0.05)
    assert vae._runs_channels_last(vae.model.decoder)
    exact = random_vae(PUBLIC_VAE, GPU, torch.float32)
    exact.model.load_state_dict({name: tensor.float() for name, tensor in vae.model.state_dict().items()})
    plain = WanVAE(vae.model, vae.config, channels_last=False)
    how: dict[str, Any] = {"tiled": True, "tile_size": 128, "tile_overlap": 32} if tiled else {}
    latents, video = torch.randn(1, 16, 4, 20, 26, device=GPU), torch.rand(1, 3, 13, 160, 208, device=GPU) * 2 - 1
    for call in ("decode", "encode"):
        given = latents if call == "decode" else video
        wanted, ours, theirs = (getattr(one, call)(given, **how) for one in (exact, vae, plain))
        assert relative_l2(ours, wanted) <= 1.02 * relative_l2(theirs, wanted)
