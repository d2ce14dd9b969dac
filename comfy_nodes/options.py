"""Settings that other nodes take: LoRAs, block swap, torch.compile, guidance schedules."""

from __future__ import annotations

from typing import Any

from ..pipeline.guidance import cfg_schedule
from ..pipeline.presets import PRESETS, preset_values
from ..wanvideo.checkpoints.lora import LoraSpec
from ..wanvideo.runtime.compilation import COMPILE_MODES, CompileSettings
from ..wanvideo.runtime.offload import BlockSwap
from . import comfyui
from .comfyui import io
from .schema import (
    BlockSwapType,
    ComboType,
    CompileType,
    LoraType,
    WanModelType,
    foreign,
    node_schema,
    reject_foreign,
)

MULTI_LORA_SLOTS = range(5)

_MERGE_TIP = (
    "On: the LoRA is folded into the weights when the model loads (no cost while sampling). "
    "Off: it stays unmerged and is added in every step, so its strength can change without loading the model again."
)
_LOW_MEM_TIP = (
    "Kept for saved workflows. LoRA files are always read one layer at a time, so there is nothing to choose."
)


class InfiniteTalkLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkLora",
            "InfiniteTalk LoRA",
            "Choose a LoRA for the model loader; chain several through prev_lora.",
            group="options",
            aliases=["lora", "lightx2v", "distill lora", "选择 LoRA", "蒸馏"],
            inputs=[
                io.Combo.Input("lora", options=comfyui.model_files("loras"), tooltip="A file of ComfyUI/models/loras."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-1000.0,
                    max=1000.0,
                    step=0.0001,
                    tooltip="How strongly the LoRA changes the model; 0 leaves it out.",
                ),
                LoraType.Input("prev_lora", optional=True, tooltip="LoRAs chosen before this one; all of them apply."),
                foreign("SELECTEDBLOCKS", "blocks", "LoRAs on selected blocks are not supported; leave unconnected."),
                io.Boolean.Input("low_mem_load", default=False, optional=True, tooltip=_LOW_MEM_TIP),
                io.Boolean.Input("merge_loras", default=True, optional=True, tooltip=_MERGE_TIP),
            ],
            outputs=[LoraType.Output(display_name="lora", tooltip="The LoRAs chosen so far.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        lora: str,
        strength: float,
        prev_lora: tuple[LoraSpec, ...] | None = None,
        low_mem_load: bool = False,
        merge_loras: bool = True,
        **foreign_sockets: Any,
    ) -> Any:
        reject_foreign(cls, foreign_sockets)
        chosen = LoraSpec(comfyui.model_path("loras", lora), float(strength), merge_loras)
        return io.NodeOutput((*(prev_lora or ()), chosen))


class InfiniteTalkLoras(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        files = ["none", *comfyui.model_files("loras")]
        slots = [
            widget
            for i in MULTI_LORA_SLOTS
            for widget in (
                io.Combo.Input(f"lora_{i}", options=files, default="none", tooltip=f"LoRA {i + 1}, or none."),
                io.Float.Input(
                    f"strength_{i}",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.0001,
                    tooltip=f"Strength of LoRA {i + 1}; 0 leaves it out.",
                ),
            )
        ]
        return node_schema(
            "InfiniteTalkLoras",
            "InfiniteTalk LoRAs",
            "Choose up to five LoRAs at once.",
            group="options",
            aliases=["loras", "lora stack", "multi lora", "多个 LoRA"],
            inputs=[
                *slots,
                LoraType.Input("prev_lora", optional=True, tooltip="LoRAs chosen before these; all of them apply."),
                foreign("SELECTEDBLOCKS", "blocks", "LoRAs on selected blocks are not supported; leave unconnected."),
                io.Boolean.Input("low_mem_load", default=False, optional=True, tooltip=_LOW_MEM_TIP),
                io.Boolean.Input("merge_loras", default=True, optional=True, tooltip=_MERGE_TIP),
            ],
            outputs=[LoraType.Output(display_name="lora", tooltip="The LoRAs chosen so far.")],
        )

    @classmethod
    def execute(
        cls,
        lora_0: str,
        strength_0: float,
        lora_1: str,
        strength_1: float,
        lora_2: str,
        strength_2: float,
        lora_3: str,
        strength_3: float,
        lora_4: str,
        strength_4: float,
        prev_lora: tuple[LoraSpec, ...] | None = None,
        low_mem_load: bool = False,
        merge_loras: bool = True,
        **foreign_sockets: Any,
    ) -> Any:
        reject_foreign(cls, foreign_sockets)
        names = (lora_0, lora_1, lora_2, lora_3, lora_4)
        strengths = (strength_0, strength_1, strength_2, strength_3, strength_4)
        chosen = [
            LoraSpec(comfyui.model_path("loras", name), float(strength), merge_loras)
            for name, strength in zip(names, strengths, strict=True)
            if name != "none" and strength != 0
        ]
        return io.NodeOutput((*(prev_lora or ()), *chosen))


class InfiniteTalkSetLoras(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkSetLoras",
            "InfiniteTalk Set LoRAs",
            "Add unmerged LoRAs to a loaded model, without loading or merging anything again. "
            "They replace other unmerged LoRAs; merged ones stay.",
            group="options",
            aliases=["apply lora", "lora to model", "应用 LoRA"],
            inputs=[
                WanModelType.Input("model", tooltip="The loaded model; it is not changed, the output is a view of it."),
                LoraType.Input(
                    "lora", optional=True, tooltip="The LoRAs to use; none gives the model back as it came."
                ),
            ],
            outputs=[WanModelType.Output(display_name="model", tooltip="The same weights with these LoRAs, unmerged.")],
        )

    @classmethod
    def execute(cls, model: Any, lora: tuple[LoraSpec, ...] | None = None) -> Any:
        return io.NodeOutput(model if lora is None else model.with_loras(lora))


class InfiniteTalkBlockSwap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkBlockSwap",
            "InfiniteTalk Block Swap",
            "Keep transformer blocks in host memory and bring each to the GPU just before it runs. "
            "The numbers do not change; GPU memory is saved.",
            group="options",
            aliases=["block swap", "offload", "low vram", "显存", "块交换"],
            inputs=[
                io.Int.Input(
                    "blocks_to_swap",
                    default=20,
                    min=0,
                    max=48,
                    step=1,
                    tooltip="How many blocks live in host memory; the 14B model has 40, the 1.3B model 30. "
                    "More than the model has means all.",
                ),
                io.Boolean.Input(
                    "offload_img_emb", default=False, tooltip="Also keep the image embedding layers in host memory."
                ),
                io.Boolean.Input(
                    "offload_txt_emb", default=False, tooltip="Also keep the text embedding layers in host memory."
                ),
                io.Boolean.Input(
                    "use_non_blocking",
                    default=False,
                    optional=True,
                    tooltip="Kept for saved workflows. Copies always go through pinned memory without blocking.",
                ),
                io.Int.Input(
                    "vace_blocks_to_swap",
                    default=0,
                    min=0,
                    max=15,
                    step=1,
                    optional=True,
                    tooltip="Kept for saved workflows; VACE models are not part of this pack.",
                ),
                io.Int.Input(
                    "prefetch_blocks",
                    default=0,
                    min=0,
                    max=40,
                    step=1,
                    optional=True,
                    tooltip="How many blocks are copied ahead while one computes; each takes the memory of one block. "
                    "0 means one where a GPU can copy and compute at once.",
                ),
                io.Boolean.Input(
                    "block_swap_debug",
                    default=False,
                    optional=True,
                    tooltip="Log how long each forward waited for weights.",
                ),
            ],
            outputs=[BlockSwapType.Output(display_name="block_swap_args", tooltip="For the model loader.")],
        )

    @classmethod
    def execute(
        cls,
        blocks_to_swap: int,
        offload_img_emb: bool,
        offload_txt_emb: bool,
        use_non_blocking: bool = False,
        vace_blocks_to_swap: int = 0,
        prefetch_blocks: int = 0,
        block_swap_debug: bool = False,
    ) -> Any:
        settings = BlockSwap(
            blocks=blocks_to_swap,
            prefetch=max(1, prefetch_blocks),
            image_embedding=offload_img_emb,
            text_embedding=offload_txt_emb,
            log_waits=block_swap_debug,
        )
        return io.NodeOutput(settings)


class InfiniteTalkSetBlockSwap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkSetBlockSwap",
            "InfiniteTalk Set Block Swap",
            "Change the block swap of a loaded model without loading it again.",
            group="options",
            aliases=["block swap", "offload", "设置块交换"],
            inputs=[
                WanModelType.Input("model", tooltip="The loaded model."),
                BlockSwapType.Input(
                    "block_swap_args", optional=True, tooltip="From InfiniteTalk Block Swap; none turns swapping off."
                ),
            ],
            outputs=[WanModelType.Output(display_name="model", tooltip="The same weights with this block swap.")],
        )

    @classmethod
    def execute(cls, model: Any, block_swap_args: BlockSwap | None = None) -> Any:
        return io.NodeOutput(model.with_block_swap(block_swap_args))


