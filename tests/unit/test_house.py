"""The order of the house: imports point down, in no circle, and ComfyUI's API stands behind one file."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the top to the bottom: a module imports from its own layer and from those below. A longer name overrides a
# shorter one, so that `wanvideo.modules.model` is a layer above the other modules.
LAYERS = [
    "nodes",
    "comfy_nodes",
    "cli.__main__",
    "cli.parser",
    "service",
    "cli",
    "pipeline",
    "measure",
    "media",
    "multitalk.whisper",
    "multitalk.wav2vec",
    "wanvideo.encoders",
    "wanvideo.checkpoints",
    "wanvideo.modules.model",
    "multitalk.multitalk",
    "wanvideo.modules",
    "fp8_optimization",
    "wanvideo.linear",
    "wanvideo.kernels",
    "wanvideo.runtime",
    "wanvideo.errors",
]
LIBRARY = sorted({layer.split(".")[0] for layer in LAYERS})

COMFYUI = {"comfy", "comfy_api", "comfy_extras", "execution", "folder_paths", "latent_preview", "nodes", "server"}


def files() -> dict[str, Path]:
    """Module name below the package -> file, of the library."""
    paths = [path for name in LIBRARY for path in (ROOT / name).rglob("*.py")]
    paths += [ROOT / f"{name}.py" for name in LIBRARY if (ROOT / f"{name}.py").is_file()]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports_of(path: Path) -> list[ast.Import | ast.ImportFrom]:
    """All imports in a file, those inside functions too, without those for the type checker alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    return [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]


@cache
def graph() -> dict[str, set[str]]:
    """Module -> modules of the library that it imports."""
    modules = files()
    edges: dict[str, set[str]] = {}
    for module, path in modules.items():
        package = path.relative_to(ROOT).parts[:-1]
        targets = set()
        for node in imports_of(path):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = ".".join((*package[: len(package) + 1 - node.level], *filter(None, [node.module])))
                names = {f"{base}.{name.name}".lstrip(".") for name in node.names}
                targets |= {name if name in modules else base for name in names}
        edges[module] = targets & modules.keys() - {module}
    return edges


def layer_of(module: str) -> int | None:
    fitting = [layer for layer in LAYERS if f"{module}.".startswith(f"{layer}.")]
    return LAYERS.index(max(fitting, key=len)) if fitting else None


def reachable(start: str) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        fresh = graph()[waiting.pop()] - found
        found |= fresh
        waiting += fresh
    return found


def test_the_graph_is_seen() -> None:
    edges = graph()
    assert "wanvideo.modules.backends" in edges["wanvideo.modules.attention"]
    assert "cli.doctor" in edges["comfy_nodes.kernels"], "imports inside functions count"
    assert sum(map(len, edges.values())) > 200
    assert {module for module in edges if layer_of(module) is None} == {"multitalk", "wanvideo"}, "name their layer"
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"assets", "benchmarks"}
    assert packages <= set(LIBRARY), "name their layer"


def test_no_module_imports_itself_by_a_circle() -> None:
    circles = {module: sorted(m for m in reachable(module) if module in reachable(m)) for module in graph()}
    assert {module: circle for module, circle in circles.items() if circle} == {}


def test_imports_point_down() -> None:
    up = []
    for module, targets in graph().items():
        for target in targets:
            here, there = layer_of(module), layer_of(target)
            if here is not None and there is not None and there < here:
                up.append(f"{module} -> {target}")
    assert sorted(up) == []


def test_one_file_knows_comfyui() -> None:
    """Absolute imports of ComfyUI's modules; `from .nodes import` is our own."""
    found = set()
    for module, path in {"(package)": ROOT / "__init__.py", **files()}.items():
        for node in imports_of(path):
            if isinstance(node, ast.Import):
                names = [name.name for name in node.names]
            else:
                names = [] if node.level else [node.module or ""]
            if any(name.split(".")[0] in COMFYUI for name in names):
                found.add(module)
    assert found == {"comfy_nodes.comfyui"}


@pytest.mark.parametrize("module", ["torch", "comfy", "comfy_api", "folder_paths"])
def test_the_package_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, wanvideo_infinitetalk; sys.exit({module!r} in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
