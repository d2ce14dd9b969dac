"""Files that lie about themselves: ways to write, rename, cut and alter a checkpoint, each from a seeded generator.

Three tables, each name -> function: `FORMS` write the same tensors another way (they must load, with the same
weights), `BYTES` damage the bytes of a file, `TENSORS` change its tensors, `JSONS` are texts for a JSON file.
What is damaged must end in one sentence or, where nothing of the model is hit, in the same weights: `outcome` judges.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from wanvideo_infinitetalk.cli.tiny_models import TinySet
from wanvideo_infinitetalk.multitalk.wav2vec import Wav2Vec2Features
from wanvideo_infinitetalk.multitalk.whisper import WhisperFeatures
from wanvideo_infinitetalk.wanvideo.checkpoints.dit import load_dit
from wanvideo_infinitetalk.wanvideo.encoders.clip import ClipVision
from wanvideo_infinitetalk.wanvideo.encoders.small_decoder import SmallDecoder
from wanvideo_infinitetalk.wanvideo.encoders.text import TextEncoder
from wanvideo_infinitetalk.wanvideo.encoders.vae import WanVAE
from wanvideo_infinitetalk.wanvideo.errors import CheckpointError, InputError

State = dict[str, Tensor]
Load = Callable[[Path], Mapping[str, Tensor]]

ROLES = ("model", "adapter", "vae", "text_encoder", "clip_vision", "wav2vec_file", "decoder", "humo", "whisper")
"""Files of a `TinySet`."""


def loaders_of(tiny_set: TinySet) -> dict[str, Load]:
    """For each of `ROLES`, from a file to the weights as the model holds them."""
    return {
        "model": lambda path: load_dit(path, tiny_set.adapter).state_dict(),
        "adapter": lambda path: load_dit(tiny_set.model, path).state_dict(),
        "vae": lambda path: WanVAE.load(path).model.state_dict(),
        "text_encoder": lambda path: TextEncoder.load(path).model.state_dict(),
        "clip_vision": lambda path: ClipVision.load(path).model.state_dict(),
        "wav2vec_file": lambda path: Wav2Vec2Features.load(path).model.state_dict(),
        "decoder": lambda path: SmallDecoder.load(path).model.state_dict(),
        "humo": lambda path: load_dit(path).state_dict(),
        "whisper": lambda path: WhisperFeatures.load(path).model.state_dict(),
    }


def outcome(load: Callable[[], Mapping[str, Tensor]], expected: Mapping[str, Tensor], path: Path) -> str:
    """ "sentence" or "works"; AssertionError for any other exception, another text, or other weights."""
    try:
        got = load()
    except (CheckpointError, InputError) as error:
        text = str(error)
        assert "\n" not in text, text
        assert text.endswith((".", ")")), text
        assert len(text) < 1500, text
        assert path.name in text or path.parent.name in text, f"{text} does not name {path.name}"
        return "sentence"
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), f"{name} has other values"
    return "works"


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(str(path), "pt") as file:
        return dict(file.metadata() or {})


# ------------------------------------------------------------------------------------------ the same in another form


def write_gguf(path: Path, state: State, metadata: Mapping[str, str]) -> Path:
    """All tensors as F32; those of more dimensions than GGUF knows flattened, with their true shape beside them."""
    writer = gguf.GGUFWriter(path, "wan")
    for key, value in metadata.items():
        writer.add_string(key, value)
    for name, tensor in state.items():
        if name == "spiece_model":
            continue
        if tensor.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
        writer.add_tensor(name, (tensor.flatten() if tensor.ndim > 4 else tensor).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_parts(folder: Path, state: State, metadata: Mapping[str, str], count: int = 3) -> Path:
    """Hugging Face's parts with their index, which is returned."""
    folder.mkdir(exist_ok=True)
    stem = "diffusion_pytorch_model"
    where = {name: f"{stem}-{1 + i % count:05}-of-{count:05}.safetensors" for i, name in enumerate(state)}
    for file in set(where.values()):
        part = {name: tensor for name, tensor in state.items() if where[name] == file}
        save_file(part, str(folder / file), dict(metadata))
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return index


