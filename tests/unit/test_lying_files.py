"""Files that lie about themselves end in one sentence about that file, or in the weights that they hold."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.corruptions import (
    BYTES,
    FORMS,
    JSONS,
    MARK,
    PICKLED,
    ROLES,
    TENSORS,
    VALUES,
    Load,
    loaders_of,
    metadata_of,
    outcome,
    write_parts,
)
from torch import Tensor
from wanvideo_infinitetalk.cli.tiny_models import TinySet
from wanvideo_infinitetalk.wanvideo.checkpoints.dit import load_dit
from wanvideo_infinitetalk.wanvideo.checkpoints.state_dict import diffusers_name
from wanvideo_infinitetalk.wanvideo.errors import CheckpointError

SEED = 20


@pytest.fixture(scope="module")
def loaders(tiny_set: TinySet) -> dict[str, Load]:
    return loaders_of(tiny_set)


@pytest.fixture(scope="module")
def expected(tiny_set: TinySet, loaders: dict[str, Load]) -> dict[str, Mapping[str, Tensor]]:
    return {role: loaders[role](getattr(tiny_set, role)) for role in ROLES}


def seeded(*words: str) -> random.Random:
    return random.Random(f"{SEED} {words}")


# ----------------------------------------------------------------------------------------------- another form: loads


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("role", ROLES)
def test_every_form_gives_the_same_weights(tmp_path, tiny_set, loaders, expected, role, form) -> None:
    file = getattr(tiny_set, role)
    path = FORMS[form](tmp_path, load_file(file), metadata_of(file))
    if role == "text_encoder" and "GGUF" in form:
        pytest.skip("its vocabulary is read another way: test_text")
    assert outcome(lambda: loaders[role](path), expected[role], path) == "works"


@pytest.mark.parametrize("form", PICKLED)
@pytest.mark.parametrize("role", ["vae", "text_encoder", "clip_vision", "wav2vec_file", "decoder", "whisper"])
def test_pickles_under_any_name_give_the_same_weights(tmp_path, tiny_set, loaders, expected, role, form) -> None:
    path = PICKLED[form](tmp_path, load_file(getattr(tiny_set, role)))
    assert outcome(lambda: loaders[role](path), expected[role], path) == "works"


def test_diffusers_names_of_the_model(tmp_path, tiny_set, loaders, expected) -> None:
    state = {}
    for name, tensor in load_file(tiny_set.model).items():
        layer, _, last = name.rpartition(".")
        state[diffusers_name(name) if last == "modulation" else f"{diffusers_name(layer)}.{last}"] = tensor
    assert "blocks.1.attn2.to_out.0.weight" in state
    assert not any("self_attn" in name or "modulation" in name for name in state)
    path = tmp_path / "m.safetensors"
    save_file(state, path, metadata_of(tiny_set.model))
    assert outcome(lambda: loaders["model"](path), expected["model"], path) == "works"


# ------------------------------------------------------------------------------------------------ another kind: named


# One loader reads a HuMo model and another one, and the mode decides: test_humo_video.
PAIRS = [pair for pair in itertools.permutations(ROLES, 2) if pair != ("humo", "model")]


@pytest.mark.parametrize(("role", "given"), PAIRS)
def test_every_other_kind_of_file_is_named(tiny_set, loaders, role, given) -> None:
    kinds = {
        "model": ("diffusion transformer",),
        "adapter": ("InfiniteTalk adapter",),
        "vae": ("a Wan2.1 VAE",),
        "text_encoder": ("a T5 text encoder",),
        "clip_vision": ("a CLIP vision model",),
        "wav2vec_file": ("a wav2vec2 model",),
        "decoder": ("a small decoder",),
        "humo": ("HuMo", "diffusion transformer"),
        "whisper": ("a Whisper model",),
    }
    with pytest.raises(CheckpointError) as caught:
        loaders[role](getattr(tiny_set, given))
    text = str(caught.value)
    assert any(f" is {kind}" in text or f" is an {kind}" in text or f" is a {kind}" in text for kind in kinds[given])
    assert getattr(tiny_set, given).name in text


# ------------------------------------------------------------------------------------------------- damage: a sentence


@pytest.mark.parametrize("damage", BYTES)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.timeout(60)
def test_damaged_bytes_are_a_sentence(tmp_path, tiny_set, loaders, expected, role, damage) -> None:
    path = tmp_path / f"{role}.safetensors"
    shutil.copy(getattr(tiny_set, role), path)
    path = BYTES[damage](path, seeded(role, damage))
    result = outcome(lambda: loaders[role](path), expected[role], path)
    assert result == "sentence" or damage == "flipped in the header"
    assert not (tmp_path / MARK).exists()


@pytest.mark.parametrize("change", TENSORS)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.timeout(60)
def test_altered_tensors_are_a_sentence_or_do_not_matter(tmp_path, tiny_set, loaders, expected, role, change) -> None:
    file = getattr(tiny_set, role)
    for attempt in range(3):
        path = tmp_path / f"{role}{attempt}.safetensors"
        state = TENSORS[change](load_file(file), seeded(role, change, str(attempt)))
        save_file({name: tensor.clone() for name, tensor in state.items()}, path, metadata_of(file))
        outcome(lambda path=path: loaders[role](path), expected[role], path)


@pytest.mark.parametrize("role", ROLES)
def test_a_name_of_any_length_is_a_short_sentence(tmp_path, tiny_set, loaders, expected, role) -> None:
    file, path = getattr(tiny_set, role), tmp_path / "m.safetensors"
    state = load_file(file)
    name = next(name for name in state if name.endswith(".weight"))
    state[f"{name.removesuffix('weight')}{'x' * 5000}"] = torch.ones(1)  # of a layer that is there
    save_file(state, path, metadata_of(file))
    assert outcome(lambda: loaders[role](path), expected[role], path) == "sentence"


@pytest.mark.parametrize("number", range(30))
@pytest.mark.timeout(60)
def test_gguf_headers_that_state_too_much(tmp_path, tiny_set, loaders, number) -> None:
    path = BYTES["GGUF of lengths"](tmp_path / "m.gguf", random.Random(number))
    assert outcome(lambda: loaders["vae"](path), {}, path) == "sentence"


# ---------------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize("text", JSONS)
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_a_folders_json_that_is_no_object(tmp_path, tiny_set, loaders, file, text) -> None:
    folder = shutil.copytree(tiny_set.wav2vec, tmp_path / "wav2vec")
    content = JSONS[text]
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=file.replace(".", r"\.")):
        loaders["wav2vec_file"](folder)


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize(
    "field",
    [
        "num_attention_heads",
        "conv_stride",
        "feat_extract_norm",
        "do_stable_layer_norm",
        "layer_norm_eps",
        "hidden_act",
        "feat_extract_activation",
        "model_type",
        "do_normalize",
    ],
)
def test_a_folders_configuration_of_wrong_values(tmp_path, tiny_set, loaders, expected, field, value) -> None:
    """Each is a sentence, but for those of the right kind: there the loader takes the value."""
    folder = shutil.copytree(tiny_set.wav2vec, tmp_path / "wav2vec")
    file = folder / ("preprocessor_config.json" if field == "do_normalize" else "config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    kind = {"num_attention_heads": int, "do_stable_layer_norm": bool, "do_normalize": bool}.get(field)
    if type(value) is kind and value is True:
        loaders["wav2vec_file"](folder)
    else:
        with pytest.raises(CheckpointError, match="wav2vec"):
            loaders["wav2vec_file"](folder)


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize(
    ("role", "field"),
    [
        ("model", "num_heads"),
        ("model", "text_len"),
        ("adapter", "audio_blocks"),
        ("vae", "latents_mean"),
        ("vae", "latents_std"),
        ("clip_vision", "num_attention_heads"),
    ],
)
def test_metadata_of_wrong_values(tmp_path, tiny_set, loaders, expected, role, field, value) -> None:
    file = getattr(tiny_set, role)
    path = tmp_path / "m.safetensors"
    stated = json.loads(metadata_of(file).get("config", "{}"))
    save_file(load_file(file), path, {"config": json.dumps({**stated, field: value})})
    if value is not None:  # not stated
        with pytest.raises(CheckpointError, match=r"m\.safetensors"):
            loaders[role](path)


@pytest.mark.parametrize("text", [name for name in JSONS if not isinstance(JSONS[name], bytes)])
@pytest.mark.parametrize("role", ["model", "adapter", "vae", "clip_vision", "wav2vec_file"])
def test_metadata_that_is_no_object(tmp_path, tiny_set, loaders, expected, role, text) -> None:
    file = getattr(tiny_set, role)
    save_file(load_file(file), tmp_path / "m.safetensors", {"config": str(JSONS[text])})
    if text != "empty":
        with pytest.raises(CheckpointError, match=r"m\.safetensors"):
            loaders[role](tmp_path / "m.safetensors")


# -------------------------------------------------------------------------------------------------------------- parts


@pytest.fixture
def parts(tmp_path, tiny_set) -> Path:
    """The index of the model in three parts."""
    return write_parts(tmp_path / "parts", load_file(tiny_set.model), metadata_of(tiny_set.model))


def test_missing_parts_are_named(parts, loaders) -> None:
    names = sorted(path.name for path in parts.parent.glob("*.safetensors"))
    for name in names[1:]:
        (parts.parent / name).unlink()
    for path in (parts, parts.parent, parts.parent / names[0]):
        with pytest.raises(CheckpointError, match=f"2 are missing in .*: {names[1]}, {names[2]}"):
            loaders["model"](path)


@pytest.mark.parametrize("text", JSONS)
def test_an_index_that_is_no_object(parts, loaders, text) -> None:
    content = JSONS[text]
    parts.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=r"index\.json"):
        loaders["model"](parts)


@pytest.mark.parametrize("value", [*VALUES, {"a": "../x.safetensors"}, {"a": "/etc/passwd"}, {"a": ""}], ids=repr)
def test_an_index_of_wrong_values(parts, loaders, value) -> None:
    parts.write_text(json.dumps({"weight_map": value}))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        loaders["model"](parts)


def test_one_tensor_in_two_parts(parts, loaders) -> None:
    shutil.copy(
        parts.parent / "diffusion_pytorch_model-00001-of-00003.safetensors",
        parts.parent / "diffusion_pytorch_model-00002-of-00003.safetensors",
    )
    with pytest.raises(CheckpointError, match="Two parts of"):
        loaders["model"](parts)


def test_a_folder_without_a_model_says_what_is_inside(tmp_path, tiny_set, loaders) -> None:
    shutil.copy(tiny_set.vae, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=r"is a folder; name the model file inside it \(vae\.safetensors\)"):
        loaders["vae"](tmp_path)


# -------------------------------------------------------------------------------------------------- whose fault it is


@pytest.mark.parametrize("role", ["model", "adapter"])
def test_the_file_at_fault_is_blamed(tmp_path, tiny_set, role) -> None:
    """Every tensor, missing or of another shape, in turn: the sentence names its file and not the other."""
    files = {"model": tiny_set.model, "adapter": tiny_set.adapter}
    state = load_file(files[role])
    rng = seeded(role)
    for name in rng.sample(sorted(state), 12):
        for change in (None, torch.ones(3, 3, 3, dtype=torch.bfloat16)):
            altered = {n: t for n, t in state.items() if n != name} | ({} if change is None else {name: change})
            path = tmp_path / "altered.safetensors"
            save_file(altered, path, metadata_of(files[role]))
            given = {**files, role: path}
            with pytest.raises(CheckpointError, match=rf"The {role} altered\.safetensors"):
                load_dit(given["model"], given["adapter"])


def test_a_name_that_is_no_utf8(tmp_path, tiny_set, loaders) -> None:
    path = tmp_path / os.fsdecode(b"\xff.safetensors")
    shutil.copy(tiny_set.vae, path)
    with pytest.raises(CheckpointError, match="is no valid UTF-8; rename it"):
        loaders["vae"](path)


def test_header_lengths_that_begin_like_a_page(tmp_path, tiny_set, loaders, expected) -> None:
    """A header of 15,392 bytes begins with a space and "<"."""
    state = load_file(tiny_set.vae)
    path = tmp_path / "m.safetensors"
    save_file(state, path)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    content = path.read_bytes()
    wanted = 0x3C20
    while wanted < header:
        wanted += 0x10000
    path.write_bytes(wanted.to_bytes(8, "little") + content[8 : 8 + header].ljust(wanted) + content[8 + header :])
    assert path.read_bytes().lstrip()[:1] == b"<"
    assert outcome(lambda: loaders["vae"](path), expected["vae"], path) == "works"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(tmp_path, tiny_set, loaders) -> None:
    path = tmp_path / "m.safetensors"
    shutil.copy(tiny_set.vae, path)
    path.chmod(0)
    with pytest.raises(CheckpointError, match="Permission denied"):
        loaders["vae"](path)
