"""Contracts, and every adapter against a faithful fake of its package."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import fakes
from support.repairs import repairable_reasons
from wanvideo_infinitetalk.pipeline.attention_policy import SAFER
from wanvideo_infinitetalk.wanvideo.errors import BackendUnavailableError
from wanvideo_infinitetalk.wanvideo.kernels.inputs import Inputs
from wanvideo_infinitetalk.wanvideo.kernels.layout import count_guards
from wanvideo_infinitetalk.wanvideo.modules import attention as modes
from wanvideo_infinitetalk.wanvideo.modules.attention import attention, mode_reasons, run_backend
from wanvideo_infinitetalk.wanvideo.modules.backends import (
    RUNTIME,
    Contract,
    backends,
    lookup,
    not_supported_reasons,
    sage,
    unavailable_reasons,
)
from wanvideo_infinitetalk.wanvideo.modules.backends.contract import head_dims, keys

# backend -> (the fake package, a compute capability it supports, relative L2 against float64)
ADAPTERS = {
    "sageattention_1": ("sageattention_1", (8, 6), 0.02),
    "sageattention_2_fp16": ("sageattention_2", (8, 6), 0.06),
    "sageattention_2_fp8": ("sageattention_2", (8, 9), 0.06),
    "sageattention_2_fp8_sm90": ("sageattention_2", (9, 0), 0.06),
    "sageattn3_block_means": ("sageattn3", (12, 0), 0.25),
    "sageattn3": ("sageattn3", (12, 0), 0.25),
    "flash_attn_2": ("flash_attn_2", (8, 6), 0.01),
    "flash_attn_3": ("flash_attn_3", (9, 0), 0.01),
    "flash_attn_3_forward": ("fa3_fwd", (9, 0), 0.01),
    "comfy": ("comfy", (8, 6), 0.02),
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., fakes.FakeGpu]:
    """`gpu((9, 0))` makes the CPU pass for such a GPU."""
    return lambda capability: fakes.FakeGpu(monkeypatch, capability)


@pytest.fixture(params=list(ADAPTERS))
def adapter(request: pytest.FixtureRequest, gpu: Callable[..., fakes.FakeGpu]) -> tuple[str, float, fakes.FakeGpu]:
    package, capability, bound = ADAPTERS[request.param]
    stage = gpu(capability)
    stage.install_known(package)
    return request.param, bound, stage


def qkv(
    queries: int = 150, keys: int = 200, heads: int = 2, dim: int = 64, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = torch.randn(2, queries, heads, dim)
    k = torch.randn(2, keys, heads, dim) + torch.randn(1, 1, heads, dim)
    v = torch.randn(2, keys, heads, dim)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def relative(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> float:
    want = attention(q.double(), k.double(), v.double(), "eager", softmax_scale=scale)
    return float((out.double() - want).norm() / want.norm())


def misaligned(x: torch.Tensor, offset: int = 1) -> torch.Tensor:
    """A contiguous copy of x that starts `offset` elements past an aligned address."""
    storage = torch.empty(x.numel() + offset, dtype=x.dtype)
    return storage[offset:].view(x.shape).copy_(x)


def padded_rows(x: torch.Tensor, extra: int = 1) -> torch.Tensor:
    """x with a row stride off 16 bytes."""
    batch, length, heads, dim = x.shape
    storage = torch.empty(batch, length, heads * dim + extra, dtype=x.dtype)
    view = storage[..., : heads * dim].unflatten(-1, (heads, dim))
    return view.copy_(x)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "aligned": lambda x: x,
    "offset 1": misaligned,
    "offset 4": lambda x: misaligned(x, 4),
    "padded rows": padded_rows,
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last stride": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced heads": lambda x: torch.cat((x, x), 2)[:, :, : x.shape[2]],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_adapter_is_right_and_leaves_its_inputs_alone(
    adapter: tuple[str, float, fakes.FakeGpu], layout: str, dtype: torch.dtype
) -> None:
    name, bound, _ = adapter
    if dtype not in lookup(name).bound:
        pytest.skip(f"{name} has no {dtype}")
    q, k, v = (LAYOUTS[layout](x) for x in qkv(dtype=dtype))
    before = [x.clone() for x in (q, k, v)]
    out = run_backend(name, q, k, v)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert relative(out, q, k, v) < bound
    for x, old in zip((q, k, v), before, strict=True):
        assert torch.equal(x, old)


@pytest.mark.parametrize("scale", [0.25, 0.5 * 64**-0.5, 0.3])
def test_adapter_honors_the_softmax_scale_or_rejects_it(
    adapter: tuple[str, float, fakes.FakeGpu], scale: float
) -> None:
    name, bound, _ = adapter
    q, k, v = qkv()
    if name in ("sageattn3", "sageattn3_block_means", "comfy") and scale == 0.3:
        with pytest.raises(BackendUnavailableError, match="softmax scale"):
            run_backend(name, q, k, v, softmax_scale=scale)
    else:
        assert relative(run_backend(name, q, k, v, softmax_scale=scale), q, k, v, scale) < 1.5 * bound


@pytest.mark.parametrize("form", ["bool", "additive", "misaligned"])
def test_adapter_honors_a_mask_or_rejects_it(adapter: tuple[str, float, fakes.FakeGpu], form: str) -> None:
    name, bound, _ = adapter
    q, k, v = qkv(keys=201)
    allowed = torch.rand(2, 1, 150, 201) > 0.4
    mask = allowed if form == "bool" else torch.where(allowed, 0.0, -torch.inf).to(q.dtype)
    if form == "misaligned":
        mask = misaligned(mask)
    if not lookup(name).contract.masks:
        with pytest.raises(BackendUnavailableError, match="mask"):
            run_backend(name, q, k, v, attn_mask=mask)
        return
    want = attention(q.double(), k.double(), v.double(), "eager", attn_mask=allowed)
    got = run_backend(name, q, k, v, attn_mask=mask)
    assert float((got.double() - want).norm() / want.norm()) < bound


@pytest.mark.parametrize("queries", [200, 150])
def test_adapter_honors_causal_or_rejects_it(adapter: tuple[str, float, fakes.FakeGpu], queries: int) -> None:
    name, bound, _ = adapter
    q, k, v = qkv(queries=queries, keys=200)
    contract = lookup(name).contract
    if contract.causal == "no" or (contract.causal == "square" and queries != 200):
        with pytest.raises(BackendUnavailableError, match="causal"):
            run_backend(name, q, k, v, causal=True)
        return
    want = attention(q.double(), k.double(), v.double(), "eager", causal=True)
    got = run_backend(name, q, k, v, causal=True)
    assert float((got.double() - want).norm() / want.norm()) < bound


def test_large_values_stay_finite_and_right(adapter: tuple[str, float, fakes.FakeGpu]) -> None:
    name, bound, _ = adapter
    q, k, v = qkv()
    v = v * 1e5
    out = run_backend(name, q, k, v)
    assert out.isfinite().all()
    assert relative(out, q, k, v) < bound


def test_aligned_inputs_are_copied_only_where_the_kernel_writes(adapter: tuple[str, float, fakes.FakeGpu]) -> None:
    name, _, _ = adapter
    contract = lookup(name).contract
    q, k, v = qkv(heads=1)  # one head: [B, L, H, D] and [B, H, L, D] are the same memory
    with count_guards() as stats:
        run_backend(name, q, k, v)
    # ComfyUI's output keeps no promise about its layout.
    assert stats.copies == (1 if contract.writes_to_k else 0)


def test_the_same_inputs_fault_without_the_guard() -> None:
    """The fakes can fail: raw calls on misaligned tensors do."""
    q, k, v = (misaligned(x) for x in qkv())
    with pytest.raises(fakes.KernelFault):
        fakes.sageattn_qk_int8_pv_fp8_cuda_sm90(q, k, v, tensor_layout="NHD")
    with pytest.raises(fakes.KernelFault):
        fakes.flash_attn_func(q, k, v)
    q, k, v = qkv()
    before = k.clone()
    assert not fakes.sageattn_1(q, k, v * 1e5, tensor_layout="NHD").isfinite().all()
    assert not torch.equal(k, before)


def test_short_keys_never_reach_kernels_that_read_behind_the_last_one(gpu: Callable[..., fakes.FakeGpu]) -> None:
    gpu((9, 0)).install_known("sageattention_2")
    q, k, v = qkv(keys=32)
    with pytest.raises(BackendUnavailableError, match="there are 32 keys, it supports 128 or more"):
        run_backend("sageattention_2_fp8_sm90", q, k, v)
    assert attention(q, k, v, "sageattn").isfinite().all()


@pytest.mark.parametrize(
    ("capability", "backend"),
    [
        ((8, 6), "sageattention_2_fp16"),
        ((8, 9), "sageattention_2_fp8"),
        ((9, 0), "sageattention_2_fp8_sm90"),
        ((12, 0), "sageattention_2_fp8"),
    ],
)
def test_each_gpu_gets_its_own_entry_point(
    gpu: Callable[..., fakes.FakeGpu], caplog: pytest.LogCaptureFixture, capability: tuple[int, int], backend: str
) -> None:
    gpu(capability).install_known("sageattention_2")
    with caplog.at_level("INFO"):
        attention(*qkv(), "sageattn")
    assert f"attention mode sageattn runs {backend}" in caplog.text


def test_sage3_slices_its_queries_within_the_budget(
    gpu: Callable[..., fakes.FakeGpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = gpu((12, 0))
    stage.install_known("sageattn3")
    q, k, v = qkv(queries=600, keys=300)
    whole = run_backend("sageattn3_block_means", q, k, v)
    assert stage.sage3.calls == 1
    assert sage.delta_s_bytes(2, 2, 600, 300) == stage.sage3.delta_s_bytes == 4 * 2 * 2 * 5 * 300

    monkeypatch.setattr(sage, "DELTA_S_BUDGET", 2 * 4 * 2 * 2 * 300)  # two blocks of queries
    stage.sage3.__init__()  # type: ignore[misc]
    sliced = run_backend("sageattn3_block_means", q, k, v)
    assert stage.sage3.calls == 3
    assert stage.sage3.delta_s_bytes <= sage.DELTA_S_BUDGET
    # K's mean is taken from a K that the first slice has already centered: equal but for rounding.
    torch.testing.assert_close(sliced, whole, atol=0.05, rtol=0.05)
    assert torch.equal(sliced[:, :256], whole[:, :256])


def test_sage3_budget_at_the_lengths_of_facts() -> None:
    assert sage.delta_s_bytes(1, 40, 32760, 32760) == pytest.approx(1.34e9, rel=0.01)
    assert sage.delta_s_bytes(1, 40, 75600, 75600) == pytest.approx(7.15e9, rel=0.01)
    assert sage.delta_s_bytes(1, 40, 32760, 32760) <= sage.DELTA_S_BUDGET < sage.delta_s_bytes(1, 40, 75600, 75600)


def test_unit_range_rounds_nothing_and_keeps_nan_in_its_head() -> None:
    v = torch.randn(2, 9, 3, 8) * torch.tensor([1e-30, 1.0, 1e30])[:, None]
    small, peak = sage.unit_range(v)
    assert small.abs().max() <= 1
    assert torch.equal(small * peak, v)
    v[0, 3, 1, 2] = torch.nan
    small, peak = sage.unit_range(v)
    bad = ~(small * peak).isfinite().all(dim=(1, 3))
    assert bad.tolist() == [[False, True, False], [False, False, False]]
    zeros, peak = sage.unit_range(torch.zeros(1, 4, 2, 8))
    assert (zeros * peak).eq(0).all()


# --- what is missing is said -----------------------------------------------------------------------------------------


def test_packages_that_cannot_be_used_say_why(gpu: Callable[..., fakes.FakeGpu]) -> None:
    stage = gpu((9, 0))
    cpu = torch.device("cpu")
    name = "sageattention_2_fp8_sm90"
    assert unavailable_reasons(name, cpu) == ("the package sageattention is not installed",)
    stage.install("sageattention", "3.1", "sageattention")
    assert unavailable_reasons(name, cpu) == (
        "sageattention is version 3.1, it needs >=2.1,<3",
        "sageattention 3.1 has no sageattn_qk_int8_pv_fp8_cuda_sm90",
    )
    stage.install_known("sageattention_2")
    assert unavailable_reasons(name, cpu) == ()
    RUNTIME.reject(name, "it faulted in its self-test")
    assert unavailable_reasons(name, cpu) == ("it faulted in its self-test",)
    RUNTIME.reject(name, None)
    assert unavailable_reasons(name, cpu) == ()


@pytest.mark.parametrize("error", [ImportError("DLL load failed"), OSError("no kernel image"), RuntimeError("ABI")])
def test_a_package_that_does_not_import_is_a_reason_not_a_crash(
    gpu: Callable[..., fakes.FakeGpu], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    stage = gpu((12, 0))
    stage.install("sageattn3", "1.0.0", "sageattn3")
    monkeypatch.delitem(sys.modules, "sageattn3")

    def broken(module: str) -> None:
        raise error

    monkeypatch.setattr("importlib.import_module", broken)
    (reason,) = unavailable_reasons("sageattn3", torch.device("cpu"))
    assert "sageattn3 1.0.0 cannot be imported" in reason
    assert str(error) in reason


def test_the_wrong_gpu_is_a_reason(gpu: Callable[..., fakes.FakeGpu]) -> None:
    gpu((9, 0)).install_known("sageattn3")
    assert unavailable_reasons("sageattn3", torch.device("cpu")) == (
        "the GPU has compute capability 9.0, it supports 12.0, 12.1",
    )


def test_without_its_package_a_mode_runs_the_portable_kernel_and_says_so(
    gpu: Callable[..., fakes.FakeGpu], caplog: pytest.LogCaptureFixture
) -> None:
    gpu((9, 0))
    with caplog.at_level("INFO"):
        attention(*qkv(), "sageattn_3_fp4")
        attention(*qkv(), "sage3_fp4")
    lines = [r.message for r in caplog.records if "sageattn_3_fp4" in r.message]
    assert len(lines) == 1
    assert "runs emulated_nvfp4" in lines[0]
    assert "not sageattn3_block_means: the GPU has compute capability 9.0" in lines[0]


def test_every_mode_lists_every_backend_with_its_reasons() -> None:
    table = mode_reasons(torch.device("cpu"))
    assert set(table) == set(modes.ATTENTION_MODES)
    assert table["sdpa"] == {"sdpa": ()}
    assert table["flash_attn_2"]["flash_attn_2"][0] == "it runs on cuda, the tensors are on cpu"
    named = {name for names in table.values() for name in names}
    assert named == {backend.name for backend in backends()}


def test_flash_attn_3_of_either_time(gpu: Callable[..., fakes.FakeGpu]) -> None:
    stage = gpu((9, 0))
    q, k, v = qkv()
    for function in (fakes.flash_attn_3_func, fakes.flash_attn_3_func_with_lse):
        stage.install("flash-attn-3", "3.0.0b1", "flash_attn_interface", flash_attn_func=function)
        assert relative(run_backend("flash_attn_3", q, k, v), q, k, v) < 0.01


def test_either_package_of_flash_attn_3(gpu: Callable[..., fakes.FakeGpu]) -> None:
    """fa3-fwd alone computes the mode, but not in fp16, which it is built without."""
    stage = gpu((9, 0))
    stage.install_known("fa3_fwd")
    q, k, v = qkv()
    assert relative(attention(q, k, v, "flash_attn_3"), q, k, v) < 0.01
    with pytest.raises(BackendUnavailableError, match=r"the dtype is float16, it supports bfloat16"):
        attention(q.half(), k.half(), v.half(), "flash_attn_3")
    stage.install_known("flash_attn_3")
    assert relative(attention(q.half(), k.half(), v.half(), "flash_attn_3"), q, k, v) < 0.01


# --- contracts -------------------------------------------------------------------------------------------------------

STRICT = Contract(
    dtypes=(torch.bfloat16,),
    head_dim=head_dims(64),
    keys=keys(16, at_most=64),
    max_extent=2**12,
    scales="default",
    float32_as=None,
)


def test_all_reasons_are_given_at_once() -> None:
    q, k, v = qkv(queries=8, keys=100, dim=32, dtype=torch.float16)
    inputs = Inputs(misaligned(q), k, v, torch.zeros(8, 101), 0.5, True)
    assert [*not_supported_reasons(STRICT, inputs), *repairable_reasons(STRICT, inputs)] == [
        "it runs on cuda, the tensors are on cpu",
        "the dtype is float16, it supports bfloat16",
        "head_dim is 32, it supports 64",
        "there are 100 keys, it supports at most 64",
        "k has 12800 elements, it supports at most 4096",
        "v has 12800 elements, it supports at most 4096",
        "it has no attention mask",
        "its softmax scale is fixed at head_dim ** -0.5, not 0.5",
        "it has no causal mask here",
        "q: it starts 2 bytes past a multiple of 16",
        "k: its last element lies 12799 elements from its first, beyond 4095",
        "v: its last element lies 12799 elements from its first, beyond 4095",
        "attn_mask: dimension 0 has a stride of 404 bytes, no multiple of 16",
    ]


def test_a_supported_call_has_no_reasons() -> None:
    q, k, v = qkv(queries=8, keys=16)
    for backend in backends():
        if backend.contract.device.types:
            continue
        assert not_supported_reasons(backend.contract, Inputs(q, k, v)) == []
        assert repairable_reasons(backend.contract, Inputs(q, k, v)) == []


def test_limits_are_where_the_contract_says() -> None:
    """Shapes of any size cost nothing on the meta device."""
    contract = lookup("sageattention_2_fp8").contract

    def reasons(keys: int) -> list[str]:
        x = torch.empty(1, keys, 1, 128, dtype=torch.bfloat16, device="meta")
        return [r for r in not_supported_reasons(contract, Inputs(x, x, x)) if "keys" in r or "elements" in r]

    assert reasons(63) == ["there are 63 keys, it supports 64 or more"]
    assert reasons(64) == []
    assert reasons(131072) == []
    assert reasons(131073) == ["there are 131073 keys, it supports at most 131072"]
    sdpa = lookup("sdpa").contract
    big = torch.empty(1, 2**31 // 128 + 1, 1, 128, dtype=torch.bfloat16, device="meta")
    assert not_supported_reasons(sdpa, Inputs(big[:, :64], big, big)) == [
        f"k has {2**31 + 128} elements, it supports at most {2**31}",
        f"v has {2**31 + 128} elements, it supports at most {2**31}",
    ]


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(BackendUnavailableError, match="no attention backend 'nonsense'"):
        lookup("nonsense")


def test_the_document_names_every_mode_and_backend_in_order() -> None:
    text = (Path(__file__).parents[2] / "docs" / "attention.md").read_text()
    tables, fallbacks = text.split("## Contracts")[0].split("**Fallbacks.**")
    rows = {line.split("|")[1].split("`")[1]: line for line in tables.splitlines() if line.startswith("| `")}
    for mode, names in modes.MODE_BACKENDS.items():
        assert re.findall(r"`(\w+)`", rows[mode].split("|")[3])[: len(names)] == list(names), mode
    for backend in backends():
        assert f"`{backend.name}`" in text
        if backend.contract.package:
            assert backend.contract.package in text
    named = re.compile(r"`(\w+)`")
    documented = {}
    for line in fallbacks.splitlines():
        if line.startswith("| `"):
            _, failed, after, _ = line.split("|")
            documented.update(dict.fromkeys(named.findall(failed), after))
    assert documented.keys() == {*SAFER, "eager"}
    for mode, safer in SAFER.items():
        assert named.findall(documented[mode]) == [safer]


def test_kernels_are_reached_through_the_entry_point_only() -> None:
    """No module but the backends names a kernel package or torch's attention."""
    root = Path(modes.__file__).parents[2]
    names = re.compile(r"\b(scaled_dot_product_attention|sageattn3?_\w+|flash_attn_func|int8_attention)\(")
    allowed = {root / "wanvideo" / "modules" / "backends", root / "tests", root / "benchmarks"}
    for path in root.rglob("*.py"):
        if any(part.startswith(".") or part in ("build", "out") for part in path.relative_to(root).parts):
            continue
        if not any(folder in path.parents for folder in allowed):
            assert not names.search(path.read_text()), path


def test_a_stride_of_zero_is_a_reason_where_the_kernel_reads_none() -> None:
    q, k, v = qkv()
    inputs = Inputs(q, k[:1].expand(k.shape), v)
    assert repairable_reasons(lookup("comfy").contract, inputs) == ["k: it is expanded with a stride of 0"]
    assert repairable_reasons(lookup("sdpa").contract, inputs) == []
