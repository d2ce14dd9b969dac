"""NVFP4 linears on the CPU: the format's definition, comfy-kitchen's numbers, layers, the matmul's contract."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from wanvideo_infinitetalk import fp8_optimization as fp8
from wanvideo_infinitetalk.wanvideo.kernels import packages
from wanvideo_infinitetalk.wanvideo.kernels.selftest import SELF_TESTS
from wanvideo_infinitetalk.wanvideo.linear import nvfp4
from wanvideo_infinitetalk.wanvideo.linear.base import relative_l2

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
BOUND = fp8.WEIGHT_ERROR_BOUNDS["fp4_scaled"]


def by_definition(x: torch.Tensor) -> torch.Tensor:
    """NVFP4 of x [M, K], K a multiple of 16, written down directly: block scale to e4m3, nearest e2m1 value."""
    scale = x.abs().max() / (6 * 448)
    blocks = x.reshape(x.shape[0], -1, 16)
    block_scale = (blocks.abs().amax(-1, keepdim=True) / 6 / scale).to(torch.float8_e4m3fn).float() * scale
    scaled = (blocks / block_scale).clamp(-6, 6)
    nearest = (scaled.abs().unsqueeze(-1) - E2M1).abs().argmin(-1)
    return (E2M1[nearest] * scaled.sign() * block_scale).reshape(x.shape)


def test_the_format_is_nvfp4():
    x = torch.randn(32, 64)
    restored = nvfp4.dequantize_nvfp4(*nvfp4.quantize_nvfp4(x), torch.float32)
    expected = by_definition(x)
    # Ties between two neighbors may go either way; there are hardly any in random numbers.
    assert float((restored - expected).abs().gt(1e-6).float().mean()) < 1e-3
    assert 0.05 < relative_l2(restored, x) < BOUND


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Also the sign of zero."""
    same_kind = ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return same_kind and torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (ours, theirs)))


RECORDED = load_file(Path(__file__).parents[1] / "data" / "nvfp4.safetensors")
"""Of comfy-kitchen: for each case the input x, what it stores for it, and the values that it restores."""


@pytest.mark.parametrize("case", sorted({name.partition(".")[0] for name in RECORDED}))
def test_bit_equal_with_recorded_numbers_of_comfy_kitchen(case):
    x, packed, block_scales, scale, values = (
        RECORDED[f"{case}.{part}"] for part in ("x", "packed", "block_scales", "scale", "values")
    )
    stored = nvfp4.quantize_nvfp4(x)
    for ours, theirs in zip(stored, (packed, block_scales, scale), strict=True):
        assert same_bits(ours, theirs)
    assert same_bits(nvfp4.dequantize_nvfp4(packed, block_scales, scale, values.dtype), values)


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(16, 64), (130, 80), (33, 17), (257, 144)])
def test_bit_equal_with_the_installed_comfy_kitchen(shape, dtype, size):
    comfy_kitchen = pytest.importorskip("comfy_kitchen")
    x = (torch.randn(shape) * size).to(dtype)
    x[3] = 0
    x[5, :16] *= 1e-6
    packed, block_scales, scale = nvfp4.quantize_nvfp4(x)
    for ours, theirs in zip((packed, block_scales), comfy_kitchen.quantize_nvfp4(x, scale, pad_16x=True), strict=True):
        assert same_bits(ours, theirs)
    restored = nvfp4.dequantize_nvfp4(packed, block_scales, scale, torch.float32)
    assert same_bits(restored, comfy_kitchen.dequantize_nvfp4(packed, scale, block_scales, torch.float32))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_form_is_bit_equal_on_a_gpu(monkeypatch, dtype):
    monkeypatch.setattr(nvfp4, "KITCHEN", False)
    x = torch.randn(1000, 1008).to(dtype)
    on_cpu, on_gpu = nvfp4.quantize_nvfp4(x), nvfp4.quantize_nvfp4(x.cuda())
    for here, there in zip(on_cpu, on_gpu, strict=True):
        assert same_bits(there.cpu(), here)
    assert same_bits(nvfp4.dequantize_nvfp4(*on_gpu, dtype).cpu(), nvfp4.dequantize_nvfp4(*on_cpu, dtype))


@pytest.mark.parametrize(("out_features", "in_features"), [(48, 64), (20, 40), (1, 16), (33, 17)])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_layers_of_any_size(out_features, in_features, base):
    linear: Any = nn.Linear(in_features, out_features)
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    layer = nvfp4.NVFP4Linear.quantize(linear, base)
    assert layer is linear
    packed, scales = nvfp4.nvfp4_storage_shapes(out_features, in_features)
    assert (tuple(linear.weight.shape), tuple(linear.weight_scale.shape)) == (packed, scales)
    assert linear.weight.dtype == torch.uint8
    assert set(linear.state_dict()) == {"weight", "weight_scale", "weight_scale_2", "bias"}
    restored = linear.dequantized_weight()
    assert restored.dtype == base
    assert relative_l2(restored, weight) < 1.3 * BOUND  # few numbers scatter more
    for shape in ((3, in_features), (2, 3, in_features), (2, 1, 3, in_features), (0, in_features)):
        x = torch.randn(shape).to(base)
        before = x.clone()
        out = linear(x)
        assert torch.equal(x, before)
        assert out.dtype == base
        assert out.is_contiguous()
        exact = F.linear(x.double(), restored.double(), bias.double())
        assert out.shape == exact.shape
        if x.numel():
            assert relative_l2(out, exact) < (1e-5 if base == torch.float32 else 1e-2)


