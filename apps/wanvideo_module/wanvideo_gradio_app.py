"""The page: `python apps/wanvideo_module/wanvideo_gradio_app.py [DIR] [options of infinitetalk serve]`.

It is `infinitetalk serve DIR --page`; without model files it starts with the demo's tiny models.
"""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "infinitetalk-service"
"""Where the queue and the videos are kept, where none is named."""


def main(argv: list[str]) -> int:
    """Start the page, or say on stderr how to install what it needs; returns an exit code."""
    if importlib.util.find_spec("wanvideo_infinitetalk") is None:
        install = f'"{sys.executable}" -m pip install "{ROOT}{os.sep}.[web]"'
        sys.stderr.write(f"The package is not installed in this Python. Run {install}\n")
        return 2
    from wanvideo_infinitetalk.cli.parser import main as infinitetalk

    if not argv or argv[0].startswith("-"):
        argv = [FOLDER, *argv]
    return infinitetalk(["serve", *argv, "--page"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
