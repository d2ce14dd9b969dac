"""Linear layers with 8-bit weights, and the choice of how the transformer blocks store theirs.

A weight is stored as float8 (e4m3fn or e5m2), optionally with a scale: weight = stored * scale_weight. It runs in one
of two ways:

* weight only: the weight is unpacked to the base dtype, then `F.linear`. Half the memory, the speed of 16 bits;
* fast: the activations are quantized per row and both go to the fp8 tensor cores (`torch._scaled_mm`).

The contract of `torch._scaled_mm` is data (`FP8_MATMUL`, read by `fp8_matmul_reasons`). A call outside it runs the
first way instead of ending in an error, and operands at odd addresses are repaired by one copy. On the CPU the fast way
is computed with the very same numbers, so that what the GPU will give can be tested anywhere. Nothing here writes to
its inputs.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .wanvideo.errors import InputError, nearest, plain, some
from .wanvideo.kernels import contract, reference
from .wanvideo.kernels import linear as kernels
from .wanvideo.kernels.contract import Contract, Described, Device, Operand, Size
from .wanvideo.kernels.layout import aligned_contiguous
from .wanvideo.kernels.linear import Activations, QuantizedRows
from .wanvideo.kernels.opaque import opaque_in_graphs
from .wanvideo.kernels.selftest import device_reasons, eager_reasons
from .wanvideo.linear.base import QuantizedLinear, linear_in, store_buffers, store_weight, take_over
from .wanvideo.linear.nvfp4 import NVFP4Linear

__all__ = [
    "QUANTIZATIONS",
    "Fp8Linear",
    "Quantization",
    "convert_fp8_linear",
    "fp8_linear_forward",
    "fp8_matmul_reasons",
    "how_it_runs",
    "how_linears_run",
    "listed",
    "quantize_linear",
    "quantize_linears",
    "quantize_rows_fp8",
    "quantize_weight_fp8",
    "reject_second_quantization",
    "stored_as",
    "stored_format",
    "stored_summary",
    "summary",
]

logger = logging.getLogger(__name__)

FP8_DTYPES = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}

QUANTIZATIONS: tuple[str, ...] = (
    "disabled",
    "fp8_e4m3fn",
    "fp8_e4m3fn_fast",
    "fp8_e4m3fn_scaled",
    "fp8_e4m3fn_scaled_fast",
    "fp8_e5m2",
    "fp8_e5m2_fast",
    "fp8_e5m2_scaled",
    "fp8_e5m2_scaled_fast",
    "fp4_scaled",
)

WEIGHT_ERROR_BOUNDS: dict[str, float] = {
    # Largest relative L2 error of a stored weight with normally distributed entries. Half the spacing of 3 (2) mantissa
    # bits gives 0.026 (0.053); without a scale, entries below 2^-6 fall into e4m3's subnormals, so that form is bounded
    # for entries of 1/sqrt(2000) and up only.
    "fp8_e4m3fn": 0.04,
    "fp8_e4m3fn_scaled": 0.03,
    "fp8_e5m2": 0.06,
    "fp8_e5m2_scaled": 0.06,
    "fp4_scaled": 0.11,
}

FAST_MATMUL_ERROR = 0.03
"""What quantizing the activations per row may add, in quadrature, to the relative L2 error of the output."""

QUANTIZED_PREFIX = "blocks."
"""Only the linears of the transformer blocks are stored low; embeddings, norms, modulation and head are a few per cent
of the bytes and most of the sensitivity."""

FP8_MATMUL = Contract(
    "torch._scaled_mm",
    Device(types=("cpu", "cuda"), min_capability=(8, 9), purpose="for fp8 tensor cores"),
    (
        Operand("weight", "N K", (torch.float8_e4m3fn, torch.float8_e5m2), "aligned_contiguous"),
        Operand("scale_weight", "1|N", optional=True),
    ),
    {
        "N": Size("there are {} output features", multiple_of=16, at_least=1),
        "K": Size("there are {} input features", multiple_of=16, at_least=1),
    },
    {"base_dtype": (torch.float32, torch.bfloat16, torch.float16)},
)
"""The fp8 matmul of a linear layer, by its weight; one scale per tensor or per output row. On the CPU its numbers are
computed (`_scaled_matmul`). What the guards repair is no reason against a call."""

ROWWISE_MATMUL = Contract(
    "torch._scaled_mm with a scale per row",
    Device(capabilities=((9, 0), (10, 0)), not_on=("win32",)),
    (Operand("weight", "N K", (torch.float8_e4m3fn,), "aligned_contiguous"),),
    choices={"base_dtype": (torch.bfloat16,)},
)
"""Where one kernel applies a scale per row of both operands and the bias itself. Elsewhere the scales are applied to
its float32 result."""


@dataclass(frozen=True)
class Quantization:
    """What a quantization's name says: `format` ("fp8_e4m3fn", "fp8_e5m2" or "fp4"), with a `scale`, run `fast`."""

    name: str
    format: str
    scaled: bool
    fast: bool

    @staticmethod
    def parse(name: str, choices: Sequence[str] = QUANTIZATIONS, what: str = "quantization") -> Quantization:
        """In any case and with any separators; raises InputError, about `what`, for a name that is not in `choices`."""
        known = {plain(known): known for known in choices}.get(plain(str(name)))
        if known is None:
            listed = f"{', '.join(choices)}{nearest(str(name), choices)}"
            raise InputError(f"{what} '{name}' is unknown; choose one of {listed}.")
        name = known
        fast = name.endswith("_fast")
        stem = name.removesuffix("_fast")
        return Quantization(name, stem.removesuffix("_scaled"), stem.endswith("_scaled"), fast)


