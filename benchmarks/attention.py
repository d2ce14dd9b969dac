"""Attention kernels side by side at the shapes of the 14B model: time and error of each.

    python -m benchmarks.attention [--json F]

Times are medians of calls that took turns, quantization included: "ms" of one call on an idle GPU, "ms in a row" of one
among equal ones that keep it busy, as the layers of a model do. Errors are against float64 on a sample of rows.
Inputs are normal with tokens that differ, or besides have a few outlier channels as trained models do; never zeros, on
which a GPU is faster. A kernel that cannot run here is named with its reason. Run from the root of the repository.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import statistics
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from wanvideo_infinitetalk.wanvideo.kernels import sage_fp4, sage_fp8
from wanvideo_infinitetalk.wanvideo.kernels.emulation import int8_fp8_attention, nvfp4_attention
from wanvideo_infinitetalk.wanvideo.kernels.selftest import native_fp4_reasons

from .common import Report, begin, interleaved, parser, ratio, usable

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

LENGTHS = (32_760, 8_192, 2_048)
"""Tokens of self-attention: 81 frames of 480 x 832, and shorter ones."""

HEADS, HEAD_DIM = 40, 128
SHORT_KEYS = {
    "audio, 32 keys for each of 21 frames": (21, 1560, 32),
    "text, 512 keys": (1, 32_760, 512),
    "image, 257 keys": (1, 32_760, 257),
}
"""Batch, queries and keys of the cross attentions."""

ROWS_OF_CALLS, LASTING = 4, 250.0
"""Of the calls in a row: rounds, and milliseconds for each kernel in a round."""

SAMPLE_ROWS, SAMPLE_HEADS = 64, 4
ACCURACY_LENGTH = 4096
OUTLIERS = 4
SLOWEST = 1 / 1.3
"""What the Triton 8-bit call may take at the first length, relative to cuDNN's bf16."""

NO_WORSE = 1.05
"""Relative L2 of a Triton kernel over that of the same numerics in plain torch, or of its own loop by exp2."""

FP8_ERROR = 0.043
"""Relative L2 of the 8-bit kernel on normal inputs, where its weights are computed in integers on Hopper."""

NORMAL, TOPICAL, FP4_COSINE = "normal", "topical", 0.995
SHARP = (3, 8, 16, 24)
"""Factors on q: attention to ever fewer keys."""

CUDNN, TRITON_FP8, TRITON_FP4 = "SDPA cuDNN", "Triton FP8", "Triton NVFP4"
BY_EXP2 = "Triton FP8, always by exp2"
PLAIN: dict[str, Attend] = {"FP8 in plain torch": int8_fp8_attention, "NVFP4 in plain torch": nvfp4_attention}
TWINS = dict(zip((TRITON_FP8, TRITON_FP4), PLAIN, strict=True))
"""Kernel -> the same numerics in plain torch."""


