"""Print the lower end of every dependency range in pyproject.toml as an exact pin, one per line."""

import re
import sys
from pathlib import Path


def lower_bounds(pyproject: str) -> list[str]:
    """`["torch==2.8", ...]` from the text of a pyproject.toml whose dependencies are written `"name>=version"`."""
    block = re.search(r"^dependencies = \[(.*?)^\]", pyproject, re.MULTILINE | re.DOTALL)
    if block is None:
        raise SystemExit("pyproject.toml has no dependencies table")
    return [f"{name}=={version}" for name, version in re.findall(r'"([\w.-]+)>=([\w.]+)"', block[1])]


if __name__ == "__main__":
    sys.stdout.write("\n".join(lower_bounds(Path("pyproject.toml").read_text())) + "\n")
