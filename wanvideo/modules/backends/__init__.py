"""Attention kernels, one module per family, each with its contract as data; `runtime` lists them."""

from .contract import Backend, Contract, Device, Package, Size, not_supported_reasons
from .runtime import RUNTIME

__all__ = [
    "RUNTIME",
    "Backend",
    "Contract",
    "Device",
    "Package",
    "Size",
    "backends",
    "lookup",
    "not_supported_reasons",
    "register",
    "unavailable_reasons",
    "unregister",
]

backends = RUNTIME.backends
lookup = RUNTIME.lookup
register = RUNTIME.register
unregister = RUNTIME.unregister
unavailable_reasons = RUNTIME.unavailable_reasons
