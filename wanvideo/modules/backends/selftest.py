"""The self-test of backends from binary packages: what is tested, in a child process.

A CUDA fault cannot be caught: it poisons the process, and some kernels abort it. So a backend that comes from a
package is called in a child first, on aligned and on awkward inputs, and compared with the float32 reference. One that
faults, hangs or gives wrong numbers is rejected from then on with the reason (`runtime.package_reasons`).
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace

import torch

from ...kernels.inputs import Inputs
from ...kernels.selftest import Comparison, Verdict, judge
from .contract import Backend, Contract
from .runtime import RUNTIME
from .sdpa import run_eager

__all__ = ["child", "like_activations"]

MIN_COSINE = 0.95
"""With the float32 reference on `like_activations`. NVFP4 gives 0.995 there, misread memory about 0."""


def like_activations(
    shape: tuple[int, int, int, int], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [B, L, H, D] float32 with the common offset per channel that a video model's have, K's the largest.

    It is what K smoothing is for (SageAttention, arXiv 2410.02367, section 4.2).
    """

    def part(spread: float, offset: float) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator) * spread
        return noise + torch.randn(1, 1, *shape[2:], generator=generator) * offset

    return part(2, 2), part(1, 8), part(1, 1)


def _cases(contract: Contract, device: torch.device) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Aligned and awkward q, k, v [B, L, H, D]; the awkward ones reach the kernel through the guard, as in real use."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if torch.bfloat16 in contract.dtypes else contract.dtypes[0]

    def moved(x: torch.Tensor) -> torch.Tensor:
        storage = torch.empty(x.numel() + 1, dtype=dtype, device=device)
        view = storage[1:].view(x.shape)
        view.copy_(x)
        return view

    for dim in contract.head_dim.values or (64, 128):
        if dim not in (64, 128):
            continue
        for length in (512, 1000, 257):
            parts = like_activations((1, length, 4, dim), generator)
            yield f"{length} tokens, head_dim {dim}", [x.to(device, dtype) for x in parts]
        q, k, v = like_activations((2, 384, 4, dim), generator)
        fused = torch.stack((q, k, v), dim=2).to(device, dtype)
        yield f"slices of fused q, k, v, head_dim {dim}", list(fused.unbind(2))
        yield f"an odd start, head_dim {dim}", [moved(x) for x in (q, k, v)]
        yield f"large values, head_dim {dim}", [x.to(device, dtype) for x in (q, k, v * 300)]


def _comparisons(backend: Backend, device: torch.device, cosines: list[float]) -> Iterator[Comparison]:
    for case, (q, k, v) in _cases(backend.contract, device):
        before = [x.clone() for x in (q, k, v)]
        out = RUNTIME.run(backend.name, Inputs.checked(q, k, v))
        exact_q, exact_k, exact_v = (x.float() for x in before)
        expected = run_eager(Inputs(exact_q, exact_k, exact_v))
        changed = not all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))
        cosines.append(float(torch.cosine_similarity(out.double().flatten(), expected.double().flatten(), dim=0)))
        yield case, (out, changed, cosines[-1]), None


def _fault(actual: tuple[torch.Tensor, bool, float], expected: None) -> str:
    out, changed, cosine = actual
    if not bool(torch.isfinite(out).all()):
        return "it gives non-finite numbers"
    if changed:
        return "it changes its inputs"
    return "" if cosine >= MIN_COSINE else f"it gives wrong numbers, cosine below {MIN_COSINE}"


def child(name: str, device: str, plugin: str = "") -> None:
    """Entry of the child process: judge one backend and write the verdict as the last line of the standard output."""
    if plugin:
        runpy.run_path(plugin)
    backend, where = RUNTIME.lookup(name), torch.device(device)
    missing = RUNTIME.unavailable_reasons(name, where)
    with torch.no_grad():
        cosines: list[float] = []
        result = Verdict(name, False, "; ".join(missing))
        if not missing:
            result = judge(name, _comparisons(backend, where, cosines), _fault)
            result = replace(result, cosine=min(cosines, default=None))
        if where.type == "cuda":
            torch.cuda.synchronize()
    sys.stdout.write("\n" + json.dumps(asdict(result)) + "\n")
    sys.stdout.flush()
