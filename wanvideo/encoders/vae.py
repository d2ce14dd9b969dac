"""The Wan2.1 VAE: diffusers' AutoencoderKLWan filled from the public checkpoint, streamed in time, tiled in space.

A video of 1 + 4n frames becomes 1 + n latent frames of an eighth of its width and height. Both directions run one
latent frame at a time keeping the convolutions' history (the causal cache of the public model), so that
working memory does not depend on the length. Only the result grows, and it can be collected on another device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.files import CheckpointFile
from ..checkpoints.quantized import Weights
from ..checkpoints.reading import fitting
from ..checkpoints.state_dict import fill_module, kind_of, renamed, size_of, stated_config
from ..errors import CheckpointError, InputError
from ..kernels.frames import FRAMES
from ..kernels.selftest import elementwise_reasons
from .base import Encoder, check_tensors, check_unused
from .vae_frames import ALIGNED_CHANNELS, FrameDecoder, FrameEncoder

logger = logging.getLogger(__name__)

__all__ = [
    "DEFAULT_OVERLAP",
    "DEFAULT_TILE",
    "ChunkCallback",
    "VaeConfig",
    "VideoDecoder",
    "WanVAE",
    "diffusers_names",
    "vae_config",
]

DEFAULT_TILE = 256
"""Pixels. Width and height of a tile."""

DEFAULT_OVERLAP = 64
"""Pixels that neighboring tiles share; there they are blended."""

SMALLEST_TILE = 64
"""Pixels. Below this an out-of-memory error is passed on."""

ChunkCallback = Callable[[int, int], None]
"""Called with (chunks done, chunks in all) after each latent frame of each tile; what it raises stops the work."""


@dataclass(frozen=True)
class VaeConfig:
    """The shape of a Wan VAE: level l is `base_dim * dim_mult[l]` channels wide."""

    base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temporal: tuple[bool, ...]  # for each downsampling, whether it halves the frames too

    @property
    def spatial_ratio(self) -> int:
        """Pixels per latent position along width and height (8 in Wan2.1)."""
        return 1 << len(self.temporal)

    @property
    def temporal_ratio(self) -> int:
        """Frames per latent frame after the first (4 in Wan2.1)."""
        return 1 << sum(self.temporal)


def vae_config(state: Mapping[str, Tensor], what: str = "The file") -> VaeConfig:
    """Read the configuration from the shapes of a public state dict (`encoder.downsamples.N...`, no prefix).

    Raises CheckpointError when the tensors are not those of a Wan2.1 VAE.
    """
    if any(name.startswith("encoder.downsamples.0.downsamples.") for name in state):
        raise CheckpointError(f"{what} is a Wan2.2 VAE (48 latent channels); InfiniteTalk needs the Wan2.1 VAE.")
    needed = ("encoder.conv1.weight", "decoder.conv1.weight", "conv1.weight", "conv2.weight", "decoder.head.2.weight")
    missing = [name for name in needed if name not in state]
    if missing:
        raise CheckpointError(f"{what} is {kind_of(state)}, not a Wan2.1 VAE: it has no {missing[0]}.")

    base_dim = size_of(state, "encoder.conv1.weight", 5, what)[0]
    blocks: list[int] = [0]  # residual blocks of each level
    widths: list[int] = [base_dim]
    temporal: list[bool] = []
    number = 0
    while True:
        stem = f"encoder.downsamples.{number}."
        if f"{stem}residual.2.weight" in state:
            blocks[-1] += 1
            widths[-1] = size_of(state, f"{stem}residual.2.weight", 5, what)[0]
        elif f"{stem}resample.1.weight" in state:
            temporal.append(f"{stem}time_conv.weight" in state)
            blocks.append(0)
            widths.append(widths[-1])
        elif any(name.startswith(stem) for name in state):
            raise CheckpointError(f"{what} has a layer {stem}* that is neither residual nor resampling: no Wan2.1 VAE.")
        else:
            break
        number += 1
    if len(set(blocks)) != 1 or blocks[0] == 0 or any(width % base_dim for width in widths):
        raise CheckpointError(
            f"{what} is no whole Wan2.1 VAE: its levels have {blocks} residual blocks of widths {widths}."
        )
    return VaeConfig(
        base_dim=base_dim,
        z_dim=size_of(state, "conv2.weight", 5, what)[0],
        dim_mult=tuple(width // base_dim for width in widths),
        num_res_blocks=blocks[0],
        temporal=tuple(temporal),
    )


_BLOCK = {
    "residual.0.": "norm1.",
    "residual.2.": "conv1.",
    "residual.3.": "norm2.",
    "residual.6.": "conv2.",
    "shortcut.": "conv_shortcut.",
}
_HEAD = {"0.": "norm_out.", "2.": "conv_out."}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_OUTER = {"conv1": "quant_conv", "conv2": "post_quant_conv"}


def diffusers_names(name: str, num_res_blocks: int) -> str:
    """diffusers' name for a public one: "decoder.upsamples.3.resample.1.bias" -> "decoder.up_blocks.0.upsamplers.0...".

    The public decoder numbers its layers through; diffusers groups them per level (`num_res_blocks` + 1 residual blocks
    and a resampling).
    """
    part, _, rest = name.partition(".")
    if part in _OUTER:
        return f"{_OUTER[part]}.{rest}"
    layer, _, rest = rest.partition(".")
    if layer == "conv1":
        return f"{part}.conv_in.{rest}"
    if layer == "head":
        return f"{part}.{renamed(rest, _HEAD)}"
    number, _, rest = rest.partition(".")
    rest = renamed(rest, _BLOCK)
    if layer == "middle":
        return f"{part}.mid_block.{_MIDDLE.get(number, number)}.{rest}"
    if layer == "downsamples":
        return f"{part}.down_blocks.{number}.{rest}"
    if layer == "upsamples":
        level, position = divmod(int(number), num_res_blocks + 2)
        inner = "upsamplers.0" if position == num_res_blocks + 1 else f"resnets.{position}"
        return f"{part}.up_blocks.{level}.{inner}.{rest}"
    return name


def _statistics(values: Any, name: str, count: int, what: str) -> list[float]:
    """`count` finite numbers of a VAE's configuration, deviations larger than 0."""
    numbers = isinstance(values, Sequence) and all(type(value) in (int, float) for value in values)
    if not numbers or not all(abs(v) < 1e30 and (v > 0 or name != "latents_std") for v in values):
        raise CheckpointError(f"{what} is configured with a {name} that is no list of numbers of that kind.")
    if len(values) != count:
        raise CheckpointError(f"{what} has {count} latent channels, but {name} has {len(values)} values.")
    return [float(value) for value in values]


