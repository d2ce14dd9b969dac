"""HuMo's modules and model against the golden items `humo` (5e-6) and `humo_model` (2e-5)."""

from __future__ import annotations

import torch
from support.goldens import Golden, relative_error
from wanvideo_infinitetalk.wanvideo.modules.humo import humo_audio_window, resample_features
from wanvideo_infinitetalk.wanvideo.modules.model import (
    AudioCrossAttentionWrapper,
    HuMoAudioProjModel,
    HuMoConfig,
    WanConfig,
    WanModel,
)

MODULE, MODEL = 5e-6, 2e-5


def _part(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


@torch.no_grad()
def test_cross_attention(golden) -> None:
    g = golden("humo").float()
    c = g.config
    module = AudioCrossAttentionWrapper(c["dim"], c["dim"], c["heads"], eps=c["eps"], kv_dim=c["kv_dim"])
    module.load_state_dict(_part(g.weights, "wrapper."))
    x, audio = g.inputs["wrapper.x"], g.inputs["wrapper.audio"]
    grid = torch.tensor([c["grid"]])
    normed = module.norm1_audio(x)
    assert relative_error(normed, g.outputs["wrapper.norm1"]) <= MODULE
    assert relative_error(module.audio_cross_attn(normed, audio, grid), g.outputs["cross_attn.y"]) <= MODULE
    assert relative_error(module(x, audio, grid), g.outputs["wrapper.y"]) <= MODULE
    scaled = module(x, audio, tuple(c["grid"]), c["humo_audio_scale"])
    assert relative_error(scaled, g.outputs["wrapper.y_scaled"]) <= MODULE


@torch.no_grad()
def test_audio_projection(golden) -> None:
    g = golden("humo").float()
    module = HuMoAudioProjModel(**g.config["audio_proj"])
    module.load_state_dict(_part(g.weights, "audio_proj."))
    assert relative_error(module(g.inputs["audio_proj.audio_embeds"]), g.outputs["audio_proj.y"]) <= MODULE


def test_windows(golden) -> None:
    g = golden("humo")
    window = g.config["window"]
    for name, end in window["returned_end"].items():
        rows, behind = humo_audio_window(g.inputs["window.audio_emb"], window["frame_num"], int(name.split("_")[-1]))
        assert torch.equal(rows, g.outputs[f"window.{name}"])
        assert behind == end


def test_resampling(golden) -> None:
    g = golden("humo")
    fps = g.config["fps"]
    rows = resample_features(g.inputs["fps.features"], fps["input_fps"], fps["output_fps"])
    assert relative_error(rows, g.outputs["fps.y"]) <= 1e-6


def _model(g: Golden) -> WanModel:
    names = ("grid", "seq_len", "audio_proj", "kv_dim", "humo_audio_scale", "reference_frames")
    fields = {name: value for name, value in g.config.items() if name not in names}
    model = WanModel(WanConfig.from_public(fields | {"humo": HuMoConfig(**g.config["audio_proj"])}))
    model.load_state_dict(g.weights)
    return model.requires_grad_(False)


def test_model(golden) -> None:
    g = golden("humo_model").float()
    model, i = _model(g), g.inputs
    audio, scale = i["humo_audio"], g.config["humo_audio_scale"]
    cases = {
        "out_timestep64": (audio, 1.0),
        "out": (audio, 1.0),
        "out_scaled": (audio, scale),
        "out_zero_audio": (torch.zeros_like(audio), 1.0),
        "out_no_audio": (None, 1.0),
    }
    for name, (humo_audio, factor) in cases.items():
        out = model(i["x"], i["t"], i["context"], y=i["y"], humo_audio=humo_audio, humo_audio_scale=factor)
        assert relative_error(out[0], g.outputs[name]) <= MODEL
