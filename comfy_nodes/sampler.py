"""The sampler: runs the model over one window, or over all windows of a long video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..pipeline.step_cache import StepCache
from ..pipeline.techniques import EnhanceVideo, SkipLayers
from .comfyui import io
from .models import VideoModel
from .sampling import SamplerSettings, check_request, check_riflex, check_scheduler, sample
from .schema import (
    EnhanceVideoType,
    ImageEmbedsType,
    SkipLayersType,
    SpeechEmbedsType,
    StepCacheType,
    TextEmbedsType,
    WanModelType,
    foreign,
    node_schema,
    reject_foreign,
)
from .types import HuMoVideo, LongVideo, OneWindow, SpeechEmbeds, TextEmbeds

# The public values in their order, and flashtalk; `SamplerSettings` names what to choose for those that we do not run.
SCHEDULERS = [
    "unipc",
    "unipc/beta",
    "dpm++",
    "dpm++/beta",
    "dpm++_sde",
    "dpm++_sde/beta",
    "euler",
    "euler/beta",
    "longcat_distill_euler",
    "deis",
    "lcm",
    "lcm/beta",
    "res_multistep",
    "er_sde",
    "flowmatch_causvid",
    "flowmatch_distill",
    "flowmatch_pusa",
    "multitalk",
    "sa_ode_stable",
    "rcm",
    "vibt_unipc",
    "flashtalk",
]


def sampler_inputs(*, riflex_is_optional: bool = False) -> list[Any]:
    """The inputs of the sampler, in the public order."""
    return [
        WanModelType.Input("model", lazy=True, tooltip="From InfiniteTalk Model Loader."),
        ImageEmbedsType.Input(
            "image_embeds",
            tooltip="Image, size and length: from InfiniteTalk Long Video, Image To Video or Empty Video.",
        ),
        io.Int.Input(
            "steps", default=30, min=1, tooltip="Denoising steps per window; 4 to 8 with a distillation LoRA."
        ),
        io.Float.Input(
            "cfg",
            default=6.0,
            min=0.0,
            max=30.0,
            step=0.01,
            tooltip="Guidance by the prompt; 1 with a distillation LoRA, about 5 without. "
            "Also takes a list with one number per step.",
        ),
        io.Float.Input(
            "shift",
            default=5.0,
            min=0.0,
            max=1000.0,
            step=0.01,
            tooltip="How much time goes to rough shapes: 7 at 480p, 11 at 720p for InfiniteTalk, with step LoRAs too.",
        ),
        io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, tooltip="The same seed gives the same video."),
        io.Boolean.Input(
            "force_offload", default=True, tooltip="Move the model to host memory when the video is made."
        ),
        io.Combo.Input(
            "scheduler",
            options=SCHEDULERS,
            default="unipc",
            tooltip="multitalk is the official one of InfiniteTalk; lcm or dpm++_sde for distillation LoRAs.",
        ),
        io.Int.Input(
            "riflex_freq_index",
            default=0,
            min=0,
            max=1000,
            step=1,
            optional=riflex_is_optional,
            tooltip="RIFLEx stretches one very long window; not part of this pack, leave it at 0.",
        ),
        TextEmbedsType.Input("text_embeds", optional=True, tooltip="From InfiniteTalk Text Encode."),
        io.Latent.Input(
            "samples",
            optional=True,
            tooltip="Latents to start from, with denoise_strength below 1 or start_step above 0.",
        ),
        io.Float.Input(
            "denoise_strength",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip="How much of samples is made anew: 1 is everything.",
        ),
        EnhanceVideoType.Input("feta_args", optional=True, tooltip="From InfiniteTalk Enhance-A-Video."),
        foreign("WANVIDCONTEXT", "context_options", "Not supported: long videos are made in windows here."),
        StepCacheType.Input(
            "cache_args", optional=True, tooltip="From InfiniteTalk EasyCache, TeaCache or MagCache; for many steps."
        ),
        foreign("FLOWEDITARGS", "flowedit_args", "FlowEdit is not supported; leave unconnected."),
        io.Boolean.Input(
            "batched_cfg",
            default=False,
            optional=True,
            tooltip="Kept for saved workflows: the passes of a step run one after the other.",
        ),
        SkipLayersType.Input("slg_args", optional=True, tooltip="From InfiniteTalk Skip Layers; needs cfg above 1."),
        io.Combo.Input(
            "rope_function",
            options=["default", "comfy", "comfy_chunked"],
            default="comfy",
            optional=True,
            tooltip="Kept for saved workflows: all three compute the same rotation.",
        ),
        foreign("LOOPARGS", "loop_args", "Looped sampling is not supported; leave unconnected."),
        foreign("EXPERIMENTALARGS", "experimental_args", "Not supported; leave unconnected."),
        io.Sigmas.Input("sigmas", optional=True, tooltip="Noise levels of your own, instead of steps and shift."),
        foreign("UNIANIMATE_POSE", "unianimate_poses", "UniAnimate is not supported; leave unconnected."),
        foreign("FANTASYTALKING_EMBEDS", "fantasytalking_embeds", "Use multitalk_embeds instead."),
        foreign("UNI3C_EMBEDS", "uni3c_embeds", "Uni3C is not supported; leave unconnected."),
        SpeechEmbedsType.Input("multitalk_embeds", optional=True, tooltip="From InfiniteTalk Speech."),
        foreign("FREEINITARGS", "freeinit_args", "FreeInit is not supported; leave unconnected."),
        io.Int.Input(
            "start_step",
            default=0,
            min=0,
            max=10000,
            step=1,
            optional=True,
            tooltip="First step to run; above 0 it starts from samples (dubbing: 1 or 2 of 4 steps).",
        ),
        io.Int.Input(
            "end_step",
            default=-1,
            min=-1,
            max=10000,
            step=1,
            optional=True,
            tooltip="Stop before this step; -1 runs to the end.",
        ),
        io.Boolean.Input(
            "add_noise_to_samples",
            default=False,
            optional=True,
            tooltip="Add noise of the first step's level to samples. On for clean latents, off for latents "
            "that another sampler left half way.",
        ),
    ]


EXTRA = (
    "feta_args",
    "context_options",
    "cache_args",
    "slg_args",
    "rope_function",
    "loop_args",
    "experimental_args",
    "unianimate_poses",
    "fantasytalking_embeds",
    "uni3c_embeds",
    "multitalk_embeds",
)
"""The inputs that WanVideoSampler v2 Extra Args holds, beside riflex_freq_index."""


def optional_settings() -> list[Any]:
    """Those inputs, in the public order."""
    inputs = {entry.id: entry for entry in sampler_inputs(riflex_is_optional=True)}
    return [inputs[name] for name in ("riflex_freq_index", *EXTRA)]


def _settings(
    *,
    steps: int,
    cfg: float | list[float],
    shift: float,
    seed: int,
    scheduler: str,
    riflex_freq_index: int,
    denoise_strength: float = 1.0,
    feta_args: EnhanceVideo | None = None,
    cache_args: StepCache | None = None,
    slg_args: SkipLayers | None = None,
    sigmas: torch.Tensor | None = None,
    start_step: int = 0,
    end_step: int = -1,
    add_noise_to_samples: bool = False,
    **others: Any,
) -> SamplerSettings:
    """The sampler's widgets among its inputs."""
    return SamplerSettings(
        steps=steps,
        cfg=cfg,
        shift=shift,
        seed=seed,
        scheduler=scheduler,
        sigmas=sigmas,
        denoise=denoise_strength,
        start_step=start_step,
        end_step=end_step,
        add_noise=add_noise_to_samples,
        riflex=riflex_freq_index,
        techniques=tuple(technique for technique in (feta_args, slg_args, cache_args) if technique is not None),
    )


