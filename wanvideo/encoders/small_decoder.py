"""Small decoders of Wan2.1 latents (`taew2_1`, `lighttaew2_1`): frames for previews and streams.

9.84 million parameters in place of the VAE's decoder, read by their public names (`decoder.<n>.*`). Frames are decoded
as images; time enters in two places only. A memory block also sees its own input of the frame before, and a growth
makes several frames of one. So a video is decoded one latent frame after the other, with one frame per memory block
kept in between, and comes out as it would all at once. Frames stay [B, T, H, W, C], as in `vae_frames`.

A latent frame gives four frames; the first three of a video are dropped, as 1 + 4 (T - 1) are wanted. diffusers has
small decoders for images only (AutoencoderTiny).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints.files import CheckpointFile
from ..checkpoints.quantized import Weights
from ..checkpoints.reading import fitting
from ..checkpoints.state_dict import fill_module, size_of
from ..errors import CheckpointError
from .base import check_tensors, check_unused
from .vae import VideoDecoder

logger = logging.getLogger(__name__)

__all__ = ["PUBLIC_WIDTHS", "SmallDecoder", "SmallNetwork", "denormalizes"]

Z_DIM = 16
"""Latent channels of Wan2.1."""

PUBLIC_WIDTHS = (256, 128, 64, 64)
"""Channels at an eighth, a quarter, a half of the frame's size, and at the whole."""

MEMORY_BLOCKS = 3
"""Of each level."""

GROWTHS = (1, 2, 2)
"""Frames that each level makes of one."""

FIRST_DROPPED = 3
"""Frames at the beginning of a video that are no part of it."""

_ANCHOR = "decoder.7.conv.weight"
"""The first growth, which small decoders of images do not have."""

Memory = dict[nn.Module, Tensor]
"""Memory block -> the last frame that it was given, [B, 1, H, W, C]."""


class _Conv(nn.Conv2d):
    """3 x 3, of frames [B, T, H, W, C]."""

    def __init__(self, into: int, out: int, bias: bool = True) -> None:
        super().__init__(into, out, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.flatten(0, 1).movedim(-1, 1)).movedim(1, -1)
        out: Tensor = y.contiguous().unflatten(0, x.shape[:2])  # copied only where the convolution turned its output
        return out


class _MemoryBlock(nn.Module):
    """relu(f(x_t, x_{t-1}) + x_t); what was before the first frame is 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _Conv(2 * width, width),
            nn.ReLU(inplace=True),
            _Conv(width, width),
            nn.ReLU(inplace=True),
            _Conv(width, width),
        )

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        before = memory.get(self)
        past = torch.cat([torch.zeros_like(x[:, :1]) if before is None else before, x[:, :-1]], dim=1)
        memory[self] = x[:, -1:].clone()  # a view would keep all of x
        return F.relu_(self.conv(torch.cat([x, past], dim=-1)).add_(x))


class _Growth(nn.Module):
    """A linear map from C to times * C channels; the j-th C of frame t become frame times * t + j."""

    def __init__(self, width: int, times: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, times * width, 1, bias=False)
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        grown: Tensor = F.linear(x, self.conv.weight.flatten(1)).unflatten(-1, (self.times, x.shape[-1]))
        return grown.movedim(-2, 2).flatten(1, 2)


class _Double(nn.Module):
    """Twice the height and width, each pixel repeated."""

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


class _Bound(nn.Module):
    """Softly to values between -3 and 3."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


class SmallNetwork(nn.Module):
    """The network; its parameters have the public names.

    Args:
        widths: as `PUBLIC_WIDTHS`.
    """

    def __init__(self, widths: tuple[int, ...] = PUBLIC_WIDTHS) -> None:
        super().__init__()
        layers: list[nn.Module] = [_Bound(), _Conv(Z_DIM, widths[0]), nn.ReLU(inplace=True)]
        for width, wider, times in zip(widths[:-1], widths[1:], GROWTHS, strict=True):
            layers += [_MemoryBlock(width) for _ in range(MEMORY_BLOCKS)]
            layers += [_Double(), _Growth(width, times), _Conv(width, wider, bias=False)]
        layers += [nn.ReLU(inplace=True), _Conv(widths[-1], 3)]
        self.decoder = nn.Sequential(*layers)
        self.width = widths[-1]

    def forward(self, z: Tensor, memory: Memory) -> Tensor:
        """Latent frames [B, T, h, w, 16] -> 4 T frames [B, 4 T, 8 h, 8 w, 3], in [0, 1] but for overshoot.

        `memory` holds what earlier calls for the same video left, {} before the first, and is updated.
        """
        x = z
        for layer in self.decoder:
            x = layer(x, memory) if isinstance(layer, _MemoryBlock) else layer(x)
        return x


