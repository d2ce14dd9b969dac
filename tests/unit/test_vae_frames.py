"""The VAE's stacks with channels last: the numbers of diffusers' modules, and the kernels between convolutions."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from wanvideo_infinitetalk.benchmarks.vram import SMALL_VAE, random_vae
from wanvideo_infinitetalk.wanvideo.encoders import vae as vae_module
from wanvideo_infinitetalk.wanvideo.encoders.vae import VaeConfig, WanVAE
from wanvideo_infinitetalk.wanvideo.encoders.vae_frames import FrameDecoder
from wanvideo_infinitetalk.wanvideo.kernels import reference
from wanvideo_infinitetalk.wanvideo.runtime.compilation import CompileSettings, compile_model

CPU = torch.device("cpu")


def vae(config: VaeConfig = SMALL_VAE, **options: Any) -> WanVAE:
    made = WanVAE(random_vae(config, CPU, torch.float32).model, config, **options)
    for name, parameter in made.model.named_parameters():
        if "gamma" in name:
            parameter.data.normal_(1, 0.2)
        elif name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    return made


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize(("batch", "width"), [(1, 8), (2, 8), (1, 4), (1, 12)])
def test_both_ways_through_memory_give_the_same_numbers(batch: int, width: int) -> None:
    ours = vae(dataclasses.replace(SMALL_VAE, base_dim=width), channels_last=True)
    plain = WanVAE(ours.model, ours.config, channels_last=False)
    latents, video = torch.randn(batch, 16, 4, 4, 6), torch.rand(batch, 3, 13, 32, 48) * 2 - 1
    # float32, another order of sums
    assert relative(ours.decode(latents * 0.1), plain.decode(latents * 0.1)) < 1e-5
    assert relative(ours.encode(video), plain.encode(video)) < 1e-5
    tiled = {"tiled": True, "tile_size": 32, "tile_overlap": 8}
    assert relative(ours.decode(latents * 0.1, **tiled), plain.decode(latents * 0.1, **tiled)) < 1e-5


def test_a_gpu_in_16_bits_takes_channels_last_unless_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    made = vae()
    assert not made._runs_channels_last(made.model.decoder)
    monkeypatch.setattr(WanVAE, "device", torch.device("cuda"))
    monkeypatch.setattr(vae_module, "elementwise_reasons", lambda needs, device: ())
    assert not made._runs_channels_last(made.model.decoder)  # float32
    monkeypatch.setattr(WanVAE, "dtype", torch.bfloat16)
    assert made._runs_channels_last(made.model.decoder)
    narrow = vae(dataclasses.replace(SMALL_VAE, base_dim=4))  # cuDNN would not read 16 bytes at a time
    assert not narrow._runs_channels_last(narrow.model.decoder)
    compile_model(made.model.decoder, CompileSettings(backend="eager", blocks_only=False))
    assert not made._runs_channels_last(made.model.decoder)
    assert made._runs_channels_last(made.model.encoder)
    monkeypatch.setattr(vae_module, "elementwise_reasons", lambda needs, device: ("no compiler",))
    assert not made._runs_channels_last(made.model.encoder)


@torch.no_grad()
def test_what_a_convolution_remembers_reaches_the_next_chunk() -> None:
    decoder = vae().model.decoder
    latents = torch.randn(1, 16, 3, 4, 6)
    stream, fresh = FrameDecoder(decoder), FrameDecoder(decoder)
    for t in range(3):
        continued = stream(latents[:, :, t : t + 1])
    fresh(latents[:, :, :1])
    assert relative(fresh(latents[:, :, 2:]), continued) > 1e-2


# ------------------------------------------------------------------------------------------------- the Triton kernels


PARTS = [
    (False, False, False, False, False),
    (True, True, True, True, True),
    (True, False, True, True, False),
    (True, True, False, False, True),
    (False, True, True, False, True),
]
"""With and without bias, residual, norm and history, and whether the sum is kept: what the stacks ask for, and none."""


def padding_cases(channels: int, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Arguments of `pad_frames`: each use that the stacks make of it, with and without each optional part."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    for frames, kept, before, after in ((1, 2, 1, 1), (4, 2, 1, 1), (2, 2, 0, 0), (4, 1, 0, 0), (3, 0, 0, 1)):
        for bias, residual, gamma, history, keep in PARTS:
            if history and not kept:
                continue
            shape = (2, frames, 3, 5, channels)
            yield (
                random(2, frames, 3, 5, channels + 8 * bias)[..., :channels],  # a convolution that computed more
                random(channels) if bias else None,
                random(*shape) if residual else None,
                random(channels) if gamma else None,
                random(2, kept, 3, 5, channels) if history else None,
                *(kept, before, after, keep),
            )


def upsampling_cases(channels: int, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for split, bias, residual in itertools.product((1, 2), (False, True), (False, True)):
        y = torch.randn(2, 3, 3, 5, split * channels).to(dtype)
        yield y, torch.randn(split * channels).to(dtype) if bias else None, y.clone() if residual else None, split


def interpret() -> None:
    """Every case in Triton's interpreter, float32: only the order of sums differs."""
    from wanvideo_infinitetalk.wanvideo.kernels import frames as kernels

    for channels in (8, 6):
        for call in padding_cases(channels, torch.float32):
            for got, wanted in zip(kernels.pad_frames(*call), reference.pad_frames(*call), strict=True):
                assert (got is None) == (wanted is None)
                if got is not None:
                    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        for call in upsampling_cases(channels, torch.float32):
            torch.testing.assert_close(kernels.upsample_frames(*call), reference.upsample_frames(*call))


def test_the_kernels_are_right_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    ran = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]


if __name__ == "__main__":
    torch.manual_seed(0)
    interpret()