def _speech(embeds: Mapping[str, Any] | None) -> SpeechEmbeds | None:
    return None if embeds is None else SpeechEmbeds.of(embeds)


class InfiniteTalkSampler(io.ComfyNode):
    SIGMA_LEVELS = ("start_step", "end_step")

    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkSampler",
            "InfiniteTalk Sampler",
            "Make the video. With InfiniteTalk Long Video it makes and decodes window after window.",
            group="sampling",
            aliases=["ksampler", "infinitetalk sampler", "wan sampler", "采样器"],
            inputs=sampler_inputs(),
            outputs=[
                io.Latent.Output(
                    display_name="samples",
                    tooltip="For InfiniteTalk Decode, or for InfiniteTalk Images From Samples after a long video.",
                ),
                io.Latent.Output(
                    display_name="denoised_samples", tooltip="The clean video as the last step run guessed it."
                ),
            ],
        )

    @classmethod
    def check_early(cls, scheduler: str | None = None, riflex_freq_index: int | None = None) -> None:
        if scheduler is not None:
            check_scheduler(scheduler)
        check_riflex(riflex_freq_index or 0)

    @classmethod
    def check_lazy_status(cls, model: VideoModel | None = None, **given: Any) -> list[str]:
        """The model is asked for when all else is there and fits: what is wrong is said before weights are read."""
        if model is not None:
            return []
        check_request(
            given["image_embeds"],
            _settings(**given),
            text=given.get("text_embeds"),
            speech=_speech(given.get("multitalk_embeds")),
            start=given.get("samples"),
        )
        return ["model"]

    @classmethod
    def execute(
        cls,
        model: VideoModel,
        image_embeds: LongVideo | OneWindow | HuMoVideo,
        steps: int,
        cfg: float | list[float],
        shift: float,
        seed: int,
        force_offload: bool,
        scheduler: str,
        riflex_freq_index: int,
        text_embeds: TextEmbeds | None = None,
        samples: dict[str, Any] | None = None,
        denoise_strength: float = 1.0,
        feta_args: EnhanceVideo | None = None,
        cache_args: StepCache | None = None,
        batched_cfg: bool = False,
        slg_args: SkipLayers | None = None,
        rope_function: str = "comfy",
        sigmas: torch.Tensor | None = None,
        multitalk_embeds: Mapping[str, Any] | None = None,
        start_step: int = 0,
        end_step: int = -1,
        add_noise_to_samples: bool = False,
        **foreign_sockets: Any,
    ) -> Any:
        reject_foreign(cls, foreign_sockets)
        settings = _settings(
            steps=steps,
            cfg=cfg,
            shift=shift,
            seed=seed,
            scheduler=scheduler,
            riflex_freq_index=riflex_freq_index,
            denoise_strength=denoise_strength,
            feta_args=feta_args,
            cache_args=cache_args,
            slg_args=slg_args,
            sigmas=sigmas,
            start_step=start_step,
            end_step=end_step,
            add_noise_to_samples=add_noise_to_samples,
        )
        result = sample(
            model, image_embeds, settings, text=text_embeds, speech=_speech(multitalk_embeds), start=samples
        )
        if force_offload:
            model.unload()
        return io.NodeOutput(*result)
