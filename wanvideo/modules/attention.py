"""The only door to an attention kernel: a mode chooses the backends, a contract decides, the guard repairs.

`attention(q, k, v, "sageattn_3_fp4")` walks the mode's backends in order: the native package where it serves, otherwise
our own kernel of the same precision, otherwise the same numerics in plain torch. What runs is logged once. A mode of
which no backend can serve the call raises `BackendUnavailableError` with every reason; no mode is ever replaced by one
of another precision, except that "auto" chooses.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch

from ..errors import BackendUnavailableError, InputError
from ..kernels.layout import aligned_contiguous, private_copy
from .backends import Backend, lookup, not_supported_reasons, unavailable_reasons
from .backends.contract import repaired

__all__ = [
    "ATTENTION_MODES",
    "EMULATIONS",
    "MODE_BACKENDS",
    "ROLES",
    "AttentionMode",
    "attention",
    "canonical_mode",
    "count_kernels",
    "mode_for_role",
    "mode_reasons",
    "mode_serves",
    "reasons_against",
    "resolve_mode",
    "run_backend",
    "set_auto_chooser",
]

logger = logging.getLogger(__name__)

AttentionMode = str | Callable[[int, str], str]
"""A mode, or a function of (block index, role) that gives one."""

ROLES = ("self", "text", "image", "audio")

MODE_BACKENDS: dict[str, tuple[str, ...]] = {
    "sdpa": ("sdpa",),
    "flash_attn_2": ("flash_attn_2",),
    "flash_attn_3": ("flash_attn_3",),
    "sageattn": (
        "sageattention_2_fp8_sm90",
        "sageattention_2_fp8",
        "sageattention_2_fp16",
        "sageattention_1",
        "own_fp8",
        "emulated_fp8",
    ),
    "sageattn_3": ("sageattn3", "own_fp4", "emulated_nvfp4_plain"),
    "sageattn_3_fp4": ("sageattn3_block_means", "own_fp4", "emulated_nvfp4"),
    # SageAttention 3 has no 8-bit kernel; ours is the first choice, SageAttention 2 has the same numerics.
    "sageattn_3_fp8": ("own_fp8", "sageattention_2_fp8_sm90", "sageattention_2_fp8", "emulated_fp8"),
    "comfy": ("comfy",),
    "auto": ("sdpa",),
    "eager": ("eager",),
}
"""Mode -> backends in the order of preference. All backends of one mode have the same precision."""

ATTENTION_MODES: tuple[str, ...] = tuple(MODE_BACKENDS)

MODE_ALIASES = {"sage3_fp4": "sageattn_3_fp4", "sage3_fp8": "sageattn_3_fp8"}

FOREIGN_MODES = {
    "radial_sage_attention": "it is sparse attention, which changes the result; choose sageattn_3_fp8",
    "sageattn_compiled": "every mode here works under torch.compile; choose sageattn",
    "sageattn_ultravico": "it is for lengths beyond the training length, windows do that here; choose sageattn",
}
"""Modes that other programs know and this one does not run."""

EMULATIONS = frozenset({"emulated_fp8", "emulated_nvfp4", "emulated_nvfp4_plain"})
"""Backends that compute a kernel's numbers without the kernel."""

LOW_PRECISION_MODES = frozenset({"sageattn", "sageattn_3", "sageattn_3_fp4", "sageattn_3_fp8"})


def canonical_mode(mode: str) -> str:
    """The mode's own name for any of its spellings.

    Raises:
        BackendUnavailableError: no such mode, or one that this project does not run; the message says what to choose.
    """
    mode = MODE_ALIASES.get(mode, mode)
    if mode in MODE_BACKENDS:
        return mode
    if mode in FOREIGN_MODES:
        raise BackendUnavailableError(f"The attention mode '{mode}' is not run here: {FOREIGN_MODES[mode]}.")
    raise BackendUnavailableError(f"There is no attention mode '{mode}'; choose one of {', '.join(ATTENTION_MODES)}.")


