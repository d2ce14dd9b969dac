"""The GPU that the suite runs on: its facts in the report, tiny models for it, and no error left behind by a test."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from importlib import metadata

import pytest
import torch
from wanvideo_infinitetalk.wanvideo.kernels.selftest import environment

FAULTING = ("test_contract_truth", "test_raw_calls")
"""Files whose child processes fault on purpose; last, because a driver may have enough of it."""

PACKAGES = ("triton", "transformers", "diffusers", "comfy-kitchen", "sageattention", "sageattn3", "flash-attn")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FAULTING.index(item.path.stem) + 1 if item.path.stem in FAULTING else 0)


@pytest.fixture(scope="session", autouse=True)
def _facts_of_the_run(record_testsuite_property: Callable[[str, object], None]) -> None:
    """GPU, driver, versions and date, as properties of the JUnit file that tools/cuda_results.py reads."""
    if not torch.cuda.is_available():
        return
    facts = {"date": dt.date.today().isoformat(), **environment(None, torch.device("cuda", 0))}
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    for name, value in facts.items():
        record_testsuite_property(name, value)


@pytest.fixture(autouse=True)
def _no_cuda_error() -> Iterator[None]:
    """A kernel that faults is found in the test that launched it, not in a later one."""
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
