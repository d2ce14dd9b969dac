"""FlashTalk from image, recording and noise to frames: golden items `flashtalk_*`.

Limits: those of the items. Timesteps 1e-4, colors 5e-5, features of speech rel 2e-5, condition channels rel 2e-5;
latents rel 5e-6 with the analytic model, through the networks rel 2e-5 in the first window, 1e-4 in the second. Random
numbers bit for bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.analytic import AnalyticModel, LinearVae
from support.goldens import Golden, relative_error
from wanvideo_infinitetalk.media.color import FLASHTALK, match_colors, rgb_to_lab
from wanvideo_infinitetalk.multitalk.wav2vec import Wav2Vec2Features
from wanvideo_infinitetalk.pipeline.conditioning import Conditioning, WindowConditioner, WindowSpeech
from wanvideo_infinitetalk.pipeline.flashtalk import SpeechRing, SpeechRows
from wanvideo_infinitetalk.pipeline.long_video import Callbacks, FinishedWindow, generate
from wanvideo_infinitetalk.pipeline.plan import GenerateConfig, Plan, plan_video
from wanvideo_infinitetalk.pipeline.presets import FLASHTALK_14B
from wanvideo_infinitetalk.pipeline.schedulers import make_scheduler
from wanvideo_infinitetalk.wanvideo.encoders.vae import WanVAE
from wanvideo_infinitetalk.wanvideo.modules.model import AudioConfig, WanConfig, WanModel


def largest(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max())


def test_timesteps(golden) -> None:
    item = golden("flashtalk_schedule")
    assert item.config["combos"]
    for steps, shift in item.config["combos"]:
        expected = item.outputs[f"timesteps.steps{steps}_shift{shift:g}"].float()
        scheduler = make_scheduler("flashtalk", steps, shift)
        assert largest(scheduler.timesteps, expected[:-1]) <= 1e-4
        assert largest(scheduler.sigmas * 1000, expected) <= 1e-4


def test_colors(golden) -> None:
    item = golden("flashtalk_color")
    source, reference = item.inputs["source"][0], item.inputs["reference"][0, :, 0]
    lab = rgb_to_lab((source + 1).transpose(0, 1) / 2, FLASHTALK)
    assert largest(lab.permute(0, 2, 3, 1), item.outputs["lab"][0]) <= 2e-4
    for strength in item.config["strengths"]:
        blend = match_colors(source, reference, strength, "flashtalk")
        assert largest(blend, item.outputs[f"blend_{strength:g}"][0]) <= 5e-5
    off = as_bytes(match_colors(source, reference, 1.0, "flashtalk")) != item.outputs["frames_u8"]
    assert float(off.float().mean()) <= 1e-3
    flat = match_colors(torch.full((3, 1, 4, 4), 0.3), reference, 1.0, "flashtalk")
    assert largest(flat, flat[:, :, :1, :1].expand_as(flat)) == 0


def as_bytes(frames: torch.Tensor) -> torch.Tensor:
    """[3, F, H, W] in [-1, 1] -> [F, H, W, 3] truncated to 8 bits, as the release writes them."""
    return ((frames + 1) / 2).clamp(0, 1).mul(255).to(torch.uint8).permute(1, 2, 3, 0)


# --- the loop ----------------------------------------------------------------------------------------------------


class Chunks:
    """Features of each window as they were recorded."""

    def __init__(self, chunks: torch.Tensor) -> None:
        self.chunks = chunks
        self.shape = (int(chunks.shape[-2]), int(chunks.shape[-1]))

    def __call__(self, window: Any) -> torch.Tensor:
        return self.chunks[window.index]


def configured(item: Golden, settings: dict[str, Any]) -> GenerateConfig:
    height, width = settings.get("hw", item.config["hw"])
    changes = {
        "width": width,
        "height": height,
        "frames": settings.get("frame_num", item.config["frame_num"]),
        "motion_frames": settings.get("motion_frames", item.config["motion_frames"]),
        "steps": settings["steps"],
        "shift": settings["shift"],
        "color_correction": settings["color"],
        "seed": settings.get("rng", item.config["rng"]),
    }
    return GenerateConfig(mode="flashtalk", **FLASHTALK_14B | changes)


def planned(item: Golden, config: GenerateConfig, windows: int) -> tuple[Plan, list[Any]]:
    image = item.inputs["image_u8"].numpy()
    frames = windows * (config.frames - config.motion_frames)
    return plan_video(config, image.shape[1::-1], [frames]), [image]


def analytic(item: Golden, case: str) -> tuple[AnalyticModel, list[FinishedWindow]]:
    settings = dict(item.config[case])
    if case == "short":  # its lengths are in words, and in the shapes
        frames = 4 * (item.outputs["short.latent_final"].shape[2] - 1) + 1
        made = item.outputs["short.video_frame_means"].shape[1] // settings["chunks"]
        settings |= {"frame_num": frames, "motion_frames": frames - made}
    config = configured(item, settings)
    audio = item.inputs["audio"][:, :, : config.frames]
    plan, source = planned(item, config, settings["chunks"])
    context = item.inputs["context"]
    model, vae = AnalyticModel(), LinearVae(item.inputs["vae_M"], item.inputs["vae_P"])
    return model, list(generate(model, vae, None, Conditioning([context], context, Chunks(audio), source), plan))


def video_of(windows: list[FinishedWindow]) -> torch.Tensor:
    return torch.cat([window.frames for window in windows]).permute(3, 0, 1, 2) * 2 - 1


def test_every_step_with_an_analytic_model(golden) -> None:
    item = golden("flashtalk_loop_linear")
    cases = [name for name, value in item.config.items() if isinstance(value, dict)]
    assert "main" in cases
    for case in cases:
        model, windows = analytic(item, case)
        latents = torch.stack([window.latents for window in windows])
        assert relative_error(latents, item.outputs[f"{case}.latent_final"]) <= 5e-6, case
        video = video_of(windows)
        if case != "main":
            assert largest(video.mean((2, 3)), item.outputs[f"{case}.video_frame_means"]) <= 1e-4, case
            assert largest(video[:, -1], item.outputs[f"{case}.video_last_frame"]) <= 1e-4, case
            continue
        assert largest(video, item.outputs["main.video"]) <= 1e-4
        given = torch.stack([call["x"] for call in model.calls])
        expected = item.outputs["main.model_x"]
        assert relative_error(given.unflatten(0, expected.shape[:2]), expected) <= 5e-6
        assert all(largest(call["y"], item.outputs["main.y"]) <= 1e-6 for call in model.calls)


def test_random_numbers_are_drawn_in_the_order_of_the_release(golden) -> None:
    item = golden("flashtalk_loop_linear")
    generator = torch.Generator().manual_seed(item.config["rng"])
    draws = item.outputs["main.randn"]  # [windows, 1 + steps, 16, T, h, w]
    assert all(torch.equal(torch.randn(one.shape, generator=generator), one) for one in draws.flatten(0, 1))
    model, _ = analytic(item, "main")
    motion = 1
    for start, call in zip(draws[:, 0], model.calls[:: item.config["main"]["steps"]], strict=True):
        assert torch.equal(call["x"][:, motion:], start[:, motion:])
        motion = (item.config["motion_frames"] - 1) // 4 + 1


# --- the whole chain, on tiny networks --------------------------------------------------------------------------


def weights_of(item: Golden, part: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{part}."): value for name, value in item.weights.items() if name.startswith(f"{part}.")}


class Networks:
    def __init__(self, item: Golden) -> None:
        named = dict(item.config["dit"])
        audio = named.pop("audio_proj")
        for name in ("audio_window", "intermediate_dim", "output_dim", "context_tokens", "vae_scale"):
            audio[name] = named.pop(name)
        audio["norm_output_audio"] = named.pop("norm_output_audio")
        config = WanConfig.from_public(named | {"audio": AudioConfig(**audio), "clip_dim": 1280})
        dit = weights_of(item, "dit")
        dit["img_emb.proj.1.weight"] = dit["img_emb.proj.1.weight"].float() / 8
        self.model = WanModel(config).requires_grad_(False).eval()
        self.model.load_state_dict(dit)
        self.vae = WanVAE.from_state_dict(weights_of(item, "vae"))
        fields = {name: item.config["wav2vec2"][name] for name in ("num_attention_heads", "conv_stride")}
        self.encoder = Wav2Vec2Features.from_state_dict(
            weights_of(item, "wav2vec2"), fields, do_normalize=item.config["do_normalize"]
        )
        self.clip = item.inputs["clip_rows"].repeat(17, 1)[None, :257]

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        return self.clip

    def conditioned(self, item: Golden, speech: WindowSpeech, windows: int) -> tuple[Plan, Conditioning]:
        plan, source = planned(item, configured(item, item.config), windows)
        context = item.inputs["context"]
        return plan, Conditioning([context], context, speech, source)


@pytest.fixture(scope="module")
def chain(request: pytest.FixtureRequest):
    from conftest import load_golden

    folder = request.config.getoption("--goldens")
    if not (folder / "flashtalk_loop.safetensors").is_file():
        pytest.skip(f"{folder} holds no golden 'flashtalk_loop'")
    item = load_golden(folder, "flashtalk_loop").float()
    return item, Networks(item)


def test_speech_as_it_streams(chain) -> None:
    item, networks = chain
    wave = (item.inputs["wav_i16"].float() / 32768).numpy()
    chunks = item.outputs["stream.audio_chunks"]
    plan, _ = networks.conditioned(item, SpeechRing(networks.encoder), len(chunks))
    ring = SpeechRing(networks.encoder, wave)
    for window, expected in zip(plan.windows, chunks, strict=True):
        assert relative_error(ring(window)[0], expected) <= 2e-5


def test_conditions(chain) -> None:
    item, networks = chain
    plan, given = networks.conditioned(item, Chunks(item.outputs["stream.audio_chunks"][:, None]), 2)
    conditioner = WindowConditioner(networks.vae, networks, given, plan, Callbacks().stage)
    first = conditioner(plan.windows[0], None)
    assert largest(conditioner.reference, item.outputs["stream.cond_image"][0, :, 0]) <= 1e-6
    assert relative_error(first.inputs.y, item.outputs["stream.y"]) <= 2e-5
    assert relative_error(first.motion.latents, item.outputs["stream.motion_first"]) <= 2e-5
    later = conditioner(plan.windows[1], item.outputs["stream.motion_pixels_chunk0"])
    assert later.inputs.y is first.inputs.y
    assert relative_error(later.motion.latents, item.outputs["stream.motion_later"][0]) <= 2e-5


def test_decoding(chain) -> None:
    item, networks = chain
    decoded = networks.vae.decode(item.outputs["stream.latent_final"][:1])[0].clamp(-1, 1)
    assert relative_error(decoded[:, :13], item.outputs["stream.decoded_chunk0_first13"]) <= 1e-4


@pytest.mark.parametrize("encoding", ["stream", "once"])
def test_from_recording_and_noise_to_frames(chain, encoding: str) -> None:
    item, networks = chain
    wave = (item.inputs["wav_i16"].float() / 32768).numpy()
    expected = item.outputs[f"{encoding}.latent_final"]
    if encoding == "stream":
        speech: WindowSpeech = SpeechRing(networks.encoder, wave)
    else:  # rows of the release are those of its own frames, which begin with those given out by no window
        speech = SpeechRows(item.outputs["once.audio_all"][0, :, 2], item.config["motion_frames"])
    plan, given = networks.conditioned(item, speech, len(expected))
    windows = list(generate(networks.model, networks.vae, networks, given, plan))
    for window, latents, limit in zip(windows, expected, (2e-5, 1e-4), strict=True):
        assert relative_error(window.latents, latents) <= limit, window.index
    if encoding == "stream":
        off = as_bytes(video_of(windows)).int() - item.outputs["stream.frames_u8"].int()
        assert int(off.abs().max()) <= 1
        assert float((off != 0).float().mean()) <= 2e-3
