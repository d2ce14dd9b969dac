"""Workflow files: what nodes look like on the canvas, and the way from the canvas format to the API format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "example_workflows"
SUBGRAPHS = ROOT / "subgraphs"

WIDGET_TYPES = ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN")


@dataclass(frozen=True)
class Look:
    """How a node lies on the canvas: sockets [(name, type)], widgets in order, outputs [(name, type)].

    A widget named "" is one that the page adds by itself (upload buttons, control_after_generate); it is in the canvas
    format and not in the API format.
    """

    sockets: list[tuple[str, str]]
    widgets: list[str]
    outputs: list[tuple[str, str]]


CORE: dict[str, Look] = {
    "LoadImage": Look([], ["image", ""], [("IMAGE", "IMAGE"), ("MASK", "MASK")]),
    "LoadAudio": Look([], ["audio", "", ""], [("AUDIO", "AUDIO")]),
    "LoadVideo": Look([], ["file", ""], [("VIDEO", "VIDEO")]),
    "GetVideoComponents": Look([("video", "VIDEO")], [], [("images", "IMAGE"), ("audio", "AUDIO"), ("fps", "FLOAT")]),
    "CLIPVisionLoader": Look([], ["clip_name"], [("CLIP_VISION", "CLIP_VISION")]),
    "ImageScale": Look([("image", "IMAGE")], ["upscale_method", "width", "height", "crop"], [("IMAGE", "IMAGE")]),
    "CreateVideo": Look([("images", "IMAGE"), ("audio", "AUDIO")], ["fps"], [("VIDEO", "VIDEO")]),
    "SaveVideo": Look([("video", "VIDEO")], ["filename_prefix", "format", "codec"], []),
}


def look_of(schema: Any) -> Look:
    """The look of one of our nodes."""
    sockets, widgets = [], []
    for part in (False, True):
        for thing in (i for i in schema.inputs if i.optional is part):
            if thing.get_io_type() in WIDGET_TYPES:
                widgets.append(thing.id)
                if thing.id == "seed":
                    widgets.append("")  # control_after_generate
            else:
                sockets.append((thing.id, thing.get_io_type()))
    return Look(sockets, widgets, [(o.display_name, o.io_type) for o in schema.outputs])


def to_api(workflow: dict[str, Any], looks: dict[str, Look]) -> dict[str, Any]:
    """The API format of a canvas workflow; notes are left out."""
    links = {link[0]: (str(link[1]), link[2]) for link in workflow["links"]}
    prompt = {}
    for node in sorted(workflow["nodes"], key=lambda node: node["id"]):
        if node["type"] == "MarkdownNote":
            continue
        look = looks[node["type"]]
        values = node.get("widgets_values", [])
        assert len(values) == len(look.widgets), f"{node['type']} {node['id']}: {values} for {look.widgets}"
        inputs: dict[str, Any] = {name: v for name, v in zip(look.widgets, values, strict=True) if name}
        for socket in node["inputs"]:
            if socket["link"] is not None:
                inputs[socket["name"]] = list(links[socket["link"]])
        prompt[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": inputs,
            "_meta": {"title": node.get("title", node["type"])},
        }
    return prompt


def load(name: str) -> dict[str, Any]:
    """The API-format file of an example workflow."""
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))
