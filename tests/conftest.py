"""Options, marks and fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Nothing in the tests reaches for the internet.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
# Fakes stand for packages in this process only; tests/unit/test_selftest.py tests some in child processes.
os.environ.setdefault("INFINITETALK_TRIAL", "off")

from support.goldens import Golden, load_golden

DEFAULT_GOLDENS = Path(__file__).parent / "data" / "goldens"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--goldens", type=Path, default=DEFAULT_GOLDENS, help="folder of golden numbers (X.safetensors with X.json)"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def golden(request: pytest.FixtureRequest):
    """`golden("audio_proj")` loads that item from the folder of `--goldens`; skips when the folder lacks it."""
    folder: Path = request.config.getoption("--goldens")

    def load(item: str) -> Golden:
        if not (folder / f"{item}.safetensors").is_file():
            pytest.skip(f"{folder} holds no golden '{item}'")
        return load_golden(folder, item)

    return load
