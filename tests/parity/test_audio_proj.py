"""The audio projection against golden item `audio_proj`: relative error at most 5e-6."""

from __future__ import annotations

import torch
from support.goldens import relative_error
from wanvideo_infinitetalk.multitalk.multitalk import AudioProjModel

TOLERANCE = 5e-6
FIELDS = ("seq_len", "seq_len_vf", "blocks", "channels", "intermediate_dim", "output_dim", "context_tokens")


@torch.no_grad()
def test_audio_proj(golden) -> None:
    g = golden("audio_proj").float()
    model = AudioProjModel(**{name: g.config[name] for name in FIELDS})
    model.load_state_dict(g.weights)
    tokens = model(g.inputs["audio_embeds"], g.inputs["audio_embeds_vf"])
    assert relative_error(tokens, g.outputs["context_tokens"]) <= TOLERANCE


@torch.no_grad()
def test_audio_proj_without_norm(golden) -> None:
    g = golden("audio_proj").float()
    model = AudioProjModel(**{name: g.config[name] for name in FIELDS}, norm_output_audio=False)
    model.load_state_dict({name: w for name, w in g.weights.items() if not name.startswith("norm.")})
    tokens = model(g.inputs["audio_embeds"], g.inputs["audio_embeds_vf"])
    assert relative_error(tokens, g.outputs["context_tokens_nonorm"]) <= TOLERANCE
