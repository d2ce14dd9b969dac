"""The elementwise groups: which form serves a call, and how far the eager forms are from float64.

The bound that every form is held to, on a GPU the fused ones too, is in `benchmarks/fused_cases.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from wanvideo_infinitetalk.benchmarks.fused_cases import KINDS, calls, excess
from wanvideo_infinitetalk.wanvideo.kernels import selftest as _agreement
from wanvideo_infinitetalk.wanvideo.modules import elementwise as fused


@pytest.mark.parametrize("group", fused.FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eager_rounds_once(group: str, kind: str, dtype: torch.dtype) -> None:
    call = calls(2, 7, 2, 32, torch.device("cpu"), dtype, kind)[group]
    assert excess(group, fused.FORMS[group]["eager"].run(*call), call) <= 1.0


def test_the_bound_sees_a_second_rounding() -> None:
    call = calls(2, 64, 4, 64, torch.device("cpu"), torch.bfloat16, "normal")["modulated_norm"]
    x, shift, scale, eps = call
    normed = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], eps=eps).bfloat16()  # rounded between
    twice = torch.addcmul(shift, normed.float(), 1 + scale).bfloat16()
    assert excess("modulated_norm", twice, call) > 1.0


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A form "other" of rms_norm that serves rows of 4; what it was asked and what it ran."""
    seen: list[str] = []

    def serves(x: Tensor, weight: Tensor, eps: float) -> bool:
        seen.append("serves")
        return x.shape[-1] == 4

    def run(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        seen.append("run")
        return x + 100

    monkeypatch.setitem(fused.FORMS["rms_norm"], "other", fused.Form(run, serves))
    return seen


def test_a_preferred_form_serves_where_it_can(asked: list[str]) -> None:
    with fused.preferring(rms_norm="other"):
        assert (fused.rms_norm(torch.zeros(2, 4), torch.ones(4), 1e-6) == 100).all()
        assert (fused.rms_norm(torch.zeros(2, 5), torch.ones(5), 1e-6) == 0).all()
    assert asked == ["serves", "run", "serves"]
    assert (fused.rms_norm(torch.zeros(2, 4), torch.ones(4), 1e-6) == 0).all()  # only inside the block
    assert len(asked) == 3


def test_gradients_and_compiled_graphs_take_the_eager_form(asked: list[str]) -> None:
    norm = fused.RMSNorm(4)
    with fused.preferring(rms_norm="other"):
        norm(torch.randn(2, 4)).sum().backward()
        assert norm.weight.grad is not None
        compiled = torch.compile(norm, backend="eager", fullgraph=True)
        with torch.no_grad():
            assert compiled(torch.zeros(2, 4)).abs().max() == 0
    assert asked == []


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="rms_norm=mine"), fused.preferring(rms_norm="mine"):
        pass
    assert set(fused.PREFERRED) == set(fused.FORMS)
    assert all(form in fused.FORMS[group] for group, form in fused.PREFERRED.items())


@pytest.mark.parametrize("group", fused.FORMS)
def test_kernels_leave_the_cpu_to_the_eager_form(group: str) -> None:
    call = calls(1, 3, 2, 8, torch.device("cpu"), torch.bfloat16, "normal")[group]
    for form, (_, serves) in fused.FORMS[group].items():
        assert serves(*call) == (form == "eager")


@pytest.fixture
def another_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device that the suite has not run on, where Triton builds kernels."""
    device = torch.device("cuda", 5)
    monkeypatch.setattr(fused.own, "_installation_reasons", lambda device: ())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for cached in (fused.own._suite_ran_on, _agreement.disagreements):
        cached.cache_clear()
    yield device
    for cached in (fused.own._suite_ran_on, _agreement.disagreements):
        cached.cache_clear()


def pairs(ours: float) -> Any:
    return lambda device: iter([("rms_norm", torch.full((2,), ours), torch.ones(2))])


def test_a_gpu_that_the_suite_did_not_run_on_is_asked_once(
    another_gpu: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_agreement, "_pairs", pairs(1.001))
    assert fused.own.unavailable_reasons(another_gpu) == ()
    monkeypatch.setattr(_agreement, "_pairs", pairs(2.0))
    assert fused.own.unavailable_reasons(another_gpu) == ()
    _agreement.disagreements.cache_clear()
    (reason,) = fused.own.unavailable_reasons(another_gpu)
    assert "do not give PyTorch's numbers on this GPU (rms_norm)" in reason
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_kernels_that_fail_there_are_no_error(another_gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> Any:
        raise RuntimeError("no kernel image is available\nand more")

    monkeypatch.setattr(_agreement, "_pairs", fail)
    (reason,) = fused.own.unavailable_reasons(another_gpu)
    assert reason.endswith("(no kernel image is available)")


def test_a_full_gpu_is_not_kept_as_a_verdict(another_gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(device: torch.device) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(_agreement, "_pairs", full)
    with pytest.raises(torch.OutOfMemoryError):
        fused.own.unavailable_reasons(another_gpu)
    monkeypatch.setattr(_agreement, "_pairs", pairs(1.0))
    assert fused.own.unavailable_reasons(another_gpu) == ()


def test_nothing_is_compared_while_a_graph_is_captured_nor_where_the_suite_ran(
    another_gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_agreement, "_pairs", lambda device: pytest.fail("compared"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "captured" in fused.own.unavailable_reasons(another_gpu)[0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    fused.own._suite_ran_on.cache_clear()
    assert fused.own.unavailable_reasons(another_gpu) == ()


class OnGpu(Tensor):
    """A tensor that says that it is on a GPU: what decides reads host data only."""

    is_cuda = True  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("change", "serves"),
    [
        (lambda x, shift, scale: (x, shift, scale), True),
        (lambda x, shift, scale: (x[:, ::2], shift, scale), False),
        (lambda x, shift, scale: (x.float(), shift, scale), False),
        (lambda x, shift, scale: (x, shift.bfloat16(), scale), False),
        (lambda x, shift, scale: (x, shift, scale.expand(-1, 6, -1)), False),
        (lambda x, shift, scale: (x, shift[:1], scale[:1]), True),
        (lambda x, shift, scale: (x[:, :0], shift, scale), False),
    ],
)
def test_what_our_kernel_serves(change: Any, serves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused.own, "unavailable_reasons", lambda device: ())
    x, shift, scale, eps = calls(2, 6, 2, 8, torch.device("cpu"), torch.bfloat16, "normal")["modulated_norm"]
    x, shift, scale = change(x, shift, scale)
    assert fused.own.serves_modulated_norm(x.as_subclass(OnGpu), shift, scale, eps) == serves