def test_bfloat16_loses_nothing_beyond_its_own_rounding():
    """A scale rounded to bfloat16 would shift every weight by up to 2^-9 in the same direction."""
    stored = nvfp4.quantize_nvfp4(torch.randn(64, 64) * 0.0137)
    exact = nvfp4.dequantize_nvfp4(*stored, torch.float32)
    assert torch.equal(nvfp4.dequantize_nvfp4(*stored, torch.bfloat16), exact.bfloat16())


def test_zeros_stay_zeros_and_outliers_stay_in_their_block():
    assert torch.equal(
        nvfp4.dequantize_nvfp4(*nvfp4.quantize_nvfp4(torch.zeros(16, 32)), torch.float32), torch.zeros(16, 32)
    )
    x = torch.randn(16, 64)
    x[3, 5] = 100.0
    restored = nvfp4.dequantize_nvfp4(*nvfp4.quantize_nvfp4(x), torch.float32)
    assert relative_l2(restored[:, 16:], x[:, 16:]) < BOUND
    assert relative_l2(restored[4:], x[4:]) < BOUND


def test_the_matmul_contract_names_every_reason(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(SELF_TESTS, "_kept", {})
    missing = ["the package comfy-kitchen is not installed"]
    monkeypatch.setattr(packages, "package_reasons", lambda *package: missing)
    assert len(nvfp4.nvfp4_matmul_reasons(20, 40, torch.float32, torch.device("cpu"), rows=0)) == 6
    monkeypatch.setattr(packages, "capability", lambda device: (9, 0))
    reason, package = nvfp4.nvfp4_matmul_reasons(32, 32, torch.bfloat16, cuda)
    assert "9.0, it supports 10.0 and newer (for FP4 tensor cores)" in reason
    assert package == missing[0]
    SELF_TESTS.reset()
    monkeypatch.setattr(packages, "capability", lambda device: (12, 0))
    monkeypatch.setattr(packages, "package_reasons", lambda *package: [])
    assert nvfp4.nvfp4_matmul_reasons(32, 32, torch.bfloat16, cuda) == []


def test_the_record_says_that_fp4_is_unpacked_and_why(monkeypatch):
    linear = nn.Linear(32, 32).requires_grad_(False)
    nvfp4.NVFP4Linear.quantize(linear, torch.bfloat16)
    monkeypatch.setattr(SELF_TESTS, "_kept", {})
    monkeypatch.setattr(packages, "package_reasons", lambda *package: [])
    monkeypatch.setattr(packages, "capability", lambda device: (9, 0))
    assert fp8.how_it_runs(linear, "cuda") == (
        "fp4, unpacked per call instead of the FP4 matmul (the GPU has compute capability 9.0, it supports 10.0 and "
        "newer (for FP4 tensor cores))"
    )
    assert fp8.how_it_runs(linear).startswith("fp4, unpacked per call instead of the FP4 matmul (it runs on cuda")
    SELF_TESTS.reset()
    monkeypatch.setattr(packages, "capability", lambda device: (12, 0))
    assert fp8.how_it_runs(linear, "cuda") == "fp4"


@pytest.mark.parametrize(("version", "used"), [(None, False), ("0.2.9", False), ("0.2.30", True), ("0.3.0", True)])
def test_old_releases_of_comfy_kitchen_are_left_alone(monkeypatch, version, used):
    def installed(name):
        if version is None:
            raise nvfp4.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(nvfp4.metadata, "version", installed)
    assert nvfp4._kitchen_installed() == used


def test_native_call_gets_what_the_kernel_requires(monkeypatch):
    """The call that a Blackwell GPU gets, with the kernel replaced by its definition on unpacked operands."""

    def scaled_mm(a, b, scale_a, scale_b, blocks_a, blocks_b, bias, out_dtype):
        assert a.data_ptr() % 16 == b.data_ptr() % 16 == 0
        assert a.is_contiguous()
        assert b.is_contiguous()
        left = nvfp4.dequantize_nvfp4(a, blocks_a, scale_a, torch.float32)
        right = nvfp4.dequantize_nvfp4(b, blocks_b, scale_b, torch.float32)
        return (left @ right.t() + bias.float()).to(out_dtype)

    monkeypatch.setitem(sys.modules, "comfy_kitchen", SimpleNamespace(scaled_mm_nvfp4=scaled_mm))
    monkeypatch.setattr(nvfp4, "nvfp4_matmul_reasons", lambda *args: [])
    linear: Any = nvfp4.NVFP4Linear.quantize(nn.Linear(64, 48), torch.bfloat16)
    x = torch.randn(2, 5, 65, dtype=torch.bfloat16)[..., 1:]  # 10 rows: padded to 16 inside, at an odd address
    exact = F.linear(x.double(), linear.dequantized_weight().double(), linear.bias.double())
    out = linear(x)
    assert out.shape == (2, 5, 48)
    assert 0.02 < relative_l2(out, exact) < 1.3 * BOUND
