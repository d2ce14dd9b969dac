"""fp8 linears on the CPU: numbers, layouts, non-finite values, the contract, and whole models."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from wanvideo_infinitetalk import fp8_optimization as fp8
from wanvideo_infinitetalk.wanvideo.errors import InputError
from wanvideo_infinitetalk.wanvideo.kernels import packages
from wanvideo_infinitetalk.wanvideo.kernels.layout import layout_violations
from wanvideo_infinitetalk.wanvideo.kernels.selftest import SELF_TESTS
from wanvideo_infinitetalk.wanvideo.linear.base import relative_l2

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Activations (0.027) and, for e5m2, nothing more: errors are against the stored weights.
FAST_BOUND = fp8.FAST_MATMUL_ERROR
FP8_NAMES = [name for name in fp8.QUANTIZATIONS if name.startswith("fp8")]


def stored_linear(out_features=48, in_features=64, dtype=E4M3, scaled=True, bias=True, fast=True, base=torch.float32):
    linear = nn.Linear(in_features, out_features, bias=bias)
    fp8.Fp8Linear.quantize(linear, dtype, base, scaled=scaled, fast=fast)
    return linear


def exact(linear, x):
    """The layer's output in float64 from its stored weight."""
    scale = 1.0 if linear.scale_weight is None else linear.scale_weight.double().reshape(-1, 1)
    return F.linear(x.double(), linear.weight.double() * scale, None if linear.bias is None else linear.bias.double())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
def test_fast_matmul_stays_within_its_bound(dtype, scaled, bias, base):
    linear = stored_linear(dtype=dtype, scaled=scaled, bias=bias, base=base)
    x = torch.randn(3, 7, 64).to(base)
    out = linear(x)
    assert out.dtype == base
    assert 0.005 < relative_l2(out, exact(linear, x)) < FAST_BOUND


@pytest.mark.parametrize("shape", [(64,), (1, 64), (5, 64), (2, 5, 64), (2, 3, 5, 64), (0, 64), (2, 0, 64), (2, 1, 64)])
@pytest.mark.parametrize("fast", [True, False])
def test_every_rank_and_row_count(shape, fast):
    linear = stored_linear(fast=fast)
    x = torch.randn(shape)
    out = linear(x)
    assert out.shape == (*shape[:-1], 48)
    assert out.is_contiguous()
    assert relative_l2(out, exact(linear, x)) < FAST_BOUND


def layouts():
    """The same numbers [2, 6, 64] in storages that a careless kernel would misread, and as they should be."""
    x = torch.randn(2, 6, 64)
    yield "plain", x, x
    for offset in (1, 2, 3):
        storage = torch.zeros(x.numel() + offset)
        yield f"offset {offset}", storage[offset:].view(x.shape).copy_(x), x
    wide = torch.zeros(2, 6, 67)
    wide[..., 1:65] = x
    yield "column slice", wide[..., 1:65], x
    yield "transposed", x.transpose(0, 1).clone().transpose(0, 1), x
    yield "last stride", x.permute(2, 0, 1).clone().permute(1, 2, 0), x
    yield "expanded", x[:1].expand(2, 6, 64), x[:1].repeat(2, 1, 1)


@pytest.mark.parametrize("fast", [True, False])
def test_layout_changes_nothing_and_input_survives(fast):
    linear = stored_linear(fast=fast)
    for name, view, plain in layouts():
        before = view.clone()
        out = linear(view)
        assert torch.equal(out, linear(plain)), name
        assert torch.equal(view, before), f"{name}: the input was written to"


def test_the_quantizer_only_sees_what_16_byte_kernels_accept(monkeypatch):
    """Without the guard before the reshape, the quantizer would be handed odd addresses and strides."""
    quantize = fp8.quantize_rows_fp8

    def checking(rows):
        assert not layout_violations(rows), layout_violations(rows)
        assert rows.is_contiguous()
        return quantize(rows)

    monkeypatch.setattr(fp8, "quantize_rows_fp8", checking)
    linear = stored_linear()
    for _, view, _ in layouts():
        assert linear(view).is_contiguous()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_input_is_not_laundered(bad, fast):
    linear = stored_linear(fast=fast)
    x = torch.randn(4, 64)
    x[2, 5] = bad
    out = linear(x)
    assert not torch.isfinite(out[2]).any()
    assert torch.isfinite(out[[0, 1, 3]]).all()


