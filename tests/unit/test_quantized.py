"""Quantized weights in checkpoints: every model x format x form of the scale is read right, or is one sentence.

"Right" is against an oracle: the file is worth what the same file with the weights dequantized here is worth, bit for
bit. The rest is rejected by the headers, without a weight being read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file
from support.parts import official_clip_names
from torch import Tensor, nn
from wanvideo_infinitetalk.cli import tiny_models as tiny
from wanvideo_infinitetalk.cli.demo import demo_job
from wanvideo_infinitetalk.fp8_optimization import Fp8Linear, how_it_runs
from wanvideo_infinitetalk.multitalk.wav2vec import Wav2Vec2Features
from wanvideo_infinitetalk.pipeline.make_video import check
from wanvideo_infinitetalk.wanvideo.checkpoints.dit import inspect_dit, load_dit
from wanvideo_infinitetalk.wanvideo.checkpoints.files import CheckpointFile
from wanvideo_infinitetalk.wanvideo.checkpoints.quantized import FORMATS, HEADER
from wanvideo_infinitetalk.wanvideo.encoders.clip import ClipVision
from wanvideo_infinitetalk.wanvideo.encoders.small_decoder import SmallDecoder
from wanvideo_infinitetalk.wanvideo.encoders.text import TextEncoder
from wanvideo_infinitetalk.wanvideo.encoders.vae import WanVAE
from wanvideo_infinitetalk.wanvideo.errors import CheckpointError
from wanvideo_infinitetalk.wanvideo.kernels import quantizers
from wanvideo_infinitetalk.wanvideo.linear import nvfp4
from wanvideo_infinitetalk.wanvideo.linear.base import QuantizedLinear
from wanvideo_infinitetalk.wanvideo.linear.nvfp4 import NVFP4Linear, tile_padded, tiled

State = dict[str, Tensor]

FACTOR = 1000.0
"""Real scales are around 1e-3; these are that far from 1 too, so that one left out cannot pass."""


# ----------------------------------------------------------------------------------------------------- kinds of model


@dataclass(frozen=True)
class Kind:
    """A kind of model: its weights, how its file is loaded and inspected, and the ends of the names to quantize."""

    state: Callable[[], State]
    load: Callable[[Path], nn.Module]
    inspect: Callable[[Path], Any]
    ends: tuple[str, ...]
    facts: tuple[tuple[str, int], ...] = ()

    @property
    def metadata(self) -> dict[str, str]:
        return {"config": json.dumps(dict(self.facts))} if self.facts else {}


@cache
def base_file() -> dict[str, Path]:
    return {}


def dit(path: Path) -> nn.Module:
    return load_dit(path, base_dtype=torch.float32)


KINDS = {
    "DiT": Kind(
        tiny.dit_weights,
        dit,
        inspect_dit,
        ("self_attn.q.weight", "ffn.0.weight", "text_embedding.0.weight"),
        (("num_heads", tiny.HEADS),),
    ),
    "adapter": Kind(
        tiny.adapter_weights,
        lambda path: load_dit(base_file()["DiT"], path, base_dtype=torch.float32),
        lambda path: inspect_dit(base_file()["DiT"], path),
        ("audio_cross_attn.kv_linear.weight", "audio_proj.proj2.weight"),
        (("audio_blocks", tiny.AUDIO_LAYERS),),
    ),
    "text encoder": Kind(
        tiny.text_encoder_weights,
        lambda path: TextEncoder.load(path, dtype=torch.float32).model.encoder,
        TextEncoder.inspect,
        ("attn.q.weight", "ffn.fc1.weight"),
    ),
    "CLIP": Kind(
        lambda: tiny.clip_weights(64),
        lambda path: ClipVision.load(path).model,
        ClipVision.inspect,
        ("self_attn.q_proj.weight", "embeddings.patch_embedding.weight"),
    ),
    "VAE": Kind(
        tiny.vae_weights,
        lambda path: WanVAE.load(path).model,
        WanVAE.inspect,
        ("residual.2.weight", "middle.1.to_qkv.weight"),
    ),
    "small decoder": Kind(
        tiny.decoder_weights,
        lambda path: SmallDecoder.load(path).model,
        SmallDecoder.inspect,
        ("13.conv.weight", "conv.0.weight"),
    ),
    "wav2vec2": Kind(
        tiny.wav2vec_weights,
        lambda path: Wav2Vec2Features.load(path).model,
        Wav2Vec2Features.inspect,
        ("attention.q_proj.weight", "conv_layers.1.conv.weight"),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def a_base_file(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file(tiny.dit_weights(), path, metadata=KINDS["DiT"].metadata)
    base_file()["DiT"] = path


@cache
def state_of(kind: str) -> State:
    return KINDS[kind].state()


def layers_of(kind: str) -> list[str]:
    return [name.removesuffix(".weight") for name in state_of(kind) if name.endswith(KINDS[kind].ends)]


def values_of(model: nn.Module) -> State:
    """Every weight in float32, however its layer stores it."""
    found = {name: tensor.float() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            for part in ("weight_scale", "weight_scale_2", "scale_weight"):
                found.pop(f"{name}.{part}", None)
            found[f"{name}.weight"] = module.dequantized_weight()
    return found


# ---------------------------------------------------------------------------------------------------------- formats


@dataclass(frozen=True)
class Form:
    """A way of storing a weight: the format, the shape of its scale, what it is called and what states the format."""

    format: str
    scale: str
    name: str = "weight_scale"
    stated: str = "mark"  # or "header", or "dtype"

    def __str__(self) -> str:
        return f"{self.format}-{self.scale}-{self.name}-{self.stated}"


def quantized(weight: Tensor, form: Form) -> tuple[State, Tensor]:
    """({"weight": stored, its scales by their names}, what they stand for in float32)."""
    weight = weight.float() * FACTOR
    if form.format == "nvfp4":
        scale = quantizers.nvfp4_tensor_scale(weight, (0, 1), power_of_two=False).reshape(())
        found = quantizers.quantize_nvfp4(weight, scale)
        parts = {"weight": quantizers.pack_e2m1(found.values), "weight_scale": tiled(found.block_scales)}
        parts["weight_scale_2"] = scale
        if form.scale == "bytes":
            parts["weight_scale"] = parts["weight_scale"].view(torch.uint8)
        # The layers' order of the products: scale and block scale first.
        blocks = found.values.unflatten(-1, (-1, 16)) * (scale * found.block_scales.float()).unsqueeze(-1)
        return parts, blocks.flatten(-2)
    if form.format == "mxfp8":
        blocks = weight.unflatten(-1, (-1, 32))
        powers = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax(-1) / 448)))
        stored = (blocks / powers.unsqueeze(-1)).to(torch.float8_e4m3fn)
        codes = (torch.log2(powers) + 127).to(torch.uint8)
        laid = codes if form.scale == "plain" else tiled(codes)
        laid = laid.view(torch.float8_e8m0fnu) if form.scale == "e8m0" else laid
        worth = stored.float() * powers.unsqueeze(-1)
        return {"weight": stored.flatten(-2), form.name: laid}, worth.flatten(-2)
    dtype = FORMATS[form.format]
    limit = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    rows = weight.abs().flatten(1).amax(1) if form.scale.startswith("row") else weight.abs().max()
    scale = (rows / limit).reshape(-1, *[1] * (weight.ndim - 1))
    values = weight / scale
    stored = (values.round() if dtype == torch.int8 else values).to(dtype)
    shapes = {"tensor": (), "one": (1,), "row": (-1,), "row column": (-1, 1)}
    return {"weight": stored, form.name: scale.reshape(shapes[form.scale])}, stored.float() * scale


FORMS = [
    Form("float8_e4m3fn", "tensor", "scale_weight", "dtype"),
    Form("float8_e4m3fn", "one", "weight_scale", "dtype"),
    Form("float8_e4m3fn", "row", "weight_scale", "header"),
    Form("float8_e4m3fn", "row column", "scale_weight", "mark"),
    Form("float8_e5m2", "tensor", "weight_scale", "mark"),
    Form("float8_e5m2", "row", "scale_weight", "dtype"),
    Form("nvfp4", "bytes"),
    Form("nvfp4", "e4m3", stated="header"),
    Form("mxfp8", "tiled"),
    Form("mxfp8", "e8m0", stated="header"),
    Form("mxfp8", "plain", "scale_weight"),
    Form("int8_tensorwise", "tensor"),
    Form("int8_tensorwise", "row column", stated="header"),
]


FP8 = Form("float8_e4m3fn", "tensor", "weight_scale", "dtype")
MARKED = Form("float8_e4m3fn", "tensor")
INT8 = Form("int8_tensorwise", "tensor")
NVFP4 = Form("nvfp4", "e4m3")
MXFP8 = Form("mxfp8", "tiled")


def bytes_of(value: object) -> Tensor:
    text = value if isinstance(value, str) else json.dumps(value)
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def file_of(kind: str, form: Form, prefix: str = "") -> tuple[State, State, dict[str, str]]:
    """(tensors of the quantized file, those of the dequantized one, metadata of the quantized one)."""
    stored, worth = dict(state_of(kind)), dict(state_of(kind))
    header: dict[str, object] = {}
    for layer in layers_of(kind):
        weight = stored[f"{layer}.weight"]
        if weight.ndim != 2 and form.format in ("nvfp4", "mxfp8"):
            continue
        if form.scale == "plain" and weight.shape[0] % 128 == 0 and weight.shape[1] % 128 == 0:
            continue  # the shape says nothing there: read as tiled
        parts, worth[f"{layer}.weight"] = quantized(weight, form)
        stored |= {f"{layer}.{part}": tensor for part, tensor in parts.items()}
        if form.name == "scale_weight":
            stored[f"{layer}.scale_input"] = torch.ones(())
        if form.stated == "mark":
            stored[f"{layer}.comfy_quant"] = bytes_of({"format": form.format})
        header[f"{prefix}{layer}"] = {"format": form.format}
    if form.stated == "dtype" and form.name == "scale_weight":
        stored["scaled_fp8"] = torch.zeros(2, dtype=FORMATS[form.format])
    metadata = {HEADER: json.dumps({"format_version": "1.0", "layers": header})} if form.stated == "header" else {}
    named = [{f"{prefix}{name}": tensor for name, tensor in state.items()} for state in (stored, worth)]
    return named[0], named[1], metadata


def save(path: Path, kind: str, state: State, metadata: dict[str, str] | None = None) -> Path:
    if path.suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(
            {name: t.contiguous() for name, t in state.items()}, path, {**KINDS[kind].metadata, **(metadata or {})}
        )
    return path


@pytest.fixture
def headers_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reading a weight fails."""
    read = CheckpointFile.read

    def checked(self: CheckpointFile, name: str, *args: Any, **kwargs: Any) -> Tensor:
        assert not name.endswith((".weight", ".bias")), name
        return read(self, name, *args, **kwargs)

    monkeypatch.setattr(CheckpointFile, "read", checked)
    yield
    monkeypatch.setattr(CheckpointFile, "read", read)


