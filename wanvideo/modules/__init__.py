"""The DiT: layout contracts, attention backends, blocks and the model."""

# Importing these makes the door complete: "auto" measures, and kernels of binary packages are tried before use.
from . import auto
from .backends import selftest as trial

__all__ = ["auto", "trial"]
