"""Decoding on several GPUs: each process decodes a strip of the image, and all of them get the whole."""

from __future__ import annotations

from torch import Tensor

from ..runtime.parallel import Split
from .vae import ChunkCallback, VideoDecoder

__all__ = ["OVERLAP", "decode_split"]

OVERLAP = 4
"""Latent positions that a strip reaches into its neighbors, decoded and cut off: what lies near an edge is decoded as
if the image ended there."""


def decode_split(
    decoder: VideoDecoder, latents: Tensor, split: Split, *, tiled: bool = False, callback: ChunkCallback | None = None
) -> Tensor:
    """`VideoDecoder.decode` of latents [B, z, T, h, w], divided along the longer side of the image.

    Not the same numbers as of the whole: the middle attention of a Wan VAE sees the strip alone, and convolutions the
    overlap. docs/several-gpus.md has the error.
    """
    axis = 4 if latents.shape[4] >= latents.shape[3] else 3
    length = int(latents.shape[axis])
    counts = split.counts(length)
    if min(counts) == 0:
        return decoder.decode(latents, tiled=tiled, callback=callback)
    begin = sum(counts[: split.rank])
    end = begin + counts[split.rank]
    first, last = max(0, begin - OVERLAP), min(length, end + OVERLAP)
    frames = decoder.decode(latents.narrow(axis, first, last - first), tiled=tiled, callback=callback)
    ratio = decoder.spatial_ratio
    strip = frames.narrow(axis, (begin - first) * ratio, (end - begin) * ratio)
    return split.gather_parts(strip, [count * ratio for count in counts], axis)
