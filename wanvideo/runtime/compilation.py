"""torch.compile for a model: its transformer blocks one by one (all of them share one graph), or all of it at once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import BackendUnavailableError, InfiniteTalkError, InputError
from .offload import BlockSwap

logger = logging.getLogger(__name__)

COMPILE_MODES = ("default", "max-autotune", "max-autotune-no-cudagraphs", "reduce-overhead")
"""Modes of `torch.compile`."""


@dataclass(frozen=True)
class CompileSettings:
    """How to compile.

    Attributes:
        backend, fullgraph, dynamic: arguments of `torch.compile`.
        mode: the same; "default" for none.
        blocks_only: compile each of `model.blocks`, else the whole forward.
        variants: how many compiled variants of one function are kept before torch gives up on it.
        static_parameter_shapes: treat shapes of weights as fixed also when `dynamic`.
    """

    backend: str = "inductor"
    fullgraph: bool = False
    mode: str = "default"
    dynamic: bool = False
    blocks_only: bool = True
    variants: int = 64
    static_parameter_shapes: bool = False


def compile_model(model: nn.Module, settings: CompileSettings) -> None:
    """Make `model` run compiled; the first call of each shape compiles. Hooks stay outside of what is compiled.

    Raises InputError for a model without blocks where only blocks are to be compiled.
    """
    undo_compile(model)
    for module in _targets(model, settings):
        compiled = torch.compile(
            module.forward,
            backend=settings.backend,
            fullgraph=settings.fullgraph,
            dynamic=settings.dynamic,
            mode=_mode(settings),
        )
        # On the instance, so that `model(...)` still runs hooks (block swap) before it enters the compiled code.
        module.__dict__["forward"] = compiled


def described(settings: CompileSettings | None) -> str:
    """In a few words, for the log."""
    return "none" if settings is None else f"by {settings.backend}, mode {settings.mode}"


def check_compiler(settings: CompileSettings | None, device: str | torch.device) -> None:
    """Compile and run one small function as `settings` say, so that what torch lacks is said before a model is read.

    Raises BackendUnavailableError where that fails; no settings always pass.
    """
    if settings is None:
        return
    logger.info("Trying torch.compile on a small function")
    try:
        with torch.no_grad():
            torch.compile(_small, backend=settings.backend, mode=_mode(settings))(torch.ones(16, device=device))
    except (RuntimeError, ImportError, OSError) as error:  # torch's own, of the compiler's process, of a lacking Triton
        raise BackendUnavailableError(
            f"torch.compile does not work here with backend {settings.backend} ({_first_line(error)}): install what it "
            "lacks, or do not compile."
        ) from error


def _small(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1


def _mode(settings: CompileSettings) -> str | None:
    """The argument `mode`, which only Inductor takes."""
    return None if settings.mode == "default" or settings.backend != "inductor" else settings.mode


def _first_line(error: BaseException) -> str:
    error = getattr(error, "inner_exception", error)  # what a backend raised
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip().rstrip(".:")


def check_with_block_swap(settings: CompileSettings | None, swap: BlockSwap | None) -> None:
    """Raise InputError where compiled code would not see that swapped weights change their place."""
    if settings is None or swap is None or swap == BlockSwap():
        return
    if not settings.blocks_only:
        raise InputError("Block swap goes with compiled blocks only: turn compile_transformer_blocks_only on.")
    if settings.backend == "cudagraphs" or settings.mode in ("reduce-overhead", "max-autotune"):
        raise InputError(
            "CUDA graphs remember where weights lie, and block swap moves them: choose backend inductor with mode "
            "default or max-autotune-no-cudagraphs, or no block swap."
        )


def undo_compile(model: nn.Module) -> None:
    """Make `model` run uncompiled again."""
    for module in (model, *_blocks(model)):
        module.__dict__.pop("forward", None)


def is_compiled(model: nn.Module) -> bool:
    """Whether `compile_model` was here, for the model or its blocks."""
    return any("forward" in vars(module) for module in (model, *_blocks(model)))


@contextmanager
def compile_limits(settings: CompileSettings | None) -> Iterator[None]:
    """torch's settings for the time in which a compiled model runs.

    Raises InfiniteTalkError where torch cannot compile it.
    """
    if settings is None:
        yield
        return
    import torch._dynamo.config as config
    from torch._dynamo.exc import TorchDynamoException

    wanted = {
        # The name since torch 2.6, and the one before.
        "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit": settings.variants,
        "force_parameter_static_shapes": settings.static_parameter_shapes or not settings.dynamic,
    }
    try:
        with torch._dynamo.config.patch(wanted):
            yield
    except TorchDynamoException as error:
        raise InfiniteTalkError(
            f"torch.compile cannot compile this model ({_first_line(error)}): run it without being compiled."
        ) from error


def _blocks(model: nn.Module) -> list[nn.Module]:
    return list(getattr(model, "blocks", []))


def _targets(model: nn.Module, settings: CompileSettings) -> list[nn.Module]:
    if not settings.blocks_only:
        return [model]
    blocks = _blocks(model)
    if not blocks:
        raise InputError(
            f"{type(model).__name__} has no transformer blocks to compile: turn compile_transformer_blocks_only off."
        )
    return blocks