# ------------------------------------------------------------------------------------------------------- what is read


def has_matrices(kind: str) -> bool:
    return any(state_of(kind)[f"{layer}.weight"].ndim == 2 for layer in layers_of(kind))


CASES = [
    (kind, form, suffix)
    for kind in KINDS
    for form in FORMS
    for suffix in (".safetensors", ".pth")
    if (form.format not in ("nvfp4", "mxfp8") or has_matrices(kind)) and (suffix != ".pth" or form.stated != "header")
]


@pytest.mark.parametrize(("kind", "form", "suffix"), CASES, ids=[f"{k}-{f}{s}" for k, f, s in CASES])
def test_a_quantized_file_is_worth_its_dequantized_one(tmp_path: Path, kind: str, form: Form, suffix: str) -> None:
    stored, worth, metadata = file_of(kind, form)
    made = values_of(KINDS[kind].load(save(tmp_path / f"quantized{suffix}", kind, stored, metadata)))
    plain = values_of(KINDS[kind].load(save(tmp_path / f"plain{suffix}", kind, worth)))
    assert made.keys() == plain.keys()
    assert [name for name in plain if not torch.equal(made[name], plain[name])] == []
    assert all(tensor.isfinite().all() for tensor in made.values())


def test_each_part_may_list_its_own_layers(tmp_path: Path) -> None:
    stored, worth, metadata = file_of("DiT", Form("int8_tensorwise", "row", stated="header"))
    layers = json.loads(metadata[HEADER])["layers"]
    names = sorted(stored)
    for number, half in ((1, names[: len(names) // 2]), (2, names[len(names) // 2 :])):
        state = {name: stored[name] for name in half}
        own = {layer: mark for layer, mark in layers.items() if f"{layer}.weight" in state}
        assert own
        header = {HEADER: json.dumps({"format_version": "1.0", "layers": own})}
        first = save(tmp_path / f"x-0000{number}-of-00002.safetensors", "DiT", state, header)
    made = values_of(dit(first))
    plain = values_of(dit(save(tmp_path / "plain.safetensors", "DiT", worth)))
    assert [name for name in plain if not torch.equal(made[name], plain[name])] == []


@pytest.mark.parametrize("broken", [1, 2])
def test_a_part_with_a_damaged_header(tmp_path: Path, broken: int) -> None:
    stored, _, metadata = file_of("DiT", Form("int8_tensorwise", "row", stated="header"))
    names = sorted(stored)
    for number in (1, 2):
        state = {name: stored[name] for name in names[number - 1 :: 2]}
        header = {HEADER: "{"} if number == broken else metadata
        path = save(tmp_path / f"x-0000{number}-of-00002.safetensors", "DiT", state, header)
    with pytest.raises(CheckpointError, match=f"unreadable {HEADER}"):
        dit(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", ["model.", "model.diffusion_model."])
@pytest.mark.parametrize("bare", [False, True])
def test_the_header_names_layers_as_the_file_does_or_bare(tmp_path: Path, kind: str, prefix: str, bare: bool) -> None:
    form = Form("int8_tensorwise", "row", stated="header")  # without the header it cannot be read
    stored, worth, metadata = file_of(kind, form, prefix)
    if bare:
        outer = prefix + ("vision_model." if kind == "CLIP" else "")
        metadata = {HEADER: metadata[HEADER].replace(f'"{outer}', '"')}
    if kind == "text encoder":  # the tokenizer lies at the front
        for state in (stored, worth):
            state["spiece_model"] = state.pop(f"{prefix}spiece_model")
    made = values_of(KINDS[kind].load(save(tmp_path / "x.safetensors", kind, stored, metadata)))
    plain = values_of(KINDS[kind].load(save(tmp_path / "y.safetensors", kind, worth)))
    assert [name for name in plain if not torch.equal(made[name], plain[name])] == []


@pytest.mark.parametrize(
    ("form", "layer_type"),
    [("float8_e4m3fn", Fp8Linear), ("nvfp4", NVFP4Linear), ("mxfp8", nn.Linear), ("int8_tensorwise", nn.Linear)],
)
def test_the_dit_keeps_what_a_layer_runs_and_says_what_it_unpacks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str, layer_type: type
) -> None:
    found = next(f for f in FORMS if f.format == form)
    with caplog.at_level("INFO"):
        model = dit(save(tmp_path / "x.safetensors", "DiT", *file_of("DiT", found)[::2]))
    assert type(model.get_submodule("blocks.0.self_attn.q")) is layer_type
    assert (f"unpacked from 4 x {form}" in caplog.text) == (layer_type is nn.Linear)


@pytest.mark.parametrize(("base", "fast_way"), [(MARKED, "the fp8 matmul"), (NVFP4, "the FP4 matmul")])
def test_a_file_may_ask_for_full_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Form, fast_way: str
) -> None:
    stored, worth, _ = file_of("DiT", base)
    for name in [name for name in stored if name.endswith("comfy_quant")]:
        stored[name] = bytes_of({"format": base.format, "full_precision_matrix_mult": True})
    path = save(tmp_path / "x.safetensors", "DiT", stored)
    quantization = "fp8_e4m3fn_fast" if base is MARKED else "disabled"
    layer = load_dit(path, base_dtype=torch.float32, quantization=quantization).get_submodule("blocks.0.ffn.0")
    assert isinstance(layer, QuantizedLinear)
    monkeypatch.setattr(nvfp4, "nvfp4_matmul_reasons", lambda *given: [])  # as on a GPU with FP4 tensor cores
    assert f"instead of {fast_way} (the file asks for full precision)" in how_it_runs(layer)
    x = torch.randn(3, layer.in_features)
    plain = nn.functional.linear(x, worth["blocks.0.ffn.0.weight"], layer.bias)
    assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("kind", ["text encoder", "CLIP", "wav2vec2"])
def test_gguf_blocks_of_encoders_are_unpacked(tmp_path: Path, kind: str) -> None:
    state = {name: tensor.float() for name, tensor in state_of(kind).items() if name != "spiece_model"}
    writer, worth = gguf.GGUFWriter(tmp_path / "x.gguf", "test"), dict(state)
    for name, tensor in state.items():
        if name.removesuffix(".weight") in layers_of(kind) and tensor.ndim == 2:
            blocks = gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            worth[name] = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0))
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if kind == "text encoder":
        (tmp_path / "spiece.model").write_bytes(tiny.tokenizer_model())
    made = values_of(KINDS[kind].load(tmp_path / "x.gguf"))
    plain = values_of(KINDS[kind].load(save(tmp_path / "plain.safetensors", kind, worth)))
    assert [name for name in plain if not torch.equal(made[name], plain[name])] == []


