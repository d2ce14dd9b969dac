"""LoRA files: every public naming gives the same weights; merged and unmerged, on any base; errors in words."""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support.corruptions import JSONS, VALUES
from torch import Tensor, nn
from wanvideo_infinitetalk.fp8_optimization import convert_fp8_linear, quantize_linears, quantize_weight_fp8
from wanvideo_infinitetalk.wanvideo.checkpoints.lora import (
    LoraSpec,
    active_loras,
    apply_loras,
    inspect_loras,
    remove_loras,
)
from wanvideo_infinitetalk.wanvideo.errors import CheckpointError, InputError
from wanvideo_infinitetalk.wanvideo.linear.base import relative_l2
from wanvideo_infinitetalk.wanvideo.linear.gguf import GGUFLinear, GGUFTensor
from wanvideo_infinitetalk.wanvideo.modules.model import WanConfig, WanModel

CONFIG = WanConfig(
    in_dim=36, dim=64, ffn_dim=96, freq_dim=16, text_dim=32, num_heads=2, num_layers=2, clip_dim=32, text_len=8
)
RANK = 4
LAYERS = (
    "blocks.0.self_attn.q",
    "blocks.0.self_attn.k",
    "blocks.0.self_attn.v",
    "blocks.0.self_attn.o",
    "blocks.0.cross_attn.q",
    "blocks.1.cross_attn.o",
    "blocks.1.cross_attn.k_img",
    "blocks.1.cross_attn.v_img",
    "blocks.1.ffn.0",
    "blocks.1.ffn.2",
)


