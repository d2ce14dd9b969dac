"""Which kernels run: the policy over steps, and the doctor's look at this machine."""

from __future__ import annotations

import io as text_io
from typing import Any

from ..pipeline.attention_policy import POLICIES
from . import comfyui
from .comfyui import io
from .models import VideoModel
from .schema import WanModelType, node_schema

REPORT_WIDTH = 180  # characters


class InfiniteTalkAttentionPolicy(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkAttentionPolicy",
            "InfiniteTalk Attention Policy",
            "Which steps use the loader's attention mode, and which a more exact one.",
            group="options",
            aliases=["attention policy", "sage attention steps", "fp4 steps", "注意力策略"],
            inputs=[
                WanModelType.Input("model", tooltip="From InfiniteTalk Model Loader."),
                io.Combo.Input(
                    "attention_policy",
                    options=list(POLICIES),
                    default="default",
                    tooltip="default: FP4 modes run the first and last step in FP8. ends_16bit: all low-precision "
                    "modes run them in 16 bits. uniform: the chosen mode in every step.",
                ),
            ],
            outputs=[WanModelType.Output(display_name="model", tooltip="The same model with this policy.")],
        )

    @classmethod
    def execute(cls, model: VideoModel, attention_policy: str) -> Any:
        return io.NodeOutput(model.with_attention_policy(attention_policy))


class InfiniteTalkAttentionDoctor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkAttentionDoctor",
            "InfiniteTalk Attention Doctor",
            "Try every attention mode and quantization on this machine: what runs, how exact, how fast, and what to "
            "install for better. Connect the report to Preview Any.",
            group="options",
            aliases=["doctor", "diagnose", "sageattention test", "misaligned address", "诊断"],
            inputs=[
                io.Combo.Input(
                    "device",
                    options=["gpu", "cpu"],
                    default="gpu",
                    tooltip="What to examine; gpu is the CPU where ComfyUI runs on the CPU.",
                )
            ],
            outputs=[io.String.Output(display_name="report", tooltip="The tables that infinitetalk doctor prints.")],
        )

    @classmethod
    def execute(cls, device: str) -> Any:
        from rich.console import Console

        from ..cli.doctor import examine
        from ..cli.terminal import doctor_tables

        with comfyui.ordinary_tensors():
            report = examine(comfyui.device(device))
        page = text_io.StringIO()
        Console(file=page, width=REPORT_WIDTH).print(*doctor_tables(report), sep="\n")
        return io.NodeOutput(page.getvalue())
