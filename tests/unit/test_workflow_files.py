"""The example workflows as files: in step with the nodes, of core nodes and ours only."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from support import make_workflows, workflows
from wanvideo_infinitetalk.pipeline.presets import preset_values


@pytest.fixture(scope="module")
def written() -> dict[Path, Any]:
    return make_workflows.written()


def test_files_are_what_the_builder_makes(written) -> None:
    folders = (workflows.FOLDER, workflows.FOLDER / "api", workflows.SUBGRAPHS)
    assert sorted(path for folder in folders for path in folder.glob("*.json")) == sorted(written)
    for path, content in written.items():
        assert json.loads(path.read_text(encoding="utf-8")) == content, path.name


def canvases(written: dict[Path, Any]) -> list[dict[str, Any]]:
    return [content for path, content in written.items() if path.parent == workflows.FOLDER]


def test_every_model_is_named_with_its_link_and_folder(written) -> None:
    """All widgets that name a file but the tiny ones; the links are those of the READMEs."""
    pages = [(workflows.ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md")]
    seen = set()
    for content in canvases(written):
        for node in content["nodes"]:
            named = {value for value in node["widgets_values"] if str(value).endswith((".safetensors", ".gguf"))}
            models = node["properties"].get("models", [])
            assert {model["name"] for model in models} == named - set(make_workflows.TINY.values()), node["type"]
            for model in models:
                assert all(f"({model['url']})" in page for page in pages), model["url"]
                seen.add(model["name"])
    assert seen == set(make_workflows.REAL.values())


def test_every_node_states_its_pack_and_version(written) -> None:
    nodes = [node for content in canvases(written) for node in content["nodes"] if node["type"] != "MarkdownNote"]
    for node in nodes:
        pack = make_workflows.PACK if node["type"].startswith("InfiniteTalk") else make_workflows.CORE_PACK
        assert (node["properties"]["cnr_id"], node["properties"]["ver"]) == pack


def test_groups_hold_all_nodes_and_do_not_overlap(written) -> None:
    for content in canvases(written):
        frames = [group["bounding"] for group in content["groups"]]
        assert len(frames) == 3
        for node in content["nodes"]:
            (x, y), (width, height) = node["pos"], node["size"]
            inside = [
                left < x and top < y and x + width < left + wide and y + height < top + high
                for left, top, wide, high in frames
            ]
            assert sum(inside) == (node["type"] != "MarkdownNote"), node["type"]
        for one, other in itertools.pairwise(sorted(frames)):
            assert one[0] + one[2] <= other[0]


def test_notes_are_in_both_languages(written) -> None:
    for content in canvases(written):
        english, chinese = [n["widgets_values"][0] for n in content["nodes"] if n["type"] == "MarkdownNote"]
        assert not re.search("[\u4e00-\u9fff]", english)
        assert re.search("[\u4e00-\u9fff]", chinese)
        assert re.findall(r"\(http[^)]*\)", english) == re.findall(r"\(http[^)]*\)", chinese)


def test_the_blueprint_is_the_talking_picture(written) -> None:
    """Put back into a workflow, its nodes get the inputs that they have there."""
    (content,) = [content for path, content in written.items() if path.parent == workflows.SUBGRAPHS]
    (inner,) = content["definitions"]["subgraphs"]
    (node,) = content["nodes"]
    assert node["type"] == inner["id"]
    prompt = workflows.load("infinitetalk_talking_picture")
    outside = {name: i for i, (key, name) in enumerate(make_workflows.OUTSIDE.items())}
    assert [entry["name"] for entry in inner["inputs"]] == list(outside)
    nodes = {node["id"]: node for node in inner["nodes"]}
    for link in inner["links"]:
        if link["target_id"] == make_workflows.BORDERS["output"]:
            assert nodes[link["origin_id"]]["type"] == "CreateVideo"
            continue
        target = nodes[link["target_id"]]
        socket = target["inputs"][link["target_slot"]]
        assert socket["link"] == link["id"]
        source, slot = prompt[str(target["id"])]["inputs"][socket["name"]]
        if link["origin_id"] == make_workflows.BORDERS["input"]:
            entry = inner["inputs"][link["origin_slot"]]
            assert link["id"] in entry["linkIds"]
            assert prompt[source]["class_type"] == {"image": "LoadImage", "audio": "LoadAudio"}[entry["name"]]
        else:
            assert (str(link["origin_id"]), link["origin_slot"]) == (source, slot)
    kept = {node_id for node_id, n in prompt.items() if n["class_type"] not in ("LoadImage", "LoadAudio", "SaveVideo")}
    assert {str(node_id) for node_id in nodes} == kept
    for node_id, widget in node["properties"]["proxyWidgets"]:
        assert widget in prompt[node_id]["inputs"]


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
