"""What the process knows of its attention backends: which there are and can run, what auto chose, what was announced.

`RUNTIME` is the only such object. ComfyUI runs nodes in several threads: what changes is changed under a lock.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

import torch

from ...errors import BackendUnavailableError
from ...kernels.inputs import Inputs
from ...kernels.selftest import SELF_TESTS, SelfTests, Verdict, device_reasons, in_child, kept_verdict, switched_off
from . import builtin, flash, host, sage, sdpa
from .contract import Backend, not_supported_reasons

__all__ = ["BACKENDS", "RUNTIME", "Runtime", "package_reasons", "self_test"]

logger = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parents[3]

BACKENDS: tuple[Backend, ...] = (
    sdpa.SDPA,
    sdpa.EAGER,
    builtin.TRITON_FP8,
    builtin.TRITON_FP4,
    builtin.EMULATED_FP8,
    builtin.EMULATED_NVFP4,
    builtin.EMULATED_NVFP4_PLAIN,
    flash.FLASH_2,
    flash.FLASH_3,
    flash.FLASH_3_FORWARD,
    host.HOST,
    sage.SAGE1,
    sage.SAGE2_AMPERE,
    sage.SAGE2_ADA,
    sage.SAGE2_HOPPER,
    sage.SAGE3_BLOCK_MEANS,
    sage.SAGE3,
)


class Runtime:
    """The table of backends and all that is remembered about them.

    Args:
        backends: those that there are after `reset`.
        self_tests: where answers about devices are kept.
    """

    def __init__(self, backends: Iterable[Backend], self_tests: SelfTests = SELF_TESTS) -> None:
        self._lock = threading.RLock()
        self._listed, self._self_tests = tuple(backends), self_tests
        self.reset()

    def reset(self) -> None:
        """Forget everything but the backends listed at construction."""
        with self._lock:
            self._backends = {backend.name: backend for backend in self._listed}
            self._rejected: dict[str, str] = {}
            self._chosen: dict[Hashable, str] = {}
            self.announced: set[tuple[str, str]] = set()
            self.forget_availability()

    def forget_availability(self) -> None:
        """Ask all backends anew whether they can run: a package was installed, or a fake put in its place."""
        self._self_tests.reset()

    def register(self, backend: Backend) -> Backend:
        """Add a backend, or replace the one of the same name."""
        with self._lock:
            self._backends[backend.name] = backend
            self.forget_availability()
        return backend

    def unregister(self, name: str) -> None:
        """Remove a backend; unknown names are ignored."""
        with self._lock:
            self._backends.pop(name, None)
            self.forget_availability()

    def backends(self) -> tuple[Backend, ...]:
        """All backends, in the order of registration."""
        return tuple(self._backends.values())

    def lookup(self, name: str) -> Backend:
        """The backend called `name`.

        Raises:
            BackendUnavailableError: there is none; the message lists those that are.
        """
        backend = self._backends.get(name)
        if backend is None:
            raise BackendUnavailableError(
                f"There is no attention backend '{name}'; there are {', '.join(self._backends)}."
            )
        return backend

    def reject(self, name: str, reason: str | None) -> None:
        """From now on reject a backend for `reason`; None accepts it again."""
        self.lookup(name)
        with self._lock:
            if reason is None:
                self._rejected.pop(name, None)
            else:
                self._rejected[name] = reason
            self.forget_availability()

    def unavailable_reasons(self, name: str, device: torch.device) -> tuple[str, ...]:
        """Why a backend cannot run on `device` at all; empty when it can. Kept after the first question."""

        def ask() -> list[str]:
            backend = self.lookup(name)
            found = [*device_reasons(backend.contract.device, device), *backend.unavailable(device)]
            if name in self._rejected:
                found.append(self._rejected[name])
            return found or package_reasons(backend, device)

        return self._self_tests.reasons(("backend", name), device, ask)

    def reasons(self, backend: Backend, inputs: Inputs) -> list[str]:
        """Every reason why a backend cannot compute a call, whose layout is repaired; empty when it can."""
        found = self.unavailable_reasons(backend.name, inputs.q.device)
        asked = not_supported_reasons(backend.contract, inputs)
        return list(dict.fromkeys((*found, *asked))) if found or asked else []

    def run(self, name: str, inputs: Inputs) -> torch.Tensor:
        """The attention of a call by one backend.

        Raises:
            BackendUnavailableError: the backend does not support the call here; the message lists all reasons.
        """
        backend = self.lookup(name)
        if reasons := self.reasons(backend, inputs):
            raise BackendUnavailableError(
                f"The attention backend '{name}' does not support this call: {', '.join(reasons)}."
            )
        return backend.call(inputs)

    def chosen(self, call: Hashable, choose: Callable[[], str]) -> str:
        """What `choose` gave for calls of this kind at the first one."""
        with self._lock:
            if call not in self._chosen:
                self._chosen[call] = choose()
            return self._chosen[call]

    def first_time(self, said: tuple[str, str], announced: set[tuple[str, str]] | None = None) -> bool:
        """Whether this was not said before: in a generation that holds `announced`, or outside of any."""
        announced = self.announced if announced is None else announced
        with self._lock:
            new = said not in announced
            announced.add(said)
        return new


def package_reasons(backend: Backend, device: torch.device) -> list[str]:
    """Reasons from the self-test why a backend must not be used; empty when it may.

    Kernels that come with this project or with torch are covered by their tests and need none.
    """
    package = backend.contract.package
    if package is None or switched_off():
        return []
    result = kept_verdict(backend.name, package, device, lambda: self_test(backend, device))
    if result.ok:
        return []
    logger.warning("%s is not used: %s", backend.name, result.reason)
    return [f"it failed its self-test: {result.reason}"]


def self_test(backend: Backend, device: torch.device, **options: float) -> Verdict:
    """Test a backend in a child process, now. `options` are those of `in_child`."""
    module = "wanvideo.modules.backends.selftest"  # by name: it needs this module
    return in_child(backend.name, module, "child", backend.name, str(device), _plugin(backend), **options)


def _plugin(backend: Backend) -> str:
    """The file that registers a backend from outside this package, for the child to load; "" for its own."""
    run: Any = backend.run
    source = inspect.getsourcefile(inspect.unwrap(getattr(run, "func", run)))  # of a partial, its function
    if source is None or Path(source).resolve().is_relative_to(_ROOT):
        return ""
    return source


RUNTIME = Runtime(BACKENDS)
