"""The whole way on tiny models on the GPU, in every attention mode and quantization that can run there.

Finite frames, latents within the bounds of the mode and the quantization (`support.tiny_run`), and not one copy made by
the guards: what the model hands to a kernel already lies as the kernel wants it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny_run import MODE_BOUNDS, ROUNDING, Made, Prepared, latent_bound, prepare, run, why_not
from wanvideo_infinitetalk.cli.demo import demo_job
from wanvideo_infinitetalk.cli.tiny_models import TinySet
from wanvideo_infinitetalk.fp8_optimization import QUANTIZATIONS
from wanvideo_infinitetalk.media.video import VideoFrames
from wanvideo_infinitetalk.pipeline.make_video import make_video
from wanvideo_infinitetalk.wanvideo.linear.base import relative_l2
from wanvideo_infinitetalk.wanvideo.modules import attention as modes
from wanvideo_infinitetalk.wanvideo.modules.attention import ATTENTION_MODES
from wanvideo_infinitetalk.wanvideo.modules.backends import Backend, Contract, Device, register, unregister

pytestmark = pytest.mark.cuda

DEVICE = "cuda"


def needs(mode: str) -> None:
    if reasons := why_not(mode, torch.device(DEVICE, 0)):
        pytest.skip(reasons)


@pytest.fixture(scope="module")
def prepared(tiny_set: TinySet) -> Callable[[torch.dtype], Prepared]:
    """`prepared(dtype)`: the encoders' work, done once per dtype."""
    done: dict[torch.dtype, Prepared] = {}

    def get(dtype: torch.dtype) -> Prepared:
        if dtype not in done:
            done[dtype] = prepare(tiny_set, torch.device(DEVICE, 0), dtype)
        return done[dtype]

    return get


@pytest.fixture(scope="module")
def reference(prepared: Callable[[torch.dtype], Prepared]) -> Callable[[torch.dtype], Made]:
    """`reference(dtype)`: one window in mode "sdpa", not quantized."""
    done: dict[torch.dtype, Made] = {}

    def get(dtype: torch.dtype) -> Made:
        if dtype not in done:
            done[dtype] = run(prepared(dtype), "sdpa", "disabled")
        return done[dtype]

    return get


def check(made: Made, what: str) -> None:
    torch.cuda.synchronize()
    assert bool(torch.isfinite(made.latents).all()), what
    assert bool(torch.isfinite(made.frames).all()), what
    assert float(made.frames.std()) > 0.01, f"{what}: the frames are of one color"
    assert made.guards.copies == 0, f"{what}: {made.guards}"
    assert made.guards.calls > 0


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("mode", ATTENTION_MODES)
def test_every_mode_with_every_quantization(mode, quantization, prepared, reference, record_property):
    """One window in bfloat16, as users run it: by the default policy."""
    needs(mode)
    made = run(prepared(torch.bfloat16), mode, quantization)
    check(made, f"{mode}, {quantization}")
    error = relative_l2(made.latents, reference(torch.bfloat16).latents)
    record_property("latents", f"{error:.4f}")
    assert error <= latent_bound(mode, quantization, torch.bfloat16)


@pytest.mark.parametrize("mode", ATTENTION_MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_mode_in_other_dtypes(mode, dtype, prepared, reference, record_property):
    """In float32 the bounds are tight: what is left is what the kernel itself rounds. Every step uses the mode."""
    needs(mode)
    if mode.startswith("flash") and dtype == torch.float32:
        pytest.skip("FlashAttention rounds float32 to bfloat16")
    made = run(prepared(dtype), mode, "disabled", policy="uniform")
    check(made, f"{mode}, {dtype}")
    error = relative_l2(made.latents, reference(dtype).latents)
    record_property("latents", f"{error:.5f}")
    assert error <= latent_bound(mode, "disabled", dtype)
    assert dtype != torch.float32 or error >= MODE_BOUNDS[mode][0], f"{mode} gives what sdpa gives"


def test_gpu_and_cpu_agree(tiny_set: TinySet, reference):
    """Up to TF32, which torch allows in the convolutions of the encoders."""
    on_cpu = run(prepare(tiny_set, "cpu", torch.float32), "sdpa", "disabled")
    assert relative_l2(reference(torch.float32).latents, on_cpu.latents) < 0.03


def test_runs_repeat(prepared):
    first, second = (run(prepared(torch.bfloat16), "sageattn_3_fp8", "fp8_e4m3fn_scaled_fast") for _ in range(2))
    assert torch.equal(first.latents, second.latents)


@pytest.mark.parametrize("policy", ["default", "ends_16bit", "uniform"])
def test_policies(policy, prepared, reference):
    made = run(prepared(torch.bfloat16), "sageattn_3_fp4", "disabled", policy=policy)
    check(made, policy)
    assert relative_l2(made.latents, reference(torch.bfloat16).latents) <= latent_bound(
        "sageattn_3_fp4", "disabled", torch.bfloat16
    )


@pytest.mark.parametrize("mode", ATTENTION_MODES)
def test_from_files_to_a_video_file(mode: str, tiny_set: TinySet, tmp_path: Path):
    """`infinitetalk demo` on the GPU: two windows, the second cut short, sound, a file that plays."""
    needs(mode)
    out = tmp_path / "video.mp4"
    with demo_job(out, models=tiny_set.model.parent, attention_mode=mode, device=DEVICE) as job:
        frames = job.config.frames + 20
        result = make_video(replace(job, max_frames=frames))
    assert result.frames == frames
    assert result.guards.copies == 0
    assert result.kernels
    video = VideoFrames(out)
    assert len(video) == frames


def test_block_swap_gives_the_same_file(tiny_set: TinySet, tmp_path: Path):
    pictures = []
    for blocks in (0, 1, 2):
        out = tmp_path / f"{blocks}.mp4"
        with demo_job(out, models=tiny_set.model.parent, attention_mode="sdpa", device=DEVICE) as job:
            make_video(replace(job, max_frames=9, blocks_to_swap=blocks, quantization="fp8_e4m3fn_scaled_fast"))
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1] == pictures[2]


@pytest.mark.parametrize("wrong", ["mean of V", "neighbor's query", "zeros"])
def test_the_bounds_would_see_a_wrong_kernel(wrong, prepared, reference, monkeypatch):
    """The bounds above mean something: self-attention that is finite but wrong lies outside of them."""

    def lie(inputs):
        q, k, v = inputs.q, inputs.k, inputs.v
        if wrong == "mean of V":
            return v.mean(1, keepdim=True).expand(q.shape).clone()
        if wrong == "zeros":
            return torch.zeros_like(q)
        return modes.attention(q.roll(1, 1), k, v, "eager")

    contract = Contract(dtypes=(torch.float32,), layout="any", device=Device(types=()))
    register(Backend("lying", contract, lie))
    monkeypatch.setitem(modes.MODE_BACKENDS, "sageattn_3_fp4", ("lying",))
    try:
        made = run(prepared(torch.float32), "sageattn_3_fp4", "disabled", policy="uniform")
    finally:
        unregister("lying")
    error = relative_l2(made.latents, reference(torch.float32).latents)
    assert error > latent_bound("sageattn_3_fp4", "disabled", torch.float32)
    assert ROUNDING[torch.float32] < error
