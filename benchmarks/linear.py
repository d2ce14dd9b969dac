"""Quantized linears at the shapes of the 14B model: time and error of each quantization against bf16.

    python -m benchmarks.linear [--json F]

Errors are relative L2 against the exact product with the bf16 weights, once on normal activations and once with a few
channels 100 times larger, as trained models have them. "static scale 1" is the usual fp8 linear of other programs: the
input clamped and cast, without a scale. Run from the root of the repository.
"""

from __future__ import annotations

import copy
import functools
import importlib
import statistics
import sys
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from wanvideo_infinitetalk.fp8_optimization import QUANTIZATIONS, Quantization, fp8_matmul_reasons, quantize_linear
from wanvideo_infinitetalk.wanvideo.kernels import linear as kernels
from wanvideo_infinitetalk.wanvideo.kernels import reference
from wanvideo_infinitetalk.wanvideo.kernels.selftest import eager_reasons
from wanvideo_infinitetalk.wanvideo.linear.base import relative_l2

from .common import Report, begin, interleaved, parser, ratio

SHAPES = ((5120, 5120), (5120, 13824), (13824, 5120))
"""Input and output features of the attention and feed-forward layers of 14B."""

TOKENS = 32_760
MEASURED_ROWS = 4096
"""Rows whose error is measured; float32 products of all would take longer than everything else."""

ROWS_OF_CALLS, LASTING = 4, 50.0
"""Of the calls in a row: rounds, and milliseconds for each layer in a round."""

SHORT = 10.0
"""The same for what is no matmul."""

OUTLIERS, OUTLIER_SIZE = 8, 100.0
PLAIN = "bf16"
STATIC = "fp8, static scale 1"

Linear = Callable[[Tensor], Tensor]


def activations(rows: int, features: int, device: torch.device, outliers: bool) -> Tensor:
    """[rows, features] bf16, normal; with `outliers` a few channels are much larger."""
    x = torch.randn(rows, features, device=device)
    if outliers:
        x[:, torch.randperm(features, device=device)[:OUTLIERS]] *= OUTLIER_SIZE
    return x.bfloat16()


def linears(in_features: int, out_features: int, device: torch.device) -> dict[str, Linear]:
    """The same bf16 layer in every form."""
    plain = nn.Linear(in_features, out_features, device=device, dtype=torch.bfloat16).requires_grad_(False)
    forms: dict[str, Linear] = {PLAIN: plain}
    for name in QUANTIZATIONS:
        if name != "disabled":
            linear = copy.deepcopy(plain)
            quantize_linear(linear, Quantization.parse(name), torch.bfloat16)
            forms[name] = linear
    if device.type == "cuda" and not fp8_matmul_reasons(plain.weight.to(torch.float8_e4m3fn), torch.bfloat16, device):
        forms[STATIC] = functools.partial(_static_linear, plain.weight.to(torch.float8_e4m3fn), plain.bias)
    return forms


def _static_linear(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    one = torch.ones((), device=x.device)
    largest = torch.finfo(torch.float8_e4m3fn).max
    values = x.clamp(-largest, largest).to(torch.float8_e4m3fn)
    return torch._scaled_mm(values, weight.t(), scale_a=one, scale_b=one, bias=bias, out_dtype=torch.bfloat16)


def errors(forms: Mapping[str, Linear], plain: nn.Linear, x: Tensor) -> dict[str, float]:
    """name -> relative L2 against the float32 product of the bf16 operands."""
    expected = F.linear(x.float(), plain.weight.float(), plain.bias.float())
    return {name: relative_l2(form(x), expected) for name, form in forms.items()}


def compare(report: Report, in_features: int, out_features: int, rows: int, rounds: int) -> None:
    forms = linears(in_features, out_features, report.device)
    plain = forms[PLAIN]
    assert isinstance(plain, nn.Linear)
    few = min(rows, MEASURED_ROWS)
    normal, hard = (errors(forms, plain, activations(few, in_features, report.device, o)) for o in (False, True))
    x = activations(rows, in_features, report.device, outliers=False)
    calls = {n: functools.partial(form, x) for n, form in forms.items()}
    times = interleaved(calls, rounds, report.device, warmup=3)
    in_a_row = interleaved(calls, ROWS_OF_CALLS, report.device, last=report.lasting(LASTING))
    report.table(
        f"{in_features} -> {out_features}, {rows} rows, bf16 in and out: medians of {rounds} rounds",
        [
            {
                "linear": name,
                "ms": statistics.median(times[name]),
                "ratio to bf16": ratio(times, name, PLAIN),
                "in a row": ratio(in_a_row, name, PLAIN),
                "TFLOP/s": 2e-9 * rows * in_features * out_features / statistics.median(times[name]),
                "relative L2": normal[name],
                "with outlier channels": hard[name],
            }
            for name in forms
        ],
    )


def around(report: Report, features: int, rows: int, rounds: int) -> None:
    """What lies around the matmul of a fast layer: quantizing its input, scaling a product that has no scales yet."""
    x = activations(rows, features, report.device, outliers=False)
    product, row_scale, column_scale = (
        torch.rand(shape, device=report.device) for shape in ((rows, features), (rows, 1), (1, features))
    )
    scaling = (product, row_scale, column_scale, torch.randn_like(x[0]), torch.bfloat16)
    quantizing: dict[str, Callable[..., object]] = {"eager": reference.quantize_rows}
    scales: dict[str, Callable[..., object]] = {"eager": reference.scale_product}
    if not eager_reasons(kernels.QUANTIZE_ROWS, (x,)):
        quantizing |= {"kernel": kernels.quantize_rows, "comfy-kitchen, one scale per tensor": _kitchen_quantize}
        scales["kernel"] = kernels.scale_product
    # The bytes are those of bf16 to e4m3, and of float32 to bf16.
    for what, forms, call, moved in (
        ("input to e4m3", quantizing, (x,), 3 * x.numel()),
        ("scales to product", scales, scaling, 6 * x.numel()),
    ):
        if report.device.type == "cuda":
            forms["eager, compiled"] = torch.compile(forms["eager"], dynamic=False)
        calls = {name: functools.partial(form, *call) for name, form in forms.items()}
        times = interleaved(calls, rounds, report.device, warmup=3, last=report.lasting(SHORT))
        report.table(
            f"{what}: [{rows}, {features}], medians of {rounds} rounds of calls in a row",
            [
                {
                    "form": name,
                    "ms": statistics.median(times[name]),
                    "times eager": 1 / ratio(times, name, "eager"),
                    "GB/s": moved / statistics.median(times[name]) / 1e6,
                }
                for name in forms
            ],
        )
        if "kernel" in forms:
            report.goal(f"time of the kernel over eager, {what}", ratio(times, "kernel", "eager"), 1.0)


def _kitchen_quantize(x: Tensor) -> object:
    kitchen = importlib.import_module("comfy_kitchen")
    return kitchen.quantize_per_tensor_fp8(x, x.abs().amax().float() / torch.finfo(torch.float8_e4m3fn).max)


def main() -> int:
    report, arguments = begin(parser(__doc__, rounds=20), "linear", "Linear layers")
    small = report.small
    torch.manual_seed(0)
    with torch.inference_mode():
        for in_features, out_features in ((64, 64), (64, 128), (128, 64)) if small else SHAPES:
            compare(report, in_features, out_features, 80 if small else TOKENS, arguments.rounds)
        around(report, *((64, 80) if small else (SHAPES[0][0], TOKENS)), arguments.rounds)
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