def _safetensors_named(ending: str) -> Callable[[Path, State, Mapping[str, str]], Path]:
    def write(folder: Path, state: State, metadata: Mapping[str, str]) -> Path:
        save_file(state, str(folder / f"model{ending}"), dict(metadata))
        return folder / f"model{ending}"

    return write


def _parts(choose: Callable[[Path], Path]) -> Callable[[Path, State, Mapping[str, str]], Path]:
    return lambda folder, state, metadata: choose(write_parts(folder / "parts", state, metadata))


FORMS: dict[str, Callable[[Path, State, Mapping[str, str]], Path]] = {
    **{
        f"safetensors named {ending or 'nothing'}": _safetensors_named(ending)
        for ending in (".gguf", ".pth", ".bin", "", ".json.safetensors")
    },
    "non-ASCII folder": lambda folder, state, metadata: _named_anew(folder, state, metadata),
    "index of parts": _parts(lambda index: index),
    "folder of parts": _parts(lambda index: index.parent),
    "second of the parts": _parts(lambda index: sorted(index.parent.glob("*.safetensors"))[1]),
    "GGUF named .safetensors": lambda folder, state, metadata: write_gguf(folder / "m.safetensors", state, metadata),
    "GGUF named .pth": lambda folder, state, metadata: write_gguf(folder / "m.pth", state, metadata),
}
"""Writes a folder, tensors and metadata -> the path to load. Pickles carry no metadata: `PICKLED`."""


def _named_anew(folder: Path, state: State, metadata: Mapping[str, str]) -> Path:
    (folder / "模型 ü").mkdir()
    return _safetensors_named(".safetensors")(folder / "模型 ü", state, metadata)


def _saved(path: Path, content: object, **options: object) -> Path:
    path.unlink(missing_ok=True)  # what `content` may be mapped from stays
    torch.save(content, path, **options)  # type: ignore[arg-type]
    return path


def _repacked(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """The archive of torch.save with each record changed."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, change(name, content))
    return path


PICKLED: dict[str, Callable[[Path, State], Path]] = {
    "pickle named .safetensors": lambda folder, state: _saved(folder / "m.safetensors", state),
    "pickle named .gguf": lambda folder, state: _saved(folder / "m.gguf", {"state_dict": state}),
    "old pickle named .safetensors": lambda folder, state: _saved(
        folder / "m.safetensors", state, _use_new_zipfile_serialization=False
    ),
    "compressed pickle": lambda folder, state: _repacked(
        _saved(folder / "m.pth", state), lambda name, content: content, zipfile.ZIP_DEFLATED
    ),
}


# ------------------------------------------------------------------------------------------------------ other bytes


class Hostile:
    """Unpickled without care, it makes the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[Path], object], tuple[Path]]:
        return Path.touch, (self.mark,)


MARK = "the pickle ran"


def _rewritten(path: Path, change: Callable[[bytearray, random.Random], object], rng: random.Random) -> Path:
    content = bytearray(path.read_bytes())
    result = change(content, rng)
    path.write_bytes(bytes(result if isinstance(result, (bytes, bytearray)) else content))
    return path


def _flip_header(content: bytearray, rng: random.Random) -> None:
    length = min(int.from_bytes(content[:8], "little"), len(content) - 8)
    for _ in range(3):
        content[8 + rng.randrange(length)] = rng.randrange(256)


def _deep_header(content: bytearray, rng: random.Random) -> bytes:
    header = b'{"a":' * 100_000
    return struct.pack("<Q", len(header)) + header