def make_model(dtype: torch.dtype = torch.float32) -> WanModel:
    with torch.device("meta"):
        model = WanModel(CONFIG)
    generator = torch.Generator().manual_seed(3)
    state = {name: torch.randn(p.shape, generator=generator) * 0.2 for name, p in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model.to(dtype).eval().requires_grad_(False)


def linear_of(model: nn.Module, layer: str) -> Any:
    return model.get_submodule(layer)


def make_pairs(layers: tuple[str, ...] = LAYERS, seed: int = 7) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> (down [rank, K], up [N, rank])."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for layer in layers:
        out_features, in_features = make_shapes()[layer]
        down = torch.randn(RANK, in_features, generator=generator) * 0.1
        pairs[layer] = (down, torch.randn(out_features, RANK, generator=generator) * 0.1)
    return pairs


@functools.cache
def make_shapes() -> dict[str, tuple[int, int]]:
    return {n: (m.out_features, m.in_features) for n, m in make_model().named_modules() if isinstance(m, nn.Linear)}


def expected_weights(
    model: nn.Module, pairs: dict[str, tuple[Tensor, Tensor]], factor: float = 1.0
) -> dict[str, Tensor]:
    return {name: linear_of(model, name).weight + factor * up @ down for name, (down, up) in pairs.items()}


def to_diffusers(layer: str) -> str:
    for public, other in (
        ("self_attn.", "attn1."),
        ("cross_attn.", "attn2."),
        (".k_img", ".add_k_proj"),
        (".v_img", ".add_v_proj"),
        (".q", ".to_q"),
        (".k", ".to_k"),
        (".v", ".to_v"),
        (".o", ".to_out.0"),
        ("ffn.0", "ffn.net.0.proj"),
        ("ffn.2", "ffn.net.2"),
    ):
        if layer.endswith(public) or (public.endswith("attn.") and public in layer):
            layer = layer.replace(public, other) if public.endswith("attn.") else layer.removesuffix(public) + other
            if not public.endswith("attn."):
                break
    return layer


def flat(layer: str) -> str:
    return layer.replace(".", "_")


STYLES = {
    "comfyui": lambda n: (f"diffusion_model.{n}.lora_A.weight", f"diffusion_model.{n}.lora_B.weight"),
    "comfyui down/up": lambda n: (f"diffusion_model.{n}.lora_down.weight", f"diffusion_model.{n}.lora_up.weight"),
    "peft": lambda n: (f"base_model.model.{n}.lora_A.weight", f"base_model.model.{n}.lora_B.weight"),
    "peft named": lambda n: (
        f"base_model.model.{n}.lora_A.default.weight",
        f"base_model.model.{n}.lora_B.default.weight",
    ),
    "bare": lambda n: (f"{n}.lora_A.weight", f"{n}.lora_B.weight"),
    "kohya": lambda n: (f"lora_unet_{flat(n)}.lora_down.weight", f"lora_unet_{flat(n)}.lora_up.weight"),
    "kohya two": lambda n: (f"lora_unet__{flat(n)}.lora_down.weight", f"lora_unet__{flat(n)}.lora_up.weight"),
    "diffusers": lambda n: (
        f"transformer.{to_diffusers(n)}.lora_A.weight",
        f"transformer.{to_diffusers(n)}.lora_B.weight",
    ),
    "diffsynth": lambda n: (f"pipe.dit.{n}.lora_A.default.weight", f"pipe.dit.{n}.lora_B.default.weight"),
    "lycoris": lambda n: (f"lycoris_{flat(n)}.lora_down.weight", f"lycoris_{flat(n)}.lora_up.weight"),
}


def write(
    path: Path,
    pairs: dict[str, tuple[Tensor, Tensor]],
    style: str = "comfyui",
    alpha: float | None = None,
    more: Mapping[str, Tensor] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    tensors = dict(more or {})
    for layer, (down, up) in pairs.items():
        names = STYLES[style](layer)
        tensors[names[0]], tensors[names[1]] = down, up
        if alpha is not None:
            stem = names[0].split(".lora_")[0]
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata)
    return path


@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize("style", STYLES)
def test_every_spelling_gives_the_same_weights(tmp_path, style, alpha):
    model, pairs = make_model(), make_pairs()
    expected = expected_weights(model, pairs, 0.7 * (1.0 if alpha is None else alpha / RANK))
    untouched = model.get_parameter("blocks.0.cross_attn.k.weight").clone()
    apply_loras(model, [LoraSpec(write(tmp_path / "l.safetensors", pairs, style, alpha), 0.7)])
    for layer, weight in expected.items():
        assert relative_l2(linear_of(model, layer).weight, weight) < 1e-6, layer
    assert torch.equal(model.get_parameter("blocks.0.cross_attn.k.weight"), untouched)


def test_namings_of_the_layers_around_the_blocks(tmp_path):
    """The diffusers names of embeddings and head, and a pair on the patch embedding's convolution."""
    namings = {
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
        "head.head": "proj_out",
    }
    model = make_model()
    pairs = make_pairs(tuple(namings))
    expected = expected_weights(model, pairs)
    tensors = {}
    for layer, name in namings.items():
        tensors[f"transformer.{name}.lora_A.weight"], tensors[f"transformer.{name}.lora_B.weight"] = pairs[layer]
    kernel = model.patch_embedding.weight
    down, up = torch.randn(RANK, *kernel.shape[1:]), torch.randn(CONFIG.dim, RANK, 1, 1, 1)
    tensors["patch_embedding.lora_A.weight"], tensors["patch_embedding.lora_B.weight"] = down, up
    patch = kernel + (up.flatten(1) @ down.flatten(1)).reshape(kernel.shape)
    save_file(tensors, tmp_path / "l.safetensors")
    apply_loras(model, [LoraSpec(tmp_path / "l.safetensors")])
    for layer, weight in expected.items():
        assert relative_l2(linear_of(model, layer).weight, weight) < 1e-6, layer
    assert relative_l2(model.patch_embedding.weight, patch) < 1e-6


def differences(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Parameter -> (its name in the file, its difference)."""
    names = {
        "blocks.0.self_attn.q.bias": "diffusion_model.blocks.0.self_attn.q.diff_b",
        "blocks.0.self_attn.norm_q.weight": "diffusion_model.blocks.0.self_attn.norm_q.diff",
        "blocks.1.norm3.weight": "diffusion_model.blocks.1.norm3.diff",
        "blocks.1.norm3.bias": "diffusion_model.blocks.1.norm3.diff_b",
        "blocks.1.modulation": "diffusion_model.blocks.1.diff_m",
        "head.modulation": "diffusion_model.head.diff_m",
        "blocks.0.cross_attn.k.weight": "diffusion_model.blocks.0.cross_attn.k.diff",
        "patch_embedding.weight": "diffusion_model.patch_embedding.diff",
        "patch_embedding.bias": "diffusion_model.patch_embedding.diff_b",
    }
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(5)
    return {p: (name, torch.randn(parameters[p].shape, generator=generator) * 0.1) for p, name in names.items()}


def diff_tensors() -> dict[str, Tensor]:
    return dict(differences(make_model()).values())


@pytest.mark.parametrize("merge", [True, False])
def test_whole_differences(tmp_path, merge):
    model = make_model()
    wanted = differences(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    # Alpha and rank are of the pairs alone.
    path = write(tmp_path / "l.safetensors", make_pairs(), alpha=2.0, more=dict(wanted.values()))
    apply_loras(model, [LoraSpec(path, -0.5, merge)])
    after = dict(model.named_parameters())
    x = torch.randn(3, CONFIG.dim)
    for name, (_, difference) in wanted.items():
        if merge or name != "blocks.0.cross_attn.k.weight":
            assert relative_l2(after[name], before[name] - 0.5 * difference) < 1e-6, name
        else:  # the weight of a linear layer stays as it is
            k = linear_of(model, "blocks.0.cross_attn.k")
            assert relative_l2(k(x), F.linear(x, before[name] - 0.5 * difference, k.bias)) < 1e-5


@pytest.mark.parametrize("source", ["header", "file next to it"])
def test_alpha_rules_of_the_trainers_configuration(tmp_path, source):
    """Rank-stabilized: alpha / sqrt(rank), which is what alpha = rank * sqrt(rank) would give the ordinary rule."""
    pairs = make_pairs()
    for stated, factor in (
        ({"use_rslora": True}, math.sqrt(RANK)),
        ({"use_rslora": True, "lora_alpha": 8}, 8 / math.sqrt(RANK)),
        ({"use_rslora": False, "lora_alpha": 8}, 8 / RANK),
        ({}, 1.0),
    ):
        metadata = None
        if source == "header":
            metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in stated.items()})}
        else:
            (tmp_path / "adapter_config.json").write_text(json.dumps(stated))
        model = make_model()
        expected = expected_weights(model, pairs, factor)
        path = tmp_path / ("l.safetensors" if source == "header" else "adapter_model.safetensors")
        apply_loras(model, [LoraSpec(write(path, pairs, "peft", metadata=metadata))])
        for layer, weight in expected.items():
            assert relative_l2(linear_of(model, layer).weight, weight) < 1e-6, (stated, layer)


def test_several_at_once_in_any_order_round_once(tmp_path):
    first = write(tmp_path / "a.safetensors", make_pairs(seed=1))
    second = write(tmp_path / "b.safetensors", make_pairs(seed=2), "kohya", alpha=1.0)
    specs = [LoraSpec(first, 0.8), LoraSpec(second, -1.5), LoraSpec(tmp_path / "not there", 0.0)]
    one, other, exact = make_model(torch.bfloat16), make_model(torch.bfloat16), make_model(torch.bfloat16).double()
    apply_loras(one, specs)
    apply_loras(other, specs[::-1])
    for layer, (down, up) in make_pairs(seed=1).items():
        assert torch.equal(linear_of(one, layer).weight, linear_of(other, layer).weight)
        down2, up2 = make_pairs(seed=2)[layer]
        change = 0.8 * up.double() @ down.double() - 1.5 / RANK * up2.double() @ down2.double()
        expected = (linear_of(exact, layer).weight + change).bfloat16()
        # float32 sums may fall to the other side of a rounding boundary now and then.
        assert float((linear_of(one, layer).weight != expected).float().mean()) < 0.01
    assert active_loras(one) == specs[:2]


def gguf_base(model: nn.Module, base_dtype: torch.dtype) -> None:
    import gguf

    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and name.startswith("blocks."):
            packed = gguf.quants.quantize(linear.weight.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
            shape = linear.weight.shape
            GGUFLinear.adopt(linear, GGUFTensor(torch.from_numpy(packed).reshape(-1, 34), "Q8_0", shape), base_dtype)


def make_base(kind: str, dtype: torch.dtype) -> nn.Module:
    model = make_model(dtype)
    if kind == "gguf":
        gguf_base(model, dtype)
    else:
        quantize_linears(model, kind, dtype)
    return model


BASES = ("disabled", "fp8_e4m3fn", "fp8_e4m3fn_scaled_fast", "fp8_e5m2_scaled", "fp4_scaled", "gguf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BASES)
def test_unmerged_on_any_base_and_off_again_bit_for_bit(tmp_path, kind, dtype):
    model, plain = make_base(kind, dtype), make_base(kind, dtype)
    pairs = make_pairs()
    path = write(tmp_path / "l.safetensors", pairs, alpha=2.0, more=diff_tensors())
    keys = set(model.state_dict())
    inputs = {layer: torch.randn(2, 5, down.shape[1]).to(dtype) for layer, (down, _) in pairs.items()}
    apply_loras(model, [LoraSpec(path, 1.3, merge=False)])
    assert set(model.state_dict()) == keys
    for layer, (down, up) in pairs.items():
        x = inputs[layer]
        before = x.clone()
        out = linear_of(model, layer)(x)
        assert torch.equal(x, before)
        assert out.dtype == dtype
        expected = (
            linear_of(plain, layer)(x).double() + 1.3 * 2 / RANK * x.double() @ down.double().t() @ up.double().t()
        )
        if layer == "blocks.0.self_attn.q":
            expected += 1.3 * differences(make_model())["blocks.0.self_attn.q.bias"][1]
        assert relative_l2(out, expected) < (1e-5 if dtype == torch.float32 else 1e-2), layer
    remove_loras(model)
    assert active_loras(model) == []
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name].float(), tensor.float()), name
    for layer, x in inputs.items():
        assert torch.equal(linear_of(model, layer)(x), linear_of(plain, layer)(x)), layer


@pytest.mark.parametrize("kind", BASES[1:])
def test_merging_never_quantizes_twice(tmp_path, kind):
    model, plain = make_base(kind, torch.float32), make_base(kind, torch.float32)
    apply_loras(model, [LoraSpec(write(tmp_path / "l.safetensors", make_pairs()))])
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name].float(), tensor.float()), name
    x = torch.randn(2, CONFIG.dim)
    assert not torch.equal(linear_of(model, LAYERS[0])(x), linear_of(plain, LAYERS[0])(x))
    assert remove_loras(model) == []


def test_merged_before_quantizing_is_one_rounding(tmp_path):
    """The way of the loader: merge into 16 bits, then quantize."""
    path = write(tmp_path / "l.safetensors", make_pairs())
    model, expected = make_model(), make_model()
    apply_loras(model, [LoraSpec(path)])
    quantize_linears(model, "fp8_e4m3fn_scaled", torch.float32)
    for layer, weight in expected_weights(expected, make_pairs()).items():
        stored, scale = quantize_weight_fp8(weight, torch.float8_e4m3fn, scaled=True)
        assert scale is not None
        restored = linear_of(model, layer).dequantized_weight()
        assert relative_l2(restored, stored.float() * scale) < 1e-2, layer  # a tie may round the other way


def test_fp8_weights_that_are_adopted_later(tmp_path):
    model = make_model()
    q = linear_of(model, LAYERS[0])
    stored, scale = quantize_weight_fp8(q.weight, torch.float8_e4m3fn, scaled=True)
    assert scale is not None
    q.weight = nn.Parameter(stored, requires_grad=False)
    pairs = make_pairs(LAYERS[:1])
    apply_loras(model, [LoraSpec(write(tmp_path / "l.safetensors", pairs))])
    convert_fp8_linear(q, torch.float32, scale_weight_keys={"scale_weight": scale})
    x = torch.randn(4, CONFIG.dim)
    down, up = pairs[LAYERS[0]]
    expected = F.linear(x, stored.float() * scale + up @ down, q.bias)
    assert relative_l2(q(x), expected) < 0.03


def test_applying_again_replaces_unmerged_ones(tmp_path):
    path = write(tmp_path / "l.safetensors", make_pairs())
    model, other = make_model(), make_model()
    apply_loras(model, [LoraSpec(path, 3.0, merge=False)])
    apply_loras(model, [LoraSpec(path, 0.5, merge=False)])
    apply_loras(other, [LoraSpec(path, 0.5, merge=False)])
    x = torch.randn(2, CONFIG.dim)
    assert torch.equal(linear_of(model, LAYERS[0])(x), linear_of(other, LAYERS[0])(x))
    apply_loras(model, [])
    assert torch.equal(linear_of(model, LAYERS[0])(x), linear_of(make_model(), LAYERS[0])(x))
    merged = LoraSpec(path, 0.5)
    apply_loras(model, [merged])
    weight = linear_of(model, LAYERS[0]).weight.clone()
    apply_loras(model, [LoraSpec(str(path), 0.5)])
    assert torch.equal(linear_of(model, LAYERS[0]).weight, weight), "merged a second time"
    assert remove_loras(model) == [merged]


def test_merged_and_unmerged_together(tmp_path):
    first = write(tmp_path / "a.safetensors", make_pairs(seed=1), more=diff_tensors())
    second = write(tmp_path / "b.safetensors", make_pairs(seed=2), more=diff_tensors())
    model, merged = make_model(), make_model()
    apply_loras(model, [LoraSpec(first), LoraSpec(second, merge=False)])
    apply_loras(merged, [LoraSpec(first), LoraSpec(second)])
    x = torch.randn(2, CONFIG.dim)
    for layer in ("blocks.0.self_attn.q", "blocks.0.cross_attn.k"):
        assert relative_l2(linear_of(model, layer)(x), linear_of(merged, layer)(x)) < 1e-5
    assert relative_l2(model.head.modulation, merged.head.modulation) < 1e-6
    remove_loras(model)
    only = make_model()
    apply_loras(only, [LoraSpec(first)])
    for name, tensor in only.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_chosen_blocks_only(tmp_path):
    path = write(tmp_path / "l.safetensors", make_pairs(), more=diff_tensors())
    model, plain = make_model(), make_model()
    apply_loras(model, [LoraSpec(path, blocks=frozenset({1}))])
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, plain.get_parameter(n))}
    assert changed
    assert all(name.startswith("blocks.1.") for name in changed)


def test_what_fits_in_part_warns_once_and_what_fits_nowhere_is_refused(tmp_path, caplog):
    pairs = make_pairs()
    down, up = pairs[LAYERS[0]]
    more = {f"diffusion_model.vace_blocks.{i}.q.lora_A.weight": down for i in range(5)}
    more |= {f"diffusion_model.vace_blocks.{i}.q.lora_B.weight": up for i in range(5)}
    path = write(tmp_path / "l.safetensors", pairs, more=more)
    with caplog.at_level(logging.WARNING):
        apply_loras(make_model(), [LoraSpec(path)])
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "5 of its layers do not exist here: diffusion_model.vace_blocks.0.q (pair)" in warnings[0]
    assert "and 2 more" in warnings[0]
    save_file({name: tensor.clone() for name, tensor in more.items()}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match=r"foreign\.safetensors changes nothing in this model"):
        apply_loras(make_model(), [LoraSpec(tmp_path / "foreign.safetensors")])


def test_a_half_pair_is_counted_not_guessed(tmp_path, caplog):
    pairs = make_pairs()
    path = write(tmp_path / "l.safetensors", pairs, more={"blocks.0.cross_attn.k.lora_A.weight": pairs[LAYERS[0]][0]})
    with caplog.at_level(logging.WARNING):
        apply_loras(make_model(), [LoraSpec(path)])
    assert "1 of its layers" in caplog.text
    assert "half a pair" in caplog.text


@pytest.mark.parametrize("merge", [True, False])
def test_another_models_shapes_leave_the_model_as_it_was(tmp_path, merge):
    wrong = {layer: (torch.zeros(RANK, 48), torch.zeros(48, RANK)) for layer in LAYERS}
    good = write(tmp_path / "a.safetensors", make_pairs())
    model, plain = make_model(), make_model()
    specs = [LoraSpec(good, merge=merge), LoraSpec(write(tmp_path / "b.safetensors", wrong), merge=merge)]
    with pytest.raises(CheckpointError, match=r"b\.safetensors was made for another model.*\[48, 48\].*\[64, 64\]"):
        apply_loras(model, specs)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    x = torch.randn(2, CONFIG.dim)
    assert torch.equal(linear_of(model, LAYERS[0])(x), linear_of(plain, LAYERS[0])(x))


# -------------------------------------------------------------------------------------- files that lie about themselves


def rejected(path: Path, words: str) -> None:
    """The file is rejected in one sentence, and the model is as it was."""
    model, plain = make_model(), make_model()
    with pytest.raises(CheckpointError, match=words):
        inspect_loras(CONFIG, [LoraSpec(path)])
    for merge in (True, False):
        with pytest.raises(CheckpointError, match=words) as caught:
            apply_loras(model, [LoraSpec(path, merge=merge)])
        assert "\n" not in str(caught.value)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())
    assert not active_loras(model)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("style", ["comfyui", "peft named", "kohya"])
def test_the_bias_of_the_second_matrix_is_applied(tmp_path, style, merge):
    """peft's lora_bias: factor * (B (A x) + bias)."""
    model, pairs = make_model(), make_pairs()
    layer, bias = LAYERS[0], torch.randn(CONFIG.dim)
    expected = linear_of(model, layer).bias + 0.5 * 2.0 / RANK * bias
    name = STYLES[style](layer)[1].removesuffix(".weight") + ".bias"
    path = write(tmp_path / "l.safetensors", pairs, style, alpha=2.0, more={name: bias})
    apply_loras(model, [LoraSpec(path, 0.5, merge)])
    assert relative_l2(linear_of(model, layer).bias, expected) < 1e-6
    remove_loras(model)


def test_biases_that_have_no_place(tmp_path):
    pairs = make_pairs()
    down, up = STYLES["comfyui"](LAYERS[0])
    for name, size in ((down, RANK), (up, 3)):
        more = {name.replace(".weight", ".bias"): torch.ones(size)}
        rejected(write(tmp_path / "l.safetensors", pairs, more=more), "bias|was made for another model")
    more = {down.replace("weight", "default.weight"): torch.ones(RANK, CONFIG.dim)}
    rejected(write(tmp_path / "l.safetensors", pairs, more=more), "which change one layer twice")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["down", "up", "diff", "bias", "alpha"])
def test_values_that_are_not_finite(tmp_path, part, value):
    pairs, more = make_pairs(), {}
    stem = f"diffusion_model.{LAYERS[1]}"
    if part in ("down", "up"):
        pairs[LAYERS[1]][part == "up"][1, 1] = value
    else:
        name = {"diff": "diff_b", "bias": "lora_B.bias", "alpha": "alpha"}[part]
        more[f"{stem}.{name}"] = torch.full((1,) if part == "alpha" else (CONFIG.dim,), value)
    rejected(
        write(tmp_path / "l.safetensors", pairs, more=more),
        rf"l\.safetensors .*{LAYERS[1]}".replace(".self", r"\.self"),
    )


@pytest.mark.parametrize("shape", [(2,), (0,), (1, 2), (RANK, RANK)])
def test_an_alpha_of_another_shape(tmp_path, shape):
    more = {f"diffusion_model.{LAYERS[0]}.alpha": torch.ones(shape)}
    rejected(write(tmp_path / "l.safetensors", make_pairs(), more=more), "not one finite number")


@pytest.mark.parametrize(
    ("down", "up", "words"),
    [
        ((RANK, 64), (64, RANK + 1), r"two ranks for blocks\.0\.self_attn\.q\.weight, \[4, 64\] and \[64, 5\]"),
        ((64,), (64, RANK), "no matrix"),
        ((), (64, RANK), "no matrix"),
        ((RANK, 0), (64, RANK), "no matrix"),
        ((0, 64), (64, 0), "no matrix"),
        ((64, RANK), (RANK, 64), "two ranks|another model"),
        ((RANK, 32, 2), (64, RANK), r"by \[64, 32, 2\], which is \[64, 64\] here"),
        ((RANK, 2, 32), (64, RANK, 2), "two ranks"),
    ],
)
def test_matrices_of_other_shapes(tmp_path, down, up, words):
    path = write(tmp_path / "l.safetensors", {LAYERS[0]: (torch.ones(down), torch.ones(up))})
    rejected(path, words)


def test_integers_are_no_change(tmp_path):
    down, up = make_pairs()[LAYERS[0]]
    rejected(write(tmp_path / "l.safetensors", {LAYERS[0]: (down.to(torch.int8), up)}), "floating-point")


@pytest.mark.parametrize(
    ("name", "shape"),
    [("blocks.0.ffn.0.diff", (64, 96)), ("blocks.0.ffn.0.diff", (96 * 64,)), ("head.diff_m", (2, 64, 1))],
)
def test_whole_differences_have_exactly_the_shape(tmp_path, name, shape):
    save_file({f"diffusion_model.{name}": torch.ones(shape)}, tmp_path / "l.safetensors")
    if "diff_m" in name:
        apply_loras(make_model(), [LoraSpec(tmp_path / "l.safetensors")])  # [1, 2, 64] here: the same up to ones
    else:
        rejected(tmp_path / "l.safetensors", r"which is \[96, 64\] here")


def test_a_neighbors_configuration_is_not_this_files(tmp_path):
    """ComfyUI's folder of LoRAs is shared: adapter_config.json there belongs to adapter_model.safetensors alone."""
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 64}')
    model, pairs = make_model(), make_pairs()
    expected = expected_weights(model, pairs)
    apply_loras(model, [LoraSpec(write(tmp_path / "style.safetensors", pairs))])
    assert all(relative_l2(linear_of(model, layer).weight, weight) < 1e-6 for layer, weight in expected.items())


