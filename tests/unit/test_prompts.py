"""The syntax of prompts where the public nodes give no number to compare with."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wanvideo_infinitetalk.pipeline.prompts import Piece, parse_prompt
from wanvideo_infinitetalk.wanvideo.errors import InputError

PARTS = st.sampled_from(["a", " ", "(", ")", ":", "1.2", ".", "|", "\n", "[1]", "\\", "0", "é", "(x:2)"])


def test_shots_are_plain_text_with_a_hint(caplog: pytest.LogCaptureFixture) -> None:
    assert parse_prompt("[1] a man [2] a dog") == (Piece("[1] a man [2] a dog"),)
    assert "plain text: separate the prompts of the windows by |" in caplog.text
    caplog.clear()
    assert parse_prompt("a [word] and (more)") == (Piece("a [word] and (more)"),)
    assert not caplog.messages


@pytest.mark.parametrize(
    "prompt", ["(x:1.2.3)", "(x:.)", "a | (x:..5)", "(x:100.1)", "(x:11)(y:11)", "(x:" + "9" * 400 + ")"]
)
def test_weights_that_cannot_be_used(prompt: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_prompt(prompt)
    assert str(caught.value).endswith(".")
    assert len(str(caught.value)) < 200


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.lists(PARTS, max_size=20).map("".join))
def test_any_text_has_pieces_or_a_sentence(prompt: str) -> None:
    try:
        pieces = parse_prompt(prompt)
    except InputError:
        return
    assert len(pieces) == prompt.count("|") + 1
    for piece, part in zip(pieces, prompt.split("|"), strict=True):
        assert 0 <= piece.factor <= 100
        if "(" not in part:
            assert piece == Piece(part.strip())


@pytest.mark.parametrize("unit", ["(", "(a:", "(:1.2", "(a:1", "[1]"])
def test_long_prompts_take_no_longer_than_their_length(unit: str) -> None:
    begin = time.process_time()
    parse_prompt(unit * (200_000 // len(unit)))
    assert time.process_time() - begin < 2
