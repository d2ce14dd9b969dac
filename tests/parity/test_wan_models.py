"""Whole models against the golden items `wan_i2v_multitalk` and `wan_t2v`: relative error at most 2e-5.

Inside them: audio packing exactly, audio projection 5e-6, reference maps 2e-5 (they carry the error of what precedes).
"""

from __future__ import annotations

from typing import Any

import torch
from support.goldens import Golden, relative_error
from wanvideo_infinitetalk.wanvideo.modules.model import WanConfig, WanModel

MODEL, MODULE = 2e-5, 5e-6
ABOUT_THE_CASE = ("grid", "seq_len")


def load(g: Golden, **overrides: Any) -> WanModel:
    fields = {name: value for name, value in g.config.items() if name not in ABOUT_THE_CASE}
    fields.update(fields.pop("audio_proj", {}))
    with torch.device("meta"):
        model = WanModel(WanConfig.from_public(fields | overrides))
    model.load_state_dict(g.weights, assign=True)
    return model.eval().requires_grad_(False)


class Recorder:
    """Keeps what modules were given and what they returned."""

    def __init__(self, model: WanModel) -> None:
        self.inputs: dict[str, tuple[torch.Tensor, ...]] = {}
        self.outputs: dict[str, Any] = {}
        for name, module in model.named_modules():
            module.register_forward_hook(lambda _, inputs, output, name=name: self._record(name, inputs, output))

    def _record(self, name: str, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        self.inputs[name], self.outputs[name] = inputs, output


def test_t2v(golden) -> None:
    g = golden("wan_t2v").float()
    model = load(g)
    seen = Recorder(model)
    out = model(g.inputs["x"], g.inputs["t"], g.inputs["context"])
    for i in range(model.config.num_layers):
        assert relative_error(seen.outputs[f"blocks.{i}"], g.outputs[f"block{i}"]) <= MODEL
    assert relative_error(out[0], g.outputs["out"]) <= MODEL


def _cases(g: Golden) -> list[str]:
    return sorted(name.removesuffix(".out") for name in g.outputs if name.endswith(".out") and name != "null_audio.out")


def test_i2v_with_speech(golden) -> None:
    g = golden("wan_i2v_multitalk").float()
    model, i, o = load(g), g.inputs, g.outputs
    assert _cases(g)
    for case in _cases(g):
        audio, masks = i[f"{case}.audio"], i[f"{case}.ref_target_masks"]
        seen = Recorder(model)
        out = model(i["x"], i["t"], i["context"], i["clip_fea"], i["y"], audio, masks)
        assert relative_error(out, o[f"{case}.out"]) <= MODEL

        assert relative_error(seen.outputs["text_embedding"], o["text_embedding"]) <= MODULE
        assert relative_error(seen.outputs["time_embedding"], o["time_embedding"]) <= MODULE
        assert relative_error(seen.outputs["time_projection"], o["time_projection"]) <= MODULE
        first, later = seen.inputs["audio_proj"]
        assert torch.equal(first, o[f"{case}.audio_proj_in_first"])
        assert torch.equal(later, o[f"{case}.audio_proj_in_latter"])
        assert relative_error(seen.outputs["audio_proj"], o[f"{case}.audio_proj_out"]) <= MODULE
        for n in range(model.config.num_layers):
            assert relative_error(seen.outputs[f"blocks.{n}"], o[f"{case}.block{n}"]) <= MODEL
            reference_map = seen.outputs[f"blocks.{n}.self_attn"][1]
            if audio.shape[0] > 1:
                assert relative_error(reference_map, o[f"{case}.x_ref_attn_map{n}"]) <= MODEL
            else:
                assert reference_map is None, "one speaker needs no map"


def test_i2v_with_silence_for_guidance(golden) -> None:
    g = golden("wan_i2v_multitalk").float()
    model, i = load(g), g.inputs
    silence = torch.zeros_like(i["two.audio"][:1])
    out = model(i["x"], i["t"], i["context"], i["clip_fea"], i["y"], silence, i["two.ref_target_masks"])
    assert relative_error(out, g.outputs["null_audio.out"]) <= MODEL


def test_one_speaker_needs_no_masks(golden) -> None:
    g = golden("wan_i2v_multitalk").float()
    model, i = load(g), g.inputs
    out = model(i["x"], i["t"], i["context"], i["clip_fea"], i["y"], i["one.audio"])
    assert relative_error(out, g.outputs["one.out"]) <= MODEL


def test_float32_reference_attention_agrees(golden) -> None:
    g = golden("wan_i2v_multitalk").float()
    model, i = load(g), g.inputs
    masks = i["two.ref_target_masks"]
    out = model(i["x"], i["t"], i["context"], i["clip_fea"], i["y"], i["two.audio"], masks, attention_mode="eager")
    assert relative_error(out, g.outputs["two.out"]) <= MODEL
