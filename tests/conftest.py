"""Options, marks and fixtures that all tests share."""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

# Nothing in the tests reaches for the internet.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
# Fakes stand for packages in this process only; tests/unit/test_selftest.py tests some in child processes.
os.environ.setdefault("INFINITETALK_TRIAL", "off")

from support.goldens import Golden, load_golden
from wanvideo_infinitetalk.cli.tiny_models import TinySet, make_tiny

DEFAULT_GOLDENS = Path(__file__).parent / "data" / "goldens"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--goldens", type=Path, default=DEFAULT_GOLDENS, help="folder of golden numbers (X.safetensors with X.json)"
    )
    parser.addoption(
        "--slow", type=float, metavar="SHARE", help="share of the slow tests to run: 0, or 1 where -m names slow"
    )
    parser.addoption("--slow-seed", type=int, default=0, metavar="N", help="which ones, where the share is below 1")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.slow is None:
        config.option.slow = float("slow" in config.option.markexpr)


def pytest_report_header(config: pytest.Config) -> str:
    return f"slow tests: --slow {config.option.slow:g} --slow-seed {config.option.slow_seed}"


@pytest.hookimpl(trylast=True)  # behind -k and -m, so that the share is of what they leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = [item for item in items if "slow" in item.keywords]
    count = math.ceil(config.option.slow * len(slow))
    kept = set(random.Random(config.option.slow_seed).sample(slow, count))
    left_out = [item for item in slow if item not in kept]
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The counts that tests have recorded, added up."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    counts: Counter[str] = Counter()
    for report in reports:
        if getattr(report, "when", None) == "call":
            counts.update({name: n for name, n in report.user_properties if isinstance(n, int)})
    if counts:
        terminalreporter.write_line(", ".join(f"{n} {name}" for name, n in counts.items()))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory: pytest.TempPathFactory) -> TinySet:
    """A complete set of random weights; tests read it and write elsewhere."""
    return make_tiny(tmp_path_factory.mktemp("tiny"), random=True)


@pytest.fixture
def golden(request: pytest.FixtureRequest):
    """`golden("audio_proj")` loads that item from the folder of `--goldens`; skips when the folder lacks it."""
    folder: Path = request.config.getoption("--goldens")

    def load(item: str) -> Golden:
        if not (folder / f"{item}.safetensors").is_file():
            pytest.skip(f"{folder} holds no golden '{item}'")
        return load_golden(folder, item)

    return load
