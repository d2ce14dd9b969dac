"""GGUF files: written here with the gguf package, read by us, compared with gguf's own arithmetic."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from wanvideo_infinitetalk import fp8_optimization as fp8
from wanvideo_infinitetalk.wanvideo.checkpoints.gguf import read_gguf, read_gguf_metadata
from wanvideo_infinitetalk.wanvideo.errors import CheckpointError, InputError
from wanvideo_infinitetalk.wanvideo.linear.base import relative_l2
from wanvideo_infinitetalk.wanvideo.linear.gguf import GGUFLinear, GGUFTensor

TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q5_0", "Q5_1", "Q4_K", "Q4_0", "Q4_1", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS")
# Relative L2 of normally distributed weights after gguf's own quantizer, where it has one.
QUANTIZER_BOUNDS = {"Q8_0": 0.007, "Q5_1": 0.05, "Q5_0": 0.06, "Q4_1": 0.09, "Q4_0": 0.1}


def kind_of(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name]


def blocks_of(name: str, rows: int, columns: int) -> np.ndarray:
    """Packed rows: of random weights where gguf can quantize, otherwise random bytes with sane block scales."""
    kind = kind_of(name)
    if name in QUANTIZER_BOUNDS:
        weights = np.random.default_rng(1).standard_normal((rows, columns), dtype=np.float32)
        return gguf.quants.quantize(weights, kind)
    block_size, type_size = gguf.GGML_QUANT_SIZES[kind]
    packed = np.random.default_rng(2).integers(0, 256, (rows * columns // block_size, type_size), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.0123).tobytes(), dtype=np.uint8)
    # The float16 scales stand first (Q4_K, Q5_K: two; IQ4: one), or last (Q2_K: two, Q3_K, Q6_K: one).
    last = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}
    for start in last.get(name, (0,) if name.startswith("IQ4") else (0, 2)):
        packed[:, start : start + 2] = scale
    return packed.reshape(rows, -1)


def write(path, tensors: dict[str, Any], **strings: str):
    """tensors: name -> float array, or (packed rows, type's name)."""
    writer = gguf.GGUFWriter(path, "wan")
    for key, value in strings.items():
        writer.add_string(key, value)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[0], raw_dtype=kind_of(value[1]))
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_gguf_says(packed: np.ndarray, name: str) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(packed, kind_of(name)))


@pytest.mark.parametrize("name", TYPES)
def test_every_type_gives_the_numbers_of_the_gguf_package(tmp_path, name):
    packed = blocks_of(name, 6, 512)
    tensor = read_gguf(write(tmp_path / "m.gguf", {"w": (packed, name)}))["w"]
    assert isinstance(tensor, GGUFTensor)
    assert (tensor.shape, tensor.quant_type) == ((6, 512), name)
    expected = as_gguf_says(packed, name)
    assert expected.abs().max() > 0
    assert relative_l2(tensor.dequantize(torch.float32), expected) < 1e-6
    # One rounding of a tensor in float32, not the arithmetic of bfloat16.
    assert torch.equal(tensor.dequantize(torch.bfloat16), tensor.dequantize(torch.float32).bfloat16())


@pytest.mark.parametrize("name", QUANTIZER_BOUNDS)
def test_types_keep_their_accuracy(tmp_path, name):
    weights = np.random.default_rng(1).standard_normal((6, 512), dtype=np.float32)
    tensor = read_gguf(write(tmp_path / "m.gguf", {"w": (blocks_of(name, 6, 512), name)}))["w"]
    assert isinstance(tensor, GGUFTensor)
    assert relative_l2(tensor.dequantize(torch.float32), torch.from_numpy(weights)) < QUANTIZER_BOUNDS[name]


def test_plain_types_and_shapes(tmp_path):
    single = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    half = single.astype(np.float16)
    brain = gguf.quants.quantize(single, kind_of("BF16"))
    tensors = read_gguf(write(tmp_path / "m.gguf", {"single": single, "half": half, "brain": (brain, "BF16")}))
    for name, dtype in (("single", torch.float32), ("half", torch.float16), ("brain", torch.bfloat16)):
        tensor = tensors[name]
        assert isinstance(tensor, torch.Tensor)
        assert tensor.dtype == dtype
        assert torch.equal(tensor.float(), torch.from_numpy(single))


