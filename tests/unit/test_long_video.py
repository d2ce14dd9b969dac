"""The generation loop with small stand-ins for the models: what it asks of them, hands out, and does when they fail."""

from __future__ import annotations

import contextlib
import logging
import threading
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from wanvideo_infinitetalk.media.color import COLOR_METHODS
from wanvideo_infinitetalk.media.images import load_image
from wanvideo_infinitetalk.media.video import VideoFrames, VideoWriter, to_bytes
from wanvideo_infinitetalk.pipeline import long_video, nonfinite
from wanvideo_infinitetalk.pipeline.attention_policy import bind
from wanvideo_infinitetalk.pipeline.conditioning import Conditioning
from wanvideo_infinitetalk.pipeline.long_video import Callbacks, generate
from wanvideo_infinitetalk.pipeline.plan import GenerateConfig, plan_video
from wanvideo_infinitetalk.pipeline.schedulers import make_scheduler
from wanvideo_infinitetalk.wanvideo.errors import InfiniteTalkError, InputError
from wanvideo_infinitetalk.wanvideo.modules.model import WanModel

LAYERS, HIDDEN = 2, 3


class FakeBlock(nn.Module):
    """Passes on what it is given, or half of it as NaN."""

    def forward(self, x: torch.Tensor, poisoned: bool) -> torch.Tensor:
        return torch.where(x > 0, torch.nan, x) if poisoned else x


class FakeModel(nn.Module):
    """A velocity that depends on everything it is given. `broken`: from its n-th call on, this mode breaks block 1."""

    def __init__(self, broken: dict[str, int] | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FakeBlock() for _ in range(3))
        self.broken = broken or {}
        self.calls: list[dict[str, Any]] = []

    def forward(
        self, x, t, context, clip_fea=None, y=None, audio=None, ref_target_masks=None, *, audio_scale=1.0,
        attention_mode=None,
    ):  # fmt: skip
        self.calls.append(dict(x=x, t=t, context=context, clip=clip_fea, y=y, audio=audio, masks=ref_target_masks))
        self.calls[-1].update(audio_scale=audio_scale, mode=attention_mode)
        v = 0.4 * x + 0.1 * torch.sin(3 * x) + context.mean() + audio_scale * audio.mean() + 0.1 * y[0, 4:]
        broken = attention_mode in self.broken and len(self.calls) > self.broken[attention_mode]
        for index, block in enumerate(self.blocks):
            v = block(v, broken and index == 1)
        return v.unsqueeze(0)


@dataclass
class FakeVae:
    """Latents: eight-by-eight means of the channels' mean, scaled; causal in time. Decode repeats them."""

    encoded: list[torch.Tensor] = field(default_factory=list)
    decoded_as: float | None = None

    def encode(self, video, *, tiled=False):
        self.encoded.append(video)
        small = video[0].mean(0).unflatten(2, (-1, 8)).unflatten(1, (-1, 8)).mean((2, 4))  # [F, h, w]
        small = torch.cat([small[:1], small[1:].unflatten(0, (-1, 4)).mean(1)])
        return (small * torch.linspace(0.5, 1.5, 16)[:, None, None, None]).unsqueeze(0)

    def decode(self, latents, *, tiled=False):
        small = latents[0, :3].clamp(-1, 1)
        frames = torch.cat([small[:, :1], small[:, 1:].repeat_interleave(4, 1)], 1)
        frames = frames.repeat_interleave(8, 2).repeat_interleave(8, 3).unsqueeze(0)
        return frames if self.decoded_as is None else torch.full_like(frames, self.decoded_as)


@dataclass
class FakeClip:
    seen: list[torch.Tensor] = field(default_factory=list)

    def encode(self, image):
        self.seen.append(image)
        return image.mean().expand(1, 257, 8)


CONFIG = GenerateConfig(width=32, height=16, frames=9, motion_frames=5, steps=3, seed=7, color_correction=0.0)


