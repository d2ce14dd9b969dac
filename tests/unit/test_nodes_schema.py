"""Every node is what saved workflows expect: ids, names, types, order, defaults, ranges, outputs."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from support.comfy_host import Host, hosted

ROOT = Path(__file__).parents[2]
PUBLIC: dict[str, Any] = json.loads((ROOT / "tests/data/nodes.json").read_text())
NUMERIC = ("default", "min", "max", "step", "round")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory):
    with hosted(tmp_path_factory.mktemp("comfy")) as host:
        yield host


def test_all_nodes_are_there_and_no_others(host: Host) -> None:
    from wanvideo_infinitetalk.comfy_nodes.neighbors import PUBLIC_IDS
    from wanvideo_infinitetalk.comfy_nodes.saved import SAVED_NODES

    ours = {node_id for node_id in host.nodes if node_id.startswith("InfiniteTalk")}
    assert set(host.nodes) == ours | set(PUBLIC)
    saved = {node.GET_SCHEMA().node_id for node in SAVED_NODES}
    assert {public_id for public_id, _ in PUBLIC_IDS.values()} | saved == set(PUBLIC)
    assert not {public_id for public_id, _ in PUBLIC_IDS.values()} & saved
    assert set(PUBLIC_IDS) <= ours


@pytest.mark.parametrize("node_id", PUBLIC)
def test_inputs_are_the_public_ones(host: Host, node_id: str) -> None:
    schema, public = host.nodes[node_id].GET_SCHEMA(), PUBLIC[node_id]
    assert schema.display_name == public["display_name"]
    assert schema.is_output_node == public["output_node"]
    for section, optional in (("required", False), ("optional", True)):
        names = [i.id for i in schema.inputs if i.optional is optional]
        assert names == public["input_order"].get(section, []), section
    assert [h.name for h in schema.hidden] == public["input_order"].get("hidden", [])
    for widget in schema.inputs:
        expected = public["inputs"][widget.id]
        options = widget.as_dict()
        assert widget.get_io_type() == expected["type"], widget.id
        for key in NUMERIC:
            assert options.get(key) == expected.get(key), f"{widget.id} {key}"
        assert options.get("multiline", False) == expected.get("multiline", False)
        assert options.get("advanced", False) == expected.get("advanced", False), widget.id


@pytest.mark.parametrize("node_id", PUBLIC)
def test_combos_begin_with_the_public_values(host: Host, node_id: str) -> None:
    for widget in host.nodes[node_id].GET_SCHEMA().inputs:
        public = PUBLIC[node_id]["inputs"][widget.id]
        if public["type"] == "COMBO" and isinstance(public["options"], list):
            values = widget.options["options"]
            assert values[: len(public["options"])] == public["options"]
            assert len(set(values)) == len(values)


@pytest.mark.parametrize("node_id", PUBLIC)
def test_outputs_are_the_public_ones(host: Host, node_id: str) -> None:
    outputs = host.nodes[node_id].GET_SCHEMA().outputs
    assert [{"name": o.display_name, "type": o.io_type} for o in outputs] == PUBLIC[node_id]["outputs"]


def test_every_node_is_explained(host: Host) -> None:
    for node_id, node in host.nodes.items():
        schema = node.GET_SCHEMA()
        assert len(schema.description) > 20, node_id
        assert len(schema.search_aliases) >= 2, node_id
        assert any(not alias.isascii() for alias in schema.search_aliases), f"{node_id} has no Chinese alias"
        for thing in (*schema.inputs, *schema.outputs):
            assert thing.tooltip, f"{node_id}: {getattr(thing, 'id', thing.display_name)}"
            assert len(thing.tooltip) >= 8


def test_our_own_values_stand_behind_the_public_ones(host: Host) -> None:
    loader = {i.id: i for i in host.nodes["InfiniteTalkModelLoader"].GET_SCHEMA().inputs}
    assert {"auto", "sageattn_3_fp4", "sageattn_3_fp8"} <= set(loader["attention_mode"].options["options"][9:])
    assert "fp4_scaled" in loader["quantization"].options["options"][9:]


def test_all_of_our_schedulers_can_be_chosen(host: Host) -> None:
    from wanvideo_infinitetalk.comfy_nodes import sampling
    from wanvideo_infinitetalk.pipeline.schedulers import SCHEDULERS

    sampler = {i.id: i for i in host.nodes["InfiniteTalkSampler"].GET_SCHEMA().inputs}
    offered = set(sampler["scheduler"].options["options"])
    assert set(SCHEDULERS) <= offered
    assert offered - set(SCHEDULERS) == set(sampling.INSTEAD)
    assert set(sampling.INSTEAD.values()) <= set(SCHEDULERS)


def test_a_foreign_socket_is_rejected_when_connected(host: Host) -> None:
    from wanvideo_infinitetalk.comfy_nodes.schema import FOREIGN, reject_foreign
    from wanvideo_infinitetalk.wanvideo.errors import InputError

    rejected = 0
    for node_id in PUBLIC:
        node = host.nodes[node_id]
        for socket in node.GET_SCHEMA().inputs:
            if socket.get_io_type() in FOREIGN:
                reject_foreign(node, {socket.id: None})
                with pytest.raises(InputError, match=f"disconnect {socket.id}"):
                    reject_foreign(node, {socket.id: object()})
                rejected += 1
    assert rejected == len([i for n in PUBLIC.values() for i in n["inputs"].values() if i["type"] in FOREIGN])
    with pytest.raises(TypeError, match="has no input 'nonsense'"):
        reject_foreign(host.nodes["InfiniteTalkSampler"], {"nonsense": 1})


def test_a_widget_that_an_older_file_lacks_has_its_default(host: Host) -> None:
    from wanvideo_infinitetalk.comfy_nodes.saved import UNSUPPORTED

    sampler = inspect.signature(host.nodes["InfiniteTalkSampler"].execute).parameters
    for node_id, node in host.nodes.items():
        taken = {**sampler, **inspect.signature(node.execute).parameters}  # some pass their inputs on to it
        for widget in node.GET_SCHEMA().inputs if node_id not in UNSUPPORTED else ():
            if widget.optional and "default" in widget.as_dict():
                assert taken[widget.id].default == widget.as_dict()["default"], f"{node.__name__} {widget.id}"
