"""The low-precision numerics: quantizers bit for bit, attention within the bounds of the papers."""

from __future__ import annotations

import pytest
import torch
from wanvideo_infinitetalk.wanvideo.kernels import emulation, quantizers
from wanvideo_infinitetalk.wanvideo.kernels.emulation import int8_fp8_attention, nvfp4_attention
from wanvideo_infinitetalk.wanvideo.kernels.quantizers import (
    E2M1_VALUES,
    nvfp4_tensor_scale,
    pack_e2m1,
    quantize_nvfp4,
    round_to_e2m1,
    unpack_e2m1,
)
from wanvideo_infinitetalk.wanvideo.modules.attention import attention

# --- quantizers ------------------------------------------------------------------------------------------------------


def test_rounding_is_to_the_nearest_and_ties_to_the_even_code() -> None:
    grid = torch.tensor(E2M1_VALUES)
    assert torch.equal(round_to_e2m1(grid), grid)
    ties = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}
    for value, rounded in ties.items():
        assert round_to_e2m1(torch.tensor(value)) == rounded
        assert round_to_e2m1(torch.tensor(-value)) == -rounded
    x = torch.linspace(-8, 8, 4001)
    full = torch.cat((-grid.flip(0), grid))
    nearest = (x.clamp(-6, 6)[:, None] - full).abs().amin(1)
    torch.testing.assert_close((round_to_e2m1(x) - x.clamp(-6, 6)).abs(), nearest)
    assert round_to_e2m1(torch.tensor(torch.inf)) == 6
    assert round_to_e2m1(torch.tensor(torch.nan)).isnan()


def test_packing_goes_both_ways() -> None:
    values = torch.tensor(E2M1_VALUES + tuple(-v for v in E2M1_VALUES))
    for first_high in (True, False):
        packed = pack_e2m1(values, first_high)
        assert packed.dtype == torch.uint8
        assert torch.equal(unpack_e2m1(packed, first_high), values)
    assert pack_e2m1(torch.tensor([0.5, -6.0])).item() == 0x1F


@pytest.mark.parametrize("size", [1.0, 1e-5, 1e6, 3e37])
def test_nvfp4_error_does_not_depend_on_the_size_of_the_values(size: float) -> None:
    x = torch.randn(8, 512) * size
    scale = nvfp4_tensor_scale(x, (0, 1))
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    back = quantize_nvfp4(x, scale).dequantized()
    assert float((back.double() - x.double()).norm() / x.double().norm()) < 0.1


def test_the_power_of_two_scale_changes_nothing_for_values_that_fit() -> None:
    x = torch.randn(64, 128)
    with_scale = quantize_nvfp4(x, nvfp4_tensor_scale(x, (0, 1)))
    assert torch.equal(with_scale.dequantized(), quantize_nvfp4(x).dequantized())


def test_nvfp4_operands_are_exact_in_bfloat16() -> None:
    x = torch.randn(64, 250) * 100
    quantized = quantize_nvfp4(x, nvfp4_tensor_scale(x, (0, 1)))
    assert quantized.values.shape == (64, 256)
    assert quantized.block_scales.shape == (64, 16)
    assert quantized.values[:, 250:].eq(0).all()
    assert torch.equal(quantized.operand(torch.bfloat16).float(), quantized.operand())


def test_powers_of_two_are_rounded_up_to() -> None:
    x = torch.tensor([1.0, 1.0000001, 3.0, 4.0, 2.0**-126, 3e38, torch.inf, torch.nan])
    got = quantizers.power_of_two_from(x)
    assert got[:-1].tolist() == [1.0, 2.0, 4.0, 4.0, 2.0**-126, 2.0**127, torch.inf]
    assert got[-1].isnan()


def test_zeros_and_nan_in_quantizers() -> None:
    zeros = torch.zeros(2, 32)
    assert quantize_nvfp4(zeros, nvfp4_tensor_scale(zeros, (0, 1))).dequantized().eq(0).all()
    for quantize in (quantizers.int8_scaled, quantizers.e4m3_scaled):
        values, scale = quantize(zeros, (1,))
        assert (values * scale).eq(0).all()
        values, scale = quantize(torch.randn(4, 64), (1,))
        assert values.abs().max() <= (127 if quantize is quantizers.int8_scaled else 448)
    broken = torch.randn(2, 32)
    broken[0, 3] = torch.nan
    assert quantize_nvfp4(broken, nvfp4_tensor_scale(broken, (1,))).dequantized()[0].isnan().any()


# --- attention -------------------------------------------------------------------------------------------------------