def denormalizes(path: str | Path) -> bool:
    """Whether the small decoder in a file takes latents times their standard deviation plus their mean.

    The files do not say it, their public names do: `lighttae*` take these, `taew2_1` the model's own.
    """
    return "light" in Path(path).name.lower()


def _moments() -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of Wan2.1's latents, float32 [16], as diffusers states them."""
    from diffusers import AutoencoderKLWan

    stated = inspect.signature(AutoencoderKLWan.__init__).parameters
    mean, std = (torch.tensor(stated[name].default, dtype=torch.float32) for name in ("latents_mean", "latents_std"))
    return mean, std


def _fitted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the growths as long as they need to be: some files hold more rows, of which the last count."""
    fitted = dict(tensors)
    for number, times in zip((7, 13, 19), GROWTHS, strict=True):
        name = f"decoder.{number}.conv.weight"
        weight = tensors.get(name)
        if weight is not None and weight.ndim == 4:
            rows, width = weight.shape[:2]
            if rows > times * width and rows % width == 0:
                fitted[name] = weight[-times * width :]
    return fitted


def _weights(source: CheckpointFile | Mapping[str, Tensor], what: str) -> Weights:
    return Weights.of(source, (_ANCHOR,), kind="a small decoder (taew2_1, lighttaew2_1)", what=what)


def _empty_network(weights: Weights) -> SmallNetwork:
    """The network that the weights fill, on the meta device."""
    what = weights.what
    with fitting(what):
        tensors = _fitted(weights.blank())
        channels = size_of(tensors, "decoder.1.weight", 4, what)[1]
        if channels != Z_DIM:
            raise CheckpointError(
                f"{what} decodes latents of {channels} channels, those of Wan2.1 have {Z_DIM}: it needs taew2_1 or "
                "lighttaew2_1."
            )
        widths = tuple(size_of(tensors, f"decoder.{number}.weight", 4, what)[0] for number in (1, 8, 14, 20))
        with torch.device("meta"):
            network = SmallNetwork(widths)
    check_tensors(network, tensors, what)
    check_unused(tensors, network.state_dict(), r"encoder\..*", what)
    return network


class SmallDecoder(VideoDecoder):
    """Normalized latents to frames, as `WanVAE.decode`; it encodes nothing.

    The convolutions compute in `dtype` on `device`.
    """

    spatial_ratio, temporal_ratio, z_dim = 8, 4, Z_DIM

    def __init__(self, model: SmallNetwork, denormalize: bool, at_once: bool = False) -> None:
        """
        Args:
            denormalize: whether the network takes latents times their standard deviation plus their mean.
            at_once: decode all latent frames together; memory then grows with the length.
        """
        super().__init__(model)
        self.denormalize, self.at_once = denormalize, at_once
        self.width = model.width
        self._mean, self._std = _moments()

    @classmethod
    def load(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        at_once: bool = False,
    ) -> SmallDecoder:
        """Read a public small decoder (.safetensors or .pth). Raises CheckpointError for anything else."""
        with CheckpointFile(path) as file:
            decoder = cls._filled(_weights(file, f"The decoder file {path}"), denormalizes(path), dtype, device)
        decoder.at_once = at_once
        logger.info(
            "%s decodes %s latents, as its name %s 'light'.",
            Path(path).name,
            *(("denormalized", "has") if decoder.denormalize else ("the model's own", "does not have")),
        )
        return decoder

    @staticmethod
    def inspect(path: str | Path) -> None:
        """Raise what `load` raises, without reading a weight."""
        with CheckpointFile(path) as file:
            _empty_network(_weights(file, f"The decoder file {path}"))

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Tensor],
        *,
        denormalize: bool,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        what: str = "The decoder",
    ) -> SmallDecoder:
        """The same from tensors with the public names, bare or behind any prefix."""
        return cls._filled(_weights(state, what), denormalize, dtype, device)

    @classmethod
    def _filled(
        cls, weights: Weights, denormalize: bool, dtype: torch.dtype, device: str | torch.device
    ) -> SmallDecoder:
        network = _empty_network(weights)
        used = {name: weights[name] for name in weights if name in network.state_dict()}
        fill_module(network, _fitted(used), what=weights.what, dtype=dtype, device=device)
        return cls(network, denormalize)

    def _decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        """Frames [B, 3, 1, 8 h, 8 w], then [B, 3, 4, 8 h, 8 w], float32, not clamped; or all of them."""
        memory: Memory = {}
        network: Any = self.model
        for piece in latents.split(latents.shape[2] if self.at_once else 1, dim=2):
            z = piece.to(self.device, torch.float32).movedim(1, -1)
            if self.denormalize:
                z = z * self._std.to(z.device) + self._mean.to(z.device)
            dropped = 0 if memory else FIRST_DROPPED
            frames = network(z.to(self.dtype), memory)[:, dropped:]
            yield frames.float().mul_(2).sub_(1).movedim(-1, 1)
