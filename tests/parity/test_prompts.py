"""Golden item `prompt_weights`: the public text nodes with a stub encoder."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from support.goldens import relative_error
from wanvideo_infinitetalk.pipeline.prompts import encode_pieces, parse_prompt, piece_of
from wanvideo_infinitetalk.wanvideo.errors import InputError

DIM = 6


def stub(texts: Sequence[str]) -> list[torch.Tensor]:
    """One token for each byte of a text and one of value 1, as the golden's encoder."""

    def encode(text: str) -> torch.Tensor:
        values = torch.tensor([*text.encode(), 1])
        return ((values[:, None] * (2 * torch.arange(DIM) + 3)) % 251 - 125) / 64

    return [encode(text) for text in texts]


def test_pieces_weights_and_embeddings(golden) -> None:
    item = golden("prompt_weights")
    compared = 0
    for case in item.sidecar["cases"]:
        prompt = case["prompt"]
        if "[1]" in prompt and "|" not in prompt:  # shots, which are plain text here
            assert [piece.text.count("[") for piece in parse_prompt(prompt)] == [prompt.count("[")]
            continue
        if "raises" in case:
            with pytest.raises(InputError):
                parse_prompt(prompt)
            continue
        pieces = parse_prompt(prompt)
        assert [piece.text for piece in pieces] == case["encoder_texts"]
        assert [piece.factor for piece in pieces] == pytest.approx(case["factors"], rel=1e-6)
        for number, embedding in enumerate(encode_pieces(pieces, stub)):
            expected = item.outputs[f"{case['index']:02}.{number}"]
            if case["factors"][number] == 0:
                assert embedding.eq(0).all()
            else:
                assert relative_error(embedding, expected) <= 1e-6
            compared += 1
    assert compared > 35


def test_the_piece_of_each_window(golden) -> None:
    for row in golden("prompt_weights").sidecar["window_choice"]:
        pieces = [torch.tensor(float(number)) for number in range(row["prompts"])]
        assert [[int(piece_of(pieces, window))] for window in range(len(row["windows"]))] == row["windows"]
