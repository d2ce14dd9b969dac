"""A pack whose packages are missing says so when ComfyUI starts, with the command that installs them."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from wanvideo_infinitetalk.comfy_nodes import requirements
from wanvideo_infinitetalk.comfy_nodes.requirements import check_requirements, missing_requirements

ROOT = Path(__file__).parents[2]


def test_what_is_installed_here_suffices() -> None:
    check_requirements(ROOT / "requirements.txt")


@pytest.mark.parametrize(
    ("line", "installed", "missing"),
    [
        ("pyloudnorm>=0.1.1", None, ["pyloudnorm (not installed)"]),
        ("av>=17.1", "17.0.9", ["av 17.0.9 (>=17.1 is needed)"]),
        ("av>=17.1", "17.1.0", []),
        ("av>=17.1", "18.0rc1", []),
        ("torch>=2.8", "2.8.0+cu128", []),
        ("torch>=2.8", "2.10.0", []),
        ("rich>=13", "12", ["rich 12 (>=13 is needed)"]),
        ("ftfy", "1", []),
        ("# a comment", None, []),
        ("", None, []),
        ("pillow>=10.1  # images", "9.0", ["pillow 9.0 (>=10.1 is needed)"]),
    ],
)
def test_what_is_missing(line: str, installed: str | None, missing: list[str], monkeypatch) -> None:
    def version(name: str) -> str:
        assert line.startswith(name)
        if installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(requirements.metadata, "version", version)
    assert missing_requirements(line) == missing


@pytest.mark.parametrize(
    ("python", "option"), [("/home/me/venv/bin/python", ""), ("/ComfyUI portable/python_embeded/python.exe", " -s")]
)
def test_the_command_is_the_one_to_type(python: str, option: str, tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "requirements.txt"
    file.write_text("no-such-package>=1\nno-other\npackaging\n")
    monkeypatch.setattr(sys, "executable", python)
    with pytest.raises(ImportError) as error:
        check_requirements(file)
    sentence = str(error.value)
    assert "no-such-package (not installed), no-other (not installed)." in sentence
    assert sentence.endswith(f'"{python}"{option} -m pip install -r "{file}"')


def test_nothing_else_is_imported_before() -> None:
    """As in ComfyUI, where `folder_paths` is loaded; with a package that is not there the pack's import ends."""
    code = (
        "import sys, types, importlib.metadata as m\n"
        "sys.modules['folder_paths'] = types.ModuleType('folder_paths')\n"
        "real = m.version\n"
        "def version(name):\n"
        "    if name == 'pyloudnorm': raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
        "try:\n"
        "    import wanvideo_infinitetalk\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    sentence, loaded = ran.stdout.strip().splitlines()
    assert sentence.startswith("Python packages are missing or too old: pyloudnorm (not installed). Close ComfyUI, run")
    assert loaded == "False False"