def test_zero_and_tiny_and_huge_rows():
    linear = stored_linear(bias=False)
    x = torch.randn(4, 64) * torch.tensor([0.0, 1e-30, 1e6, 1.0]).unsqueeze(1)
    out = linear(x)
    assert torch.equal(out[0], torch.zeros(48))
    for row in (1, 2, 3):
        assert relative_l2(out[row], exact(linear, x)[row]) < 2 * FAST_BOUND


def test_outliers_cost_less_per_row_than_with_one_scale():
    """One row with outliers must not coarsen the others, as a scale per tensor would."""
    linear = stored_linear(bias=False)
    x = torch.randn(16, 64)
    x[3] *= 1e4
    assert relative_l2(linear(x)[:3], exact(linear, x)[:3]) < FAST_BOUND


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_row_quantizer_round_trip(dtype):
    x = (torch.randn(9, 128) * 10).to(dtype)
    values, scale = fp8.quantize_rows_fp8(x)
    assert values.dtype == E4M3
    assert scale.shape == (9, 1)
    assert scale.dtype == torch.float32
    assert torch.equal(values.float().abs().amax(-1), torch.full((9,), 448.0))
    assert relative_l2(values.double() * scale.double(), x) < 0.03


@pytest.mark.parametrize(("out_features", "in_features"), [(20, 64), (48, 20), (1, 64), (48, 7)])
def test_extents_that_the_matmul_rejects_are_computed(out_features, in_features):
    linear = stored_linear(out_features, in_features)
    violations = fp8.fp8_matmul_reasons(linear.weight, torch.float32, torch.device("cpu"))
    assert len(violations) == (out_features % 16 > 0) + (in_features % 16 > 0)
    x = torch.randn(3, in_features)
    assert relative_l2(linear(x), exact(linear, x)) < 1e-6  # the dequantized way: no rounding of activations


def test_the_contract_names_every_reason(monkeypatch):
    monkeypatch.setattr(SELF_TESTS, "_kept", {})
    monkeypatch.setattr(packages, "capability", lambda device: (8, 6))
    weight = torch.zeros(17, 15)
    reasons = fp8.fp8_matmul_reasons(weight, torch.float64, torch.device("cuda", 0), torch.ones(3))
    for word in ("weight is float32", "17 output", "15 input", "scale_weight is [3]", "float64", "8.6"):
        assert any(word in reason for reason in reasons), word
    SELF_TESTS.reset()
    monkeypatch.setattr(packages, "capability", lambda device: (9, 0))
    good = torch.zeros(32, 32, dtype=E4M3)
    assert not fp8.fp8_matmul_reasons(good, torch.bfloat16, torch.device("cuda", 0), torch.ones(()))
    assert fp8.fp8_matmul_reasons(good, torch.bfloat16, torch.device("mps"))


