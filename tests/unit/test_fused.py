"""The elementwise groups: which form computes a call, and how far the eager forms are from float64.

The bound that every form is held to, on a GPU the fused ones too, is in `benchmarks/fused_cases.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from wanvideo_infinitetalk.benchmarks.fused_cases import GROUPS, KINDS, calls, excess, only_eager, why_eager
from wanvideo_infinitetalk.wanvideo.kernels import contract, packages, reference, selftest
from wanvideo_infinitetalk.wanvideo.kernels._common import TRITON
from wanvideo_infinitetalk.wanvideo.modules import elementwise


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eager_rounds_once(group: str, kind: str, dtype: torch.dtype) -> None:
    call = calls(2, 7, 2, 32, torch.device("cpu"), dtype, kind)[group]
    assert excess(group, getattr(reference, group)(*call), call) <= 1.0


def test_the_bound_sees_a_second_rounding() -> None:
    call = calls(2, 64, 4, 64, torch.device("cpu"), torch.bfloat16, "normal")["modulated_norm"]
    x, shift, scale, eps = call
    normed = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], eps=eps).bfloat16()  # rounded between
    twice = torch.addcmul(shift, normed.float(), 1 + scale).bfloat16()
    assert excess("modulated_norm", twice, call) > 1.0


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets the kernel of rms_norm compute rows of 4, adding 100; what was asked and what ran."""
    seen: list[str] = []

    def eager_reasons(needs: Any, tensors: tuple[Tensor, ...], **given: Any) -> list[str]:
        seen.append("asked")
        return [] if tensors[0].shape[-1] == 4 else ["rows are not of 4"]

    def kernel(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        seen.append("ran")
        return x + 100

    monkeypatch.setattr(elementwise, "eager_reasons", eager_reasons)
    monkeypatch.setattr(elementwise.fused, "rms_norm", kernel)
    return seen


def test_a_kernel_runs_where_nothing_is_against_it(ran: list[str]) -> None:
    assert (elementwise.rms_norm(torch.zeros(2, 4), torch.ones(4), 1e-6) == 100).all()
    assert (elementwise.rms_norm(torch.zeros(2, 5), torch.ones(5), 1e-6) == 0).all()
    assert ran == ["asked", "ran", "asked"]
    with only_eager():
        assert (elementwise.rms_norm(torch.zeros(2, 4), torch.ones(4), 1e-6) == 0).all()
    assert len(ran) == 3


def test_gradients_and_compiled_graphs_take_the_eager_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise.fused, "rms_norm", lambda *_: pytest.fail("the kernel ran"))
    monkeypatch.setattr(contract, "reasons", lambda *_, **__: [])
    monkeypatch.setattr(selftest, "device_reasons", lambda *_: ())
    monkeypatch.setattr(selftest, "elementwise_reasons", lambda *_: ())
    norm = elementwise.RMSNorm(4)
    norm(torch.randn(2, 4)).sum().backward()
    assert norm.weight.grad is not None
    compiled = torch.compile(norm, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert compiled(torch.zeros(2, 4)).abs().max() == 0


@pytest.mark.parametrize("group", GROUPS)
def test_kernels_leave_the_cpu_to_the_eager_form(group: str) -> None:
    call = calls(1, 3, 2, 8, torch.device("cpu"), torch.bfloat16, "normal")[group]
    assert why_eager(group, call) == ["it runs on cuda, the tensors are on cpu"]


@pytest.fixture
def another_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that the suite has not run on, where Triton builds kernels."""
    monkeypatch.setattr(selftest, "device_reasons", lambda needs, device: ())
    monkeypatch.setattr(packages, "capability", lambda device: (12, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(selftest.SELF_TESTS, "_kept", {})
    return torch.device("cuda", 5)


def comparisons(actual: float) -> Any:
    return lambda device: iter([("rms_norm", torch.full((2,), actual), torch.ones(2))])


def reasons(device: torch.device) -> tuple[str, ...]:
    return selftest.elementwise_reasons(TRITON, device)


def test_a_gpu_that_the_suite_did_not_run_on_is_asked_once(
    another_gpu: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(selftest, "_elementwise_comparisons", comparisons(1.001))
    assert reasons(another_gpu) == ()
    monkeypatch.setattr(selftest, "_elementwise_comparisons", comparisons(2.0))
    assert reasons(another_gpu) == ()
    selftest.SELF_TESTS.reset()
    (reason,) = reasons(another_gpu)
    assert "do not give PyTorch's numbers on this GPU: other numbers (rms_norm)" in reason
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_kernels_that_fail_there_are_no_error(another_gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> Any:
        raise RuntimeError("no kernel image is available\nand more")
        yield

    monkeypatch.setattr(selftest, "_elementwise_comparisons", fail)
    (reason,) = reasons(another_gpu)
    assert reason.endswith(": no kernel image is available")


def test_a_full_gpu_is_not_kept_as_a_verdict(another_gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(device: torch.device) -> Any:
        raise torch.OutOfMemoryError("out of memory")
        yield

    monkeypatch.setattr(selftest, "_elementwise_comparisons", full)
    with pytest.raises(torch.OutOfMemoryError):
        reasons(another_gpu)
    monkeypatch.setattr(selftest, "_elementwise_comparisons", comparisons(1.0))
    assert reasons(another_gpu) == ()


def test_nothing_is_compared_while_a_graph_is_captured_nor_where_the_suite_ran(
    another_gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "_elementwise_comparisons", lambda device: pytest.fail("compared"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "captured" in reasons(another_gpu)[0]
    monkeypatch.setattr(packages, "capability", lambda device: (9, 0))
    assert reasons(another_gpu) == ()


def on_gpu(x: Tensor) -> contract.Described:
    """What a contract sees of a tensor that is on a GPU: host data only."""
    return contract.Described(x.dtype, tuple(x.shape), torch.device("cuda", 5), x.is_contiguous(), x.stride(-1))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, shift, scale: (x, shift, scale), ""),
        (lambda x, shift, scale: (x[:, ::2], shift, scale), "x is not contiguous"),
        (lambda x, shift, scale: (x.float(), shift, scale), "x is float32, it supports bfloat16, float16"),
        (lambda x, shift, scale: (x, shift.bfloat16(), scale), "shift is bfloat16, it supports float32"),
        (lambda x, shift, scale: (x, shift, scale.expand(-1, 6, -1)), "scale is [2, 6, 16], it supports [1|B 1 C]"),
        (lambda x, shift, scale: (x, shift[:1], scale[:1]), ""),
        (lambda x, shift, scale: (x[:, :0], shift, scale), "there are 0 rows, it supports 1 or more"),
    ],
)
def test_what_the_kernel_computes(change: Any, reason: str) -> None:
    x, shift, scale, _ = calls(2, 6, 2, 8, torch.device("cpu"), torch.bfloat16, "normal")["modulated_norm"]
    found = contract.reasons(GROUPS["modulated_norm"], [on_gpu(t) for t in change(x, shift, scale)])
    assert len(found) == bool(reason)
    assert reason in "".join(found)


def test_a_contract_gives_every_reason_at_once() -> None:
    q, k, weight, bias, rotation, heads, _ = calls(2, 6, 3, 8, torch.device("cpu"), torch.bfloat16, "normal")[
        "qk_norm_rope"
    ]
    given = [on_gpu(t) for t in (q, k.half(), weight, bias[::2], rotation.cos, rotation.sin.double())]
    needs = GROUPS["qk_norm_rope"]
    assert contract.reasons(needs, given, heads=heads) == [
        "k is float16, q is bfloat16",
        "k_weight is [12], it supports [C] with heads = 3, B = 2, L = 6, C = 24",
        "k_weight is not contiguous",
        "sin is float64, it supports float32",
    ]
    right = [on_gpu(t) for t in (q, k, weight, bias, *rotation)]
    assert contract.reasons(needs, right, heads=heads) == []
    assert len(contract.reasons(needs, right, heads=5)) == 2  # cos and sin
