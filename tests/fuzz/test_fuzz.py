"""Generated inputs of every kind end in one sentence, or work as an oracle says; nothing else.

`MAKERS` has a row per kind of input. Each makes one case from a seeded generator: files, damaged, renamed, combined,
and what reads them. `judge` runs it and says "sentence", "works", or "else" with the reason: another exception, a
sentence that is none, a wrong result, no end. The seed is that of `--slow-seed`.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import math
import os
import random
import re
import shutil
import struct
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import av
import gguf
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
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
    State,
    loaders_of,
    lying_gguf,
    metadata_of,
    outcome,
    write_parts,
)
from support.image_files import JPEG_DAMAGE, MASKS, PNG_DAMAGE, area, encoded, photo, png_of_16_bits, write
from unit import test_bounds as bounds
from unit import test_containers as containers
from unit import test_gguf as gguf_files
from unit import test_lora as lora
from unit import test_quantized as quantized
from unit import test_video as video
from unit.test_image_files import differing
from wanvideo_infinitetalk.cli import parser as cli
from wanvideo_infinitetalk.cli.demo import demo_job
from wanvideo_infinitetalk.cli.tiny_models import TinySet, make_tiny
from wanvideo_infinitetalk.media.audio import integrated_loudness, load_speech, read_audio
from wanvideo_infinitetalk.media.images import load_image
from wanvideo_infinitetalk.media.masks import load_mask
from wanvideo_infinitetalk.media.video import OutputFiles, VideoFrames, VideoWriter
from wanvideo_infinitetalk.multitalk.wav2vec import SAMPLE_RATE
from wanvideo_infinitetalk.pipeline.journal import Journal
from wanvideo_infinitetalk.pipeline.long_video import RunState
from wanvideo_infinitetalk.pipeline.make_video import Checked, Job, ModelFiles, check
from wanvideo_infinitetalk.pipeline.plan import GenerateConfig
from wanvideo_infinitetalk.pipeline.prompts import parse_prompt
from wanvideo_infinitetalk.wanvideo.checkpoints.lora import LoraSpec, apply_loras, inspect_loras
from wanvideo_infinitetalk.wanvideo.encoders.text import load_tokenizer
from wanvideo_infinitetalk.wanvideo.errors import InfiniteTalkError

LIMIT = 30
"""Seconds that a case may take."""

CASES, PARTS = 1800, 18
"""Inputs, and tests that they are divided among."""

FRAME = 1 / 25

MOVED = 2 * 1152
"""Samples: two of the longest frames of MP3."""


@dataclass(frozen=True)
class World:
    """What cases are made of."""

    tiny: TinySet
    job: Job

    @cached_property
    def loaders(self) -> dict[str, Load]:
        return loaders_of(self.tiny)

    @cached_property
    def expected(self) -> dict[str, Mapping[str, torch.Tensor]]:
        return {role: self.loaders[role](getattr(self.tiny, role)) for role in ROLES}

    @cached_property
    def humo_job(self) -> Job:
        config = GenerateConfig(mode="humo", width=64, height=48, steps=2, scheduler="unipc")
        return Job(self.tiny.humo_files(), self.job.audio, self.job.out, config=config, max_frames=5, device="cpu")

    def load(self, role: str, path: Path) -> None:
        """As a job does: the inputs are checked, then the file is loaded; AssertionError for other weights."""
        job, field = self.job, role.removesuffix("_file")
        if role in ("humo", "whisper"):
            job, field = self.humo_job, "model" if role == "humo" else role
        check(replace(job, files=replace(job.files, **{field: path})))
        got = self.loaders[role](path)
        assert got.keys() == self.expected[role].keys()
        wrong = [name for name, tensor in self.expected[role].items() if not torch.equal(got[name], tensor)]
        assert not wrong, f"other weights: {wrong}"


Run = Callable[[], None]
Maker = Callable[[World, random.Random, Path], tuple[str, Run]]
"""(what the case is, what runs it: it raises an InfiniteTalkError, or returns where the oracle holds)."""

MAKERS: dict[str, Maker] = {}


def maker(make: Maker) -> Maker:
    MAKERS[make.__name__.strip("_").replace("_", " ")] = make
    return make


def judge(run: Run) -> tuple[str, str]:
    """("sentence", it), ("works", "") or ("else", why)."""
    found: list[tuple[str, str]] = []

    def attempt() -> None:
        try:
            run()
        except InfiniteTalkError as error:
            text = str(error)
            good = "\n" not in text and text.endswith((".", ")")) and 20 < len(text) < 1500
            found.append(("sentence" if good else "else", text))
        except BaseException:  # noqa: BLE001 - whatever it is, it is what the fuzz looks for
            found.append(("else", traceback.format_exc()))
        else:
            found.append(("works", ""))

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(LIMIT)
    return found[0] if found else ("else", f"no end within {LIMIT} s")


BORDERS = re.compile(
    rb"OggS|GGUF|PK\x01\x02|PK\x03\x04|PK\x05\x06|ftyp|moo[fv]|mdat|free|IHDR|PLTE|tRNS|IDAT|IEND|fmt |data|LIST|fLaC|"
    rb"\xff[\xd8-\xdb\xc0\xc4]|\x1a\x45\xdf\xa3|\x1f\x43\xb6\x75"
)
"""What parts of a file begin with, or have behind their length: boxes, chunks, pages, segments, records."""


def place_in(content: bytes, rng: random.Random) -> int:
    """An offset in a file, from 0 to its length: anywhere, or within 8 bytes of the border of a part."""
    borders = [found.start() for found in BORDERS.finditer(content)]
    length = int.from_bytes(content[:8], "little") + 8
    if content[8:9] == b"{" and length <= len(content):
        borders.append(length)
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
            tensors = json.loads(content[8:length])
            borders += [length + entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
    if borders and rng.random() < 0.5:
        return min(max(0, rng.choice(borders) + rng.randint(-8, 8)), len(content))
    return rng.randrange(len(content) + 1)


# ------------------------------------------------------------------------------------------------------------- models


@maker
def damaged_models(world: World, rng: random.Random, folder: Path) -> tuple[str, Run]:
    """Bytes; half of them hit once more by other ones."""
    role, damage, again = rng.choice(ROLES), rng.choice(list(BYTES)), rng.random() < 0.5
    path = folder / f"{role}{rng.choice(['.safetensors', '.gguf', '.pth', '.bin', ''])}"
    shutil.copy(getattr(world.tiny, role), path)
    path = BYTES[damage](path, rng)
    if again and path.is_file() and path.stat().st_size < 10**8:
        content = path.read_bytes()
        path.write_bytes(content[: place_in(content, rng)])
    return f"{role}, {damage}{', cut' if again else ''}", lambda: world.load(role, path)


@maker
def models_of_other_tensors(world: World, rng: random.Random, folder: Path) -> tuple[str, Run]:
    """One or two changes."""
    role, changes = rng.choice(ROLES), rng.sample(list(TENSORS), rng.choice([1, 1, 2]))
    state: State = load_file(getattr(world.tiny, role))
    for change in changes:
        with contextlib.suppress(IndexError, ValueError, RuntimeError, StopIteration):  # not possible after the first
            state = TENSORS[change](state, rng)
    path = folder / "altered.safetensors"
    save_file({n: t.clone() for n, t in state.items()}, path, metadata_of(getattr(world.tiny, role)))
    return f"{role}, {', '.join(changes)}", lambda: world.load(role, path)


@maker
def models_in_other_forms(world: World, rng: random.Random, folder: Path) -> tuple[str, Run]:
    role = rng.choice(ROLES)
    file = getattr(world.tiny, role)
    forms = [form for form in FORMS if role != "text_encoder" or "GGUF" not in form]
    form = rng.choice([*forms, *(PICKLED if role not in ("model", "adapter", "humo") else ())])
    state = load_file(file)
    path = FORMS[form](folder, state, metadata_of(file)) if form in FORMS else PICKLED[form](folder, state)
    return f"{role}, {form}", lambda: assert_works(world, role, path)


def assert_works(world: World, role: str, path: Path) -> None:
    assert outcome(lambda: world.loaders[role](path), world.expected[role], path) == "works"


@maker
def models_in_one_anothers_place(world: World, rng: random.Random, folder: Path) -> tuple[str, Run]:
    role, given = rng.choice(list(itertools.permutations(ROLES, 2)))
    path = folder / f"x{rng.choice(['.safetensors', '.gguf', '.pth'])}"
    shutil.copy(getattr(world.tiny, given), path)
    return f"{given} as {role}", lambda: world.load(role, path)


@maker
def gguf_headers(world: World, rng: random.Random, folder: Path) -> tuple[str, Run]:
    role = rng.choice(ROLES)
    path = lying_gguf(folder / f"m{rng.choice(['.gguf', '.safetensors'])}", rng)
    return role, lambda: world.load(role, path)


@maker
def damaged_parts(world: World, rng: random.Random, folder: Path) -> tuple[str, Run]:
    role = rng.choice(ROLES)
    file = getattr(world.tiny, role)
    index = write_parts(folder / "parts", load_file(file), metadata_of(file), rng.randint(1, 5))
    part = rng.choice(sorted(index.parent.glob("*.safetensors")))
    damage = rng.choice(["none", "index", "map", *BYTES])
    if damage == "index":
        content = rng.choice(list(JSONS.values()))
        index.write_bytes(content if isinstance(content, bytes) else content.encode())
    elif damage == "map":
        index.write_text(json.dumps({"weight_map": rng.choice([*VALUES, {"a": "../x"}, {"a": rng.choice(VALUES)}])}))
    elif damage != "none":
        BYTES[damage](part, rng)
    path = rng.choice([index, index.parent, part])
    return f"{role}, {damage}, {path.name}", lambda: world.load(role, path)


# ------------------------------------------------------------------------------------------------------ configurations


@maker
def configurations(world: World, rng: random.Random, folder: Path) -> tuple[str, Run]:
    """Of wav2vec2's folder, and in the metadata of the others."""
    role, value, text = rng.choice(ROLES), rng.choice(VALUES), rng.choice([None, None, *JSONS.values()])
    if role == "wav2vec_file":
        path = Path(shutil.copytree(world.tiny.wav2vec, folder / "wav2vec"))
        file = rng.choice(sorted(path.glob("*.json")))
        stated = json.loads(file.read_text())
        field = rng.choice(sorted(stated))
        content = json.dumps({**stated, field: value}) if text is None else text
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return f"{file.name}, {field} {value!r}, {str(text)[:20]}", lambda: world.load(role, path)
    file, path = getattr(world.tiny, role), folder / "m.safetensors"
    stated = json.loads(metadata_of(file).get("config", "{}"))
    field = rng.choice([*stated, "num_heads", "audio_blocks", "latents_mean", "num_attention_heads", "dim"])
    content = json.dumps({**stated, field: value}) if not isinstance(text, str) else text
    save_file(load_file(file), path, {"config": content})
    return f"{role}, {field} {value!r}, {str(text)[:20]}", lambda: world.load(role, path)