def scaled_mm_rejection(rowwise: bool) -> str:
    """Why `torch._scaled_mm` on the CPU takes no such scales here (before torch 2.12 it takes none per row)."""
    values = torch.ones(16, 16).to(E4M3)
    rows = torch.ones(16, 1) if rowwise else torch.ones(())
    try:
        torch._scaled_mm(values, values.t(), scale_a=rows, scale_b=rows.t(), out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    return ""


@pytest.mark.parametrize("rowwise", [True, False])
@pytest.mark.parametrize("per_row_scale", [True, False])
def test_kernel_calls_compute_the_same_numbers(rowwise, per_row_scale):
    """The calls that a GPU gets (torch runs them on the CPU as well) against the portable computation."""
    if rejection := scaled_mm_rejection(rowwise):
        pytest.skip(f"torch {torch.__version__} on the CPU: {rejection}")
    linear = stored_linear(base=torch.bfloat16)
    scale = torch.rand(48, 1) + 0.5 if per_row_scale else torch.tensor(0.7)
    values, rows = fp8.quantize_rows_fp8(torch.randn(5, 64))
    expected = fp8._scaled_matmul(values, rows, linear.weight, scale, linear.bias, torch.bfloat16)
    weight = linear.weight.detach()
    if rowwise:
        columns = scale.reshape(1, -1)
        out = fp8._rowwise_matmul(values, rows, weight, columns, linear.bias.bfloat16(), torch.bfloat16)
    else:
        product = fp8._tensorwise_matmul(values, weight)
        out = fp8._apply_scales(product, rows, scale.reshape(1, -1), linear.bias, torch.bfloat16)
    assert relative_l2(out, expected) < 4e-3


def test_scales_per_output_row():
    linear = stored_linear(scaled=False)
    scale = torch.rand(48) + 0.5
    x = torch.randn(3, 64)
    for shape in ((48,), (48, 1)):
        fp8.Fp8Linear.adopt(linear, torch.float32, scale.reshape(shape), fast=True)
        assert relative_l2(linear(x), exact(linear, x)) < FAST_BOUND
        fp8.Fp8Linear.adopt(linear, torch.float32, scale.reshape(shape), fast=False)
        assert relative_l2(linear(x), exact(linear, x)) < 1e-6


@pytest.mark.parametrize("spread", [1.0, 2000**-0.5])
@pytest.mark.parametrize("name", [n for n in fp8.WEIGHT_ERROR_BOUNDS if n.startswith("fp8")])
def test_stored_weights_keep_their_bounds(name, spread):
    wanted = fp8.Quantization.parse(name)
    weight = torch.randn(256, 256) * spread
    stored, scale = fp8.quantize_weight_fp8(weight, fp8.FP8_DTYPES[wanted.format], wanted.scaled)
    restored = stored.float() * (1.0 if scale is None else scale)
    assert relative_l2(restored, weight) < fp8.WEIGHT_ERROR_BOUNDS[name]


def test_weights_out_of_range_are_clamped_not_lost():
    weight = torch.tensor([[1e6, -1e6, 1.0, 448.0]])
    stored, scale = fp8.quantize_weight_fp8(weight, E4M3, scaled=False)
    assert scale is None
    assert stored.float().tolist() == [[448.0, -448.0, 1.0, 448.0]]
    stored, scale = fp8.quantize_weight_fp8(torch.zeros(2, 2), E4M3, scaled=True)
    assert scale is not None
    assert torch.equal(stored.float() * scale, torch.zeros(2, 2))


class TinyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embedding = nn.Linear(64, 64)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(64, 64), "norm": nn.LayerNorm(64), "ffn": nn.Linear(64, 64)})
            for _ in range(2)
        )
        self.head = nn.Linear(64, 16)

    def forward(self, x):
        x = self.patch_embedding(x)
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            x = x + block["ffn"](block["norm"](x + block["q"](x)))
        return self.head(x)


def q(model: nn.Module, block: int) -> Any:
    return model.get_submodule(f"blocks.{block}.q")


@pytest.mark.parametrize("name", fp8.QUANTIZATIONS)
def test_quantized_model_is_close_and_keeps_its_names(name):
    model = TinyModel().eval()
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        reference = model(x)
        keys = set(model.state_dict())
        fp8.quantize_linears(model, name, torch.float32)
        out = model(x)
    assert keys <= set(model.state_dict())
    assert model.patch_embedding.weight.dtype == model.head.weight.dtype == torch.float32
    if name == "disabled":
        assert torch.equal(out, reference)
        assert fp8.stored_format(q(model, 0)) is None
    else:
        assert fp8.stored_format(q(model, 0)) == fp8.Quantization.parse(name).format
        # Weight errors (0.03 to 0.11) and activation errors meet a few times over on the way through.
        assert 1e-3 < relative_l2(out, reference) < 3 * fp8.WEIGHT_ERROR_BOUNDS[name.removesuffix("_fast")]


@pytest.mark.parametrize("name", FP8_NAMES)
def test_fp8_state_dict_is_the_public_one(name):
    model = TinyModel()
    fp8.quantize_linears(model, name, torch.bfloat16)
    state = model.state_dict()
    assert state["blocks.0.q.weight"].dtype == fp8.FP8_DTYPES[fp8.Quantization.parse(name).format]
    assert ("blocks.0.q.scale_weight" in state) == ("scaled" in name)
    twin = TinyModel()
    fp8.quantize_linears(twin, name, torch.bfloat16)
    twin.load_state_dict(state)
    x = torch.randn(3, 64)
    assert torch.equal(q(twin, 1)(x), q(model, 1)(x))