def _image(size: tuple[int, int] = (48, 32), seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _conditioning(rows: int = 15, speakers: int = 1, **changes: Any) -> Conditioning:
    rng = torch.Generator().manual_seed(3)
    audio = [torch.randn(rows, LAYERS, HIDDEN, generator=rng) for _ in range(speakers)]
    text = torch.randn(2, 4, 8, generator=rng)
    return replace(Conditioning([text[0]], text[1], audio, [_image()]), **changes)


def _run(config: GenerateConfig = CONFIG, conditioning: Conditioning | None = None, **parts: Any):
    model, vae = parts.pop("model", None) or FakeModel(), parts.pop("vae", None) or FakeVae()
    clip = parts.pop("clip", None) or FakeClip()
    return list(_generate(model, vae, clip, conditioning or _conditioning(), config, **parts))


def _generate(model, vae, clip, conditioning: Conditioning, config: GenerateConfig, **parts: Any):
    size = load_image(conditioning.source[0]).size if len(conditioning.source) else (48, 32)
    plan = plan_video(config, size, [len(features) for features in conditioning.audio])
    return generate(model, vae, clip, conditioning, plan, **parts)


def _video(windows) -> torch.Tensor:
    return torch.cat([w.frames for w in windows])


# --- frames


def test_frames_are_handed_out_as_bytes_where_that_is_asked_for() -> None:
    ours, floats = _run(frames_dtype=torch.uint8), _run()
    assert {w.frames.dtype for w in ours} == {torch.uint8}
    assert torch.equal(_video(ours), to_bytes(_video(floats)))
    assert all(torch.equal(a.state.carried, b.state.carried) for a, b in zip(ours, floats, strict=True))


class ReadAhead:
    """Frames of a source video; says when each is read."""

    def __init__(self, count: int) -> None:
        self.read = [threading.Event() for _ in range(count)]

    def __len__(self) -> int:
        return len(self.read)

    def __getitem__(self, index: int, /) -> Image.Image:
        self.read[index].set()
        return _image(seed=index)


@pytest.mark.parametrize("start_step", [0, 1])
def test_source_frames_of_the_next_window_are_read_while_one_is_computed(start_step) -> None:
    source, model = ReadAhead(15), FakeModel()
    needed = [4, 8] if start_step == 0 else [12, 14]  # the first frame of the next window, or its last
    windows: list[int] = []

    def computing() -> None:
        index = min(len(windows), len(needed) - 1)
        assert source.read[needed[index]].wait(20), "read only when it is needed"

    conditioning = _conditioning(rows=15, source=source)
    config = replace(CONFIG, start_step=start_step)
    callbacks = Callbacks(check_interrupt=computing)
    for window in _generate(model, FakeVae(), FakeClip(), conditioning, config, callbacks=callbacks):
        windows.append(window.index)
    assert windows == [0, 1, 2]


def test_a_source_frame_that_cannot_be_read_ends_the_run_with_its_sentence() -> None:
    class Cut(ReadAhead):
        def __getitem__(self, index: int, /) -> Image.Image:
            if index > 3:
                raise InputError("The video ends.")
            return super().__getitem__(index)

    windows = _generate(FakeModel(), FakeVae(), FakeClip(), _conditioning(rows=15, source=Cut(15)), CONFIG)
    assert next(windows).index == 0
    with pytest.raises(InputError, match="The video ends"):
        next(windows)


@given(
    total=st.integers(1, 60),
    frames=st.integers(1, 4).map(lambda n: 4 * n + 1),
    motion=st.integers(0, 3).map(lambda n: 4 * n + 1),
)
@settings(deadline=None, max_examples=40)
def test_the_video_is_as_long_as_the_recording(total, frames, motion) -> None:
    if motion >= frames:
        motion = 1
    config = replace(CONFIG, frames=frames, motion_frames=motion, steps=1, cfg=1.0, audio_cfg=1.0, width=16)
    windows = _run(config, _conditioning(total))
    assert sum(len(w.frames) for w in windows) == total
    assert [w.index for w in windows] == list(range(windows[0].count))


def test_frames_are_floats_from_0_to_1_of_the_given_size() -> None:
    windows = _run()
    video = _video(windows)
    assert video.shape == (15, 16, 32, 3)
    assert video.dtype == torch.float32
    assert 0 <= video.min() < video.max() <= 1
    assert windows[0].latents.shape == (16, 3, 2, 4)
    # frames that the window before gave out are not given again: windows go on where the last one ended
    assert [len(w.frames) for w in windows] == [9, 4, 2]


def test_one_window_is_enough_and_may_be_longer_than_the_recording() -> None:
    (only,) = _run(conditioning=_conditioning(4))
    assert len(only.frames) == 4
    (only,) = _run(conditioning=_conditioning(9))
    assert len(only.frames) == 9


def test_total_frames_cuts_the_video() -> None:
    assert len(_video(_run(replace(CONFIG, total_frames=11)))) == 11


def test_a_seed_means_one_video() -> None:
    state = torch.get_rng_state()
    first, again, other = _run(), _run(), _run(replace(CONFIG, seed=8))
    assert torch.equal(_video(first), _video(again))
    assert not torch.equal(_video(first), _video(other))
    assert torch.equal(torch.get_rng_state(), state)  # only its own generator


def test_frames_come_out_while_later_windows_are_not_begun() -> None:
    model = FakeModel()
    windows = _generate(model, FakeVae(), FakeClip(), _conditioning(), CONFIG)
    next(windows)
    assert len(model.calls) == 9  # three passes, three steps
    assert torch.is_grad_enabled()


def test_sizes_are_rounded_to_what_the_model_takes(caplog) -> None:
    caplog.set_level(logging.INFO)
    assert _video(_run(replace(CONFIG, width=30, height=17))).shape[1:3] == (16, 32)
    assert "steps of 16 pixels" in caplog.text
    assert _video(_run(replace(CONFIG, width=None, height=None, area=48 * 32))).shape[1:3] == (32, 48)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "I;16", "CMYK", "1"])
