"""What is installed, and what the GPU is: looked up here only, so that tests can stand in for both."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from functools import cache
from types import ModuleType

import torch
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

__all__ = [
    "capability",
    "first_line",
    "installed_version",
    "load",
    "package_reasons",
    "triton_import_reason",
    "triton_version",
]


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, None when it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of an NVIDIA GPU; None for anything else."""
    if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def load(module: str) -> ModuleType:
    """Import a kernel package.

    Raises:
        ImportError: it cannot be imported, for whatever reason its binaries give.
    """
    try:
        return importlib.import_module(module)
    except (OSError, RuntimeError, AttributeError, AssertionError) as error:
        # A binary built for another torch or CUDA fails in one of these ways.
        raise ImportError(f"{type(error).__name__}: {error}") from error


def _distribution_of(module: str) -> str | None:
    """The distribution that brings a module under another name than the usual one."""
    if importlib.util.find_spec(module) is None:
        return None
    return next(iter(importlib.metadata.packages_distributions().get(module, ())), None)


def package_reasons(distribution: str, versions: str, module: str, entry_points: tuple[str, ...]) -> list[str]:
    """Why a kernel package cannot be used: missing, of a version nobody tried, broken, or without the entry points."""
    found = installed_version(distribution)
    if found is None and (other := _distribution_of(module)) is not None:
        found = installed_version(other)
    if found is None:
        return [f"the package {distribution} is not installed"]
    reasons = []
    try:
        supported = SpecifierSet(versions, prereleases=True).contains(Version(found).public)
    except InvalidVersion:
        supported = False
    if not supported:
        reasons.append(f"{distribution} is version {found}, it needs {versions}")
    try:
        loaded = load(module)
    except ImportError as error:
        return [*reasons, f"{distribution} {found} cannot be imported ({first_line(error)})"]
    missing = [name for name in entry_points if not hasattr(loaded, name)]
    if missing:
        reasons.append(f"{distribution} {found} has no {' or '.join(missing)}")
    return reasons


@cache
def triton_import_reason() -> str | None:
    """Why Triton cannot be imported; None when it can."""
    try:
        load("triton.language")
    except ImportError as error:
        name = "triton-windows" if sys.platform == "win32" else "triton"
        why = f"Triton cannot be imported ({first_line(error)})"
        return f"{why}; pip install {name}, in the version that fits this PyTorch"
    return None


@cache
def triton_version() -> tuple[int, int]:
    """(major, minor) of the installed Triton."""
    major, minor = load("triton").__version__.split(".")[:2]
    return int(major), int(minor)


def first_line(error: BaseException) -> str:
    """What an exception says in one line: the first of its message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