_MOMENTS = ("latents_mean", "latents_std")


def _weights(source: CheckpointFile | Mapping[str, Tensor], what: str) -> Weights:
    return Weights.of(source, ("encoder.conv1.weight",), kind="a Wan2.1 VAE", what=what)


def _empty_model(weights: Weights, stated: Mapping[str, Any]) -> tuple[Any, VaeConfig]:
    """diffusers' model that the weights fill, on the meta device; `stated` may hold `latents_mean`, `latents_std`."""
    from diffusers import AutoencoderKLWan

    what, blank = weights.what, weights.blank()
    with fitting(what):
        config = vae_config(blank, what)
        tensors = _renamed(blank, config)
    options: dict[str, Any] = {}
    if config.z_dim != 16:
        options = {"latents_mean": [0.0] * config.z_dim, "latents_std": [1.0] * config.z_dim}
    for name in _MOMENTS:
        if stated.get(name) is not None:
            options[name] = _statistics(stated[name], name, config.z_dim, what)
    with fitting(what), torch.device("meta"):
        model: Any = AutoencoderKLWan(
            base_dim=config.base_dim,
            z_dim=config.z_dim,
            dim_mult=list(config.dim_mult),
            num_res_blocks=config.num_res_blocks,
            temperal_downsample=list(config.temporal),
            **options,
        )
    check_tensors(model, tensors, what)
    check_unused(tensors, model.state_dict(), "", what)
    return model, config


