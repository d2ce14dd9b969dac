"""The table of backends: name -> contract, availability and the function that runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from ...errors import BackendUnavailableError
from .contract import Contract, unavailable_reasons_of

__all__ = [
    "Backend",
    "Run",
    "backends",
    "forget_availability",
    "lookup",
    "refuse",
    "register",
    "unavailable_reasons",
    "unregister",
]


class Run(Protocol):
    """A kernel's call, on tensors that already meet its contract, in its order; the output may have any strides."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attn_mask: torch.Tensor | None,
        softmax_scale: float | None,
        causal: bool,
        /,
    ) -> torch.Tensor: ...


def _always_available(device: torch.device) -> list[str]:
    return []


@dataclass(frozen=True)
class Backend:
    """One kernel.

    Attributes:
        name: what the log line, the reasons and the tables call it.
        contract: the calls that it answers rightly.
        run: the call itself.
        unavailable: why it cannot run on a device at all, beyond what the contract says (device, capability, package);
            asked once per device, the answer is kept.
        note: what the user should know when it runs, such as that it is slow.
    """

    name: str
    contract: Contract
    run: Run
    unavailable: Callable[[torch.device], list[str]] = _always_available
    note: str = ""


_backends: dict[str, Backend] = {}
_refused: dict[str, str] = {}
_known_reasons: dict[tuple[str, str], tuple[str, ...]] = {}
_trial: Callable[[str, torch.device], list[str]] | None = None


def register(backend: Backend) -> Backend:
    """Add a backend, or replace the one of the same name."""
    _backends[backend.name] = backend
    _known_reasons.clear()
    return backend


def unregister(name: str) -> None:
    """Forget a backend; unknown names are ignored."""
    _backends.pop(name, None)
    _known_reasons.clear()


def backends() -> tuple[Backend, ...]:
    """All backends, in the order of registration."""
    return tuple(_backends.values())


def lookup(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        BackendUnavailableError: there is none; the message lists those that are.
    """
    if name not in _backends:
        raise BackendUnavailableError(f"There is no attention backend '{name}'; there are {', '.join(_backends)}.")
    return _backends[name]


def refuse(name: str, reason: str | None) -> None:
    """From now on refuse a backend for `reason` (it failed its trial, say); None lifts the refusal."""
    lookup(name)
    if reason is None:
        _refused.pop(name, None)
    else:
        _refused[name] = reason
    _known_reasons.clear()


def set_trial(trial: Callable[[str, torch.device], list[str]] | None) -> None:
    """Let `trial(name, device)` give reasons against a backend that is otherwise available; None trusts them all."""
    global _trial
    _trial = trial
    _known_reasons.clear()


def forget_availability() -> None:
    """Ask all backends anew whether they can run: a package was installed, or a fake put in its place."""
    _known_reasons.clear()


def unavailable_reasons(name: str, device: torch.device) -> tuple[str, ...]:
    """Why a backend cannot run on `device` at all; empty when it can. Kept after the first question."""
    key = (name, str(device))
    if key not in _known_reasons:
        backend = lookup(name)
        reasons = [*unavailable_reasons_of(backend.contract, device), *backend.unavailable(device)]
        if name in _refused:
            reasons.append(_refused[name])
        if not reasons and _trial is not None:
            reasons += _trial(name, device)
        _known_reasons[key] = tuple(reasons)
    return _known_reasons[key]
