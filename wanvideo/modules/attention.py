"""The entry point of every attention call: a mode names the backends, a contract decides, the guard repairs.

`attention(q, k, v, "sageattn_3_fp4")` goes through the mode's backends in order: the native package where it supports
the call, otherwise the Triton kernel of the same precision, otherwise the same numerics in plain torch. What runs is
logged once per generation. A mode of which no backend supports the call raises `BackendUnavailableError` with every
reason; no mode is ever replaced by one of another precision, except that "auto" chooses.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch

from ..errors import BackendUnavailableError, nearest, plain
from ..kernels import sage_fp8
from ..kernels.inputs import Inputs
from ..kernels.layout import GuardStats, count_guards
from . import auto
from .backends import RUNTIME, Backend

__all__ = [
    "ATTENTION_MODES",
    "MODE_BACKENDS",
    "ROLES",
    "AttentionMode",
    "KernelCounts",
    "attention",
    "canonical_mode",
    "check_mode",
    "count_kernels",
    "mode_for_role",
    "mode_reasons",
    "mode_supported",
    "resolve_mode",
    "run_backend",
]

logger = logging.getLogger(__name__)

AttentionMode = str | Callable[[int, str], str]
"""A mode, or a function of (block index, role) that gives one."""

ROLES = ("self", "text", "image", "audio")

MODE_BACKENDS: dict[str, tuple[str, ...]] = {
    "sdpa": ("sdpa",),
    "flash_attn_2": ("flash_attn_2",),
    "flash_attn_3": ("flash_attn_3", "flash_attn_3_forward"),
    "sageattn": (
        "sageattention_2_fp8_sm90",
        "sageattention_2_fp8",
        "sageattention_2_fp16",
        "sageattention_1",
        "triton_fp8",
        "emulated_fp8",
    ),
    "sageattn_3": ("sageattn3", "triton_fp4", "emulated_nvfp4_plain"),
    "sageattn_3_fp4": ("sageattn3_block_means", "triton_fp4", "emulated_nvfp4"),
    # SageAttention 3 has no 8-bit kernel; the Triton one is the first choice, SageAttention 2 has the same numerics.
    "sageattn_3_fp8": ("triton_fp8", "sageattention_2_fp8_sm90", "sageattention_2_fp8", "emulated_fp8"),
    "comfy": ("comfy",),
    "auto": ("sdpa",),
    "eager": ("eager",),
}
"""Mode -> backends in the order of preference. All backends of one mode have the same precision."""

ATTENTION_MODES: tuple[str, ...] = tuple(MODE_BACKENDS)

FOREIGN_MODES = {
    "radial_sage_attention": "it is sparse attention, which changes the result; choose sageattn_3_fp8",
    "sageattn_compiled": "every mode here works under torch.compile; choose sageattn",
    "sageattn_ultravico": "it is for lengths beyond the training length, windows do that here; choose sageattn",
}
"""Modes that other programs know and this one does not run."""

OTHER_NAMES = {"sageattn": ("sageattention", "sage"), "flashattn": ("flashattention", "fa")}
"""How a mode's plain name begins -> how people write that too."""


def _mode_aliases() -> dict[str, str]:
    """Plain name -> mode, for every name and how people write it: "sage3fp8", "sageattention3fp8" ..."""
    names = {plain(mode): mode for mode in (*MODE_BACKENDS, *FOREIGN_MODES)} | {"sageattn2": "sageattn"}
    for begin, others in OTHER_NAMES.items():
        endings = {name.removeprefix(begin): mode for name, mode in names.items() if name.startswith(begin)}
        names |= {other + ending: mode for other in others for ending, mode in endings.items()}
    return names


MODE_ALIASES = _mode_aliases()

LOW_PRECISION_MODES = frozenset({"sageattn", "sageattn_3", "sageattn_3_fp4", "sageattn_3_fp8"})


def canonical_mode(mode: str) -> str:
    """The mode's name for any way of writing it, in any case and with any separators.

    Raises:
        BackendUnavailableError: no such mode, or one that this project does not run; the message says what to choose.
    """
    if mode in MODE_BACKENDS:
        return mode
    known = MODE_ALIASES.get(plain(str(mode)))
    if known in MODE_BACKENDS:
        return known
    if known is not None:
        raise BackendUnavailableError(f"The attention mode '{mode}' is not run here: {FOREIGN_MODES[known]}.")
    raise BackendUnavailableError(
        f"There is no attention mode '{mode}'; choose one of {', '.join(ATTENTION_MODES)}"
        f"{nearest(str(mode), ATTENTION_MODES)}."
    )