def like_the_papers(length: int = 1024, dim: int = 128) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What Q, K, V of video models look like (SageAttention2, section 3.1): channels of K and Q with a bias that all
    tokens share, larger in K than what sets tokens apart, and peaked attention; V with a smaller one. [1, L, 2, D]."""
    heads = 2
    q = 2 * torch.randn(1, length, heads, dim) + 2 * torch.randn(1, 1, heads, dim)
    k = torch.randn(1, length, heads, dim) + 8 * torch.randn(1, 1, heads, dim)
    v = torch.randn(1, length, heads, dim) + torch.randn(1, 1, heads, dim)
    return q, k, v


def normal(length: int = 512, dim: int = 128) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = torch.randn(3, 1, length, 2, dim)
    return q, k + 8 * torch.randn(1, 1, 2, dim), v


def accuracy(out: torch.Tensor, qkv: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    """Cosine similarity and relative L2 against float64."""
    want = attention(*(x.double() for x in qkv), "eager").flatten()
    got = out.double().flatten()
    return float(got @ want / got.norm() / want.norm()), float((got - want).norm() / want.norm())


def test_nvfp4_meets_the_paper() -> None:
    """arXiv 2505.11594, table 2: NVFP4 with all its parts 0.9952 on a video model; each part is needed."""
    qkv = like_the_papers()
    cosine, error = accuracy(nvfp4_attention(*qkv), qkv)
    assert cosine >= 0.995
    assert error < 0.1
    without = {
        "block means": nvfp4_attention(*qkv, block_means=False),
        "two levels": nvfp4_attention(*qkv, two_level=False),
        "smooth K": nvfp4_attention(*qkv, smooth_k=False),
    }
    for part, out in without.items():
        worse, _ = accuracy(out, qkv)
        assert 1 - worse > 1.2 * (1 - cosine), part


def test_int8_fp8_meets_the_paper() -> None:
    """arXiv 2411.10958, table 1: cosine 0.999 and more."""
    qkv = like_the_papers()
    cosine, error = accuracy(int8_fp8_attention(*qkv), qkv)
    assert cosine >= 0.9995
    assert error < 0.03
    worse, _ = accuracy(int8_fp8_attention(*qkv, smooth_k=False), qkv)
    assert 1 - worse > 5 * (1 - cosine)


def test_white_noise_is_the_hardest_input() -> None:
    """V without structure averages to nearly nothing, and the error does not: the format's own 9.5 % per operand."""
    qkv = normal()
    cosine, error = accuracy(nvfp4_attention(*qkv), qkv)
    assert cosine >= 0.98
    assert error < 0.2
    cosine, error = accuracy(int8_fp8_attention(*qkv), qkv)
    assert cosine >= 0.999
    assert error < 0.04


@pytest.mark.parametrize("attend", [nvfp4_attention, int8_fp8_attention])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 17), (129, 31), (127, 513), (300, 64)])
@pytest.mark.parametrize("dim", [24, 64, 128])
def test_any_length_and_head_size(attend, queries: int, keys: int, dim: int) -> None:
    q, k, v = torch.randn(2, queries, 3, dim), torch.randn(2, keys, 3, dim), torch.randn(2, keys, 3, dim)
    out = attend(q, k, v)
    assert out.shape == q.shape
    assert out.is_contiguous()
    cosine, _ = accuracy(out, (q, k, v))
    assert cosine > 0.97


@pytest.mark.parametrize("attend", [nvfp4_attention, int8_fp8_attention])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_inputs_stay_and_the_dtype_too(attend, dtype: torch.dtype) -> None:
    qkv = tuple(x.to(dtype) for x in normal(length=130, dim=64))
    before = [x.clone() for x in qkv]
    out = attend(*qkv)
    assert out.dtype == dtype
    for x, old in zip(qkv, before, strict=True):
        assert torch.equal(x, old)


@pytest.mark.parametrize("attend", [nvfp4_attention, int8_fp8_attention])
def test_slices_of_heads_and_queries_change_nothing(attend, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = torch.randn(3, 2, 400, 5, 32)
    whole = attend(*qkv)
    monkeypatch.setattr(emulation, "CHUNK_BYTES", 2 * 128 * 4 * 400)  # two heads, one block of queries
    torch.testing.assert_close(attend(*qkv), whole, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(emulation, "CHUNK_BYTES", 1)
    torch.testing.assert_close(attend(*qkv), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attend", [nvfp4_attention, int8_fp8_attention])
@pytest.mark.parametrize("size", [1e-6, 1e5, 1e30])
def test_values_of_any_size_stay_finite_and_right(attend, size: float) -> None:
    q, k, v = like_the_papers(length=256, dim=64)
    out = attend(q, k, v * size)
    assert out.isfinite().all()
    cosine, _ = accuracy(out, (q, k, v * size))
    assert cosine > 0.98


@pytest.mark.parametrize("attend", [nvfp4_attention, int8_fp8_attention])
def test_huge_scores_pick_one_key(attend) -> None:
    q, k, v = torch.randn(3, 1, 64, 1, 64) * 3e4
    out = attend(q, k, v)
    assert out.isfinite().all()


@pytest.mark.parametrize("attend", [nvfp4_attention, int8_fp8_attention])
def test_equal_rows_and_zeros(attend) -> None:
    row = torch.randn(1, 1, 2, 64)
    q, k = torch.randn(1, 70, 2, 64), row.expand(1, 70, 2, 64)
    v = torch.randn(1, 70, 2, 64) + 3
    torch.testing.assert_close(attend(q, k, v), v.mean(1, keepdim=True).expand_as(q), atol=0.2, rtol=0.05)
    zeros = torch.zeros(1, 20, 2, 64)
    assert attend(zeros, zeros, zeros).eq(0).all()


@pytest.mark.parametrize("attend", [nvfp4_attention, int8_fp8_attention])
def test_the_scale_is_honoured(attend) -> None:
    q, k, v = like_the_papers(length=256, dim=64)
    want = attention(q.double(), k.double(), v.double(), "eager", softmax_scale=0.01)
    got = attend(q, k, v, 0.01)
    assert float((got - want).norm() / want.norm()) < 0.2
    assert not torch.allclose(got, attend(q, k, v), atol=0.1)


@pytest.mark.parametrize("attend", [nvfp4_attention, int8_fp8_attention])
def test_nan_is_not_hidden(attend) -> None:
    q, k, v = torch.randn(3, 1, 40, 2, 64)
    v[0, 7, 1, 3] = torch.nan
    out = attend(q, k, v)
    assert out[:, :, 1].isnan().any()
    assert out[:, :, 0].isfinite().all()
