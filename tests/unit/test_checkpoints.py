"""Reading files and loading the DiT: every public form gives the same model, and what does not fit is a sentence."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from wanvideo_infinitetalk.cli.tiny_models import TinySet, adapter_weights, dit_weights
from wanvideo_infinitetalk.fp8_optimization import QUANTIZATIONS, Fp8Linear, quantize_weight_fp8
from wanvideo_infinitetalk.wanvideo.checkpoints.dit import dit_config, inspect_dit, load_dit, public_names
from wanvideo_infinitetalk.wanvideo.checkpoints.files import CheckpointFile, read_state_dict
from wanvideo_infinitetalk.wanvideo.errors import CheckpointError, InputError
from wanvideo_infinitetalk.wanvideo.linear.base import relative_l2
from wanvideo_infinitetalk.wanvideo.linear.gguf import GGUFLinear
from wanvideo_infinitetalk.wanvideo.linear.nvfp4 import NVFP4Linear, quantize_nvfp4
from wanvideo_infinitetalk.wanvideo.modules.model import WanModel

HEADS = {"config": json.dumps({"num_heads": 2, "audio_blocks": 2})}
FP8 = torch.float8_e4m3fn


def save(path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(state, str(path), metadata=HEADS if metadata is None else metadata)
    return path


def merged(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """DiT and adapter in one state dict."""
    return {name: t.to(dtype) for name, t in (dit_weights(dtype=dtype) | adapter_weights(dtype=dtype)).items()}


@pytest.fixture(scope="module")
def reference(tiny_set: TinySet) -> WanModel:
    return load_dit(tiny_set.model, tiny_set.adapter, base_dtype=torch.float32)


@pytest.fixture(scope="module")
def velocity() -> Callable[[WanModel], Tensor]:
    """One forward of any tiny model on the same inputs."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, y, clip = draw(16, 2, 4, 4), draw(20, 2, 4, 4), draw(1, 257, 1280)
    context, audio, t = [draw(5, 64)], draw(1, 5, 5, 2, 128), torch.tensor([500.0])

    @torch.no_grad()
    def run(model: WanModel) -> Tensor:
        return model(x, t, context, clip, y, audio).float()

    return run


# ------------------------------------------------------------------------------------------------------------- reading


def test_each_tensor_lies_in_aligned_memory_of_its_own(tmp_path: Path) -> None:
    # Odd sizes put the second and third tensor at odd bytes of the file.
    state = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.randn(5), "c": torch.randn(3, 3).to(FP8)}
    save(tmp_path / "x.safetensors", state)
    torch.save(state, tmp_path / "x.pth")
    for name in ("x.safetensors", "x.pth"):
        read = read_state_dict(tmp_path / name)
        assert list(read) == list(state)
        assert len({t.untyped_storage().data_ptr() for t in read.values()}) == 3
        for key, tensor in read.items():
            assert tensor.data_ptr() % 16 == 0
            assert tensor.storage_offset() == 0
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            assert torch.equal(tensor.float(), state[key].float())


def test_a_wrapped_state_dict_is_unwrapped_and_old_pickles_are_read(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "x.pt")
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("x.pt", "old.pt"):
        assert torch.equal(read_state_dict(tmp_path / name)["a"], torch.ones(2))


def test_reading_reports_how_far_it_is_and_logs_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save(tmp_path / "x.safetensors", {"a": torch.ones(4), "b": torch.ones(2)})
    steps: list[tuple[int, int]] = []
    with caplog.at_level(logging.INFO):
        read_state_dict(path, progress=lambda done, total: steps.append((done, total)))
    assert steps[-1] == (24, 24)
    assert len(steps) == 2
    assert [record.getMessage() for record in caplog.records if "x.safetensors" in record.getMessage()] != []


class Foreign:
    """What no state dict holds."""