def test_images_of_any_mode(mode) -> None:
    image = _image().convert("L").convert("I;16") if mode == "I;16" else _image().convert(mode)
    assert len(_video(_run(conditioning=_conditioning(5, source=[image])))) == 5


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_images_of_one_pixel(size) -> None:
    assert len(_video(_run(conditioning=_conditioning(5, source=[_image(size)])))) == 5


def test_frames_take_on_the_colors_of_the_image_before_they_are_carried_over() -> None:
    flat = Image.new("RGB", (48, 32), (204, 102, 51))
    vae = FakeVae()
    video = _video(_run(replace(CONFIG, color_correction=1.0), _conditioning(source=[flat]), vae=vae))
    assert torch.allclose(video, torch.tensor([0.8, 0.4, 0.2]).expand_as(video), atol=1e-3)
    carried = vae.encoded[1][0]  # [3, 5, 16, 32] in [-1, 1]
    assert torch.allclose(carried, torch.tensor([0.6, -0.2, -0.6])[:, None, None, None].expand_as(carried), atol=2e-3)
    half = _video(_run(replace(CONFIG, color_correction=0.5), _conditioning(9, source=[flat])))
    plain = _video(_run(CONFIG, _conditioning(9, source=[flat])))
    assert torch.allclose(half, 0.5 * plain + 0.5 * video[:9], atol=1e-3)


@pytest.mark.parametrize("method", COLOR_METHODS)
def test_colors_are_matched_by_the_method_that_is_asked_for(method, monkeypatch) -> None:
    asked: list[str] = []

    def noted(frames, reference, strength, method):
        asked.append(method)
        return frames

    monkeypatch.setattr(long_video, "match_colors", noted)
    _run(replace(CONFIG, color_correction=1.0, color_method=method))
    assert asked == [method] * 3


# --- what the model is given


def test_the_image_conditions_every_window() -> None:
    model, vae, clip = FakeModel(), FakeVae(), FakeClip()
    _run(model=model, vae=vae, clip=clip)
    ys = torch.stack([call["y"] for call in model.calls])
    assert torch.equal(ys, ys[:1].expand_as(ys))
    assert ys[0, 0, :4, 0].eq(1).all()
    assert ys[0, 0, :4, 1:].eq(0).all()
    assert len(clip.seen) == 1  # once for all windows
    assert [v.shape[2] for v in vae.encoded] == [9, 5, 5]  # the condition once, then the carried frames
    assert vae.encoded[0][:, :, 1:].eq(0).all()