def _short_storages(path: Path, rng: random.Random) -> Path:
    """A pickle whose archive holds less for its tensors than it states."""
    _saved(path, {**load_file(path)})
    return _repacked(path, lambda name, content: content[: len(content) // 2] if "/data/" in name else content)


def _expanded(path: Path, rng: random.Random) -> Path:
    """Tensors that are one number each, stated as large as the model's."""
    state = load_file(path)
    return _saved(path, {name: torch.ones((), dtype=t.dtype).expand(t.shape) for name, t in state.items()})


def _replaced_by(make: Callable[[Path], object]) -> Callable[[Path, random.Random], Path]:
    def damage(path: Path, rng: random.Random) -> Path:
        path.unlink()
        make(path)
        return path

    return damage


def _bytes(change: Callable[[bytearray, random.Random], object]) -> Callable[[Path, random.Random], Path]:
    return lambda path, rng: _rewritten(path, change, rng)


BYTES: dict[str, Callable[[Path, random.Random], Path]] = {
    "empty": _bytes(lambda content, rng: b""),
    "one byte": _bytes(lambda content, rng: b"{"),
    "cut anywhere": _bytes(lambda content, rng: content[: rng.randrange(1, len(content))]),
    "cut in the header": _bytes(lambda content, rng: content[: rng.randrange(1, 200)]),
    "longer": _bytes(lambda content, rng: bytes(content) + rng.randbytes(64)),
    "noise": _bytes(lambda content, rng: rng.randbytes(4096)),
    "zeros": _bytes(lambda content, rng: bytes(len(content))),
    "flipped in the header": _bytes(_flip_header),
    "huge header": _bytes(lambda content, rng: struct.pack("<Q", rng.randrange(2**33, 2**63)) + content[8:]),
    "deep header": _bytes(_deep_header),
    "page": _bytes(lambda content, rng: b"\n<!doctype html><html></html>"),
    "LFS": _bytes(lambda content, rng: b"version https://git-lfs.github.com/spec/v1\noid sha256:0"),
    "JSON": _bytes(lambda content, rng: b'{"model_type": "wan"}'),
    "GGUF magic": _bytes(lambda content, rng: b"GGUF" + content),
    "zip magic": _bytes(lambda content, rng: b"PK\x03\x04" + content),
    "pickle magic": _bytes(lambda content, rng: b"\x80\x02" + content),
    "GGUF of lengths": lambda path, rng: lying_gguf(path, rng),
    "hostile pickle": lambda path, rng: _saved(path, {"a": Hostile(path.parent / MARK)}),
    "old hostile pickle": lambda path, rng: _saved(
        path, {"a": Hostile(path.parent / MARK)}, _use_new_zipfile_serialization=False
    ),
    "bare hostile pickle": _replaced_by(
        lambda path: path.write_bytes(pickle.dumps(Hostile(path.parent / MARK), protocol=2))
    ),
    "pickled list": lambda path, rng: _saved(path, [1, 2]),
    "pickled words": lambda path, rng: _saved(path, {"a": "b"}),
    "sparse": lambda path, rng: _saved(path, {n: t.float().to_sparse() for n, t in load_file(path).items()}),
    "complex": lambda path, rng: _saved(path, {n: t.to(torch.complex64) for n, t in load_file(path).items()}),
    "shorter than it states": _short_storages,
    "expanded": _expanded,
    "other zip": _replaced_by(lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "b")),
    "folder": _replaced_by(lambda path: path.mkdir()),
    "FIFO": _replaced_by(lambda path: os.mkfifo(path)),
    "device": _replaced_by(lambda path: path.symlink_to("/dev/zero")),
    "broken link": _replaced_by(lambda path: path.symlink_to("nowhere")),
    "link to itself": _replaced_by(lambda path: path.symlink_to(path)),
}
"""Damages the safetensors file `path` in place."""


def lying_gguf(path: Path, rng: random.Random) -> Path:
    """A GGUF header with one list, text or count that states more than there is."""
    huge = rng.choice([2**31, 2**32, 2**40, 2**62, 2**64 - 1])
    kind = rng.choice(["list", "strings", "text", "entries", "tensors", "dimensions", "rank", "nested", "version"])
    entries, tensors, version = 1, 0, 3
    body = struct.pack("<Q", 1) + b"a"
    if kind == "list":
        body += struct.pack("<IIQ", 9, rng.choice([0, 4, 10]), huge)
    elif kind == "strings":
        body += struct.pack("<IIQ", 9, 8, huge)
    elif kind == "nested":
        body += struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 20_000
    elif kind == "text":
        body += struct.pack("<IQ", 8, huge)
    elif kind == "entries":
        entries = huge
    elif kind == "tensors":
        entries, tensors, body = 0, huge, b""
    elif kind == "dimensions":
        entries, tensors, body = 0, 1, struct.pack("<Q", 1) + b"a" + struct.pack("<IQQIQ", 2, huge, huge, 0, 0)
    elif kind == "rank":
        entries, tensors, body = 0, 1, struct.pack("<Q", 1) + b"a" + struct.pack("<I", huge % 2**32)
    else:
        version = rng.choice([0, 1, 4, 3 << 24])
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + body + bytes(256))
    return path


