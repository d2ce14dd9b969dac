"""The demo's transformer: its widths, and a forward for batches with gradients.

`WanModel.forward` takes one video with speech at a time. `velocity` runs the same modules on many: the frames of all
videos stand one after the other where the audio attention wants the frames of one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...cli import tiny_models as tiny
from ...multitalk.multitalk import pack_audio_windows
from ...wanvideo.kernels.rope import Grid, Rotation
from ...wanvideo.modules.attention import attention
from ...wanvideo.modules.elementwise import gated_residual, modulated_norm, qk_norm_rope
from ...wanvideo.modules.model import AudioConfig, WanBlock, WanConfig, WanModel

__all__ = ["CONFIG", "new_model", "split_state", "velocity"]

CONFIG = WanConfig(
    dim=192,
    ffn_dim=384,
    num_heads=3,
    num_layers=6,
    text_dim=tiny.TEXT_DIM,
    clip_dim=tiny.TALKING_CLIP_DIM,
    audio=AudioConfig(
        intermediate_dim=128, output_dim=64, context_tokens=8, blocks=tiny.AUDIO_LAYERS, channels=tiny.AUDIO_DIM
    ),
)


def new_model(config: WanConfig = CONFIG) -> WanModel:
    """An untrained model in float32: what enters the residual stream starts small, the last layer at zero."""
    model = WanModel(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or "modulation" in name:
            continue
        nn.init.xavier_uniform_(parameter.view(parameter.shape[0], -1))
        if name.endswith(("self_attn.o.weight", "cross_attn.o.weight", "audio_cross_attn.proj.weight", "ffn.2.weight")):
            parameter.data *= (2 * config.num_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") and "norm" not in name and "img_emb" not in name:
            nn.init.zeros_(parameter)
    nn.init.zeros_(model.head.head.weight)
    return model


def split_state(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the transformer's tensors, the InfiniteTalk adapter's), as the public files divide them."""
    adapter = {n: t for n, t in state.items() if n.startswith("audio_proj.") or ".audio_cross_attn." in n}
    adapter |= {n: t for n, t in state.items() if ".norm_x." in n}
    return {n: t for n, t in state.items() if n not in adapter}, adapter


def velocity(
    model: WanModel,
    x: Tensor,
    t: Tensor,
    text: Tensor,
    clip: Tensor,
    y: Tensor,
    audio: Tensor,
    masks: Tensor | None = None,
) -> Tensor:
    """Velocities of B videos, as `WanModel.forward` gives them one by one.

    Args:
        x: [B, 16, T, h, w]. t: [B], 0 to 1000. text: [n, text_dim], one prompt for all.
        clip: [B, 257, clip_dim]. y: [B, 20, T, h, w].
        audio: [B, speakers, 4*(T-1)+1, 5, layers, channels].
        masks: [B, speakers+1, H*W] of 0 and 1, for several speakers.
    """
    batch, speakers = int(x.shape[0]), int(audio.shape[1])
    latents = model._with_condition(x, y)
    grid = model.patch_embedding.grid(latents)
    time, block_time = model.embed_time(t, batch)
    prompt = model.embed_text(text, 1)  # [1, text_len, C]
    image = model.embed_clip(clip, batch)
    first, later = pack_audio_windows(audio.flatten(0, 1))
    speech = model.audio_proj(first, later).unflatten(0, (batch, speakers))  # [B, speakers, T, tokens, Ca]
    speech = speech.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # [B*T, speakers*tokens, Ca]
    rotation = model._rotations.get(grid, x.device)
    tokens = model.patch_embedding(latents)
    for block in model.blocks:
        assert isinstance(block, WanBlock)
        tokens = _block(block, tokens, block_time, prompt, image, speech, rotation, grid, speakers, masks)
    return model._unpatchify(model.head(tokens, time), grid).to(x.dtype)


def _block(
    block: WanBlock,
    x: Tensor,
    time: Tensor,
    prompt: Tensor,
    image: Tensor | None,
    speech: Tensor,
    rotation: Rotation,
    grid: Grid,
    speakers: int,
    masks: Tensor | None,
) -> Tensor:
    batch = int(x.shape[0])
    shift1, scale1, gate1, shift2, scale2, gate2 = (block.modulation.float() + time).split(1, dim=1)

    own = block.self_attn
    normed = modulated_norm(x, shift1, scale1, block.eps)
    q, k = qk_norm_rope(
        own.q(normed), own.k(normed), own.norm_q.weight, own.norm_k.weight, rotation, own.num_heads, own.norm_q.eps
    )
    v = own.v(normed).unflatten(-1, (own.num_heads, -1))
    x = gated_residual(x, own.o(attention(q, k, v, attention_mode="sdpa").flatten(2)), gate1)

    cross = block.cross_attn
    q_text = cross._heads(cross.norm_q(cross.q(block.norm3(x))))
    k_text, v_text = cross._heads(cross.norm_k(cross.k(prompt))), cross._heads(cross.v(prompt))
    k_text, v_text = (part.expand(batch, -1, -1, -1) for part in (k_text, v_text))
    out = attention(q_text, k_text, v_text, attention_mode="sdpa")
    if image is not None:
        k_img, v_img = cross._heads(cross.norm_k_img(cross.k_img(image))), cross._heads(cross.v_img(image))
        out = out + attention(q_text, k_img, v_img, attention_mode="sdpa")
    x = x + cross.o(out.flatten(2))

    listen = block.audio_cross_attn
    q_places = k_places = None
    if masks is not None and speakers > 1:
        with torch.no_grad():
            maps = _reference_maps(q, k, grid, masks)  # [B, speakers+1, L]
            q_places = torch.cat([listen.query_positions(m) for m in maps.unbind(0)])
            k_places = listen.key_positions(speakers, int(speech.shape[1]) // speakers, x.device)
    frames = (batch * grid[0], grid[1], grid[2])
    every = block.norm_x(x).flatten(0, 1).unsqueeze(0)  # [1, B*L, C]
    x = x + listen._attend(every, speech, frames, "sdpa", q_places, k_places).view_as(x)

    normed = modulated_norm(x, shift2, scale2, block.eps)
    return gated_residual(x, block.ffn(normed), gate2)


def _reference_maps(q: Tensor, k: Tensor, grid: Grid, masks: Tensor) -> Tensor:
    """`multitalk.get_attn_map_with_target` of each video: [B, classes, L] of q, k [B, L, H, D], masks [B, n, S]."""
    reference = k[:, : grid[1] * grid[2]].float()
    scores = torch.einsum("blhd,bshd->bhls", q.float(), reference) * q.shape[-1] ** -0.5
    shares = torch.softmax(scores, dim=-1).mean(1)  # [B, L, S]
    area = masks.sum(-1, keepdim=True)
    weights = torch.where(area > 0, masks / area.clamp(min=1), 0.0)
    return torch.einsum("bcs,bls->bcl", weights, shares)