def test_scales_masks_and_modes_reach_the_model() -> None:
    model = FakeModel()
    config = replace(CONFIG, audio_scale=1.7, attention_policy=lambda step, steps: f"mode{step}of{steps}")
    _run(config, model=model)
    assert {call["audio_scale"] for call in model.calls} == {1.7}
    assert [call["mode"] for call in model.calls[:9:3]] == ["mode0of3", "mode1of3", "mode2of3"]
    assert model.calls[0]["masks"].shape == (3, 2, 4)
    assert model.calls[0]["clip"].shape == (1, 257, 8)


@pytest.mark.parametrize("speakers", [2, 3, 4])
def test_several_speakers(speakers) -> None:
    config = replace(CONFIG, width=128, height=64)
    model = FakeModel()
    _run(config, _conditioning(speakers=speakers), model=model)
    assert model.calls[0]["audio"].shape == (speakers, 9, 5, LAYERS, HIDDEN)
    masks = model.calls[0]["masks"]
    assert masks.shape == (speakers + 1, 8, 16)
    assert masks.sum(0).eq(1).all()
    # the pass without speech is that of one silent speaker
    assert model.calls[2]["audio"].shape[0] == 1
    assert model.calls[2]["audio"].eq(0).all()


def test_a_speaker_with_a_mask_is_routed_as_two_of_whom_one_is_silent() -> None:
    config, mask = replace(CONFIG, width=128, height=64), torch.zeros(32, 48)
    mask[:, :16] = 1
    given = _conditioning()
    silent = torch.zeros_like(given.audio[0])

    def calls(conditioning: Conditioning, masks: list[torch.Tensor]) -> list[dict[str, Any]]:
        model = FakeModel()
        plan = plan_video(config, (48, 32), [len(rows) for rows in conditioning.audio], masks)
        list(generate(model, FakeVae(), FakeClip(), conditioning, plan))
        return model.calls

    alone = calls(given, [mask])
    pair = calls(replace(given, audio=[given.audio[0], silent]), [mask, 1 - mask])
    assert len(alone) == len(pair) > 0
    for one, two in zip(alone, pair, strict=True):
        assert torch.equal(one["audio"], two["audio"])
        assert torch.equal(one["masks"], two["masks"])
        assert torch.equal(one["x"], two["x"])
    assert alone[0]["audio"].shape[0] == 2
    assert calls(given, [torch.ones(32, 48)])[0]["audio"].shape[0] == 1


@pytest.mark.parametrize("pieces", [1, 2, 3, 5])
def test_each_window_takes_its_piece_of_the_prompt(pieces: int, caplog: pytest.LogCaptureFixture) -> None:
    """Four windows; the last piece stays, the negative prompt is one for all."""
    context = [torch.full((4, 8), float(number)) for number in range(pieces)]
    model, given = FakeModel(), _conditioning(rows=21, context=context)
    _run(replace(CONFIG, steps=1), given, model=model)
    prompts = [float(call["context"][0, 0]) for call in model.calls if not torch.equal(call["context"], given.negative)]
    assert len(model.calls) == 12
    assert sorted(set(prompts)) == [float(number) for number in range(min(pieces, 4))]
    assert prompts == [float(min(window, pieces - 1)) for window in range(4)]
    assert ("5 pieces, the video 4 windows" in caplog.text) == (pieces == 5)


def test_the_longest_of_several_recordings_counts() -> None:
    given_audio = _conditioning(speakers=2)
    short = [given_audio.audio[0], given_audio.audio[1][:4]]
    model = FakeModel()
    windows = _run(replace(CONFIG, width=64), replace(given_audio, audio=short), model=model)
    assert len(_video(windows)) == 15
    assert torch.equal(model.calls[-3]["audio"][1, -1, -1], short[1][-1])  # holds its last row


def test_guidance_schedules_choose_the_passes_of_each_step() -> None:
    model = FakeModel()
    config = replace(CONFIG, cfg=[5.0, 1.0, 1.0], audio_cfg=[4.0, 4.0, 1.0])
    _run(config, _conditioning(9), model=model)
    times = [float(call["t"]) for call in model.calls]
    assert [times.count(t) for t in sorted(set(times), reverse=True)] == [3, 2, 1]


