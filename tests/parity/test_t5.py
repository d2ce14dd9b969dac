"""The text encoder against golden item 14. Limit: rel 2e-5 of the whole model in float32."""

from __future__ import annotations

import pytest
from support.goldens import relative_error
from support.parts import official_to_hugging_face_t5
from wanvideo_infinitetalk.wanvideo.encoders.text import TextEncoder

LIMIT = 2e-5


@pytest.fixture(params=["official", "Hugging Face"])
def case(request, golden):
    item = golden("t5").float()
    weights = item.weights if request.param == "official" else official_to_hugging_face_t5(item.weights)
    return item, TextEncoder.from_state_dict(weights)


def test_context(case):
    item, encoder = case
    rows = encoder.encode_ids(item.inputs["ids"], item.inputs["mask"])
    expected = [item.outputs[f"context{i}"] for i in range(len(rows))]
    assert [len(row) for row in rows] == item.config["lens"]
    for row, context in zip(rows, expected, strict=True):
        assert relative_error(row, context) <= LIMIT


def test_a_row_alone_gives_the_same(case):
    """Padding is masked: a prompt's features do not depend on its neighbors."""
    item, encoder = case
    for i, length in enumerate(item.config["lens"]):
        (row,) = encoder.encode_ids(item.inputs["ids"][i : i + 1, :length], item.inputs["mask"][i : i + 1, :length])
        assert relative_error(row, item.outputs[f"context{i}"]) <= LIMIT


def test_configuration_from_shapes(case):
    item, encoder = case
    config, expected = encoder.model.config, item.config
    assert (config.vocab_size, config.d_model, config.d_ff) == (expected["vocab"], expected["dim"], expected["dim_ffn"])
    assert config.d_kv * config.num_heads == expected["dim_attn"]
    assert (config.num_heads, config.num_layers) == (expected["num_heads"], expected["num_layers"])
    assert config.relative_attention_num_buckets == expected["num_buckets"]
    assert config.relative_attention_max_distance == expected["max_dist"]
    assert config.layer_norm_epsilon == expected["eps"]
