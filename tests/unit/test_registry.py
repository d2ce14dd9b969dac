"""What ComfyUI-Manager and the registry read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

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
    for needed in ("comfy_nodes", "wanvideo", "multitalk", "web", "locales", "example_workflows", "assets", "nodes.py"):
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


def test_the_source_archive_holds_what_the_pages_speak_of() -> None:
    lines = (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines()
    named = {name.rstrip("/") for line in lines if line.startswith(("include", "graft")) for name in line.split()[1:]}
    for folder in ("benchmarks", "docs", "example_workflows", "locales", "tests", "tools", "web"):
        assert folder in named
    assert not [name for name in named if not (ROOT / name).exists()]