def mode_for_role(mode: str, role: str) -> str:
    """The mode of attention of one role when the user chose `mode`.

    Low precision, and "auto", are for long self-attention only: with few keys a quantized kernel is slower and less
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


class KernelCounts(Counter[str]):
    """Kernel -> calls of `attention` in one generation.

    Attributes:
        announced: (mode, kernel) whose line was logged in this generation.
        guards: what the layout guards saw and copied meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()
        self.announced: set[tuple[str, str]] = set()
        self.guards = GuardStats()
        self._loops_before = sage_fp8.loops_taken()

    def loops(self) -> Counter[str]:
        """How many blocks of queries took each loop of the Hopper kernel, see `sage_fp8.LOOPS`. Waits for the GPU."""
        return sage_fp8.loops_taken() - self._loops_before


_generation: ContextVar[KernelCounts | None] = ContextVar("generation", default=None)


@contextlib.contextmanager
def count_kernels() -> Iterator[KernelCounts]:
    """Count the calls of `attention` and of the guards inside the `with` block: one generation.

    In it each kernel is announced once.

    Nested blocks: the inner one counts kernels, and announces nothing that the outer one did.
    """
    counts, outer = KernelCounts(), _generation.get()
    if outer is not None:
        counts.announced = outer.announced
    token = _generation.set(counts)
    try:
        with count_guards() as counts.guards:
            yield counts
    finally:
        _generation.reset(token)


def _record(mode: str, backend: Backend, passed_over: dict[str, list[str]]) -> None:
    """Count a call, and say once per generation, mode and kernel what runs, and why not the kernels before it."""
    counts = _generation.get()
    if counts is not None:
        counts[backend.name] += 1
    if not RUNTIME.first_time((mode, backend.name), None if counts is None else counts.announced):
        return
    note = f" ({backend.note})" if backend.note else ""
    because = "".join(f"; not {name}: {reasons[0]}" for name, reasons in passed_over.items())
    logger.info("attention mode %s runs %s%s%s", mode, backend.name, note, because)


def _candidates(mode: str, inputs: Inputs) -> tuple[str, ...]:
    """The backends that `mode` tries for a call, in order."""
    return (auto.choose(inputs), *MODE_BACKENDS[mode]) if mode == "auto" else MODE_BACKENDS[mode]


def mode_reasons(device: torch.device) -> dict[str, dict[str, tuple[str, ...]]]:
    """mode -> backend -> why it cannot run on `device` (empty when it can), in the order in which they are tried."""
    return {
        mode: {name: RUNTIME.unavailable_reasons(name, device) for name in names}
        for mode, names in MODE_BACKENDS.items()
    }


def mode_supported(mode: str, device: torch.device) -> bool:
    """Whether `mode` has a kernel on `device`; on a GPU the emulations in plain torch, which take minutes, are none."""
    return any(
        not RUNTIME.unavailable_reasons(name, device)
        for name in MODE_BACKENDS[canonical_mode(mode)]
        if device.type == "cpu" or not RUNTIME.lookup(name).emulation
    )


def check_mode(mode: str, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
    """Reject a mode that cannot run here, by one small call, before any weights are read.

    Raises BackendUnavailableError, as `attention` does.
    """
    q = torch.zeros(1, 32, heads, head_dim, dtype=dtype, device=device)
    attention(q, q.clone(), q.clone(), mode)


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
        causal: query i sees key j only where j <= i.

    Returns:
        [B, Lq, H, D], contiguous, q's dtype.

    Raises:
        InputError: shapes, dtypes or devices of q, k, v do not fit together.
        BackendUnavailableError: the mode is unknown or does not support this call here; the message lists all reasons.
    """
    if torch.compiler.is_compiling():
        out: torch.Tensor = _attention_op(q, k, v, attention_mode, attn_mask, softmax_scale, causal)
        return out
    mode = canonical_mode(attention_mode)
    inputs = Inputs.checked(q, k, v, attn_mask, softmax_scale, causal)
    if q.numel() == 0:
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    passed_over: dict[str, list[str]] = {}
    for name in _candidates(mode, inputs):
        backend = RUNTIME.lookup(name)
        reasons = RUNTIME.reasons(backend, inputs)
        if not reasons:
            _record(mode, backend, passed_over)
            return backend.call(inputs)
        passed_over[name] = reasons
    why_not = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in passed_over.items())
    raise BackendUnavailableError(
        f"The attention mode '{mode}' does not support this call, choose 'sdpa' or remove the cause ({why_not})."
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
    """One backend by name instead of a mode, for self-tests, measurements and tests; otherwise as `attention`."""
    return RUNTIME.run(name, Inputs.checked(q, k, v, attn_mask, softmax_scale, causal))


# A compiled graph sees the entry point as one opaque call, so that addresses are checked, copies counted and kernels
# chosen when it runs, not when it is traced, and no kernel behind it breaks the graph.
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
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention_mode: str, *_: object, **__: object
) -> torch.Tensor:
    Inputs.checked(q, k, v)
    return q.new_empty(q.shape)