@pytest.mark.parametrize("name", ["fp8_e4m3fn_scaled", "fp8_e5m2_fast", "fp4_scaled"])
def test_casting_the_model_leaves_stored_weights_alone(name):
    model = TinyModel()
    fp8.quantize_linears(model, name, torch.bfloat16)
    before = {key: value.clone() for key, value in q(model, 0).state_dict().items()}
    model.to(torch.float16)
    for key, value in q(model, 0).state_dict().items():
        assert value.dtype == before[key].dtype
        assert torch.equal(value.float(), before[key].float())
    assert model.head.weight.dtype == torch.float16


def test_quantized_files_are_adopted_and_contradictions_rejected():
    model = TinyModel()
    fp8.quantize_linears(model, "fp8_e4m3fn_scaled", torch.float32)
    stored = q(model, 0).weight.clone()
    for name, fast in (("disabled", False), ("fp8_e4m3fn_fast", True), ("fp8_e4m3fn_scaled", False)):
        fp8.quantize_linears(model, name, torch.float32)
        assert q(model, 0).fast is fast
        assert q(model, 0).scale_weight is not None
        assert torch.equal(q(model, 0).weight.float(), stored.float())
    for name in ("fp8_e5m2", "fp4_scaled"):
        with pytest.raises(InputError, match="already holds fp8_e4m3fn weights"):
            fp8.quantize_linears(model, name, torch.float32)
    with pytest.raises(InputError, match="unknown; choose one of disabled"):
        fp8.quantize_linears(model, "int3", torch.float32)


def test_an_adapter_in_16_bits_is_quantized_with_the_base_kept():
    model = TinyModel()
    fp8.Fp8Linear.quantize(q(model, 0), E4M3, torch.float32, scaled=True, fast=False)
    kept = q(model, 0).weight.clone()
    fp8.quantize_linears(model, "fp8_e4m3fn_scaled_fast", torch.float32)
    assert torch.equal(q(model, 0).weight.float(), kept.float())
    assert fp8.summary(model) == "4 x fp8_e4m3fn_scaled_fast (computed in float32), 2 x float32"
    assert fp8.stored_summary(model) == "4 x fp8_e4m3fn_scaled, 2 x float32"


def test_convert_takes_scales_keeps_words_and_works_before_loading():
    model, names = TinyModel(), ("blocks.0.q", "blocks.1.q", "head")
    scales: dict[str, torch.Tensor] = {}
    expected = {}
    state = model.state_dict()
    for name in names:
        stored, scale = fp8.quantize_weight_fp8(state[f"{name}.weight"], E4M3, scaled=True)
        assert scale is not None
        state[f"{name}.weight"], scales[f"{name}.scale_weight"] = stored, scale
        expected[name] = stored.double() * scale.double()
    late = TinyModel()
    fp8.convert_fp8_linear(late, torch.float32, {"head"}, {k: v for k, v in scales.items() if "head" not in k})
    late.load_state_dict({k: v for k, v in state.items() if "head" not in k}, strict=False, assign=True)
    model.load_state_dict(state, assign=True)
    fp8.convert_fp8_linear(model, torch.float32, {"head"}, scales)
    for converted in (model, late):
        for name in names[:2]:
            linear: Any = converted.get_submodule(name)
            x = torch.randn(3, 64)
            assert relative_l2(linear(x), F.linear(x.double(), expected[name], linear.bias.double())) < FAST_BOUND
    assert model.head.weight.dtype == torch.float32
    assert relative_l2(model.head.weight, expected["head"]) < 1e-6
    assert torch.isfinite(model(torch.randn(2, 64))).all()


def test_state_is_per_layer_and_a_lone_linear_converts():
    one, other = nn.Linear(32, 32), nn.Linear(32, 32)
    one.weight = nn.Parameter(one.weight.detach().to(E4M3), requires_grad=False)
    fp8.convert_fp8_linear(one, torch.bfloat16)
    assert one(torch.randn(2, 32)).dtype == torch.bfloat16
    assert type(other) is nn.Linear
    assert other(torch.randn(2, 32)).dtype == torch.float32
    with pytest.raises(InputError, match="no linear layer for nowhere"):
        fp8.convert_fp8_linear(one, torch.bfloat16, scale_weight_keys={"nowhere.scale_weight": torch.ones(())})


