"""The elementwise groups: which form serves a call, and how far the eager forms are from float64.

The bound that every form is held to, on a GPU the fused ones too, is in `benchmarks/fused_cases.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from wanvideo_infinitetalk.benchmarks.fused_cases import KINDS, calls, excess
from wanvideo_infinitetalk.wanvideo.modules import fused


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
