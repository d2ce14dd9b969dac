"""Nodes that only saved workflows need. They are registered under the wrapper's ids alone, where those are free.

What they ask for is honored by the nodes of the pack. A node of `UNSUPPORTED` lets a workflow load; where something
that runs depends on it, ComfyUI shows its sentence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from ..media.images import fit_size
from ..pipeline.blocks import parse_blocks
from ..pipeline.guidance import cfg_schedule
from ..pipeline.schedulers import make_scheduler
from ..pipeline.step_cache import StepCache
from ..pipeline.techniques import EnhanceVideo, SkipLayers
from ..wanvideo.checkpoints.lora import LoraSpec
from ..wanvideo.errors import InputError
from . import comfyui
from .comfyui import io
from .conversion import keyframe_window
from .models import VaeModel, VideoModel, VisionModel, check_file, clip_embeds_of
from .sampler import SCHEDULERS, InfiniteTalkSampler, optional_settings, sampler_inputs
from .sampling import check_riflex, check_scheduler
from .schema import (
    ComboType,
    ExtraArgsType,
    ImageEmbedsType,
    LoraType,
    SamplerArgsType,
    SchedulerType,
    VramManagementType,
    WanModelType,
    WanVaeType,
    foreign,
    node_schema,
    reject_foreign,
)
from .types import (
    ExtraArgs,
    HuMoVideo,
    LongVideo,
    OneWindow,
    SamplerArgs,
    SchedulerChoice,
    SigmaLevel,
    VramManagement,
    checked_image,
)

__all__ = ["SAVED_NODES", "UNSUPPORTED"]

GROUP = "ids of WanVideoWrapper"
KEPT = "Kept for saved workflows; this pack does not use it."


def _schema(public_id: str, display_name: str, description: str, **fields: Any) -> Any:
    return node_schema(
        public_id,
        display_name,
        description,
        group=GROUP,
        aliases=["saved workflow", "WanVideoWrapper", "已保存的工作流"],
        **fields,
    )


# --- schedulers and samplers -------------------------------------------------------------------------------------


def _scheduler_inputs() -> list[Any]:
    return [
        io.Combo.Input("scheduler", options=SCHEDULERS, default="unipc", tooltip="As in InfiniteTalk Sampler."),
        io.Int.Input("steps", default=30, min=1, tooltip="Denoising steps per window."),
        io.Float.Input(
            "shift", default=5.0, min=0.0, max=1000.0, step=0.01, tooltip="How much time goes to rough shapes."
        ),
        io.Int.Input("start_step", default=0, min=0, tooltip="First step to run."),
        io.Int.Input("end_step", default=-1, min=-1, tooltip="Stop before this step; -1 runs to the end."),
        io.Sigmas.Input("sigmas", optional=True, tooltip="Noise levels of your own, instead of steps and shift."),
        io.Boolean.Input(
            "enhance_hf", default=False, optional=True, tooltip="A schedule of the wrapper that this pack lacks."
        ),
    ]


def _check_schedule(scheduler: str | None, enhance_hf: bool | None) -> None:
    """Raise InputError for a schedule that is not run here; None is not known yet."""
    if enhance_hf:
        raise InputError("The schedule of enhance_hf is not part of this pack: turn enhance_hf off.")
    if scheduler is not None:
        check_scheduler(scheduler)


def _scheduler_choice(
    scheduler: str,
    steps: int,
    shift: float,
    start_step: int,
    end_step: int,
    sigmas: torch.Tensor | None,
    enhance_hf: bool,
) -> SchedulerChoice:
    """What the widgets of both scheduler nodes say. Raises InputError for what the sampler would not run."""
    _check_schedule(scheduler, enhance_hf)
    return SchedulerChoice(scheduler, steps, shift, start_step, end_step, sigmas)


class WanVideoScheduler(io.ComfyNode):
    SIGMA_LEVELS = ("start_step", "end_step")

    @classmethod
    def define_schema(cls) -> Any:
        return _schema(
            "WanVideoScheduler",
            "WanVideo Scheduler",
            "The noise levels of a schedule, and its settings once more for a sampler's widgets.",
            inputs=_scheduler_inputs(),
            outputs=[
                io.Sigmas.Output(
                    display_name="sigmas", tooltip="The noise levels of all steps, the last one included."
                ),
                io.Int.Output(display_name="steps", tooltip="Number of steps."),
                io.Float.Output(display_name="shift", tooltip="As it was set here."),
                ComboType.Output(display_name="scheduler", tooltip="As it was set here."),
                io.Int.Output(display_name="start_step", tooltip="As it was set here."),
                io.Int.Output(display_name="end_step", tooltip="As it was set here."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def check_early(cls, scheduler: str | None = None, enhance_hf: bool | None = False) -> None:
        _check_schedule(scheduler, enhance_hf)

    @classmethod
    def execute(
        cls,
        scheduler: str,
        steps: int,
        shift: float,
        start_step: int,
        end_step: int,
        sigmas: torch.Tensor | None = None,
        enhance_hf: bool = False,
    ) -> Any:
        _scheduler_choice(scheduler, steps, shift, start_step, end_step, sigmas, enhance_hf)
        given = None if sigmas is None else [float(level) for level in sigmas]
        grid = make_scheduler(scheduler, steps, shift, given)
        return io.NodeOutput(grid.sigmas, len(grid), shift, scheduler, start_step, end_step)


class WanVideoSchedulerv2(io.ComfyNode):
    SIGMA_LEVELS = ("start_step", "end_step")

    @classmethod
    def define_schema(cls) -> Any:
        return _schema(
            "WanVideoSchedulerv2",
            "WanVideo Scheduler v2",
            "Scheduler, steps and shift in one, for WanVideo Sampler v2.",
            inputs=_scheduler_inputs(),
            outputs=[SchedulerType.Output(display_name="scheduler", tooltip="For WanVideo Sampler v2.")],
        )

    @classmethod
    def check_early(cls, scheduler: str | None = None, enhance_hf: bool | None = False) -> None:
        _check_schedule(scheduler, enhance_hf)

    @classmethod
    def execute(
        cls,
        scheduler: str,
        steps: int,
        shift: float,
        start_step: int,
        end_step: int,
        sigmas: torch.Tensor | None = None,
        enhance_hf: bool = False,
    ) -> Any:
        return io.NodeOutput(_scheduler_choice(scheduler, steps, shift, start_step, end_step, sigmas, enhance_hf))


def _of_sampler(*names: str) -> list[Any]:
    """Inputs of the sampler, by name."""
    inputs = {entry.id: entry for entry in sampler_inputs()}
    return [inputs[name] for name in names]


class WanVideoSamplerv2(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return _schema(
            "WanVideoSamplerv2",
            "WanVideo Sampler v2",
            "InfiniteTalk Sampler with its schedule and its optional inputs in nodes of their own.",
            inputs=[
                *_of_sampler("model", "image_embeds", "cfg", "seed", "force_offload"),
                SchedulerType.Input("scheduler", tooltip="From WanVideo Scheduler v2."),
                *_of_sampler("text_embeds", "samples", "add_noise_to_samples"),
                ExtraArgsType.Input("extra_args", optional=True, tooltip="From WanVideoSampler v2 Extra Args."),
            ],
            outputs=InfiniteTalkSampler.define_schema().outputs,
        )

    @classmethod
    def check_lazy_status(cls, model: VideoModel | None = None, **given: Any) -> list[str]:
        return InfiniteTalkSampler.check_lazy_status(model=model, **cls._given(**given))

    @classmethod
    def _given(cls, scheduler: SchedulerChoice, extra_args: ExtraArgs | None = None, **given: Any) -> dict[str, Any]:
        """The inputs as those of the sampler."""
        more = {} if extra_args is None else dict(extra_args.given)
        return {"riflex_freq_index": 0, **given, **vars(scheduler), **more}

    @classmethod
    def execute(
        cls,
        scheduler: SchedulerChoice,
        extra_args: ExtraArgs | None = None,
        add_noise_to_samples: bool = False,
        **given: Any,
    ) -> Any:
        given = cls._given(scheduler, extra_args, **given)
        return InfiniteTalkSampler.execute(**given, add_noise_to_samples=add_noise_to_samples)


class WanVideoSamplerExtraArgs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return _schema(
            "WanVideoSamplerExtraArgs",
            "WanVideoSampler v2 Extra Args",
            "The optional inputs of InfiniteTalk Sampler, for WanVideo Sampler v2.",
            inputs=optional_settings(),
            outputs=[ExtraArgsType.Output(display_name="extra_args", tooltip="For WanVideo Sampler v2.")],
        )

    @classmethod
    def check_early(cls, riflex_freq_index: int | None = 0) -> None:
        check_riflex(riflex_freq_index or 0)

    @classmethod
    def execute(
        cls,
        riflex_freq_index: int = 0,
        rope_function: str = "comfy",
        feta_args: EnhanceVideo | None = None,
        cache_args: StepCache | None = None,
        slg_args: SkipLayers | None = None,
        multitalk_embeds: Mapping[str, Any] | None = None,
        **foreign_sockets: Any,
    ) -> Any:
        reject_foreign(cls, foreign_sockets)
        given = {
            "feta_args": feta_args,
            "cache_args": cache_args,
            "slg_args": slg_args,
            "multitalk_embeds": multitalk_embeds,
        }
        return io.NodeOutput(ExtraArgs({**given, "riflex_freq_index": riflex_freq_index}))


class WanVideoSamplerSettings(io.ComfyNode):
    SIGMA_LEVELS = InfiniteTalkSampler.SIGMA_LEVELS

    @classmethod
    def define_schema(cls) -> Any:
        return _schema(
            "WanVideoSamplerSettings",
            "WanVideo Sampler Settings",
            "All inputs of InfiniteTalk Sampler, for WanVideo Sampler From Settings.",
            inputs=sampler_inputs(),
            outputs=[
                SamplerArgsType.Output(display_name="sampler_inputs", tooltip="For WanVideo Sampler From Settings.")
            ],
        )

    @classmethod
    def check_early(cls, scheduler: str | None = None, riflex_freq_index: int | None = None) -> None:
        InfiniteTalkSampler.check_early(scheduler, riflex_freq_index)

    @classmethod
    def check_lazy_status(cls, model: VideoModel | None = None, **given: Any) -> list[str]:
        return InfiniteTalkSampler.check_lazy_status(model=model, **given)

    @classmethod
    def execute(cls, **given: Any) -> Any:
        return io.NodeOutput(SamplerArgs(given))


class WanVideoSamplerFromSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return _schema(
            "WanVideoSamplerFromSettings",
            "WanVideo Sampler From Settings",
            "InfiniteTalk Sampler with the inputs of WanVideo Sampler Settings.",
            inputs=[SamplerArgsType.Input("sampler_inputs", tooltip="From WanVideo Sampler Settings.")],
            outputs=InfiniteTalkSampler.define_schema().outputs,
        )

    @classmethod
    def execute(cls, sampler_inputs: SamplerArgs) -> Any:
        return InfiniteTalkSampler.execute(**sampler_inputs.given)


class WanVideoSigmaToStep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return _schema(
            "WanVideoSigmaToStep",
            "WanVideo Sigma To Step",
            "The first step of a schedule whose noise is at or below a level, for start_step and end_step.",
            inputs=[
                io.Float.Input(
                    "sigma", default=0.9, min=0.0, max=1.0, step=0.001, tooltip="Noise level, 1 is pure noise."
                )
            ],
            outputs=[io.Int.Output(display_name="step", tooltip="For start_step or end_step of a sampler.")],
        )

    @classmethod
    def execute(cls, sigma: float) -> Any:
        return io.NodeOutput(SigmaLevel(sigma))


class CreateScheduleFloatList(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        def value(input_id: str, default: float, most: float, tooltip: str) -> Any:
            return io.Float.Input(input_id, default=default, min=0.0, max=most, step=0.01, tooltip=tooltip)

        return _schema(
            "CreateScheduleFloatList",
            "Create Schedule Float List",
            "A number that changes from step to step, such as the sampler's cfg.",
            inputs=[
                io.Int.Input(
                    "steps", default=30, min=2, max=1000, step=1, tooltip="The same number as the sampler's steps."
                ),
                value("start_value", 5.0, 100.0, "The number at the beginning."),
                value("end_value", 5.0, 100.0, "The number at the end."),
                value("default_value", 0.0, 1000.0, "The number in the steps before and after."),
                io.Combo.Input(
                    "interpolation",
                    options=["linear", "ease_in", "ease_out"],
                    default="linear",
                    tooltip="How it goes from one to the other: evenly, slow at first, or slow at last.",
                ),
                value("start_percent", 0.0, 1.0, "Where it begins, as a part of the run."),
                value("end_percent", 1.0, 1.0, "Where it ends, as a part of the run."),
            ],
            outputs=[io.Float.Output(display_name="float_list", tooltip="One number per step.")],
        )

    @classmethod
    def execute(
        cls,
        steps: int,
        start_value: float,
        end_value: float,
        default_value: float,
        interpolation: str,
        start_percent: float,
        end_percent: float,
    ) -> Any:
        return io.NodeOutput(
            cfg_schedule(
                steps, start_value, end_value, interpolation, start_percent, end_percent, outside=default_value
            )
        )


# --- models ------------------------------------------------------------------------------------------------------


class WanVideoVRAMManagement(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return _schema(
            "WanVideoVRAMManagement",
            "WanVideo VRAM Management",
            "Keep a part of the model in host memory, by block swap.",
            inputs=[
                io.Float.Input(
                    "offload_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of the transformer blocks that live in host memory; above 0 the embedding layers do.",
                )
            ],
            outputs=[
                VramManagementType.Output(display_name="vram_management_args", tooltip="For InfiniteTalk Model Loader.")
            ],
        )

    @classmethod
    def execute(cls, offload_percent: float) -> Any:
        return io.NodeOutput(VramManagement(offload_percent))


class WanVideoLoraSelectByName(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return _schema(
            "WanVideoLoraSelectByName",
            "WanVideo Lora Select By Name",
            "Choose a LoRA for the model loader by the name of its file.",
            inputs=[
                io.String.Input("lora_name", default="", multiline=False, tooltip="A file of ComfyUI/models/loras."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.0001,
                    tooltip="How strongly the LoRA changes the model; 0 leaves it out.",
                ),
                LoraType.Input("prev_lora", optional=True, tooltip="LoRAs chosen before this one; all of them apply."),
                foreign("SELECTEDBLOCKS", "blocks", "LoRAs on selected blocks are not supported; leave unconnected."),
                io.Boolean.Input("low_mem_load", default=False, optional=True, tooltip=KEPT),
                io.Boolean.Input(
                    "merge_loras",
                    default=True,
                    optional=True,
                    tooltip="On: fold the LoRA into the weights when the model loads. Off: add it in every step.",
                ),
            ],
            outputs=[LoraType.Output(display_name="lora", tooltip="The LoRAs chosen so far.")],
        )

    @classmethod
    def execute(
        cls,
        lora_name: str,
        strength: float,
        prev_lora: tuple[LoraSpec, ...] | None = None,
        low_mem_load: bool = False,
        merge_loras: bool = True,
        **foreign_sockets: Any,
    ) -> Any:
        reject_foreign(cls, foreign_sockets)
        chosen = LoraSpec(_lora_path(lora_name.strip()), float(strength), merge_loras)
        return io.NodeOutput((*(prev_lora or ()), chosen))


def _lora_path(name: str) -> Any:
    """The LoRA of that name, with or without its ending. Raises CheckpointError when there is none."""
    known = comfyui.model_files("loras")
    found = [file for file in known if name in (file, file.rpartition(".")[0])]
    return comfyui.model_path("loras", found[0] if found else name)


class WanVideoSetAttentionModeOverride(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        from .loaders import ATTENTION_MODES

        return _schema(
            "WanVideoSetAttentionModeOverride",
            "WanVideo Set Attention Mode Override",
            "Another attention mode in some steps and blocks of a loaded model.",
            inputs=[
                WanModelType.Input("model", tooltip="The loaded model; it is not changed, the output is a view of it."),
                io.Combo.Input(
                    "attention_mode",
                    options=ATTENTION_MODES,
                    default="sdpa",
                    tooltip="How self-attention is computed there.",
                ),
                io.Int.Input(
                    "start_step", default=0, min=0, max=10000, step=1, tooltip="First step with this attention mode."
                ),
                io.Int.Input(
                    "end_step", default=10000, min=1, max=10000, step=1, tooltip="First step without it again."
                ),
                io.Boolean.Input("verbose", default=False, tooltip=KEPT),
                io.Int.Input(
                    "blocks",
                    optional=True,
                    force_input=True,
                    tooltip="Blocks with this attention mode, from WanVideo Block List; all of them without it.",
                ),
            ],
            outputs=[WanModelType.Output(display_name="model", tooltip="The same weights with this attention mode.")],
        )

    @classmethod
    def execute(
        cls,
        model: VideoModel,
        attention_mode: str,
        start_step: int,
        end_step: int,
        verbose: bool,
        blocks: int | list[int] | None = None,
    ) -> Any:
        chosen = None if blocks is None else tuple(blocks) if isinstance(blocks, (list, tuple)) else (blocks,)
        return io.NodeOutput(model.with_attention_override(attention_mode, (start_step, end_step), chosen))


class WanVideoBlockList(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return _schema(
            "WanVideoBlockList",
            "WanVideo Block List",
            "Indices of transformer blocks, for WanVideo Set Attention Mode Override.",
            inputs=[
                io.String.Input(
                    "blocks",
                    default="1",
                    multiline=True,
                    tooltip="Indices from 0, separated by commas or lines; 3-7 is a range.",
                )
            ],
            outputs=[io.Int.Output(display_name="block_list", tooltip="The indices as a list.")],
        )

    @classmethod
    def execute(cls, blocks: str) -> Any:
        return io.NodeOutput(list(parse_blocks(blocks)))


class WanVideoRoPEFunction(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        def scale(axis: str, words: str) -> Any:
            return io.Float.Input(
                f"ntk_scale_{axis}",
                default=1.0,
                min=0.0,
                max=100.0,
                step=0.01,
                tooltip=f"Stretching of positions along {words}; this pack runs 1 only.",
            )

        return _schema(
            "WanVideoRoPEFunction",
            "WanVideo RoPE Function",
            "A value for the sampler's rope_function; all three compute the same rotation here.",
            inputs=[
                io.Combo.Input(
                    "rope_function", options=["default", "comfy", "comfy_chunked"], default="comfy", tooltip=KEPT
                ),
                scale("f", "time"),
                scale("h", "the height"),
                scale("w", "the width"),
            ],
            outputs=[ComboType.Output(display_name="rope_function", tooltip="For the sampler's rope_function.")],
        )

    @classmethod
    def execute(cls, rope_function: str, ntk_scale_f: float, ntk_scale_h: float, ntk_scale_w: float) -> Any:
        if (ntk_scale_f, ntk_scale_h, ntk_scale_w) != (1, 1, 1):
            raise InputError("Stretched positions are not part of this pack: set ntk_scale_f, _h and _w to 1.")
        return io.NodeOutput(rope_function)


# --- images ------------------------------------------------------------------------------------------------------


class LoadWanVideoClipTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return _schema(
            "LoadWanVideoClipTextEncoder",
            "WanVideo CLIP Text Encoder Loader",
            "Load the CLIP vision model of Wan2.1 I2V, also from the folder of text encoders.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=comfyui.model_files("clip"),
                    tooltip="CLIP ViT-H of ComfyUI/models/clip_vision or models/text_encoders.",
                ),
                io.Combo.Input(
                    "precision", options=["fp16", "fp32", "bf16"], default="fp16", tooltip="What the model computes in."
                ),
                io.Combo.Input(
                    "load_device",
                    options=["main_device", "offload_device"],
                    default="offload_device",
                    optional=True,
                    tooltip="Kept for saved workflows; the model is on the GPU while it is needed.",
                ),
            ],
            outputs=[
                io.ClipVision.Output(display_name="wan_clip_vision", tooltip="For InfiniteTalk CLIP Vision Encode.")
            ],
        )

    @classmethod
    def check_early(cls, model_name: str | None = None) -> None:
        check_file("clip", model_name, "CLIP vision model")

    @classmethod
    def execute(cls, model_name: str, precision: str, load_device: str = "offload_device") -> Any:
        return io.NodeOutput(VisionModel.load(comfyui.model_path("clip", model_name), precision))


class WanVideoImageClipEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        def strength(input_id: str, default: float, tooltip: str) -> Any:
            return io.Float.Input(
                input_id, default=default, min=0.0, max=10.0, step=0.001, optional=True, tooltip=tooltip
            )

        return _schema(
            "WanVideoImageClipEncode",
            "WanVideo ImageClip Encode (Deprecated)",
            "One window that starts from an image, with its CLIP features: InfiniteTalk CLIP Vision Encode and "
            "InfiniteTalk Image To Video in one.",
            inputs=[
                io.ClipVision.Input("clip_vision", tooltip="From Load CLIP Vision or InfiniteTalk CLIP Vision Loader."),
                io.Image.Input("image", tooltip="The first frame."),
                WanVaeType.Input("vae", tooltip="From InfiniteTalk VAE Loader."),
                io.Int.Input(
                    "generation_width", default=832, min=64, max=8096, step=8, tooltip="Width of the video in pixels."
                ),
                io.Int.Input(
                    "generation_height", default=480, min=64, max=8096, step=8, tooltip="Height of the video in pixels."
                ),
                io.Int.Input(
                    "num_frames",
                    default=81,
                    min=1,
                    max=10000,
                    step=4,
                    tooltip="Length of the video in frames; rounded down to 4n + 1.",
                ),
                io.Boolean.Input(
                    "force_offload", default=True, optional=True, tooltip="Move the models to host memory afterwards."
                ),
                strength("noise_aug_strength", 0.0, "Noise added to the images: more motion, less likeness."),
                strength("latent_strength", 1.0, "Factor on the latents."),
                strength("clip_embed_strength", 1.0, "Factor on the CLIP features."),
                io.Boolean.Input(
                    "adjust_resolution",
                    default=True,
                    optional=True,
                    tooltip="Keep the aspect of the image, within as many pixels as width and height give.",
                ),
            ],
            outputs=[ImageEmbedsType.Output(display_name="image_embeds", tooltip="For InfiniteTalk Sampler.")],
        )

    @classmethod
    def execute(
        cls,
        clip_vision: Any,
        image: torch.Tensor,
        vae: VaeModel,
        generation_width: int,
        generation_height: int,
        num_frames: int,
        force_offload: bool = True,
        noise_aug_strength: float = 0.0,
        latent_strength: float = 1.0,
        clip_embed_strength: float = 1.0,
        adjust_resolution: bool = True,
    ) -> Any:
        clip = clip_embeds_of(
            clip_vision,
            [(image, clip_embed_strength)],
            negative=None,
            crop="center",
            combine="average",
            tiles=0,
            tile_share=0.0,
            force_offload=force_offload,
        )
        width, height = generation_width // 16 * 16, generation_height // 16 * 16
        if adjust_resolution:
            shape = checked_image(image).shape
            width, height = fit_size((int(shape[2]), int(shape[1])), None, None, generation_width * generation_height)
        window = keyframe_window(
            vae,
            width,
            height,
            (num_frames - 1) // 4 * 4 + 1,
            start=image[:1],
            end=None,
            start_strength=latent_strength,
            end_strength=1.0,
            noise=noise_aug_strength,
            empty_noise=0.0,
            empty=None,
            end_is_last_frame=True,
            given=None,
            tiled=False,
            clip=clip,
        )
        if force_offload:
            vae.unload()
        return io.NodeOutput(window)


class WanVideoPreviewEmbeds(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return _schema(
            "WanVideoPreviewEmbeds",
            "WanVideo Preview Embeds",
            "The latents and the mask that a window is conditioned on.",
            inputs=[ImageEmbedsType.Input("embeds", tooltip="From InfiniteTalk Image To Video.")],
            outputs=[
                io.Latent.Output(display_name="image_embeds", tooltip="Latents of the given frames, gray elsewhere."),
                io.Mask.Output(display_name="mask", tooltip="1 where a latent frame is given."),
            ],
        )

    @classmethod
    def execute(cls, embeds: LongVideo | OneWindow) -> Any:
        if isinstance(embeds, LongVideo) or embeds.condition is None:
            raise InputError(
                "There is nothing to preview: only InfiniteTalk Image To Video encodes images before the sampler runs."
            )
        return io.NodeOutput({"samples": embeds.condition[:, 4:]}, embeds.condition[0, 0].float())


MAKERS = {LongVideo: "InfiniteTalk Long Video", OneWindow: "a node of one window", HuMoVideo: "InfiniteTalk HuMo"}


class WanVideoCombineEmbeds(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return _schema(
            "WanVideoCombineEmbeds",
            "WanVideo Combine Embeds",
            "Two descriptions of one video as one: where both state something, the second one is taken.",
            inputs=[
                ImageEmbedsType.Input("embeds_1", tooltip="The first one."),
                ImageEmbedsType.Input("embeds_2", tooltip="The second one, of the same kind and size."),
            ],
            outputs=[ImageEmbedsType.Output(display_name="image_embeds", tooltip="For InfiniteTalk Sampler.")],
        )

    @classmethod
    def execute(cls, embeds_1: LongVideo | OneWindow | HuMoVideo, embeds_2: LongVideo | OneWindow | HuMoVideo) -> Any:
        if type(embeds_1) is not type(embeds_2):
            raise InputError(
                f"embeds_1 comes from {MAKERS[type(embeds_1)]} and embeds_2 from {MAKERS[type(embeds_2)]}, which are "
                "not run together here: connect one of them to the sampler."
            )
        sizes = [_size_of(embeds) for embeds in (embeds_1, embeds_2)]
        if sizes[0] != sizes[1]:
            raise InputError(
                "embeds_1 and embeds_2 are videos of different sizes ({} x {}, {} frames; {} x {}, {} frames): set "
                "both to one size.".format(*sizes[0], *sizes[1])
            )
        second = {field.name: getattr(embeds_2, field.name) for field in fields(embeds_2)}
        stated = {name: value for name, value in second.items() if value is not None and not _is_empty(value)}
        return io.NodeOutput(replace(embeds_1, **stated))


def _is_empty(value: Any) -> bool:
    return isinstance(value, tuple) and not value


def _size_of(embeds: LongVideo | OneWindow | HuMoVideo) -> tuple[int, int, int]:
    """Width and height in pixels, and frames of a window."""
    return embeds.width, embeds.height, embeds.num_frames if isinstance(embeds, OneWindow) else embeds.frames


# --- what a talking video cannot use -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Unsupported:
    """A node whose every use is answered with a sentence.

    Attributes:
        display_name: as the wrapper has it.
        what: what it is for, and what to do, in the sentence.
        inputs: of the schema, in the public order; the first is the one that ComfyUI shows the sentence at.
        outputs: (type, name) of each.
    """

    display_name: str
    what: str
    inputs: Callable[[], list[Any]]
    outputs: tuple[tuple[str, str], ...]


def _int(input_id: str, default: int, least: int, most: int | None = None, step: int | None = None) -> Any:
    return io.Int.Input(input_id, default=default, min=least, max=most, step=step, tooltip=KEPT)


def _float(input_id: str, default: float, most: float) -> Any:
    return io.Float.Input(input_id, default=default, min=0.0, max=most, step=0.01, tooltip=KEPT)


def _combo(input_id: str, options: list[str], default: str | None = None, **more: Any) -> Any:
    return io.Combo.Input(input_id, options=options, default=default, tooltip=KEPT, **more)


def _flag(input_id: str, default: bool, **more: Any) -> Any:
    return io.Boolean.Input(input_id, default=default, tooltip=KEPT, **more)


def _socket(io_type: str, input_id: str, **more: Any) -> Any:
    return io.Custom(io_type).Input(input_id, tooltip=KEPT, **more)


UNSUPPORTED: dict[str, Unsupported] = {
    "WanVideoContextOptions": Unsupported(
        "WanVideo Context Options",
        "context windows (InfiniteTalk Long Video makes long videos in windows)",
        lambda: [
            _combo("context_schedule", ["uniform_standard", "uniform_looped", "static_standard"]),
            _int("context_frames", 81, 2, 1000, 1),
            _int("context_stride", 4, 4, 100, 1),
            _int("context_overlap", 16, 4, 100, 1),
            _flag("freenoise", True),
            _flag("verbose", False),
            _combo("fuse_method", ["linear", "pyramid"], "linear", optional=True),
            _socket("LATENT", "reference_latent", optional=True),
        ],
        (("WANVIDCONTEXT", "context_options"),),
    ),
    "WanVideoLoopArgs": Unsupported(
        "WanVideo Loop Args",
        "looped sampling (a talking video does not end where it begins)",
        lambda: [_int("shift_skip", 6, 0), _float("start_percent", 0.0, 1.0), _float("end_percent", 1.0, 1.0)],
        (("LOOPARGS", "loop_args"),),
    ),
    "WanVideoFreeInitArgs": Unsupported(
        "WanVideo Free Init Args",
        "FreeInit (windows of a long video begin with the frames before)",
        lambda: [
            _int("freeinit_num_iters", 3, 1, 10),
            _combo("freeinit_method", ["butterworth", "ideal", "gaussian", "none"], "ideal"),
            _int("freeinit_n", 4, 1, 10),
            _float("freeinit_d_s", 1.0, 10.0),
            _float("freeinit_d_t", 1.0, 10.0),
        ],
        (("FREEINITARGS", "freeinit_args"),),
    ),
}
"""The wrapper's id -> what stands in its place."""


