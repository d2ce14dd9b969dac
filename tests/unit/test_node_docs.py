"""What ComfyUI shows about our nodes is there, in both languages, and in step with the schemas."""

from __future__ import annotations

import re
from typing import Any

import pytest
from support import node_docs


@pytest.fixture(scope="module")
def english() -> dict[str, Any]:
    return node_docs.english(node_docs.node_schemas())


def texts_of(definition: dict[str, Any]) -> list[str]:
    parts = (*definition["inputs"].values(), *definition["outputs"].values())
    return [definition["display_name"], definition["description"], *(part["tooltip"] for part in parts)]


def test_the_english_locale_is_what_the_schemas_say(english) -> None:
    ours = {node_id: texts for node_id, texts in english.items() if node_docs.is_ours(node_id)}
    assert node_docs.translations("en") == ours, "run: cd tests && python -m support.node_docs"


def test_the_wrappers_ids_are_translated_as_our_nodes_and_keep_their_names(english) -> None:
    chinese = node_docs.translations("zh")
    for public_id, own in node_docs.own_ids().items():
        ours = {**chinese[own], "display_name": "", "inputs": chinese[own]["inputs"].copy()}
        for fixed in set(ours["inputs"]) - set(english[public_id]["inputs"]):
            del ours["inputs"][fixed]
        assert {**chinese[public_id], "display_name": ""} == ours
        assert "InfiniteTalk" not in chinese[public_id]["display_name"]


def test_the_chinese_locale_translates_everything(english) -> None:
    chinese = node_docs.translations("zh")
    assert list(chinese) == list(english)
    for node_id, definition in english.items():
        translated = chinese[node_id]
        for part in ("inputs", "outputs"):
            assert list(translated[part]) == list(definition[part]), node_id
            names = [entry["name"] for entry in definition[part].values()]
            assert [entry["name"] for entry in translated[part].values()] == names
        for text, original in zip(texts_of(translated), texts_of(definition), strict=True):
            assert re.search(r"[\u4e00-\u9fff]", text), f"{node_id}: {text}"
            assert text != original


def test_no_text_holds_signs_that_the_page_would_interpret(english) -> None:
    for definitions in (english, node_docs.translations("zh")):
        for node_id, definition in definitions.items():
            for text in texts_of(definition):
                assert not set(text) & set("{}|@"), f"{node_id}: {text}"


def test_pages_are_in_step() -> None:
    for path, content in node_docs.pages().items():
        assert path.is_file(), f"{path} is missing; run: cd tests && python -m support.node_docs"
        assert path.read_text(encoding="utf-8") == content, f"{path}: run: cd tests && python -m support.node_docs"
