"""What the guards cost: one transformer block of the 14B model with them against the same without them.

    python -m benchmarks.guard_cost [--json F]

Without: every guard is replaced by the identity, and a kernel's contract is read once instead of at every call. The
two take turns, and so does "with, again", which shows how far two equal things differ. Run from the root of the
repository.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import sys
import timeit
from collections.abc import Callable, Iterator
from typing import Any

import torch
from wanvideo_infinitetalk.wanvideo.kernels import layout
from wanvideo_infinitetalk.wanvideo.kernels.inputs import Inputs
from wanvideo_infinitetalk.wanvideo.modules.backends import RUNTIME, Backend, lookup
from wanvideo_infinitetalk.wanvideo.modules.model import WanConfig, WanModel

from .common import (
    PUBLIC_14B,
    PUBLIC_GRID,
    SMALL,
    SMALL_GRID,
    Report,
    begin,
    interleaved,
    parser,
    random_inputs,
    random_model,
    ratio,
)

GOAL = 1.005
LASTING = 250.0
"""Milliseconds of calls in a row, each time that one of them has its turn."""
ONE_BLOCK = dataclasses.replace(PUBLIC_14B, num_layers=1)
GUARDS = ("aligned_contiguous", "aligned_strided", "aligned_rows")
VARIANTS = (("sdpa", "disabled"), ("sageattn_3_fp8", "fp8_e4m3fn_scaled_fast"))
"""Attention mode and quantization: the plainest, and the one whose kernels leave the least time to hide behind."""


def _identity(x: torch.Tensor, *args: Any) -> torch.Tensor:
    return x


@contextlib.contextmanager
def replaced_guards(by_nothing: bool) -> Iterator[None]:
    """Replace the guards wherever they were imported, and the reading of contracts by a look into a dictionary.

    With `by_nothing` False they are replaced by themselves: what is timed with them begins after the same pause, in
    which a GPU that was throttled by its power limit recovers.
    """
    replaced: list[tuple[Any, str, Any]] = []
    modules = [m for name, m in sys.modules.items() if name.split(".")[0] == "wanvideo_infinitetalk"]
    originals = {name: getattr(layout, name) for name in GUARDS}
    read_contract, known = RUNTIME.reasons, dict[str, list[str]]()

    def remembered(backend: Backend, inputs: Inputs) -> list[str]:
        if backend.name not in known:
            known[backend.name] = read_contract(backend, inputs)
        return known[backend.name]

    for module in modules:
        for name, guard in originals.items():
            if getattr(module, name, None) is guard:
                replaced.append((module, name, guard))
                setattr(module, name, _identity if by_nothing else guard)
    replaced.append((RUNTIME, "reasons", read_contract))
    RUNTIME.reasons = remembered if by_nothing else read_contract  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module, name, original in replaced:
            setattr(module, name, original)


def one_block(config: WanConfig, grid: tuple[int, int, int], mode: str, quantization: str, device: torch.device) -> Any:
    """A block, and the arguments that the model calls it with."""
    model: WanModel = random_model(config, device, torch.bfloat16, quantization, mode)
    calls: list[tuple[Any, ...]] = []
    handle = model.blocks[0].register_forward_pre_hook(lambda module, arguments: calls.append(arguments))
    model(**random_inputs(config, grid, device))
    handle.remove()
    return model.blocks[0], calls[0]


def compare(report: Report, config: WanConfig, grid: tuple[int, int, int], rounds: int) -> None:
    rows: list[dict[str, str | int | float]] = []
    for mode, quantization in VARIANTS:
        what = f"{mode}, quantization {quantization}"
        block, arguments = one_block(config, grid, mode, quantization, report.device)
        run = functools.partial(block, *arguments)
        with layout.count_guards() as stats:
            expected = run()
        with replaced_guards(by_nothing=True):
            same = torch.equal(run(), expected)
        if not same:
            sys.exit("The block gives other numbers without its guards, so there is nothing to compare.")
        calls = {"with": run, "without": run, "with, again": run}
        within = {name: functools.partial(replaced_guards, by_nothing=name == "without") for name in calls}
        times = interleaved(calls, rounds, report.device, warmup=3, within=within, last=report.lasting(LASTING))
        rows.append(
            {
                "attention, linears": what,
                "with guards, ms": statistics.median(times["with"]),
                "without, ms": statistics.median(times["without"]),
                "with / without": ratio(times, "with", "without"),
                "with / with, again": ratio(times, "with", "with, again"),
                "guard calls": stats.calls,
                "copies": stats.copies,
            }
        )
        report.goal(f"with guards / without, {what}", ratio(times, "with", "without"), GOAL)
        report.goal(f"copies made by the guards, {what}", stats.copies, 0)
    tokens = grid[0] * grid[1] * grid[2]
    report.table(f"One block, {config.dim} wide, {tokens} tokens, bf16: medians of {rounds} rounds", rows)


def host_cost(report: Report, tokens: int, heads: int) -> None:
    """Microseconds of host time per call of each guard on tensors that need no repair, and of reading a contract."""
    plain = torch.empty(1, tokens, heads, 128, dtype=torch.bfloat16, device=report.device)
    fused = torch.empty(1, tokens, 3, heads, 128, dtype=torch.bfloat16, device=report.device)[:, :, 1]
    backend = lookup("sdpa")
    calls: dict[str, Callable[[], object]] = {
        "aligned_contiguous": lambda: layout.aligned_contiguous(plain),
        "aligned_strided, contiguous tensor": lambda: layout.aligned_strided(plain),
        "aligned_strided, slice of fused q, k, v": lambda: layout.aligned_strided(fused),
        "the contract of one attention call": lambda: RUNTIME.reasons(backend, Inputs.checked(plain, plain, plain)),
    }
    number = 5000
    best = {name: min(timeit.repeat(call, number=number, repeat=5)) for name, call in calls.items()}
    report.table(
        "Host time of one check",
        [{"call": name, "microseconds": seconds / number * 1e6} for name, seconds in best.items()],
    )


def main() -> int:
    report, arguments = begin(parser(__doc__, rounds=60), "guard_cost", "Cost of the guards")
    config, grid = (dataclasses.replace(SMALL, num_layers=1), SMALL_GRID) if report.small else (ONE_BLOCK, PUBLIC_GRID)
    with torch.inference_mode():
        compare(report, config, grid, arguments.rounds)
        host_cost(report, grid[0] * grid[1] * grid[2], config.num_heads)
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
