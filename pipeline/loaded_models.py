"""Models that stay loaded from one video to the next, where nothing that decides what they are has changed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

__all__ = ["LoadedModels"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


@runtime_checkable
class Closing(Protocol):
    """A part that is more than memory, and ends by `close`."""

    def close(self) -> None: ...


class LoadedModels:
    """Parts of a job that `make_video` has loaded or computed, by name, each with what decided it.

    `make_video` calls `begin` once and `get` for each part. One job at a time may use it.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Mapping[str, str], Any]] = {}
        self._wanted: Mapping[str, Mapping[str, str]] = {}
        self.reused: list[str] = []
        """Parts that the latest job took over."""

    @property
    def names(self) -> list[str]:
        """Parts that are in memory."""
        return sorted(self._kept)

    def begin(self, wanted: Mapping[str, Mapping[str, str]]) -> None:
        """Let go of all parts that a job cannot use, before anything takes their memory.

        Args:
            wanted: name -> all that decides what the part is.
        """
        self._wanted = wanted
        self._let_go([name for name, kept in self._kept.items() if wanted.get(name) != kept[0]])
        self.reused = self.names
        if self.reused:
            logger.info("Still loaded: %s.", ", ".join(self.reused))

    def get(self, name: str, load: Callable[[], T]) -> T:
        """The part of this name, by `load` where it is not there yet."""
        if name not in self._kept:
            self._kept[name] = (self._wanted[name], load())
        part: T = self._kept[name][1]
        return part

    def clear(self) -> None:
        """Let go of everything."""
        self._let_go(self.names)

    def _let_go(self, names: Collection[str]) -> None:
        for name in names:
            _, part = self._kept.pop(name)
            if isinstance(part, Closing):
                part.close()
