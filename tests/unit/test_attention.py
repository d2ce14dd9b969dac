"""The entry point: modes, roles, arguments, layouts, what is logged, what is rejected, and compilation."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from wanvideo_infinitetalk.fp8_optimization import QUANTIZATIONS, Quantization
from wanvideo_infinitetalk.wanvideo.errors import BackendUnavailableError, InputError
from wanvideo_infinitetalk.wanvideo.kernels.inputs import Inputs
from wanvideo_infinitetalk.wanvideo.kernels.layout import count_guards, layout_violations
from wanvideo_infinitetalk.wanvideo.modules import attention as modes
from wanvideo_infinitetalk.wanvideo.modules import auto
from wanvideo_infinitetalk.wanvideo.modules.attention import (
    ATTENTION_MODES,
    attention,
    canonical_mode,
    count_kernels,
    mode_for_role,
    resolve_mode,
    run_backend,
)
from wanvideo_infinitetalk.wanvideo.modules.backends import (
    RUNTIME,
    Backend,
    Contract,
    Device,
    lookup,
    register,
    unregister,
)
from wanvideo_infinitetalk.wanvideo.modules.backends.contract import keys as number_of_keys
from wanvideo_infinitetalk.wanvideo.modules.backends.runtime import BACKENDS

# Modes that run on any machine, with their bound on the relative L2 error for white noise, the hardest input.
ANYWHERE = {
    "sdpa": 1e-6,
    "eager": 1e-6,
    "auto": 1e-6,
    "sageattn": 0.05,
    "sageattn_3_fp8": 0.05,
    "sageattn_3": 0.25,
    "sageattn_3_fp4": 0.25,
}
EXACT = ("sdpa", "eager")
NEEDS_A_PACKAGE = ("flash_attn_2", "flash_attn_3", "comfy")


def qkv(
    queries: int = 33, keys: int = 40, heads: int = 3, dim: int = 32, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, n, heads, dim).to(dtype) for n in (queries, keys, keys))  # type: ignore[return-value]


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    allowed: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """float64, written for itself."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.double()
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)  # a row without any key
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.double())


def error(out: torch.Tensor, want: torch.Tensor) -> float:
    return float((out.double() - want).norm() / want.norm())


