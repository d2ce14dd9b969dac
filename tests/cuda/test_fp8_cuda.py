"""Quantized linears on an NVIDIA GPU: every quantization with the layouts that kernels fault on, against float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.layer_cases import exact_linear, linear_bound
from torch import nn
from wanvideo_infinitetalk import fp8_optimization as fp8
from wanvideo_infinitetalk.wanvideo.kernels import linear as kernels
from wanvideo_infinitetalk.wanvideo.kernels import reference
from wanvideo_infinitetalk.wanvideo.kernels.selftest import eager_reasons
from wanvideo_infinitetalk.wanvideo.linear.base import relative_l2
from wanvideo_infinitetalk.wanvideo.linear.nvfp4 import NVFP4Linear

pytestmark = pytest.mark.cuda

BASES = (torch.bfloat16, torch.float16, torch.float32)
QUANTIZED = [name for name in fp8.QUANTIZATIONS if name != "disabled"]


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def make(name: str, base: torch.dtype, out_features: int = 96, in_features: int = 128) -> Any:
    wanted = fp8.Quantization.parse(name)
    linear = nn.Linear(in_features, out_features).to(device())
    if wanted.format == "fp4":
        return NVFP4Linear.quantize(linear, base)
    dtype = fp8.FP8_DTYPES[wanted.format]
    fp8.Fp8Linear.quantize(linear, dtype, base, scaled=wanted.scaled, fast=wanted.fast)
    return linear


def check(linear: Any, x: torch.Tensor, what: str) -> None:
    before = x.clone()
    out = linear(x)
    torch.cuda.synchronize()
    assert out.is_contiguous(), what
    assert out.dtype == linear.base_dtype, what
    assert torch.equal(x, before), f"{what}: the input was written to"
    expected = exact_linear(linear, x)
    assert out.shape == expected.shape, what
    if out.numel():
        # The error of a few rows scatters around that of many.
        slack = 1.0 if out.shape[:-1].numel() >= 16 else 1.2
        assert relative_l2(out, expected) < slack * linear_bound(linear), what


def layouts(dtype: torch.dtype, features: int) -> Iterator[tuple[str, torch.Tensor]]:
    shape = (2, 33, features)
    plain = torch.randn(shape, device=device()).to(dtype)
    for offset in range(16):
        storage = torch.zeros(plain.numel() + offset, device=device(), dtype=dtype)
        yield f"offset {offset}", storage[offset:].view(shape).copy_(plain)
    wide = torch.randn(2, 33, features + 3, device=device()).to(dtype)
    yield "column slice", wide[..., 1:-2]
    yield "row slice", torch.randn(2, 70, features, device=device()).to(dtype)[:, 1::2][:, :33]
    yield "transposed", plain.transpose(0, 1)
    yield "last stride", plain.permute(2, 0, 1).clone().permute(1, 2, 0)
    yield "expanded", plain[:1].expand(shape)


@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("name", QUANTIZED)
def test_every_layout(name, base):
    linear = make(name, base)
    for what, x in layouts(base, linear.in_features):
        check(linear, x, what)


@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("name", QUANTIZED)
def test_every_rank_and_row_count(name, base):
    linear = make(name, base)
    shapes = [(128,), (2, 128), (2, 3, 128), (2, 3, 5, 128), (0, 128), (1, 0, 128)]
    shapes += [(rows, 128) for rows in (1, 3, 15, 16, 17, 127, 129, 1561)]
    for shape in shapes:
        check(linear, torch.randn(shape, device=device()).to(base), str(shape))


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize(("out_features", "in_features"), [(96, 120), (100, 128), (7, 33), (17, 16), (5120, 768)])
def test_every_extent(name, out_features, in_features):
    linear = make(name, torch.bfloat16, out_features, in_features)
    check(linear, torch.randn(2, 19, in_features, device=device()).bfloat16(), f"{out_features} x {in_features}")


@pytest.mark.parametrize("name", ["fp8_e4m3fn_scaled_fast", "fp8_e5m2_fast", "fp8_e4m3fn", "fp8_e5m2_scaled"])
@pytest.mark.parametrize("base", BASES, ids=str)
def test_weights_at_odd_addresses_and_strides(name, base):
    linear = make(name, base)
    weight = linear.weight.detach()
    for offset in (1, 8, 16):
        storage = torch.zeros(weight.numel() + offset, device=device(), dtype=torch.uint8).view(weight.dtype)
        moved = storage[offset:].view(weight.shape)
        moved.copy_(weight)
        linear.weight = nn.Parameter(moved, requires_grad=False)
        check(linear, torch.randn(5, 128, device=device()).to(base), f"weight {offset} bytes off")
    wide = torch.zeros(96, 130, device=device(), dtype=torch.uint8).view(weight.dtype)
    wide[:, 1:129].copy_(weight)
    linear.weight = nn.Parameter(wide[:, 1:129], requires_grad=False)
    check(linear, torch.randn(5, 128, device=device()).to(base), "weight as a column slice")
    turned = weight.view(torch.uint8).t().clone().view(weight.dtype).t()
    linear.weight = nn.Parameter(turned, requires_grad=False)
    check(linear, torch.randn(5, 128, device=device()).to(base), "weight stored transposed")


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_rows_stay_visible(name, bad):
    linear = make(name, torch.bfloat16)
    x = torch.randn(40, 128, device=device()).bfloat16()
    x[7, 3] = bad
    out = linear(x)
    assert not torch.isfinite(out[7]).any()
    if not isinstance(linear, NVFP4Linear):  # its activations share one scale, where the FP4 matmul runs
        assert torch.isfinite(out[:7]).all()
        assert torch.isfinite(out[8:]).all()


@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("name", [n for n in QUANTIZED if n.endswith("_fast")])
def test_gpu_and_cpu_agree(name, base):
    """The CPU's computation of the fast way is what the GPU gives, up to the order of additions."""
    linear = make(name, base, 256, 512)
    x = torch.randn(3, 50, 512, device=device()).to(base)
    on_gpu = linear(x).cpu()
    on_cpu = linear.cpu()(x.cpu())
    assert relative_l2(on_gpu, on_cpu) < 4e-3  # the tensor cores add with 14 bits