@pytest.mark.parametrize(
    "form", [FP8, Form("float8_e4m3fn", "row"), Form("int8_tensorwise", "row"), NVFP4, MXFP8], ids=str
)
def test_fused_weights_of_official_clip_names_are_scaled_before_they_are_split(tmp_path: Path, form: Form) -> None:
    bare = {name.removeprefix("vision_model."): tensor for name, tensor in state_of("CLIP").items()}
    stored = {f"visual.{name}": tensor for name, tensor in official_clip_names(bare).items()}
    worth = dict(stored)
    for name in [name for name in stored if name.endswith("to_qkv.weight")]:
        layer = name.removesuffix(".weight")
        parts, worth[name] = quantized(stored[name], form)
        stored |= {f"{layer}.{part}": tensor for part, tensor in parts.items()}
        stored[f"{layer}.comfy_quant"] = bytes_of({"format": form.format})
    made, plain = (
        values_of(ClipVision.load(save(tmp_path / f"{i}.safetensors", "CLIP", state)).model)
        for i, state in enumerate((stored, worth))
    )
    assert [name for name in plain if not torch.equal(made[name], plain[name])] == []


def test_what_is_unpacked_can_be_quantized_while_it_is_loaded(tmp_path: Path) -> None:
    stored, worth, _ = file_of("DiT", Form("mxfp8", "tiled"))
    models = [
        load_dit(save(tmp_path / f"{i}.safetensors", "DiT", state), quantization="fp8_e4m3fn_scaled")
        for i, state in enumerate((stored, worth))
    ]
    a, b = (model.get_submodule("blocks.0.self_attn.q") for model in models)
    assert isinstance(a, Fp8Linear)
    assert torch.equal(a.weight.view(torch.uint8), b.weight.view(torch.uint8))