def test_momentum_and_limit_of_the_projection_reach_the_steps() -> None:
    def latents(**changes: Any) -> list[torch.Tensor]:
        """At the beginning of each step."""
        model = FakeModel()
        config = replace(CONFIG, use_apg=True, **{"apg_norm_threshold": 1e9, **changes})
        _run(config, _conditioning(9), model=model)
        return [call["x"] for call in model.calls[::3]]

    usual, without, limited = latents(), latents(apg_momentum=0.0), latents(apg_norm_threshold=0.01)
    assert torch.equal(usual[1], without[1])  # nothing is remembered in the first step
    assert not torch.allclose(usual[2], without[2], atol=1e-3)
    assert not torch.allclose(usual[1], limited[1], atol=1e-3)


@pytest.mark.parametrize("scheduler", ["unipc", "dpm++_sde", "lcm", "res_multistep"])
def test_other_schedulers(scheduler) -> None:
    config = replace(CONFIG, scheduler=scheduler, steps=4, shift=5.0)
    assert torch.equal(_video(_run(config)), _video(_run(config)))
    assert torch.isfinite(_video(_run(config))).all()


def test_multitalk_goes_on_from_the_carried_frames() -> None:
    model, vae, clip = FakeModel(), FakeVae(), FakeClip()
    config = replace(CONFIG, mode="multitalk", cfg=1.0, audio_cfg=1.0)
    windows = _run(config, model=model, vae=vae, clip=clip)
    first, second = model.calls[0], model.calls[3]
    assert first["y"][0, :4, 0].eq(1).all()
    assert first["y"][0, :4, 1:].eq(0).all()
    # the first window stands on noise alone
    rng = torch.Generator().manual_seed(config.seed)
    noise = torch.randn(16, 3, 2, 4, generator=rng)
    assert torch.equal(first["x"], noise)
    # later ones on the last five frames, as two latent frames that are noised to each step's sigma
    carried = vae.encoded[1]
    assert carried.shape[2] == 9
    assert torch.allclose(carried[0, :, :5].permute(1, 2, 3, 0) / 2 + 0.5, windows[0].frames[-5:], atol=1e-6)
    assert carried[0, :, 5:].eq(0).all()
    assert second["y"][0, :4, :2].eq(1).all()
    assert second["y"][0, :4, 2:].eq(0).all()
    motion = vae.encode(carried)[0, :, :2]
    sigmas = make_scheduler("multitalk", 3, config.shift).sigmas
    noise = torch.randn(16, 3, 2, 4, generator=rng)
    for step in range(3):
        draw = torch.randn(16, 2, 2, 4, generator=rng)
        expected = (1 - sigmas[step]) * motion + sigmas[step] * draw
        assert torch.allclose(model.calls[3 + step]["x"][:, :2], expected, atol=1e-6)
    assert torch.equal(second["x"][:, 2:], noise[:, 2:])
    assert torch.allclose(windows[1].latents[:, :2], motion, atol=1e-6)
    assert len(clip.seen) == len(windows)
    assert torch.equal(clip.seen[1][0], carried[0, :, 4])


# --- video to video


def _source_video(count: int) -> list[np.ndarray]:
    return [np.full((32, 48, 3), 10 * index, np.uint8) for index in range(count)]


def test_a_source_video_gives_the_frame_where_each_window_starts() -> None:
    clip = FakeClip()
    _run(conditioning=_conditioning(source=_source_video(20)), clip=clip)
    assert [round(float((image.mean() + 1) * 127.5) / 10) for image in clip.seen] == [0, 4, 8]


def test_a_short_source_video_goes_on_with_its_last_frame() -> None:
    clip = FakeClip()
    _run(conditioning=_conditioning(source=_source_video(6)), clip=clip)
    assert [round(float((image.mean() + 1) * 127.5) / 10) for image in clip.seen] == [0, 4, 5]


def test_a_later_start_begins_with_the_source_video() -> None:
    model, vae = FakeModel(), FakeVae()
    config = replace(CONFIG, start_step=1, cfg=1.0, audio_cfg=1.0)
    _run(config, _conditioning(9, source=_source_video(20)), model=model, vae=vae)
    assert len(model.calls) == 2
    source = vae.encoded[0]
    levels = ((source[0].mean((0, 2, 3)) + 1) * 12.75).round()
    assert levels.tolist() == list(range(9))
    scheduler = make_scheduler("multitalk", 3, config.shift)
    noise = torch.randn(16, 3, 2, 4, generator=torch.Generator().manual_seed(config.seed))
    expected = scheduler.add_noise(FakeVae().encode(source)[0], noise, 1)
    assert torch.allclose(model.calls[0]["x"][:, 1:], expected[:, 1:], atol=1e-6)
    assert float(model.calls[0]["t"]) == float(scheduler.timesteps[1])