@pytest.mark.parametrize("text", JSONS)
def test_a_configuration_that_is_no_object(tmp_path, text):
    content = JSONS[text]
    (tmp_path / "adapter_config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    rejected(write(tmp_path / "adapter_model.safetensors", make_pairs()), "adapter_config")


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize("field", ["lora_alpha", "use_rslora", "alpha_pattern"])
def test_a_configuration_of_wrong_values(tmp_path, field, value):
    metadata = {
        "lora_adapter_metadata": json.dumps({field: {"self_attn.q": value} if field == "alpha_pattern" else value})
    }
    path = write(tmp_path / "l.safetensors", make_pairs(), metadata=metadata)
    right = {"use_rslora": (None, True, "", [], {}, 0)}.get(field, (None, 0, -1, 1.5))
    if any(value is r or (type(value) is type(r) and value == r) for r in right):
        apply_loras(make_model(), [LoraSpec(path)])
    else:
        rejected(path, f"l.safetensors states .*{field}")


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf])
def test_a_strength_is_finite(strength):
    with pytest.raises(InputError, match="finite"):
        LoraSpec("l.safetensors", strength)


def test_another_kind_of_file_is_named(tmp_path, tiny_set):
    for path, kind in ((tiny_set.vae, "a Wan2.1 VAE"), (tiny_set.text_encoder, "a T5 text encoder")):
        rejected(path, f"{path.name} is {kind}, not a LoRA")


