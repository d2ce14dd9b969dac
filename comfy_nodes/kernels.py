"""Which kernels run: the policy over steps, and the doctor's look at this machine."""

from __future__ import annotations

import io as text_io
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..pipeline.attention_policy import POLICIES
from ..wanvideo.modules.attention import ATTENTION_MODES, attention, mode_for_role
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


class InfiniteTalkAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkAttention",
            "InfiniteTalk Attention",
            "Run a model of ComfyUI's own loaders with the attention of this pack: its modes, its checks of every "
            "call, and one copy where a kernel's requirement is not met.",
            group="options",
            aliases=["attention", "sage attention", "patch model attention", "misaligned address", "注意力"],
            inputs=[
                io.Model.Input("model", tooltip="From Load Diffusion Model; it is not changed, the output is a copy."),
                io.Combo.Input(
                    "attention_mode",
                    options=list(ATTENTION_MODES),
                    default="auto",
                    tooltip="How self-attention is computed; attention to text, image and speech runs in 16 bits in "
                    "the low-precision modes. auto chooses the fastest that is known to be right on this GPU.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The same weights with this attention.")],
        )

    @classmethod
    def execute(cls, model: Any, attention_mode: str) -> Any:
        return io.NodeOutput(comfyui.with_attention(model, partial(core_attention, attention_mode)))


def core_attention(
    mode: str,
    core: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **options: Any,
) -> Tensor:
    """One attention call of a core model through this pack's entry point.

    Args:
        core: what ComfyUI would have called. It computes what the entry point does not: fewer heads of k and v than of
            q, and half precision that is to be computed in float32.
        q, k, v: [B, L, heads * D], or [B, heads, L, D] with `skip_reshape`.

    Returns:
        [B, L, heads * D], or [B, heads, L, D] with `skip_output_reshape`.
    """
    if options.get("enable_gqa") or (attn_precision == torch.float32 and q.dtype != torch.float32):
        layout = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
        return core(q, k, v, heads, mask=mask, attn_precision=attn_precision, **layout, **options)
    q, k, v = (x.transpose(1, 2) if skip_reshape else x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    low = q.shape[1] == k.shape[1] and options.get("low_precision_attention", True)
    if mask is not None and mask.ndim == 3:  # [B, Lq, Lk]
        mask = mask.unsqueeze(1)
    out = attention(q, k, v, mode_for_role(mode, "self" if low else "text"), mask, options.get("scale"))
    return out.transpose(1, 2) if skip_output_reshape else out.flatten(2)


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
