"""Speech in the transformer: audio tokens, the cross attention to them, and which speaker an image token attends to.

The names, arguments and state-dict keys are those of MeiGen-AI's MultiTalk (arXiv 2505.22647) and InfiniteTalk
(arXiv 2508.14033). T is the number of latent frames, S = H*W the tokens of one frame; tokens are ordered frame, row,
column. C is the width of the transformer, Ca that of the audio tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ..wanvideo.errors import InputError
from ..wanvideo.kernels.layout import aligned_contiguous, aligned_strided
from ..wanvideo.kernels.linear import Activations, QuantizedRows
from ..wanvideo.kernels.rope import Grid, Rotation, rotate, rotation_1d
from ..wanvideo.linear.base import read_rows
from ..wanvideo.modules.attention import attention
from ..wanvideo.modules.elementwise import AffineNorm
from ..wanvideo.runtime.parallel import TokenSplit

__all__ = [
    "AudioProjModel",
    "RotaryPositionalEmbedding1D",
    "SingleStreamAttention",
    "SingleStreamMultiAttention",
    "calculate_x_ref_attn_map",
    "get_attn_map_with_target",
    "pack_audio_windows",
    "speaker_ranges",
]

MAP_CHUNK_BYTES = 256 * 2**20
"""Float32 scores that the reference attention map holds at once."""


# --------------------------------------------------------------------------------------------- audio tokens


def pack_audio_windows(audio: torch.Tensor, vae_scale: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort the audio windows of video frames into latent frames.

    Frame 0 is a latent frame by itself and keeps its whole window. Each later latent frame stands for `vae_scale`
    video frames: of the first it takes the window up to its center, of the last from its center on, of those between
    the center only. Five rows and four frames give 3 + 1 + 1 + 3 = 8 rows.

    Args:
        audio: [speakers, vae_scale*(T-1)+1, window, blocks, channels].
        vae_scale: video frames per latent frame.

    Returns:
        first [speakers, 1, window, blocks, channels] and
        later [speakers, T-1, window+vae_scale-1, blocks, channels].

    Raises:
        InputError: the number of frames is not vae_scale*n + 1, or the window is even.
    """
    frames, window = int(audio.shape[1]), int(audio.shape[2])
    if (frames - 1) % vae_scale or not window % 2:
        raise InputError(
            f"audio covers {frames} frames with windows of {window}: give {vae_scale}*n+1 frames and an odd window"
        )
    center = window // 2
    groups = rearrange(audio[:, 1:], "n (t frame) w b c -> n t frame w b c", frame=vae_scale)
    opening = groups[:, :, 0, : center + 1]
    between = groups[:, :, 1:-1, center]
    closing = groups[:, :, -1, center:]
    return audio[:, :1], torch.cat((opening, between, closing), dim=2)