def test_a_source_video_is_read_from_its_file(tmp_path) -> None:
    path = tmp_path / "source.mp4"
    with VideoWriter(path, crf=0) as writer:
        writer.append(torch.from_numpy(np.stack(_source_video(20))))
    clip = FakeClip()
    _run(replace(CONFIG, start_step=1), _conditioning(source=VideoFrames(path)), clip=clip)
    assert [round(float((image.mean() + 1) * 127.5) / 10) for image in clip.seen] == [0, 4, 8]


# --- callbacks


def test_progress_preview_and_stages() -> None:
    steps: list[tuple[int, ...]] = []
    previews: list[tuple[int, ...]] = []
    stages: list[str] = []

    @contextlib.contextmanager
    def stage(name):
        stages.append(name)
        yield

    callbacks = Callbacks(
        progress=lambda *place: steps.append(place),
        preview=lambda latents, window, step: previews.append((*latents.shape, window, step)),
        stage=stage,
    )
    _run(callbacks=callbacks)
    assert steps == [(window, 3, step, 3) for window in range(3) for step in (1, 2, 3)]
    assert previews == [(16, 3, 2, 4, window, step) for window in range(3) for step in range(3)]
    assert stages == ["vae", "clip", "model", "vae", "vae", "model", "vae", "vae", "model", "vae"]


def test_an_interrupt_keeps_what_is_finished() -> None:
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise KeyboardInterrupt

    windows = _generate(
        FakeModel(), FakeVae(), FakeClip(), _conditioning(), CONFIG, callbacks=Callbacks(check_interrupt=check)
    )
    assert len(next(windows).frames) == 9
    with pytest.raises(KeyboardInterrupt):
        next(windows)


# --- no black frames


@pytest.mark.parametrize("broken_from", [0, 1, 2])
def test_non_finite_values_start_the_window_over_in_the_safer_mode(caplog, broken_from) -> None:
    safe = _video(_run(replace(CONFIG, attention_policy="sageattn_3_fp8")))
    model = FakeModel(broken={"sageattn_3_fp4": 9 * broken_from})  # three steps of three passes in each window
    windows = _run(replace(CONFIG, attention_policy="sageattn_3_fp4"), model=model)
    assert torch.equal(_video(windows), safe)
    assert f"In window {broken_from + 1}, step 1 of 3" in caplog.text
    assert "attention mode sageattn_3_fp4, first in block 1" in caplog.text
    assert "starts over with sageattn_3_fp8" in caplog.text
    modes = [call["mode"] for call in model.calls]
    first_safe = modes.index("sageattn_3_fp8")
    assert set(modes[first_safe:]) == {"sageattn_3_fp8"}  # and stays there
    assert modes[:first_safe].count("sageattn_3_fp4") >= 9 * broken_from + 3


def test_a_fallback_that_fails_too_is_followed_by_the_next(caplog) -> None:
    """Each mode but the last gives NaN: FP4 in its second step only, FP8 and sdpa at once."""

    def policy(step: int, steps: int) -> str:
        return "sageattn_3_fp4" if step == 1 else "eager"

    broken = {"sageattn_3_fp4": 0, "sageattn_3_fp8": 0, "sdpa": 0}
    windows = _run(replace(CONFIG, attention_policy=policy), model=FakeModel(broken=broken))
    assert torch.equal(_video(windows), _video(_run(replace(CONFIG, attention_policy="eager"))))
    starts = ["sageattn_3_fp4, first in block 1. The window starts over with sageattn_3_fp8",
              "sageattn_3_fp8, first in block 1. The window starts over with sdpa",
              "sdpa, first in block 1. The window starts over with eager"]  # fmt: skip
    assert [r.getMessage().split("attention mode ")[1].rstrip(".") for r in caplog.records] == starts
    assert all("In window 1, step 2 of 3" in r.getMessage() for r in caplog.records)