@pytest.mark.parametrize(
    ("mark", "method"), [("dora_scale", "DoRA"), ("lokr_w1", "LoKr"), ("hada_w1_a", "LoHa"), ("oft_blocks", "OFT")]
)
def test_other_methods_are_named(tmp_path, mark, method):
    path = write(
        tmp_path / "l.safetensors", make_pairs(), more={f"diffusion_model.blocks.0.self_attn.q.{mark}": torch.ones(4)}
    )
    with pytest.raises(CheckpointError, match=f"is a {method} file"):
        apply_loras(make_model(), [LoraSpec(path)])


def test_an_unmerged_one_compiles_and_moves_with_the_layer(tmp_path):
    model = make_base("fp8_e4m3fn_scaled_fast", torch.float32)
    apply_loras(model, [LoraSpec(write(tmp_path / "l.safetensors", make_pairs()))])
    layer = linear_of(model, LAYERS[0])
    x = torch.randn(2, CONFIG.dim)
    assert repr(layer).startswith("BranchedFp8Linear")
    with torch.no_grad():
        assert relative_l2(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)) < 1e-6
    assert {"down", "up"} <= {name.rpartition(".")[2] for name, _ in layer.named_buffers()}
    assert layer.to("meta").lora.down.device.type == "meta"


@pytest.mark.parametrize("kind", ["disabled", "fp8_e4m3fn_scaled_fast"])
def test_compiled_code_notices(tmp_path, kind):
    """A LoRA that is applied, changed or taken off after the first compiled call must not be without effect."""
    path = write(tmp_path / "l.safetensors", make_pairs())
    model = make_base(kind, torch.float32)
    layer = linear_of(model, LAYERS[0])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, CONFIG.dim)
    with torch.no_grad():
        plain = compiled(x)
        outputs = []
        for strength in (1.0, 2.0):
            apply_loras(model, [LoraSpec(path, strength, merge=False)])
            outputs.append(compiled(x))
            assert relative_l2(outputs[-1], layer(x)) < 1e-6
        remove_loras(model)
        assert relative_l2(compiled(x), plain) < 1e-6
    assert relative_l2(outputs[0], plain) > 1e-3
    assert relative_l2(outputs[1] - plain, 2 * (outputs[0] - plain)) < 1e-4
    assert type(layer).__name__ == ("Linear" if kind == "disabled" else "Fp8Linear")