# ---------------------------------------------------------------------------------------------------- quantizing


@opaque_in_graphs("rows")
def quantize_rows_fp8(x: Tensor) -> QuantizedRows:
    """x [M, K] float -> (values e4m3fn [M, K], scale float32 [M, 1]), x ~ values * scale, largest value 448 per row.

    A row with a NaN or an infinity gets a non-finite scale, so that the product shows it. One pass over memory on a
    GPU, by a Triton kernel.
    """
    form = reference if eager_reasons(kernels.QUANTIZE_ROWS, (x,)) else kernels
    rows: QuantizedRows = form.quantize_rows(x)
    return rows


def quantize_weight_fp8(weight: Tensor, dtype: torch.dtype, scaled: bool) -> tuple[Tensor, Tensor | None]:
    """weight [N, K] -> (stored in `dtype`, scale_weight float32 [] or None): the public form, one scale per tensor.

    Unscaled weights beyond the finite range are clamped to it.
    """
    largest_value = torch.finfo(dtype).max
    values = weight.detach().float()
    scale = None
    if scaled:
        largest = torch.linalg.vector_norm(values, ord=float("inf"))
        # CUDA multiplies by the reciprocal of a number, but divides by a tensor: so both devices store the same weight.
        scale = (largest / torch.full_like(largest, largest_value)).clamp_min(torch.finfo(torch.float32).tiny)
        values = values / scale
    return values.clamp(-largest_value, largest_value).to(dtype), scale


# ---------------------------------------------------------------------------------------- the matmul and its contract


def fp8_matmul_reasons(
    weight: Tensor, base_dtype: torch.dtype, device: torch.device, scale_weight: Tensor | None = None
) -> tuple[str, ...]:
    """Every reason why `torch._scaled_mm` cannot compute a linear layer with this weight [N, K]; empty when it can.

    Args:
        base_dtype: dtype of the output.
        device: of the input.
        scale_weight: one number, or one per output row; None for 1.
    """
    scales = None if scale_weight is None else scale_weight.numel()
    shape = tuple(int(n) for n in weight.shape)
    found: tuple[str, ...] = _matmul_reasons(False, weight.dtype, shape, base_dtype, device, scales)
    return found


# A compiled graph holds the answer, which neither torch 2.8 could trace nor a later call can change.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _matmul_reasons(
    rowwise: bool,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    base_dtype: torch.dtype,
    device: torch.device,
    scales: int | None = None,
) -> tuple[str, ...]:
    needs = ROWWISE_MATMUL if rowwise else FP8_MATMUL
    operands: list[Described | None] = [Described(dtype, shape, device)]
    if not rowwise:
        operands.append(None if scales is None else Described(torch.float32, (scales,), device))
    found = (*contract.reasons(needs, operands, base_dtype=base_dtype), *device_reasons(needs.device, device))
    return tuple(dict.fromkeys(found))