def rows_of(kind: str, m: int, k: int, base: torch.dtype) -> torch.Tensor:
    x = torch.randn(m, k, device=device())
    if kind == "outlier channels":
        x[:, ::17] *= 100
    elif kind == "tiny":
        x *= 1e-6
    elif kind == "zeros":
        x[::2] = 0.0
    return x.to(base)


@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "outlier channels", "tiny", "zeros"])
@pytest.mark.parametrize(("m", "k"), [(1, 1), (7, 16), (257, 100), (2000, 5120), (9, 13824), (3, 16384)])
def test_the_row_quantizer_kernel_is_bit_equal_to_eager(kind, m, k, base):
    x = rows_of(kind, m, k, base)
    before = x.clone()
    assert not eager_reasons(kernels.QUANTIZE_ROWS, (x,))
    values, scale = kernels.quantize_rows(x)
    wanted_values, wanted_scale = reference.quantize_rows(x)
    assert torch.equal(scale, wanted_scale)
    assert torch.equal(values.view(torch.uint8), wanted_values.view(torch.uint8))
    assert torch.equal(x, before), "the input changed"


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_the_row_quantizer_kernel_hides_nothing(poison):
    x = torch.randn(9, 128, device=device()).bfloat16()
    x[4, 100] = poison
    values, scale = kernels.quantize_rows(x)
    products = values.float().sum(1) * scale[:, 0]
    assert not torch.isfinite(products[4])
    assert torch.isfinite(products[[0, 1, 2, 3, 5, 6, 7, 8]]).all()


@pytest.mark.parametrize("offset", [1, 2, 4, 7])
def test_the_row_quantizer_kernel_reads_any_address(offset):
    x = torch.randn(33, 128, device=device()).bfloat16()
    moved = x.new_empty(x.numel() + offset)[offset:].view(x.shape).copy_(x)
    for got, wanted in zip(kernels.quantize_rows(moved), kernels.quantize_rows(x), strict=True):
        assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("m", "n"), [(1, 16), (33, 1000), (7, 1024), (5, 5120)])