def test_16_bit_weights_run_as_ordinary_layers():
    linear = nn.Linear(32, 32).bfloat16()
    x = torch.randn(2, 32, dtype=torch.bfloat16)
    assert torch.equal(fp8.fp8_linear_forward(linear, torch.bfloat16, x), linear(x))


@pytest.mark.parametrize("name", ["fp8_e4m3fn_fast", "fp8_e5m2_scaled", "fp8_e4m3fn_scaled_fast", "fp4_scaled"])
def test_compiles_without_graph_breaks(name):
    model = TinyModel().eval()
    fp8.quantize_linears(model, name, torch.float32)
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert relative_l2(compiled(x), model(x)) < 1e-6


def test_capability_is_a_constant_of_the_graph(monkeypatch):
    monkeypatch.setattr(SELF_TESTS, "_kept", {})
    monkeypatch.setattr(packages, "capability", lambda device: (8, 6))
    weight = torch.zeros(32, 32, dtype=E4M3)

    def add_count(x):
        return x + len(fp8.fp8_matmul_reasons(weight, torch.bfloat16, torch.device("cuda", 0)))

    compiled = torch.compile(add_count, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == 1


def test_foreign_linears_are_refused_by_name():
    class Own(nn.Linear):
        def forward(self, input):
            return super().forward(input) + 1

    with pytest.raises(TypeError, match="Own has a forward of its own"):
        fp8.Fp8Linear.quantize(Own(16, 16), E4M3, torch.float32, scaled=True, fast=False)


def test_meta_device_gives_shapes():
    linear = stored_linear().to("meta")
    with mock.patch.object(fp8, "quantize_rows_fp8", side_effect=AssertionError("the fast way has no meta kernel")):
        assert linear(torch.empty(2, 3, 64, device="meta")).shape == (2, 3, 48)


# --------------------------------------------------------------------------------------------- what runs, and why not


TOO_OLD = "the GPU has compute capability 8.6, it supports 8.9 and newer (for fp8 tensor cores)"


def test_the_summary_says_what_runs_and_why_not_what_was_asked_for(monkeypatch):
    monkeypatch.setattr(SELF_TESTS, "_kept", {})
    monkeypatch.setattr(packages, "capability", lambda device: (8, 6))
    model = TinyModel()
    fp8.quantize_linears(model, "fp8_e4m3fn_scaled_fast", torch.float32)
    unpacked = f"4 x fp8_e4m3fn_scaled, unpacked per call instead of the fp8 matmul ({TOO_OLD}), 2 x float32"
    assert fp8.summary(model, "cuda") == unpacked  # swapped blocks lie on the CPU
    SELF_TESTS.reset()
    monkeypatch.setattr(packages, "capability", lambda device: (8, 9))
    assert fp8.summary(model, torch.device("cuda", 1)) == "4 x fp8_e4m3fn_scaled_fast, 2 x float32"
    assert fp8.how_linears_run(model, "cuda") == {"fp8_e4m3fn_scaled_fast": 4, "float32": 2}


@pytest.mark.parametrize("features", [(32, 32), (17, 32), (32, 24)])
@pytest.mark.parametrize("quantization", [name for name in fp8.QUANTIZATIONS if name.startswith("fp8")])
def test_the_record_of_a_layer_is_what_it_runs(monkeypatch, features, quantization):
    wanted = fp8.Quantization.parse(quantization)
    linear = nn.Linear(*reversed(features)).requires_grad_(False)
    fp8.Fp8Linear.quantize(linear, fp8.FP8_DTYPES[wanted.format], torch.float32, scaled=wanted.scaled, fast=wanted.fast)
    products = []
    scaled_matmul = fp8._scaled_matmul
    monkeypatch.setattr(fp8, "_scaled_matmul", lambda *args: products.append(1) or scaled_matmul(*args))
    linear(torch.randn(3, features[1]))
    how = fp8.how_it_runs(linear)
    assert ("_fast" in how) == bool(products)
    assert ("unpacked per call instead of the fp8 matmul (" in how) == (wanted.fast and not products)
    assert how.startswith(quantization.removesuffix("_fast"))


def test_a_16_bit_layer_that_was_converted_runs_in_16_bits():
    linear = nn.Linear(32, 32).to(torch.bfloat16).requires_grad_(False)
    fp8.convert_fp8_linear(linear, torch.bfloat16)
    assert fp8.how_it_runs(linear) == "bfloat16"
