"""The command, run in this process on the tiny models: what works, and the sentence that everything else ends with."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from wanvideo_infinitetalk.cli import parser as cli
from wanvideo_infinitetalk.cli import terminal
from wanvideo_infinitetalk.cli.tiny_models import TinySet, dit_weights
from wanvideo_infinitetalk.media import video
from wanvideo_infinitetalk.media.video import OutputFiles, VideoWriter
from wanvideo_infinitetalk.pipeline import conditioning, long_video, plan
from wanvideo_infinitetalk.pipeline import make_video as generate
from wanvideo_infinitetalk.wanvideo.checkpoints.dit import inspect_dit
from wanvideo_infinitetalk.wanvideo.errors import InfiniteTalkError

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
    for part in ("Wav2Vec2Features.load", "TextEncoder.load", "ClipVision.load", "WanVAE.load", "load_dit"):
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


def test_a_generation_names_its_kernels_weights_and_guard_copies_in_one_line(run: Callable[..., Ran]) -> None:
    ran = run(attention_mode="sage3_fp8", quantization="fp8_e4m3fn_scaled", steps=2, max_frames=9)
    (line,) = [line for line in ran.err.splitlines() if line.startswith("Attention ")]
    # Two windows of two steps of one pass: self attention by the mode, text, image and speech by SDPA.
    assert "Attention sage3_fp8 (policy default) by " in line
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


def test_a_merged_model_needs_no_adapter(run: Callable[..., Ran], tiny_set: TinySet, tmp_path: Path) -> None:

    state = {
        f"model.diffusion_model.{n}": t for n, t in {**load_file(tiny_set.model), **load_file(tiny_set.adapter)}.items()
    }
    save_file(state, tmp_path / "merged.safetensors", metadata={"config": '{"num_heads": 2, "audio_blocks": 2}'})
    assert run(model=tmp_path / "merged.safetensors", adapter=None, max_frames=5).code == 0


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


@pytest.mark.parametrize("option", ["audio", "image", "video", "masks", "model", "vae", "wav2vec", "tokenizer"])
@pytest.mark.parametrize(
    ("name", "words"),
    [("x" * 300, "too long"), ("~nobody-of-this-name/x", "home"), ("a\nb", r"a\nb"), ("\udcff", "udcff")],
)
def test_paths_that_nothing_has(run: Callable[..., Ran], option: str, name: str, words: str) -> None:
    ran = run(**({"image": None} if option == "video" else {}), **{option: name})
    assert_rejected(ran, words)
    assert len(ran.err.splitlines()) == 1


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
        ("text-encoder", "vae", "a Wan2.1 VAE"),
        ("clip-vision", "wav2vec_file", "a wav2vec2 model"),
        ("wav2vec", "clip_vision", "a CLIP vision model"),
    ],
)
def test_files_of_another_kind(
    run: Callable[..., Ran], tiny_set: TinySet, option: str, role: str | None, words: str
) -> None:
    assert_rejected(run(**{option: role and getattr(tiny_set, role)}), words)


@pytest.mark.parametrize("option", ["model", "adapter", "vae", "text-encoder", "clip-vision", "wav2vec"])
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
        {"image": None},
        {"steps": "many"},
        {"scheduler": "fastest"},
        {"color_correction": 2},
    ):
        with pytest.raises(SystemExit) as caught:
            run(**options)
        assert caught.value.code == 2
        assert "infinitetalk generate: error:" in capsys.readouterr().err


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
    "option", ["image", "audio", "audio_2", "masks", "video", "model", "adapter", "vae", "wav2vec", "tokenizer"]
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
