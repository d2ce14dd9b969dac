"""The reference attention map against golden item `attn_map`: relative error at most 1e-6.

The public map leaves out the last head when the number of heads does not divide by `split_num`; ours never does, and is
then compared with the unsplit map only.
"""

from __future__ import annotations

import torch
from support.goldens import relative_error
from wanvideo_infinitetalk.multitalk.multitalk import calculate_x_ref_attn_map, get_attn_map_with_target

TOLERANCE = 1e-6


@torch.no_grad()
def test_attn_map(golden) -> None:
    g = golden("attn_map").float()
    frames, height, width = g.config["shape"]
    split = g.config["split_num"]
    q, k, masks = g.inputs["visual_q"], g.inputs["ref_k"], g.inputs["ref_target_masks"]
    full = get_attn_map_with_target(q, k, (frames, height, width), masks, split)
    direct = calculate_x_ref_attn_map(q, k[:, : height * width], masks)
    expected = ["map_unsplit"] if g.config["num_heads"] % split else ["map", "map_wrapper", "map_unsplit"]
    for name in expected:
        assert relative_error(full, g.outputs[name]) <= TOLERANCE
        assert relative_error(direct, g.outputs[name]) <= TOLERANCE