class AudioProjModel(nn.Module):
    """Audio windows of each latent frame -> a few audio tokens per latent frame.

    Args:
        seq_len: rows in the window of the first frame.
        seq_len_vf: rows in the window of every later latent frame.
        blocks, channels: layers and width of the speech encoder.
        intermediate_dim: hidden width.
        output_dim: width Ca of an audio token.
        context_tokens: audio tokens per latent frame.
        norm_output_audio: end with a LayerNorm (eps 1e-5). InfiniteTalk's checkpoints have it.
    """

    def __init__(
        self,
        seq_len: int = 5,
        seq_len_vf: int = 8,
        blocks: int = 12,
        channels: int = 768,
        intermediate_dim: int = 512,
        output_dim: int = 768,
        context_tokens: int = 32,
        norm_output_audio: bool = True,
    ) -> None:
        super().__init__()
        self.context_tokens = context_tokens
        self.output_dim = output_dim
        self.proj1 = nn.Linear(seq_len * blocks * channels, intermediate_dim)
        self.proj1_vf = nn.Linear(seq_len_vf * blocks * channels, intermediate_dim)
        self.proj2 = nn.Linear(intermediate_dim, intermediate_dim)
        self.proj3 = nn.Linear(intermediate_dim, context_tokens * output_dim)
        self.norm = AffineNorm(output_dim) if norm_output_audio else nn.Identity()

    def forward(self, audio_embeds: torch.Tensor, audio_embeds_vf: torch.Tensor) -> torch.Tensor:
        """Project the first frame and the later ones, then all together.

        Args:
            audio_embeds: [B, 1, seq_len, blocks, channels], the first video frame.
            audio_embeds_vf: [B, T-1, seq_len_vf, blocks, channels], the later latent frames; T-1 may be 0.

        Returns:
            [B, T, context_tokens, output_dim], contiguous.
        """
        first = F.relu(self.proj1(aligned_strided(audio_embeds.flatten(2))))  # [B, 1, intermediate]
        later = F.relu(self.proj1_vf(aligned_strided(audio_embeds_vf.flatten(2))))  # [B, T-1, intermediate]
        frames = torch.cat((first, later), dim=1)  # [B, T, intermediate], fresh
        hidden = F.relu(self.proj2(frames))
        tokens = aligned_contiguous(self.proj3(aligned_strided(hidden)))
        return aligned_contiguous(self.norm(rearrange(tokens, "b t (n c) -> b t n c", c=self.output_dim)))


# --------------------------------------------------------------------------------------- who speaks where


def speaker_ranges(speakers: int, class_range: int = 24, class_interval: int = 4) -> list[tuple[float, float]]:
    """The range of rotary positions of each speaker: one half of them from 0 upwards, the rest up to `class_range`.

    Two speakers get [0, 4] and [20, 24] as in the public code. That code gives three and more the ranges
    [4i, 4i+4], so that the third touches the background's position 12 and the fourth begins on it. Here every range
    keeps at least half an interval from the background, and a gap from its neighbor: three get [0, 4], [6, 10],
    [20, 24] and four [0, 4], [6, 10], [14, 18], [20, 24]. No released checkpoint was trained on more than two.

    Raises:
        InputError: the speakers do not fit into `class_range`.
    """
    background = class_range / 2
    room = background - class_interval / 2  # on each side of the background
    lower, upper = (speakers + 1) // 2, speakers // 2
    if speakers < 1 or lower * class_interval > room:
        raise InputError(
            f"{speakers} speakers do not fit into {class_range} rotary positions of {class_interval} each: "
            f"give 1 to {max(1, 2 * int(room // class_interval))} speakers"
        )

    def starts(count: int) -> list[float]:
        pitch = (room - class_interval) / max(1, count - 1)
        return [i * pitch for i in range(count)]

    below = [(start, start + class_interval) for start in starts(lower)]
    above = [(class_range - start - class_interval, class_range - start) for start in reversed(starts(upper))]
    return below + above


class RotaryPositionalEmbedding1D(nn.Module):
    """Rotary embedding of real-valued positions over the whole head (base 10000, interleaved pairs)."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def forward(self, x: torch.Tensor, pos_indices: torch.Tensor) -> torch.Tensor:
        """x [B, H, S, D] with positions [S] -> [B, H, S, D], contiguous, of x's dtype."""
        cos, sin = rotation_1d(pos_indices, self.head_dim)  # [S, 1, D/2]
        return rotate(x, Rotation(cos.squeeze(1), sin.squeeze(1)))


