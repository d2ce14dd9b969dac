"""What the command shows on the terminal: log lines and a bar with window, step and remaining time, both on stderr."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .generate import Events

__all__ = ["ProgressBar", "console"]


@cache
def console() -> Console:
    """The terminal's stderr: log lines and the bar must share one console to stay out of each other's way."""
    return Console(stderr=True)


class ProgressBar:
    """A context manager whose `events` go to `make_video`.

    Args:
        on_window: called with the number of finished windows whenever it grows.
    """

    def __init__(self, on_window: Callable[[int], None] = lambda count: None) -> None:
        self.on_window = on_window
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console(),
        )
        self._task = self._bar.add_task("Starting", total=None, count="")
        self.events = Events(stage=self._stage, reading=self._reading, step=self._step, window_done=self.on_window)

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.stop()

    def _stage(self, text: str) -> None:
        self._bar.reset(self._task, description=text, total=None, count="")

    def _reading(self, done: int, total: int) -> None:
        self._bar.update(
            self._task, completed=done, total=total, count=f"{done / 2**30:.1f} of {total / 2**30:.1f} GiB"
        )

    def _step(self, window: int, windows: int, step: int, steps: int) -> None:
        self._bar.update(
            self._task,
            description="Generating",
            completed=window * steps + step,
            total=windows * steps,
            count=f"window {window + 1}/{windows}, step {step}/{steps}",
        )