def damaged_files(folder: Path) -> dict[str, tuple[Path, str]]:
    good = save(folder / "good.safetensors", {"a": torch.ones(100), "b": torch.ones(3)})
    content = good.read_bytes()
    torch.save({"a": torch.ones(100)}, folder / "good.pth")
    pickled = (folder / "good.pth").read_bytes()

    def write(name: str, data: bytes) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    torch.save({"a": Foreign()}, folder / "foreign.pth")
    torch.save([torch.ones(1)], folder / "list.pth")
    (folder / "folder.safetensors").mkdir()
    return {
        "missing": (folder / "nowhere.safetensors", "does not exist"),
        "folder": (folder / "folder.safetensors", "is a folder"),
        "empty": (write("empty.safetensors", b""), "is empty"),
        "truncated": (write("short.safetensors", content[:-8]), "not downloaded completely"),
        "header cut": (write("header.safetensors", content[:20]), "not downloaded completely"),
        "wild header": (write("wild.safetensors", b"\xff" * 64), "not downloaded completely"),
        "truncated pickle": (write("short.pth", pickled[:-50]), "not downloaded completely"),
        "no pickle": (write("noise.pth", bytes(range(256))), "not downloaded completely"),
        "foreign class": (folder / "foreign.pth", "foreign code"),
        "no table": (folder / "list.pth", "list instead of a table"),
        "lfs": (write("lfs.safetensors", b"version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
        "html": (write("page.safetensors", b"<!DOCTYPE html><html>"), "web page"),
        "ending": (write("model.onnx", b"abc"), "unknown ending"),
    }


@pytest.mark.parametrize(
    "case",
    [
        "missing",
        "folder",
        "empty",
        "truncated",
        "header cut",
        "wild header",
        "truncated pickle",
        "no pickle",
        "foreign class",
        "no table",
        "lfs",
        "html",
        "ending",
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, case: str) -> None:
    path, words = damaged_files(tmp_path)[case]
    with pytest.raises(CheckpointError, match=words) as caught:
        read_state_dict(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


class Hostile:
    """Unpickled without care, it writes the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[Path], object], tuple[Path]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_pickle_that_would_run_code_is_rejected_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    path, mark = tmp_path / "x.pt", tmp_path / "ran"
    torch.save({"a": torch.ones(2), "b": Hostile(mark)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="could run foreign code"):
        read_state_dict(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # so it would have run


# --------------------------------------------------------------------------------------------------- the same model


@pytest.mark.parametrize("prefix", ["", "model.", "diffusion_model.", "model.diffusion_model."])
def test_prefixes(tmp_path: Path, reference: WanModel, prefix: str) -> None:
    # an all-in-one file holds other models too
    state = {prefix + name: t for name, t in merged().items()}
    if prefix:
        state["first_stage_model.decoder.weight"] = torch.ones(1)
    model = load_dit(save(tmp_path / "x.safetensors", state), base_dtype=torch.float32)
    assert model.config == reference.config
    assert set(model.state_dict()) == set(reference.state_dict())


def test_merged_under_the_other_name_is_base_plus_adapter(
    tmp_path: Path, tiny_set: TinySet, reference: WanModel, velocity: Callable[[WanModel], Tensor]
) -> None:
    state = dict(load_file(tiny_set.model))
    for name, tensor in load_file(tiny_set.adapter).items():
        state[name.replace("audio_proj.", "multitalk_audio_proj.")] = tensor
    model = load_dit(save(tmp_path / "x.safetensors", state), base_dtype=torch.float32)
    assert torch.equal(velocity(model), velocity(reference))


def test_an_adapter_replaces_the_audio_layers_of_a_merged_file(tmp_path: Path, tiny_set: TinySet) -> None:
    state = merged()
    state["audio_proj.norm.bias"] = torch.full_like(state["audio_proj.norm.bias"], 3)
    path = save(tmp_path / "x.safetensors", state)
    own, replaced = load_dit(path), load_dit(path, tiny_set.adapter)
    assert float(own.get_parameter("audio_proj.norm.bias")[0]) == 3
    assert float(replaced.get_parameter("audio_proj.norm.bias")[0]) < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_16_and_32_bits_become_the_base_dtype(
    tmp_path: Path, reference: WanModel, velocity: Callable[[WanModel], Tensor], dtype: torch.dtype
) -> None:
    path = save(tmp_path / "x.safetensors", merged(dtype))
    model = load_dit(path, base_dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert relative_l2(velocity(model), velocity(reference)) < 0.02
    assert {p.dtype for p in load_dit(path, base_dtype=dtype).parameters()} == {dtype}


def test_a_pickle_loads_too(tmp_path: Path, reference: WanModel, velocity: Callable[[WanModel], Tensor]) -> None:
    # A pickle carries no metadata, so its heads are 128 wide.
    torch.save(merged(), tmp_path / "x.pth")
    assert load_dit(tmp_path / "x.pth").config.num_heads == 1


def is_quantized(name: str) -> bool:
    return name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name


def fp8_files(kind: str) -> dict[str, Tensor]:
    """The merged model as savers write fp8: what is quantized depends on the saver."""
    out: dict[str, Tensor] = {}
    for name, tensor in merged(torch.float32).items():
        layer = name.removesuffix(".weight")
        matrix = tensor.ndim == 2 and name.endswith(".weight")
        if (kind == "plain everywhere" and (matrix or "bias" in name)) or (kind == "plain" and is_quantized(name)):
            out[name] = tensor.to(FP8)
        elif kind in ("scale_weight", "weight_scale", "comfy_quant") and matrix:
            stored, scale = quantize_weight_fp8(tensor, FP8, scaled=True)
            assert scale is not None
            out[name] = stored
            out[f"{layer}.{'scale_weight' if kind == 'scale_weight' else 'weight_scale'}"] = scale
            if kind == "scale_weight":
                out[f"{layer}.scale_input"] = torch.ones(())
            if kind == "comfy_quant":
                out[f"{layer}.comfy_quant"] = bytes_of({"format": "float8_e4m3fn"})
        else:
            out[name] = tensor.to(torch.float16)
    if kind == "scale_weight":
        out["scaled_fp8"] = torch.zeros(2, dtype=FP8)
    return out


def bytes_of(value: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).clone()


@pytest.mark.parametrize(
    ("kind", "bound"),
    [
        ("plain", 0.06),
        ("plain everywhere", 0.12),
        ("scale_weight", 0.06),
        ("weight_scale", 0.06),
        ("comfy_quant", 0.06),
    ],
)
def test_fp8_files_keep_the_blocks_in_8_bits_and_unpack_the_rest(
    tmp_path: Path, reference: WanModel, velocity: Callable[[WanModel], Tensor], kind: str, bound: float
) -> None:
    model = load_dit(save(tmp_path / "x.safetensors", fp8_files(kind)), base_dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("blocks."):
            assert isinstance(module, Fp8Linear), name
            assert module.weight.dtype == FP8
            assert (module.scale_weight is not None) == (not kind.startswith("plain"))
        elif isinstance(module, nn.Linear):
            assert module.weight.dtype == torch.float32, name
    assert relative_l2(velocity(model), velocity(reference)) < bound


def test_nvfp4_layers_of_a_mixed_precision_file_stay_packed(
    tmp_path: Path, reference: WanModel, velocity: Callable[[WanModel], Tensor]
) -> None:
    state = merged(torch.bfloat16)
    for name in [n for n in state if n.startswith("blocks.") and n.endswith(("ffn.0.weight", "self_attn.q.weight"))]:
        layer = name.removesuffix(".weight")
        packed, scales, scale = quantize_nvfp4(state[name].float())
        state |= {name: packed, f"{layer}.weight_scale": scales, f"{layer}.weight_scale_2": scale}
        state[f"{layer}.comfy_quant"] = bytes_of({"format": "nvfp4"})
    model = load_dit(save(tmp_path / "x.safetensors", state), base_dtype=torch.float32)
    packed_layers = [name for name, module in model.named_modules() if isinstance(module, NVFP4Linear)]
    assert packed_layers == ["blocks.0.self_attn.q", "blocks.0.ffn.0", "blocks.1.self_attn.q", "blocks.1.ffn.0"]
    assert relative_l2(velocity(model), velocity(reference)) < 0.12


@pytest.mark.parametrize(("kind", "bound"), [("Q8_0", 0.02), ("Q4_0", 0.25)])
def test_gguf_base_with_safetensors_adapter_and_the_reverse(
    tmp_path: Path,
    tiny_set: TinySet,
    reference: WanModel,
    velocity: Callable[[WanModel], Tensor],
    kind: str,
    bound: float,
) -> None:
    base = write_gguf(tmp_path / "base.gguf", dit_weights(dtype=torch.float32), kind)
    adapter = write_gguf(tmp_path / "adapter.gguf", adapter_weights(dtype=torch.float32), kind)
    # GGUF files say nothing of heads: the safetensors file with it must.
    plain_base = save(tmp_path / "base.safetensors", dit_weights())
    for files in ((base, save(tmp_path / "a.safetensors", adapter_weights())), (plain_base, adapter)):
        model = load_dit(*files, base_dtype=torch.float32)
        packed = [name for name, module in model.named_modules() if isinstance(module, GGUFLinear)]
        assert len(packed) == (6 if files[1] is adapter else 24)
        assert all(name.startswith("blocks.") for name in packed)
        assert relative_l2(velocity(model), velocity(reference)) < bound


def write_gguf(path: Path, state: dict[str, Tensor], kind: str) -> Path:
    writer = gguf.GGUFWriter(path, "wan")
    for name, tensor in state.items():
        values = tensor.numpy()
        if values.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(values.shape))
            values = values.reshape(values.shape[0], -1)
        if tensor.ndim == 2:
            quant = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(values, quant), raw_dtype=quant)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_that_says_a_format_that_is_not_read_is_refused(tmp_path: Path) -> None:
    state = merged()
    state["blocks.0.ffn.0.comfy_quant"] = bytes_of({"format": "mxfp8"})
    with pytest.raises(
        CheckpointError, match=r"the format mxfp8 for blocks\.0\.ffn\.0\.weight, but stores it as bfloat16"
    ):
        load_dit(save(tmp_path / "x.safetensors", state))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_every_quantization_at_loading(
    tiny_set: TinySet, reference: WanModel, velocity: Callable[[WanModel], Tensor], quantization: str
) -> None:
    model = load_dit(tiny_set.model, tiny_set.adapter, quantization=quantization, base_dtype=torch.float32)
    bounds = {"disabled": 0.0, "fp8_e4m3fn": 0.06, "fp8_e5m2": 0.1, "fp4_scaled": 0.2}
    bound = next(value for name, value in reversed(bounds.items()) if quantization.startswith(name))
    error = relative_l2(velocity(model), velocity(reference))
    assert error <= bound
    assert (error == 0) == (quantization == "disabled")
    for name, tensor in model.state_dict().items():
        assert not tensor.is_meta, name
        assert tensor.data_ptr() % 16 == 0, name
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name


def test_one_copy_in_memory(tiny_set: TinySet) -> None:
    """All weights together take what the file's take: nothing is held twice."""
    model = load_dit(tiny_set.model, base_dtype=torch.bfloat16)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    stored = sum(t.numel() * t.element_size() for t in load_file(tiny_set.model).values())
    assert sum(held.values()) == stored


def test_loading_shows_progress_and_freezes(tiny_set: TinySet, caplog: pytest.LogCaptureFixture) -> None:
    steps: list[tuple[int, int]] = []
    with caplog.at_level(logging.INFO):
        model = load_dit(tiny_set.model, tiny_set.adapter, progress=lambda done, total: steps.append((done, total)))
    assert steps[-1][0] == steps[-1][1] > 0
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    lines = [record.getMessage() for record in caplog.records if record.name.endswith("checkpoints.dit")]
    assert len(lines) == 1
    assert tiny_set.adapter.name in lines[0]


# ------------------------------------------------------------------------------------------------------ configurations


def meta(shapes: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.to("meta") for name, t in shapes.items()}


def test_the_configuration_is_read_from_shapes() -> None:
    config = dit_config(meta(merged()), HEADS)
    assert (config.model_type, config.in_dim, config.out_dim) == ("i2v", 36, 16)
    assert (config.dim, config.ffn_dim, config.num_heads, config.num_layers) == (128, 256, 2, 2)
    assert (config.text_dim, config.freq_dim, config.clip_dim, config.text_len) == (64, 256, 1280, 512)
    audio = config.audio
    assert audio is not None
    assert (audio.audio_window, audio.vae_scale, audio.blocks, audio.channels) == (5, 4, 2, 128)
    assert (audio.intermediate_dim, audio.output_dim, audio.context_tokens) == (64, 64, 8)
    assert dit_config(meta(dit_weights("t2v"))).model_type == "t2v"


def test_public_models_have_heads_of_128() -> None:
    assert dit_config(meta(dit_weights())).num_heads == 1


def test_humo_is_recognized() -> None:
    state = meta(dit_weights("t2v", in_dim=36))
    for name, shape in {
        "audio_proj.audio_proj_glob_1.layer.weight": (32, 8 * 5 * 16),
        "audio_proj.audio_proj_glob_3.layer.weight": (16 * 24, 32),
        "audio_proj.audio_proj_glob_norm.layer.weight": (24,),
    }.items():
        state[name] = torch.empty(shape, device="meta")
    humo = dit_config(state, HEADS).humo
    assert humo is not None
    assert (humo.channels, humo.intermediate_dim, humo.output_dim, humo.context_tokens) == (16, 32, 24, 16)


def test_public_names_of_all_in_one_files() -> None:
    names = ["model.diffusion_model.patch_embedding.weight", "model.diffusion_model.multitalk_audio_proj.a", "vae.b"]
    assert public_names(names, "patch_embedding.weight") == {
        "patch_embedding.weight": names[0],
        "audio_proj.a": names[1],
    }
    assert public_names(names, "nothing") == {}


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vace_blocks.0.weight": (1,)}, "a VACE model"),
        ({"casual.audio_injector.x": (1,)}, "S2V"),
        ({"pose_patch_embedding.weight": (1,)}, "Animate"),
        ({"img_emb.emb_pos": (1,)}, "first-and-last-frame"),
        ({"patch_embedding.weight": (3072, 48, 1, 2, 2)}, "5B"),
        ({"patch_embedding.weight": (4096, 16, 1, 2, 2)}, "LongCat"),
        ({"patch_embedding.weight": (128, 52, 1, 2, 2)}, "52 input channels"),
        ({"patch_embedding.weight": (100, 36, 1, 2, 2)}, "does not divide into"),
    ],
)
def test_other_models_are_named(change: dict[str, tuple[int, ...]], words: str) -> None:
    state = meta(merged()) | {name: torch.empty(shape, device="meta") for name, shape in change.items()}
    with pytest.raises(CheckpointError, match=words):
        dit_config(state, {"config": '{"num_heads": 16}'})


def test_wan22_image_to_video_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"Wan2\.2 I2V"):
        dit_config(meta(dit_weights("t2v", in_dim=36)), HEADS)


@pytest.mark.parametrize(
    ("role", "words"),
    [
        ("vae", "a Wan2.1 VAE, not a Wan2.1 diffusion transformer"),
        ("text_encoder", "a T5 text encoder"),
        ("clip_vision", "a CLIP vision model"),
        ("wav2vec_file", "a wav2vec2 model"),
        ("adapter", "an InfiniteTalk adapter, not the model itself"),
    ],
)
def test_other_files_given_as_the_model_are_named(tiny_set: TinySet, role: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        load_dit(getattr(tiny_set, role))


@pytest.mark.parametrize(("role", "words"), [("vae", "a Wan2.1 VAE"), ("model", "not an InfiniteTalk")])
def test_other_files_given_as_the_adapter_are_named(tiny_set: TinySet, role: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        load_dit(tiny_set.model, getattr(tiny_set, role))


def test_a_merged_file_given_as_the_adapter_is_named(tmp_path: Path, tiny_set: TinySet) -> None:
    with pytest.raises(CheckpointError, match="whole model with audio layers"):
        load_dit(tiny_set.model, save(tmp_path / "x.safetensors", merged()))


@pytest.mark.parametrize(("dim", "layers"), [(256, 2), (128, 3)])
def test_an_adapter_of_another_size_is_refused(tmp_path: Path, tiny_set: TinySet, dim: int, layers: int) -> None:
    path = save(tmp_path / "wide.safetensors", adapter_weights(dim=dim, layers=layers))
    with pytest.raises(CheckpointError, match=f"{dim} wide with {layers} blocks, but the model .* is 128 wide with 2"):
        inspect_dit(tiny_set.model, path)


def test_missing_tensors_are_counted_and_named(tmp_path: Path) -> None:
    state = merged()
    del state["blocks.1.norm3.bias"], state["blocks.1.ffn.2.weight"]
    total = len(state) + 2
    with pytest.raises(CheckpointError, match=rf"lacks 2 of {total} tensors, such as blocks\.1\.norm3\.bias"):
        load_dit(save(tmp_path / "x.safetensors", state))


def test_unexpected_tensors_are_counted_and_named(tmp_path: Path) -> None:
    state = merged() | {"blocks.0.extra.weight": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"holds 1 tensors .* such as blocks\.0\.extra\.weight"):
        load_dit(save(tmp_path / "x.safetensors", state))


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    state = merged() | {"blocks.0.norm3.bias": torch.ones(64)}
    with pytest.raises(CheckpointError, match=r"blocks\.0\.norm3\.bias as \[64\]"):
        load_dit(save(tmp_path / "x.safetensors", state))


def test_unknown_and_contradicting_quantizations_are_refused(tmp_path: Path, tiny_set: TinySet) -> None:
    with pytest.raises(InputError, match="'int3' is unknown"):
        load_dit(tiny_set.model, quantization="int3")
    path = save(tmp_path / "x.safetensors", fp8_files("plain"))
    with pytest.raises(InputError, match="already holds fp8_e4m3fn"):
        load_dit(path, quantization="fp8_e5m2")


def test_names_and_shapes_are_known_without_reading(tiny_set: TinySet) -> None:
    with CheckpointFile(tiny_set.model) as file:
        assert {t.device.type for t in file.shapes.values()} == {"meta"}
        assert file.shapes["patch_embedding.weight"].dtype == torch.bfloat16