# --------------------------------------------------------------------------------------------------- what is rejected


Fault = Callable[[State, str, dict[str, str]], None]
FAULTS: dict[str, tuple[str, Fault, str]] = {}
"""Name -> (the form that is spoilt, how, what the sentence says)."""

BASES = {"fp8": FP8, "marked": MARKED, "int8": INT8, "nvfp4": NVFP4, "mxfp8": MXFP8, "header": FORMS[2]}


def fault(name: str, base: str, says: str) -> Callable[[Fault], Fault]:
    def add(spoil: Fault) -> Fault:
        FAULTS[name] = (base, spoil, says)
        return spoil

    return add


def put(name: str, base: str, says: str, part: str, value: Callable[[Tensor], Tensor | None]) -> None:
    """A fault that puts the tensor `value(weight)` at the layer's `part`, or takes it away."""

    def spoil(state: State, layer: str, metadata: dict[str, str]) -> None:
        tensor = value(state[f"{layer}.weight"])
        state.pop(f"{layer}.{part}", None)
        if tensor is not None:
            state[f"{layer}.{part}"] = tensor

    FAULTS[name] = (base, spoil, says)


def columns(w: Tensor) -> int:
    return w.numel() // w.shape[0]


for _base in ("fp8", "marked", "int8"):
    put(
        f"{_base}, a scale per column", _base, "one per output row", "weight_scale", lambda w: torch.ones(1, columns(w))
    )
    put(f"{_base}, block scales", _base, "one per output row", "weight_scale", lambda w: torch.ones(2, 2))
    put(f"{_base}, two scales", _base, "one per output row", "weight_scale", lambda w: torch.ones(2))
    put(f"{_base}, a scale of every value", _base, "one per output row", "weight_scale", torch.ones_like)
    put(f"{_base}, an empty scale", _base, "one per output row", "weight_scale", lambda w: torch.ones(0))
    put(f"{_base}, no scale", _base, "has no scale for", "weight_scale", lambda w: None)
    put(f"{_base}, NaN", _base, "not finite", "weight_scale", lambda w: torch.tensor(float("nan")))
    put(f"{_base}, e8m0", _base, "as uint8 where float32", "weight_scale", lambda w: torch.ones((), dtype=torch.uint8))
    put(f"{_base}, both names", _base, "two scales", "scale_weight", lambda w: torch.ones(()))
    put(f"{_base}, nvfp4's second", _base, "does not state to be nvfp4", "weight_scale_2", lambda w: torch.ones(()))
    put(f"{_base}, 16 bits", _base, "takes no scale|stores it as bfloat16", "weight", lambda w: w.to(torch.bfloat16))
    put(f"{_base}, zero points", _base, "not supported", "zeros", lambda w: torch.zeros(2))
    put(f"{_base}, unmerged LoRA", _base, "not supported", "lora_A.weight", lambda w: torch.ones(2, 2))