def test_the_scaling_of_a_product_is_bit_equal_to_eager(m, n, biased, per_column, base):
    product = 100 * torch.randn(m, n, device=device())
    rows = torch.rand(m, 1, device=device())
    columns = torch.rand(1, n if per_column else 1, device=device())
    bias = torch.randn(n, device=device()).to(base) if biased else None
    call = (product, rows, columns, bias, base)
    assert not eager_reasons(kernels.SCALE_PRODUCT, call[:4], dtype=base)
    assert torch.equal(kernels.scale_product(*call), reference.scale_product(*call))


@pytest.mark.parametrize("base", BASES, ids=str)
def test_the_row_quantizer_compiles_to_the_same_numbers(base):
    x = torch.randn(257, 640, device=device()).to(base)
    values, scale = fp8.quantize_rows_fp8(x)
    compiled_values, compiled_scale = torch.compile(fp8.quantize_rows_fp8, fullgraph=True)(x)
    assert relative_l2(compiled_scale, scale) < 1e-6
    # The compiled division may round the other way at ties: then a value is one step of e4m3 off.
    assert float((compiled_values.float() != values.float()).float().mean()) < 1e-3


@pytest.mark.parametrize("name", ["fp8_e4m3fn_scaled_fast", "fp8_e5m2_fast", "fp8_e4m3fn_scaled"])
def test_a_forward_can_be_captured_in_a_graph(name):
    """No synchronization, no visit to the host inside."""
    linear = make(name, torch.bfloat16)
    x = torch.randn(64, 128, device=device()).bfloat16()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        linear(x)  # warm-up outside of the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = linear(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    with torch.no_grad():
        assert torch.equal(captured, linear(x))


# What the guards and the contract protect from, shown on the raw call. In a child process: a fault poisons the process.
RAW_CALL = """
import torch
case = {case!r}
rows, columns, out = 64, 128, 96
if case == "inner extent 20":
    columns = 20
if case == "outer extent 100":
    out = 100
x = torch.randn(rows, columns, device="cuda").to(torch.float8_e4m3fn)
w = torch.randn(out, columns, device="cuda").to(torch.float8_e4m3fn)
def moved(t, offset):
    storage = torch.zeros(t.numel() + offset, device="cuda", dtype=torch.uint8).view(t.dtype)
    view = storage[offset:].view(t.shape)
    view.copy_(t)
    return view
if case.startswith("input offset"):
    x = moved(x, int(case.split()[-1]))
if case.startswith("weight offset"):
    w = moved(w, int(case.split()[-1]))
if case == "column slice":
    wide = torch.zeros(rows, columns + 2, device="cuda", dtype=torch.uint8).view(x.dtype)
    wide[:, 1:-1].copy_(x)
    x = wide[:, 1:-1]
expected = x.double() @ w.double().t()
one = torch.ones((), device="cuda")
y = torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
torch.cuda.synchronize()
error = float((y.double() - expected).norm() / expected.norm())
assert error < 0.01, f"wrong numbers: relative error {{error}}"
"""


def run_raw(case: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RAW_CALL.format(case=case)], capture_output=True, text=True, timeout=240, check=False
    )


def test_the_raw_matmul_works_on_aligned_operands():
    """The demonstration below shows something only if the script itself is right."""
    done = run_raw("aligned")
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.parametrize(
    "case",
    ["input offset 1", "input offset 8", "weight offset 8", "column slice", "inner extent 20", "outer extent 100"],
)
def test_the_raw_matmul_fails_where_the_layer_does_not(case):
    done = run_raw(case)
    assert done.returncode != 0, f"{case}: the raw call computed this, so the contract is stricter than it need be"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_weight_is_stored_alike_whichever_device_quantizes_it(dtype):
    """Block swap quantizes where the block will live; results must not depend on that."""
    for peak in (0.1, 1.0, 3.7, 1000.0):
        weight = torch.randn(96, 128) * peak
        values, scale = fp8.quantize_weight_fp8(weight, dtype, scaled=True)
        there, its_scale = fp8.quantize_weight_fp8(weight.to(device()), dtype, scaled=True)
        assert scale is not None
        assert its_scale is not None
        assert torch.equal(its_scale.cpu(), scale)
        assert torch.equal(there.cpu().view(torch.uint8), values.view(torch.uint8))