def test_a_fallback_that_this_machine_lacks_is_left_out(caplog, monkeypatch) -> None:
    monkeypatch.setattr(nonfinite, "mode_supported", lambda mode, device: mode != "sageattn_3_fp8")
    config = replace(CONFIG, attention_policy="sageattn_3_fp4")
    windows = _run(config, model=FakeModel(broken={"sageattn_3_fp4": 0}))
    assert torch.equal(_video(windows), _video(_run(replace(CONFIG, attention_policy="sdpa"))))
    assert "starts over with sdpa" in caplog.text


def test_one_check_a_step(monkeypatch) -> None:
    checks = []
    finite = torch.isfinite
    monkeypatch.setattr(torch, "isfinite", lambda x: checks.append(tuple(x.shape)) or finite(x))
    _run()
    steps = [shape for shape in checks if shape == (16, 3, 2, 4)]
    frames = [shape for shape in checks if shape == (3, 9, 16, 32)]
    assert (len(steps), len(frames)) == (9, 3)


def test_without_a_safer_mode_there_is_one_sentence() -> None:
    model = FakeModel(broken={"sdpa": 9, "eager": 0})
    windows = _generate(model, FakeVae(), FakeClip(), _conditioning(), replace(CONFIG, attention_policy="sdpa"))
    assert len(next(windows).frames) == 9  # what was finished stays
    with pytest.raises(InfiniteTalkError, match=r"window 2, step 1 of 3.*eager.*block 1.*no safer mode left"):
        next(windows)


class Poison:
    """A forward hook that makes the block's output NaN when its mode of self-attention is named, `times` calls long."""

    def __init__(self, **times: int) -> None:
        self.left = times

    def __call__(self, module, args, output):
        _, _, modes = args
        left = self.left.get(modes.self_attention, 0)
        self.left[modes.self_attention] = left - 1
        return output * torch.nan if left in (1, 2) else output  # the step, and the search for the block after it


def _real_model() -> WanModel:
    torch.manual_seed(0)
    return WanModel(
        model_type="i2v", text_len=8, in_dim=36, dim=32, ffn_dim=32, freq_dim=16, text_dim=8, out_dim=16, num_heads=2,
        num_layers=3, audio_window=5, intermediate_dim=8, output_dim=8, context_tokens=4, vae_scale=4, blocks=LAYERS,
        channels=HIDDEN, clip_dim=8,
    ).eval()  # fmt: skip


ONE_PASS = replace(CONFIG, cfg=1.0, audio_cfg=1.0)


@pytest.mark.parametrize(
    ("policy", "chosen", "failing", "safe"),
    [
        ("uniform", "sageattn_3_fp4", {"sageattn_3_fp4": 3}, "sageattn_3_fp8"),
        ("default", "sageattn_3_fp4", {"sageattn_3_fp4": 2}, "sageattn_3_fp8"),
        ("ends_16bit", "sageattn_3_fp4", {"sageattn_3_fp4": 2}, "sageattn_3_fp8"),
        # In FP8 at the first step of an FP4 run: that step would fail again in FP8, so FP4 goes to sdpa as well.
        ("default", "sageattn_3_fp4", {"sageattn_3_fp8": 2}, "sdpa"),
        ("uniform", "sageattn_3_fp8", {"sageattn_3_fp8": 3}, "sdpa"),
        ("uniform", "sageattn_3_fp4", {"sageattn_3_fp4": 3, "sageattn_3_fp8": 2}, "sdpa"),
        ("uniform", "sdpa", {"sdpa": 3}, "eager"),
        ("uniform", "sage3_fp4", {"sageattn_3_fp4": 2, "sageattn_3_fp8": 2, "sdpa": 2}, "eager"),
    ],
)
def test_nan_in_one_block_of_one_step_gives_the_video_of_the_safe_mode(policy, chosen, failing, safe) -> None:
    model = _real_model()
    expected = _video(_run(replace(ONE_PASS, attention_policy=bind(policy, safe, 3)), model=model))
    poison = Poison(**failing)
    handle = model.blocks[1].register_forward_hook(poison)
    got = _video(_run(replace(ONE_PASS, attention_policy=bind(policy, chosen, 3)), model=model))
    handle.remove()
    assert torch.equal(got, expected)
    assert all(poison.left[mode] <= 0 for mode in failing)  # each of them did fail