def _renamed(state: Mapping[str, Tensor], config: VaeConfig) -> dict[str, Tensor]:
    return {diffusers_names(name, config.num_res_blocks): tensor for name, tensor in state.items()}


class VideoDecoder(Encoder):
    """Latents to frames, one piece after the other in time, tiled in space: what all decoders share.

    Subclasses give `_decode_stream`.

    Attributes:
        z_dim: latent channels.
        spatial_ratio, temporal_ratio: pixels per latent position, frames per latent frame after the first.
        width: channels of a decoded frame at its full size, before it becomes RGB.
        at_once: whether all latent frames are one piece.
    """

    z_dim: int
    spatial_ratio: int
    temporal_ratio: int
    width: int
    at_once = False

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        *,
        tiled: bool = False,
        tile_size: int = DEFAULT_TILE,
        tile_overlap: int = DEFAULT_OVERLAP,
        callback: ChunkCallback | None = None,
        output_device: str | torch.device | None = None,
    ) -> Tensor:
        """Frames [B, 3, 1 + 4 (T - 1), 8 h, 8 w], float32 in [-1, 1], of normalized latents [B, z, T, h, w].

        Args:
            tiled, tile_size, tile_overlap: as in `WanVAE.encode`, in pixels of the result.
            callback: see ChunkCallback; it starts anew if the work does.
            output_device: where the frames are collected; the latents' device by default.

        Raises InputError for a shape that cannot be decoded.
        """
        self._check_latents(latents)
        ratio = self.spatial_ratio
        size = (int(latents.shape[3]), int(latents.shape[4]))

        def run(tile: int | None) -> Tensor:
            return self._decode(latents, _tiles(size, tile, tile_overlap, ratio), callback, output_device)

        frames = self._retry_smaller(run, tile_size if tiled else None, tile_size, max(size) * ratio, "decoding")
        return frames.clamp_(-1.0, 1.0)

    def _decode(
        self,
        latents: Tensor,
        tiles: list[_Tile],
        callback: ChunkCallback | None,
        output_device: str | torch.device | None,
    ) -> Tensor:
        ratio, step = self.spatial_ratio, self.temporal_ratio
        batch, _, frames, height, width = latents.shape
        shape = (batch, 3, 1 + step * (frames - 1), height * ratio, width * ratio)
        canvas = _Canvas(shape, tiles, ratio, output_device if output_device is not None else latents.device)
        total = frames * len(tiles)
        for index, tile in enumerate(tiles):
            part = latents[:, :, :, tile.top : tile.bottom, tile.left : tile.right]
            position = 0
            for pixels in self._decode_stream(part):
                canvas.add(tile, position, pixels)
                position += int(pixels.shape[2])
                if callback is not None:
                    callback(index * frames + 1 + (position - 1) // step, total)
        return canvas.finish()

    def _decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        """Frames of the pieces, each [B, 3, n, 8 h, 8 w], not clamped: 1 + 4 (T - 1) together."""
        raise NotImplementedError

    def _check_latents(self, latents: Tensor) -> None:
        if latents.ndim != 5 or latents.shape[1] != self.z_dim or not latents.is_floating_point() or 0 in latents.shape:
            raise InputError(
                f"Latents are decoded as floats of shape [batch, {self.z_dim}, frames, height, width]; these are "
                f"{list(latents.shape)} of {latents.dtype}."
            )

    def _retry_smaller(
        self, run: Callable[[int | None], Tensor], tile: int | None, tile_size: int, extent: int, action: str
    ) -> Tensor:
        """`run(tile)`; each time the GPU has no memory left, again in smaller tiles, down to SMALLEST_TILE pixels."""
        while True:
            try:
                return run(tile)
            except torch.OutOfMemoryError:
                smaller = tile // 2 if tile is not None else min(tile_size, extent // 2)
                if smaller < SMALLEST_TILE:
                    raise
                logger.warning("Out of GPU memory while %s: trying again in tiles of %d pixels", action, smaller)
            # Outside the handler: there the exception would still hold the tensors of the failed attempt.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            tile = smaller


class WanVAE(VideoDecoder):
    """Pixels to normalized latents and back.

    Latents are (mean of the posterior - `latents_mean`) / `latents_std`, float32; frames are float32 in [-1, 1].
    The convolutions compute in `dtype` on `device`.
    """

    def __init__(self, model: Any, config: VaeConfig, channels_last: bool | None = None) -> None:
        """`channels_last`: whether the stacks run with channels last (`vae_frames`); None: where our kernels run."""
        super().__init__(model)
        self.config = config
        self.z_dim, self.width = config.z_dim, config.base_dim
        self.spatial_ratio, self.temporal_ratio = config.spatial_ratio, config.temporal_ratio
        self.channels_last = channels_last
        self.latents_mean = torch.tensor(model.config.latents_mean, dtype=torch.float32)
        self.latents_std = torch.tensor(model.config.latents_std, dtype=torch.float32)

    @classmethod
    def load(cls, path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> WanVAE:
        """Read a public Wan2.1 VAE (.safetensors or .pth). Raises CheckpointError for anything else."""
        with CheckpointFile(path) as file:
            weights = _weights(file, f"The VAE file {path}")
            return cls._filled(weights, stated_config(file.metadata, str(path)), dtype, device)

    @staticmethod
    def inspect(path: str | Path) -> None:
        """Raise what `load` raises, without reading a weight."""
        with CheckpointFile(path) as file:
            _empty_model(_weights(file, f"The VAE file {path}"), stated_config(file.metadata, str(path)))

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        what: str = "The VAE",
    ) -> WanVAE:
        """The same from tensors with the public names, bare or behind any prefix.

        `latents_mean` and `latents_std` (z_dim values) default to the 16 constants of Wan2.1, and to 0 and 1 for
        another number of latent channels.
        """
        stated = {"latents_mean": latents_mean, "latents_std": latents_std}
        return cls._filled(_weights(state, what), stated, dtype, device)

    @classmethod
    def _filled(
        cls, weights: Weights, stated: Mapping[str, Any], dtype: torch.dtype, device: str | torch.device
    ) -> WanVAE:
        model, config = _empty_model(weights, stated)
        fill_module(model, _renamed(weights, config), what=weights.what, dtype=dtype, device=device)
        return cls(model, config)

    # --- pixels -> latents ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(
        self,
        video: Tensor,
        *,
        tiled: bool = False,
        tile_size: int = DEFAULT_TILE,
        tile_overlap: int = DEFAULT_OVERLAP,
        callback: ChunkCallback | None = None,
        output_device: str | torch.device | None = None,
    ) -> Tensor:
        """Normalized latents [B, z, 1 + (F - 1) // 4, H / 8, W / 8], float32, of `video`.

        Args:
            video: [B, 3, F, H, W] floats in [-1, 1] on any device; H and W multiples of 8. Frames beyond the last
                4n + 1 are left out, with a warning, as the public model does.
            tiled: work in tiles of `tile_size` pixels that share `tile_overlap` pixels, blended linearly. Without it
                the image is encoded whole, and in tiles only after the GPU ran out of memory (which is logged).
            callback: see ChunkCallback; it starts anew if the work does.
            output_device: where the latents are collected; the video's device by default.

        Raises InputError for a shape that cannot be encoded.
        """
        height, width = self._check_video(video)
        latent = (height // self.config.spatial_ratio, width // self.config.spatial_ratio)
        ratio = self.config.spatial_ratio

        def run(tile: int | None) -> Tensor:
            return self._encode(video, _tiles(latent, tile, tile_overlap, ratio), callback, output_device)

        moments = self._retry_smaller(run, tile_size if tiled else None, tile_size, max(height, width), "encoding")
        mean, std = self._constants(moments.device)
        return (moments - mean) / std

    def _encode(
        self,
        video: Tensor,
        tiles: list[_Tile],
        callback: ChunkCallback | None,
        output_device: str | torch.device | None,
    ) -> Tensor:
        ratio, step = self.config.spatial_ratio, self.config.temporal_ratio
        frames = 1 + (video.shape[2] - 1) // step
        shape = (video.shape[0], self.z_dim, frames, video.shape[3] // ratio, video.shape[4] // ratio)
        canvas = _Canvas(shape, tiles, 1, output_device if output_device is not None else video.device)
        total = frames * len(tiles)
        for index, tile in enumerate(tiles):
            pixels = video[:, :, :, tile.top * ratio : tile.bottom * ratio, tile.left * ratio : tile.right * ratio]
            for frame, mean in enumerate(self._encode_stream(pixels, frames)):
                canvas.add(tile, frame, mean)
                if callback is not None:
                    callback(index * frames + frame + 1, total)
        return canvas.finish()

    def _encode_stream(self, video: Tensor, frames: int) -> Iterator[Tensor]:
        """The posterior's mean of one latent frame after the other, [B, z, 1, h, w]: pixels 0, then four at a time."""
        encoder = self._stack(self.model.encoder, FrameEncoder)
        step = self.config.temporal_ratio
        for frame in range(frames):
            begin, end = (0, 1) if frame == 0 else (1 + step * (frame - 1), 1 + step * frame)
            chunk = video[:, :, begin:end].to(self.device, self.dtype)
            yield self.model.quant_conv(encoder(chunk))[:, : self.z_dim]

    # --- latents -> pixels ---------------------------------------------------------------------------------------

    def _decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        """Frames of one latent frame after the other, [B, 3, 1 or 4, 8 h, 8 w], not clamped."""
        decoder = self._stack(self.model.decoder, FrameDecoder)
        mean, std = self._constants(self.device)
        for frame in range(latents.shape[2]):
            z = latents[:, :, frame : frame + 1].to(self.device, torch.float32) * std + mean
            yield decoder(self.model.post_quant_conv(z.to(self.dtype)))

    # --- shared --------------------------------------------------------------------------------------------------

    def _stack(self, module: Any, frames: type[FrameDecoder] | type[FrameEncoder]) -> Callable[[Tensor], Tensor]:
        """`module` for one video, chunk by chunk: with channels last where our kernels run, else diffusers' own way."""
        if self._runs_channels_last(module):
            return frames(module)
        cache: list[Tensor | None] = [None] * sum(isinstance(layer, nn.Conv3d) for layer in module.modules())
        return lambda chunk: module(chunk, feat_cache=cache, feat_idx=[0])

    def _runs_channels_last(self, module: nn.Module) -> bool:
        if self.channels_last is not None:
            return self.channels_last
        if self.config.base_dim % ALIGNED_CHANNELS or "forward" in vars(module):  # or `compile_model` was here
            return False
        return self.dtype in FRAMES.operands[0].dtypes and not elementwise_reasons(FRAMES.device, self.device)

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, each [1, z, 1, 1, 1]."""
        shape = (1, self.z_dim, 1, 1, 1)
        return self.latents_mean.to(device).view(shape), self.latents_std.to(device).view(shape)

    def _check_video(self, video: Tensor) -> tuple[int, int]:
        ratio, step = self.config.spatial_ratio, self.config.temporal_ratio
        if video.ndim != 5 or video.shape[1] != 3 or not video.is_floating_point() or 0 in video.shape:
            raise InputError(
                f"The VAE encodes floats of shape [batch, 3, frames, height, width]; it got {list(video.shape)} of "
                f"{video.dtype}."
            )
        frames, height, width = (int(size) for size in video.shape[2:])
        if height % ratio or width % ratio:
            raise InputError(
                f"The VAE encodes sizes that are multiples of {ratio}; {width}x{height} is not, resize it."
            )
        if (frames - 1) % step:
            used = 1 + (frames - 1) // step * step
            logger.warning(
                "The VAE encodes %dn+1 frames: of %d frames the last %d are left out", step, frames, frames - used
            )
        return height, width


@dataclass(frozen=True)
class _Tile:
    """A rectangle of latent positions, and how many of its first and last rows and columns its neighbors share."""

    top: int
    bottom: int
    left: int
    right: int
    shared: tuple[int, int, int, int]  # above, below, left, right


def _spans(length: int, size: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """Cover 0..length by spans of `size`: (begin, end, shared with the one before, shared with the one after)."""
    size = min(size, length)
    step = size - min(overlap, size - 1)
    begins = [*range(0, length - size, step), length - size]
    spans = []
    for i, begin in enumerate(begins):
        before = begins[i - 1] + size - begin if i else 0
        after = begin + size - begins[i + 1] if i + 1 < len(begins) else 0
        spans.append((begin, begin + size, before, after))
    return spans


def _tiles(size: tuple[int, int], tile: int | None, overlap: int, ratio: int) -> list[_Tile]:
    """Tiles over `size` = (rows, columns) of latent positions; `tile` and `overlap` in pixels, None for one tile."""
    if tile is None:
        return [_Tile(0, size[0], 0, size[1], (0, 0, 0, 0))]
    if tile < ratio or overlap < 0:
        raise InputError(
            f"A VAE tile has at least {ratio} pixels and an overlap of 0 or more; got {tile} and {overlap}."
        )
    side, shared = tile // ratio, min(overlap, tile // 2) // ratio
    rows, columns = _spans(size[0], side, shared), _spans(size[1], side, shared)
    return [_Tile(t, b, le, r, (up, dn, lf, rt)) for t, b, up, dn in rows for le, r, lf, rt in columns]


def _ramp(length: int, before: int, after: int, device: torch.device) -> Tensor:
    """Weights [length], rising linearly over the first `before` entries and falling over the last `after`."""
    position = torch.arange(length, dtype=torch.float32, device=device)
    rising = (position + 1) / (before + 1)
    falling = (length - position) / (after + 1)
    return torch.minimum(rising, falling).clamp(max=1.0)


class _Canvas:
    """Collects tiles into one float32 tensor [B, C, F, H, W]; where tiles overlap, their weighted mean.

    `scale` is the number of result positions per latent position (1 for latents, 8 for pixels).
    """

    def __init__(self, shape: tuple[int, ...], tiles: list[_Tile], scale: int, device: str | torch.device) -> None:
        self.scale = scale
        self.blends = len(tiles) > 1
        make = torch.zeros if self.blends else torch.empty
        self.values = make(shape, dtype=torch.float32, device=device)
        if self.blends:
            total = torch.zeros(shape[-2:], dtype=torch.float32, device=device)
            for tile in tiles:
                self._part(total, tile).add_(self._weight(tile))
            self.total = total

    def _part(self, canvas: Tensor, tile: _Tile) -> Tensor:
        s = self.scale
        return canvas[..., tile.top * s : tile.bottom * s, tile.left * s : tile.right * s]

    def _weight(self, tile: _Tile) -> Tensor:
        """[height, width] of the tile; larger than 0 everywhere."""
        s, device = self.scale, self.values.device
        above, below, left, right = (count * s for count in tile.shared)
        rows = _ramp((tile.bottom - tile.top) * s, above, below, device)
        columns = _ramp((tile.right - tile.left) * s, left, right, device)
        return rows[:, None] * columns[None, :]

    def add(self, tile: _Tile, frame: int, values: Tensor) -> None:
        """Put `values` [B, C, n, h, w] of `tile` at frames `frame` to `frame + n`."""
        target = self._part(self.values[:, :, frame : frame + values.shape[2]], tile)
        if not self.blends:
            target.copy_(values)
            return
        weight = self._weight(tile) / self._part(self.total, tile)
        target.add_(values.to(target.device, torch.float32) * weight)

    def finish(self) -> Tensor:
        return self.values