def calculate_x_ref_attn_map(
    visual_q: torch.Tensor, ref_k: torch.Tensor, ref_target_masks: torch.Tensor, split_num: int = 4
) -> torch.Tensor:
    """How much each image token attends to each marked area of the reference frame, averaged over all heads.

    map[c, token] = mean over heads of sum_s p[token, s] mask[c, s] / sum_s mask[c, s], where p is the softmax over the
    reference keys of q k / sqrt(D), in float32. The rows of an empty mask are zero. The public code averages over two
    halves of the heads and so drops the last one when their number is odd; here every head counts.

    Args:
        visual_q: [1, L, H, D], after norm and rotary embedding.
        ref_k: [1, S, H, D], the keys of the reference frame.
        ref_target_masks: [classes, S], above 0 inside the area.
        split_num: the queries are taken in at least so many chunks, in more where the scores would exceed
            `MAP_CHUNK_BYTES`. Without effect on the numbers.

    Returns:
        [classes, L] float32.

    Raises:
        InputError: shapes that do not fit together, or more than one video in the batch.
    """
    batch, tokens, heads, head_dim = (int(n) for n in visual_q.shape)
    keys = int(ref_k.shape[1])
    if batch != 1 or ref_k.shape != (1, keys, heads, head_dim) or int(ref_target_masks.shape[1]) != keys:
        raise InputError(
            f"attention map of queries {tuple(visual_q.shape)}, reference keys {tuple(ref_k.shape)} and masks "
            f"{tuple(ref_target_masks.shape)}: give [1, L, H, D], [1, S, H, D] and [classes, S]"
        )
    scale = float(head_dim) ** -0.5
    masks = aligned_contiguous(ref_target_masks.float())
    area = masks.sum(-1, keepdim=True)
    weights = torch.where(area > 0, masks / area, 0.0)  # [classes, S]; the guarded 0/0 is not taken

    q = aligned_strided(visual_q.squeeze(0))  # [L, H, D]
    k = aligned_strided(ref_k.squeeze(0)).float().transpose(0, 1)  # [H, S, D]
    rows = max(1, min(-(-tokens // max(1, split_num)), MAP_CHUNK_BYTES // (heads * keys * 4)))
    chunks = []
    for start in range(0, tokens, rows):
        chunk = q[start : start + rows].float().transpose(0, 1)  # [H, rows, D]
        shares = torch.softmax(torch.matmul(chunk, k.transpose(-1, -2)) * scale, dim=-1)  # [H, rows, S]
        chunks.append(torch.matmul(weights, shares.mean(0).transpose(0, 1)))  # [classes, rows]
    return torch.cat(chunks, dim=1)


def get_attn_map_with_target(
    visual_q: torch.Tensor,
    ref_k: torch.Tensor,
    shape: Grid,
    ref_target_masks: torch.Tensor | None = None,
    split_num: int = 2,
) -> torch.Tensor:
    """`calculate_x_ref_attn_map` against the first latent frame of a clip.

    Args:
        visual_q, ref_k: [1, T*S, H, D], queries and keys of the self attention.
        shape: latent frames, token rows, token columns; ints, or one-element tensors, which are read here.
        ref_target_masks: [classes, S]; must be given.
        split_num: see `calculate_x_ref_attn_map`.

    Returns:
        [classes, T*S] float32.
    """
    if ref_target_masks is None:
        raise InputError("the attention map needs ref_target_masks: one mask per speaker and one for the background")
    _, height, width = (int(n) for n in shape)
    return calculate_x_ref_attn_map(visual_q, ref_k[:, : height * width], ref_target_masks, split_num)


# ------------------------------------------------------------------------------------ audio cross attention


class SingleStreamAttention(nn.Module):
    """Each latent frame of the video attends to its own audio tokens.

    Args:
        dim: width C of the image tokens.
        encoder_hidden_states_dim: width Ca of the audio tokens.
        num_heads: heads; the head size is dim / num_heads.
        qkv_bias: biases of the query and key/value layers.
        attention_mode: any mode of `attention`; `forward` may override it per call.
    """

    def __init__(
        self,
        dim: int,
        encoder_hidden_states_dim: int,
        num_heads: int,
        qkv_bias: bool,
        attention_mode: str = "sdpa",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise InputError(f"{num_heads} heads do not divide a width of {dim}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.attention_mode = attention_mode
        self.q_linear = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv_linear = nn.Linear(encoder_hidden_states_dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def reads_rows(self, device: torch.device) -> bool:
        """Whether `forward` takes its tokens quantized per row."""
        return read_rows(device, self.q_linear)

    def forward(
        self,
        x: Activations,
        encoder_hidden_states: torch.Tensor,
        shape: Grid,
        *,
        attention_mode: str | None = None,
    ) -> torch.Tensor:
        """Attend inside every frame.

        Args:
            x: [1, T*S, C], or quantized per row where `reads_rows` says so.
            encoder_hidden_states: [T, tokens, Ca], or one frame less: a frame without audio (a reference frame at the
                end) then receives exactly zero. The public single-speaker code raises there.
            shape: latent frames, token rows, token columns; ints, or one-element tensors, which are read here.
            attention_mode: instead of the one given at construction.

        Returns:
            [1, T*S, C], contiguous.

        Raises:
            InputError: token counts that do not fit `shape`, or audio for too few or too many frames.
        """
        return self._attend(x, encoder_hidden_states, shape, attention_mode)

    def _attend(
        self,
        x: Activations,
        audio: torch.Tensor,
        shape: Grid,
        attention_mode: str | None,
        q_positions: torch.Tensor | None = None,
        k_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`forward` with optional rotary positions of the queries [at least T'*S] and of one frame's keys [tokens].

        T' is the number of frames that have audio [T', tokens, Ca].
        """
        frames, height, width = (int(n) for n in shape)
        per_frame = height * width
        voiced = int(audio.shape[0])
        if x.shape[0] != 1 or x.shape[1] != frames * per_frame or not max(1, frames - 1) <= voiced <= frames:
            raise InputError(
                f"image tokens {tuple(x.shape)} on a grid of {frames}x{height}x{width} with audio for {voiced} "
                f"frames: give [1, {frames * per_frame}, C] and audio for {frames} frames, or for one less"
            )
        voiced_tokens = voiced * per_frame
        x = x.first(voiced_tokens) if isinstance(x, QuantizedRows) else aligned_strided(x[:, :voiced_tokens])
        q = rearrange(self.q_linear(x), "1 (t s) (h d) -> t s h d", t=voiced, h=self.num_heads)
        kv = self.kv_linear(aligned_strided(audio))
        k, v = rearrange(kv, "t n (kv h d) -> kv t n h d", kv=2, h=self.num_heads)
        if q_positions is not None and k_positions is not None:
            cos, sin = rotation_1d(q_positions[:voiced_tokens], self.head_dim)  # [T'*S, 1, D/2]
            angles = (rearrange(table, "(t s) 1 d -> t s 1 d", t=voiced) for table in (cos, sin))
            q = rotate(q, Rotation(*angles))
            k = rotate(k, rotation_1d(k_positions, self.head_dim))

        mode = attention_mode or self.attention_mode
        out = attention(aligned_strided(q), aligned_strided(k), aligned_strided(v), attention_mode=mode)
        out = aligned_contiguous(self.proj(rearrange(aligned_contiguous(out), "t s h d -> 1 (t s) (h d)")))
        if voiced < frames:
            out = F.pad(out, (0, 0, 0, (frames - voiced) * per_frame))  # [1, T*S, C], zeros behind
        return out


class SingleStreamMultiAttention(SingleStreamAttention):
    """Each latent frame attends to the audio tokens of all speakers; rotary positions tie image areas to speakers.

    An image token that looks most like speaker i gets a position inside that speaker's range, and the audio tokens of
    speaker i stand at the center of the same range (label rotary embedding, arXiv 2505.22647, section 3.3). Background
    tokens stand at class_range / 2. See `speaker_ranges` for where three and four speakers differ from the public code.

    Args:
        dim, num_heads, qkv_bias, encoder_hidden_states_dim, attention_mode: as in `SingleStreamAttention`.
        class_range: rotary positions in all.
        class_interval: width of one speaker's range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        encoder_hidden_states_dim: int = 768,
        class_range: int = 24,
        class_interval: int = 4,
        attention_mode: str = "sdpa",
    ) -> None:
        super().__init__(dim, encoder_hidden_states_dim, num_heads, qkv_bias, attention_mode)
        self.class_range = class_range
        self.class_interval = class_interval

    def forward(
        self,
        x: Activations,
        encoder_hidden_states: torch.Tensor,
        shape: Grid,
        x_ref_attn_map: torch.Tensor | None = None,
        human_num: int | None = None,
        *,
        attention_mode: str | None = None,
        split: TokenSplit | None = None,
    ) -> torch.Tensor:
        """Attend inside every frame, to one speaker or to several.

        Args:
            x: [1, T*S, C], or quantized per row where `reads_rows` says so.
            encoder_hidden_states: [1, T, n*tokens, Ca], the speakers one after the other; or one frame less (see
                `SingleStreamAttention.forward`), the map may then cover T or T-1 frames.
            shape: latent frames, token rows, token columns.
            x_ref_attn_map: [n+1, T*S], the background last. Without it every token attends to every speaker alike.
                Not read when there is one speaker: there is nothing to route.
            human_num: the number of speakers n; by default read off the map, and 1 without one.
            attention_mode: instead of the one given at construction.
            split: how image tokens are divided among processes, where x and the map are a share of them.

        Returns:
            [1, T*S, C], contiguous.

        Raises:
            InputError: shapes or a number of speakers that do not fit.
        """
        if encoder_hidden_states.ndim != 4 or encoder_hidden_states.shape[0] != 1:
            raise InputError(f"audio tokens {tuple(encoder_hidden_states.shape)}: give [1, T, n*tokens, Ca]")
        audio = encoder_hidden_states.squeeze(0)  # [T, n*tokens, Ca]
        if human_num is None:
            human_num = 1 if x_ref_attn_map is None else int(x_ref_attn_map.shape[0]) - 1
        if human_num == 1 or x_ref_attn_map is None:
            return self._attend(x, audio, shape, attention_mode)

        tokens = int(audio.shape[1])
        if int(x_ref_attn_map.shape[0]) != human_num + 1 or tokens % human_num:
            raise InputError(
                f"{human_num} speakers with {int(x_ref_attn_map.shape[0])} attention maps and {tokens} audio tokens: "
                f"give {human_num + 1} maps (the background last) and the same number of tokens for each speaker"
            )
        voiced = int(audio.shape[0]) * int(shape[1]) * int(shape[2])
        return self._attend(
            x,
            audio,
            shape,
            attention_mode,
            q_positions=self.query_positions(x_ref_attn_map[:, :voiced], split),
            k_positions=self.key_positions(human_num, tokens // human_num, audio.device),
        )

    def query_positions(self, x_ref_attn_map: torch.Tensor, split: TokenSplit | None = None) -> torch.Tensor:
        """Maps of the speakers and of the background [n+1, L] -> rotary position of every image token [L] float32.

        Each speaker's row is stretched to that speaker's range; a token takes the value of its largest row.
        """
        maps = x_ref_attn_map.float()
        speakers = int(maps.shape[0]) - 1
        ranges = speaker_ranges(speakers, self.class_range, self.class_interval)
        lowest, highest = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
        if split is not None:
            lowest, highest = split.lowest(lowest), split.highest(highest)
        stretched = (maps - lowest) / (highest - lowest + 1e-8)  # [n+1, L] in [0, 1]
        rows = [stretched[i] * (high - low) + low for i, (low, high) in enumerate(ranges)]
        rows.append(torch.full_like(rows[0], self.class_range / 2))
        return torch.stack(rows).gather(0, maps.argmax(0, keepdim=True)).squeeze(0)

    def key_positions(self, speakers: int, tokens: int, device: torch.device | str | None = None) -> torch.Tensor:
        """The center of each speaker's range, for each of that speaker's tokens: [speakers*tokens] float32."""
        ranges = speaker_ranges(speakers, self.class_range, self.class_interval)
        return torch.cat([torch.full((tokens,), (low + high) / 2, device=device) for low, high in ranges])