for _format in ("convrot_w4a4", "asym_w4a8_int8", "awq_w4a16", "float8_e4m3fnuz", "int4", "svdquant"):
    put(f"format {_format}", "marked", f"'{_format}'", "comfy_quant", lambda w, f=_format: bytes_of({"format": f}))
for _format in FORMATS:
    if FORMATS[_format] != torch.float8_e4m3fn:
        _says = f"format {_format} for .* stores it as float8_e4m3fn"
        put(f"states {_format}", "marked", _says, "comfy_quant", lambda w, f=_format: bytes_of({"format": f}))
for _name, _mark in {
    "no JSON": "{format",
    "a list": [1],
    "no format": {},
    "a number": {"format": 8},
    "deep": "[" * 60000,
    "empty": "",
    "no UTF-8": "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
}.items():
    put(f"mark: {_name}", "marked", "unreadable", "comfy_quant", lambda w, m=_mark: bytes_of(m))
put(
    "mark: rotated",
    "int8",
    "convrot True",
    "comfy_quant",
    lambda w: bytes_of({"format": "int8_tensorwise", "convrot": True}),
)
put(
    "mark: other groups",
    "mxfp8",
    "group_size 64",
    "comfy_quant",
    lambda w: bytes_of({"format": "mxfp8", "group_size": 64}),
)
put("mark: floats", "marked", "unreadable", "comfy_quant", lambda w: torch.ones(19))
put("int8 without a mark", "int8", "takes no scale", "comfy_quant", lambda w: None)
put("nvfp4 without a mark", "nvfp4", "does not state to be nvfp4", "comfy_quant", lambda w: None)
put("nvfp4, no scale", "nvfp4", "no scale", "weight_scale", lambda w: None)
put("nvfp4, no second scale", "nvfp4", "no weight_scale_2", "weight_scale_2", lambda w: None)
put("nvfp4, second per row", "nvfp4", "one value", "weight_scale_2", lambda w: torch.ones(w.shape[0]))
put("nvfp4, one scale", "nvfp4", "per 16", "weight_scale", lambda w: torch.ones((), dtype=torch.uint8))
put(
    "nvfp4, float scales",
    "nvfp4",
    "as float32",
    "weight_scale",
    lambda w: torch.ones(tile_padded(w.shape[0], w.shape[1] // 8)),
)
put("nvfp4, a column less", "nvfp4", "per 16", "weight", lambda w: w[:, 1:])
put("mxfp8, no scale", "mxfp8", "no scale", "weight_scale", lambda w: None)
put("mxfp8, one scale", "mxfp8", "per 32", "weight_scale", lambda w: torch.ones((), dtype=torch.uint8))
put("mxfp8, per row", "mxfp8", "per 32", "weight_scale", lambda w: torch.ones(w.shape[0], dtype=torch.uint8))
put("mxfp8, floats", "mxfp8", "as float32", "weight_scale", lambda w: torch.ones(w.shape[0], w.shape[1] // 32))
for _part in (
    "absmax",
    "quant_map",
    "weight.absmax",
    "SCB",
    "scales",
    "qzeros",
    "zero_point",
    "k_scale",
    "weight_format",
):
    put(f"leftover {_part}", "fp8", "not supported", _part, lambda w: torch.ones(2))


@fault("a scale without a weight", "fp8", "but no .*weight")
def _(state: State, layer: str, metadata: dict[str, str]) -> None:
    state[f"{layer}_2.weight_scale"] = torch.ones(())


@fault("a marker without scales", "fp8", "marker scaled_fp8")
def _(state: State, layer: str, metadata: dict[str, str]) -> None:
    for name in [name for name in state if name.endswith("weight_scale")]:
        del state[name]
    state["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)


for _name, _content, _says in (
    ("no JSON", "{", "unreadable"),
    ("a list", "[]", "unreadable"),
    ("layers a list", '{"layers": []}', "unreadable"),
    ("a layer without format", '{"layers": {"LAYER": {}}}', "unreadable"),
    ("a layer as text", '{"layers": {"LAYER": "nvfp4"}}', "unreadable"),
    ("deep", "[" * 60000, "unreadable"),
    ("version 2", '{"format_version": "2.0", "layers": {}}', "version 2.0"),
    ("other format", '{"layers": {"LAYER": {"format": "awq_w4a16"}}}', "'awq_w4a16'"),
    ("other dtype", '{"layers": {"LAYER": {"format": "nvfp4"}}}', "stores it as float8_e4m3fn"),
):

    @fault(f"header: {_name}", "header", _says)
    def _(state: State, layer: str, metadata: dict[str, str], content: str = _content) -> None:
        metadata[HEADER] = content.replace("LAYER", layer)


@fault("header and mark disagree", "header", "two formats")
def _(state: State, layer: str, metadata: dict[str, str]) -> None:
    state[f"{layer}.comfy_quant"] = bytes_of({"format": "float8_e5m2"})


@pytest.mark.usefixtures("headers_only")
@pytest.mark.parametrize(
    ("kind", "name"),
    [(k, n) for n in FAULTS for k in KINDS if FAULTS[n][0] not in ("nvfp4", "mxfp8") or has_matrices(k)],
)
def test_every_fault_is_one_sentence_before_a_weight_is_read(tmp_path: Path, kind: str, name: str) -> None:
    base, spoil, says = FAULTS[name]
    state, _, metadata = file_of(kind, BASES[base])
    # The last one is in a block, with the same layer in others.
    layer = [layer for layer in layers_of(kind) if state[f"{layer}.weight"].ndim == 2 or not has_matrices(kind)][-1]
    spoil(state, layer, metadata)
    with pytest.raises(CheckpointError, match=says) as caught:
        KINDS[kind].inspect(save(tmp_path / "x.safetensors", kind, state, metadata))
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.count(". ") == 0
    assert "x.safetensors" in sentence


@pytest.mark.usefixtures("headers_only")
@pytest.mark.parametrize("kind", KINDS)
def test_no_float8_weight_of_a_scaled_file_may_lose_its_scale(tmp_path: Path, kind: str) -> None:
    """Whether its layer is in every block or there once."""
    state, _, _ = file_of(kind, FP8)
    ranks = Counter(state[f"{layer}.weight"].ndim for layer in layers_of(kind))
    for layer in layers_of(kind):
        if ranks[state[f"{layer}.weight"].ndim] > 1:
            without = {name: tensor for name, tensor in state.items() if name != f"{layer}.weight_scale"}
            with pytest.raises(CheckpointError, match=f"has no scale for .*{layer}.weight, which is float8 as"):
                KINDS[kind].inspect(save(tmp_path / "x.safetensors", kind, without))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_scaled_file_scales_none_of_may_be_plain_float8(tmp_path: Path, kind: str) -> None:
    stored, worth, _ = file_of(kind, FP8)
    ranks = {stored[f"{layer}.weight"].ndim for layer in layers_of(kind)}
    plain = [name for name, t in worth.items() if t.is_floating_point() and t.ndim and t.ndim not in ranks]
    assert plain
    for name in plain:
        stored[name] = stored[name].to(torch.float8_e4m3fn)
        worth[name] = stored[name].float()
    made, meant = (
        values_of(KINDS[kind].load(save(tmp_path / f"{i}.safetensors", kind, state)))
        for i, state in enumerate((stored, worth))
    )
    assert [name for name in meant if not torch.equal(made[name], meant[name])] == []


ROLES = {
    "DiT": "model",
    "adapter": "adapter",
    "text encoder": "text_encoder",
    "CLIP": "clip_vision",
    "VAE": "vae",
    "small decoder": "decoder",
    "wav2vec2": "wav2vec",
}


@pytest.mark.usefixtures("headers_only")
@pytest.mark.parametrize("kind", KINDS)
def test_a_job_is_rejected_before_a_weight_of_any_of_its_files_is_read(
    tmp_path: Path, tiny_set: tiny.TinySet, kind: str
) -> None:
    state, _, _ = file_of(kind, FP8)
    state[f"{layers_of(kind)[-1]}.weight_scale"] = torch.ones(2, 2)
    spoilt = save(tmp_path / "spoilt.safetensors", kind, state)
    with demo_job(tmp_path / "out.mp4", models=tiny_set.model.parent) as job:
        check(job)
        with pytest.raises(CheckpointError, match=r"spoilt\.safetensors has .* of shape \[2, 2\]"):
            check(replace(job, files=replace(job.files, **{ROLES[kind]: spoilt})))


@pytest.mark.usefixtures("headers_only")
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_of_integers_or_powers_of_two_is_no_weight(tmp_path: Path, kind: str) -> None:
    for dtype in (torch.uint8, torch.int8, torch.int32, torch.float8_e8m0fnu):
        state = dict(state_of(kind))
        name = f"{layers_of(kind)[0]}.weight"
        state[name] = state[name].to(dtype)
        with pytest.raises(CheckpointError, match=r"without saying how to unpack it|only scales are stored"):
            KINDS[kind].inspect(save(tmp_path / f"{dtype}.safetensors", kind, state))


@pytest.mark.usefixtures("headers_only")
@pytest.mark.parametrize("kind", ["VAE", "small decoder"])
@pytest.mark.parametrize("form", ["nvfp4", "mxfp8"])
def test_convolutions_are_not_stored_in_blocks(tmp_path: Path, kind: str, form: str) -> None:
    state = dict(state_of(kind))
    layer = layers_of(kind)[0]
    shape = state[f"{layer}.weight"].shape
    state[f"{layer}.weight"] = torch.zeros(shape, dtype=FORMATS[form]).to(FORMATS[form])
    state[f"{layer}.comfy_quant"] = bytes_of({"format": form})
    state[f"{layer}.weight_scale"] = torch.ones(4, 4, dtype=torch.uint8)
    state[f"{layer}.weight_scale_2"] = torch.ones(())
    with pytest.raises(CheckpointError, match=layer):
        KINDS[kind].inspect(save(tmp_path / "x.safetensors", kind, state))


@pytest.mark.usefixtures("headers_only")
@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_that_nothing_reads_is_said(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    path = save(tmp_path / "x.safetensors", kind, {**state_of(kind), "unheard.of": torch.ones(1)})
    prefixed = kind == "CLIP"  # outside of "vision_model." lie other models
    if kind in ("DiT", "adapter"):
        with pytest.raises(CheckpointError, match=r"unheard\.of"):
            KINDS[kind].inspect(path)
    else:
        KINDS[kind].inspect(path)
        assert ("unheard.of" in caplog.text) != prefixed


def test_what_such_files_hold_for_other_uses_is_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    extra = {
        "wav2vec2": {
            "quantizer.codevectors": torch.ones(1),
            "project_q.weight": torch.ones(1),
            "masked_spec_embed": torch.ones(1),
        },
        "small decoder": {"encoder.0.weight": torch.ones(1), "encoder.4.conv.0.bias": torch.ones(1)},
        "CLIP": {"vision_model.embeddings.position_ids": torch.arange(4), "logit_scale": torch.ones(())},
    }
    for kind, tensors in extra.items():
        KINDS[kind].inspect(save(tmp_path / f"{kind}.safetensors", kind, {**state_of(kind), **tensors}))
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == []


def test_a_bias_that_the_model_has_no_place_for(tmp_path: Path) -> None:
    state = {**state_of("text encoder"), "blocks.0.attn.q.bias": torch.ones(64)}
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.q\.bias"):
        TextEncoder.inspect(save(tmp_path / "x.safetensors", "text encoder", state))
