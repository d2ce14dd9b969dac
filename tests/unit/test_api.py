"""What programs import from the package, and the example of docs/api.md."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import wanvideo_infinitetalk
from wanvideo_infinitetalk.media.video import VideoFrames

ROOT = Path(__file__).parents[2]


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, wanvideo_infinitetalk; print({'torch', 'numpy', 'av', 'transformers'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


def test_every_export_is_there_and_no_other_name() -> None:
    for name in wanvideo_infinitetalk.EXPORTS:
        assert getattr(wanvideo_infinitetalk, name).__name__ == name
        assert name in wanvideo_infinitetalk.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        wanvideo_infinitetalk.nothing  # noqa: B018


@pytest.mark.slow
def test_the_example_runs_as_it_stands(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(example.strip().splitlines()) <= 15
    for name in ("portrait.png", "speech.wav"):
        shutil.copy(ROOT / "assets" / name, tmp_path)
    ran = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "2 of 2 windows" in ran.stdout
    assert len(VideoFrames(tmp_path / "talking.mp4")) == 50