def _unsupported(public_id: str, row: Unsupported) -> Any:
    """The node class of a row."""
    first = row.inputs()[0].id
    sentence = f"{row.display_name} is for {row.what}: not part of this pack, remove it."

    def define_schema(cls: Any) -> Any:
        return _schema(
            public_id,
            row.display_name,
            f"Lets saved workflows load. It is for {row.what}, which is not part of this pack.",
            inputs=row.inputs(),
            outputs=[io.Custom(kind).Output(display_name=name, tooltip=KEPT) for kind, name in row.outputs],
        )

    def execute(cls: Any, **given: Any) -> Any:
        raise InputError(sentence)

    def validate_inputs(cls: Any, **given: Any) -> str:
        return sentence

    # ComfyUI shows the sentence once for every input that is named here.
    named = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("cls", first)]
    validate_inputs.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    members = {
        "define_schema": classmethod(define_schema),
        "execute": classmethod(execute),
        "validate_inputs": classmethod(validate_inputs),
        "__module__": __name__,
    }
    return type(public_id, (io.ComfyNode,), members)


class WanVideoExperimentalArgs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        def number(input_id: str, default: float, most: float) -> Any:
            return _float(input_id, default, most)

        return _schema(
            "WanVideoExperimentalArgs",
            "WanVideo Experimental Args",
            "Lets saved workflows load: with everything off it changes nothing, what is on is not part of this pack.",
            inputs=[
                io.String.Input("video_attention_split_steps", default="", tooltip=KEPT),
                _flag("cfg_zero_star", False),
                _flag("use_zero_init", False),
                _int("zero_star_steps", 0, 0),
                _flag("use_fresca", False),
                number("fresca_scale_low", 1.0, 10.0),
                number("fresca_scale_high", 1.25, 10.0),
                _int("fresca_freq_cutoff", 20, 0, 10000, 1),
                _flag("use_tcfg", False),
                number("raag_alpha", 0.0, 10.0),
                _flag("bidirectional_sampling", False),
                _flag("temporal_score_rescaling", False),
                number("tsr_k", 0.95, 100.0),
                number("tsr_sigma", 1.0, 1.0),
            ],
            outputs=[io.Custom("EXPERIMENTALARGS").Output(display_name="exp_args", tooltip="For the sampler.")],
        )

    @classmethod
    def execute(
        cls,
        video_attention_split_steps: str,
        cfg_zero_star: bool,
        use_zero_init: bool,
        use_fresca: bool,
        use_tcfg: bool,
        raag_alpha: float,
        bidirectional_sampling: bool,
        temporal_score_rescaling: bool,
        **numbers: Any,
    ) -> Any:
        switches = {
            "video_attention_split_steps": video_attention_split_steps.strip() != "",
            "cfg_zero_star": cfg_zero_star,
            "use_zero_init": use_zero_init,
            "use_fresca": use_fresca,
            "use_tcfg": use_tcfg,
            "raag_alpha": raag_alpha != 0,
            "bidirectional_sampling": bidirectional_sampling,
            "temporal_score_rescaling": temporal_score_rescaling,
        }
        on = [name for name, is_on in switches.items() if is_on]
        if on:
            raise InputError(
                f"{' and '.join(on)} of WanVideo Experimental Args: not part of this pack, switch "
                f"{'it' if len(on) == 1 else 'them'} off."
            )
        return io.NodeOutput(None)  # as if nothing were connected


SAVED_NODES: list[Any] = [
    WanVideoScheduler,
    WanVideoSchedulerv2,
    WanVideoSamplerv2,
    WanVideoSamplerExtraArgs,
    WanVideoSamplerSettings,
    WanVideoSamplerFromSettings,
    WanVideoSigmaToStep,
    CreateScheduleFloatList,
    WanVideoVRAMManagement,
    WanVideoLoraSelectByName,
    WanVideoSetAttentionModeOverride,
    WanVideoBlockList,
    WanVideoRoPEFunction,
    LoadWanVideoClipTextEncoder,
    WanVideoImageClipEncode,
    WanVideoPreviewEmbeds,
    WanVideoCombineEmbeds,
    WanVideoExperimentalArgs,
    *(_unsupported(public_id, row) for public_id, row in UNSUPPORTED.items()),
]
