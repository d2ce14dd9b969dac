"""A tiny Wan2.1 model in the form that ComfyUI's own loader reads, and a node that gives it a prompt.

ComfyUI's text encoder has one size; the node stands in its place.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from wanvideo_infinitetalk.wanvideo.modules.model import WanModel

MODEL = "core-wan-tiny.safetensors"
TEXT_DIM = 4096

NODE = f"""
import torch


class TinyConditioning:
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {{"required": {{"seed": ("INT", {{"default": 0}})}}}}

    def make(self, seed):
        return ([[torch.randn(1, 8, {TEXT_DIM}, generator=torch.Generator().manual_seed(seed)), {{}}]],)


NODE_CLASS_MAPPINGS = {{"TinyConditioning": TinyConditioning}}
"""


def fill_core(base: Path) -> None:
    """Write the model and the node below `base`, before ComfyUI starts."""
    torch.manual_seed(0)
    model = WanModel(
        model_type="t2v",
        in_dim=16,
        out_dim=16,
        dim=256,
        ffn_dim=128,
        freq_dim=256,
        text_dim=TEXT_DIM,
        num_heads=2,
        num_layers=2,
    )
    weights = {name: torch.randn_like(value) * 0.05 for name, value in model.state_dict().items()}
    folder = base / "models/diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / MODEL)
    (base / "custom_nodes").mkdir(exist_ok=True)
    (base / "custom_nodes/tiny_conditioning.py").write_text(NODE, encoding="utf-8")
