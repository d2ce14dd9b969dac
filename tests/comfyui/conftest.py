"""One ComfyUI for all tests of this folder: `make test-comfyui COMFYUI=<folder>`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from support import tiny_comfy, tiny_core
from support.comfy_server import Server
from wanvideo_infinitetalk.cli.tiny_models import TinySet


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_set: TinySet):
    folder = os.environ.get("COMFYUI")
    if not folder:
        pytest.skip("needs a ComfyUI: set COMFYUI to its folder (and COMFYUI_PYTHON to its Python)")
    if not (Path(folder) / "main.py").is_file():
        pytest.fail(f"COMFYUI={folder} holds no main.py")
    base = tmp_path_factory.mktemp("comfyui")
    tiny_comfy.fill(base)
    tiny_comfy.fill_humo(base, tiny_set)
    tiny_core.fill_core(base)
    server = Server(Path(folder), os.environ.get("COMFYUI_PYTHON", sys.executable), base)
    yield server
    server.close()
    print(server.log[-4000:])  # noqa: T201 (pytest shows it when a test failed)
