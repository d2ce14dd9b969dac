"""HuMo's audio branch (arXiv 2509.08519): whisper features -> 16 audio tokens per latent frame -> cross attention.

T is the number of latent frames, S the tokens of one frame, C the width of the transformer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ..errors import InputError
from ..kernels.layout import aligned_contiguous, aligned_strided
from ..kernels.rope import Grid
from .attention import attention
from .elementwise import AffineNorm, RMSNorm

__all__ = [
    "AudioCrossAttentionWrapper",
    "HuMoAudioProjModel",
    "WanHuMoCrossAttention",
    "humo_audio_window",
    "resample_features",
]


def resample_features(
    features: torch.Tensor, input_fps: float, output_fps: float, output_len: int | None = None
) -> torch.Tensor:
    """Linear interpolation in time, first and last rows kept.

    Args:
        features: [B, N, C] at `input_fps` rows per second.
        output_len: rows to return; by default int(N / input_fps * output_fps).

    Returns:
        [B, output_len, C] at `output_fps` rows per second.
    """
    length = int(features.shape[1] / input_fps * output_fps) if output_len is None else output_len
    rows = F.interpolate(features.transpose(1, 2), size=length, mode="linear", align_corners=True)
    return rows.transpose(1, 2)


def humo_audio_window(features: torch.Tensor, frame_num: int, first_frame: int = 0) -> tuple[torch.Tensor, int]:
    """The eight feature rows that each latent frame of a window attends to.

    Latent frame 0 attends to video frames f-2..f+2 behind three rows of zeros; latent frame l > 0, which stands for the
    four video frames from f+4l-3 on, to f+4l-5..f+4l+2. Rows outside the clip are zero.

    Args:
        features: [F, blocks, channels], one row per video frame.
        frame_num: video frames of the window, 4n+1.
        first_frame: f, the video frame at which the window starts.

    Returns:
        [n+1, 8, blocks, channels], and the video frame behind the window's last one.
    """
    if frame_num < 1 or (frame_num - 1) % 4:
        raise InputError(f"a window has 4n+1 video frames, not {frame_num}")
    length = int(features.shape[0])
    rows = torch.arange(8, device=features.device)
    frames = first_frame - 5 + 4 * torch.arange((frame_num - 1) // 4 + 1, device=features.device)[:, None] + rows
    inside = (frames >= 0) & (frames < length)  # [n+1, 8]
    inside[0, :3] = False
    window = features[frames.clamp(0, length - 1)]  # [n+1, 8, blocks, channels]
    return torch.where(inside[:, :, None, None], window, 0.0), first_frame + frame_num


class _Layer(nn.Module):
    """One layer under the key `<name>.layer` that HuMo's checkpoints use."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        return out


class HuMoAudioProjModel(nn.Module):
    """Whisper features of each latent frame -> audio tokens.

    Args:
        seq_len: rows per latent frame.
        blocks, channels: layers and width of the speech features.
        intermediate_dim: hidden width.
        output_dim: width of an audio token.
        context_tokens: audio tokens per latent frame.
    """

    def __init__(
        self,
        seq_len: int = 8,
        blocks: int = 5,
        channels: int = 1280,
        intermediate_dim: int = 512,
        output_dim: int = 1536,
        context_tokens: int = 16,
    ) -> None:
        super().__init__()
        self.context_tokens = context_tokens
        self.output_dim = output_dim
        self.audio_proj_glob_1 = _Layer(nn.Linear(seq_len * blocks * channels, intermediate_dim))
        self.audio_proj_glob_2 = _Layer(nn.Linear(intermediate_dim, intermediate_dim))
        self.audio_proj_glob_3 = _Layer(nn.Linear(intermediate_dim, context_tokens * output_dim))
        self.audio_proj_glob_norm = _Layer(AffineNorm(output_dim))

    def forward(self, audio_embeds: torch.Tensor) -> torch.Tensor:
        """[B, T, seq_len, blocks, channels] -> [B, T, context_tokens, output_dim], contiguous."""
        hidden = F.relu(self.audio_proj_glob_1(aligned_strided(audio_embeds.flatten(2))))  # [B, T, intermediate]
        hidden = F.relu(self.audio_proj_glob_2(aligned_strided(hidden)))
        tokens = aligned_contiguous(self.audio_proj_glob_3(aligned_strided(hidden)))
        tokens = tokens.unflatten(-1, (self.context_tokens, self.output_dim))  # [B, T, tokens, output_dim]
        return aligned_contiguous(self.audio_proj_glob_norm(tokens))


