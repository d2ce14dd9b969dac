"""The command, run in this process on the tiny models: what works, and the sentence that everything else ends with."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from wanvideo_infinitetalk.cli import parser as cli
from wanvideo_infinitetalk.cli import terminal
from wanvideo_infinitetalk.cli.tiny_models import (
    ONLY_RANDOM,
    RANDOM_DEFAULTS,
    TALKING_DEFAULTS,
    TinySet,
    dit_weights,
    make_tiny,
)
from wanvideo_infinitetalk.media import video
from wanvideo_infinitetalk.media.audio import load_speech
from wanvideo_infinitetalk.media.video import OutputFiles, VideoWriter, read_comment
from wanvideo_infinitetalk.multitalk.wav2vec import Wav2Vec2Features
from wanvideo_infinitetalk.pipeline import conditioning, long_video, plan
from wanvideo_infinitetalk.pipeline import make_video as generate
from wanvideo_infinitetalk.pipeline.presets import PRESETS, build_job
from wanvideo_infinitetalk.wanvideo.checkpoints.dit import inspect_dit
from wanvideo_infinitetalk.wanvideo.checkpoints.lora import LoraSpec
from wanvideo_infinitetalk.wanvideo.encoders.vae import VideoDecoder
from wanvideo_infinitetalk.wanvideo.errors import InfiniteTalkError
from wanvideo_infinitetalk.wanvideo.runtime import compilation
from wanvideo_infinitetalk.wanvideo.runtime.compilation import CompileSettings
from wanvideo_infinitetalk.wanvideo.runtime.offload import BlockSwap

SECONDS = 0.52
FRAMES = 13
"""Of the recording in most tests: three windows of 5 frames, 1 carried over, and a rest."""


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Media:
    """What PyAV finds in a video file."""

    frames: int
    width: int
    height: int
    video_seconds: float
    sound_seconds: float
    spread: float  # standard deviation of all pixels


def probe(path: Path) -> Media:
    with av.open(str(path)) as container:
        images = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        video = container.streams.video[0]
        rate = video.average_rate
        assert rate is not None
    with av.open(str(path)) as container:
        samples = sum(Fraction(frame.samples, frame.sample_rate) for frame in container.decode(audio=0))
    height, width = images[0].shape[:2]
    return Media(len(images), width, height, float(len(images) / rate), float(samples), float(np.std(np.stack(images))))


def tone(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """A hum that swells and fades, [n] or [n, channels]."""
    t = np.arange(round(seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * 180 * t) * (1 + np.sin(2 * np.pi * 4 * t)) / 2
    return wave if channels == 1 else np.stack([wave, 0.5 * wave], axis=1)


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "speech.wav", tone(SECONDS, 16000), 16000)
    return tmp_path / "speech.wav"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.fixture
def run(
    tiny_set: TinySet, speech: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """`run(steps=2, model=path, ...)`: `infinitetalk generate` with small defaults; None leaves an option out."""
    defaults = {
        "image": image,
        "audio": speech,
        "model": tiny_set.model,
        "adapter": tiny_set.adapter,
        "vae": tiny_set.vae,
        "text-encoder": tiny_set.text_encoder,
        "clip-vision": tiny_set.clip_vision,
        "wav2vec": tiny_set.wav2vec,
        "width": 32,
        "height": 32,
        "frames": 5,
        "motion-frames": 1,
        "steps": 1,
        "cfg": 1,
        "audio-cfg": 1,
        "out": tmp_path / "video.mp4",
    }

    def go(*flags: str, **options: object) -> Ran:
        given = defaults | {name.replace("_", "-"): value for name, value in options.items()}
        argv = ["generate", *flags]
        for name, value in given.items():
            values = value if isinstance(value, list) else [value]
            argv += [] if value is None else [f"--{name}", *map(str, values)]
        code = cli.main(argv)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return go


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where weights are read."""
    encoders = ("Wav2Vec2Features.load", "TextEncoder.load", "ClipVision.load", "WanVAE.load")
    for part in (*encoders, "SmallDecoder.load", "load_dit"):
        what = f"wanvideo_infinitetalk.pipeline.make_video.{part}"
        monkeypatch.setattr(what, lambda *given, part=part, **options: pytest.fail(f"{part} came first"))


def assert_rejected(ran: Ran, *words: str) -> None:
    """Exit code 2 and one sentence on stderr, as its last line, with no traceback."""
    assert ran.code == 2, ran.err
    last = ran.err.rstrip().splitlines()[-1]
    assert last.startswith("infinitetalk: ")
    assert last.endswith(".")
    assert "Traceback" not in ran.err
    for word in words:
        assert word in last


# ----------------------------------------------------------------------------------------------------------- it works


def test_an_image_and_a_recording_become_a_video(run: Callable[..., Ran], tmp_path: Path) -> None:
    out = tmp_path / "new folder" / "talk.mp4"
    ran = run(out=out)
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[-1] == f"video: {out}"
    media = probe(out)
    assert (media.frames, media.width, media.height) == (FRAMES, 32, 32)
    assert abs(media.video_seconds - SECONDS) < 0.04
    assert abs(media.sound_seconds - SECONDS) < 0.04
    assert media.spread > 5
    assert json.loads(read_comment(out))["width"] == 32, "it carries its settings"


def test_a_generation_names_its_kernels_weights_and_guard_copies_in_one_line(run: Callable[..., Ran]) -> None:
    ran = run(attention_mode="sage3_fp8", quantization="fp8_e4m3fn_scaled", steps=2, max_frames=9)
    (line,) = [line for line in ran.err.splitlines() if line.startswith("Attention ")]
    # Two windows of two steps of one pass: self attention by the mode, text, image and speech by SDPA.
    assert "Attention sageattn_3_fp8 (policy default) by " in line
    assert re.search(r"emulated_fp8 \(8 calls\)", line)
    assert re.search(r"sdpa \(24 calls\)", line)
    assert re.search(r"linears \d+ x fp8_e4m3fn_scaled", line)
    assert re.search(r"guard copies 0 of [1-9]\d+ calls \(0\.0 MiB\)", line)