class InfiniteTalkTorchCompile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkTorchCompile",
            "InfiniteTalk Torch Compile",
            "Compile the model with torch.compile, in the first step. On a GPU this pack's own elementwise kernels "
            "stay whole in compiled graphs; whether it is faster depends on the GPU. Needs Triton on a GPU.",
            group="options",
            aliases=["torch compile", "inductor", "编译"],
            inputs=[
                io.Combo.Input(
                    "backend",
                    options=["inductor", "cudagraphs"],
                    default="inductor",
                    tooltip="What torch compiles with.",
                ),
                io.Boolean.Input(
                    "fullgraph",
                    default=False,
                    tooltip="Fail when a block does not compile into one graph.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(COMPILE_MODES),
                    default="default",
                    tooltip="How much time to spend on finding faster kernels.",
                ),
                io.Boolean.Input(
                    "dynamic", default=False, tooltip="Compile once for all sizes instead of once per video size."
                ),
                io.Int.Input(
                    "dynamo_cache_size_limit",
                    default=64,
                    min=0,
                    max=1024,
                    step=1,
                    tooltip="How many variants of one function torch keeps before it stops compiling.",
                ),
                io.Boolean.Input(
                    "compile_transformer_blocks_only",
                    default=True,
                    tooltip="On: each transformer block is compiled (short compile times, works with block swap). "
                    "Off: the whole model is one compiled function.",
                ),
                io.Int.Input(
                    "dynamo_recompile_limit",
                    default=128,
                    min=0,
                    max=1024,
                    step=1,
                    optional=True,
                    tooltip="The newer name of dynamo_cache_size_limit; the larger of the two counts.",
                ),
                io.Boolean.Input(
                    "force_parameter_static_shapes",
                    default=False,
                    optional=True,
                    tooltip="Treat the shapes of the weights as fixed also when dynamic is on.",
                ),
                io.Boolean.Input(
                    "allow_unmerged_lora_compile",
                    default=False,
                    optional=True,
                    tooltip="Kept for saved workflows: unmerged LoRAs are always compiled with the weights.",
                ),
            ],
            outputs=[CompileType.Output(display_name="torch_compile_args", tooltip="For the model loader.")],
        )

    @classmethod
    def execute(
        cls,
        backend: str,
        fullgraph: bool,
        mode: str,
        dynamic: bool,
        dynamo_cache_size_limit: int,
        compile_transformer_blocks_only: bool,
        dynamo_recompile_limit: int = 128,
        force_parameter_static_shapes: bool = False,
        allow_unmerged_lora_compile: bool = False,
    ) -> Any:
        settings = CompileSettings(
            backend=backend,
            fullgraph=fullgraph,
            mode=mode,
            dynamic=dynamic,
            blocks_only=compile_transformer_blocks_only,
            variants=max(dynamo_cache_size_limit, dynamo_recompile_limit),
            static_parameter_shapes=force_parameter_static_shapes,
        )
        return io.NodeOutput(settings)


class InfiniteTalkCfgSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        def scale(input_id: str, tooltip: str) -> Any:
            return io.Float.Input(input_id, default=5.0, min=0.0, max=30.0, step=0.01, round=0.01, tooltip=tooltip)

        def percent(input_id: str, default: float, tooltip: str) -> Any:
            return io.Float.Input(input_id, default=default, min=0.0, max=1.0, step=0.01, round=0.01, tooltip=tooltip)

        return node_schema(
            "InfiniteTalkCfgSchedule",
            "InfiniteTalk CFG Schedule",
            "Guidance that changes from step to step, for the sampler's cfg.",
            group="options",
            aliases=["cfg schedule", "guidance schedule", "CFG 调度"],
            inputs=[
                io.Int.Input(
                    "steps", default=30, min=2, max=1000, step=1, tooltip="The same number as the sampler's steps."
                ),
                scale("cfg_scale_start", "Guidance at the beginning."),
                scale("cfg_scale_end", "Guidance at the end."),
                io.Combo.Input(
                    "interpolation",
                    options=["linear", "ease_in", "ease_out"],
                    default="linear",
                    tooltip="How it goes from one to the other: evenly, slow at first, or slow at last.",
                ),
                percent("start_percent", 0.0, "Where it begins; steps before have no guidance (1)."),
                percent("end_percent", 1.0, "Where it ends; steps after have no guidance (1)."),
            ],
            outputs=[io.Float.Output(display_name="float_list", tooltip="One number per step.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        steps: int,
        cfg_scale_start: float,
        cfg_scale_end: float,
        interpolation: str,
        start_percent: float,
        end_percent: float,
    ) -> Any:
        schedule = cfg_schedule(steps, cfg_scale_start, cfg_scale_end, interpolation, start_percent, end_percent)
        return io.NodeOutput(schedule)


# Setting of a preset -> type and name of the output, and its tooltip.
PRESET_OUTPUTS: dict[str, tuple[Any, str, str]] = {
    "steps": (io.Int, "steps", "For InfiniteTalk Sampler."),
    "cfg": (io.Float, "cfg", "Guidance by the prompt, for InfiniteTalk Sampler."),
    "shift": (io.Float, "shift", "For InfiniteTalk Sampler."),
    "scheduler": (ComboType, "scheduler", "For InfiniteTalk Sampler."),
    "audio_cfg": (io.Float, "audio_cfg_scale", "Guidance by speech, for InfiniteTalk Speech."),
    "quantization": (ComboType, "quantization", "For InfiniteTalk Model Loader."),
    "blocks_to_swap": (
        BlockSwapType,
        "block_swap_args",
        "For InfiniteTalk Model Loader, in place of InfiniteTalk Block Swap.",
    ),
    "tiled_vae": (io.Boolean, "tiled_vae", "For InfiniteTalk Long Video."),
    "text_encoder_device": (ComboType, "device", "For InfiniteTalk Text Encode."),
    "frames": (io.Int, "frame_window_size", "For InfiniteTalk Long Video."),
    "motion_frames": (io.Int, "motion_frame", "For InfiniteTalk Long Video."),
    "color_method": (ComboType, "colormatch", "For InfiniteTalk Long Video."),
    "mode": (ComboType, "mode", "For InfiniteTalk Long Video."),
}


class InfiniteTalkPreset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkPreset",
            "InfiniteTalk Preset",
            "Settings by name, the same as of infinitetalk generate --preset. Link the outputs to the widgets of other "
            "nodes.",
            group="options",
            aliases=["preset", "settings", "fast", "low memory", "low vram", "预设"],
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="quality",
                    tooltip="fast: few steps without guidance, for a step LoRA or a distilled model. quality: the "
                    "public settings. low-memory: these on a small GPU. stream: FlashTalk, in windows of a second.",
                )
            ],
            outputs=[kind.Output(display_name=name, tooltip=tip) for kind, name, tip in PRESET_OUTPUTS.values()],
        )

    @classmethod
    def execute(cls, preset: str) -> Any:
        values = preset_values(preset)
        values["blocks_to_swap"] = BlockSwap(blocks=values["blocks_to_swap"])
        values["text_encoder_device"] = "cpu" if values["text_encoder_device"] == "cpu" else "gpu"
        return io.NodeOutput(*(values[field] for field in PRESET_OUTPUTS))