@pytest.mark.parametrize("name", ["F32", "Q8_0"])
def test_flattened_tensors_get_their_true_shape(tmp_path, name):
    shape = (8, 4, 1, 2, 2)
    values = np.random.default_rng(0).standard_normal((1, 128), dtype=np.float32)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "wan")
    writer.add_array("comfy.gguf.orig_shape.patch_embedding.weight", list(shape))
    if name == "F32":
        writer.add_tensor("patch_embedding.weight", values)
    else:
        writer.add_tensor(
            "patch_embedding.weight", gguf.quants.quantize(values, kind_of(name)), raw_dtype=kind_of(name)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = read_gguf(tmp_path / "m.gguf")["patch_embedding.weight"]
    assert tensor.shape == shape
    plain = tensor.dequantize(torch.float32) if isinstance(tensor, GGUFTensor) else tensor
    assert plain.shape == shape
    assert relative_l2(plain.flatten(), torch.from_numpy(values).flatten()) < 0.01


def test_metadata(tmp_path):
    path = write(tmp_path / "m.gguf", {"w": np.ones(4, np.float32)}, config='{"num_heads": 2}')
    metadata = read_gguf_metadata(path)
    assert metadata["general.architecture"] == "wan"
    assert metadata["config"] == '{"num_heads": 2}'


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TYPES)
def test_layers_keep_the_blocks_and_run(tmp_path, name, base):
    packed = blocks_of(name, 48, 256)
    tensor = read_gguf(write(tmp_path / "m.gguf", {"w": (packed, name)}))["w"]
    assert isinstance(tensor, GGUFTensor)
    linear = nn.Linear(256, 48)
    bias = linear.bias.detach().clone()
    layer = GGUFLinear.adopt(linear, tensor.to("cpu"), base)
    assert layer is linear
    assert layer.weight.numel() == packed.size
    assert layer.weight.dtype == torch.uint8
    for shape in ((256,), (3, 256), (2, 3, 256), (2, 1, 3, 256), (0, 256)):
        x = torch.randn(shape).to(base)
        before = x.clone()
        out = layer(x)
        assert torch.equal(x, before)
        assert out.dtype == base
        assert out.shape == (*shape[:-1], 48)
        assert out.is_contiguous()
        if x.numel():
            exact = F.linear(x.double(), as_gguf_says(packed, name).double(), bias.double())
            assert relative_l2(out, exact) < {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[base]


def test_blocks_survive_casts_and_state_dicts(tmp_path):
    packed = blocks_of("Q4_K", 48, 256)
    tensor = read_gguf(write(tmp_path / "m.gguf", {"w": (packed, "Q4_K")}))["w"]
    assert isinstance(tensor, GGUFTensor)
    layer, twin = nn.Linear(256, 48), nn.Linear(256, 48)
    GGUFLinear.adopt(layer, tensor.to("cpu"), torch.float32)
    GGUFLinear.adopt(twin, GGUFTensor(torch.zeros_like(tensor.blocks), "Q4_K", tensor.shape), torch.float32)
    layer.half()
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(3, 256)
    assert torch.equal(layer(x), twin(x))
    assert layer(x).dtype == torch.float32


def test_own_memory_is_independent_of_the_file(tmp_path):
    path = write(tmp_path / "m.gguf", {"w": (blocks_of("Q8_0", 4, 64), "Q8_0")})
    mapped = read_gguf(path)["w"]
    assert isinstance(mapped, GGUFTensor)
    own = mapped.to("cpu")
    assert own.blocks.data_ptr() != mapped.blocks.data_ptr()
    assert own.blocks.data_ptr() % 16 == 0
    assert torch.equal(own.blocks, mapped.blocks)


def test_compiles_without_graph_breaks(tmp_path):
    tensor = read_gguf(write(tmp_path / "m.gguf", {"w": (blocks_of("Q4_K", 48, 256), "Q4_K")}))["w"]
    assert isinstance(tensor, GGUFTensor)
    layer = GGUFLinear.adopt(nn.Linear(256, 48), tensor.to("cpu"), torch.float32)
    x = torch.randn(3, 256)
    with torch.no_grad():
        assert relative_l2(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)) < 1e-6


def test_quantizing_a_gguf_model_again_is_rejected_but_not_an_adapter_in_gguf(tmp_path):
    tensor = read_gguf(write(tmp_path / "m.gguf", {"w": (blocks_of("Q8_0", 64, 64), "Q8_0")}))["w"]
    assert isinstance(tensor, GGUFTensor)

    def model_of(*kinds: str) -> nn.Module:
        linears = [nn.Linear(64, 64) for _ in kinds]
        for linear, kind in zip(linears, kinds, strict=True):
            if kind == "gguf":
                GGUFLinear.adopt(linear, tensor.to("cpu"), torch.float32)
        model = nn.Module()
        model.blocks = nn.ModuleList(linears)
        return model

    adapter = model_of("gguf", "plain", "plain")
    fp8.quantize_linears(adapter, "fp8_e4m3fn_scaled", torch.float32)
    assert fp8.summary(adapter) == "2 x fp8_e4m3fn_scaled, 1 x gguf"
    base = model_of("gguf", "gguf", "plain")
    with pytest.raises(InputError, match="already holds gguf weights"):
        fp8.quantize_linears(base, "fp8_e4m3fn", torch.float32)
    fp8.quantize_linears(base, "disabled", torch.float32)
    assert fp8.summary(base) == "2 x gguf, 1 x float32"


def test_damaged_and_foreign_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        read_gguf(tmp_path / "none.gguf")
    path = write(tmp_path / "m.gguf", {"w": (blocks_of("Q8_0", 64, 256), "Q8_0")})
    whole = path.read_bytes()
    for length in (0, 3, 24, 60, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged or was not downloaded completely"):
            read_gguf(path)
    path.write_bytes(b"\0" * 4096)
    with pytest.raises(CheckpointError, match="damaged"):
        read_gguf(path)
    ternary = gguf.quants.quantize(np.ones((2, 256), np.float32), kind_of("TQ2_0"))
    with pytest.raises(CheckpointError, match="stores w as TQ2_0"):
        read_gguf(write(tmp_path / "t.gguf", {"w": (ternary, "TQ2_0")}))
    tensor = read_gguf(write(tmp_path / "s.gguf", {"w": (blocks_of("Q8_0", 4, 64), "Q8_0")}))["w"]
    assert isinstance(tensor, GGUFTensor)
    with pytest.raises(CheckpointError, match=r"\[4, 64\] stands where \[8, 64\]"):
        GGUFLinear.adopt(nn.Linear(64, 8), tensor, torch.float32)
