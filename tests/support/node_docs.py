"""Writes what ComfyUI shows about our nodes, from their schemas: locales/en and the tables of web/docs.

    cd tests && python -m support.node_docs

Chinese is translated by hand in locales/zh/nodeDefs.json; the Chinese pages take their tables from there. The prose of
a page, between its title and its first table, is written by hand too and kept. What belongs to the wrapper's ids is
copied from our nodes of which they are aliases.
"""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from support.comfy_host import hosted
from support.workflows import ROOT

DOCS, LOCALES = ROOT / "web/docs", ROOT / "locales"

WORDS = {
    "en": {
        "inputs": "Inputs",
        "outputs": "Outputs",
        "columns": "Name | Type | Default | Meaning",
        "out": "Name | Type | Meaning",
        "optional": "optional",
    },
    "zh": {
        "inputs": "输入",
        "outputs": "输出",
        "columns": "名称 | 类型 | 默认值 | 说明",
        "out": "名称 | 类型 | 说明",
        "optional": "可选",
    },
}


def node_schemas() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, hosted(Path(folder)) as host:
        return {node_id: node.GET_SCHEMA() for node_id, node in host.nodes.items()}


def english(schemas: dict[str, Any]) -> dict[str, Any]:
    """locales/en/nodeDefs.json."""
    return {
        node_id: {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {i.id: {"name": i.id, "tooltip": i.tooltip} for i in schema.inputs},
            "outputs": {str(n): {"name": o.display_name, "tooltip": o.tooltip} for n, o in enumerate(schema.outputs)},
        }
        for node_id, schema in schemas.items()
    }


def translations(language: str) -> dict[str, Any]:
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


@cache
def own_ids() -> dict[str, str]:
    """The wrapper's id -> that of our node."""
    with tempfile.TemporaryDirectory() as folder, hosted(Path(folder)):
        from wanvideo_infinitetalk.comfy_nodes.neighbors import PUBLIC_IDS

        return {public_id: own for own, (public_id, _) in PUBLIC_IDS.items()}


def is_ours(node_id: str) -> bool:
    """Whether the id is this pack's own, and not the wrapper's."""
    return node_id.startswith("InfiniteTalk")


def with_aliases(texts: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """Translations of all nodes: those of our ids, and copies of them for the wrapper's.

    Locales hold for an id, whichever pack has it; so what the wrapper's nodes are called is not of this pack, and in
    English, which the schemas hold anyway, there is none for them.
    """
    own = own_ids()

    def of(node_id: str) -> Any:
        if node_id not in own:
            return texts[node_id]
        found = texts[own[node_id]]
        inputs = {i.id: found["inputs"][i.id] for i in schemas[node_id].inputs}
        return {**found, "display_name": found["display_name"].replace("InfiniteTalk", "WanVideo"), "inputs": inputs}

    return {node_id: of(node_id) for node_id in schemas}


def tables(schema: Any, texts: dict[str, Any], language: str) -> str:
    """The generated part of a page."""
    words = WORDS[language]
    lines = [f"## {words['inputs']}", "", f"| {words['columns']} |", "|---|---|---|---|"]
    for i in schema.inputs:
        kind = i.get_io_type() + (f", {words['optional']}" if i.optional else "")
        default = i.as_dict().get("default")
        shown = "" if default in (None, "") else f"`{default}`"
        lines.append(f"| `{i.id}` | {kind} | {shown} | {texts['inputs'][i.id]['tooltip']} |")
    lines += ["", f"## {words['outputs']}", "", f"| {words['out']} |", "|---|---|---|"]
    for n, o in enumerate(schema.outputs):
        lines.append(f"| `{o.display_name}` | {o.io_type} | {texts['outputs'][str(n)]['tooltip']} |")
    return "\n".join(lines) + "\n"


def page_path(node_id: str, language: str) -> Path:
    return DOCS / f"{node_id}.md" if language == "en" else DOCS / node_id / f"{language}.md"


def page(node_id: str, schema: Any, texts: dict[str, Any], language: str) -> str:
    """The whole page: title, description, the prose that is there already, tables."""
    path = page_path(own_ids().get(node_id, node_id), language)
    first_table = f"## {WORDS[language]['inputs']}"
    prose = ""
    if path.is_file():
        before = path.read_text(encoding="utf-8").split(first_table)[0]
        prose = "\n\n".join(before.strip().split("\n\n")[2:]).strip()
    head = [f"# {texts['display_name']}", texts["description"], *([prose] if prose else [])]
    return "\n\n".join(head) + "\n\n" + tables(schema, texts, language)


def pages() -> dict[Path, str]:
    """Path -> content of every page."""
    schemas = node_schemas()
    made = {}
    for language in WORDS:
        texts = english(schemas) if language == "en" else translations(language)
        for node_id, schema in schemas.items():
            made[page_path(node_id, language)] = page(node_id, schema, texts[node_id], language)
    return made


def main() -> None:
    own = {node_id: schema for node_id, schema in node_schemas().items() if is_ours(node_id)}
    texts = json.dumps(english(own), indent=2, ensure_ascii=False) + "\n"
    (LOCALES / "en").mkdir(parents=True, exist_ok=True)
    (LOCALES / "en/nodeDefs.json").write_text(texts, encoding="utf-8")
    chinese = json.dumps(with_aliases(translations("zh"), node_schemas()), indent=2, ensure_ascii=False) + "\n"
    (LOCALES / "zh/nodeDefs.json").write_text(chinese, encoding="utf-8")
    for path, content in pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
