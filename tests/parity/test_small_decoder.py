"""The small decoder against golden item `tae_decoder`. Limit: rel 1e-5 in float32."""

from __future__ import annotations

import pytest
import torch
from support.goldens import relative_error
from wanvideo_infinitetalk.wanvideo.encoders.small_decoder import PUBLIC_WIDTHS, SmallDecoder, SmallNetwork

LIMIT = 1e-5


@pytest.fixture
def case(golden):
    item = golden("tae_decoder").float()
    return item, SmallDecoder.from_state_dict(item.weights, denormalize=False)


@pytest.mark.parametrize("at_once", [False, True])
def test_frames(case, at_once):
    item, decoder = case
    decoder.at_once = at_once
    latents = item.inputs["latent_ntchw"].movedim(1, 2)
    frames = (decoder.decode(latents) + 1) / 2
    assert relative_error(frames.movedim(2, 1), item.outputs["decoded"]) <= LIMIT


@torch.no_grad()
def test_the_last_frame_before_the_clamp(case):
    item, decoder = case
    z = item.inputs["latent_ntchw"].movedim(2, -1)
    expected = item.outputs["decoder_raw_untrimmed_last_frame"]
    last = decoder.model(z, {})[:, -1].movedim(-1, 1)
    assert relative_error(last.reshape(expected.shape), expected) <= LIMIT


def test_the_public_names_and_shapes(golden):
    item = golden("tae_decoder")
    assert tuple(item.config["full_size"]["decoder_widths"]) == PUBLIC_WIDTHS
    with torch.device("meta"):
        names = {name: list(tensor.shape) for name, tensor in SmallNetwork().state_dict().items()}
    public = item.sidecar["full_size_keys"]
    assert names == {name: shape for name, shape in public.items() if name.startswith("decoder.")}
