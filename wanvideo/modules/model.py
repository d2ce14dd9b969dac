"""The diffusion transformer of Wan2.1 (arXiv 2503.20314), with InfiniteTalk's or HuMo's audio layers when it has them.

    latents -> tokens -> blocks (self attention, text and image attention, audio attention, FFN) -> velocity

B is the batch, T x H x W the grid of tokens (T latent frames, H = h/2 rows, W = w/2 columns), L = T*H*W, C = `dim`.
Module names are the keys of the public checkpoints. The grid is a tuple of Python ints from the patch embedding on, and
nothing in a forward waits for the GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ...multitalk.multitalk import (
    AudioProjModel,
    SingleStreamMultiAttention,
    get_attn_map_with_target,
    pack_audio_windows,
)
from ..errors import InputError
from ..kernels.linear import Activations
from ..kernels.rope import Grid, Rotation, RotationTables
from ..linear.base import read_rows
from ..runtime.parallel import ALONE, Mesh, TokenSplit, check_tokens
from .attention import AttentionMode, attention, resolve_mode
from .elementwise import (
    AffineNorm,
    RMSNorm,
    add,
    add_affine_norm,
    add_modulated_norm,
    gated_residual,
    gelu,
    modulated_norm,
    qk_norm_rope,
)
from .humo import AudioCrossAttentionWrapper, HuMoAudioProjModel, WanHuMoCrossAttention
from .techniques import BlockResidual, NormalizedAttention, cross_frame_gain, normalized_guidance

__all__ = [
    "AudioConfig",
    "AudioCrossAttentionWrapper",
    "HuMoAudioProjModel",
    "HuMoConfig",
    "KeysValues",
    "WanBlock",
    "WanConfig",
    "WanHuMoCrossAttention",
    "WanModel",
    "timestep_sinusoid",
]


# -------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class AudioConfig:
    """InfiniteTalk's audio layers.

    Attributes:
        audio_window: rows of speech features per video frame.
        intermediate_dim, output_dim, context_tokens, norm_output_audio, blocks, channels: see `AudioProjModel`.
        vae_scale: video frames per latent frame.
        class_range, class_interval: see `SingleStreamMultiAttention`.
    """

    audio_window: int = 5
    intermediate_dim: int = 512
    output_dim: int = 768
    context_tokens: int = 32
    vae_scale: int = 4
    norm_output_audio: bool = True
    blocks: int = 12
    channels: int = 768
    class_range: int = 24
    class_interval: int = 4


@dataclass(frozen=True)
class HuMoConfig:
    """HuMo's audio layers, see `HuMoAudioProjModel`; the cross attention reads tokens of `output_dim`."""

    seq_len: int = 8
    blocks: int = 5
    channels: int = 1280
    intermediate_dim: int = 512
    output_dim: int = 1536
    context_tokens: int = 16