def _scaled_matmul(
    values: Tensor, scale: Tensor, weight: Tensor, scale_weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(values * scale) (weight * scale_weight)^T + bias -> [M, N] in `dtype`, accumulated in float32, rounded once.

    Args:
        values: e4m3fn [M, K] with its scale float32 [M, 1].
        weight: float8 [N, K] with its scale float32 [], [1], [N] or [N, 1], or None for 1.
        bias: [N] or None.
    """
    columns = None if scale_weight is None else scale_weight.float().reshape(1, -1)  # [1, 1] or [1, N]
    if not values.is_cuda:
        return _apply_scales(values.float() @ weight.float().t(), scale, columns, bias, dtype)
    values, weight = aligned_contiguous(values), aligned_contiguous(weight)
    if not _matmul_reasons(True, weight.dtype, tuple(int(n) for n in weight.shape), dtype, weight.device):
        return _rowwise_matmul(values, scale, weight, columns, bias, dtype)
    return _apply_scales(_tensorwise_matmul(values, weight), scale, columns, bias, dtype)


def _apply_scales(
    product: Tensor, rows: Tensor, columns: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """product [M, N] float32 times rows [M, 1] and columns [1, 1] or [1, N], plus bias [N], rounded once to `dtype`."""
    bias = None if bias is None else bias.detach().to(dtype)
    if columns is None:
        columns = torch.ones((1, 1), device=product.device)
    form = reference if eager_reasons(kernels.SCALE_PRODUCT, (product, rows, columns, bias), dtype=dtype) else kernels
    scaled: Tensor = form.scale_product(product, rows, columns, bias, dtype)
    return scaled


def _tensorwise_matmul(values: Tensor, weight: Tensor) -> Tensor:
    """values [M, K] and weight [N, K], both float8 and aligned -> their product [M, N] in float32."""
    one = torch.ones((), device=values.device)
    return torch._scaled_mm(values, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=True)


def _rowwise_matmul(
    values: Tensor, scale: Tensor, weight: Tensor, columns: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """As `_scaled_matmul`, by one kernel; the operands are aligned, columns [1, 1], [1, N] or None."""
    out_features = weight.shape[0]
    bias = None if bias is None else aligned_contiguous(bias.detach().to(dtype))
    if columns is None:
        columns = torch.ones((1, out_features), device=weight.device)
    elif columns.shape[1] != out_features:
        columns = columns.repeat(1, out_features)  # the kernel reads N scales, not one with stride 0
    return torch._scaled_mm(
        values, weight.t(), scale_a=scale, scale_b=columns, bias=bias, out_dtype=dtype, use_fast_accum=True
    )


# ------------------------------------------------------------------------------------------------------- the layer


def _dequantized_weight(weight: Tensor, scale_weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """weight [N, K] stored, scale [] / [1] / [N] / [N, 1] / None -> their product in `dtype`, rounded once."""
    weight = weight.detach()
    if scale_weight is None:
        return weight.to(dtype)
    return (weight.float() * scale_weight.detach().float().reshape(-1, 1)).to(dtype)


def fp8_linear_forward(cls: nn.Linear, base_dtype: torch.dtype, input: Tensor) -> Tensor:
    """One linear layer with an fp8 weight, through the fp8 matmul where its contract holds.

    Args:
        cls: the layer: `weight` [N, K], `bias` [N] or None, and optionally `scale_weight` (float32: one number, or one
            per output row), weight = stored * scale_weight. A weight in another dtype runs as an ordinary layer.
        base_dtype: dtype of the output: float32, bfloat16 or float16.
        input: [..., K] of any rank from 1, any float dtype, strides and storage offset; not written to.

    Returns:
        [..., N] in `base_dtype`, contiguous. A row of `input` with a NaN or an infinity gives a non-finite row.
    """
    x = aligned_contiguous(input)  # before the reshape: the quantizer reads 16 bytes at a time
    scale_weight = getattr(cls, "scale_weight", None)
    if fp8_matmul_reasons(cls.weight, base_dtype, x.device, scale_weight) or x.numel() == 0:
        return linear_in(base_dtype, x, _dequantized_weight(cls.weight, scale_weight, base_dtype), cls.bias)
    leading = [int(n) for n in x.shape[:-1]]
    values, scale = quantize_rows_fp8(x.reshape(-1, int(x.shape[-1])))
    return _matmul_of(QuantizedRows(values.reshape(x.shape), scale.reshape(*leading, 1)), cls, base_dtype)


def _matmul_of(rows: QuantizedRows, linear: nn.Linear, base_dtype: torch.dtype) -> Tensor:
    """Activations [..., K] times the fp8 weight [N, K] of a layer, plus its bias -> [..., N]."""
    out_features, in_features = (int(n) for n in linear.weight.shape)
    values, scale = rows.values.reshape(-1, in_features), rows.scale.reshape(-1, 1)
    scale_weight = getattr(linear, "scale_weight", None)
    out = _scaled_matmul(values, scale, linear.weight.detach(), scale_weight, linear.bias, base_dtype)
    return aligned_contiguous(out.reshape(*rows.shape[:-1], out_features))


class Fp8Linear(QuantizedLinear):
    """A linear layer with an fp8 weight; keys `weight`, `bias` and, where the weight is scaled, `scale_weight`.

    Attributes:
        fast: whether the activations are quantized too and the fp8 matmul is used.
        scale_weight: float32 scalar (or one per output row), or None.
    """

    fast: bool
    fast_way = "the fp8 matmul"
    scale_weight: Tensor | None

    def unpacked_reasons(self, device: torch.device) -> Sequence[str]:
        if not self.fast or self.weight.dtype not in FP8_DTYPES.values():
            return ()
        found = fp8_matmul_reasons(self.weight, self.base_dtype, device, self.scale_weight)
        return (*super().unpacked_reasons(device), *found)

    @staticmethod
    def quantize(linear: nn.Linear, dtype: torch.dtype, base_dtype: torch.dtype, *, scaled: bool, fast: bool) -> None:
        """Quantize the 16- or 32-bit weight of `linear` to the float8 `dtype`, in place."""
        weight, scale = quantize_weight_fp8(linear.weight, dtype, scaled)
        Fp8Linear.adopt(linear, base_dtype, scale, fast=fast)
        store_weight(linear, weight)

    @staticmethod
    def adopt(linear: nn.Linear, base_dtype: torch.dtype, scale_weight: Tensor | None, *, fast: bool) -> None:
        """Let `linear` run as a layer whose weight is stored as fp8, in place. Its weight may still be to come."""
        take_over(linear, Fp8Linear, base_dtype, fast=fast)
        store_buffers(linear, scale_weight=None if scale_weight is None else scale_weight.detach().float())

    def reads_rows(self, device: torch.device) -> bool:
        fast = self.fast and not self.full_precision
        return fast and not fp8_matmul_reasons(self.weight, self.base_dtype, device, self.scale_weight)

    def dequantized_weight(self) -> Tensor:
        return _dequantized_weight(self.weight, self.scale_weight, self.base_dtype)

    def forward(self, input: Activations) -> Tensor:
        """input [..., in_features] -> [..., out_features] in `base_dtype`, contiguous."""
        if isinstance(input, QuantizedRows):
            return _matmul_of(input, self, self.base_dtype)
        if self.fast and not self.full_precision:
            return fp8_linear_forward(self, self.base_dtype, input)
        return super().forward(input)


# ------------------------------------------------------------------------------------------------- whole models


def convert_fp8_linear(
    module: nn.Module,
    base_dtype: torch.dtype,
    params_to_keep: Collection[str] = frozenset(),
    scale_weight_keys: Mapping[str, Tensor] | None = None,
) -> None:
    """Let the linears in `module` run through the fp8 matmul, in place.

    Weights are not changed: those stored as fp8 take the fast way, others run in the base dtype, whether loaded before
    or after this call.

    Args:
        module: a model, or one nn.Linear.
        base_dtype: dtype of the outputs.
        params_to_keep: words; a linear with one of them in its name keeps running in the base dtype, and an fp8 weight
            of it is unpacked to the base dtype, its scale applied.
        scale_weight_keys: "<name of the linear>.scale_weight" -> its scale.

    Raises:
        InputError: a scale is given for something that is no linear layer of `module`.
    """
    scales = dict(scale_weight_keys or {})
    for name, linear in _linears(module):
        scale = scales.pop(f"{name}.scale_weight" if name else "scale_weight", None)
        scale = getattr(linear, "scale_weight", None) if scale is None else scale
        if not any(word in name for word in params_to_keep):
            Fp8Linear.adopt(linear, base_dtype, scale, fast=True)
        elif linear.weight.dtype in FP8_DTYPES.values():
            store_weight(linear, _dequantized_weight(linear.weight, scale, base_dtype))
    if scales:
        raise InputError(f"there is no linear layer for {some(scales)}; the scales belong to another model.")


def quantize_linears(model: nn.Module, quantization: str, base_dtype: torch.dtype) -> None:
    """Store the linears of the transformer blocks (`blocks.*`) as `quantization` says, in place, layer by layer.

    Weights that came quantized from the file are kept as they are (with their scales, `<linear>.scale_weight`), whether
    the name asks for scales or not; "disabled" keeps them too, weight only. `_fast` selects the fp8 matmul for
    both kinds. Everything else in the model stays as it is.

    Args:
        model: its linears hold 16- or 32-bit or already quantized weights.
        quantization: one of QUANTIZATIONS.
        base_dtype: dtype that the linears compute in.

    Raises:
        InputError: an unknown name, or the file's weights are of another format than the one asked for.
    """
    wanted = Quantization.parse(quantization)
    linears = [(name, linear) for name, linear in _linears(model) if name.startswith(QUANTIZED_PREFIX)]
    reject_second_quantization([stored_format(linear) for _, linear in linears], wanted)
    for _, linear in linears:
        quantize_linear(linear, wanted, base_dtype)
    logger.info("Linear layers: %s", stored_summary(model))


def quantize_linear(linear: nn.Linear, wanted: Quantization, base_dtype: torch.dtype) -> None:
    """What `quantize_linears` does to one layer, where its weight lies: a GPU does it some twenty times as fast."""
    form = stored_format(linear)
    if form in FP8_DTYPES:
        Fp8Linear.adopt(linear, base_dtype, getattr(linear, "scale_weight", None), fast=wanted.fast)
    elif form is None and wanted.format in FP8_DTYPES:
        dtype = FP8_DTYPES[wanted.format]
        Fp8Linear.quantize(linear, dtype, base_dtype, scaled=wanted.scaled, fast=wanted.fast)
    elif form is None and wanted.format == "fp4":
        NVFP4Linear.quantize(linear, base_dtype)


def reject_second_quantization(forms: list[str | None], wanted: Quantization) -> None:
    """Most linears must be able to take the format asked for. (An adapter file may differ from the base file.)

    Args:
        forms: what `stored_format` says of each linear of the blocks.

    Raises InputError where most are stored in another format.
    """
    if wanted.format == "disabled" or wanted.format in forms:
        return
    stored = sorted({form for form in forms if form is not None})
    if 2 * forms.count(None) < len(forms):
        raise InputError(
            f"the model file already holds {' and '.join(stored)} weights, which quantization '{wanted.name}' would "
            "quantize a second time; choose 'disabled' (keeps them) or load a 16-bit file."
        )


def stored_format(linear: nn.Linear) -> str | None:
    """How the weight of `linear` is stored: "fp8_e4m3fn", "fp8_e5m2", "fp4", "gguf", or None for 16 and 32 bits."""
    for form, dtype in FP8_DTYPES.items():
        if linear.weight.dtype == dtype:
            return form
    if isinstance(linear, NVFP4Linear):
        return "fp4"
    return "gguf" if isinstance(linear, QuantizedLinear) and not isinstance(linear, Fp8Linear) else None


def stored_as(linear: nn.Linear) -> str:
    """`stored_format` with "_scaled" where there is a scale, or the dtype: "fp8_e4m3fn_scaled", "gguf", "bfloat16"."""
    form = stored_format(linear)
    if form is None:
        return str(linear.weight.dtype).removeprefix("torch.")
    return f"{form}_scaled" if getattr(linear, "scale_weight", None) is not None else form


def how_it_runs(linear: nn.Linear, device: str | torch.device | None = None) -> str:
    """How the weight of `linear` is stored and multiplied on `device`, by default where it lies.

    "fp8_e4m3fn_scaled_fast" is the fp8 matmul. Where it is asked for and does not run: "fp8_e4m3fn_scaled, unpacked per
    call instead of the fp8 matmul (the GPU has compute capability 8.6, ...)", with the first reason.
    """
    device = linear.weight.device if device is None else torch.device(device)
    form = stored_as(linear)
    if isinstance(linear, QuantizedLinear) and (reasons := linear.unpacked_reasons(device)):
        return f"{form}, unpacked per call instead of {linear.fast_way} ({reasons[0]})"
    if isinstance(linear, Fp8Linear) and linear.fast and form.startswith("fp8"):
        return f"{form}_fast" if device.type == "cuda" else f"{form}_fast (computed in float32)"
    return form


def how_linears_run(model: nn.Module, device: str | torch.device | None = None) -> Counter[str]:
    """`how_it_runs` of every linear in `model` -> how many run so.

    Args:
        device: where they compute. Blocks that are swapped out lie elsewhere.
    """
    return Counter(how_it_runs(linear, device) for _, linear in _linears(model))


def summary(model: nn.Module, device: str | torch.device | None = None) -> str:
    """`how_linears_run` in one line for the log."""
    return listed(how_linears_run(model, device))


def listed(counts: Counter[str]) -> str:
    """ "400 x fp8_e4m3fn_scaled, 12 x bfloat16", the most common first; "none" without any."""
    return ", ".join(f"{count} x {name}" for name, count in counts.most_common()) or "none"


def stored_summary(model: nn.Module) -> str:
    """How the linears of `model` are stored, in one line; how they run depends on the device."""
    return listed(Counter(stored_as(linear) for _, linear in _linears(model)))


def _linears(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear)]
