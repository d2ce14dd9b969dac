"""Attention kernels, one module per family, each with its contract as data."""

from . import sdpa
from .contract import Contract, not_supported_reasons
from .registry import Backend, backends, lookup, refuse, register, unavailable_reasons, unregister

__all__ = [
    "Backend",
    "Contract",
    "backends",
    "lookup",
    "not_supported_reasons",
    "refuse",
    "register",
    "sdpa",
    "unavailable_reasons",
    "unregister",
]
