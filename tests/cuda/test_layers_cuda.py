"""Every attention mode crossed with every quantization of the linears around it, on generated layers of every layout.

`LAYER_CASES=N` sets the number of cases for each mode and quantization (default 50: 3,500 in all for the modes that
need no package); `pytest -s` prints the summaries.
"""

from __future__ import annotations

import collections
import os
import sys
import time

import pytest
import torch
from support.layer_cases import layer_case, layer_faults
from wanvideo_infinitetalk.fp8_optimization import QUANTIZATIONS
from wanvideo_infinitetalk.wanvideo.modules.attention import ATTENTION_MODES, MODE_BACKENDS
from wanvideo_infinitetalk.wanvideo.modules.backends import unavailable_reasons

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(600)]

CASES = int(os.environ.get("LAYER_CASES", "50"))
SHOWN = 5
DEVICE = "cuda"
WANTED = 3000
"""Cases over all modes and quantizations, at the default number."""

MODES = tuple(mode for mode in ATTENTION_MODES if mode != "comfy")
"""ComfyUI's own choice runs inside ComfyUI."""

_done: dict[str, tuple[int, float]] = {}


@pytest.mark.parametrize("mode", MODES)
def test_generated_layers(mode: str) -> None:
    device = torch.device(DEVICE, 0)
    missing = {n: unavailable_reasons(n, device) for n in MODE_BACKENDS[mode]}
    if all(missing.values()):
        pytest.skip("; ".join(f"{n}: {', '.join(reasons)}" for n, reasons in missing.items()))
    started = time.monotonic()
    ran: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    copies = 0
    for place, quantization in enumerate(QUANTIZATIONS):
        # Each quantization has cases of its own; all modes have the same.
        for number in range(place * CASES, (place + 1) * CASES):
            one = layer_case(number)
            kernel, wrong, copied = layer_faults(one, mode, quantization, DEVICE)
            ran[kernel or "not supported"] += 1
            copies += copied
            if wrong:
                failures.append(f"{quantization}: {'; '.join(wrong)}: {one}")
    seconds = time.monotonic() - started
    supported = sum(ran.values()) - ran["not supported"]
    _done[mode] = (supported, seconds)
    summary = (
        f"{mode} with {len(QUANTIZATIONS)} quantizations: {supported} layers, {dict(ran)}, {copies} copies, "
        f"{len(failures)} wrong, {seconds:.1f} s"
    )
    sys.stdout.write(f"\n{summary}\n")
    assert not failures, "\n".join([summary, *failures[:SHOWN]])


def test_they_are_enough() -> None:
    """Modes x quantizations x cases, on any machine that runs the Triton kernels."""
    if len(_done) < len(ATTENTION_MODES) - 3 or CASES < 50:
        pytest.skip(f"{len(_done)} modes were run, with {CASES} cases each")
    layers, seconds = (sum(parts) for parts in zip(*_done.values(), strict=True))
    sys.stdout.write(f"\n{len(_done)} modes x {len(QUANTIZATIONS)} quantizations: {layers} layers, {seconds:.1f} s\n")
    assert layers >= WANTED