def mode_for_role(mode: str, role: str) -> str:
    """The mode that serves attention of one role when the user chose `mode`.

    Low precision, and "auto", are for long self-attention only: with few keys a quantised kernel is slower and less
    accurate than SDPA.

    Args:
        role: "self", "text", "image" or "audio".
    """
    if role not in ROLES:
        raise ValueError(f"role must be one of {', '.join(ROLES)}, not {role!r}")
    mode = canonical_mode(mode)
    if role != "self" and (mode in LOW_PRECISION_MODES or mode == "auto"):
        return "sdpa"
    return mode


def resolve_mode(mode: AttentionMode, block: int, role: str) -> str:
    """The mode for one attention call of a model: a callable is asked, a name is passed through `mode_for_role`."""
    return canonical_mode(mode(block, role)) if callable(mode) else mode_for_role(mode, role)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    softmax_scale: float | None = None,
) -> None:
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise InputError(f"attention takes q, k, v of [B, L, H, D], not {q.ndim}, {k.ndim} and {v.ndim} dimensions")
    same = q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:]
    if not same or k.shape != v.shape:
        raise InputError(
            "attention takes q [B, Lq, H, D] and k, v [B, Lk, H, D], "
            f"not {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise InputError(f"attention takes q, k, v of one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    if k.device != q.device or v.device != q.device:
        raise InputError(f"attention takes q, k, v on one device, not {q.device}, {k.device} and {v.device}")
    if k.shape[1] == 0:
        raise InputError("attention needs at least one key, k and v are empty")
    if softmax_scale is not None and not (math.isfinite(softmax_scale) and softmax_scale > 0):
        raise InputError(f"softmax_scale must be a finite number above 0, not {softmax_scale}")
    if attn_mask is not None:
        _check_mask(attn_mask, q, k.shape[1])


def _check_mask(mask: torch.Tensor, q: torch.Tensor, keys: int) -> None:
    scores = (q.shape[0], q.shape[2], q.shape[1], keys)
    fits = mask.ndim <= 4 and all(
        size in (1, wanted) for size, wanted in zip(reversed(mask.shape), reversed(scores), strict=False)
    )
    if not fits:
        raise InputError(f"attn_mask {tuple(mask.shape)} does not broadcast to {scores}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise InputError(f"attn_mask must be bool or floating point, not {mask.dtype}")
    if mask.device != q.device:
        raise InputError(f"attention takes all tensors on one device, not q on {q.device}, attn_mask on {mask.device}")


_announced: set[tuple[str, str]] = set()


def _announce(mode: str, backend: Backend, passed_over: dict[str, list[str]]) -> None:
    """Say once per mode and kernel what runs, and why not the kernels before it."""
    if (mode, backend.name) in _announced:
        return
    _announced.add((mode, backend.name))
    note = f" ({backend.note})" if backend.note else ""
    because = "".join(f"; not {name}: {reasons[0]}" for name, reasons in passed_over.items())
    logger.info("attention mode %s runs %s%s%s", mode, backend.name, note, because)


_kernel_calls: ContextVar[Counter[str] | None] = ContextVar("kernel_calls", default=None)


@contextlib.contextmanager
def count_kernels() -> Iterator[Counter[str]]:
    """Count the calls of `attention` inside the `with` block: kernel -> calls. Nested blocks: the inner one counts."""
    counts: Counter[str] = Counter()
    token = _kernel_calls.set(counts)
    try:
        yield counts
    finally:
        _kernel_calls.reset(token)


def _count_kernel(name: str) -> None:
    counts = _kernel_calls.get()
    if counts is not None:
        counts[name] += 1


AutoChooser = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], str]

_auto_chooser: AutoChooser | None = None


def set_auto_chooser(chooser: AutoChooser | None) -> None:
    """Let `chooser(q, k, v)` name the backend that "auto" tries before SDPA; None leaves SDPA alone."""
    global _auto_chooser
    _auto_chooser = chooser