@dataclass(frozen=True)
class WanConfig:
    """Shapes of one model; the defaults are those of 14B I2V without audio.

    Attributes:
        model_type: "t2v", or "i2v", which also attends to CLIP tokens of an image.
        patch_size: latent frames, rows, columns per token.
        text_len: text tokens; shorter prompts are padded with zeros, which are attended.
        in_dim: channels of latents and condition together. out_dim: channels of the velocity.
        dim, ffn_dim, num_heads, num_layers: of the blocks.
        freq_dim: channels of the timestep's sinusoid. text_dim, clip_dim: widths of text and CLIP tokens.
        eps: of the norms inside the blocks.
        audio: InfiniteTalk's or MultiTalk's layers. humo: HuMo's. At most one of them.
    """

    model_type: str = "i2v"
    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_len: int = 512
    in_dim: int = 36
    dim: int = 5120
    ffn_dim: int = 13824
    freq_dim: int = 256
    text_dim: int = 4096
    out_dim: int = 16
    num_heads: int = 40
    num_layers: int = 40
    eps: float = 1e-6
    audio: AudioConfig | None = None
    humo: HuMoConfig | None = None
    clip_dim: int = 1280

    def __post_init__(self) -> None:
        if self.model_type not in ("t2v", "i2v"):
            raise InputError(f"model_type is '{self.model_type}': choose 't2v' or 'i2v'")
        if self.dim % self.num_heads or self.head_dim % 2:
            raise InputError(f"{self.num_heads} heads do not divide a width of {self.dim} into even head sizes")
        if self.audio is not None and self.humo is not None:
            raise InputError("a model has the audio layers of InfiniteTalk or of HuMo, not both")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @classmethod
    def from_public(cls, fields: dict[str, Any]) -> WanConfig:
        """The configuration in flat public names: those of `WanConfig`, and those of `AudioConfig` for audio layers.

        `qk_norm`, `cross_attn_norm` and `norm_input_visual` are accepted as true, the only value that released
        models have.

        Raises:
            InputError: a field that this model does not know, or cannot honor.
        """
        fields = dict(fields)
        for always in ("qk_norm", "cross_attn_norm", "norm_input_visual"):
            if not fields.pop(always, True):
                raise InputError(f"{always}=False is not supported: every released Wan2.1 model has it on")
        if tuple(fields.pop("window_size", (-1, -1))) != (-1, -1):
            raise InputError("window_size must be (-1, -1): Wan2.1 attends to the whole clip")
        audio_names = {field.name for field in dataclasses.fields(AudioConfig)}
        audio = {name: fields.pop(name) for name in list(fields) if name in audio_names}
        if audio:
            fields["audio"] = AudioConfig(**audio)
        if "patch_size" in fields:
            fields["patch_size"] = tuple(fields["patch_size"])
        unknown = set(fields) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise InputError(f"unknown model settings: {', '.join(sorted(unknown))}")
        return cls(**fields)


# ------------------------------------------------------------------------------------- what all blocks share


@dataclass(eq=False)
class KeysValues:
    """Keys and values of one prompt or image in every block, kept from the first forward that is given this on.

    They depend on the prompt or image and the weights alone: steps, and windows of a long video, share them.

    Attributes:
        tokens: the embedded tokens [B, n, C].
        of_layer: attention layer -> k and v [B, n, H, D].
    """

    tokens: torch.Tensor | None = None
    of_layer: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


class Conditions(NamedTuple):
    """What one forward gives to every block."""

    grid: Grid  # of the tokens here: [T, 1, s] where they are divided among processes, and S is the places of a frame
    rotation: Rotation  # cos, sin [L, 1, D/2]
    time: torch.Tensor  # [B, 6, C] float32
    text: torch.Tensor  # [B, text_len, C]
    clip: torch.Tensor | None  # [B, 257, C]
    audio: torch.Tensor | None  # [1, T, speakers*tokens, Ca]
    speakers: int
    speaker_masks: torch.Tensor | None  # [speakers+1, H*W], only for several speakers
    audio_scale: float
    humo_audio: torch.Tensor | None  # [B, T*tokens, kv_dim]
    humo_audio_scale: float
    text_keys: KeysValues | None = None
    image_keys: KeysValues | None = None
    enhance: float | None = None
    nag: NormalizedAttention | None = None  # with embedded tokens [B, text_len, C]
    split: TokenSplit | None = None
    places: int = 0  # S


class BlockModes(NamedTuple):
    """The attention mode of each role in one block."""

    self_attention: str
    text: str
    image: str
    audio: str

    @classmethod
    def of(cls, mode: AttentionMode, block: int) -> BlockModes:
        return cls(*(resolve_mode(mode, block, role) for role in ("self", "text", "image", "audio")))


# ------------------------------------------------------------------------------------------------ the block