# -------------------------------------------------------------------------------------------------- quantized weights


@maker
def quantized_models(world: World, rng: random.Random, folder: Path) -> tuple[str, Run]:
    """Every format, as it should be: worth the dequantized weights."""
    kind, form, suffix = rng.choice(quantized.CASES)
    state, worth, metadata = quantized.file_of(kind, form)
    path = quantized.save(folder / f"q{suffix}", kind, state, metadata)
    plain = quantized.save(folder / f"p{suffix}", kind, worth)

    def run() -> None:
        quantized.base_file()["DiT"] = world.tiny.model
        got, meant = (quantized.values_of(quantized.KINDS[kind].load(file)) for file in (path, plain))
        assert got.keys() == meant.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in meant.items())

    return f"{kind}, {form}{suffix}", run


DTYPES = ("float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
NO_VALUES = ("float8_e8m0fnu", "uint8", "int8", "uint16", "int16", "int32", "int64", "bool", "complex64")
"""Dtypes that tensors of a model are not stored in, unless the file says how they are packed."""


ODD_TYPES = sorted({kind.name for kind in gguf.GGMLQuantizationType} - {*gguf_files.TYPES, "F32", "F16", "BF16"})
"""Of GGUF, which nobody here unpacks."""


@maker
def models_of_other_dtypes(world: World, rng: random.Random, folder: Path) -> tuple[str, Run]:
    """One tensor, or all: worth the same values in float32; one that holds no values may be one that is not used."""
    kind, name = rng.choice(list(quantized.KINDS)), rng.choice([*DTYPES * 2, *NO_VALUES])
    state = dict(quantized.state_of(kind))
    floats = [n for n, tensor in state.items() if tensor.is_floating_point()]
    hit = [rng.choice(floats)] if rng.random() < 0.5 or name in NO_VALUES else floats
    worth = dict(state)
    for n in hit:
        state[n] = state[n].to(getattr(torch, name))
        worth[n] = state[n].float() if name in DTYPES else worth[n]
    path, plain = (quantized.save(folder / f"{i}.safetensors", kind, s) for i, s in enumerate((state, worth)))

    def run() -> None:
        quantized.base_file()["DiT"] = world.tiny.model
        got, meant = (quantized.values_of(quantized.KINDS[kind].load(file)) for file in (path, plain))
        assert all(torch.equal(got[n], tensor) for n, tensor in meant.items())

    return f"{kind}, {hit[0] if len(hit) == 1 else 'all'} as {name}", run


@maker
def gguf_models(world: World, rng: random.Random, folder: Path) -> tuple[str, Run]:
    """Each tensor in one of several types: worth what the gguf package unpacks; one of a type that nobody unpacks."""
    kind, odd = rng.choice(list(quantized.KINDS)), rng.choice([None, None, *ODD_TYPES])
    types = rng.sample([*gguf_files.QUANTIZER_BOUNDS, "F32", "F16", "BF16"], 3)
    state = {name: tensor.float() for name, tensor in quantized.state_of(kind).items() if name != "spiece_model"}
    writer = gguf.GGUFWriter(folder / "m.gguf", rng.choice(["wan", "t5encoder", "flux", ""]))
    for key, text in quantized.KINDS[kind].metadata.items():
        writer.add_string(key, text)
    if rng.random() < 0.3:
        writer.add_custom_alignment(rng.choice([8, 64, 4096]))
    fitting = [name for name, tensor in state.items() if tensor.ndim == 2 and tensor.shape[1] % 256 == 0]
    hit = rng.choice(fitting) if odd and fitting else None
    for name, tensor in state.items():
        ggml = gguf.GGMLQuantizationType[odd if name == hit else rng.choice(types)]
        block, nbytes = gguf.GGML_QUANT_SIZES[ggml]
        values = tensor.flatten().numpy() if tensor.ndim > 4 else tensor.numpy()
        if tensor.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
        if name == hit:
            packed = np.zeros((len(values), values.shape[1] // block * nbytes), np.uint8)
        elif tensor.ndim and values.shape[-1] % block == 0 and (tensor.ndim > 1 or block == 1):
            packed = gguf.quants.quantize(values, ggml)
            state[name] = torch.from_numpy(gguf.quants.dequantize(packed, ggml).reshape(tensor.shape))
        else:
            packed, ggml = values, gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, packed, raw_dtype=ggml)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if kind == "text encoder":
        state["spiece_model"] = quantized.state_of(kind)["spiece_model"]
        (folder / "spiece.model").write_bytes(bytes(state["spiece_model"].numpy()))
    plain = quantized.save(folder / "plain.safetensors", kind, state)

    def run() -> None:
        quantized.base_file()["DiT"] = world.tiny.model
        got, meant = (quantized.values_of(quantized.KINDS[kind].load(file)) for file in (folder / "m.gguf", plain))
        assert hit is None, "taken"
        assert all(torch.allclose(got[name], tensor, rtol=1e-5, atol=1e-6) for name, tensor in meant.items())

    return f"{kind}, {types}, {hit} as {odd}", run


@maker
def faults_of_quantized_models(world: World, rng: random.Random, folder: Path) -> tuple[str, Run]:
    """Every fault, in any layer that it can hit."""
    kind, name = rng.choice(list(quantized.KINDS)), rng.choice(list(quantized.FAULTS))
    base, spoil, _ = quantized.FAULTS[name]
    if base in ("nvfp4", "mxfp8") and not quantized.has_matrices(kind):
        kind = "CLIP"
    state, _, metadata = quantized.file_of(kind, quantized.BASES[base])
    many = quantized.has_matrices(kind)
    layers = [x for x in quantized.layers_of(kind) if state[f"{x}.weight"].ndim == 2 or not many]
    layer = rng.choice(layers)
    spoil(state, layer, metadata)
    path = quantized.save(folder / "x.safetensors", kind, state, metadata)

    def run() -> None:
        quantized.base_file()["DiT"] = world.tiny.model
        quantized.KINDS[kind].inspect(path)
        raise AssertionError("taken")

    return f"{kind}, {name}, {layer}", run


# --------------------------------------------------------------------------------------------------------------- LoRAs


@maker
def loras(world: World, rng: random.Random, folder: Path) -> tuple[str, Run]:
    """Of every naming, whole or damaged: each layer is changed as the file says, or not at all."""
    style, damage = rng.choice(list(lora.STYLES)), rng.choice(["none", *TENSORS, *BYTES])
    alpha = rng.choice([None, 2.0])
    pairs = lora.make_pairs()
    path = lora.write(folder / "lora.safetensors", pairs, style, alpha)
    if damage in TENSORS:
        state = TENSORS[damage](load_file(path), rng)
        save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    elif damage in BYTES:
        BYTES[damage](path, rng)

    def run() -> None:
        spec = LoraSpec(path)
        inspect_loras(lora.CONFIG, [spec])
        model, plain = lora.make_model(), lora.make_model()
        apply_loras(model, [spec])
        # An alpha that is missing is the rank.
        factors = (1.0,) if alpha is None else (alpha / lora.RANK, 1.0)
        ways = [lora.expected_weights(plain, pairs, factor) for factor in factors]
        for layer in pairs:
            got = lora.linear_of(model, layer).weight
            wanted = [*(way[layer] for way in ways), lora.linear_of(plain, layer).weight]
            assert any(torch.allclose(got, weight, atol=1e-5) for weight in wanted[: None if damage != "none" else 1])

    return f"{style}, {damage}, alpha {alpha}", run


# ---------------------------------------------------------------------------------------------------------- tokenizers


@maker
def tokenizers(world: World, rng: random.Random, folder: Path) -> tuple[str, Run]:
    content = bytes(load_file(world.tiny.text_encoder)["spiece_model"].numpy())
    (folder / "good.model").write_bytes(content)
    path = folder / rng.choice(["spiece.model", "tokenizer.json", "x"])
    path.write_bytes(content)
    damages = [
        "none",
        *(name for name in BYTES if name not in ("expanded", "sparse", "complex", "shorter than it states")),
    ]
    damage = rng.choice([*damages, *JSONS])
    if damage in JSONS:
        text = JSONS[damage]
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    elif damage in BYTES:
        BYTES[damage](path, rng)
    source = rng.choice([path, folder]) if path.name != "x" else path

    def run() -> None:
        check(replace(world.job, files=replace(world.job.files, tokenizer=source)))
        got, good = load_tokenizer(source), load_tokenizer(folder / "good.model")
        if damage == "flipped in the header":  # of its pieces: a vocabulary has no sums that would say so
            got(world.job.prompt)
            return
        for prompt in ("a woman is talking", world.job.prompt, ""):
            assert got(prompt) == good(prompt), f"{got(prompt)} is not {good(prompt)}"

    return f"{path.name}, {damage}", run


# -------------------------------------------------------------------------------------------------- options and prompts


def argument_line(world: World, out: Path) -> list[str]:
    files = {name.replace("_", "-"): getattr(world.job.files, name) for name in ModelFiles.__dataclass_fields__}
    given = {**files, "image": world.job.image, "audio": world.job.audio[0], "out": out, "device": "cpu"}
    return ["generate", *(f"--{name}={value}" for name, value in given.items() if value is not None)]


@maker
def options(world: World, rng: random.Random, folder: Path) -> tuple[str, Run]:
    """One to four numbers, inside of their bounds or outside, through the command to the plan."""
    texts = {}
    for name in rng.sample(sorted(bounds.OPTIONS), rng.randint(1, 4)):
        bound = bounds.BOUNDS[name]
        usual = rng.uniform(max(bound.least, -10), min(bound.most, 100))
        values = [int(usual) if bound.whole else usual] * 4 + bounds.outside(bound) + bounds.inside(bound)
        value = rng.choice(values)
        if rng.random() < 0.2:
            texts[name] = rng.choice(["", " ", "1;2", "nan", "٣", "1e400", "0x10", "1_0", "5,4", "-0", "9" * 5000])
        elif isinstance(value, list):
            texts[name] = ",".join(map(str, value))
        else:
            texts[name] = str(value) if not isinstance(value, int) or abs(value) < 10**4000 else "9" * 4500
    return str({name: text[:30] for name, text in texts.items()}), lambda: run_options(world, texts, folder)


def run_options(world: World, texts: Mapping[str, str], folder: Path) -> None:
    line = [*argument_line(world, folder / "out.mp4"), *(f"{bounds.OPTIONS[n]}={text}" for n, text in texts.items())]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = cli.parser().parse_args(line)
    except SystemExit:
        last = said.getvalue().rstrip().splitlines()[-1]
        assert any(f"argument {bounds.OPTIONS[name]}: " in last for name in texts), last
        raise InfiniteTalkError(f"{last}.") from None
    assert_planned(check(cli.generate_job(args)))


def assert_planned(checked: Checked) -> None:
    """A plan that can be carried out."""
    plan = checked.plan
    sigmas = plan.schedule.scheduler.sigmas
    assert torch.isfinite(sigmas).all()
    assert bool((sigmas.diff() < 0).all())
    assert plan.width % 16 == plan.height % 16 == 0 < plan.width * plan.height
    assert plan.total > 0
    assert sum(window.new for window in plan.windows) >= plan.total


@maker
def prompts(world: World, rng: random.Random, folder: Path) -> tuple[str, Run]:
    pieces = [
        "a woman",
        "(",
        ")",
        ":",
        "|",
        "1.5",
        "[1]",
        "nan",
        "1e9",
        "9" * 400,
        "..",
        "\0",
        "é模",
        "\ud800",
        "\n",
        " ",
    ]
    prompt = "".join(rng.choice(pieces) for _ in range(rng.choice([0, 1, 5, 20, 2000])))

    def run() -> None:
        check(replace(world.job, prompt=prompt))
        found = parse_prompt(prompt)
        assert len(found) == prompt.count("|") + 1
        assert all(math.isfinite(piece.factor) and 0 <= piece.factor <= 100 for piece in found)

    return repr(prompt[:60]), run


# ---------------------------------------------------------------------------------------------------- images and masks


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Cut, or with a part cut out or replaced."""
    at = place_in(content, rng)
    length = rng.randint(1, 40)
    return rng.choice([content[:at], content[:at] + content[at + length :], content[:at] + rng.randbytes(length)])


@maker
def images(world: World, rng: random.Random, folder: Path) -> tuple[str, Run]:
    """Damaged metadata changes nothing; a PNG whose pixels are damaged is a sentence or the same (it has sums)."""
    kind = rng.choice(["PNG", "JPEG"])
    content = encoded(Image.fromarray(photo()), kind, **({"quality": 90} if kind == "JPEG" else {}))
    good = np.asarray(load_image(write(folder / "good", content)))
    damages = {"PNG": PNG_DAMAGE, "JPEG": JPEG_DAMAGE}[kind]
    names = rng.sample(list(damages), rng.randint(1, 3))
    for name in names:
        content = damages[name](content)
    if kind == "PNG" and rng.random() < 0.5:
        content = damaged(content, rng)
        names.append("bytes")
    path = write(folder / f"a{rng.choice(['.png', '.jpg', '.webp', ''])}", content)

    def run() -> None:
        check(replace(world.job, image=path))
        assert np.array_equal(np.asarray(load_image(path)), good)

    return f"{kind}, {', '.join(names)}", run


MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "RGB16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "AVIF": ("RGB", "RGBA"),
    "GIF": ("L", "P", "RGB"),
    "BMP": ("1", "L", "RGB"),
    "TIFF": ("L", "RGB", "RGBA", "CMYK", "YCbCr", "F", "I", "I;16"),
    "PPM": ("L", "RGB", "I;16"),
    "JPEG2000": ("L", "LA", "RGB", "RGBA"),
}
"""Format of a file -> modes of images that it holds."""


@maker
def images_of_other_kinds(world: World, rng: random.Random, folder: Path) -> tuple[str, Run]:
    """Formats, modes, sizes, turns, animations: what is seen is what was meant; gray where a mode is gray."""
    Image.init()
    kind = rng.choice([name for name in MODES if name in Image.SAVE])
    mode, size = rng.choice(MODES[kind]), rng.choice([(60, 40)] * 5 + [(1, 1), (1, 300), (300, 2), (17, 33)])
    turn = rng.choice([1, 3, 6, 8]) if kind in ("JPEG", "WEBP", "TIFF", "PNG") else 1
    seen = Image.fromarray(photo(smooth=True)).resize(size)
    gray = mode in ("1", "L", "LA", "F", "I", "I;16")
    wide = np.asarray(seen.convert("L") if mode == "I;16" else seen, np.uint16) * 257
    exif = Image.Exif()
    exif[0x0112] = turn
    options: dict[str, Any] = {"exif": exif} if turn > 1 else {}
    options |= {"WEBP": {"lossless": True}, "AVIF": {"quality": 95, "subsampling": "4:4:4"}}.get(kind, {})
    options |= {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    several = kind in ("GIF", "WEBP", "AVIF", "PNG", "TIFF") and mode in ("RGB", "RGBA") and rng.random() < 0.3
    if mode == "RGB16":
        content = png_of_16_bits(wide, exif)
    else:
        image = seen.quantize() if mode == "P" else seen.convert(mode) if mode != "I;16" else Image.fromarray(wide)
        options |= {"save_all": True, "append_images": [Image.new(mode, size)]} if several else {}
        content = encoded(image, kind, **options)
    path = write(folder / f"a{rng.choice(['.png', '.jpg', '.tif', ''])}", content)
    expected = np.asarray((seen.convert("1" if mode == "1" else "L") if gray else seen).convert("RGB"), np.float64)
    expected = np.rot90(expected, {1: 0, 3: 2, 6: 3, 8: 1}[turn])

    def run() -> None:
        check(replace(world.job, image=path))
        got = np.asarray(load_image(path), np.float64)
        assert got.shape == expected.shape
        assert np.abs(got - expected).mean() < 8, np.abs(got - expected).mean()

    return f"{kind}, {mode}, {size}, turn {turn}, {'several' if several else 'one'}", run


@maker
def masks(world: World, rng: random.Random, folder: Path) -> tuple[str, Run]:
    form, damage, turn = rng.choice(list(MASKS)), rng.choice([None, *PNG_DAMAGE]), rng.choice([0, 0, 3, 6, 8])
    exif = Image.Exif()
    if turn:
        exif[0x0112] = turn
    content = encoded(MASKS[form](area()), "PNG", **({"exif": exif} if turn else {}))
    if damage and not turn:  # a second EXIF would compete
        content = PNG_DAMAGE[damage](content)
    if rng.random() < 0.3:
        content, damage = damaged(content, rng), f"{damage}, bytes"
    path = write(folder / "mask.png", content)
    held = np.rot90(area(), {0: 0, 3: 2, 6: 3, 8: 1}[turn])

    def run() -> None:
        job = replace(world.job, image=write(folder / "i.png", encoded(Image.fromarray(photo()), "PNG")))
        check(replace(job, masks=[path]))
        assert differing(load_mask(path).numpy(), held) <= 0.01

    return f"{form}, {damage}, turn {turn}", run


# --------------------------------------------------------------------------------------------------------------- sound


@maker
def recordings(world: World, rng: random.Random, folder: Path) -> tuple[str, Run]:
    """Each sound is where it was, to a frame; of a file that was cut, those that are left.

    A file without its beginning has another one: with it goes what the encoder has put in front of the sound (LAME 1105
    samples, which an MP3's first frame tells players to skip), or the sound of the frames that were hit. All sounds
    that are left may stand `MOVED` samples earlier or later, by the same.
    """
    form = rng.choice(["WAV", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF", "W64", "RF64"])
    rate = rng.choice([8000, 16000, 44100, 48000])
    wave = containers.clicks(rng.uniform(1, 3), rate=rate, first=rng.uniform(0.1, 0.4))
    expected = containers.onsets(wave, rate)
    path = folder / f"a.{rng.choice([form.lower(), 'wav', 'mp4', 'mp3'])}"
    soundfile.write(path, wave, rate, format=form)
    content = bytearray(path.read_bytes())
    damage = rng.choice(["none", "sizes", "cut", "noise behind", "zeros", "head", "noise"])
    if damage == "sizes" and form == "WAV":
        at = content.index(b"data") + 4
        content[4:8] = struct.pack("<I", rng.choice([0, 0x7FFFFFFF, 0xFFFFFFFF]))
        content[at : at + 4] = struct.pack("<I", rng.choice([0, 0x7FFFF000, 0xFFFFFFFF]))
    elif damage == "cut":
        del content[place_in(content, rng) :]
    elif damage == "noise behind":
        content += bytes(rng.randrange(200))
    elif damage == "zeros":
        content[:] = bytes(len(content))
    elif damage == "head":
        del content[: rng.randint(1, 60)]
    elif damage == "noise":
        content[:] = rng.randbytes(len(content))
    path.write_bytes(content)

    def run() -> None:
        check(replace(world.job, audio=[path]))
        got, got_rate = read_audio(path)
        assert got_rate == rate
        found = containers.onsets(got, got_rate)
        moves = [0.0, *(found[0] - time for time in expected if found and damage == "head")]
        moves = [move for move in moves if abs(move) <= MOVED / rate]
        assert any(all(any(abs(t - m - e) <= FRAME for e in expected) for t in found) for m in moves), (
            f"{found} is not {expected}"
        )
        assert len(found) == len(expected) or damage in ("cut", "head", "zeros"), f"{found} is not {expected}"

    return f"{form}, {rate} Hz, {damage}, {path.suffix}", run


@maker
def paths(world: World, rng: random.Random, folder: Path) -> tuple[str, Run]:
    """In the place of any file of a job: names that nothing has, or that lead nowhere."""
    (folder / "loop").symlink_to("loop")
    (folder / "file").touch()
    os.mkfifo(folder / "fifo")
    names = ["x" * 300, "x" * 300 + "/y", "a\0b", "\udcff", "", ".", "loop", "loop/x", "file", "file/x", "fifo", "é\n"]
    others = ["~nobody-of-this-name/x", "~", "http://x/y", "/dev/zero", "/proc/self/mem", "y/" * 3000, "file:x", "-"]
    name = rng.choice([rng.choice(names), rng.choice(others)])
    path: Any = Path(name) if name in others else folder / name
    role = rng.choice(["audio", "image", "video", "masks", *ModelFiles.__dataclass_fields__])
    path = rng.choice([path, str(path)])
    job = replace(world.job, files=replace(world.job.files, **{role: path} if hasattr(world.job.files, role) else {}))
    if role in ("image", "video"):
        job = replace(job, **{"image": None, role: path})
    elif role in ("audio", "masks"):
        job = replace(job, **{role: [path]})

    def run() -> None:
        check(job)
        raise AssertionError("taken")

    return f"{role}, {name[:30]!r}", run


CODECS = {
    "m4a": "aac",
    "mka": "libopus",
    "webm": "libopus",
    "opus": "libopus",
    "mkv": "flac",
    "mov": "alac",
    "ts": "aac",
    "avi": "libmp3lame",
    "flv": "libmp3lame",
    "nut": "pcm_s24le",
    "aiff": "pcm_s16be",
    "au": "pcm_alaw",
    "tta": "tta",
    "aac": "aac",
    "mp2": "mp2",
    "ac3": "ac3",
    "eac3": "eac3",
    "mp3": "libmp3lame",
    "wv": "wavpack",
}
"""Endings of files that FFmpeg writes -> what encodes the sound in them."""

UNTIMED = ("aac", "mp2", "ac3", "eac3", "ts")
"""Those that say nothing of what their encoder has put in front of the sound."""

SUBTYPES = ("PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW", "IMA_ADPCM", "MS_ADPCM")


@maker
def recordings_of_other_kinds(world: World, rng: random.Random, folder: Path) -> tuple[str, Run]:
    """Codecs, containers, subtypes, rates, channels, levels: each sound is where it was, and as loud as is asked."""
    ending = rng.choice([*CODECS, *["wav"] * 12])
    rate = rng.choice([8000, 16000, 22050, 44100, 48000] if ending != "wav" else [2000, 11025, 32000, 96000, 192000])
    subtype = rng.choice(SUBTYPES) if ending == "wav" else CODECS[ending]
    channels = 1 if subtype in ("libmp3lame", "mp2") else rng.choice([1, 1, 2, 6])
    rate = {
        **dict.fromkeys(("libopus", "ac3", "eac3"), 48000),
        "libmp3lame": 44100,
        "mp2": 44100,
    }.get(subtype, rate)
    channels = min(channels, 2) if "ADPCM" in subtype else channels
    wave = containers.clicks(rng.uniform(0.6, 3), rate=rate, first=rng.uniform(0.1, 0.4))
    expected, level = containers.onsets(wave, rate), rng.choice([1.0, 1.0, 1.9, 0.1])
    odd = rng.choice([None, None, None, "NaN", "infinite", "one sample", "none", "integers"])
    odd = odd if subtype in ("FLOAT", "DOUBLE") else None
    wave = wave * level
    if odd in ("NaN", "infinite"):
        wave[rng.randrange(len(wave))] = math.nan if odd == "NaN" else -math.inf
    wave = {"one sample": wave[:1], "none": wave[:0], "integers": wave * 2**15}.get(odd or "", wave)
    path = folder / f"a.{ending}"
    if ending == "wav":
        soundfile.write(path, np.stack([wave] * channels, 1), rate, subtype)
    else:
        layout = {1: "mono", 2: "stereo", 6: "5.1"}[channels]
        with av.open(str(path), "w") as file:
            stream = file.add_stream(subtype, rate=rate, layout=layout)
            frame = av.AudioFrame.from_ndarray(np.stack([wave] * channels), format="fltp", layout=layout)
            frame.sample_rate, frame.pts = rate, 0
            for part in (frame, None):
                for packet in stream.encode(part):
                    file.mux(packet)

    def run() -> None:
        check(replace(world.job, audio=[path]))
        assert odd is None, "taken"
        speech = load_speech(path)
        found = containers.onsets(speech * (0.5 / np.abs(speech).max()), SAMPLE_RATE)
        move = (MOVED / rate if ending in UNTIMED else 0) + FRAME
        assert len(found) == len(expected)
        assert all(abs(a - b) <= move for a, b in zip(found, expected, strict=True)), f"{found} is not {expected}"
        assert not math.isfinite(integrated_loudness(speech)) or abs(integrated_loudness(speech) + 23) < 0.1

    return f"{ending}, {subtype}, {rate} Hz, {channels} channels, level {level}, {odd}", run


NAMES = (
    *(
        "a b.x",
        "模型 é.x",
        "-x",
        "--steps=3",
        "a:b.x",
        "a:0.5",
        "c:\\a.x",
        "a%d.x",
        "#a?b&c.x",
        "a'\"b.x",
        "a;b|c.x",
        "$HOME",
    ),
    *(
        "*.x",
        "[a].x",
        "a\nb.x",
        "a\tb.x",
        "..x",
        "x.",
        " ",
        "x" * 250,
        "A.X.TXT",
        "a\x1b[31m.x",
        "concat:a",
        "file:a.x",
    ),
    *("\udcff.x", "http:x", "pipe:0", "a.mp4.png", "~a", "{a}", "a\u202eb.x"),
)


@maker
def names(world: World, rng: random.Random, folder: Path) -> tuple[str, Run]:
    """Files of a job under other names, that any file may have; the folder is the working one, so that they lead."""
    roles = ["audio", "image", "masks", *(role for role in ModelFiles.__dataclass_fields__ if role != "tokenizer")]
    role, name = rng.choice(roles), rng.choice(NAMES)
    given = getattr(world.job, role, None) or getattr(world.job.files, role, None)
    source = Path(given[0] if isinstance(given, tuple) else given) if given else world.job.image
    (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    path: Any = folder / name if rng.random() < 0.5 else Path(name)
    files = replace(world.job.files, **{role: path}) if hasattr(world.job.files, role) else world.job.files
    job = replace(
        world.job, files=files, **({role: path if role == "image" else [path]} if files is world.job.files else {})
    )

    def run() -> None:
        before = Path.cwd()
        os.chdir(folder)
        try:
            check(job)
        finally:
            os.chdir(before)

    return f"{role}, {name[:20]!r}", run


# -------------------------------------------------------------------------------------------------------------- videos


@maker
def videos(world: World, rng: random.Random, folder: Path) -> tuple[str, Run]:
    """Frames are where they were, to one, and image and sound stay together; a cut file holds the first of them."""
    path = folder / f"a{rng.choice(['.mp4', '.mkv', '.ts', '.mov', '.nut'])}"
    begin = [rng.choice([0, 6, 12, 36]) * FRAME for _ in range(2)]
    count = rng.randint(30, 70)
    containers.write_av(path, video=[begin[0] + i / 25 for i in range(count)], sound=[(begin[1], begin[1] + 3.0)])
    content, damage = path.read_bytes(), rng.choice(["none", "none", "cut", "noise behind", "zeros", "head"])
    content = {
        "none": content,
        "cut": content[: place_in(content, rng)],
        "noise behind": content + rng.randbytes(100),
        "zeros": bytes(len(content)),
        "head": content[rng.randint(1, 100) :],
    }[damage]
    path.write_bytes(content)

    def run() -> None:
        check(replace(world.job, image=None, video=path))
        source = VideoFrames(path)
        assert source[0].shape == (32, 32, 3)
        seen = containers.flashes(source)
        wave, rate = read_audio(path)
        heard = containers.onsets(wave, rate)
        if damage == "none":
            # Sound that begins before the images lets the first of them stand.
            assert abs(len(source) - count - max(0, round((begin[0] - begin[1]) * 25))) <= 1, len(source)
        for frame in seen:
            if frame > 2 and heard and heard[0] <= frame * FRAME <= heard[-1]:
                assert min(abs(frame * FRAME - sound) for sound in heard) <= FRAME + 1e-3, f"{seen} {heard}"

    return f"{path.suffix}, {damage}, from {begin[0]:g} and {begin[1]:g}", run


@maker
def turned_videos(world: World, rng: random.Random, folder: Path) -> tuple[str, Run]:
    a, b, c, d = rng.choice(containers.MATRICES)
    image = np.zeros((32, 64, 3), np.uint8)
    image[:16, :32, 0] = image[:16, 32:, 1] = image[16:, :32, 2] = 255
    path = folder / "a.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv444p"
        for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")) + stream.encode(None):
            file.mux(packet)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    matrix = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    odd = rng.random() < 0.3
    if odd:
        matrix[rng.randrange(5)] = rng.choice([0, 1, 2**31 - 1, -(2**31)])
    data[at : at + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(data)

    def run() -> None:
        check(replace(world.job, image=None, video=path))
        frame, expected = VideoFrames(path)[0], containers.moved(image, a, b, c, d)
        if odd:
            assert sorted(frame.shape) == sorted(image.shape)
        else:
            assert frame.shape == expected.shape
            assert np.abs(frame.astype(int) - expected).mean() < 12

    return f"{matrix}", run


# ------------------------------------------------------------------------------------------------------------- outputs


@maker
def outputs(world: World, rng: random.Random, folder: Path) -> tuple[str, Run]:
    """A place to write to: inputs stay as they were, and what is taken can be written."""
    source = folder / "in.mp4"
    containers.write_av(source, video=[i / 25 for i in range(25)], sound=[(0, 1)])
    before = source.read_bytes()
    ways = video._other_ways_to(source)
    (folder / "broken.mp4").symlink_to("nowhere/x.mp4")
    (folder / "loop.mp4").symlink_to("loop.mp4")
    (folder / "new.mp4").symlink_to(folder / "target.mp4")
    (folder / "old.mp4").write_bytes(b"an older video")
    os.mkfifo(folder / "fifo.mp4")
    names = ["out.mp4", "new.mp4", "old.mp4", "broken.mp4", "loop.mp4", "fifo.mp4", "a/b/out.mp4", "in.mp4/out.mp4"]
    names += [
        "é ü.mp4",
        "%03d.mp4",
        "-y.mp4",
        "pipe:1.mp4",
        "x" * 300 + ".mp4",
        "x.avi",
        "x",
        "",
        ".mp4",
        "x.partial.mp4",
    ]
    names += ["in.partial.mp4", "a\0.mp4", "x\n.mp4", "\udcff.mp4", "OUT.MP4", "in.MP4/../out.mp4"]
    absolute = ["http://x/out.mp4", "rtmp://x/out.mp4", "file:///tmp/out.mp4", "/dev/null", "/proc/x.mp4", "/dev/full"]
    name = rng.choice(names)
    out = rng.choice([folder / name, *ways.values(), *map(Path, absolute)]) if rng.random() < 0.5 else folder / name
    as_audio = rng.random() < 0.5

    def run() -> None:
        given: dict[str, Any] = {"audio": [source]} if as_audio else {"image": None, "video": source}
        try:
            check(replace(world.job, out=out, **given))
            with VideoWriter(out, 25, containers.clicks(0.4), containers.RATE) as writer:
                writer.append(torch.rand(10, 32, 32, 3))
            assert len(VideoFrames(out)) == 10
        finally:
            assert source.read_bytes() == before, "the source was changed"

    return f"{out.name[:30]!r}, the source as {'audio' if as_audio else 'video'}", run


@maker
def interrupted_runs(world: World, rng: random.Random, folder: Path) -> tuple[str, Run]:
    """What an interrupted run has left, damaged: it is gone on with as it was, or not at all."""
    files = OutputFiles.of(folder / "out.mp4")
    state = RunState(2, torch.arange(5000).to(torch.uint8), torch.rand(3, 5, 32, 32), None, torch.rand(16, 2, 4, 4))
    writer = VideoWriter(folder / "out.mp4", 25)
    made = Journal(files, {"seed": "42", "image": "sha256:0"}, {"torch": "2"})
    made.save(state, writer.append(torch.rand(10, 32, 32, 3)), ["sdpa"])
    kept, damage = files.partial.read_bytes(), rng.choice(["none", "partial", "field", *BYTES])
    if damage == "partial":
        files.partial.write_bytes(kept[: place_in(kept, rng)])
    elif damage == "field":
        about = json.loads(metadata_of(files.journal)["infinitetalk"])
        where = rng.choice([about, about["written"], about["what"]])
        where[rng.choice(list(where))] = rng.choice(VALUES)
        save_file(load_file(files.journal), files.journal, {"infinitetalk": json.dumps(about)})
    elif damage != "none":
        BYTES[damage](files.journal, rng)

    def run() -> None:
        entry = made.start(resume=True)
        if entry is None:
            assert not files.journal.exists()
            return
        assert vars(entry.written) == vars(writer.written)
        assert (entry.state.windows, entry.state.floor) == (2, None)
        for name in ("generator", "carried", "latents"):
            assert torch.equal(getattr(entry.state, name), getattr(state, name))

    return damage, run


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("fuzz")
    tiny = make_tiny(folder / "models", random=True)
    with demo_job(folder / "out.mp4", models=folder / "models", device="cpu") as job:
        yield World(tiny, job)


def one(world: World, seed: int, number: int, folder: Path) -> tuple[str, str, str]:
    """(kind and case, verdict, text) of a numbered case."""
    rng = random.Random(f"{seed} {number}")
    kind = list(MAKERS)[number % len(MAKERS)]
    folder.mkdir()
    case, run = MAKERS[kind](world, rng, folder)
    verdict, text = judge(run)
    if (folder / MARK).exists():
        verdict, text = "else", "the pickle ran"
    shutil.rmtree(folder, ignore_errors=True)
    return f"{kind} {number}: {case}", verdict, text


@pytest.fixture(autouse=True)
def _no_log():
    """Names in it that are no text cannot be sent from one process of pytest-xdist to the other."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_input_is_a_sentence_or_works(world, tmp_path, request, record_property, part) -> None:
    seed = request.config.getoption("--slow-seed")
    counts: Counter[str] = Counter()
    wrong = []
    for number in range(part, CASES, PARTS):
        case, verdict, text = one(world, seed, number, tmp_path / "case")
        counts[verdict] += 1
        if verdict == "else":
            wrong.append(f"{case}\n{text}".encode("utf-8", "backslashreplace").decode())
    for verdict in ("sentence", "works", "else"):
        record_property(verdict, counts[verdict])
    assert not wrong, f"{dict(counts)}\n\n" + "\n\n".join(wrong)


@pytest.mark.parametrize("kind", MAKERS)
def test_one_of_every_kind(world, tmp_path, kind) -> None:
    case, verdict, text = one(world, 0, list(MAKERS).index(kind), tmp_path / "case")
    assert verdict != "else", f"{case}\n{text}"


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("run", "verdict"),
    [
        (lambda: None, "works"),
        (lambda: _raise(InfiniteTalkError("The file x is damaged.")), "sentence"),
        (lambda: _raise(InfiniteTalkError("the file x is damaged")), "else"),
        (lambda: _raise(InfiniteTalkError("")), "else"),
        (lambda: _raise(KeyError("x")), "else"),
        (lambda: _raise(SystemExit(2)), "else"),
        (lambda: _raise(AssertionError("other weights")), "else"),
        (lambda: threading.Event().wait(5), "else"),
    ],
)
def test_the_judge(monkeypatch, run, verdict) -> None:

    monkeypatch.setitem(globals(), "LIMIT", 0.5)
    assert judge(run)[0] == verdict