def _sdpa(backend: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _portable_fp8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    operands = sage_fp8.quantize(q, k, v, q.shape[-1] ** -0.5)
    out = torch.empty_like(q)
    sage_fp8.attend_portable(operands, out)
    return out


def _by_exp2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The Hopper kernel's loop for scores without a bound."""
    operands = sage_fp8.quantize(q, k, v, q.shape[-1] ** -0.5)
    operands.k_norm.fill_(float("inf"))
    out = torch.empty_like(q)
    sage_fp8.attend_hopper(operands, out)
    return out


def _nvfp4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sage_fp4.sage_fp4_attention(q, k, v, native=not native_fp4_reasons(q.device))


def _kitchen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In no mode: with scores around 1e9 it gives NaN."""
    kitchen = importlib.import_module("comfy_kitchen")
    out: Tensor = kitchen.int8_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    return out.transpose(1, 2)


def _sageattention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # Version 1 changes K: it gets one of its own.
    out: Tensor = importlib.import_module("sageattention").sageattn(q, k.clone(), v, tensor_layout="NHD")
    return out


def contenders(device: torch.device) -> dict[str, Attend]:
    """Every kernel that might run; on the CPU the reference numerics."""
    if device.type == "cpu":
        return {"SDPA": functools.partial(_sdpa, None), **PLAIN}
    return {
        CUDNN: functools.partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
        "SDPA flash": functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION),
        "SDPA default": functools.partial(_sdpa, None),
        TRITON_FP8: sage_fp8.sage_fp8_attention,
        **({BY_EXP2: _by_exp2} if sage_fp8.runs_on_hopper(device, HEAD_DIM) else {}),
        "Triton FP8, without Gluon": _portable_fp8,
        TRITON_FP4: _nvfp4,
        "comfy-kitchen int8": _kitchen,
        "sageattention": _sageattention,
    }


def inputs(
    batch: int, queries: int, keys: int, heads: int, device: torch.device, outliers: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, L, H, D] bf16; with `outliers` some channels have large means and spreads."""
    q, k, v = (torch.randn(batch, length, heads, HEAD_DIM, device=device) for length in (queries, keys, keys))
    if outliers:
        channels = torch.randperm(HEAD_DIM, device=device)[:OUTLIERS]
        k[..., channels] += 10 * torch.randn(batch, 1, heads, OUTLIERS, device=device)
        q[..., channels] *= 4
        v[..., channels] = 10 * v[..., channels] + 3
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def topical(length: int, heads: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, L, H, D] bf16 in the manner of trained models, of which the papers give cosines.

    Tokens belong to topics and attend to their own. White noise is harder: nothing in it is redundant.
    """
    directions = F.normalize(torch.randn(length // 64, heads, HEAD_DIM, device=device), dim=-1)
    topic = torch.randint(length // 64, (length,), device=device)
    of_topic = directions[topic][None] * HEAD_DIM**0.5
    q, k = (1.1 * of_topic + 0.5 * torch.randn_like(of_topic) for _ in range(2))
    v = torch.randn(length // 64, heads, HEAD_DIM, device=device)[topic][None] + 0.2 * torch.randn_like(of_topic)
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def kinds_of_input(
    length: int, heads: int, device: torch.device
) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
    """Name of a kind -> q, k, v [1, L, H, D] bf16."""
    q, k, v = inputs(1, length, length, heads, device)
    yield NORMAL, (q, k, v)
    for factor in SHARP:
        yield f"q times {factor}", (q * factor, k, v)
    yield "V with mean 1", (q, k, v + 1)
    yield "outlier channels", inputs(1, length, length, heads, device, outliers=True)
    yield TOPICAL, topical(length, heads, device)


def errors(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[float, float, float]:
    """Cosine, relative L1 and relative L2 of `out` against float64, on a sample of rows and heads."""
    rows = torch.linspace(0, q.shape[1] - 1, min(SAMPLE_ROWS, q.shape[1]), device=q.device).long()
    exact_q, exact_k, exact_v = (x[:1, :, :SAMPLE_HEADS].double().transpose(1, 2) for x in (q[:, rows], k, v))
    scores = exact_q @ exact_k.transpose(-1, -2) * HEAD_DIM**-0.5
    wanted = (scores.softmax(-1) @ exact_v).transpose(1, 2)
    got = out[:1, rows, :SAMPLE_HEADS].double()
    cosine = F.cosine_similarity(got.flatten(), wanted.flatten(), dim=0).item()
    difference = got - wanted
    return (
        cosine,
        (difference.abs().sum() / wanted.abs().sum()).item(),
        (difference.norm() / wanted.norm()).item(),
    )


def compare(report: Report, title: str, shape: tuple[int, int, int], heads: int, rounds: int) -> tuple[float, float]:
    """One table; returns what the Triton 8-bit call takes over cuDNN's, alone and in a row."""
    batch, queries, keys = shape
    q, k, v = inputs(batch, queries, keys, heads, report.device)
    attends = usable(contenders(report.device), (q, k, v))
    times = interleaved({n: functools.partial(a, q, k, v) for n, a in attends.items()}, rounds, report.device, warmup=2)
    in_a_row = interleaved(
        {n: functools.partial(a, q, k, v) for n, a in attends.items()},
        ROWS_OF_CALLS,
        report.device,
        last=report.lasting(LASTING),
    )
    # Where cuDNN has no kernel, the first that runs is what the others are compared with.
    baseline = CUDNN if CUDNN in attends else next(iter(attends))
    rows: list[dict[str, str | int | float]] = []
    for name, attend in attends.items():
        cosine, l1, l2 = errors(attend(q, k, v), q, k, v)
        ms = statistics.median(times[name])
        rows.append(
            {
                "kernel": name,
                "ms": ms,
                "TFLOP/s": 4e-9 * batch * queries * keys * heads * HEAD_DIM / ms,
                f"speed over {baseline}": 1 / ratio(times, name, baseline),
                "ms in a row": statistics.median(in_a_row[name]),
                "speed in a row": 1 / ratio(in_a_row, name, baseline),
                "cosine": round(cosine, 6),
                "relative L1": l1,
                "relative L2": l2,
            }
        )
    report.table(f"{title}: [{batch}, {queries}, {heads}, {HEAD_DIM}], medians of {rounds} rounds", rows)
    if TRITON_FP8 not in attends:
        return float("inf"), float("inf")
    return ratio(times, TRITON_FP8, baseline), ratio(in_a_row, TRITON_FP8, baseline)


def accuracy(report: Report, length: int, heads: int) -> None:
    """The Triton kernels and the same numerics in plain torch, which they may not exceed by more than `NO_WORSE`."""
    rows: list[dict[str, str | int | float]] = []
    kernels = {name: attend for name, attend in contenders(report.device).items() if name in (*TWINS, BY_EXP2)}
    for kind, (q, k, v) in kinds_of_input(length, heads, report.device):
        found = {name: errors(attend(q, k, v), q, k, v) for name, attend in {**kernels, **PLAIN}.items()}
        rows += [
            {"inputs": kind, "kernel": name, "cosine": round(cosine, 6), "relative L1": l1, "relative L2": l2}
            for name, (cosine, l1, l2) in found.items()
        ]
        for name in kernels:
            # Weights in integers have an error of their own: their twin is the loop by exp2, whose twin is plain torch.
            twin = BY_EXP2 if name == TRITON_FP8 and BY_EXP2 in kernels else TWINS.get(name, TWINS[TRITON_FP8])
            if twin == BY_EXP2 and kind == NORMAL:
                report.goal(f"relative L2 of {name}, {kind}", found[name][2], FP8_ERROR)
            else:
                report.goal(f"relative L2 of {name} over {twin}, {kind}", found[name][2] / found[twin][2], NO_WORSE)
        if kind == TOPICAL:
            for name in found:
                if "NVFP4" in name:
                    report.goal(f"cosine that {name} lacks on {TOPICAL} inputs", 1 - found[name][0], 1 - FP4_COSINE)
    report.table(f"Accuracy: [1, {length}, {heads}, {HEAD_DIM}], {SAMPLE_ROWS} rows against float64", rows)


def main() -> int:
    report, arguments = begin(parser(__doc__, rounds=7), "attention", "Attention kernels")
    small = report.small
    torch.manual_seed(0)
    heads = 2 if small else HEADS
    with torch.inference_mode():
        for i, length in enumerate((96, 64) if small else LENGTHS):
            taken = compare(report, "Self-attention", (1, length, length), heads, arguments.rounds)
            if i == 0 and report.device.type == "cuda":
                for how, found in zip(("", ", in a row"), taken, strict=True):
                    report.goal(f"Triton FP8 call over {CUDNN}, {length} tokens{how}", found, SLOWEST)
        for title, shape in SHORT_KEYS.items():
            compare(report, title, (2, 40, shape[2]) if small else shape, heads, arguments.rounds)
        accuracy(report, 200 if small else ACCURACY_LENGTH, heads if small else 8)
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
