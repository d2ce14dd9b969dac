"""Beside ComfyUI-WanVideoWrapper its node ids are its own; without it they are aliases of our nodes."""

from __future__ import annotations

import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from support.comfy_host import Host, hosted

SETTING = "INFINITETALK_WRAPPER_IDS"


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SETTING, raising=False)


def ids(host: Host) -> tuple[set[str], set[str]]:
    """Ours, and the wrapper's."""
    ours = {node_id for node_id in host.nodes if node_id.startswith("InfiniteTalk")}
    return ours, set(host.nodes) - ours


@pytest.mark.parametrize(
    ("folder", "setting", "aliased", "line"),
    [
        (None, None, True, "it is not installed"),
        ("ComfyUI-WanVideoWrapper", None, False, "ComfyUI-WanVideoWrapper"),
        ("comfyui_wanvideowrapper-main", None, False, "comfyui_wanvideowrapper-main"),
        ("ComfyUI-WanVideoWrapper.disabled", None, True, "it is not installed"),
        ("ComfyUI-KJNodes", None, True, "it is not installed"),
        ("ComfyUI-WanVideoWrapper", "1", True, f"{SETTING}=1"),
        (None, "0", False, f"{SETTING}=0"),
        (None, "yes", True, f"{SETTING}=yes is not read"),
    ],
)
def test_who_has_the_wrappers_ids(folder, setting, aliased, line, tmp_path: Path, monkeypatch, caplog) -> None:
    (tmp_path / "custom_nodes").mkdir()
    if folder is not None:
        (tmp_path / "custom_nodes" / folder).mkdir()
    if setting is not None:
        monkeypatch.setenv(SETTING, setting)
    with caplog.at_level(logging.INFO), hosted(tmp_path) as host:
        ours, others = ids(host)
    assert len(ours) > 30
    assert bool(others) == aliased
    assert line in caplog.text
    assert sum("InfiniteTalk:" in record.message for record in caplog.records) == 1


def test_this_pack_is_no_neighbor_of_its_own(tmp_path: Path) -> None:
    """It may lie in a folder of the wrapper's name, in whose place it was put."""
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "custom_nodes/ComfyUI-WanVideoWrapper").symlink_to(Path(__file__).parents[2], target_is_directory=True)
    with hosted(tmp_path) as host:
        assert ids(host)[1]


def test_a_pack_that_was_loaded_before_keeps_its_ids(tmp_path: Path, monkeypatch) -> None:
    """Under whatever name its folder goes."""
    loaded = types.ModuleType("nodes")
    loaded.NODE_CLASS_MAPPINGS = {"WanVideoSampler": object}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nodes", loaded)
    with hosted(tmp_path) as host:
        assert not ids(host)[1]


def test_aliases_are_the_same_classes(tmp_path: Path) -> None:
    with hosted(tmp_path) as host:
        from wanvideo_infinitetalk.comfy_nodes.neighbors import PUBLIC_IDS

        for own, (public_id, display_name) in PUBLIC_IDS.items():
            ours, alias = host.nodes[own], host.nodes[public_id]
            assert issubclass(alias, ours)
            one, other = ours.GET_SCHEMA(), alias.GET_SCHEMA()
            assert (other.node_id, other.display_name) == (public_id, display_name)
            assert one.display_name.startswith("InfiniteTalk ")
            assert other.category != one.category
            public = [widget for widget in one.inputs if widget.id not in getattr(ours, "PUBLIC", {})]
            assert [widget.as_dict() for widget in public] == [widget.as_dict() for widget in other.inputs]


def test_missing_nodes_are_replaced_where_comfyui_can(tmp_path: Path, monkeypatch) -> None:
    registered: list[Any] = []

    class Replacements:
        async def register(self, replacement: Any) -> None:
            registered.append(replacement)

    with hosted(tmp_path):
        from wanvideo_infinitetalk.comfy_nodes import comfyui
        from wanvideo_infinitetalk.comfy_nodes.neighbors import PUBLIC_IDS
        from wanvideo_infinitetalk.nodes import InfiniteTalkExtension

        run(InfiniteTalkExtension().on_load())
        assert not registered  # an older ComfyUI
        api = types.SimpleNamespace(node_replacement=Replacements())
        monkeypatch.setattr(sys.modules["comfy_api.latest"], "ComfyAPI", lambda: api, raising=False)
        monkeypatch.setattr(comfyui.io, "NodeReplace", lambda *given: given, raising=False)
        monkeypatch.setattr(comfyui.io, "WidgetInput", comfyui.io.Input, raising=False)
        run(InfiniteTalkExtension().on_load())
        assert {(old, new) for new, old, _ in registered} == {(old, new) for new, (old, _) in PUBLIC_IDS.items()}


def run(coroutine: Any) -> None:
    with pytest.raises(StopIteration):
        coroutine.send(None)


def test_the_folder_of_speech_models_is_added_to_those_that_others_name(tmp_path: Path) -> None:
    """Another pack, or extra_model_paths.yaml, may have registered the kind before."""
    with hosted(tmp_path):
        from wanvideo_infinitetalk.comfy_nodes import comfyui as host_module

        known = sys.modules["folder_paths"].folder_names_and_paths
        own = str(tmp_path / "models/wav2vec2")
        assert known["wav2vec2"][0] == [own]
        known["wav2vec2"] = (["/elsewhere"], {".safetensors"})
        for _ in range(2):
            host_module.register_folders()
            assert known["wav2vec2"][0] == ["/elsewhere", own]
