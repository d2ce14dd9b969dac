"""One forward of InfiniteTalk or HuMo: each way to compute it, side by side, and where the time of the fastest goes.

    python -m benchmarks.forward [--model humo-17b] [--compiled] [--rounds N] [--json F]

Random weights, the same for every variant before they are quantized; the error is that of the predicted velocity
against 16-bit SDPA. Run from the root of the repository.
"""

from __future__ import annotations

import functools
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile
from wanvideo_infinitetalk.wanvideo.linear.base import relative_l2
from wanvideo_infinitetalk.wanvideo.modules.model import HuMoConfig, WanConfig, WanModel
from wanvideo_infinitetalk.wanvideo.runtime.compilation import CompileSettings, compile_model

from .common import (
    PUBLIC_14B,
    PUBLIC_GRID,
    SMALL,
    SMALL_GRID,
    Report,
    choose_device,
    interleaved,
    parser,
    random_inputs,
    random_model,
    ratio,
)

SEED = 0
REFERENCE = ("sdpa", "disabled")
VARIANTS = (
    REFERENCE,
    ("sageattn_3_fp8", "disabled"),
    ("sageattn_3_fp8", "fp8_e4m3fn_fast"),
    ("sageattn_3_fp8", "fp8_e4m3fn_scaled_fast"),
)
"""Attention mode and quantization; the last one is profiled."""

GROUPS = (
    ("attention's quantization", r"key_value_statistics|finish_statistics|quantize_qkv"),
    ("row quantization", r"quantize_rows|scale_product"),
    ("norms, gates, RoPE, sums", r"layer_norm|rms_norm|norm_rope|gated_residual|add_rows"),
    ("self-attention", r"\battend"),
    ("other attention", r"fmha|flash|cudnn_generated|sdpa|softmax"),
    ("linear layers", r"nvjet|gemm|cutlass|gemv|xmma"),
    ("GELU", r"[Gg]elu"),
    ("other elementwise", r"elementwise|vectorized|CatArray|reduce_kernel|triton_"),
)
"""Name of a group -> kernels, by the first pattern that fits."""


def group_of(kernel: str) -> str:
    return next((name for name, pattern in GROUPS if re.search(pattern, kernel)), "else")


def profiled(call: Callable[[], object]) -> dict[str, float]:
    """Group -> milliseconds that its kernels took in one call."""
    call()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    spent: dict[str, float] = {}
    for event in found.key_averages():
        group = group_of(event.key)
        spent[group] = spent.get(group, 0.0) + event.self_device_time_total / 1e3
    return spent


def humo(config: WanConfig) -> WanConfig:
    """The same width and depth with HuMo's layers, which reads references in condition channels and no CLIP tokens."""
    return replace(config, model_type="t2v", audio=None, humo=HuMoConfig())


MODELS: dict[str, Callable[[WanConfig], WanConfig]] = {"infinitetalk": lambda config: config, "humo-17b": humo}


def models(report: Report, config: WanConfig, compiled: bool) -> dict[str, WanModel]:
    """Name of a variant -> its model. Variants of one quantization share the weights."""
    dtype = torch.float32 if report.device.type == "cpu" else torch.bfloat16
    made: dict[str, WanModel] = {}
    by_quantization: dict[str, WanModel] = {}
    for mode, quantization in VARIANTS:
        if quantization not in by_quantization:
            torch.manual_seed(SEED)
            by_quantization[quantization] = random_model(config, report.device, dtype, quantization)
        made[f"{mode}, {quantization}"] = by_quantization[quantization]
    if compiled:
        mode, quantization = VARIANTS[-1]
        torch.manual_seed(SEED)
        model = random_model(config, report.device, dtype, quantization)
        compile_model(model, CompileSettings())
        made[f"{mode}, {quantization}, compiled"] = model
    return made


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--model", choices=MODELS, default="infinitetalk", help="whose shapes (%(default)s)")
    options.add_argument("--compiled", action="store_true", help="the last variant once more, compiled (minutes)")
    options.add_argument("--rounds", type=int, default=3, help="timed calls of each variant (%(default)s)")
    arguments = options.parse_args()
    report = Report("forward", "One forward", choose_device(arguments.small), arguments.small)
    device = report.device
    with torch.inference_mode():
        config = MODELS[arguments.model](SMALL if arguments.small else PUBLIC_14B)
        variants = models(report, config, arguments.compiled)
        grid = SMALL_GRID if arguments.small else PUBLIC_GRID
        torch.manual_seed(SEED)
        given = random_inputs(config, grid, device)
        calls = {
            name: functools.partial(model, **given, attention_mode=name.split(",")[0])
            for name, model in variants.items()
        }
        baseline = ", ".join(REFERENCE)
        expected = calls[baseline]()
        errors, peaks = {}, {}
        for name, call in calls.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            errors[name] = relative_l2(call(), expected)
            if device.type == "cuda":
                own = sum(
                    t.numel() * t.element_size() for t in (*variants[name].parameters(), *variants[name].buffers())
                )
                peaks[name] = (torch.cuda.max_memory_allocated(device) - before + own) / 2**30
        times = interleaved(calls, arguments.rounds, device)
        rows: list[dict[str, str | int | float]] = [
            {
                "variant": name,
                "ms": statistics.median(times[name]),
                f"over {baseline}": ratio(times, name, baseline),
                "relative L2": errors[name],
                "peak with its weights, GiB": peaks.get(name, 0.0),
            }
            for name in calls
        ]
        tokens = grid[0] * grid[1] * grid[2]
        report.table(f"{arguments.model}: {config.num_layers} layers of {config.dim}, {tokens} tokens: medians", rows)
        if device.type == "cuda":
            name = ", ".join(VARIANTS[-1])
            spent = profiled(calls[name])
            total = sum(spent.values())
            report.table(
                f"Where the GPU's time of {name} goes",
                [
                    {"kernels": group, "ms": spent_in, "share": spent_in / total}
                    for group, spent_in in sorted(spent.items(), key=lambda item: -item[1])
                ],
            )
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
