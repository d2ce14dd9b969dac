"""Contracts are true: inside each limit the raw kernel is right, outside it faults, rejects the call or is wrong.

Every call outside a limit runs in a child process of its own. `pytest -s` prints the table of what each kernel did.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass

import pytest
import torch
from support.repairs import repairable_reasons
from support.truth import ABSENT, BAD, RIGHT, Raw, outcomes
from wanvideo_infinitetalk.wanvideo.kernels.inputs import Inputs
from wanvideo_infinitetalk.wanvideo.modules.attention import attention
from wanvideo_infinitetalk.wanvideo.modules.backends import lookup, not_supported_reasons

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(600)]

EIGHT_BIT, FOUR_BIT = 0.06, 0.26


@dataclass(frozen=True)
class Limit:
    """One limit of a contract: the last call inside it and the first outside."""

    inside: tuple[Raw, ...]
    outside: tuple[Raw, ...]


def sixteen_bytes(kernel: str, dtype: str = "bfloat16", bound: float = 0.02) -> list[Limit]:
    """Address and strides in steps of 16 bytes."""
    whole = 16 // getattr(torch, dtype).itemsize
    raw = Raw(kernel, dtype=dtype, bound=bound)

    def at(layout: str, amount: int) -> Raw:
        return dataclasses.replace(raw, layout=layout, amount=amount)

    return [
        Limit((raw, at("offset", whole)), tuple(at("offset", n) for n in (1, whole // 2))),
        Limit((at("row stride", whole),), (at("row stride", whole // 2),)),
    ]


def wide_rows(kernel: str, dtype: str = "bfloat16", bound: float = 0.02) -> Limit:
    """The Triton kernels count strides in steps of 16 bytes. An odd start they would read rightly, by a second compiled
    kernel with narrow loads: their contract asks for the copy because it is cheaper."""
    whole = 16 // getattr(torch, dtype).itemsize
    raw = Raw(kernel, dtype=dtype, bound=bound)
    at = [dataclasses.replace(raw, layout="row stride", amount=amount) for amount in (whole, whole // 2)]
    return Limit((raw, dataclasses.replace(raw, layout="offset", amount=whole), at[0]), (at[1],))


def reads_any_address(kernel: str, bound: float, dtype: str = "bfloat16") -> list[Limit]:
    """No limit on the address: nothing is to be copied."""
    raw = Raw(kernel, dtype=dtype, bound=bound)
    layouts = [("offset", 1), ("offset", 3), ("row stride", 1), ("head stride", 1), ("batch stride", 1)]
    return [Limit(tuple(dataclasses.replace(raw, layout=layout, amount=n) for layout, n in layouts), ())]


def harmless(
    kernel: str, bound: float = 0.02, rejected: tuple[object, ...] = (), left: tuple[object, ...] = ()
) -> Limit:
    """Layouts and sizes that the contract lets pass without a copy.

    Args:
        rejected: those that this kernel's contract keeps from it, because it rejects them.
        left: those that its caller leaves to another kernel of the same mode.
    """
    layouts = [("expanded", 0), ("fused", 0), ("transposed", 0), ("size-1 stride", 3), ("batch stride", 8)]
    sizes = [{"queries": 1}, {"keys": 1}, {"queries": 513, "keys": 257}, {"head_dim": 64}, {"head_dim": 96}]
    cases = {
        layout: Raw(kernel, layout, n, sizes={"batch": 1} if layout == "size-1 stride" else {}, bound=bound)
        for layout, n in layouts
    }
    cases |= {str(size): Raw(kernel, sizes=size, bound=bound) for size in sizes}
    return Limit(
        tuple(raw for name, raw in cases.items() if name not in map(str, (*rejected, *left))),
        tuple(cases[str(name)] for name in rejected),
    )


LIMITS: dict[str, list[Limit]] = {
    # SDPA's kernels; the contract of the mode is what its strictest choice needs.
    "sdpa": [
        *sixteen_bytes("sdpa"),
        *sixteen_bytes("sdpa", "float32", 1e-3),
        harmless("sdpa"),
        Limit((Raw("sdpa", options={"scale": 0.3}), Raw("sdpa", options={"v_peak": 3e4})), ()),
    ],
    "sdpa flash": [*sixteen_bytes("sdpa flash"), *sixteen_bytes("sdpa flash", "float16"), harmless("sdpa flash")],
    "sdpa efficient": [
        *sixteen_bytes("sdpa efficient"),
        *sixteen_bytes("sdpa efficient", "float32", 1e-3),
        harmless("sdpa efficient"),
        Limit((Raw("sdpa efficient", options={"mask_offset": 8}),), ()),
    ],
    # PyTorch itself leaves a single key to another of its kernels.
    "sdpa cudnn": [*sixteen_bytes("sdpa cudnn"), harmless("sdpa cudnn", left=({"keys": 1},))],
    "sdpa math": reads_any_address("sdpa math", 0.02),
    "linear": [Limit((Raw("linear"), Raw("linear", "offset", 1), Raw("linear", "row stride", 1)), ())],
    # Amounts in bytes: fp8.
    "scaled_mm": [
        Limit(
            (Raw("scaled_mm"), Raw("scaled_mm", "offset", 16), Raw("scaled_mm", "row stride", 16)),
            (
                Raw("scaled_mm", "offset", 1),
                Raw("scaled_mm", "offset", 8),
                Raw("scaled_mm", "row stride", 8),
                Raw("scaled_mm", sizes={"inner": 520}),
            ),
        )
    ],
    "comfy_kitchen_int8": [
        *sixteen_bytes("comfy_kitchen_int8", bound=EIGHT_BIT),
        harmless("comfy_kitchen_int8", EIGHT_BIT, rejected=("expanded",)),
        Limit(
            (Raw("comfy_kitchen_int8", sizes={"head_dim": 256}, bound=EIGHT_BIT),),
            (Raw("comfy_kitchen_int8", sizes={"head_dim": 264}, bound=EIGHT_BIT),),
        ),
        Limit((Raw("comfy_kitchen_int8", options={"v_peak": 1e5}, bound=EIGHT_BIT),), ()),
    ],
    "triton_fp8": [
        wide_rows("triton_fp8", bound=EIGHT_BIT),
        wide_rows("triton_fp8", "float32", bound=EIGHT_BIT),
        harmless("triton_fp8", EIGHT_BIT),
        Limit(
            (Raw("triton_fp8", options={"v_peak": 1e5}, bound=EIGHT_BIT),),
            (Raw("triton_fp8", sizes={"head_dim": 80}, bound=EIGHT_BIT),),
        ),
    ],
    "triton_fp4": [
        wide_rows("triton_fp4", bound=FOUR_BIT),
        harmless("triton_fp4", FOUR_BIT, rejected=({"head_dim": 96},)),
        Limit((Raw("triton_fp4", options={"v_peak": 1e5}, bound=FOUR_BIT),), ()),
    ],
    "sageattention_1": [
        Limit(
            (Raw("sageattention_1", bound=EIGHT_BIT), Raw("sageattention_1", sizes={"head_dim": 96}, bound=EIGHT_BIT)),
            (
                Raw("sageattention_1", sizes={"head_dim": 80}, bound=EIGHT_BIT),
                Raw("sageattention_1", options={"v_peak": 1e5}, bound=EIGHT_BIT),
                Raw("sageattention_1", "expanded", bound=EIGHT_BIT),
            ),
        )
    ],
    "sageattention_2": [
        *sixteen_bytes("sageattention_2", bound=EIGHT_BIT),
        Limit(
            (
                Raw("sageattention_2", sizes={"keys": 128}, bound=EIGHT_BIT),
                Raw("sageattention_2", sizes={"head_dim": 96}, bound=EIGHT_BIT),
                Raw("sageattention_2", options={"v_peak": 1e5}, bound=EIGHT_BIT),
            ),
            (Raw("sageattention_2", sizes={"head_dim": 136}, bound=EIGHT_BIT),),
        ),
    ],
}


def table(title: str, cases: list[Raw], answers: list[dict]) -> str:
    rows = [
        f"  {case}: {answer['outcome']}"
        + (f", cosine {answer['cosine']}" if "cosine" in answer else "")
        + (f" ({answer['error']})" if answer["outcome"] != RIGHT and "error" in answer else "")
        for case, answer in zip(cases, answers, strict=True)
    ]
    return "\n".join([title, *rows])


@pytest.fixture(scope="module")
def measured() -> dict[str, dict]:
    """Every case of the table, run at once in a small pool of children: description -> answer."""
    inside = [case for limits in LIMITS.values() for limit in limits for case in limit.inside]
    outside = [case for limits in LIMITS.values() for limit in limits for case in limit.outside]
    answers = [*outcomes(inside, together=True), *outcomes(outside, together=False)]
    return {str(case): answer for case, answer in zip([*inside, *outside], answers, strict=True)}


@pytest.mark.parametrize("kernel", LIMITS)
def test_each_limit_from_both_sides(kernel: str, measured: dict[str, dict]) -> None:
    inside = [case for limit in LIMITS[kernel] for case in limit.inside]
    outside = [case for limit in LIMITS[kernel] for case in limit.outside]
    answers = [measured[str(case)] for case in inside]
    if all(answer["outcome"] == ABSENT for answer in answers):
        pytest.skip(f"{kernel}: {answers[0]['error']}")
    report = table(f"{kernel}, inside", inside, answers)
    beyond = [measured[str(case)] for case in outside]
    if outside:
        report += "\n" + table(f"{kernel}, outside", outside, beyond)
    sys.stdout.write(f"\n{report}\n")
    assert all(answer["outcome"] == RIGHT for answer in answers), report
    assert all(answer["outcome"] in BAD for answer in beyond), report


ATTENTION = [name for name in LIMITS if name not in ("linear", "scaled_mm", "sdpa math", "comfy_kitchen_int8")]
BACKEND_OF = {"sageattention_2": "sageattention_2_fp8_sm90"}


@pytest.mark.parametrize("kernel", ATTENTION)
def test_the_contract_says_the_same(kernel: str) -> None:
    """The declared contract calls exactly the inside inside, and everything outside outside."""
    from support.truth import _lay_out

    name = "sdpa" if kernel.startswith("sdpa") else BACKEND_OF.get(kernel, kernel)
    contract = lookup(name).contract
    for limit in LIMITS[kernel]:
        for case, supported in [(c, True) for c in limit.inside] + [(c, False) for c in limit.outside]:
            sizes = {"batch": 2, "queries": 512, "keys": 512, "heads": 8, "head_dim": 128, **case.sizes}
            dtype = getattr(torch, case.dtype)
            q, k, v = (
                _lay_out(
                    torch.zeros(sizes["batch"], sizes[n], sizes["heads"], sizes["head_dim"], device="cuda").to(dtype),
                    case.layout,
                    case.amount,
                )
                for n in ("queries", "keys", "keys")
            )
            inputs = Inputs(q, k, v, softmax_scale=case.options.get("scale"))
            reasons = [*not_supported_reasons(contract, inputs), *repairable_reasons(contract, inputs)]
            if "v_peak" in case.options:
                continue  # values are no part of a contract: the adapter makes them fit
            assert (reasons == []) == supported, f"{case}: {reasons}"


def test_the_entry_point_is_right_where_the_raw_calls_are_not() -> None:
    """Every call outside a limit of SDPA, given to the entry point in this very process."""
    from support.truth import _lay_out

    for kernel in ("sdpa", "sdpa flash", "sdpa efficient", "sdpa cudnn"):
        for case in (case for limit in LIMITS[kernel] for case in limit.outside):
            dtype = getattr(torch, case.dtype)
            q, k, v = (
                _lay_out(torch.randn(2, 512, 8, 128, device="cuda").to(dtype), case.layout, case.amount)
                for _ in range(3)
            )
            want = attention(q.double(), k.double(), v.double(), "eager")
            for mode in ("sdpa", "sageattn_3_fp8", "sageattn_3_fp4"):
                out = attention(q, k, v, mode).double()
                bound = {"sdpa": 0.01, "sageattn_3_fp8": EIGHT_BIT, "sageattn_3_fp4": FOUR_BIT}[mode]
                assert float((out - want).norm() / want.norm()) < bound, (case, mode)
    torch.cuda.synchronize()


def test_raw_calls_on_generated_layouts_are_known_to_fail() -> None:
    """How often awkward layouts fault or are wrong without the guard, left to SDPA's own choice of kernel."""
    layouts = [("offset", n) for n in range(1, 8)] + [("row stride", n) for n in (1, 2, 4)] + [("head stride", 1)]
    cases = [Raw("sdpa", layout, n, dtype) for layout, n in layouts for dtype in ("bfloat16", "float32")]
    answers = outcomes(cases, together=True)
    counts: dict[str, int] = {}
    for answer in answers:
        counts[answer["outcome"]] = counts.get(answer["outcome"], 0) + 1
    sys.stdout.write(f"\n{table('raw SDPA on awkward layouts', cases, answers)}\n  {counts} of {len(cases)}\n")
    assert sum(counts.get(bad, 0) for bad in BAD) > len(cases) // 3
    assert outcomes([Raw("comfy_kitchen_int8", "offset", 1)], together=True)[0]["outcome"] in (*BAD, ABSENT)