class _Projections(nn.Module):
    """The layers that self and cross attention have in common, with RMS norm of q and k over all channels."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        heads: torch.Tensor = x.unflatten(-1, (self.num_heads, -1))  # [B, N, C] -> [B, N, H, D]
        return heads


class WanSelfAttention(_Projections):
    """Attention of all tokens to all tokens, with 3-D rotary embedding of q and k."""

    def reads_rows(self, device: torch.device) -> bool:
        """Whether `forward` takes its tokens quantized per row."""
        return read_rows(device, self.q, self.k, self.v)

    def forward(
        self,
        x: Activations,
        grid: Grid,
        rotation: Rotation,
        speaker_masks: torch.Tensor | None = None,
        *,
        attention_mode: str = "sdpa",
        enhance: float | None = None,
        split: TokenSplit | None = None,
        places: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [B, L, C] -> the attended tokens [B, L, C], and with masks [n+1, H*W] the reference map [n+1, L].

        With `split`, x is a share of the tokens: T*s of T*S, where S is `places`.
        """
        values = (
            None if split is None else split.heads(self._heads(self.v(x)), grid[0], places)
        )  # while q, k are computed
        q, k = qk_norm_rope(
            self.q(x), self.k(x), self.norm_q.weight, self.norm_k.weight, rotation, self.num_heads, self.norm_q.eps
        )  # [B, L, H, D] each
        reference_map = None
        if speaker_masks is not None:
            reference, shape = k, grid
            if split is not None:
                reference, shape = split.gather(k[:, : grid[1] * grid[2]], 1, places), (1, 1, places)
            reference_map = get_attn_map_with_target(q, reference, shape, speaker_masks)
        if split is None or values is None:
            out = attention(q, k, self._heads(self.v(x)), attention_mode=attention_mode)
        else:
            queries, keys = split.heads(q, grid[0], places), split.heads(k, grid[0], places)
            attended = attention(queries(), keys(), values(), attention_mode=attention_mode)
            out = split.tokens(attended, grid[0], places)
        if enhance is not None:
            out = (out * cross_frame_gain(q, k, grid, enhance, split, places)).to(out.dtype)
        return self.o(out.flatten(2)), reference_map


