"""CLIP vision against golden item 13. Limit: rel 2e-5 of the whole model in float32."""

from __future__ import annotations

import pytest
import torch
from support.goldens import relative_error
from wanvideo_infinitetalk.wanvideo.encoders.clip import ClipVision

LIMIT = 2e-5


@pytest.fixture(params=["", "visual."])
def case(request, golden):
    item = golden("clip").float()
    weights = {request.param + name: tensor for name, tensor in item.weights.items()}
    return item, ClipVision.from_state_dict(weights, {"num_attention_heads": item.config["num_heads"]})


def test_preprocessing(case):
    item, clip = case
    image = item.inputs["image"][:, :, 0]
    assert clip.image_size == item.config["image_size"]
    assert relative_error(clip.preprocess(image), item.outputs["pixel_values"]) <= 5e-6


def test_penultimate_features(case):
    item, clip = case
    features = clip.encode(item.inputs["image"][:, :, 0])
    assert features.shape[1:] == (item.config["tokens"], item.config["dim"])
    assert relative_error(features, item.outputs["penultimate"]) <= LIMIT


def test_larger_pictures_with_an_interpolated_position_table(case):
    item, clip = case
    if "interpolated.pixel_values" not in item.inputs:
        pytest.skip("this set has no larger image")
    features = clip.features(item.inputs["interpolated.pixel_values"])
    assert relative_error(features, item.outputs["interpolated.penultimate"]) <= LIMIT


def test_the_last_block_is_not_part_of_it(case):
    item, clip = case
    assert clip.model.config.num_hidden_layers == item.config["num_layers"] - 1
    assert not torch.allclose(clip.encode(item.inputs["image"][:, :, 0]), item.outputs["all_blocks_no_post_norm"])
