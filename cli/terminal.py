"""What the command shows on stderr: log lines, and a bar with window, step and remaining time."""

from __future__ import annotations

import logging
import sys
from functools import cache

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..measure.footage import Footage
from ..measure.quantities import Absent
from ..measure.report import rows, shown, summary
from ..pipeline.make_video import Events
from .doctor import Report

__all__ = ["ProgressBar", "doctor_tables", "log_to_stderr", "measure_tables"]

logger = logging.getLogger(__name__)


@cache
def console() -> Console:
    """Log lines and the bar share one console, to stay out of each other's way."""
    return Console(stderr=True)


def log_handler(verbose: bool) -> logging.Handler:
    """In colors for a terminal; in plain, unwrapped lines for a file or a pipe."""
    if console().is_terminal:
        return RichHandler(console=console(), show_time=verbose, show_path=False, show_level=verbose, markup=False)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s" if verbose else "%(message)s"))
    return handler


def log_to_stderr(verbose: bool) -> None:
    """Show the package's log lines on stderr, in this process."""
    package = logging.getLogger(__package__.rpartition(".")[0])
    package.handlers = [log_handler(verbose)]
    package.setLevel(logging.DEBUG if verbose else logging.INFO)


class ProgressBar:
    """A context manager whose `events` go to `make_video`. Where stderr is no terminal, it logs a line per window."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeRemainingColumn(),
            console=console(),
            disable=not console().is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("Starting", total=None, count="")
        self.events = Events(
            stage=self._stage,
            reading=self._reading,
            part=self._part,
            step=self._step,
            window_done=self._window_done,
        )

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.stop()

    def _stage(self, text: str) -> None:
        logger.debug("%s", text)
        self._bar.reset(self._task, description=text, total=None, count="")

    def _reading(self, done: int, total: int) -> None:
        count = f"{done / 2**30:.1f} of {total / 2**30:.1f} GiB"
        self._bar.update(self._task, completed=done, total=total, count=count)

    def _step(self, window: int, windows: int, step: int, steps: int) -> None:
        count = f"window {window + 1}/{windows}, step {step}/{steps}"
        done, total = window * steps + step, windows * steps
        self._bar.update(self._task, description="Generating", completed=done, total=total, count=count)

    def _part(self, text: str, done: int, total: int) -> None:
        self._bar.update(self._task, description=text, completed=done, total=total, count=f"part {done}/{total}")

    def _window_done(self, done: int, windows: int) -> None:
        if self._bar.disable:
            logger.info("Window %d of %d is in the file.", done, windows)


def doctor_tables(report: Report) -> tuple[Table, Table, str]:
    """What the doctor found, as two tables and a closing line."""
    kernels = Table(title=f"Attention, [B, L, H, D] = {list(report.shape)}, bf16", title_justify="left")
    for heading in ("mode", "kernel", "version", "verdict", "cosine", "rel. L2", "ms", "× SDPA", "for a better one"):
        kernels.add_column(heading, justify="right" if heading in ("cosine", "rel. L2", "ms", "× SDPA") else "left")
    shown = ""
    for row in report.kernels:
        style = "bold" if row.first else ("" if row.supported else "dim")
        numbers = (_number(row.cosine, 4), _number(row.relative_l2, 3), _number(row.milliseconds, 2))
        mode = "" if row.mode == shown else row.mode
        kernels.add_row(
            mode, row.kernel, row.version, row.verdict, *numbers, _number(row.speedup, 2), row.advice, style=style
        )
        shown = row.mode
    linears = Table(title="Linear layers, bf16 in and out", title_justify="left")
    for heading in ("quantization", "runs as", "rel. L2", "× 16 bit"):
        linears.add_column(heading, justify="right" if heading in ("rel. L2", "× 16 bit") else "left")
    for line in report.linears:
        linears.add_row(line.quantization, line.how, _number(line.relative_l2, 3), _number(line.speedup, 2))
    supported = ", ".join(f"{name}: {'yes' if there else 'NO'}" for name, there in report.precisions.items())
    where = report.environment.get("gpu", "the CPU")
    return kernels, linears, f"On {where}, torch {report.environment['torch']}. A mode of each precision: {supported}."


def measure_tables(footage: Footage) -> list[Table | str]:
    """What was measured, a table for each speaker and one for the whole video."""
    tables: list[Table | str] = [f"{footage.name}: {summary(footage)}"]
    for heading, entries in rows(footage):
        table = Table(title=heading.capitalize(), title_justify="left")
        for name in ("name", "what", "measured", "good"):
            table.add_column(name)
        for name, quantity, value in entries:
            style = "dim" if isinstance(value, Absent) else ""
            table.add_row(name, quantity.title, shown(quantity, value), quantity.good, style=style)
        tables.append(table)
    return tables


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