class WanCrossAttention(_Projections):
    """Attention to the text, and in I2V models to CLIP tokens with keys of their own; the two results are added."""

    def __init__(self, dim: int, num_heads: int, eps: float, with_image: bool) -> None:
        super().__init__(dim, num_heads, eps)
        if with_image:
            self.k_img = nn.Linear(dim, dim)
            self.v_img = nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps)

    def reads_rows(self, device: torch.device) -> bool:
        """Whether `forward` takes its tokens quantized per row."""
        return read_rows(device, self.q)

    def forward(
        self,
        x: Activations,
        text: torch.Tensor,
        clip: torch.Tensor | None = None,
        *,
        text_mode: str = "sdpa",
        image_mode: str = "sdpa",
        text_keys: KeysValues | None = None,
        image_keys: KeysValues | None = None,
        nag: NormalizedAttention | None = None,
    ) -> torch.Tensor:
        """x [B, L, C], text [B, text_len, C], clip [B, 257, C] or None -> [B, L, C]"""
        q = self._heads(self.norm_q(self.q(x)))
        k, v = self._keys_values(text_keys, lambda: (self.norm_k(self.k(text)), self.v(text)))
        out = attention(q, k, v, attention_mode=text_mode)
        if nag is not None:
            k, v = self._heads(self.norm_k(self.k(nag.negative))), self._heads(self.v(nag.negative))
            away = attention(q, k, v, attention_mode=text_mode)
            out = normalized_guidance(out, away, nag.scale, nag.tau, nag.alpha)
        attended = out.flatten(2)
        given: Activations = attended
        if clip is not None:
            k, v = self._keys_values(image_keys, lambda: (self.norm_k_img(self.k_img(clip)), self.v_img(clip)))
            of_image = attention(q, k, v, attention_mode=image_mode).flatten(2)
            given = add(attended, of_image, rows=read_rows(q.device, self.o))
        projected: torch.Tensor = self.o(given)
        return projected

    def _keys_values(
        self, kept: KeysValues | None, compute: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v [B, n, H, D], of an earlier forward where they are kept."""
        found = None if kept is None else kept.of_layer.get(self)
        if found is None:
            k, v = compute()
            found = self._heads(k), self._heads(v)
            if kept is not None:
                kept.of_layer[self] = found
        return found


class WanBlock(nn.Module):
    """One transformer block. The audio layers exist where the configuration has them."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim, heads, eps = config.dim, config.num_heads, config.eps
        self.eps = eps
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.self_attn = WanSelfAttention(dim, heads, eps)
        self.norm3 = AffineNorm(dim, eps=eps)
        self.cross_attn = WanCrossAttention(dim, heads, eps, with_image=config.model_type == "i2v")
        self.ffn = nn.Sequential(nn.Linear(dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, dim))
        if config.audio is not None:
            self.norm_x = AffineNorm(dim, eps=eps)
            self.audio_cross_attn = SingleStreamMultiAttention(
                dim,
                heads,
                encoder_hidden_states_dim=config.audio.output_dim,
                class_range=config.audio.class_range,
                class_interval=config.audio.class_interval,
            )
        if config.humo is not None:
            self.audio_cross_attn_wrapper = AudioCrossAttentionWrapper(
                dim, dim, heads, eps=eps, kv_dim=config.humo.output_dim
            )

    def forward(self, x: torch.Tensor, given: Conditions, modes: BlockModes) -> torch.Tensor:
        """x [B, L, C] -> [B, L, C]"""
        modulation = (self.modulation.float() + given.time).split(1, dim=1)  # six of [B, 1, C] float32
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation

        device = x.device
        normed = modulated_norm(x, shift1, scale1, self.eps, rows=self.self_attn.reads_rows(device))
        attended, reference_map = self.self_attn(
            normed,
            given.grid,
            given.rotation,
            given.speaker_masks,
            attention_mode=modes.self_attention,
            enhance=given.enhance,
            split=given.split,
            places=given.places,
        )

        norm, rows = self.norm3, self.cross_attn.reads_rows(device)
        x, normed = add_affine_norm(x, attended, gate1, norm.weight, norm.bias, norm.eps, rows)
        branch = self.cross_attn(
            normed,
            given.text,
            given.clip,
            text_mode=modes.text,
            image_mode=modes.image,
            text_keys=given.text_keys,
            image_keys=given.image_keys,
            nag=given.nag,
        )
        factor = 1.0  # what is to be added to x: branch * factor

        if given.audio is not None:
            norm, rows = self.norm_x, self.audio_cross_attn.reads_rows(device)
            x, normed = add_affine_norm(x, branch, factor, norm.weight, norm.bias, norm.eps, rows)
            branch = self.audio_cross_attn(
                normed,
                given.audio,
                given.grid,
                reference_map,
                given.speakers,
                attention_mode=modes.audio,
                split=given.split,
            )
            factor = given.audio_scale
        if given.humo_audio is not None:
            x = self.audio_cross_attn_wrapper(
                x + branch, given.humo_audio, given.grid, given.humo_audio_scale, attention_mode=modes.audio
            )
            normed = modulated_norm(x, shift2, scale2, self.eps, rows=read_rows(device, self.ffn[0]))
        else:
            rows = read_rows(device, self.ffn[0])
            x, normed = add_modulated_norm(x, branch, factor, shift2, scale2, self.eps, rows)
        return gated_residual(x, self._feed_forward(normed), gate2)

    def _feed_forward(self, x: Activations) -> torch.Tensor:
        """`self.ffn` [B, L, C] -> [B, L, C], which may read quantized rows."""
        first, _, second = self.ffn
        hidden: torch.Tensor = first(x)
        activated = gelu(hidden, rows=read_rows(hidden.device, second))
        del hidden  # the largest tensor of a forward
        out: torch.Tensor = second(activated)
        return out


# -------------------------------------------------------------------------------------- into and out of tokens


class PatchEmbedding(nn.Conv3d):
    """Latents -> tokens: a convolution whose stride is its kernel, which is one linear layer on flattened patches."""

    def __init__(self, in_dim: int, dim: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__(in_dim, dim, kernel_size=patch_size, stride=patch_size)
        self.patch_size = patch_size

    def grid(self, latents: torch.Tensor) -> Grid:
        """The grid of tokens of latents [B, in_dim, T, h, w]; InputError for sides that are no multiple of a patch."""
        sizes, patch = tuple(int(n) for n in latents.shape[2:]), self.patch_size
        if any(size % p or not size for size, p in zip(sizes, patch, strict=True)):
            raise InputError(f"latents of {sizes} (frames, rows, columns) must be multiples of the patch {patch}")
        return sizes[0] // patch[0], sizes[1] // patch[1], sizes[2] // patch[2]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[B, in_dim, T, h, w] -> [B, L, dim]"""
        self.grid(input)  # checks the sides
        p, q, r = self.patch_size
        patches = rearrange(input, "b c (t p) (h q) (w r) -> b (t h w) (c p q r)", p=p, q=q, r=r)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class ImageEmbedding(nn.Module):
    """CLIP tokens [B, 257, clip_dim] -> [B, 257, dim]."""

    def __init__(self, clip_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            AffineNorm(clip_dim), nn.Linear(clip_dim, clip_dim), nn.GELU(), nn.Linear(clip_dim, dim), AffineNorm(dim)
        )

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = self.proj(clip)
        return tokens


class Head(nn.Module):
    """Tokens -> velocity of each patch."""

    def __init__(self, dim: int, features: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.head = nn.Linear(dim, features)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """x [B, L, C] with the time embedding [B, C] float32 -> [B, L, features]"""
        shift, scale = (self.modulation.float() + time.unsqueeze(1)).split(1, dim=1)
        features: torch.Tensor = self.head(modulated_norm(x, shift, scale, self.eps))
        return features


def timestep_sinusoid(t: torch.Tensor, channels: int) -> torch.Tensor:
    """cos and sin of t * 10000^(-j/(channels/2)) (arXiv 1706.03762, section 3.5), angles in float64.

    Args:
        t: [B], 0 to 1000, not necessarily whole.

    Returns:
        [B, channels] float32, the cosines first.
    """
    half = channels // 2
    exponents = torch.arange(half, dtype=torch.float64, device=t.device) / half
    angles = torch.outer(t.double(), 10000.0**-exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=1).float()


# ------------------------------------------------------------------------------------------------ the model


class WanModel(nn.Module):
    """The velocity of noisy latents, given text, image and speech.

    Args:
        config: shapes; or give the fields of `WanConfig.from_public` as keywords instead.
        attention_mode: a mode of `attention`, of which low precision is for self attention only; or a function of
            (block index, role) -> mode, role being "self", "text", "image" or "audio". `forward` may override it.
    """

    def __init__(
        self, config: WanConfig | None = None, *, attention_mode: AttentionMode = "sdpa", **public_config_fields: Any
    ) -> None:
        super().__init__()
        if config is not None and public_config_fields:
            raise InputError("give WanModel a config or its fields, not both")
        config = config or WanConfig.from_public(public_config_fields)
        self.config = config
        self.attention_mode = attention_mode
        dim = config.dim

        self.patch_embedding = PatchEmbedding(config.in_dim, dim, config.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        if config.model_type == "i2v":
            self.img_emb = ImageEmbedding(config.clip_dim, dim)
        if config.audio is not None:
            self.audio_proj: nn.Module = _audio_projection(config.audio)
        elif config.humo is not None:
            self.audio_proj = HuMoAudioProjModel(**dataclasses.asdict(config.humo))
        self.blocks = nn.ModuleList(WanBlock(config) for _ in range(config.num_layers))
        patch_features = config.patch_size[0] * config.patch_size[1] * config.patch_size[2] * config.out_dim
        self.head = Head(dim, patch_features, config.eps)
        self._rotations = RotationTables(config.head_dim)
        self.mesh: Mesh = ALONE
        """How several processes compute together: each of them calls `forward`, and gets its result."""

    @property
    def dtype(self) -> torch.dtype:
        """What activations are computed in: the dtype of the patch embedding, which is never quantized."""
        return self.patch_embedding.weight.dtype

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        context: torch.Tensor | Sequence[torch.Tensor],
        clip_fea: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
        audio: torch.Tensor | None = None,
        ref_target_masks: torch.Tensor | None = None,
        *,
        audio_scale: float = 1.0,
        attention_mode: AttentionMode | None = None,
        humo_audio: torch.Tensor | None = None,
        humo_audio_scale: float = 1.0,
        text_keys: KeysValues | None = None,
        image_keys: KeysValues | None = None,
        enhance: float | None = None,
        nag: NormalizedAttention | None = None,
        skip_blocks: Collection[int] = (),
        residual: BlockResidual | None = None,
    ) -> torch.Tensor:
        """One forward.

        Args:
            x: latents [C, T, h, w] or [B, C, T, h, w].
            t: timestep [1] or [B], 0 to 1000, float.
            context: text tokens [n, text_dim], or [B, n, text_dim], or a list of B tensors [n_i, text_dim]; at most
                text_len of them.
            clip_fea: CLIP tokens [B, 257, clip_dim]; I2V models only.
            y: condition channels [in_dim-C, T, h, w] or [B, in_dim-C, T, h, w].
            audio: windows of speech features [speakers, vae_scale*(T-1)+1, audio_window, blocks, channels]; or one
                latent frame's worth less, see `SingleStreamAttention.forward`. None leaves the audio layers out,
                which is not the same as zeros.
            ref_target_masks: [speakers+1, any rows, any columns], above 0 inside an area; the background last. Without
                them several speakers are attended to everywhere alike. Not read for one speaker.
            audio_scale: factor on what InfiniteTalk's audio layers add.
            attention_mode: instead of the model's.
            humo_audio: windows of whisper features [T, 8, blocks, channels] or [B, T, 8, blocks, channels].
            humo_audio_scale: factor on what HuMo's audio layers add.
            text_keys, image_keys: what was computed of this very `context` and `clip_fea` before, with these weights;
                filled by the first forward that is given them.
            enhance: weight of Enhance-A-Video in the self-attention of all blocks; None: without.
            nag: a prompt to move away from in the text attention of all blocks.
            skip_blocks: indices of blocks that are left out.
            residual: is given what the blocks add to the tokens; or has it, and stands in place of running them.

        Returns:
            The velocity [B, out_dim, T, h, w], of x's dtype.

        Raises:
            InputError: inputs that do not fit each other or this model.
            BackendUnavailableError: an attention mode that cannot run here.
        """
        latents = self._with_condition(x, y)  # [B, in_dim, T, h, w]
        batch, grid = int(latents.shape[0]), self.patch_embedding.grid(latents)
        time, block_time = self.embed_time(t, batch)  # [B, C], [B, 6, C] float32
        speakers = 0 if audio is None else int(audio.shape[0])
        rotation, split, places = self._rotations.get(grid, latents.device), self.mesh.tokens, grid[1] * grid[2]
        local = grid
        if split is not None:
            if batch != 1:
                raise InputError(f"several GPUs compute one video at a time, not {batch}")
            check_tokens(split.size, self.config.num_heads, places)
            local = (grid[0], 1, split.counts(places)[split.rank])
            rotation = Rotation(*(split.take(table, grid[0], axis=0) for table in rotation))
        given = Conditions(
            grid=local,
            rotation=rotation,
            time=block_time,
            text=_embedded(text_keys, lambda: self.embed_text(context, batch)),
            clip=None if clip_fea is None else _embedded(image_keys, lambda: self.embed_clip(clip_fea, batch)),
            audio=self.embed_audio(audio, batch),
            speakers=speakers,
            speaker_masks=self._speaker_masks(ref_target_masks, speakers, grid),
            audio_scale=audio_scale,
            humo_audio=self.embed_humo_audio(humo_audio, batch, grid),
            humo_audio_scale=humo_audio_scale,
            text_keys=text_keys,
            image_keys=image_keys,
            enhance=enhance,
            nag=None if nag is None else dataclasses.replace(nag, negative=self.embed_text(nag.negative, batch)),
            split=split,
            places=places,
        )
        mode = self.attention_mode if attention_mode is None else attention_mode
        tokens = self.patch_embedding(latents)  # [B, L, C]
        if split is not None:
            tokens = split.take(tokens, grid[0])
        if residual is not None and residual.reuse and residual.value is not None:
            tokens = tokens + residual.value.to(tokens)
        else:
            embedded = None if residual is None else tokens
            for index, block in enumerate(self.blocks):
                if index not in skip_blocks:
                    tokens = self.run_block(index, block, tokens, given, BlockModes.of(mode, index))
            if residual is not None and embedded is not None:
                residual.value = tokens - embedded
        patches = self.head(tokens, time)
        if split is not None:
            patches = split.gather(patches, grid[0], places)
        return self._unpatchify(patches, grid).to(x.dtype)

    def run_block(
        self, index: int, block: nn.Module, tokens: torch.Tensor, given: Conditions, modes: BlockModes
    ) -> torch.Tensor:
        """tokens [B, L, C] -> [B, L, C]. The place to override: moving blocks between devices, caching, previews."""
        out: torch.Tensor = block(tokens, given, modes)
        return out

    # ---- embeddings: each checks what it is given, casts to the model's dtype and brings it to the width C

    def embed_time(self, t: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """t [1] or [B] -> embedding [B, C] for the head and its projection [B, 6, C] for the blocks, float32."""
        t = t.reshape(-1)
        if t.shape[0] not in (1, batch):
            raise InputError(f"{t.shape[0]} timesteps for a batch of {batch}: give one, or one for each")
        sinusoid = timestep_sinusoid(t, self.config.freq_dim).to(self.dtype)
        embedding = self.time_embedding(sinusoid).expand(batch, -1)
        return embedding.float(), self.time_projection(embedding).unflatten(1, (6, -1)).float()

    def embed_text(self, context: torch.Tensor | Sequence[torch.Tensor], batch: int) -> torch.Tensor:
        """[n, text_dim], [B, n, text_dim] or a list of [n_i, text_dim] -> [B, text_len, C]"""
        prompts = [context] if isinstance(context, torch.Tensor) and context.ndim == 2 else list(context)
        if len(prompts) not in (1, batch):
            raise InputError(f"{len(prompts)} prompts for a batch of {batch}: give one, or one for each")
        longest = max(int(prompt.shape[0]) for prompt in prompts)
        if longest > self.config.text_len:
            raise InputError(f"a prompt has {longest} tokens, the model takes {self.config.text_len}: cut it")
        padded = [F.pad(p.to(self.dtype), (0, 0, 0, self.config.text_len - int(p.shape[0]))) for p in prompts]
        embedded: torch.Tensor = self.text_embedding(torch.stack(padded))
        return embedded.expand(batch, -1, -1)

    def embed_clip(self, clip_fea: torch.Tensor, batch: int) -> torch.Tensor:
        """[1 or B, 257, clip_dim] -> [B, 257, C]"""
        if self.config.model_type != "i2v":
            raise InputError("clip_fea is given to a t2v model, which has no layers for it: leave it out")
        embedded: torch.Tensor = self.img_emb(clip_fea.to(self.dtype))
        return embedded.expand(batch, -1, -1)

    def embed_audio(self, audio: torch.Tensor | None, batch: int) -> torch.Tensor | None:
        """[speakers, vae_scale*(T-1)+1, window, blocks, channels] -> [1, T, speakers*tokens, Ca]"""
        if audio is None:
            return None
        config = self.config.audio
        if config is None:
            raise InputError("audio is given to a model without InfiniteTalk's audio layers: load the adapter too")
        row = (config.audio_window, config.blocks, config.channels)
        if batch != 1 or audio.ndim != 5 or tuple(audio.shape[2:]) != row:
            raise InputError(
                f"audio {tuple(audio.shape)} for a batch of {batch}: give [speakers, frames, *{row}] and one video"
            )
        first, later = pack_audio_windows(audio.to(self.dtype), config.vae_scale)
        tokens = self.audio_proj(first, later)  # [speakers, T, tokens, Ca]
        together: torch.Tensor = rearrange(tokens, "speakers t n c -> 1 t (speakers n) c")
        return together

    def embed_humo_audio(self, humo_audio: torch.Tensor | None, batch: int, grid: Grid) -> torch.Tensor | None:
        """[T, 8, blocks, channels] or [B, T, 8, blocks, channels] -> [B, T*tokens, kv_dim]"""
        if humo_audio is None:
            return None
        config = self.config.humo
        if config is None:
            raise InputError("humo_audio is given to a model without HuMo's audio layers")
        windows = humo_audio if humo_audio.ndim == 5 else humo_audio.unsqueeze(0)
        expected = (grid[0], config.seq_len, config.blocks, config.channels)
        if windows.shape[0] not in (1, batch) or tuple(windows.shape[1:]) != expected:
            raise InputError(f"humo_audio {tuple(humo_audio.shape)}: give {expected}, zeros for frames without sound")
        tokens: torch.Tensor = self.audio_proj(windows.to(self.dtype))  # [B, T, tokens, kv_dim]
        return tokens.flatten(1, 2).expand(batch, -1, -1)

    # ---- inputs and output

    def _with_condition(self, x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        """x and y, with or without a batch dimension -> [B, in_dim, T, h, w] of the model's dtype."""
        parts = [part if part.ndim == 5 else part.unsqueeze(0) for part in (x, y) if part is not None]
        batch = int(parts[0].shape[0])
        if any(part.shape[2:] != parts[0].shape[2:] or part.shape[0] not in (1, batch) for part in parts):
            raise InputError(f"latents and condition do not fit together: {[tuple(part.shape) for part in parts]}")
        channels = sum(int(part.shape[1]) for part in parts)
        if channels != self.config.in_dim:
            raise InputError(f"x and y together must have {self.config.in_dim} channels for this model, not {channels}")
        return torch.cat([part.to(self.dtype).expand(batch, -1, -1, -1, -1) for part in parts], dim=1)

    def _speaker_masks(self, masks: torch.Tensor | None, speakers: int, grid: Grid) -> torch.Tensor | None:
        """[speakers+1, rows, columns] -> [speakers+1, H*W] of 0 and 1; None where there is nothing to route."""
        if masks is None or speakers < 2:
            return None
        if masks.ndim != 3 or int(masks.shape[0]) != speakers + 1:
            raise InputError(
                f"masks {tuple(masks.shape)} for {speakers} speakers: give {speakers + 1}, the background last"
            )
        small = F.interpolate(masks.unsqueeze(0).float(), size=grid[1:], mode="nearest").squeeze(0)
        return (small > 0).flatten(1).float()

    def _unpatchify(self, patches: torch.Tensor, grid: Grid) -> torch.Tensor:
        """[B, L, p*q*r*out_dim], channel fastest -> [B, out_dim, T, h, w]"""
        (t, h, w), (p, q, r) = grid, self.config.patch_size
        return rearrange(patches, "b (t h w) (p q r c) -> b c (t p) (h q) (w r)", t=t, h=h, w=w, p=p, q=q, r=r)


def _embedded(kept: KeysValues | None, embed: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The embedded tokens, of an earlier forward where they are kept."""
    if kept is None:
        return embed()
    if kept.tokens is None:
        kept.tokens = embed()
    return kept.tokens


def _audio_projection(config: AudioConfig) -> AudioProjModel:
    return AudioProjModel(
        seq_len=config.audio_window,
        seq_len_vf=config.audio_window + config.vae_scale - 1,
        blocks=config.blocks,
        channels=config.channels,
        intermediate_dim=config.intermediate_dim,
        output_dim=config.output_dim,
        context_tokens=config.context_tokens,
        norm_output_audio=config.norm_output_audio,
    )
