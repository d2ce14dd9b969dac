"""The tiny checkpoints, written once for all unit tests."""

from __future__ import annotations

import pytest
from wanvideo_infinitetalk.cli.tiny_models import TinySet, make_tiny


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory: pytest.TempPathFactory) -> TinySet:
    """A complete set of random weights; tests read it and write elsewhere."""
    return make_tiny(tmp_path_factory.mktemp("tiny"), random=True)
