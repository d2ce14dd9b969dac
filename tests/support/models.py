"""A small InfiniteTalk model with random weights, and inputs for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from wanvideo_infinitetalk.wanvideo.modules.model import AudioConfig, HuMoConfig, WanConfig, WanModel

TINY_AUDIO = AudioConfig(intermediate_dim=16, output_dim=32, context_tokens=4, blocks=2, channels=8)
TINY_HUMO = HuMoConfig(blocks=2, channels=8, intermediate_dim=16, output_dim=32, context_tokens=4)
TINY = WanConfig(
    text_len=8,
    dim=64,
    ffn_dim=128,
    freq_dim=32,
    text_dim=16,
    num_heads=2,
    num_layers=2,
    clip_dim=32,
    audio=TINY_AUDIO,
)


def random_model(config: WanConfig = TINY, **arguments: Any) -> WanModel:
    """Every parameter random, the last layer and the biases too, so that nothing hides behind a zero."""
    model = WanModel(config, **arguments)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 and "modulation" not in name else 25
        center = float("norm" in name and name.endswith("weight"))
        nn.init.normal_(parameter, std=fan_in**-0.5, generator=generator)
        parameter.data += center
    return model.eval().requires_grad_(False)


def random_inputs(
    config: WanConfig = TINY, *, speakers: int = 1, grid: tuple[int, int, int] = (3, 4, 6), batch: int | None = None
) -> dict[str, Any]:
    """Keyword arguments of `WanModel.forward`; without a batch the latents have four dimensions."""
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    lead = () if batch is None else (batch,)
    latents = (grid[0], 2 * grid[1], 2 * grid[2])
    given: dict[str, Any] = {
        "x": random(*lead, 16, *latents),
        "t": torch.tensor([876.5]),
        "context": random(5, config.text_dim),
    }
    if config.in_dim > 16:
        given["y"] = random(batch or 1, config.in_dim - 16, *latents)
    if config.model_type == "i2v":
        given["clip_fea"] = random(1, 7, config.clip_dim)
    if config.audio is not None and speakers:
        c = config.audio
        given["audio"] = random(speakers, c.vae_scale * (grid[0] - 1) + 1, c.audio_window, c.blocks, c.channels)
    if config.audio is not None and speakers > 1:
        given["ref_target_masks"] = speaker_masks(speakers, *latents[1:])
    if config.humo is not None:
        h = config.humo
        given["humo_audio"] = random(grid[0], h.seq_len, h.blocks, h.channels)
    return given


def speaker_masks(speakers: int, rows: int, columns: int) -> torch.Tensor:
    """One upright strip per speaker with a gap of one column, and what remains for the background."""
    masks = torch.zeros(speakers + 1, rows, columns)
    for i in range(speakers):
        masks[i, :, i * columns // speakers : (i + 1) * columns // speakers - 1] = 1
    masks[-1] = 1 - masks[:-1].amax(0)
    return masks
