"""Whether what `requirements.txt` names is installed, asked before anything else is imported.

A pack that loads without its packages fails at the first Run, on whichever node needs one. ComfyUI shows a pack that
raises ImportError as IMPORT FAILED, and ComfyUI-Manager offers to install its requirements again.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

__all__ = ["check_requirements", "missing_requirements"]


def check_requirements(file: Path) -> None:
    """Raises ImportError, with the command that installs them, when packages of a requirements file are missing."""
    missing = missing_requirements(file.read_text(encoding="utf-8"))
    if missing:
        # Windows portable brings a Python of its own, which takes -s to leave the user's packages alone.
        option = " -s" if Path(sys.executable).parent.name == "python_embeded" else ""
        raise ImportError(
            f"Python packages are missing or too old: {', '.join(missing)}. Close ComfyUI, run this command, and start "
            f'it again: "{sys.executable}"{option} -m pip install -r "{file}"'
        )


def missing_requirements(text: str) -> list[str]:
    """What of the requirements is not installed as they ask, such as "av 15.0 (>=17.1 is needed)"."""
    found = []
    for line in text.splitlines():
        needed = re.match(r"([A-Za-z0-9._-]+)\s*(>=\s*([0-9.]+))?", line.partition("#")[0].strip())
        if needed is None:
            continue
        name, at_least = needed[1], needed[3]
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            found.append(f"{name} (not installed)")
            continue
        if at_least is not None and _numbers(installed) < _numbers(at_least):
            found.append(f"{name} {installed} (>={at_least} is needed)")
    return found


def _numbers(version: str) -> list[int]:
    """The release part of a version, without zeros at its end, to compare: "2.9.0+cpu" is [2, 9]."""
    numbers = [int(number) for number in re.match(r"[0-9.]*", version)[0].split(".") if number]  # type: ignore[index]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return numbers
