"""The loop carries models that are not run yet: HuMo and FlashTalk are rows of its tables, given here by the tests.

HuMo has passes with condition channels, or frames of x, of their own, and weights that depend on the timestep.
FlashTalk has fresh noise after every step, motion latents that draw nothing, and an overlap cut from every window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from support.analytic import AnalyticModel, LinearVae
from support.goldens import Golden, relative_error
from wanvideo_infinitetalk.pipeline.conditioning import Conditioning, WindowConditioner, WindowInputs
from wanvideo_infinitetalk.pipeline.guidance import Formula, Pass, Term
from wanvideo_infinitetalk.pipeline.long_video import Callbacks, generate_windows
from wanvideo_infinitetalk.pipeline.nonfinite import FallbackModes
from wanvideo_infinitetalk.pipeline.plan import GenerateConfig, Mode, Plan, plan_schedule, plan_video
from wanvideo_infinitetalk.pipeline.sampling import ModelInputs, Overwrite, Schedule, denoise
from wanvideo_infinitetalk.pipeline.schedulers import make_scheduler
from wanvideo_infinitetalk.pipeline.windows import Window
from wanvideo_infinitetalk.wanvideo.modules.humo import humo_audio_window
from wanvideo_infinitetalk.wanvideo.modules.model import HuMoConfig, WanConfig, WanModel

STEP_TOLERANCE = 5e-6
"""Where the same numbers go through the same formulas."""
MODEL_TOLERANCE = 5e-5
"""Where a whole run has been through the network."""

# --- HuMo --------------------------------------------------------------------------------------------------------

FULL, NO_REFERENCES = Pass(True, True), Pass(True, True, references=False)
SILENT, SILENT_NO_REFERENCES = Pass(True, False), Pass(True, False, references=False)
NULL, NULL_NO_REFERENCES = Pass(False, False), Pass(False, False, references=False)


def without_images(text: float, audio: float) -> Formula:
    by_text = Term("text", text, SILENT_NO_REFERENCES, NULL_NO_REFERENCES)
    return Formula(NULL_NO_REFERENCES, (by_text, Term("audio", audio, NO_REFERENCES, SILENT_NO_REFERENCES)))


def humo_17b(text: float, audio: float, t: float, change: float) -> Formula:
    """At high noise the negative pass sees the references too; later it does not, and text counts for two less."""
    null, scale = (NULL, text) if t > change else (NULL_NO_REFERENCES, text - 2)
    return Formula(null, (Term("text", scale, SILENT, null), Term("audio", audio, FULL, SILENT)))


def humo_1_7b(text: float, audio: float, image: float) -> Formula:
    formula = without_images(text, audio)
    return replace(formula, terms=(*formula.terms, Term("image", image, FULL, NO_REFERENCES)))


def humo_formula(model: str, mode: str, scales: dict[str, float], t: float) -> Formula:
    text, audio = scales["scale_t"], scales["scale_a"]
    if mode == "TA":
        return without_images(text, audio)
    if model == "17B":
        return humo_17b(text, audio, t, scales["step_change"])
    return humo_1_7b(text, audio, scales["scale_i"])


def test_the_guidance_of_humo_is_rows_of_the_formula(golden) -> None:
    item = golden("humo_guidance")

    def evaluate(which: Pass) -> torch.Tensor:
        text = "text" if which.prompt else "null"
        audio, references = "audio" if which.speech else "silent", "ref" if which.references else "noref"
        return item.inputs[f"v.{text}_{audio}_{references}"]

    cases = {name: case for name, case in item.config["cases"].items() if name.startswith("official")}
    assert len(cases) > 20
    for name, case in cases.items():
        v = humo_formula(case["model"], case["mode"], case, case.get("t", 0)).velocity(evaluate)
        assert float((v - item.outputs[name]).abs().max()) <= 1e-5, name


def _humo_model(item: Golden, in_dim: int) -> Callable[..., torch.Tensor]:
    config = {name: value for name, value in item.config["model"].items() if name not in ("audio_proj", "kv_dim")}
    audio = HuMoConfig(**item.config["model"]["audio_proj"])
    model = WanModel(WanConfig.from_public(config | {"humo": audio, "in_dim": in_dim})).requires_grad_(False)
    first = item.weights["patch_embedding.weight"][:, :in_dim]
    model.load_state_dict(item.weights | {"patch_embedding.weight": first.contiguous()})

    def call(x, t, context, clip, y, audio, masks, *, audio_scale, attention_mode):
        return model(x, t, context, y=y, humo_audio=audio, attention_mode=attention_mode)

    return call


def _fitted(pixels: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """The whole image in the middle of a white one, [3, height, width] in [-1, 1]."""
    image = Image.fromarray(pixels.numpy())
    ratio = image.width / image.height
    size = (width, int(width / ratio)) if ratio > width / height else (int(height * ratio), height)
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(image.resize(size, Image.Resampling.LANCZOS), ((width - size[0]) // 2, (height - size[1]) // 2))
    return torch.from_numpy(np.array(canvas, np.float32)).permute(2, 0, 1) / 127.5 - 1


def _humo_inputs(item: Golden, case: dict) -> Callable[[Pass], ModelInputs]:
    """17B: references stand in the condition channels. 1.7B: in the last frames of x, of each pass by itself."""
    frames, references = case["latent_frames"], case["reference_latent_frames"]
    vae = LinearVae(item.inputs["vae_M"], item.inputs["vae_P"])
    images = [_fitted(item.inputs[f"picture{n}_u8"], *item.config["size"]) for n in range(case["references"])]
    zero = item.inputs["zero_vae"]
    latents = [vae.encode(image[None, :, None])[0] for image in images]
    given = torch.cat(latents, dim=1) if latents else zero.new_zeros(16, references, *zero.shape[2:])
    features, _ = humo_audio_window(item.inputs["audio_features"], item.config["frames"])
    speech = torch.cat([features, features.new_zeros(references, *features.shape[1:])])

    def inputs_of(which: Pass) -> ModelInputs:
        context = item.inputs["context" if which.prompt else "context_null"]
        audio = speech if which.speech else torch.zeros_like(speech)
        if case["model"] == "1.7B":
            own = given if which.references else torch.zeros_like(given)
            return ModelInputs(context, audio=audio, overwrite=Overwrite(own, at_end=True))
        mask = zero.new_zeros(4, frames + references, *zero.shape[2:])
        mask[:, frames:] = 1
        channels = torch.cat([zero[:, :frames], given], 1) if which.references else zero[:, : frames + references]
        return ModelInputs(context, y=torch.cat([mask, channels])[None], audio=audio)

    return inputs_of


@pytest.mark.parametrize("model", ["17B", "1_7B"])
def test_humo_from_noise_to_video(golden, model) -> None:
    item = golden("humo_loop").float()
    cases = {name: case for name, case in item.config["cases"].items() if name.startswith(f"{model}.")}
    network = _humo_model(item, 36 if model == "17B" else 16)
    assert cases
    for name, case in cases.items():
        scheduler = make_scheduler("unipc", item.config["steps"], 1.0, item.outputs[f"{name}.sigmas"].tolist())
        assert scheduler.timesteps.tolist() == case["timesteps"], name
        formulas = tuple(humo_formula(case["model"], case["mode"], case["scales"], t) for t in case["timesteps"])
        assert max(len(formula.passes) for formula in formulas) == case["model_calls_per_step"]
        noise = item.inputs[f"{name}.noise"]
        guesses: list[torch.Tensor] = []
        x, _ = denoise(
            network,
            Schedule(scheduler, formulas, 0, len(formulas)),
            noise,
            _humo_inputs(item, case),
            generator=torch.Generator(),
            modes=FallbackModes(network, "sdpa", {}, len(formulas), torch.device("cpu")),
            report=lambda step, clean, guesses=guesses: guesses.append(clean),
        )
        velocity = (noise - guesses[0]) / scheduler.sigmas[0]
        assert relative_error(velocity, item.outputs[f"{name}.velocity_first"]) <= MODEL_TOLERANCE, name
        assert relative_error(x, item.outputs[f"{name}.latents"][-1]) <= MODEL_TOLERANCE, name
        video = LinearVae(item.inputs["vae_M"], item.inputs["vae_P"]).decode(x[None, :, : case["latent_frames"]])[0]
        assert float((video[:, :, ::8, ::8] - item.outputs[f"{name}.video"]).abs().max()) <= 2e-4, name


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