# ----------------------------------------------------------------------------------------------------- other tensors


def _one(state: State, rng: random.Random) -> str:
    return rng.choice(sorted(name for name in state if name != "spiece_model"))


def _with(state: State, rng: random.Random, change: Callable[[Tensor], Tensor]) -> State:
    name = _one(state, rng)
    return {**state, name: change(state[name]).contiguous()}


def _without(state: State, rng: random.Random) -> State:
    name = _one(state, rng)
    return {other: tensor for other, tensor in state.items() if other != name}


def _numbered(number: str) -> Callable[[State, random.Random], State]:
    """One more layer, of that number."""

    def change(state: State, rng: random.Random) -> State:
        layered = sorted(name for name in state if ".1." in name)
        if not layered:
            return state
        name = rng.choice(layered)
        return {**state, name.replace(".1.", f".{number}.", 1): state[name].clone()}

    return change


def _many_layers(state: State, rng: random.Random) -> State:
    layered = [name for name in state if ".1." in name]
    if not layered:
        return state
    more = {layered[0].replace(".1.", f".{n}.", 1): torch.ones(1) for n in range(2, 3000)}
    return {**state, **more}


TENSORS: dict[str, Callable[[State, random.Random], State]] = {
    "one missing": _without,
    "one of no dimension": lambda state, rng: _with(state, rng, lambda t: t.flatten()[0].clone()),
    "one of one dimension more": lambda state, rng: _with(state, rng, lambda t: t[None]),
    "one of five dimensions": lambda state, rng: _with(state, rng, lambda t: t.reshape(1, 1, 1, 1, -1)),
    "one flat": lambda state, rng: _with(state, rng, lambda t: t.flatten()),
    "one empty": lambda state, rng: _with(state, rng, lambda t: t[:0] if t.ndim else t),
    "one half": lambda state, rng: _with(state, rng, lambda t: t[: max(1, len(t) // 2)] if t.ndim else t),
    "one twice": lambda state, rng: _with(state, rng, lambda t: torch.cat([t, t]) if t.ndim else t),
    "one empty of another rank": lambda state, rng: _with(state, rng, lambda t: t.new_empty(0, 2**20, 3)),
    "all of no dimension": lambda state, rng: {name: t.flatten()[0].clone() for name, t in state.items()},
    "all empty": lambda state, rng: {name: t.new_empty(0) for name, t in state.items()},
    "layer 300000": _numbered("300000"),
    "layer of 5000 digits": _numbered("9" * 5000),
    "layer of other digits": _numbered("²"),
    "layer -1": _numbered("-1"),
    "3000 layers": _many_layers,
    "quanto": lambda state, rng: {
        new: t for name, t in state.items() for new in (f"{name}._data", f"{name}._scale") if name.endswith("weight")
    },
    "one name": lambda state, rng: {"": torch.ones(1)},
    "names of dots": lambda state, rng: {"." * (i + 1): t for i, t in enumerate(state.values())},
}
"""Changes the tensors of a file."""


# -------------------------------------------------------------------------------------------------------- JSON files

JSONS: dict[str, str | bytes] = {
    "empty": "",
    "no JSON": "{not json",
    "no text": b"\xff\xfe\x00\x01{",
    "null": "null",
    "list": "[1, 2]",
    "number": "3",
    "string": '"text"',
    "deep list": "[" * 10_000 + "]" * 10_000,
    "deep object": '{"a":' * 10_000 + "1" + "}" * 10_000,
    "large number": '{"a": ' + "9" * 5000 + "}",
}
"""Texts that are no JSON object."""

VALUES: tuple[object, ...] = (None, True, "two", "", [], [1], {}, {"a": 1}, 0, -1, 1.5, 10**30, float("nan"), 1e400)
"""Values of every type, for the fields of a configuration."""


# --------------------------------------------------------------------------------------- a text encoder of llama.cpp

_LLAMA = {
    "layer.0.layer_norm": "attn_norm",
    "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
    "layer.0.SelfAttention.": "attn_",
    "layer.1.layer_norm": "ffn_norm",
    "layer.1.DenseReluDense.wi_0": "ffn_gate",
    "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down",
    "shared": "token_embd",
    "encoder.final_layer_norm": "enc.output_norm",
    "encoder.block.": "enc.blk.",
}


def llama_name(name: str) -> str:
    """llama.cpp's name of a T5 tensor in Hugging Face's."""
    for old, new in _LLAMA.items():
        name = name.replace(old, new)
    return name


def write_llama_t5(path: Path, state: State, vocabulary: bytes | None, quantization: str = "Q8_0") -> State:
    """A GGUF text encoder as llama.cpp writes it, its linear layers quantized. Returns what its weights then are.

    `vocabulary` is a `spiece.model`, whose parts become entries of the header.
    """
    kind = gguf.GGMLQuantizationType[quantization]
    writer = gguf.GGUFWriter(path, "t5encoder")
    if vocabulary is not None:
        _add_vocabulary(writer, vocabulary)
    meant = {}
    for name, tensor in state.items():
        values = tensor.float().numpy()
        if tensor.ndim == 2 and tensor.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 and "bias" not in name:
            packed = gguf.quants.quantize(values, kind)
            writer.add_tensor(llama_name(name), packed, raw_dtype=kind)
            meant[name] = torch.from_numpy(gguf.quants.dequantize(packed, kind))
        else:
            writer.add_tensor(llama_name(name), values)
            meant[name] = tensor.float()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: bytes) -> None:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
    count = model.get_piece_size()
    kinds = {"is_unknown": 2, "is_control": 3, "is_unused": 5, "is_byte": 6}
    writer.add_tokenizer_model("t5")
    writer.add_token_list([model.id_to_piece(i) for i in range(count)])
    writer.add_token_scores([model.get_score(i) for i in range(count)])
    writer.add_token_types([next((k for ask, k in kinds.items() if getattr(model, ask)(i)), 1) for i in range(count)])
    writer.add_eos_token_id(model.eos_id())
    writer.add_pad_token_id(model.pad_id())
    writer.add_unk_token_id(model.unk_id())
    normalizer = dict(_protocol_buffer(dict(_protocol_buffer(vocabulary))[3]))
    if normalizer.get(2):
        writer.add_precompiled_charsmap(normalizer[2])
    writer.add_add_space_prefix(bool(normalizer.get(3, 1)))
    writer.add_remove_extra_whitespaces(bool(normalizer.get(4, 1)))


def _protocol_buffer(message: bytes) -> list[tuple[int, object]]:
    """(number, value) of each field."""
    fields: list[tuple[int, object]] = []
    position = 0

    def varint() -> int:
        nonlocal position
        number = shift = 0
        while True:
            byte = message[position]
            position += 1
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number

    while position < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            fields.append((number, varint()))
            continue
        size = {1: 8, 5: 4}.get(wire_type) or varint()
        fields.append((number, message[position : position + size]))
        position += size
    return fields
