"""The elementwise groups of a block: eager, the kernel, comfy-kitchen's and the compiled eager form side by side.

    python -m benchmarks.fused [--json F]

Times are medians of rows of calls that took turns. "ulp" is the largest error against float64 over what one rounding
allows, on normal values, with outlier channels, and with a mean far from zero: a form above 1 rounds twice, or sums
less exactly, and may not take the place of the eager one. At last one whole block of the 14B model, all groups eager
against all by kernels. Run from the root of the repository.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from wanvideo_infinitetalk.wanvideo.kernels import fused, reference
from wanvideo_infinitetalk.wanvideo.kernels.rope import Rotation

from .common import (
    PUBLIC_14B,
    PUBLIC_GRID,
    SMALL,
    SMALL_GRID,
    Report,
    begin,
    interleaved,
    parser,
    ratio,
    usable,
)
from .fused_cases import Call, calls, excess, only_eager, why_eager
from .guard_cost import ONE_BLOCK, one_block

JUDGED = ("normal", "outlier channels", "large mean")
"""Kinds of values whose errors stand in the tables."""
EAGER, KERNEL = "eager", "kernel"
COMPILED, TWO_STEPS = "eager, compiled", "torch rms_norm + comfy-kitchen rope"
ADALN = "comfy-kitchen adaln, modulation rounded"
MEASURED_ROWS = 2048
LASTING, LASTING_BLOCK = 10.0, 250.0
"""Milliseconds of calls in a row, of one group and of a whole block, each time that a form has its turn."""
MODES = (("sdpa", "disabled"), ("sageattn_3_fp8", "fp8_e4m3fn_scaled_fast"))


def forms(group: str, call: Call, device: torch.device) -> dict[str, Callable[..., Any]]:
    """Every form of a group that can compute this call, and what else could: named with its reason where it cannot."""
    found: dict[str, Callable[..., Any]] = {EAGER: getattr(reference, group)}
    if reasons := why_eager(group, call):
        print(f"not measured: the kernel of {group} ({'; '.join(reasons)})")
    else:
        found[KERNEL] = getattr(fused, group)
    if device.type == "cuda":
        found[COMPILED] = torch.compile(getattr(reference, group), dynamic=False)
        if group == "qk_norm_rope":
            found[TWO_STEPS] = _two_steps
        if group == "modulated_norm":
            found[ADALN] = _adaln
    return usable(found, call, f" of {group}")


def _adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """comfy-kitchen's kernel, which takes scale and shift for numbers of x's dtype."""
    out: Tensor = importlib.import_module("comfy_kitchen").adaln(x, scale.to(x.dtype), shift.to(x.dtype), eps)
    return out


def _two_steps(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rotation: Rotation, num_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """What other programs do: the norm rounded to bf16, then comfy-kitchen's rotation."""
    cos, sin = rotation
    matrices = torch.stack((cos, -sin, sin, cos), -1).unflatten(-1, (2, 2))  # [L, 1, D/2, 2, 2]
    q, k = (
        F.rms_norm(x, x.shape[-1:], weight, eps).unflatten(-1, (num_heads, -1))
        for x, weight in ((q, q_weight), (k, k_weight))
    )
    out: tuple[Tensor, Tensor] = importlib.import_module("comfy_kitchen").apply_rope(q, k, matrices.unsqueeze(0))
    return out


def traffic(call: Call, results: Any) -> int:
    """Bytes that must be read and written at least: every argument and every result once."""

    def size(x: Any) -> int:
        if isinstance(x, tuple):
            return sum(size(part) for part in x)
        return x.numel() * x.element_size() if isinstance(x, Tensor) else 0

    return size(call) + size(results)


def compare(report: Report, grid: tuple[int, int, int], heads: int, head_dim: int, rounds: int) -> None:
    length, sizes = math.prod(grid), (heads, head_dim, report.device, torch.bfloat16)
    timed = calls(1, length, *sizes, "normal")
    judged = {kind: calls(1, min(length, MEASURED_ROWS), *sizes, kind) for kind in JUDGED}
    for group, call in timed.items():
        found = forms(group, call, report.device)
        forms_of_call = {n: functools.partial(f, *call) for n, f in found.items()}
        times = interleaved(forms_of_call, rounds, report.device, warmup=3, last=report.lasting(LASTING))
        rows: list[dict[str, str | int | float]] = []
        for name, form in found.items():
            ms = statistics.median(times[name])
            row: dict[str, str | int | float] = {
                "form": name,
                "ms": ms,
                "times eager": 1 / ratio(times, name, EAGER),
                "GB/s": traffic(call, form(*call)) / ms / 1e6,
            }
            for kind in JUDGED:
                few = judged[kind][group]
                row[f"ulp, {kind}"] = excess(group, form(*few), few)
            rows.append(row)
        title = f"{group}: [1, {length}, {heads * head_dim}] bf16, medians of {rounds} rounds of calls in a row"
        report.table(title, rows)
        if KERNEL in found:
            worst = max(float(row[f"ulp, {kind}"]) for row in rows if row["form"] == KERNEL for kind in JUDGED)
            report.goal(f"ulp of the kernel of {group}", worst, 1.0)
            report.goal(f"time of the kernel of {group} over eager", ratio(times, KERNEL, EAGER), 1.0)


def whole_block(report: Report, small: bool, rounds: int) -> None:
    """One block with every group eager, and with the kernels wherever they can run."""
    config, grid = (dataclasses.replace(SMALL, num_layers=1), SMALL_GRID) if small else (ONE_BLOCK, PUBLIC_GRID)
    rows: list[dict[str, str | int | float]] = []
    within: dict[str, Callable[[], AbstractContextManager[Any]]] = {EAGER: only_eager, KERNEL: nullcontext}
    for mode, quantization in MODES:
        block, arguments = one_block(config, grid, mode, quantization, report.device)
        run = functools.partial(block, *arguments)
        with only_eager():
            expected = run().float()
        moved = float((run().float() - expected).norm() / expected.norm())
        times = interleaved(
            dict.fromkeys(within, run),
            rounds,
            report.device,
            warmup=3,
            within=within,
            last=report.lasting(LASTING_BLOCK),
        )
        rows.append(
            {
                "attention, linears": f"{mode}, quantization {quantization}",
                "eager, ms": statistics.median(times[EAGER]),
                "kernels, ms": statistics.median(times[KERNEL]),
                "kernels / eager": ratio(times, KERNEL, EAGER),
                "relative L2 between them": moved,
            }
        )
        torch._dynamo.reset()
    report.table(f"One block, {config.dim} wide, {math.prod(grid)} tokens, bf16: medians of {rounds} rounds", rows)


def main() -> int:
    report, arguments = begin(parser(__doc__, rounds=20), "fused", "Elementwise groups")
    small = report.small
    torch.manual_seed(0)
    with torch.inference_mode():
        grid, heads, head_dim = (
            ((2, 3, 4), 2, 32) if small else (PUBLIC_GRID, PUBLIC_14B.num_heads, PUBLIC_14B.head_dim)
        )
        compare(report, grid, heads, head_dim, arguments.rounds)
        whole_block(report, small, arguments.rounds)
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