def odd_views(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values, laid out as a model's slices, transposes and fused projections leave them."""
    batch, length, heads, dim = x.shape
    storage = torch.empty(x.numel() + 1, dtype=x.dtype)
    wide = torch.empty(batch, length, heads * dim + 1, dtype=x.dtype)
    fused = torch.empty(batch, length, 3, heads, dim, dtype=x.dtype)
    return {
        "aligned": x,
        "offset": storage[1:].view(x.shape).copy_(x),
        "padded rows": wide[..., :-1].unflatten(-1, (heads, dim)).copy_(x),
        "fused": fused[:, :, 1].copy_(x),
        "transposed": x.transpose(1, 2).contiguous().transpose(1, 2),
        "channels first": x.transpose(-1, -2).contiguous().transpose(-1, -2),
    }


# --- modes and roles -------------------------------------------------------------------------------------------------


def test_the_modes_are_those_of_the_nodes_and_the_command() -> None:
    assert set(ATTENTION_MODES) == {*ANYWHERE, *NEEDS_A_PACKAGE}


def test_aliases() -> None:
    assert canonical_mode("sage3_fp4") == "sageattn_3_fp4"
    assert canonical_mode("sage3_fp8") == "sageattn_3_fp8"
    q, k, v = qkv()
    assert torch.equal(attention(q, k, v, "sage3_fp8"), attention(q, k, v, "sageattn_3_fp8"))


@pytest.mark.parametrize(
    ("mode", "spellings"),
    [
        ("sageattn_3_fp8", "sageattn3_fp8 sage3_fp8 sage3-fp8 SageAttention3_FP8 sageattention_3_fp8 SAGEATTN_3_FP8"),
        ("sageattn_3_fp4", "sageattn3_fp4 sage3fp4 sage_3_fp4 sageattention3_fp4 sage-attn-3-fp4"),
        ("sageattn_3", "sageattn3 sage3 sageattention3 SageAttention-3"),
        ("sageattn", "sage sageattention SageAttn sageattention2 sage2 sage_attn"),
        ("flash_attn_2", "flashattn2 flash-attn-2 flash_attention_2 FlashAttention2 fa2"),
        ("flash_attn_3", "flash_attn3 fa3 FLASH_ATTN_3"),
        ("sdpa", "SDPA Sdpa"),
        ("auto", "Auto"),
    ],
)
def test_modes_are_read_as_people_write_them(mode: str, spellings: str) -> None:
    assert {canonical_mode(spelling) for spelling in (mode, mode.upper(), *spellings.split())} == {mode}


@pytest.mark.parametrize(
    ("written", "meant"), [("sagattn", "sageattn"), ("flash_atn_3", "flash_attn_3"), ("sdpaa", "sdpa")]
)
def test_an_unknown_mode_s_sentence_names_the_nearest(written: str, meant: str) -> None:
    with pytest.raises(BackendUnavailableError, match=rf"\(the nearest is {meant}\)\.$"):
        canonical_mode(written)
    with pytest.raises(BackendUnavailableError, match=r"eager\.$"):
        canonical_mode("xyz")


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_quantizations_are_read_in_any_case_and_with_any_separators(name: str) -> None:
    spellings = (name, name.upper(), name.replace("_", "-"), name.replace("_", ""), name.replace("_", "."))
    assert {Quantization.parse(spelling) for spelling in spellings} == {Quantization.parse(name)}
    assert Quantization.parse(name.upper()).name == name
    with pytest.raises(InputError, match=rf"\(the nearest is {name}\)\.$"):
        Quantization.parse(f"{name}x")


@pytest.mark.parametrize("mode", ["radial_sage_attention", "sageattn_compiled", "sageattn_ultravico"])
def test_modes_of_other_programs_say_what_to_choose(mode: str) -> None:
    with pytest.raises(BackendUnavailableError, match="choose sageattn"):
        attention(*qkv(), mode)


def test_an_unknown_mode_lists_the_known_ones() -> None:
    with pytest.raises(BackendUnavailableError, match="no attention mode 'flash'; choose one of sdpa, "):
        attention(*qkv(), "flash")


@pytest.mark.parametrize("mode", NEEDS_A_PACKAGE)
def test_a_missing_package_is_named_and_never_replaced(mode: str) -> None:
    with pytest.raises(BackendUnavailableError, match=f"The attention mode '{mode}' does not support this call"):
        attention(*qkv(), mode)


@pytest.mark.parametrize("role", ["self", "text", "image", "audio"])
@pytest.mark.parametrize("mode", [*ANYWHERE, *NEEDS_A_PACKAGE])
def test_low_precision_is_for_self_attention_only(mode: str, role: str) -> None:
    kept = mode in ("sdpa", "eager", "comfy", "flash_attn_2", "flash_attn_3") or role == "self"
    assert mode_for_role(mode, role) == (mode if kept else "sdpa")


def test_roles_and_policies() -> None:
    assert mode_for_role("sage3_fp4", "self") == "sageattn_3_fp4"
    assert resolve_mode("sageattn", 3, "audio") == "sdpa"
    assert resolve_mode(lambda block, role: "sage3_fp4" if block > 2 else "eager", 3, "self") == "sageattn_3_fp4"
    assert resolve_mode(lambda block, role: "sage3_fp4" if block > 2 else "eager", 2, "self") == "eager"
    with pytest.raises(ValueError, match="role must be one of"):
        mode_for_role("sdpa", "cross")


# --- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ANYWHERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_mode_is_right_in_every_layout(mode: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype=dtype)
    bound = ANYWHERE[mode] + {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype, 0.0)
    want = reference(q, k, v)
    for names in itertools.product(odd_views(q), repeat=2):
        views = (odd_views(q)[names[0]], odd_views(k)[names[1]], odd_views(v)[names[0]])
        before = [x.clone() for x in views]
        out = attention(*views, mode)
        assert out.shape == q.shape
        assert out.dtype == dtype
        assert out.is_contiguous()
        assert layout_violations(out) == []
        assert error(out, want) < bound, names
        assert all(torch.equal(x, y) for x, y in zip(views, before, strict=True))


MASKS: dict[str, tuple[int, ...]] = {
    "one row for all": (40,),
    "queries and keys": (33, 40),
    "per batch": (2, 1, 1, 40),
    "per head": (1, 3, 33, 40),
    "whole": (2, 3, 33, 40),
}


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", ["bool", "bias", "misaligned bias", "misaligned bool"])
def test_masks_of_any_form(mode: str, shape: tuple[int, ...], causal: bool, form: str) -> None:
    q, k, v = qkv()
    allowed = torch.rand(shape) > 0.3
    bias = torch.randn(shape)
    given = allowed if "bool" in form else bias
    if "misaligned" in form:
        storage = torch.empty(given.numel() + 1, dtype=given.dtype)
        given = storage[1:].view(shape).copy_(given)
    corner = torch.ones(33, 40, dtype=torch.bool).tril() if causal else torch.ones((), dtype=torch.bool)
    want = (
        reference(q, k, v, allowed=allowed & corner)
        if "bool" in form
        else reference(q, k, v, allowed=corner.expand(33, 40), bias=bias)
    )
    before = given.clone()
    out = attention(q, k, v, mode, attn_mask=given, causal=causal)
    assert error(out, want) < 1e-5
    assert torch.equal(given, before)


@pytest.mark.parametrize("mode", EXACT)
def test_a_query_that_may_see_no_key_gets_zeros(mode: str) -> None:
    q, k, v = qkv()
    allowed = torch.rand(2, 1, 33, 40) > 0.5
    allowed[1, :, 7] = False
    out = attention(q, k, v, mode, attn_mask=allowed)
    assert out[1, 7].eq(0).all()
    assert error(out, reference(q, k, v, allowed=allowed)) < 1e-5


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("lengths", [(33, 40), (40, 33), (1, 5), (5, 1)])
def test_causal_is_aligned_at_the_upper_left(mode: str, lengths: tuple[int, int]) -> None:
    q, k, v = qkv(*lengths)
    want = reference(q, k, v, allowed=torch.ones(lengths, dtype=torch.bool).tril())
    assert error(attention(q, k, v, mode, causal=True), want) < 1e-5


@pytest.mark.parametrize("mode", ANYWHERE)
@pytest.mark.parametrize("scale", [0.05, 0.5])
def test_the_softmax_scale_is_honored(mode: str, scale: float) -> None:
    q, k, v = qkv()
    out = attention(q, k, v, mode, softmax_scale=scale)
    assert error(out, reference(q, k, v, scale=scale)) < 2 * ANYWHERE[mode] + 1e-5


@pytest.mark.parametrize("mode", [m for m in ANYWHERE if m not in (*EXACT, "auto")])
def test_low_precision_rejects_what_it_would_ignore(mode: str) -> None:
    q, k, v = qkv()
    with pytest.raises(BackendUnavailableError, match="it has no attention mask"):
        attention(q, k, v, mode, attn_mask=torch.zeros(33, 40))
    with pytest.raises(BackendUnavailableError, match="it has no causal mask"):
        attention(q, k, v, mode, causal=True)


def test_eager_in_slices_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv()
    mask = torch.rand(2, 1, 33, 40) > 0.3
    whole = attention(q, k, v, "eager", attn_mask=mask, causal=True)
    monkeypatch.setattr("wanvideo_infinitetalk.wanvideo.modules.backends.sdpa._CHUNK_BYTES", 1)
    torch.testing.assert_close(attention(q, k, v, "eager", attn_mask=mask, causal=True), whole)


def test_no_queries_give_no_rows_and_no_keys_are_rejected() -> None:
    q, k, v = qkv(queries=0)
    assert attention(q, k, v).shape == q.shape
    q, k, v = qkv(keys=0)
    with pytest.raises(InputError, match="at least one key"):
        attention(q, k, v)


def test_tensors_that_do_not_fit_together_are_rejected() -> None:
    q, k, v = qkv()
    with pytest.raises(InputError, match=r"\[B, L, H, D\], not 3"):
        attention(q[0], k, v)
    with pytest.raises(InputError, match=r"not \(2, 33, 3, 32\), \(2, 40, 2, 32\)"):
        attention(q, k[:, :, :2], v)
    with pytest.raises(InputError, match="one dtype"):
        attention(q, k.half(), v)
    with pytest.raises(InputError, match="one device"):
        attention(q, k.to("meta"), v)
    with pytest.raises(InputError, match="one device"):
        attention(q, k, v, attn_mask=torch.zeros(33, 40, device="meta"))
    with pytest.raises(InputError, match=r"attn_mask \(33, 41\) does not broadcast to \(2, 3, 33, 40\)"):
        attention(q, k, v, attn_mask=torch.zeros(33, 41))
    with pytest.raises(InputError, match=r"attn_mask must be bool or floating point, not torch\.int64"):
        attention(q, k, v, attn_mask=torch.zeros(33, 40, dtype=torch.long))
    with pytest.raises(InputError, match="softmax_scale must be a finite number above 0, not nan"):
        attention(q, k, v, softmax_scale=float("nan"))


def test_gradients_flow_through_exact_attention() -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    attention(q, k, v).sum().backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert x.grad.isfinite().all()


# --- the guard -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", list(itertools.product([False, True], repeat=3)))
def test_one_copy_per_broken_tensor_and_none_else(broken: tuple[bool, bool, bool]) -> None:
    tensors = [odd_views(x)["offset"] if bad else odd_views(x)["fused"] for x, bad in zip(qkv(), broken, strict=True)]
    with count_guards() as stats:
        attention(*tensors, "sdpa")
    assert stats.copies == sum(broken)


class Recorder:
    """A backend that remembers what reached it."""

    def __init__(self, **contract: object) -> None:
        self.seen: list[torch.Tensor] = []
        self.backend = Backend(
            "recorder", Contract(**{"dtypes": (torch.bfloat16,), "device": Device(types=()), **contract}), self.run
        )  # type: ignore[arg-type]

    def run(self, inputs: Inputs) -> torch.Tensor:
        self.seen = [inputs.q, inputs.k, inputs.v]
        return torch.zeros_like(inputs.q)


@pytest.fixture
def recorder():
    made: list[str] = []

    def make(**contract: object) -> Recorder:
        recorder = Recorder(**contract)
        made.append(register(recorder.backend).name)
        return recorder

    yield make
    for name in made:
        unregister(name)


@pytest.mark.parametrize("layout", ["aligned_strided", "aligned_contiguous"])
@pytest.mark.parametrize("order", ["BLHD", "BHLD"])
@pytest.mark.parametrize("view", ["aligned", "offset", "padded rows", "fused", "transposed", "channels first"])
def test_only_what_the_contract_allows_reaches_a_kernel(
    recorder: Callable[..., Recorder], layout: str, order: str, view: str
) -> None:
    kernel = recorder(layout=layout, order=order, writes_to_k=True)
    tensors = [odd_views(x.to(torch.bfloat16))[view] for x in qkv()]
    out = run_backend("recorder", *tensors)
    assert out.shape == tensors[0].shape
    for given, seen in zip(tensors, kernel.seen, strict=True):
        assert layout_violations(seen) == []
        assert seen.is_contiguous() or layout == "aligned_strided"
        assert torch.equal(seen if order == "BLHD" else seen.transpose(1, 2), given)
    assert kernel.seen[1].untyped_storage().data_ptr() != tensors[1].untyped_storage().data_ptr()


def test_float32_goes_to_bfloat16_and_never_to_float16(recorder: Callable[..., Recorder]) -> None:
    kernel = recorder(dtypes=(torch.float16, torch.bfloat16))
    assert run_backend("recorder", *qkv()).dtype == torch.float32
    assert {x.dtype for x in kernel.seen} == {torch.bfloat16}
    recorder(dtypes=(torch.float16,))
    with pytest.raises(BackendUnavailableError, match="the dtype is float32, it supports float16"):
        run_backend("recorder", *qkv())
    recorder(dtypes=(torch.bfloat16,), float32_as=None)
    with pytest.raises(BackendUnavailableError, match="the dtype is float32"):
        run_backend("recorder", *qkv())


# --- what is said and chosen -----------------------------------------------------------------------------------------


def test_what_runs_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(RUNTIME, "announced", set())
    with caplog.at_level("INFO"):
        for _ in range(3):
            attention(*qkv(), "sdpa")
            attention(*qkv(), "sageattn_3_fp8")
    lines = [record.message for record in caplog.records]
    assert lines[0] == "attention mode sdpa runs sdpa"
    assert lines[1].startswith("attention mode sageattn_3_fp8 runs emulated_fp8 (the same numerics in plain torch")
    assert len(lines) == 2


def test_what_runs_is_said_once_per_generation(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(RUNTIME, "announced", set())
    with caplog.at_level("INFO"):
        for _ in range(2):
            with count_kernels() as kernels:
                attention(*qkv(), "sdpa")
                with count_kernels():  # where a non-finite value begins is looked for with counts of its own
                    attention(*qkv(), "sdpa")
                attention(*qkv(), "sdpa")
            assert kernels == {"sdpa": 2}
    assert [record.message for record in caplog.records] == ["attention mode sdpa runs sdpa"] * 2


def test_threads_announce_a_kernel_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(RUNTIME, "announced", set())
    with caplog.at_level("INFO"), ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: attention(*qkv(), "sdpa"), range(32)))
    assert [record.message for record in caplog.records] == ["attention mode sdpa runs sdpa"]