class WanHuMoCrossAttention(nn.Module):
    """Each latent frame attends to its own audio tokens; no rotary embedding, no gate.

    Args:
        in_features: width C of the image tokens.
        out_features: width of q, k, v and of the result.
        num_heads: heads; the head size is out_features / num_heads.
        kv_dim: width of the audio tokens; by default in_features.
        qk_norm: RMS norm of q and k over all channels.
        eps: of that norm.
        attention_mode: any mode of `attention`; `forward` may override it per call.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_heads: int,
        kv_dim: int | None = None,
        qk_norm: bool = True,
        eps: float = 1e-6,
        attention_mode: str = "sdpa",
    ) -> None:
        super().__init__()
        if out_features % num_heads:
            raise InputError(f"{num_heads} heads do not divide a width of {out_features}")
        self.num_heads = num_heads
        self.head_dim = out_features // num_heads
        self.attention_mode = attention_mode
        kv_dim = in_features if kv_dim is None else kv_dim
        self.q = nn.Linear(in_features, out_features)
        self.k = nn.Linear(kv_dim, out_features)
        self.v = nn.Linear(kv_dim, out_features)
        self.o = nn.Linear(out_features, out_features)
        self.norm_q = RMSNorm(out_features, eps) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(out_features, eps) if qk_norm else nn.Identity()

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        grid_sizes: torch.Tensor | Grid,
        *,
        attention_mode: str | None = None,
    ) -> torch.Tensor:
        """Attend inside every frame.

        Args:
            x: [B, T*S, C].
            context: [B, T*tokens, kv_dim].
            grid_sizes: [B, 3], all rows alike, or one (T, H, W). A tensor on a GPU is read here once, which waits for
                the GPU; the model passes ints.
            attention_mode: instead of the one given at construction.

        Returns:
            [B, T*S, out_features], contiguous.

        Raises:
            InputError: counts that do not fit together.
        """
        frames, height, width = _single_grid(grid_sizes)
        batch, tokens, per_frame = int(x.shape[0]), int(x.shape[1]), height * width
        if tokens != frames * per_frame or context.shape[0] != batch or int(context.shape[1]) % frames:
            raise InputError(
                f"image tokens {tuple(x.shape)} and audio tokens {tuple(context.shape)} do not fit a grid of "
                f"{frames}x{height}x{width}: give [B, {frames * per_frame}, C] and [B, {frames}*n, kv_dim]"
            )

        def per_frame_heads(tokens: torch.Tensor) -> torch.Tensor:
            return rearrange(aligned_contiguous(tokens), "b (t n) (h d) -> (b t) n h d", t=frames, h=self.num_heads)

        x, context = aligned_strided(x), aligned_strided(context)
        q = per_frame_heads(self.norm_q(self.q(x)))
        k = per_frame_heads(self.norm_k(self.k(context)))
        v = per_frame_heads(self.v(context))
        out = attention(q, k, v, attention_mode=attention_mode or self.attention_mode)
        out = rearrange(aligned_contiguous(out), "(b t) s h d -> b (t s) (h d)", t=frames)
        return aligned_contiguous(self.o(out))


class AudioCrossAttentionWrapper(nn.Module):
    """x + scale * audio cross attention of the normed x.

    Args:
        in_features, out_features, num_heads, qk_norm, eps, kv_dim, attention_mode: as in `WanHuMoCrossAttention`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_heads: int,
        qk_norm: bool = True,
        eps: float = 1e-6,
        kv_dim: int | None = None,
        attention_mode: str = "sdpa",
    ) -> None:
        super().__init__()
        self.audio_cross_attn = WanHuMoCrossAttention(
            in_features, out_features, num_heads, kv_dim, qk_norm, eps, attention_mode
        )
        self.norm1_audio = AffineNorm(in_features, eps=eps)

    def forward(
        self,
        x: torch.Tensor,
        audio: torch.Tensor,
        grid_sizes: torch.Tensor | Grid,
        humo_audio_scale: float = 1.0,
        *,
        attention_mode: str | None = None,
    ) -> torch.Tensor:
        """x [B, T*S, C] with audio [B, T*tokens, kv_dim] -> [B, T*S, C], contiguous. See `WanHuMoCrossAttention`."""
        x = aligned_contiguous(x)
        attended = self.audio_cross_attn(self.norm1_audio(x), audio, grid_sizes, attention_mode=attention_mode)
        return aligned_contiguous(torch.add(x, attended, alpha=humo_audio_scale))


def _single_grid(grid_sizes: torch.Tensor | Grid) -> Grid:
    grids = grid_sizes.reshape(-1, 3).tolist() if isinstance(grid_sizes, torch.Tensor) else [grid_sizes]
    rows = [(int(frames), int(height), int(width)) for frames, height, width in grids]
    if any(row != rows[0] for row in rows):
        raise InputError(f"all videos of a batch share one grid, not {rows}")
    return rows[0]