def candidates(mode: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[str, ...]:
    """The backends that `mode` tries for a call, in order."""
    names = MODE_BACKENDS[canonical_mode(mode)]
    if mode == "auto" and _auto_chooser is not None:
        return (_auto_chooser(q, k, v), *names)
    return names


def reasons_against(
    backend: Backend,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> list[str]:
    """Every reason why a backend cannot serve a call behind the door, where layouts are repaired; empty when it can."""
    found = unavailable_reasons(backend.name, q.device)
    asked = not_supported_reasons(backend.contract, q, k, v, attn_mask, softmax_scale, causal, layout=False)
    return list(dict.fromkeys((*found, *asked)))


def mode_reasons(device: torch.device) -> dict[str, dict[str, tuple[str, ...]]]:
    """mode -> backend -> why it cannot run on `device` (empty when it can), in the order in which they are tried."""
    return {mode: {name: unavailable_reasons(name, device) for name in names} for mode, names in MODE_BACKENDS.items()}


def mode_serves(mode: str, device: torch.device) -> bool:
    """Whether `mode` has a kernel on `device`; on a GPU the emulations in plain torch, which take minutes, are none."""
    names = [name for name in MODE_BACKENDS[canonical_mode(mode)] if device.type == "cpu" or name not in EMULATIONS]
    return any(not unavailable_reasons(name, device) for name in names)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention_mode: str = "sdpa",
    attn_mask: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """softmax(q k^T * scale + mask) v.

    Args:
        q: [B, Lq, H, D]. k, v: [B, Lk, H, D]; one dtype and device, any strides and addresses. None is written to.
        attention_mode: one of `ATTENTION_MODES`.
        attn_mask: broadcastable to [B, H, Lq, Lk]: bool (True takes part) or floating point (added to the scores).
        softmax_scale: None for D ** -0.5.
        causal: key j serves query i only where j <= i.

    Returns:
        [B, Lq, H, D], contiguous, q's dtype.

    Raises:
        InputError: shapes, dtypes or devices of q, k, v do not fit together.
        BackendUnavailableError: the mode is unknown or cannot serve this call here; the message lists all reasons.
    """
    if torch.compiler.is_compiling():
        return _attention_op(q, k, v, attention_mode, attn_mask, softmax_scale, causal)
    mode = canonical_mode(attention_mode)
    _check(q, k, v, attn_mask, softmax_scale)
    if q.numel() == 0:
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    passed_over: dict[str, list[str]] = {}
    for name in candidates(mode, q, k, v):
        backend = lookup(name)
        reasons = reasons_against(backend, q, k, v, attn_mask, softmax_scale, causal)
        if not reasons:
            _announce(mode, backend, passed_over)
            _count_kernel(name)
            return _run(backend, q, k, v, attn_mask, softmax_scale, causal)
        passed_over[name] = reasons
    why_not = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in passed_over.items())
    raise BackendUnavailableError(
        f"The attention mode '{mode}' cannot serve this call, choose 'sdpa' or mend the cause ({why_not})."
    )


def run_backend(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """One backend by name instead of a mode, for trials, measurements and tests; otherwise as `attention`."""
    backend = lookup(name)
    _check(q, k, v, attn_mask, softmax_scale)
    reasons = reasons_against(backend, q, k, v, attn_mask, softmax_scale, causal)
    if reasons:
        raise BackendUnavailableError(f"The attention backend '{name}' cannot serve this call: {', '.join(reasons)}.")
    return _run(backend, q, k, v, attn_mask, softmax_scale, causal)


def _run(
    backend: Backend,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    softmax_scale: float | None,
    causal: bool,
) -> torch.Tensor:
    contract = backend.contract
    own_k = repaired(contract, k)
    if contract.writes_to_k and own_k.untyped_storage().data_ptr() == k.untyped_storage().data_ptr():
        own_k = private_copy(own_k)
    # Packages launch on the current device, and some change it.
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        out = backend.run(repaired(contract, q), own_k, repaired(contract, v), attn_mask, softmax_scale, causal)
    if contract.order == "BHLD":
        out = out.transpose(1, 2)
    return aligned_contiguous(out.to(q.dtype))


# A compiled graph sees the door as one opaque call, so that addresses are checked, copies counted and kernels chosen
# when it runs, not when it is traced, and no kernel behind it breaks the graph.
@torch.library.custom_op("wanvideo_infinitetalk::attention", mutates_args=())
def _attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention_mode: str,
    attn_mask: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    return attention(q, k, v, attention_mode, attn_mask, softmax_scale, causal)


@_attention_op.register_fake
def _attention_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention_mode: str,
    attn_mask: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    _check(q, k, v)
    return q.new_empty(q.shape)
