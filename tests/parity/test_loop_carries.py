"""The loop carries a model that is not run yet: FlashTalk is rows of its tables, given here by the tests.

FlashTalk has fresh noise after every step, motion latents that draw nothing, and an overlap cut from every window.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from support.analytic import AnalyticModel, LinearVae
from support.goldens import Golden, relative_error
from wanvideo_infinitetalk.pipeline.conditioning import Conditioning, WindowConditioner, WindowInputs
from wanvideo_infinitetalk.pipeline.long_video import Callbacks, generate_windows
from wanvideo_infinitetalk.pipeline.nonfinite import FallbackModes
from wanvideo_infinitetalk.pipeline.plan import GenerateConfig, Mode, Plan, plan_schedule, plan_video
from wanvideo_infinitetalk.pipeline.sampling import Overwrite, denoise
from wanvideo_infinitetalk.pipeline.windows import Window

STEP_TOLERANCE = 5e-6
"""Where the same numbers go through the same formulas."""
# --- FlashTalk ---------------------------------------------------------------------------------------------------

FLASHTALK = Mode(draws=False)
"""As InfiniteTalk, but motion latents draw nothing."""


def _flashtalk_plan(item: Golden, case: dict, prefix: str) -> Plan:
    height, width = case["hw"]
    frames, motion = case["frame_num"], case["motion_frames"]
    new, count = frames - motion, case["chunks"]
    config = GenerateConfig(
        width=width,
        height=height,
        frames=frames,
        motion_frames=motion,
        total_frames=count * new,
        scheduler="lcm",
        sigmas=[*(item.outputs[f"{prefix}.timesteps_called"] / 1000).tolist(), 0.0],
        cfg=1.0,
        audio_cfg=1.0,
        seed=case["rng"],
        color_correction=case["color"],
    )
    plan = plan_video(config, tuple(item.inputs["image_u8"].shape[1::-1]), [count * new])
    # The first frames are cut from every window, the first one too.
    windows = tuple(Window(k, k * new - motion, frames, motion, new, k == count - 1) for k in range(count))
    return replace(plan, mode=FLASHTALK, windows=windows)


class _GivenAudio(WindowConditioner):
    """The speech of each window as the golden has it."""

    windows: torch.Tensor

    def audio(self, window: Window) -> torch.Tensor:
        return self.windows[window.index, :, : window.frames]


def _flashtalk_case(item: Golden, name: str) -> dict:
    common = {key: value for key, value in item.config.items() if not isinstance(value, dict)}
    return common | item.config[name]


def _flashtalk(item: Golden, name: str):
    plan = _flashtalk_plan(item, _flashtalk_case(item, name), name)
    vae, model = LinearVae(item.inputs["vae_M"], item.inputs["vae_P"]), AnalyticModel()
    context = item.inputs["context"]
    features = item.inputs["audio"][0, 0, :, 0]
    given = Conditioning([context], context, [features], [item.inputs["image_u8"].numpy()])
    conditioner = _GivenAudio(vae, None, given, plan, Callbacks().stage)
    conditioner.windows = item.inputs["audio"]
    return model, list(generate_windows(model, vae, conditioner, plan, Callbacks(), {}))


def test_flashtalk_is_a_mode_and_a_grid(golden) -> None:
    """Without color correction, whose constants are FlashTalk's own, every number of the run."""
    item = golden("flashtalk_loop_linear")
    _, windows = _flashtalk(item, "nocolor")
    expected = item.outputs["nocolor.latent_final"]
    assert relative_error(torch.stack([window.latents for window in windows]), expected) <= STEP_TOLERANCE
    video = torch.cat([window.frames for window in windows]).permute(3, 0, 1, 2) * 2 - 1
    means = item.outputs["nocolor.video_frame_means"]
    assert float((video.mean((2, 3)) - means).abs().max()) <= 1e-4
    assert float((video[:, -1] - item.outputs["nocolor.video_last_frame"]).abs().max()) <= 1e-4


def test_flashtalk_draws_after_every_step_and_nowhere_else(golden) -> None:
    item = golden("flashtalk_loop_linear")
    model, windows = _flashtalk(item, "main")
    draws = item.outputs["main.randn"]  # [windows, 1 + steps, 16, T, h, w]
    generator = torch.Generator().manual_seed(item.config["rng"])
    assert all(torch.equal(torch.randn(d.shape, generator=generator), d) for d in draws.flatten(0, 1))
    steps = draws.shape[1] - 1
    for index, noise in enumerate(draws[:, 0]):
        front = 1 if index == 0 else 2
        assert torch.equal(model.calls[index * steps]["x"][:, front:], noise[:, front:])
    given = torch.stack([call["x"] for call in model.calls[:steps]])
    assert relative_error(given, item.outputs["main.model_x"][0]) <= STEP_TOLERANCE
    assert relative_error(windows[0].latents, item.outputs["main.latent_final"][0]) <= STEP_TOLERANCE
    ys = [call["y"] for call in model.calls]
    assert all(y is ys[0] for y in ys)  # once for the video
    assert relative_error(ys[0], item.outputs["main.y"]) <= STEP_TOLERANCE


def test_flashtalk_by_the_recorded_velocities_of_its_network(golden) -> None:
    """Two windows of the public command: what the network was given at each step, and the latents at the end."""
    item = golden("flashtalk_loop").float()
    steps = item.config["steps"]
    schedule = plan_schedule("lcm", steps, 5.0, sigmas=[1.0, 0.9375, 0.75 / 0.9, 0.625, 0.0])
    generator = torch.Generator().manual_seed(item.config["rng"])
    given: list[torch.Tensor] = []

    def network(x, t, context, clip, y, audio, masks, **options):
        given.append(x)
        return item.outputs["stream.velocity"].flatten(0, 1)[len(given) - 1][None]

    context = item.inputs["context"]
    modes = FallbackModes(network, None, {}, steps, torch.device("cpu"))
    motions = [item.outputs["stream.motion_first"], item.outputs["stream.motion_later"][0]]
    for index, motion in enumerate(motions):
        x, _ = denoise(
            network,
            schedule,
            torch.randn(16, 9, 4, 4, generator=generator),
            WindowInputs(context, context, y=item.outputs["stream.y"]),
            generator=generator,
            modes=modes,
            overwrite=Overwrite(motion),
        )
        expected = item.outputs["stream.model_x"][index]
        assert relative_error(torch.stack(given[index * steps :]), expected) <= STEP_TOLERANCE
        assert relative_error(x, item.outputs["stream.latent_final"][index]) <= STEP_TOLERANCE