def test_the_log_names_window_step_block_and_kernel(caplog) -> None:
    model = _real_model()
    model.blocks[1].register_forward_hook(Poison(sageattn_3_fp8=3))
    _run(replace(ONE_PASS, attention_policy=bind("uniform", "sageattn_3_fp8", 3)), model=model)
    assert (
        "In window 1, step 2 of 3: the model gave non-finite values with attention mode sageattn_3_fp8, first in "
        "block 1 (attention by emulated_fp8, sdpa). The window starts over with sdpa." in caplog.text
    )


def test_nan_in_every_mode_is_one_sentence_after_the_last_fallback(caplog) -> None:
    model = _real_model()
    model.blocks[1].register_forward_hook(lambda module, args, output: output * torch.nan)
    with pytest.raises(InfiniteTalkError, match=r"step 1 of 3.*mode eager, first in block 1.*no safer mode left"):
        _run(replace(ONE_PASS, attention_policy=bind("default", "sageattn_3_fp4", 3)), model=model)
    assert [r.getMessage().split("over with ")[1] for r in caplog.records if "over with" in r.getMessage()] == [
        "sdpa.",  # the first step of an FP4 run is FP8
        "eager.",
    ]


def test_a_mode_that_the_model_was_made_with_has_fallbacks_too(caplog) -> None:
    model = _real_model()
    model.attention_mode = "sageattn_3_fp8"
    model.blocks[1].register_forward_hook(Poison(sageattn_3_fp8=2))
    got = _video(_run(ONE_PASS, model=model))
    assert "mode sageattn_3_fp8, first in block 1" in caplog.text
    model.attention_mode = "sdpa"
    assert torch.equal(got, _video(_run(ONE_PASS, model=model)))


def test_non_finite_frames_of_the_vae_are_an_error() -> None:
    with pytest.raises(InfiniteTalkError, match="Decoding gave non-finite frames in window 1"):
        _run(vae=FakeVae(decoded_as=float("nan")))


# --- rejections


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(mode="other"), "infinitetalk, multitalk"),
        (dict(frames=80), "4n \\+ 1"),
        (dict(motion_frames=9), "leave no room"),
        (dict(start_step=3), "leaves none of 3 steps"),
        (dict(color_method="lut"), "There is no color method 'lut': choose one of reinhard, mkl"),
        (dict(color_correction=2.0), "color_correction 2.0 cannot be used: give a number from 0 to 1"),
        (dict(guidance="other"), "additive, nested"),
        (dict(scheduler="other"), "There is no scheduler"),
        (dict(cfg=[]), "cfg schedule is empty"),
        (dict(total_frames=0), "shorter than one"),
        (dict(width=0), "width 0 cannot be used"),
    ],
)
def test_settings_are_rejected_before_anything_runs(changes, message) -> None:
    with pytest.raises(InputError, match=message):
        _generate(FakeModel(), FakeVae(), FakeClip(), _conditioning(), replace(CONFIG, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(audio=[]), "one to 4"),
        (dict(audio=[torch.zeros(5, 2, 3)] * 5), "one to 4"),
        (dict(audio=[torch.zeros(5, 2, 3), torch.zeros(0, 2, 3)]), "do not fit"),
        (dict(audio=[torch.zeros(5, 2, 3), torch.zeros(5, 2, 4)]), "alike for all"),
        (dict(audio=[torch.full((5, 2, 3), torch.nan)]), "speech features embedding holds NaN"),
        (dict(context=[torch.full((4, 8), torch.inf)]), "prompt embedding holds NaN"),
        (dict(context=torch.zeros(4, 8)), "put one into a list"),
        (dict(context=[]), "put one into a list"),
        (dict(source=[]), "no frame"),
    ],
)
def test_inputs_are_rejected_before_anything_runs(changes, message) -> None:
    with pytest.raises(InputError, match=message):
        _generate(FakeModel(), FakeVae(), FakeClip(), _conditioning(**changes), replace(CONFIG, width=64))
