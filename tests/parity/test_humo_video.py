"""HuMo from pictures, features and noise to a video: golden items `humo_condition`, `humo_guidance`, `humo_loop`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from PIL import Image
from support.analytic import LinearVae
from support.goldens import Golden, relative_error
from wanvideo_infinitetalk.media.images import pad_image
from wanvideo_infinitetalk.pipeline.guidance import Pass
from wanvideo_infinitetalk.pipeline.humo import HuMoConditioner, References, guide_humo, official_sigmas, plan_humo
from wanvideo_infinitetalk.pipeline.long_video import Callbacks, generate_windows
from wanvideo_infinitetalk.pipeline.plan import GenerateConfig
from wanvideo_infinitetalk.wanvideo.modules.model import HuMoConfig, WanConfig, WanModel

CONDITION = 1e-5
GUIDANCE = 1e-5
LOOP = 5e-5
"""Where a whole run has been through the network."""


class Vae(LinearVae):
    """The stand-in, which gives a gray video the latents that the release has in a file."""

    def __init__(self, item: Golden) -> None:
        decode = item.inputs.get("vae_P", torch.zeros(3, 16))
        super().__init__(item.inputs["vae_M"], decode)
        self.zero = item.inputs["zero_vae"]

    def encode(self, video: torch.Tensor, *, tiled: bool = False) -> torch.Tensor:
        if bool((video == 0).all()):
            return self.zero[None, :, : (video.shape[2] - 1) // 4 + 1]
        return super().encode(video, tiled=tiled)


def pictures(item: Golden, count: int) -> list[torch.Tensor]:
    width, height = item.config["size"]
    return [pad_image(Image.fromarray(item.inputs[f"picture{n}_u8"].numpy()), width, height) for n in range(count)]


def conditioner(
    item: Golden, case: dict, images: list[torch.Tensor], steps: int, *, formula: str = "official", **settings
) -> HuMoConditioner:
    width, height = item.config["size"]
    channels = case["model"] == "17B"
    settings = {"scheduler": "unipc", **settings}
    config = GenerateConfig(width=width, height=height, steps=steps, shift=5.0, color_correction=0.0, **settings)
    plan = plan_humo(config, item.config["frames"], len(images), channels=channels, formula=formula)
    context = item.inputs.get("context", torch.zeros(1, 1))
    negative = item.inputs.get("context_null", torch.zeros(1, 1))
    audio = item.inputs["audio_features"]
    given = References(context, negative, audio, images)
    features = tuple(audio.shape[1:])
    return HuMoConditioner(Vae(item), given, plan, lambda _: nullcontext(), channels=channels, features=features)


@pytest.mark.parametrize("name", ["one_wide", "one_tall", "one_exact"])
def test_pictures_are_fitted_on_white(golden, name: str) -> None:
    item = golden("humo_condition")
    image = pictures(item, 3)[["one_wide", "one_tall", "one_exact"].index(name)]
    sizes = {tuple(item.inputs[f"picture{n}_u8"].shape): n for n in range(3)}
    assert len(sizes) == 3
    latents = [Vae(item).encode(picture[None, :, None])[0] for picture in pictures(item, 3)]
    wanted = item.outputs[f"official.{name}.latent"]
    assert min(relative_error(latent, wanted) for latent in latents) <= CONDITION
    assert image.shape == (3, item.config["size"][1], item.config["size"][0])


def test_several_pictures(golden) -> None:
    item = golden("humo_condition")
    pixels = torch.stack(pictures(item, 3), dim=1)
    assert float((pixels - item.outputs["official.three.pixels"]).abs().max()) <= CONDITION
    latents = torch.cat([Vae(item).encode(image[None, :, None])[0] for image in pictures(item, 3)], dim=1)
    assert relative_error(latents, item.outputs["official.three.latent"]) <= CONDITION


def test_what_each_pass_is_given(golden) -> None:
    item = golden("humo_condition")
    cases = {name: case for name, case in item.config["cases"].items() if "calls" in case}
    for name, case in cases.items():
        count = 0 if case["mode"] == "TA" else case["reference_latent_frames"]
        given = conditioner(item, case, pictures(item, 3)[:count], 2)
        condition = given(given.plan.windows[0], None)
        assert condition.behind == case["reference_latent_frames"], name
        frames = case["latent_frames"] + case["reference_latent_frames"]
        assert condition.shape[1] == frames
        full, bare = condition.inputs(Pass(True, True)), condition.inputs(Pass(True, True, references=False))
        silent = condition.inputs(Pass(True, False))
        assert torch.equal(full.humo_audio, item.outputs[f"official.{name}.audio"]), name
        assert not silent.humo_audio.any()
        assert silent.humo_audio.shape == full.humo_audio.shape
        if case["model"] == "17B":
            assert relative_error(bare.y[0], item.outputs[f"official.{name}.y_noref"]) <= CONDITION, name
            if count:
                assert relative_error(full.y[0], item.outputs[f"official.{name}.y_ref"]) <= CONDITION, name
            continue
        assert full.y is None
        noise = item.inputs[f"{name}.noise"]
        for x, call in zip(item.outputs[f"official.{name}.x_step0"], case["calls"], strict=False):
            which = bare if call["x_reference_part"] == "zeros" else full
            seen = which.overwrite.put(noise)
            assert relative_error(seen, x) <= CONDITION, (name, call)


def _evaluate(item: Golden) -> Callable[[Pass], torch.Tensor]:
    def evaluate(which: Pass) -> torch.Tensor:
        text = "text" if which.prompt else "null"
        audio, references = "audio" if which.speech else "silent", "ref" if which.references else "noref"
        return item.inputs[f"v.{text}_{audio}_{references}"]

    return evaluate


def test_the_official_guidance(golden) -> None:
    item = golden("humo_guidance")
    cases = {name: case for name, case in item.config["cases"].items() if name.startswith("official")}
    assert len(cases) > 20
    for name, case in cases.items():
        formula = guide_humo(
            case["scale_t"],
            case["scale_a"],
            case.get("scale_i", 1.0),
            case.get("t", 0),
            channels=case["model"] == "17B",
            references=case["mode"] == "TIA",
            early=case.get("step_change", 980),
        )
        v = formula.velocity(_evaluate(item))
        assert float((v - item.outputs[name]).abs().max()) <= GUIDANCE, name


def test_the_guidance_of_the_wrapper(golden) -> None:
    item = golden("humo_guidance")
    cases = {
        name: case
        for name, case in item.config["cases"].items()
        if name.startswith("wrapper") and "outside_range" not in name
    }
    assert len(cases) > 5
    for name, case in cases.items():
        formula = guide_humo(
            case["cfg"],
            case["audio_cfg_scale"],
            1.0,
            case["t"],
            channels=name.startswith("wrapper17"),
            references=True,
            formula="wrapper",
        )
        v = formula.velocity(_evaluate(item))
        assert float((v - item.outputs[name]).abs().max()) <= GUIDANCE, name


def _model(item: Golden, in_dim: int) -> WanModel:
    config = {name: value for name, value in item.config["model"].items() if name not in ("audio_proj", "kv_dim")}
    audio = HuMoConfig(**item.config["model"]["audio_proj"])
    model = WanModel(WanConfig.from_public(config | {"humo": audio, "in_dim": in_dim})).requires_grad_(False)
    first = item.weights["patch_embedding.weight"][:, :in_dim]
    model.load_state_dict(item.weights | {"patch_embedding.weight": first.contiguous()})
    return model


@pytest.mark.parametrize("model", ["17B", "1_7B"])
def test_from_noise_to_video(golden, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    item = golden("humo_loop").float()
    cases = {name: case for name, case in item.config["cases"].items() if name.startswith(f"{model}.")}
    network = _model(item, 36 if model == "17B" else 16)
    assert cases
    for name, case in cases.items():
        scales = case["scales"]
        given = conditioner(
            item,
            case,
            pictures(item, case["references"]),
            item.config["steps"],
            cfg=scales["scale_t"],
            audio_cfg=scales["scale_a"],
            image_cfg=scales.get("scale_i", 1.0),
        )
        schedule = given.plan.schedule
        wanted = item.outputs[f"{name}.sigmas"].tolist()
        assert official_sigmas(item.config["steps"], 5.0) == pytest.approx(wanted, abs=1e-6)
        assert schedule.scheduler.timesteps.tolist() == case["timesteps"], name
        if scales.get("step_change", 980) != 980:
            formulas = tuple(
                guide_humo(
                    scales["scale_t"],
                    scales["scale_a"],
                    1.0,
                    t,
                    channels=True,
                    references=True,
                    early=scales["step_change"],
                )
                for t in case["timesteps"]
            )
            given.plan = replace(given.plan, schedule=replace(schedule, formulas=formulas))
        assert max(len(f.passes) for f in given.plan.schedule.formulas) == case["model_calls_per_step"]
        noise = item.inputs[f"{name}.noise"]
        monkeypatch.setattr("wanvideo_infinitetalk.pipeline.long_video.draw", lambda *_, noise=noise: noise)
        guesses: list[torch.Tensor] = []
        callbacks = Callbacks(preview=lambda clean, window, step, guesses=guesses: guesses.append(clean))
        (window,) = generate_windows(network, given.vae, given, given.plan, callbacks, {})
        velocity = (noise - guesses[0]) / schedule.scheduler.sigmas[0]
        assert relative_error(velocity, item.outputs[f"{name}.velocity_first"]) <= LOOP, name
        frames = case["latent_frames"]
        assert relative_error(window.latents, item.outputs[f"{name}.latents"][-1][:, :frames]) <= LOOP, name
        video = window.frames.permute(3, 0, 1, 2) * 2 - 1
        assert float((video[:, :, ::8, ::8] - item.outputs[f"{name}.video"]).abs().max()) <= 2e-4, name


def test_whole_runs_by_the_wrappers_formula(golden, monkeypatch: pytest.MonkeyPatch) -> None:
    item = golden("humo_loop").float()
    cases = {name: case for name, case in item.config["cases"].items() if name.startswith("wrapper")}
    assert cases
    for name, case in cases.items():
        of_size = item.config["cases"][f"{case['model'].replace('.', '_')}.tia_one"]
        given = conditioner(
            item,
            of_size,
            pictures(item, 1),
            len(case["cfg"]),
            formula="wrapper",
            cfg=case["cfg"],
            audio_cfg=case["audio_cfg_scale"],
            scheduler=case["scheduler"],
        )
        schedule = given.plan.schedule
        assert schedule.scheduler.sigmas.tolist() == pytest.approx(item.outputs[f"{name}.sigmas"].tolist(), abs=1e-6)
        assert schedule.scheduler.timesteps.tolist() == pytest.approx(case["timesteps"], abs=1e-3), name
        noise = item.inputs["17B.tia_one.noise"]
        draws = iter(
            [noise, *item.inputs.get(f"{name}.step_noise", []), noise]
        )  # nothing is added behind the last step
        for module in ("long_video", "sampling"):
            monkeypatch.setattr(f"wanvideo_infinitetalk.pipeline.{module}.draw", lambda *_, draws=draws: next(draws))
        network = _model(item, 36 if case["model"] == "17B" else 16)
        (window,) = generate_windows(network, given.vae, given, given.plan, Callbacks(), {})
        wanted = item.outputs[f"{name}.latents"][-1][:, : window.latents.shape[1]]
        assert relative_error(window.latents, wanted) <= LOOP, name
