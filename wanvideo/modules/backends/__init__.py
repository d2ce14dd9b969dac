"""Attention kernels, one module per family, each with its contract as data."""

# Importing a family registers its backends; no kernel package is imported before a mode asks for it.
from . import builtin as portable
from . import flash, host, kitchen, sage, sdpa
from .contract import Contract, Shape, not_supported_reasons
from .registry import (
    Backend,
    backends,
    forget_availability,
    lookup,
    refuse,
    register,
    set_trial,
    unavailable_reasons,
    unregister,
)

__all__ = [
    "Backend",
    "Contract",
    "Shape",
    "backends",
    "flash",
    "forget_availability",
    "host",
    "kitchen",
    "lookup",
    "not_supported_reasons",
    "portable",
    "refuse",
    "register",
    "sage",
    "sdpa",
    "set_trial",
    "unavailable_reasons",
    "unregister",
]
