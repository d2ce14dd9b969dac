"""What ComfyUI-Manager and the registry read."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import make_workflows

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project() -> dict[str, Any]:
    if sys.version_info < (3, 11):
        pytest.skip("reads TOML with Python 3.11")
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_requirements_are_the_dependencies_without_torch(project) -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in project["project"]["dependencies"] if not line.startswith("torch>")]
    assert [line for line in lines if not line.startswith("#")] == wanted


def test_no_kernel_package_is_a_hard_need(project) -> None:
    """ComfyUI pins comfy-kitchen exactly; the others need a matching torch and CUDA."""
    for line in project["project"]["dependencies"]:
        assert not any(name in line for name in ("sage", "flash", "triton", "kitchen")), line


def test_nothing_that_the_pack_needs_is_ignored() -> None:
    ignored = (ROOT / ".comfyignore").read_text(encoding="utf-8").split()
    for needed in (
        "comfy_nodes",
        "wanvideo",
        "multitalk",
        "web",
        "locales",
        "example_workflows",
        "subgraphs",
        "assets",
        "nodes.py",
    ):
        assert (ROOT / needed).exists()
        assert not any(line.rstrip("/") == needed for line in ignored)


def test_the_registry_reads_the_entry(project) -> None:
    """As its specification wants it: a license in a table, a name without ComfyUI, classifiers that it knows."""
    assert project["project"]["license"] == {"text": "Apache-2.0"}
    assert "comfyui" not in project["project"]["name"]
    systems = ("Microsoft", "POSIX", "MacOS", "OS Independent")
    for classifier in project["project"]["classifiers"]:
        kind, _, value = classifier.partition(" :: ")
        assert kind != "Operating System" or value.startswith(systems)
        assert kind != "Environment" or value == "GPU :: NVIDIA CUDA"
    assert project["tool"]["comfy"]["DisplayName"] == "InfiniteTalk"


def test_icon_and_banner_are_what_the_registry_shows_and_what_the_code_draws() -> None:
    """A square of at most 400 pixels, and 21 : 9."""
    spec = importlib.util.spec_from_file_location("draw_icon", ROOT / "assets/draw_icon.py")
    assert spec is not None
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)  # type: ignore[union-attr]
    for name, drawn in (("icon", draw.icon()), ("banner", draw.banner())):
        kept = Image.open(ROOT / f"docs/{name}.png").convert("RGB")
        assert kept.size == drawn.size
        assert np.abs(np.asarray(kept, dtype=float) - np.asarray(drawn, dtype=float)).mean() < 1
    assert draw.ICON[0] == draw.ICON[1] <= 400
    assert draw.BANNER[0] * 9 == draw.BANNER[1] * 21


def test_the_templates_name_the_pack_as_the_registry_does(project) -> None:
    assert (project["project"]["name"], project["project"]["version"]) == make_workflows.PACK
    assert project["tool"]["comfy"]["requires-comfyui"].removeprefix(">=") == make_workflows.CORE_PACK[1]


def test_the_source_archive_holds_what_the_pages_speak_of() -> None:
    lines = (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines()
    named = {name.rstrip("/") for line in lines if line.startswith(("include", "graft")) for name in line.split()[1:]}
    for folder in ("benchmarks", "docs", "example_workflows", "locales", "subgraphs", "tests", "tools", "web"):
        assert folder in named
    assert not [name for name in named if not (ROOT / name).exists()]