def test_a_reset_leaves_the_listed_backends() -> None:
    register(dataclasses.replace(lookup("sdpa"), name="another"))
    RUNTIME.reject("sdpa", "for a moment")
    RUNTIME.reset()
    assert RUNTIME.backends() == BACKENDS
    assert attention(*qkv()).isfinite().all()


def test_auto_takes_what_it_chose_and_sdpa_where_that_supports_no_such_call(
    recorder: Callable[..., Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = recorder()
    q, k, v = qkv(dtype=torch.bfloat16)
    assert error(attention(q, k, v, "auto"), reference(q, k, v)) < 0.01
    monkeypatch.setattr(auto, "choose", lambda inputs: "recorder")
    assert attention(q, k, v, "auto").eq(0).all()
    assert len(kernel.seen) == 3
    masked = attention(q, k, v, "auto", attn_mask=torch.ones(33, 40, dtype=torch.bool))
    assert error(masked, reference(q, k, v)) < 0.01


def test_a_rejected_backend_is_passed_over_with_its_reason() -> None:
    RUNTIME.reject("emulated_fp8", "it gave wrong numbers in its self-test")
    try:
        with pytest.raises(BackendUnavailableError, match="emulated_fp8: it gave wrong numbers in its self-test"):
            attention(*qkv(), "sageattn_3_fp8")
    finally:
        RUNTIME.reject("emulated_fp8", None)
    attention(*qkv(), "sageattn_3_fp8")


def test_a_kernel_that_cannot_take_a_call_leaves_it_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = dataclasses.replace(lookup("sdpa").contract, keys=number_of_keys(at_most=39))
    backend = register(dataclasses.replace(lookup("sdpa"), name="narrow", contract=narrow))
    monkeypatch.setitem(modes.MODE_BACKENDS, "sdpa", ("narrow", "eager"))
    try:
        assert RUNTIME.reasons(backend, Inputs(*qkv(keys=39))) == []
        assert RUNTIME.reasons(backend, Inputs(*qkv(keys=40))) == ["there are 40 keys, it supports at most 39"]
        q, k, v = qkv(keys=40)
        assert torch.equal(attention(q, k, v, "sdpa"), attention(q, k, v, "eager"))
    finally:
        unregister("narrow")


# --- compilation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ANYWHERE)
def test_a_compiled_model_keeps_one_graph_and_its_guards(mode: str) -> None:
    torch._dynamo.reset()

    def block(x: torch.Tensor) -> torch.Tensor:
        q, k, v = x.unflatten(-1, (3, 2, 32)).unbind(2)
        return attention(q, k, v[:, :], mode).flatten(2) + 1

    storage = torch.randn(2 * 20 * 192 + 1)
    x = storage[1:].view(2, 20, 192)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    with count_guards() as stats:
        out = compiled(x)
    torch.testing.assert_close(out, block(x))
    if mode == "sdpa":
        assert stats.copies == 3  # addresses are checked when the graph runs


@pytest.mark.parametrize(("mode", "masked"), [("sdpa", False), ("sdpa", True), ("sageattn_3_fp8", False)])
def test_the_operator_is_what_it_says(mode: str, masked: bool) -> None:
    mask = torch.rand(33, 40) > 0.5 if masked else None
    q, k, v = (odd_views(x)["transposed"] for x in qkv())
    torch.library.opcheck(torch.ops.wanvideo_infinitetalk.attention.default, (q, k, v, mode, mask, 0.2, False))


def test_shapes_may_change_in_a_compiled_model() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: attention(q, k, v), fullgraph=True, backend="eager", dynamic=True)
    for queries, keys in ((33, 40), (20, 21), (64, 7)):
        q, k, v = qkv(queries, keys)
        assert error(compiled(q, k, v), reference(q, k, v)) < 1e-5