def test_the_result_counts_what_the_guards_did(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[generate.Result] = []
    make_video = generate.make_video
    monkeypatch.setattr(generate, "make_video", lambda *given: results.append(make_video(*given)) or results[0])
    run(max_frames=5, attention_mode="eager", quantization="fp4_scaled")
    assert results[0].guards.calls > 0
    assert results[0].guards.copies == results[0].guards.bytes == 0
    assert set(results[0].kernels) == {"eager"}
    (how,) = results[0].linears
    assert how.startswith("fp4, unpacked per call instead of the FP4 matmul (it runs on cuda")


def test_the_seed_decides_the_video(run: Callable[..., Ran], tmp_path: Path) -> None:
    def frames(name: str, seed: int) -> bytes:
        assert run(out=tmp_path / name, seed=seed, steps=2, max_frames=5).code == 0
        with av.open(str(tmp_path / name)) as container:
            return b"".join(frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(video=0))

    first = frames("a.mp4", 1)
    assert first == frames("b.mp4", 1)
    assert first != frames("c.mp4", 2)


@pytest.mark.parametrize(
    ("rate", "channels", "ending"),
    [(8000, 1, "wav"), (22050, 2, "flac"), (44100, 2, "wav"), (48000, 1, "ogg"), (96000, 2, "wav")],
)
def test_recordings_of_any_rate_and_form(
    run: Callable[..., Ran], tmp_path: Path, rate: int, channels: int, ending: str
) -> None:
    path = tmp_path / f"other.{ending}"
    soundfile.write(path, tone(SECONDS, rate, channels), rate)
    ran = run(audio=path)
    assert ran.code == 0, ran.err
    media = probe(tmp_path / "video.mp4")
    assert media.frames == FRAMES
    assert abs(media.sound_seconds - SECONDS) < 0.04


def test_silence_makes_a_video_and_a_warning(run: Callable[..., Ran], tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silence.wav", np.zeros(8000), 16000)
    ran = run(audio=tmp_path / "silence.wav")
    assert ran.code == 0, ran.err
    assert "silent" in ran.err
    assert probe(tmp_path / "video.mp4").frames == 12


@pytest.mark.parametrize(
    "mode",
    ["RGBA", "L", "LA", "P", "I;16", "CMYK", "one pixel", "one column"],
)
def test_images_of_any_form(run: Callable[..., Ran], tmp_path: Path, mode: str) -> None:
    size = {"one pixel": (1, 1), "one column": (1, 300)}.get(mode, (30, 50))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif not mode.startswith("one"):
        image = image.convert(mode)
    path = tmp_path / ("other.tiff" if mode == "CMYK" else "other.png")
    image.save(path)
    ran = run(image=path, max_frames=5)
    assert ran.code == 0, ran.err
    assert probe(tmp_path / "video.mp4").frames == 5


@pytest.mark.parametrize(("asked", "given"), [((30, 50), (32, 48)), ((16, 16), (16, 16)), ((1, 33), (16, 32))])
def test_sizes_that_are_no_multiple_of_16_are_rounded_and_said(
    run: Callable[..., Ran], tmp_path: Path, asked: tuple[int, int], given: tuple[int, int]
) -> None:
    ran = run(width=asked[0], height=asked[1], max_frames=5)
    assert ran.code == 0, ran.err
    media = probe(tmp_path / "video.mp4")
    assert (media.width, media.height) == given
    assert (f"becomes {given[0]} x {given[1]}" in ran.err) == (asked != given)


def test_two_speakers_with_masks_last_as_long_as_the_longer_one(
    run: Callable[..., Ran], speech: Path, tmp_path: Path
) -> None:
    soundfile.write(tmp_path / "second.wav", tone(0.8, 44100, 2), 44100)
    masks = []
    for side in range(2):
        plane = np.zeros((40, 40), dtype=np.uint8)
        plane[:, 20 * side : 20 * side + 20] = 255
        Image.fromarray(plane).save(tmp_path / f"mask{side}.png")
        masks.append(tmp_path / f"mask{side}.png")
    ran = run(audio_2=tmp_path / "second.wav", masks=masks)
    assert ran.code == 0, ran.err
    media = probe(tmp_path / "video.mp4")
    assert media.frames == 20
    assert abs(media.sound_seconds - 0.8) < 0.04


def test_a_source_video_instead_of_an_image(run: Callable[..., Ran], tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "source.mp4", 25, tone(0.4, 16000), 16000) as writer:
        writer.append(torch.rand(10, 48, 48, 3))
    ran = run(image=None, video=tmp_path / "source.mp4", steps=2, start_step=1)
    assert ran.code == 0, ran.err
    assert probe(tmp_path / "video.mp4").frames == FRAMES


def test_guidance_schedulers_modes_tiles_and_swapped_blocks(run: Callable[..., Ran], tmp_path: Path) -> None:
    ran = run(
        "--tiled-vae",
        cfg=3,
        audio_cfg=2,
        steps=2,
        scheduler="unipc",
        mode="multitalk",
        blocks_to_swap=1,
        quantization="fp8_e4m3fn_scaled",
        base_precision="bf16",
        attention_mode="sage3_fp4",
        attention_policy="ends_16bit",
        max_frames=9,
    )
    assert ran.code == 0, ran.err
    assert probe(tmp_path / "video.mp4").frames == 9


@pytest.mark.parametrize("flags", [(), ("--tiled-vae",)])
def test_a_small_decoder_decodes_and_the_vae_encodes(
    run: Callable[..., Ran], tiny_set: TinySet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    """By both public names: the first window's latents are those of the VAE's video, its frames are not."""
    parts: list[tuple[str, int, int]] = []
    monkeypatch.setattr(terminal.ProgressBar, "_part", lambda self, *given: parts.append(given))
    decoded: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    decode = VideoDecoder.decode

    def spy(self: VideoDecoder, latents: torch.Tensor, **options: Any) -> torch.Tensor:
        assert options["tiled"] == bool(flags)
        frames = decode(self, latents, **options)
        decoded.append((type(self).__name__, latents.clone(), frames.clone()))
        return frames

    monkeypatch.setattr(VideoDecoder, "decode", spy)
    light = tmp_path / "lighttaew2_1.safetensors"
    shutil.copy(tiny_set.decoder, light)
    first: list[tuple[torch.Tensor, torch.Tensor]] = []
    for file, says in (
        (None, ""),
        (
            tiny_set.decoder,
            "taew2_1-tiny.safetensors decodes the model's own latents, as its name does not have 'light'.",
        ),
        (light, "lighttaew2_1.safetensors decodes denormalized latents, as its name has 'light'."),
    ):
        ran = run(*flags, decoder=file, max_frames=9)
        assert ran.code == 0, ran.err
        assert says in ran.err
        assert probe(tmp_path / "video.mp4").frames == 9
        assert [name for name, _, _ in decoded] == ["SmallDecoder" if file else "WanVAE"] * 2  # windows
        assert [part[1:] for part in parts if part[0] == "Decoding"] == [(1, 2), (2, 2)] * 2
        first.append(decoded[0][1:])
        decoded.clear()
        parts.clear()
    for (latents, frames), (others, other_frames) in itertools.combinations(first, 2):
        assert torch.equal(others, latents)
        assert other_frames.shape == frames.shape
        assert not torch.equal(other_frames, frames)


def test_a_merged_model_needs_no_adapter(run: Callable[..., Ran], tiny_set: TinySet, tmp_path: Path) -> None:

    state = {
        f"model.diffusion_model.{n}": t for n, t in {**load_file(tiny_set.model), **load_file(tiny_set.adapter)}.items()
    }
    save_file(state, tmp_path / "merged.safetensors", metadata={"config": '{"num_heads": 2, "audio_blocks": 2}'})
    assert run(model=tmp_path / "merged.safetensors", adapter=None, max_frames=5).code == 0


def test_a_mode_that_the_adapter_s_name_does_not_speak_of_is_said(
    run: Callable[..., Ran], tiny_set: TinySet, tmp_path: Path
) -> None:
    words = "is for mode multitalk by its name; the windows follow each other in mode infinitetalk"
    for name, mode, said in (
        ("MultiTalk-single.safetensors", "infinitetalk", True),
        ("MultiTalk-single.safetensors", "multitalk", False),
        ("InfiniteTalk_multi.safetensors", "infinitetalk", False),
        ("adapter.safetensors", "multitalk", False),
    ):
        shutil.copyfile(tiny_set.adapter, tmp_path / name)
        assert (words in run(adapter=tmp_path / name, mode=mode, max_frames=5).err) == said


def test_each_step_has_its_own_guidance(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two numbers for three steps: the last one goes on."""
    plans: list[plan.Plan] = []
    planned = generate.plan_video
    monkeypatch.setattr(generate, "plan_video", lambda *a: plans.append(planned(*a)) or plans[0])
    ran = run(steps=3, cfg="3,1", audio_cfg="1,2", max_frames=5)
    assert ran.code == 0, ran.err
    formulas = plans[0].schedule.formulas
    assert [[(t.name, t.scale) for t in f.terms] for f in formulas] == [[("text", 3.0)], *[[("audio", 2.0)]] * 2]


def test_each_window_has_its_piece_of_the_prompt(run: Callable[..., Ran], tmp_path: Path) -> None:
    """Windows of 5, 4 and 4 frames. A weight changes the video, the same text in both pieces does not."""

    def latents(prompt: str) -> list[torch.Tensor]:
        made: list[torch.Tensor] = []
        decode = generate.WanVAE.decode

        def keep(self: object, video: torch.Tensor, **options: object) -> torch.Tensor:
            made.append(video.clone())
            return decode(self, video, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generate.WanVAE, "decode", keep)
            ran = run(prompt=prompt, max_frames=9)
        assert ran.code == 0, ran.err
        return made

    plain = latents("a woman talks")
    for prompt, same in {
        "a woman talks | a woman waves": (True, False),
        "a woman talks|a woman talks": (True, True),
        "a woman (talks:1.0)": (True, True),
        "a woman (talks:3)": (False, False),
    }.items():
        assert tuple(torch.equal(a, b) for a, b in zip(plain, latents(prompt), strict=True)) == same, prompt


# --------------------------------------------------------------------------------------------------------- it rejects


def test_recordings_that_cannot_be_used(run: Callable[..., Ran], tmp_path: Path) -> None:
    nan = tone(SECONDS, 16000)
    nan[4000] = np.nan
    soundfile.write(tmp_path / "nan.wav", nan, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "short.wav", tone(0.01, 16000), 16000)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("no sound at all")
    for name, words in {
        "nan.wav": "NaN or infinite",
        "none.wav": "no samples",
        "short.wav": "too short",
        "empty.wav": "empty file",
        "text.wav": "cannot be read as a recording",
        "missing.wav": "does not exist",
        ".": "folder",
    }.items():
        assert_rejected(run(audio=tmp_path / name), words)
    assert not (tmp_path / "video.mp4").exists()


@pytest.mark.parametrize(
    "option", ["audio", "image", "video", "masks", "model", "vae", "decoder", "wav2vec", "tokenizer"]
)
@pytest.mark.parametrize(
    ("name", "words"),
    [("x" * 300, "too long"), ("~nobody-of-this-name/x", "home"), ("a\nb", r"a\nb"), ("\udcff", "udcff")],
)
def test_paths_that_nothing_has(run: Callable[..., Ran], option: str, name: str, words: str) -> None:
    ran = run(**({"image": None} if option == "video" else {}), **{option: name})
    assert_rejected(ran, words)


def test_images_that_cannot_be_used(run: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("text.png", "empty.png", "missing.png", "."):
        assert_rejected(run(image=tmp_path / name), str(tmp_path / name))


@pytest.mark.parametrize(
    ("option", "role", "words"),
    [
        ("model", "vae", "a Wan2.1 VAE, not a Wan2.1 diffusion transformer"),
        ("model", "adapter", "give it as the adapter"),
        ("adapter", "model", "not an InfiniteTalk or MultiTalk adapter"),
        ("adapter", None, "no audio layers"),
        ("vae", "text_encoder", "a T5 text encoder, not a Wan2.1 VAE"),
        ("vae", "decoder", "given as the VAE, is a small decoder, not a Wan2.1 VAE"),
        ("decoder", "vae", "given as the decoder, is a Wan2.1 VAE, not a small decoder"),
        ("text-encoder", "vae", "a Wan2.1 VAE"),
        ("clip-vision", "wav2vec_file", "a wav2vec2 model"),
        ("wav2vec", "clip_vision", "a CLIP vision model"),
    ],
)
def test_files_of_another_kind(
    run: Callable[..., Ran], tiny_set: TinySet, option: str, role: str | None, words: str
) -> None:
    assert_rejected(run(**{option: role and getattr(tiny_set, role)}), words)


@pytest.mark.parametrize("option", ["model", "adapter", "vae", "decoder", "text-encoder", "clip-vision", "wav2vec"])
def test_missing_and_truncated_files(run: Callable[..., Ran], tiny_set: TinySet, tmp_path: Path, option: str) -> None:
    assert_rejected(run(**{option: tmp_path / "nowhere.safetensors"}), "nowhere.safetensors", "does not exist")
    role = {"wav2vec": "wav2vec_file"}.get(option, option.replace("-", "_"))
    whole = getattr(tiny_set, role)
    cut = tmp_path / "cut.safetensors"
    with whole.open("rb") as source, cut.open("wb") as target:
        shutil.copyfileobj(source, target)
        target.truncate(whole.stat().st_size - 1000)
    assert_rejected(run(**{option: cut}), "cut.safetensors", "not downloaded completely")


def test_a_text_to_video_model(run: Callable[..., Ran], tmp_path: Path) -> None:
    path = tmp_path / "t2v.safetensors"
    save_file(dit_weights("t2v"), path, metadata={"config": '{"num_heads": 2}'})
    assert_rejected(run(model=path), "a text-to-video model (16 input channels)", "image-to-video")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"frames": 6}, "4n + 1"),
        ({"motion_frames": 9}, "motion"),
        ({"start_step": 1}, "start step 1 leaves none of 1"),
        ({"width": 8192, "height": 8192, "frames": 81}, "is too large"),
        ({"prompt": "a (happy:1.2.3) man"}, "weight 1.2.3 in the prompt is not a number"),
        ({"attention_mode": "sageattn9"}, "no attention mode 'sageattn9'"),
        ({"attention_mode": "radial_sage_attention"}, "choose sageattn_3_fp8"),
        ({"attention_mode": "flash_attn_3"}, "does not support this call"),
        ({"device": "toaster"}, "no device 'toaster'"),
        ({"device": "meta"}, "not supported"),
    ],
)
@pytest.mark.usefixtures("unread")
def test_settings_that_do_not_fit(run: Callable[..., Ran], options: dict[str, object], words: str) -> None:
    assert_rejected(run(**options), words)


def test_a_job_is_planned_once(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    """Size, windows, schedule and masks, for the whole run."""
    counts: Counter[str] = Counter()
    for name in ("fit_size", "plan_windows", "make_scheduler", "latent_masks"):
        for module in (plan, long_video, conditioning, generate):
            if hasattr(module, name):
                computed = getattr(module, name)
                monkeypatch.setattr(module, name, lambda *a, n=name, f=computed, **k: counts.update([n]) or f(*a, **k))
    assert run().code == 0
    assert counts == dict.fromkeys(("fit_size", "plan_windows", "make_scheduler", "latent_masks"), 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(run: Callable[..., Ran]) -> None:
    assert_rejected(run(device="cuda"), "needs an NVIDIA GPU")


@pytest.mark.usefixtures("unread")
def test_masks_that_do_not_fit(run: Callable[..., Ran], speech: Path, image: Path, tmp_path: Path) -> None:
    Image.new("L", (40, 40), 0).save(tmp_path / "black.png")
    assert_rejected(run(audio_2=speech, masks=[image]), "1 masks for 2 speakers")
    assert_rejected(run(audio_2=speech, masks=[image, tmp_path / "black.png"]), "speaker 2 covers no part")


@pytest.mark.usefixtures("unread")
def test_recordings_with_a_gap(run: Callable[..., Ran], speech: Path) -> None:
    assert_rejected(run(audio_3=speech), "--audio-3 is given without --audio-2")
    assert_rejected(run(audio_2=speech, audio_4=speech), "--audio-4 is given without --audio-3")


def test_a_mask_for_one_speaker_changes_the_video(run: Callable[..., Ran], tmp_path: Path) -> None:
    Image.fromarray(np.repeat(np.array([[255, 0]], np.uint8), 20, 1)).save(tmp_path / "left.png")

    def frames(**options: object) -> bytes:
        assert run(out=tmp_path / "a.mp4", max_frames=5, **options).code == 0
        with av.open(str(tmp_path / "a.mp4")) as container:
            return b"".join(frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(video=0))

    assert frames() != frames(masks=tmp_path / "left.png")


def test_places_that_cannot_be_written_to(
    run: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert_rejected(run(out=tmp_path / "file" / "video.mp4"), "cannot be written")
    assert_rejected(run(out=tmp_path), "folder")
    monkeypatch.setattr(generate, "load_dit", lambda *given, **options: pytest.fail("the model was read first"))
    assert_rejected(run(out=tmp_path / "video.gif"), ".mp4")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device is needed")
@pytest.mark.usefixtures("unread")
def test_devices_are_no_outputs(run: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "full.mp4").symlink_to("/dev/full")
    assert_rejected(run(out=tmp_path / "full.mp4"), "/dev/full", "would not be an MP4")


def test_a_full_disk(run: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(video, "_add_whole", full)
    assert_rejected(run(), "could not be written: there is no space left", "video.partial.mp4, which plays")
    assert probe(tmp_path / "video.partial.mp4").frames == 5


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_too_little_memory(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("wanvideo_infinitetalk.pipeline.make_video.load_dit", fail)
    assert_rejected(run(), "memory of cpu does not suffice", "fp8_e4m3fn_scaled")


def test_other_runtime_errors_are_not_hidden(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr("wanvideo_infinitetalk.pipeline.make_video.load_dit", fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run()


def test_arguments_that_argparse_rejects(run: Callable[..., Ran], capsys: pytest.CaptureFixture[str]) -> None:
    for options in (
        {"model": None},
        {"steps": "many"},
        {"scheduler": "fastest"},
        {"color_correction": 2},
    ):
        with pytest.raises(SystemExit) as caught:
            run(**options)
        assert caught.value.code == 2
        assert "infinitetalk generate: error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        ("image", "Give either an image or a source video"),
        ("audio", "Give a recording of speech"),
        ("wav2vec", "needs a wav2vec2 model"),
        ("clip_vision", "needs a CLIP vision model"),
    ],
)
def test_what_other_models_do_without_is_asked_for(run: Callable[..., Ran], lacking: str, words: str) -> None:
    assert_rejected(run(**{lacking: None}), words)


def test_verbose_shows_where_an_error_arose(run: Callable[..., Ran], tmp_path: Path) -> None:
    ran = run("--verbose", image=tmp_path / "missing.png")
    assert ran.code == 2
    assert "Traceback" in ran.err
    assert ran.err.rstrip().splitlines()[-1].startswith("infinitetalk: There is no image")


# ------------------------------------------------------------------------------------------------------ interruptions


def interrupt_at(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    step = terminal.ProgressBar._step

    def stop(self: terminal.ProgressBar, at: int, windows: int, number: int, steps: int) -> None:
        step(self, at, windows, number, steps)
        if at == window:
            raise KeyboardInterrupt

    monkeypatch.setattr(terminal.ProgressBar, "_step", stop)


def test_an_interrupted_video_keeps_its_finished_windows(
    run: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, window=2)
    ran = run()
    assert ran.code == 130
    assert ran.err.rstrip().splitlines()[-1] == (
        f"infinitetalk: Interrupted: 2 finished windows are in {tmp_path / 'video.partial.mp4'}; the same command with "
        "--resume goes on from there."
    )
    assert not (tmp_path / "video.mp4").exists()
    media = probe(tmp_path / "video.partial.mp4")
    assert media.frames == 9
    assert abs(media.sound_seconds - 9 / 25) < 0.08


def test_an_interruption_before_the_first_window(
    run: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, window=0)
    ran = run()
    assert ran.code == 130
    assert "nothing is finished" in ran.err
    assert not (tmp_path / "video.mp4").exists()


def test_an_older_video_is_left_alone_until_there_is_a_new_one(
    run: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "video.mp4").write_bytes(b"older work")
    assert_rejected(run(start_step=1))
    decode = long_video._decode

    def fail_in_the_second_window(*given: object) -> torch.Tensor:
        if given[3].index == 1:
            raise InfiniteTalkError("The VAE gave nothing; try another.")
        return decode(*given)

    with monkeypatch.context() as patch:
        patch.setattr(long_video, "_decode", fail_in_the_second_window)
        assert_rejected(run(), "The VAE gave nothing", f"finished is in {tmp_path / 'video.partial.mp4'}")
    assert probe(tmp_path / "video.partial.mp4").frames == 5
    assert (tmp_path / "video.mp4").read_bytes() == b"older work"
    assert run().code == 0
    assert probe(tmp_path / "video.mp4").frames == FRAMES
    assert not list(tmp_path.glob("*partial*"))


@pytest.mark.parametrize(
    "option",
    ["image", "audio", "audio_2", "masks", "video", "model", "adapter", "vae", "decoder", "wav2vec", "tokenizer"],
)
@pytest.mark.usefixtures("unread")
def test_an_output_that_is_one_of_the_inputs(run: Callable[..., Ran], tmp_path: Path, option: str) -> None:
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "in.mp4"
    path.write_bytes(b"an input")
    (tmp_path / "link.mp4").symlink_to(path)
    options = {option: path.parent if option in ("wav2vec", "tokenizer") else [path]}
    if option == "video":
        options["image"] = None
    assert_rejected(run(out=tmp_path / "link.mp4", **options), "overwrite its own input", "in.mp4")
    assert path.read_bytes() == b"an input"


def test_a_second_run_to_one_output(run: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "load_dit", lambda *given, **options: pytest.fail("the model was read first"))
    with OutputFiles.of(tmp_path / "video.mp4").locked():
        assert_rejected(run(), "Another run is writing")


# -------------------------------------------------------------------------------------------------------------- stdout


SAYS = """
import sys
from unittest import mock
from wanvideo_infinitetalk.cli import parser
parser.COMMANDS = (parser.Command("say", "", lambda p: None, lambda args: parser._say("video: f\\xfcr.mp4")),)
sys.exit(parser.main(["say"]))
"""
"""A command of which only the last line is left, in a process of its own."""


def say(**options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", SAYS], stderr=subprocess.PIPE, text=True, timeout=60, **options)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is needed")
def test_a_full_stdout_is_said() -> None:
    with Path("/dev/full").open("w") as full:
        ran = say(stdout=full)
    assert ran.returncode == 2
    assert ran.stderr.startswith("infinitetalk: Standard output takes nothing (No space left on device); it was to say")
    assert ran.stderr.count("\n") == 1


def test_a_narrow_or_closed_stdout() -> None:
    ran = say(stdout=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (ran.returncode, ran.stdout) == (0, "video: f\\xfcr.mp4\n"), ran.stderr
    assert say(preexec_fn=lambda: os.close(1)).returncode == 0


# ---------------------------------------------------------------------------------------------------------- make-tiny


def test_make_tiny_writes_a_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["make-tiny", str(tmp_path / "set")]) == 0
    assert f"model: {TinySet.in_folder(tmp_path / 'set').model}" in capsys.readouterr().out
    assert TinySet.in_folder(tmp_path / "set").is_complete()


def test_make_tiny_writes_the_talking_set_unless_told_otherwise(tmp_path: Path) -> None:
    for name, words in (("talking", []), ("random", ["--random"])):
        assert cli.main(["make-tiny", str(tmp_path / name), *words]) == 0
    talking, random = (inspect_dit(TinySet.in_folder(tmp_path / name).model) for name in ("talking", "random"))
    assert (talking.dim, random.dim) == (192, 128)


def test_make_tiny_where_nothing_can_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert cli.main(["make-tiny", str(tmp_path / "file" / "set")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--help"], ["generate", "--help"], ["demo", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(argv)
        assert caught.value.code == 0
        assert "infinitetalk" in capsys.readouterr().out
    assert os.environ.get("HF_HUB_OFFLINE") == "1"


# ------------------------------------------------------------------------------------------------------------- LoRAs


def lora_file(path: Path, columns: int = 128) -> Path:
    """A change of the first block's queries that is seen in the video."""
    generator = torch.Generator().manual_seed(3)
    pair = {"A": torch.randn(4, columns, generator=generator), "B": torch.randn(128, 4, generator=generator)}
    tensors = {f"diffusion_model.blocks.0.self_attn.q.lora_{part}.weight": value for part, value in pair.items()}
    tensors["diffusion_model.blocks.0.ffn.2.diff_b"] = torch.randn(128, generator=generator)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("given", "path", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-2", "a.safetensors", -2.0),
        (r"C:\x.safetensors", r"C:\x.safetensors", 1.0),
        (r"C:\x.safetensors:0.8", r"C:\x.safetensors", 0.8),
        ("a:b.safetensors", "a:b.safetensors", 1.0),
        ("a:b.safetensors:1e-1", "a:b.safetensors", 0.1),
        ("a:0.5:2", "a:0.5", 2.0),
        (":2", ":2", 1.0),
    ],
)
def test_the_strength_of_a_lora_follows_the_last_colon(given: str, path: str, strength: float) -> None:
    spec = cli._lora(given)
    assert (str(spec.path), spec.strength) == (path, strength)


@pytest.mark.parametrize("strength", ["nan", "inf", "1e9", "-1001"])
def test_strengths_that_are_out_of_bounds(
    run: Callable[..., Ran], capsys: pytest.CaptureFixture[str], strength: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(lora=f"style.safetensors:{strength}")
    assert caught.value.code == 2
    assert "argument --lora: the strength" in capsys.readouterr().err


@pytest.mark.parametrize("quantization", ["disabled", "fp8_e4m3fn_scaled"])
def test_loras_change_the_video_and_their_strengths_add_up(
    run: Callable[..., Ran], tmp_path: Path, quantization: str
) -> None:
    lora = lora_file(tmp_path / "a:b.safetensors")
    videos = []
    for strengths in ((), (2,), (1.5, 0.5), (0,)):
        ran = run(
            *(f"--lora={lora}:{strength}" for strength in strengths),
            quantization=quantization,
            base_precision="fp32",
            max_frames=5,
        )
        assert ran.code == 0, ran.err
        assert ran.err.count("changes, merged") == sum(strength != 0 for strength in strengths)
        videos.append((tmp_path / "video.mp4").read_bytes())
    assert videos[0] == videos[3] != videos[1] == videos[2]


def test_a_lora_is_merged_before_weights_are_quantized_and_not_into_weights_that_are(
    run: Callable[..., Ran], tiny_set: TinySet, tmp_path: Path
) -> None:
    lora = lora_file(tmp_path / "lora.safetensors")
    ran = run("--lora", str(lora), quantization="fp8_e4m3fn_scaled", max_frames=5)
    assert "2 changes, merged" in ran.err
    model = load_file(tiny_set.model)
    model = {n: t.to(torch.float8_e4m3fn) if "attn." in n and t.ndim == 2 else t for n, t in model.items()}
    save_file(model, tmp_path / "fp8.safetensors", metadata={"config": '{"num_heads": 2}'})
    ran = run("--lora", str(lora), model=tmp_path / "fp8.safetensors", max_frames=5, blocks_to_swap=1)
    assert ran.code == 0, ran.err
    assert "2 changes, not merged" in ran.err


@pytest.mark.usefixtures("unread")
def test_loras_that_cannot_be_used(run: Callable[..., Ran], tiny_set: TinySet, tmp_path: Path) -> None:
    assert_rejected(run(lora=tmp_path / "no.safetensors"), "no.safetensors", "does not exist")
    assert_rejected(run(lora=lora_file(tmp_path / "l.safetensors", 64)), "l.safetensors was made for another model")
    assert_rejected(run(lora=f"{tiny_set.vae}:0.5"), "not a LoRA")
    lora = lora_file(tmp_path / "out.mp4")
    assert_rejected(run(lora=lora, out=lora), "out.mp4")


def test_loras_are_part_of_what_is_made(tiny_set: TinySet, tmp_path: Path) -> None:
    one, other = lora_file(tmp_path / "one"), tmp_path / "other"
    shutil.copyfile(tiny_set.model, other)
    files = generate.ModelFiles(*["nowhere"] * 5)

    def what(*specs: LoraSpec) -> dict[str, str]:
        return generate._what(generate.Job(files, ("a.wav",), "out.mp4", loras=specs))

    made = [
        what(),
        what(LoraSpec(one)),
        what(LoraSpec(one, 0.5)),
        what(LoraSpec(other)),
        what(LoraSpec(one), LoraSpec(other)),
        what(LoraSpec(other), LoraSpec(other)),
        what(LoraSpec(one, 0.5), LoraSpec(other)),
    ]
    assert all(a != b for i, a in enumerate(made) for b in made[:i])


# ----------------------------------------------------------------------------------------------------------- listening


def test_no_more_is_encoded_than_the_frames_need(
    run: Callable[..., Ran], tiny_set: TinySet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers are the node's, which normalizes the whole recording and cuts it then."""
    soundfile.write(tmp_path / "long.wav", tone(3.0, 16000), 16000)
    whole = load_speech(tmp_path / "long.wav")
    encoded = []
    encode = Wav2Vec2Features.__call__

    def spy(self: Wav2Vec2Features, waveform: np.ndarray, *args: object) -> torch.Tensor:
        encoded.append((len(waveform), encode(self, waveform, *args)))
        return encoded[-1][1]

    monkeypatch.setattr(Wav2Vec2Features, "__call__", spy)
    assert run(audio=tmp_path / "long.wav", max_frames=9).code == 0
    assert run(max_frames=100).code == 0
    assert [samples for samples, _ in encoded] == [9 * 640 + 1, int(SECONDS * 16000)]
    monkeypatch.undo()
    node = Wav2Vec2Features.load(tiny_set.wav2vec)(whole[: int(9 / 25 * 16000) + 1], 9, 25.0)
    assert torch.equal(encoded[0][1], node)
    assert probe(tmp_path / "video.mp4").frames == FRAMES


# ------------------------------------------------------------------------------------------------------------- presets


@pytest.fixture
def job_of(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> Callable[..., generate.Job]:
    """`run`, and the job that the command makes of the options, but for what the video says of them."""
    jobs: list[generate.Job] = []
    monkeypatch.setattr(cli, "_run_job", lambda job, again="": jobs.append(job))

    def go(*flags: str, **options: object) -> generate.Job:
        bare = dict.fromkeys(("width", "height", "frames", "motion_frames", "steps", "cfg", "audio_cfg"))
        ran = run(*flags, **{**bare, **options})
        assert ran.code == 0, ran.err
        return replace(jobs.pop(), comment="")

    return go


def test_options_that_are_not_given_are_the_library_s(
    job_of: Callable[..., generate.Job], tiny_set: TinySet, speech: Path, image: Path, tmp_path: Path
) -> None:
    models = {name: path for name, path in vars(tiny_set).items() if name not in ("wav2vec_file", *ONLY_RANDOM)}
    state = load_file(models["model"])
    save_file(state, tmp_path / "no defaults.safetensors", metadata={"config": '{"num_heads": 2}'})
    models["model"] = tmp_path / "no defaults.safetensors"
    assert job_of(model=models["model"]) == generate.Job(
        generate.ModelFiles(**models), (speech,), tmp_path / "video.mp4", image
    )


GIVEN: dict[str, tuple[str, Any]] = {
    "one_after_the_other": ("--one-after-the-other", True),
    "masks": ("--masks m.png", (Path("m.png"),)),
    "references": ("--reference r.png s.png", (Path("r.png"), Path("s.png"))),
    "prompt": ("--prompt p", "p"),
    "negative": ("--negative-prompt n", "n"),
    "resume": ("--resume", True),
    "loras": ("--lora l:0.5", (LoraSpec("l", 0.5),)),
    "width": ("--width 48", 48),
    "height": ("--height 80", 80),
    "frames": ("--frames 9", 9),
    "motion_frames": ("--motion-frames 5", 5),
    "max_frames": ("--max-frames 9", 9),
    "steps": ("--steps 3", 3),
    "shift": ("--shift 2", 2),
    "cfg": ("--cfg 3,2", [3, 2]),
    "audio_cfg": ("--audio-cfg 1.5", 1.5),
    "image_cfg": ("--image-cfg 2", 2),
    "audio_scale": ("--audio-scale 0.5", 0.5),
    "seed": ("--seed 7", 7),
    "use_apg": ("--apg", True),
    "scheduler": ("--scheduler euler", "euler"),
    "mode": ("--mode multitalk", "multitalk"),
    "start_step": ("--start-step 2", 2),
    "color_correction": ("--color-correction 0.25", 0.25),
    "color_method": ("--color-method mkl", "mkl"),
    "speech_encoding": ("--speech-encoding once", "once"),
    "attention_mode": ("--attention-mode eager", "eager"),
    "attention_policy": ("--attention-policy ends_16bit", "ends_16bit"),
    "quantization": ("--quantization fp8_e5m2", "fp8_e5m2"),
    "base_dtype": ("--base-precision fp16", torch.float16),
    "fp16_accumulation": ("--base-precision fp16_fast", True),
    "device": ("--device cpu", "cpu"),
    "gpus": ("--gpus 2", 2),
    "guidance_gpus": ("--guidance-gpus 2", 2),
    "blocks_to_swap": ("--blocks-to-swap 1", 1),
    "tiled_vae": ("--tiled-vae", True),
    "text_encoder_device": ("--text-encoder-device cpu", "cpu"),
    "text_encoder_quantization": ("--text-encoder-quantization fp8_e4m3fn", "fp8_e4m3fn"),
    "compile_settings": ("--compile max-autotune", CompileSettings(mode="max-autotune")),
}
"""Field of `Job` or `GenerateConfig` -> an option that sets it, and its value then, which is not the default."""


def setting(job: generate.Job, name: str) -> object:
    return getattr(job if hasattr(job, name) else job.config, name)


def test_every_option_of_generate_is_tried() -> None:
    (subparsers,) = [action for action in cli.parser()._actions if isinstance(action.choices, dict)]
    options = {action.option_strings[-1] for action in subparsers.choices["generate"]._actions}
    files = {f"--{name.replace('_', '-')}" for name in generate.ModelFiles.__dataclass_fields__}
    inputs = {"--image", "--video", "--audio", "--audio-2", "--audio-3", "--audio-4", "--out"}
    tried = {line.split()[0] for line, _ in GIVEN.values()}
    assert options - tried - inputs - files == {"--help", "--verbose", "--preset"}


@pytest.mark.parametrize("name", GIVEN)
def test_an_option_arrives_in_the_job_and_a_preset_may_set_it(
    job_of: Callable[..., generate.Job], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    option, value = GIVEN[name]
    assert setting(job_of(*option.split()), name) == value
    default = setting(job_of(), name)
    assert default != value
    monkeypatch.setitem(PRESETS, "quality", {name: value})
    assert setting(job_of(preset="quality"), name) == value
    monkeypatch.setitem(PRESETS, "quality", {name: default})
    assert setting(job_of(*option.split(), preset="quality"), name) == value


def test_the_help_says_what_presets_stand_for(job_of: Callable[..., generate.Job]) -> None:
    for preset, said in (text.split(": ") for text in cli._presets().split("; ")):
        assert job_of(*said.split()) == job_of(preset=preset), preset


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fills_in_what_no_option_says(job_of: Callable[..., generate.Job], preset: str) -> None:
    for given in ({}, {"steps": 7}):
        job = job_of(preset=preset, **given)
        for name, value in (PRESETS[preset] | given).items():
            assert getattr(job.config if hasattr(job.config, name) else job, name) == value, name
    default = job_of()
    assert (job_of(preset=preset, quantization="disabled").quantization, default.blocks_to_swap) == ("disabled", 0)
    with pytest.raises(InfiniteTalkError, match=f"no preset 'slow': choose one of .*{preset}"):
        build_job({}, "slow")


def test_the_fast_preset_asks_for_a_step_lora(
    job_of: Callable[..., generate.Job], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job_of(preset="fast", lora=tmp_path / "step.safetensors")
    job_of(preset="quality")
    assert "step LoRA" not in caplog.text
    job_of(preset="fast")
    assert "choose a step LoRA" in caplog.text


def test_low_memory_runs_on_the_tiny_models(run: Callable[..., Ran]) -> None:
    ran = run(preset="low-memory", max_frames=5)
    assert ran.code == 0, ran.err
    assert "fp8_e4m3fn_scaled" in ran.err


def test_names_are_read_in_any_spelling(run: Callable[..., Ran]) -> None:
    ran = run(attention_mode="SageAttn3_FP8", quantization="FP8-E4M3FN-scaled", max_frames=5)
    assert ran.code == 0, ran.err
    assert "Attention sageattn_3_fp8 (policy default)" in ran.err
    assert_rejected(run(quantization="fp8_e4m3"), "the nearest is fp8_e4m3fn")


@pytest.mark.usefixtures("unread")
def test_all_missing_files_are_named_at_once(run: Callable[..., Ran], tmp_path: Path) -> None:
    names = {
        "model": "model",
        "adapter": "adapter",
        "vae": "vae",
        "decoder": "decoder",
        "text-encoder": "text encoder",
        "clip-vision": "clip vision",
        "wav2vec": "wav2vec",
        "tokenizer": "tokenizer",
        "image": "image",
        "audio": "recording 1",
        "audio-2": "recording 2",
        "lora": "LoRA 1",
    }
    gone = {option: tmp_path / f"no {option}.bin" for option in names}
    ran = run(**gone, masks=[tmp_path / "no mask", tmp_path / "no other mask"])
    assert_rejected(ran, "14 files do not exist: ", f"mask 2 {tmp_path / 'no other mask'}, ")
    for option, name in names.items():
        assert f"{name} {gone[option]}" in ran.err
    assert_rejected(run(vae=gone["vae"], image=gone["image"]), "2 files do not exist: vae", "no image.bin; check")
    assert_rejected(run(image=None, video=gone["model"], audio=gone["audio"]), "2 files", "video", "recording")
    assert_rejected(run(tokenizer="owner/name", vae=gone["vae"], lora=f"{gone['lora']}:0"), "no vae.bin does not exist")


# ---------------------------------------------------------------------------------------------------- models' defaults


def test_the_tiny_models_state_their_defaults(
    job_of: Callable[..., generate.Job], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def of(job: generate.Job, names: Iterable[str]) -> dict[str, float]:
        return {name: getattr(job.config, name) for name in names}

    assert of(job_of(), RANDOM_DEFAULTS) == RANDOM_DEFAULTS
    talking = make_tiny(tmp_path / "talking")
    assert of(job_of(model=talking.model), TALKING_DEFAULTS) == TALKING_DEFAULTS
    assert inspect_dit(talking.model, talking.adapter).num_heads == 3
    assert "The model's own defaults: width 128, height 128" in caplog.text or "steps 8" in caplog.text
    job = job_of(steps=5, width=96, cfg=2)
    assert of(job, ("steps", "width", "height", "cfg", "frames")) == dict(
        steps=5, width=96, height=None, cfg=2, frames=RANDOM_DEFAULTS["frames"]
    )
    quality = job_of(preset="quality")
    assert of(quality, ("steps", "cfg", "width")) == {"steps": 40, "cfg": 5, "width": RANDOM_DEFAULTS["width"]}


@pytest.mark.parametrize(
    "text", ['{"steps": 0, "cfg": "x", "depth": 3, "seed": true, "shift": 2}', "[1]", "{", "null", "9" * 5000]
)
def test_defaults_that_are_none(
    job_of: Callable[..., generate.Job], tiny_set: TinySet, tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(load_file(tiny_set.model), path, metadata={"config": '{"num_heads": 2}', "defaults": text})
    job = job_of(model=path)
    assert job.config == plan.GenerateConfig(shift=2 if "shift" in text else 7.0)
    assert ("left out: cfg, depth, seed, steps" in caplog.text) == ("shift" in text)
    assert job_of(model=tmp_path / "nowhere").config == plan.GenerateConfig()


# ------------------------------------------------------------------------------------------------- what the nodes could


def test_recordings_one_after_the_other(
    run: Callable[..., Ran], image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each speaker's line is silent while the other speaks, and so is the sound."""
    encoded = []
    encode = Wav2Vec2Features.__call__
    monkeypatch.setattr(Wav2Vec2Features, "__call__", lambda self, line: encoded.append(line) or encode(self, line))
    masks = []
    for side in range(2):
        plane = np.zeros((40, 40), dtype=np.uint8)
        plane[:, 20 * side : 20 * side + 20] = 255
        Image.fromarray(plane).save(tmp_path / f"mask{side}.png")
        masks.append(tmp_path / f"mask{side}.png")
    soundfile.write(tmp_path / "second.wav", tone(0.4, 44100), 44100)
    ran = run("--one-after-the-other", audio_2=tmp_path / "second.wav", masks=masks)
    assert ran.code == 0, ran.err
    media = probe(tmp_path / "video.mp4")
    assert media.frames == FRAMES + 10
    assert abs(media.sound_seconds - SECONDS - 0.4) < 0.04
    first, second = encoded
    begin = int(SECONDS * 16000)
    assert len(first) == len(second) == begin + 6400
    assert first[:begin].any()
    assert second[begin:].any()
    assert not first[begin:].any()
    assert not second[:begin].any()
    recordings = (tmp_path / "speech.wav", tmp_path / "second.wav")
    wave, rate = generate.sound_of(mock.Mock(audio=recordings, one_after_the_other=True))
    assert len(wave) / rate == pytest.approx(SECONDS + 0.4, abs=0.001)


CHANGES: dict[str, object] = {
    "negative_prompt": "a dog",
    "audio_scale": 0.5,
    "shift": 9,
    "scheduler": "unipc",
    "mode": "multitalk",
    "color_correction": 0,
    "steps": 3,
    "cfg": 4,
    "audio_cfg": 2,
    "motion_frames": 5,
    "quantization": "fp8_e4m3fn",
    "attention_mode": "sageattn_3_fp4",
    "base_precision": "bf16",
    "text_encoder_quantization": "fp8_e4m3fn",
}


def test_settings_change_the_video(run: Callable[..., Ran], tmp_path: Path) -> None:
    """Each of them, alone, where guidance and a second window give all of them something to do."""

    def video(*flags: str, **options: object) -> bytes:
        given = {"cfg": 3, "audio_cfg": 3, "steps": 2, "frames": 9, "max_frames": 13} | options
        ran = run(*flags, **given)
        assert ran.code == 0, ran.err
        return (tmp_path / "video.mp4").read_bytes()

    plain = video()
    assert video(audio_scale=1, negative_prompt=generate.DEFAULT_NEGATIVE, color_correction=1) == plain
    changed = {"apg": video("--apg")} | {name: video(**{name: value}) for name, value in CHANGES.items()}
    assert [name for name, made in changed.items() if made == plain] == []


def test_settings_that_save_memory(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    swaps, tiled = [], []
    offloader, decode = generate.Offloader, generate.WanVAE.decode
    monkeypatch.setattr(generate, "Offloader", lambda model, to, swap: swaps.append(swap) or offloader(model, to, swap))
    monkeypatch.setattr(
        generate.WanVAE, "decode", lambda self, video, **k: tiled.append(k["tiled"]) or decode(self, video, **k)
    )
    assert run(max_frames=5).code == 0
    assert (swaps, tiled) == ([], [False])
    assert run("--tiled-vae", blocks_to_swap=1, max_frames=5).code == 0
    assert (swaps, tiled) == ([BlockSwap(blocks=1)], [False, True])


def test_the_text_encoder_s_device(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []
    load = generate.TextEncoder.load
    monkeypatch.setattr(
        generate.TextEncoder, "load", lambda *a, device, **k: devices.append(device) or load(*a, device=device, **k)
    )
    monkeypatch.setattr(
        generate, "choose_device", lambda name: torch.device("cpu", 0) if name == "cpu" else torch.device("cpu")
    )
    assert run(max_frames=5).code == 0
    assert run(max_frames=5, text_encoder_device="cpu").code == 0
    assert devices == [torch.device("cpu"), torch.device("cpu", 0)]
    monkeypatch.undo()
    assert_rejected(run(text_encoder_device="tpu"), "no device 'tpu'")


def test_the_text_encoder_in_fp8(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    encoders = []
    load = generate.TextEncoder.load
    monkeypatch.setattr(generate.TextEncoder, "load", lambda *a, **k: encoders.append(load(*a, **k)) or encoders[-1])
    for spelling in ("disabled", "FP8-e4m3fn"):
        ran = run(text_encoder_quantization=spelling, max_frames=5)
        assert ran.code == 0, ran.err
    plain, low = (
        {name.rsplit(".", 2)[1] for name, p in encoder.model.named_parameters() if p.dtype == torch.float8_e4m3fn}
        for encoder in encoders
    )
    # Not wo, to whose dtype transformers casts its input.
    assert (plain, low) == (set(), {"q", "k", "v", "o", "wi_0", "wi_1"})
    prompts = [encoder.encode(["a woman talks"])[0] for encoder in encoders]
    assert 0 < (prompts[1] - prompts[0]).norm() / prompts[0].norm() < 0.15
    assert_rejected(run(text_encoder_quantization="fp4"), "text encoder quantization 'fp4' is unknown", "fp8_e4m3fn")


def test_fp16_fast_accumulates_in_fp16(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    load, step = generate.load_dit, terminal.ProgressBar._step

    def keep(self: terminal.ProgressBar, *given: int) -> None:
        seen.append(torch.backends.cuda.matmul.allow_fp16_accumulation)
        step(self, *given)

    monkeypatch.setattr(terminal.ProgressBar, "_step", keep)
    dtypes = []
    monkeypatch.setattr(generate, "load_dit", lambda *a, **k: dtypes.append(k["base_dtype"]) or load(*a, **k))
    for precision in ("fp16", "fp16_fast"):
        assert run(base_precision=precision, max_frames=5).code == 0
    assert (dtypes, seen) == ([torch.float16] * 2, [False, True])
    assert not torch.backends.cuda.matmul.allow_fp16_accumulation


class Graphs:
    """A backend of torch.compile that runs graphs as they are and counts them, up to `most`."""

    count, most = 0, 100

    def __call__(self, graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        self.count += 1
        if self.count > self.most:
            raise RuntimeError("no more")
        return graph.forward


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """The backend that `--compile` takes in place of Inductor, which needs half a minute."""
    torch._dynamo.reset()
    backend: Any = Graphs()
    monkeypatch.setattr(compilation, "CompileSettings", lambda mode: CompileSettings(backend=backend, mode=mode))
    yield backend
    torch._dynamo.reset()


def test_compiled_blocks_make_the_same_video(run: Callable[..., Ran], graphs: Graphs, tmp_path: Path) -> None:
    """By graphs that run as they are, so bit for bit: one to try the compiler, one for all blocks and windows."""
    videos, counts = [], []
    for flags in ((), ("--compile",)):
        ran = run(*flags, steps=2, blocks_to_swap=1)
        assert ran.code == 0, ran.err
        videos.append((tmp_path / "video.mp4").read_bytes())
        counts.append(graphs.count)
    assert videos[0] == videos[1]
    assert counts == [0, 2]


def test_a_model_that_cannot_be_compiled(run: Callable[..., Ran], graphs: Graphs) -> None:
    graphs.most = 1
    assert_rejected(run("--compile"), "torch.compile cannot compile this model (", "no more", "without being compiled")


@pytest.mark.usefixtures("unread")
def test_compilation_that_cannot_be(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    assert_rejected(run("--compile=reduce-overhead", blocks_to_swap=1), "block swap", "max-autotune-no-cudagraphs")
    monkeypatch.setattr(compilation, "CompileSettings", lambda mode: CompileSettings(backend="none of torch's"))
    assert_rejected(run("--compile"), "torch.compile does not work here with backend none of torch's", "do not compile")


def test_the_demo_takes_another_image_and_recording(
    tiny_set: TinySet, speech: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[generate.Job] = []
    monkeypatch.setattr(cli, "_run_job", jobs.append)
    models = ["--models", str(tiny_set.model.parent)]
    assert cli.main(["demo", "--image", str(image), "--audio", str(speech), *models]) == 0
    assert cli.main(["demo", *models]) == 0
    assert (jobs[0].image, jobs[0].audio) == (image, (speech,))
    assert [Path(str(jobs[1].image)).name, Path(jobs[1].audio[0]).name] == ["portrait.png", "speech.wav"]


# --------------------------------------------------------------------------------------------------- bare environments


AS_NOBODY = """
import pwd, sys

def unknown(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

pwd.getpwuid = unknown
from wanvideo_infinitetalk.cli.parser import main
from wanvideo_infinitetalk.wanvideo.kernels.selftest import cache_file
print(cache_file())
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name == "nt", reason="there is no pwd")
def test_a_video_without_a_home(tiny_set: TinySet, tmp_path: Path) -> None:
    """No HOME, a user without a name, and the C locale."""

    def run(*more: str, **environment: str) -> subprocess.CompletedProcess[str]:
        bare = {"PATH": os.defpath, "LC_ALL": "C", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
        bare |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment}
        command = [sys.executable, "-c", AS_NOBODY, "generate", "--image", "i.png", "--out", "ö.mp4"]
        for role, path in vars(tiny_set).items():
            command += [] if role in ("wav2vec_file", *ONLY_RANDOM) else [f"--{role.replace('_', '-')}", str(path)]
        command += ["--frames", "5", "--motion-frames", "1", "--steps", "1", "--width", "32", "--height", "32", *more]
        return subprocess.run(command, env=bare, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)

    soundfile.write(tmp_path / "ü.wav", tone(0.3, 16000), 16000)
    Image.new("RGB", (32, 32)).save(tmp_path / "i.png")
    ran = run("--audio", "ü.wav", "--max-frames", "5", "--attention-mode", "sageattn")
    assert ran.returncode == 0, ran.stderr
    assert probe(tmp_path / "ö.mp4").frames == 5
    assert Path(ran.stdout.splitlines()[0]) == tmp_path / f"wanvideo_infinitetalk-{os.getuid()}" / "trials.json"
    ran = run("--audio", "~/a.wav", XDG_CACHE_HOME=str(tmp_path / "i.png"))
    assert ran.returncode == 2
    assert ran.stderr.endswith("The home folder in ~/a.wav is not known here: write the path without ~.\n")
    assert ran.stdout.startswith(f"{tmp_path / 'i.png'}/wanvideo_infinitetalk")


def test_events_follow_the_vae(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, int]] = []
    monkeypatch.setattr(terminal.ProgressBar, "_part", lambda self, *given: seen.append(given))
    assert run(max_frames=9).code == 0
    encoding = [(done, total) for text, done, total in seen if text == "Encoding"]
    decoding = [(done, total) for text, done, total in seen if text == "Decoding"]
    assert len(encoding) + len(decoding) == len(seen)
    assert decoding == [(1, 2), (2, 2)] * 2  # two windows of two latent frames
    assert encoding
    assert encoding[-1][0] == encoding[-1][1]


def test_help_and_version_answer_without_torch() -> None:
    """It takes seconds to import."""
    for argument in ("--help", "--version"):
        code = (
            "import sys\n"
            "from wanvideo_infinitetalk.cli.parser import main\n"
            "try:\n"
            f"    main([{argument!r}])\n"
            "except SystemExit:\n"
            "    sys.stderr.write(str('torch' in sys.modules))\n"
        )
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert ran.stderr == "False"
        assert "infinitetalk" in ran.stdout
