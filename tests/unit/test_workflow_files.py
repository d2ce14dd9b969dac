"""The example workflows as files: in step with the nodes, of core nodes and ours only."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support import make_workflows, workflows
from wanvideo_infinitetalk.pipeline.presets import preset_values


@pytest.fixture(scope="module")
def built() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    return make_workflows.build()


def test_files_are_what_the_builder_makes(built) -> None:
    assert workflows.names() == sorted(built)
    for name, (drawn, prompt) in built.items():
        assert json.loads((workflows.FOLDER / f"{name}.json").read_text(encoding="utf-8")) == drawn, name
        assert workflows.load(name) == prompt, name


@pytest.mark.parametrize("name", workflows.names())
def test_every_workflow_has_a_thumbnail_and_ends_in_a_saved_video(name: str) -> None:
    assert (workflows.FOLDER / f"{name}.jpg").stat().st_size > 1000
    prompt = workflows.load(name)
    types = {node["class_type"] for node in prompt.values()}
    assert {"CreateVideo", "SaveVideo"} <= types
    (video,) = [node for node in prompt.values() if node["class_type"] == "CreateVideo"]
    assert "audio" in video["inputs"]


def test_step_loras_have_one_shift() -> None:
    """Workflows for 480p, the preset and the command: a user who goes from one to the other gets the same video."""
    fast = preset_values("fast")
    for name in workflows.names():
        prompt = workflows.load(name)
        if not any(node["class_type"] == "InfiniteTalkLora" for node in prompt.values()):
            continue
        (sampler,) = [node["inputs"] for node in prompt.values() if node["class_type"] == "InfiniteTalkSampler"]
        for setting in ("steps", "shift", "cfg"):
            assert sampler[setting] == fast[setting], (name, setting)
