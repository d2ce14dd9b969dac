"""The loop against the public one, with an analytic model and a linear VAE: every case in the golden.

Limits: rel 2e-5 for what has been through the model, 1e-6 for what only conditions it, random numbers bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support.analytic import AnalyticModel, LinearVae
from support.goldens import Golden, relative_error
from wanvideo_infinitetalk.pipeline.conditioning import Conditioning
from wanvideo_infinitetalk.pipeline.long_video import generate
from wanvideo_infinitetalk.pipeline.plan import GenerateConfig, plan_video
from wanvideo_infinitetalk.pipeline.schedulers import make_scheduler

MODEL_TOLERANCE = 2e-5
CONDITION_TOLERANCE = 1e-6


@dataclass
class RecordingClip:
    seen: list[torch.Tensor] = field(default_factory=list)

    def encode(self, image):
        self.seen.append(image)
        return torch.zeros(1, 257, 8)


@dataclass
class Result:
    model: AnalyticModel
    clip: RecordingClip
    video: torch.Tensor  # [3, frames, H, W] in [-1, 1]
    latents: torch.Tensor  # [windows, 16, T, h, w]
    passes: int

    def calls(self, which: int) -> list[dict[str, Any]]:
        """The calls of one of the passes, one a step."""
        return self.model.calls[which :: self.passes]


def _cases(item: Golden) -> list[str]:
    return sorted(key.removesuffix(".latent_final") for key in item.outputs if key.endswith(".latent_final"))


def _run(item: Golden, case: str) -> Result:
    settings, options = item.config, item.config[case]
    model, clip = AnalyticModel(), RecordingClip()
    height, width = settings["hw"]
    config = GenerateConfig(
        width=width,
        height=height,
        frames=settings["frames"],
        motion_frames=settings["motion"],
        steps=settings["steps"],
        shift=settings["shift"],
        seed=settings["rng"],
        cfg=options["text_guide_scale"],
        audio_cfg=options["audio_guide_scale"],
        use_apg=options["use_apg"],
        apg_momentum=options["apg_momentum"],
        apg_norm_threshold=options["apg_norm_threshold"],
        color_correction=options["color_correction_strength"],
    )
    speakers = [item.inputs[f"audio_person{n + 1}"] for n in range(options["human"])]
    source = list(item.inputs["src_frames_u8"].numpy())
    conditioning = Conditioning([item.inputs["context"]], item.inputs["context_null"], speakers, source)
    vae = LinearVae(item.inputs["vae_M"], item.inputs["vae_P"])
    plan = plan_video(config, source[0].shape[1::-1], [len(features) for features in speakers])
    windows = list(generate(model, vae, clip, conditioning, plan))
    video = torch.cat([w.frames for w in windows]).permute(3, 0, 1, 2) * 2 - 1
    passes = len(model.calls) // (len(windows) * settings["steps"])
    return Result(model, clip, video, torch.stack([w.latents for w in windows]), passes)


@pytest.fixture
def runs(golden):
    """(golden, case name, our run of it) for every case that the golden holds."""
    item = golden("official_loop")
    cases = _cases(item)
    assert cases
    return item, [(case, _run(item, case)) for case in cases]


def test_latents_of_every_window(runs) -> None:
    item, results = runs
    for case, result in results:
        assert relative_error(result.latents, item.outputs[f"{case}.latent_final"]) <= MODEL_TOLERANCE, case


def test_videos(runs) -> None:
    item, results = runs
    recorded = [(case, result) for case, result in results if f"{case}.video" in item.outputs]
    assert recorded
    for case, result in recorded:
        expected = item.outputs[f"{case}.video"]
        assert result.video.shape == expected.shape, case
        assert relative_error(result.video, expected) <= MODEL_TOLERANCE, case


def test_what_the_model_is_given_at_every_step(runs) -> None:
    item, results = runs
    recorded = [(case, result) for case, result in results if f"{case}.model_x_per_step" in item.outputs]
    assert recorded
    for case, result in recorded:
        expected = item.outputs[f"{case}.model_x_per_step"]  # [windows, steps, 16, T, h, w]
        given = torch.stack([call["x"] for call in result.calls(0)]).unflatten(0, expected.shape[:2])
        assert relative_error(given, expected) <= MODEL_TOLERANCE, case
        timesteps = torch.cat([call["t"] for call in result.calls(0)])
        assert torch.equal(timesteps, item.outputs["timesteps_called"].repeat(expected.shape[0])), case


def test_the_passes_of_guidance(runs) -> None:
    item, results = runs
    for case, result in results:
        rows = item.outputs[f"{case}.audio_rows_per_call"]
        assert result.passes == len(rows), case
        assert [len(call["audio"]) for call in result.model.calls[: len(rows)]] == rows.tolist(), case
        contexts = torch.stack([call["context"].mean() for call in result.model.calls[: len(rows)]])
        assert torch.allclose(contexts, item.outputs[f"{case}.ctx_mean_per_call"], atol=1e-6), case
        expected = item.outputs[f"{case}.audio_mean_per_call"]  # [windows, steps, passes]
        given = torch.stack([call["audio"].mean() for call in result.model.calls]).reshape(expected.shape)
        assert torch.allclose(given, expected, atol=1e-6), case


def test_conditions_of_every_window(runs) -> None:
    item, results = runs
    steps = item.config["steps"]
    checked = 0
    for case, result in results:
        first_steps = result.calls(0)[::steps]  # one call a window
        if f"{case}.y" not in item.outputs:
            continue
        checked += 1
        y = torch.cat([call["y"] for call in first_steps])
        assert relative_error(y, item.outputs[f"{case}.y"]) <= CONDITION_TOLERANCE, case
        assert torch.equal(first_steps[0]["masks"], item.outputs[f"{case}.masks"]), case
        audio = torch.stack([call["audio"] for call in first_steps])
        assert torch.equal(audio, item.outputs[f"{case}.audio"]), case
        if f"{case}.clip_in" in item.outputs:
            seen = torch.stack([image[0].unsqueeze(1) for image in result.clip.seen])
            assert relative_error(seen, item.outputs[f"{case}.clip_in"]) <= CONDITION_TOLERANCE, case
    assert checked


def test_random_numbers_are_drawn_in_the_public_order(golden) -> None:
    """The recorded draws come out of one generator in the recorded order, and the windows' noise is ours."""
    item = golden("official_loop")
    for case in _cases(item):
        if f"{case}.randn_count" not in item.outputs:
            continue
        count = int(item.outputs[f"{case}.randn_count"])
        draws = [item.outputs[f"{case}.randn.{n:02d}"] for n in range(count)]
        rng = torch.Generator().manual_seed(item.config["rng"])
        assert all(torch.equal(torch.randn(d.shape, generator=rng), d) for d in draws)
        noises = [d for d in draws if d.shape == draws[0].shape]
        starts = _run(item, case).calls(0)[:: item.config["steps"]]
        motion = [1] + [(item.config["motion"] - 1) // 4 + 1] * (len(noises) - 1)
        for noise, start, front in zip(noises, starts, motion, strict=True):
            assert torch.equal(start["x"][:, front:], noise[:, front:])


def test_the_grid_is_that_of_the_scheduler_golden(golden) -> None:
    item = golden("official_loop")
    scheduler = make_scheduler("multitalk", item.config["steps"], item.config["shift"])
    assert torch.equal(scheduler.timesteps, item.outputs["timesteps_called"])
