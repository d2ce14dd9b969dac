"""Objects of other packs, which use the same type names, are answered with the node that gives ours."""

from __future__ import annotations

from typing import Any

import pytest
from support.comfy_host import Host, hosted
from wanvideo_infinitetalk.wanvideo.errors import InputError


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory):
    with hosted(tmp_path_factory.mktemp("comfy")) as host:
        yield host


class WrapperVae:
    """Of another pack."""


def sockets(host: Host) -> list[tuple[str, str, str]]:
    """(node id, input, type) of every socket of a type of ours."""
    from wanvideo_infinitetalk.comfy_nodes.sockets import CARRIED

    ours = {kind.io_type for kind in CARRIED}
    return [
        (node_id, socket.id, socket.get_io_type())
        for node_id, node in host.nodes.items()
        for socket in node.GET_SCHEMA().inputs
        if socket.get_io_type() in ours
    ]


def test_every_socket_rejects_an_object_of_another_pack(host: Host) -> None:
    found = sockets(host)
    assert len(found) > 25
    names = {node.GET_SCHEMA().display_name for node in host.nodes.values()}
    for node_id, name, kind in found:
        for value in (WrapperVae(), [WrapperVae()], *([] if kind == "MULTITALK_EMBEDS" else [{"lora": 1}])):
            with pytest.raises(InputError, match="comes from a node of another pack") as error:
                host.nodes[node_id].execute(**{name: value})
            assert any(f"connect {display} of" in str(error.value) for display in names), str(error.value)


def test_every_type_of_ours_is_made_by_the_node_that_is_named(host: Host) -> None:
    from wanvideo_infinitetalk.comfy_nodes import schema
    from wanvideo_infinitetalk.comfy_nodes.sockets import CARRIED

    made: dict[str, set[str]] = {}
    for node in host.nodes.values():
        for output in node.GET_SCHEMA().outputs:
            made.setdefault(output.io_type, set()).add(node.GET_SCHEMA().display_name)
    for kind, (_, maker) in CARRIED.items():
        assert maker in made[kind.io_type], kind.io_type
    types: dict[str, Any] = {n: t for n, t in vars(schema).items() if n.endswith("Type") and n != "ComboType"}
    assert set(types.values()) == set(CARRIED)


def test_errors_show_their_short_names(host: Host) -> None:
    """ComfyUI shows a class as its module and name, but those of Python's own module as the name alone."""
    from wanvideo_infinitetalk.wanvideo import errors

    shown = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(shown) == 4
    assert {kind.__module__ for kind in shown} == {"builtins"}
