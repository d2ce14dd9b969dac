"""The loaded models that travel between nodes: our library's objects under ComfyUI's memory management."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..fp8_optimization import quantize_linears
from ..media.audio import check_samples, load_speech, normalize_loudness
from ..media.mixing import add_noise_floor, arrange, mix, smooth_transients
from ..multitalk.wav2vec import FOLDER_NAMES, SAMPLE_RATE, Wav2Vec2Features
from ..multitalk.whisper import WhisperFeatures
from ..pipeline.attention_policy import ModeOverride
from ..pipeline.blocks import check_blocks
from ..pipeline.journal import digest_of_weights
from ..pipeline.plan import mode_by_name
from ..pipeline.prompts import encode_pieces, parse_prompt
from ..wanvideo.checkpoints.dit import inspect_dit, load_dit
from ..wanvideo.checkpoints.files import CheckpointFile
from ..wanvideo.checkpoints.lora import LoraSpec, active_loras, apply_loras, inspect_loras
from ..wanvideo.checkpoints.state_dict import check_part
from ..wanvideo.encoders.clip import ClipVision
from ..wanvideo.encoders.small_decoder import SmallDecoder
from ..wanvideo.encoders.text import HUB_TOKENIZER, TextEncoder, load_tokenizer
from ..wanvideo.encoders.vae import WanVAE
from ..wanvideo.errors import CheckpointError, InputError
from ..wanvideo.kernels.layout import aligned_contiguous
from ..wanvideo.modules.attention import canonical_mode, check_mode
from ..wanvideo.modules.model import WanModel
from ..wanvideo.runtime.compilation import CompileSettings, check_compiler, check_with_block_swap, compile_model
from ..wanvideo.runtime.offload import BlockSwap
from ..wanvideo.runtime.precision import PRECISIONS
from . import comfyui
from .types import Adapter, ClipEmbeds, SpeechEmbeds, TextEmbeds, VramManagement, checked_audio, checked_image

logger = logging.getLogger(__name__)


def _stamp(path: str | Path) -> tuple[str, int, int]:
    """The identity of a file's state: path, size in bytes, time of the last change."""
    status = Path(path).stat()
    return str(path), status.st_size, status.st_mtime_ns


HEADERS = (".safetensors", ".gguf")
"""Endings of files that say in their first bytes what they hold."""


def check_file(folder_kind: str, name: str | None, part: str) -> None:
    """Raise CheckpointError for a file that is gone, and by its header for one of another kind; None is not known yet.

    Args:
        folder_kind: a row of `comfyui.FOLDERS`. part: one of `state_dict.PARTS`.
    """
    if name is None:
        return
    path = comfyui.model_path(folder_kind, name)
    if path.suffix.lower() in HEADERS:
        check_part(path, part)


# --- the video model ---------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Weights:
    """One copy of a model's weights; several `VideoModel`s may look at it."""

    model: WanModel
    resident: comfyui.Resident
    # LoRAs that were to be merged and stay unmerged, because the weights are quantized.
    left_unmerged: tuple[LoraSpec, ...] = ()


# Tensors of the size of all tokens that one forward holds at a time: measured 14.5 at 14B, 480p, 81 frames.
ACTIVATIONS = 16

# Tensors of the size of four decoded frames at their width before RGB that a VAE holds at a time; a small decoder holds
# fewer.
VAE_ACTIVATIONS = 8

# Weights in use, by what they were loaded from and how: the same request gets the same copy.
_in_use: WeakValueDictionary[tuple[Any, ...], Weights] = WeakValueDictionary()


@dataclass(frozen=True)
class VideoModel:
    """WANVIDEOMODEL: weights, and how to run them."""

    weights: Weights = field(repr=False)
    name: str
    precision: str
    attention_mode: str
    adapter_mode: str | None
    attention_policy: str = "default"
    swap: BlockSwap | None = None
    compile_settings: CompileSettings | None = None
    loras: tuple[LoraSpec, ...] = ()  # the unmerged ones
    keep_on_device: bool = False
    overrides: tuple[ModeOverride, ...] = ()

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        adapter: Adapter | None,
        precision: str,
        quantization: str,
        attention_mode: str,
        loras: tuple[LoraSpec, ...] = (),
        compile_settings: CompileSettings | None = None,
        swap: BlockSwap | VramManagement | None = None,
        keep_on_device: bool = False,
    ) -> VideoModel:
        """Read the files, or take the copy that is loaded already."""
        dtype = PRECISIONS[precision]
        attention_mode = canonical_mode(attention_mode)
        shapes = inspect_dit(path, None if adapter is None else adapter.path, quantization)
        if isinstance(swap, VramManagement):
            some = swap.share > 0
            swap = BlockSwap(math.ceil(swap.share * shapes.num_layers), image_embedding=some, text_embedding=some)
        check_with_block_swap(compile_settings, swap)
        with comfyui.ordinary_tensors():
            check_mode(attention_mode, shapes.num_heads, shapes.head_dim, comfyui.device(), dtype)
        inspect_loras(shapes, loras)
        merged = tuple(lora for lora in loras if lora.merge and lora.strength != 0)
        unmerged = tuple(lora for lora in loras if not lora.merge and lora.strength != 0)
        key = (
            _stamp(path),
            adapter and _stamp(adapter.path),
            dtype,
            quantization,
            tuple((_stamp(lora.path), lora.strength) for lora in merged),
            compile_settings,
        )
        weights = _in_use.get(key)
        if weights is None:
            with comfyui.ordinary_tensors():
                check_compiler(compile_settings, comfyui.device())
                weights = _load_weights(path, adapter, precision, quantization, merged, compile_settings, swap)
            _in_use[key] = weights
        else:
            logger.info("%s is loaded already with these settings", path.name)
        model = cls(
            weights,
            name=path.name,
            precision=precision,
            attention_mode=attention_mode,
            adapter_mode=None if adapter is None else adapter.mode,
            swap=swap,
            compile_settings=compile_settings,
            loras=unmerged,
            keep_on_device=keep_on_device,
        )
        model.apply_loras()  # now, so that a wrong file is reported on this node
        if keep_on_device:
            model.to_device()
        return model

    def with_loras(self, loras: tuple[LoraSpec, ...]) -> VideoModel:
        """The same weights with `loras` unmerged, instead of those before."""
        model = replace(self, loras=tuple(lora for lora in loras if lora.strength != 0))
        model.apply_loras()
        return model

    def with_attention_override(self, mode: str, steps: tuple[int, int], blocks: tuple[int, ...] | None) -> VideoModel:
        """The same model with another mode of self-attention in some steps and blocks (None: all of them).

        Raises InputError for steps that are none and blocks that the model has not, BackendUnavailableError for a mode
        that does not run here.
        """
        if steps[0] >= steps[1]:
            raise InputError(f"The steps from {steps[0]} to {steps[1]} are none: set end_step above start_step.")
        check_blocks(blocks or (), len(self.model.blocks))
        mode, config = canonical_mode(mode), self.model.config
        with comfyui.ordinary_tensors():
            check_mode(mode, config.num_heads, config.head_dim, comfyui.device(), self.model.dtype)
        return replace(self, overrides=(*self.overrides, ModeOverride(mode, steps, blocks)))

    def with_attention_policy(self, policy: str) -> VideoModel:
        return replace(self, attention_policy=policy)

    def with_block_swap(self, swap: BlockSwap | None) -> VideoModel:
        check_with_block_swap(self.compile_settings, swap)
        return replace(self, swap=swap)

    @property
    def model(self) -> WanModel:
        return self.weights.model

    @property
    def mode(self) -> str:
        """How windows follow each other, a row of `MODES`: by the adapter's name or the model's."""
        return self.adapter_mode or mode_by_name(self.name) or "infinitetalk"

    def working_bytes(self, frames: int, height: int, width: int) -> int:
        """About the bytes that one forward needs on top of the weights, for a window of that size in pixels."""
        tokens = (1 + (frames - 1) // 4) * (height // 16) * (width // 16)
        return ACTIVATIONS * tokens * self.model.config.dim * self.model.dtype.itemsize

    def to_device(self, working_bytes: int = 0) -> None:
        """On the device, with this block swap and these LoRAs, and room for `working_bytes`."""
        self.weights.resident.set_swap(self.swap)
        self.apply_loras()
        self.weights.resident.load(working_bytes)

    def unload(self) -> None:
        if not self.keep_on_device:
            self.weights.resident.unload()

    def apply_loras(self) -> None:
        """Apply the LoRAs of this view, unmerged, where the weights carry others."""
        wanted = (*self.weights.left_unmerged, *(replace(lora, merge=False) for lora in self.loras))
        if tuple(active_loras(self.model)) != wanted:
            with comfyui.ordinary_tensors(), self.weights.resident.offloader.changing():
                apply_loras(self.model, wanted)


def _load_weights(
    path: Path,
    adapter: Adapter | None,
    precision: str,
    quantization: str,
    merged: tuple[LoraSpec, ...],
    compile_settings: CompileSettings | None,
    swap: BlockSwap | None,
) -> Weights:
    dtype = PRECISIONS[precision]
    model = load_dit(
        path,
        None if adapter is None else adapter.path,
        base_dtype=dtype,
        quantization="disabled" if merged else quantization,
        progress=comfyui.Progress(1),
    )
    if merged:
        apply_loras(model, merged, comfyui.device())
        quantize_linears(model, quantization, dtype)  # after merging, so that weights are rounded once
    if compile_settings is not None:
        compile_model(model, compile_settings)
    return Weights(model, comfyui.Resident(model, comfyui.device(), swap), tuple(active_loras(model)))


# --- the VAE -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VaeModel:
    """WANVAE: a VAE, or a small decoder. `encoder` encodes in its place, where there is one."""

    vae: WanVAE | SmallDecoder = field(repr=False)
    resident: comfyui.Resident = field(repr=False)
    verbose: bool = False
    encoder: VaeModel | None = None

    @classmethod
    def load(
        cls, path: Path, precision: str, *, compile_settings: CompileSettings | None = None, verbose: bool = False
    ) -> VaeModel:
        with comfyui.ordinary_tensors():
            check_compiler(compile_settings, comfyui.device())
            vae = WanVAE.load(path, PRECISIONS[precision])
            if compile_settings is not None:
                compile_model(vae.model.decoder, replace(compile_settings, blocks_only=False))
            return cls(vae, comfyui.Resident(vae.model, comfyui.device()), verbose)

    @classmethod
    def load_small_decoder(cls, path: Path, precision: str, *, at_once: bool) -> VaeModel:
        with comfyui.ordinary_tensors():
            decoder = SmallDecoder.load(path, PRECISIONS[precision], at_once=at_once)
            return cls(decoder, comfyui.Resident(decoder.model, comfyui.device()))

    def decoding_by(self, other: VaeModel) -> VaeModel:
        """Encodes as this one, decodes as `other`. Raises InputError where this one encodes nothing."""
        self.check_encodes()
        return replace(other, encoder=self)

    def check_encodes(self) -> None:
        """Raise InputError for a small decoder alone."""
        if self.encoder is None and isinstance(self.vae, SmallDecoder):
            raise InputError(
                "A small decoder encodes no images: connect vae to InfiniteTalk VAE Loader, or join both with "
                "InfiniteTalk Small Decoder."
            )

    def described(self) -> dict[str, str]:
        """Name -> digest of what encodes and what decodes."""
        own = digest_of_weights(self.vae.model)
        if isinstance(self.vae, SmallDecoder):
            own += f" of {'raw' if self.vae.denormalize else 'normalized'} latents"
        return {"VAE": own} if self.encoder is None else {**self.encoder.described(), "decoder": own}

    def encode(self, video: Tensor, *, tiled: bool = False, **tiles: int) -> Tensor:
        """Pixels [1, 3, F, H, W] in [-1, 1] to latents [1, 16, T, h, w], on the VAE's device."""
        self.check_encodes()
        if self.encoder is not None:
            return self.encoder.encode(video, tiled=tiled, **tiles)
        assert isinstance(self.vae, WanVAE)
        return self._run("encoded", self.vae.encode, video, tiled, tiles)

    def decode(self, latents: Tensor, *, tiled: bool = False, **tiles: int) -> Tensor:
        """Latents [1, 16, T, h, w] to pixels [1, 3, F, H, W] in [-1, 1], where the latents are."""
        return self._run("decoded", self.vae.decode, latents, tiled, tiles)

    def unload(self) -> None:
        self.resident.unload()
        if self.encoder is not None:
            self.encoder.unload()

    def _working_bytes(self, x: Tensor, *, pixels: bool) -> int:
        """About what working on a video [1, 3, F, H, W] or on latents [1, 16, T, h, w] takes, untiled."""
        scale = 1 if pixels else self.vae.spatial_ratio
        area = int(x.shape[3]) * int(x.shape[4]) * scale**2
        frames = 4 * (int(x.shape[2]) if self.vae.at_once else 1)
        working = VAE_ACTIVATIONS * frames * area * self.vae.width * self.vae.dtype.itemsize
        if pixels or x.device.type == "cpu":
            return working
        return working + 2 * 4 * int(x.shape[2]) * area * 3 * 4  # float32 frames, and those of matched colors

    def _run(self, done: str, action: Callable[..., Tensor], x: Tensor, tiled: bool, options: dict[str, Any]) -> Tensor:
        self.resident.load(self._working_bytes(x, pixels=done == "encoded"))
        begin = time.monotonic()
        with comfyui.ordinary_tensors():
            result = action(x, tiled=tiled, callback=lambda part, parts: comfyui.stop_if_interrupted(), **options)
        if self.verbose:
            logger.info("VAE %s %s to %s in %.1f s", done, list(x.shape), list(result.shape), time.monotonic() - begin)
        return result


# --- the text encoder --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextModel:
    """WANTEXTENCODER."""

    encoder: TextEncoder = field(repr=False)
    resident: comfyui.Resident = field(repr=False)
    identity: str
    keep_on_device: bool = False

    @classmethod
    def load(cls, path: Path, precision: str, quantization: str, *, keep_on_device: bool = False) -> TextModel:
        with comfyui.ordinary_tensors():
            encoder = TextEncoder.load(path, _tokenizer_source(path), PRECISIONS[precision], quantization=quantization)
            resident = comfyui.Resident(encoder.model, comfyui.device())
        return cls(encoder, resident, f"{_stamp(path)} {precision} {quantization}", keep_on_device)

    def encode(self, prompt: str, where: str) -> Tensor:
        """Features [tokens, text_dim], float32 in host memory; `where` is "gpu" or "cpu"."""
        if where == "gpu":
            self.resident.load()
        else:
            self.resident.unload()
        with comfyui.ordinary_tensors():
            return self.encoder.encode([prompt])[0].cpu()

    def unload(self) -> None:
        if not self.keep_on_device:
            self.resident.unload()

    @staticmethod
    def encode_prompts(
        model: TextModel | None, positive: str, negative: str, *, device: str, cache: Path | None
    ) -> TextEmbeds:
        """Both prompts, from the cache folder where they are in it.

        Raises InputError when there is neither a text encoder nor a cached result.
        """
        return _embeds(
            positive, negative, lambda prompt: TextModel.encode_text(model, prompt, device=device, cache=cache)
        )

    @staticmethod
    def encode_text(model: TextModel | None, text: str, *, device: str, cache: Path | None) -> Tensor:
        """Features [tokens, text_dim] of one text as it stands; the rest as `encode_prompts`."""

        def encode(prompt: str) -> Tensor:
            if model is None:
                raise InputError(
                    f"The prompt '{prompt[:40]}' is not in the disk cache and no text encoder is connected: connect t5."
                )
            return model.encode(prompt, device)

        return _cached(text, None if model is None else model.identity, cache, encode)

    @classmethod
    def encode_once(
        cls,
        path: Path,
        precision: str,
        quantization: str,
        positive: str,
        negative: str,
        *,
        device: str,
        cache: Path | None,
    ) -> TextEmbeds:
        """Both prompts; the encoder is read only if one of them is not in the cache, and let go at the end."""
        loaded: list[TextModel] = []

        def encode(prompt: str) -> Tensor:
            if not loaded:
                loaded.append(cls.load(path, precision, quantization))
            return loaded[0].encode(prompt, device)

        identity = f"{_stamp(path)} {precision} {quantization}"
        embeds = _embeds(positive, negative, lambda prompt: _cached(prompt, identity, cache, encode))
        for model in loaded:
            model.resident.unload()
        return embeds


def _embeds(positive: str, negative: str, encode: Callable[[str], Tensor]) -> TextEmbeds:
    """Both prompts. Factors are applied behind the cache, which holds what the encoder gives for a text in any role."""
    pieces = encode_pieces(parse_prompt(positive), lambda texts: [encode(text) for text in texts])
    return TextEmbeds(pieces, encode(negative))


def _cached(prompt: str, identity: str | None, folder: Path | None, encode: Callable[[str], Tensor]) -> Tensor:
    """`encode(prompt)`, kept as one file per prompt and encoder; without an encoder the prompt alone is looked for."""
    if folder is None:
        return encode(prompt)
    words = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    if identity is None:
        found = sorted(folder.glob(f"{words}-*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)
        if len(found) > 1:
            logger.warning("The disk cache has a prompt from %d text encoders: the latest is used", len(found))
        for file in found:
            features = _kept(file)
            if features is not None:
                return features
        return encode(prompt)
    file = folder / f"{words}-{hashlib.sha256(identity.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}.safetensors"
    features = _kept(file)
    if features is None:
        features = encode(prompt)
        try:
            partial = file.with_suffix(".partial")
            save_file({"features": aligned_contiguous(features)}, partial)
            partial.replace(file)
        except (OSError, SafetensorError) as error:
            logger.warning("The prompt cannot be kept in %s (%s): it will be encoded again", folder, error)
    return features


def _kept(file: Path) -> Tensor | None:
    """The prompt features in a file of the cache; None without one, and, with a log line, for one that is damaged."""
    if not file.exists():
        return None
    try:
        with CheckpointFile(file) as content:
            features = content.read("features") if "features" in content.shapes else torch.empty(0)
        if features.ndim != 2 or 0 in features.shape or not features.is_floating_point():
            raise CheckpointError(f"{file} holds no prompt features.")
        if not torch.isfinite(features).all():
            raise CheckpointError(f"{file} holds prompt features that are not finite.")
    except CheckpointError as error:
        logger.warning("The cached prompt is not used and is made again: %s", error)
        return None
    return features


def _tokenizer_source(path: Path) -> str | None:
    """None where the file brings its tokenizer or has one in its folder, else the hub's name of it."""
    with CheckpointFile(path) as file:
        if "spiece_model" in file.shapes:
            return None
    try:
        load_tokenizer(None, near=path)
    except CheckpointError:
        return HUB_TOKENIZER
    return None


# --- CLIP vision -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VisionModel:
    """CLIP_VISION of our own loader."""

    clip: ClipVision = field(repr=False)
    resident: comfyui.Resident = field(repr=False)

    @classmethod
    def load(cls, path: Path, precision: str) -> VisionModel:
        with comfyui.ordinary_tensors():
            clip = ClipVision.load(path, PRECISIONS[precision])
            return cls(clip, comfyui.Resident(clip.model, comfyui.device()))

    def hidden_states(self, image: Tensor, crop: str) -> Tensor:
        """[B, H, W, 3] in [0, 1] -> [B, 257, width (1280 in the public files)], float32 in host memory."""
        self.resident.load()
        pixels = image[..., :3].movedim(-1, 1) * 2 - 1
        if crop == "center":
            side = min(pixels.shape[-2:])
            top, left = (pixels.shape[-2] - side) // 2, (pixels.shape[-1] - side) // 2
            pixels = pixels[..., top : top + side, left : left + side]
        with comfyui.ordinary_tensors():
            return self.clip.encode(pixels).cpu()


COMBINATIONS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "average": lambda embeds: torch.stack(embeds).mean(0),
    "sum": lambda embeds: torch.stack(embeds).sum(0),
    "concat": lambda embeds: torch.cat(embeds, dim=1),
}


def check_combination(name: str) -> None:
    """Raise InputError for a way to combine images that is not run here."""
    if name not in COMBINATIONS:
        raise InputError(f"combine_embeds '{name}' is not part of this pack: choose {' or '.join(COMBINATIONS)}.")


def _tiles_of(image: Tensor, tiles: int, crop: str) -> list[Tensor]:
    """`tiles` x `tiles` parts of [1, H, W, C], row by row; of its middle square where `crop` is "center".

    Raises InputError for an image with fewer pixels than that.
    """
    height, width = int(image.shape[1]), int(image.shape[2])
    if crop == "center":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        image, height, width = image[:, top : top + side, left : left + side], side, side
    if min(height, width) < tiles:
        raise InputError(f"An image of {width} x {height} pixels has no {tiles} x {tiles} tiles: set tiles lower.")
    rows = image[:, : height // tiles * tiles].chunk(tiles, dim=1)
    return [part for row in rows for part in row[:, :, : width // tiles * tiles].chunk(tiles, dim=2)]


def _joined(parts: list[Tensor], tiles: int) -> Tensor:
    """Features of tiles [1, 1 + g^2, C] as those of one image: the mean of their first tokens, and their grids side by
    side, averaged down to g x g. Raises InputError for models whose tokens are no grid."""
    side = math.isqrt(int(parts[0].shape[1]) - 1)
    if side**2 + 1 != parts[0].shape[1]:
        raise InputError(f"This CLIP model has {parts[0].shape[1]} tokens, which are no grid: set tiles to 0.")
    first = torch.stack([part[:, :1] for part in parts]).mean(0)
    grids = torch.stack([part[0, 1:].unflatten(0, (side, side)) for part in parts])  # [tiles^2, g, g, C]
    mosaic = rearrange(grids, "(y x) h w c -> 1 c (y h) (x w)", y=tiles)
    return torch.cat([first, F.adaptive_avg_pool2d(mosaic, side).flatten(2).transpose(1, 2)], dim=1)


def clip_embeds_of(
    clip_vision: Any,
    images: Sequence[tuple[Tensor, float]],
    *,
    negative: Tensor | None,
    crop: str,
    combine: str,
    tiles: int,
    tile_share: float,
    force_offload: bool,
) -> ClipEmbeds:
    """Features of (image, strength) pairs, combined; `clip_vision` is ours or a core CLIP_VISION.

    Args:
        tiles: look at this many times this many tiles of each image too; 0 and 1 at the whole alone.
        tile_share: share of the tiles in the features.
    """
    if len(images) > 1:
        check_combination(combine)

    def features(image: Tensor, crop: str = crop) -> Tensor:
        image = checked_image(image)
        if isinstance(clip_vision, VisionModel):
            return clip_vision.hidden_states(image[:1], crop)
        return comfyui.clip_hidden_states(clip_vision, image[:1], crop).float().cpu()

    def tiled(image: Tensor) -> Tensor:
        whole = features(image)
        if tiles < 2 or tile_share == 0:
            return whole
        parts = _tiles_of(checked_image(image)[:1], tiles, crop)
        return whole.lerp(_joined([features(part, "disabled") for part in parts], tiles), tile_share)

    embeds = [tiled(image) * strength for image, strength in images]
    positive = embeds[0] if len(embeds) == 1 else COMBINATIONS[combine](embeds)
    result = ClipEmbeds(positive, None if negative is None else tiled(negative))
    if force_offload and isinstance(clip_vision, VisionModel):
        clip_vision.resident.unload()
    return result


# --- wav2vec2 ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpeechModel:
    """WAV2VECMODEL. Small (0.2 GB in fp16), so it moves by itself and not under ComfyUI's memory management."""

    features: Wav2Vec2Features = field(repr=False)
    keep_on_device: bool = True

    @classmethod
    def load(cls, path: Path, precision: str, *, keep_on_device: bool) -> SpeechModel:
        # The weights inside a Hugging Face folder, by the names that they have there: another file's neighbor may be
        # another model's config.json.
        if path.name in FOLDER_NAMES and (path.parent / "config.json").is_file():
            path = path.parent
        dtype = PRECISIONS[precision]
        if comfyui.device().type == "cpu" and dtype == torch.float16:
            dtype = torch.float32  # half precision convolutions are slow on CPUs, and no smaller in effect
        with comfyui.ordinary_tensors():
            return cls(Wav2Vec2Features.load(path, dtype), keep_on_device)

    def embed(
        self,
        recordings: Sequence[dict[str, Any]],
        *,
        normalize: bool,
        max_frames: int,
        fps: float,
        one_after_the_other: bool,
        noise_floor: bool,
        smooth: bool,
        audio_scale: float,
        audio_cfg: float,
        masks: Tensor | None,
    ) -> SpeechEmbeds:
        """Features per speaker of ComfyUI's AUDIO values, and the sound of all together."""
        speech = [load_speech(*speaker_samples(audio), target_lufs=None) for audio in recordings]
        if smooth:
            speech = [smooth_transients(waveform, SAMPLE_RATE) for waveform in speech]
        if normalize:
            speech = [normalize_loudness(waveform) for waveform in speech]
        lines = arrange(speech, one_after_the_other=one_after_the_other)
        available = Wav2Vec2Features.frames_of(len(lines[0]), fps)
        frames = min(max_frames, available)
        if frames < 1:
            raise InputError("The recordings are shorter than one video frame: give longer ones.")
        lines = [line[: Wav2Vec2Features.samples_of(frames, fps)] for line in lines]
        audible = [add_noise_floor(line) for line in lines] if noise_floor else lines
        with comfyui.ordinary_tensors():
            self.features.to(comfyui.device())
            rows = tuple(self._features(line, frames, fps) for line in audible)
            if not self.keep_on_device:
                self.features.to("cpu")
        return SpeechEmbeds(rows, frames, fps, audio_scale, audio_cfg, masks, _sound(recordings, lines))

    def _features(self, line: Any, frames: int, fps: float) -> Tensor:
        comfyui.stop_if_interrupted()
        return self.features(line, frames, fps)


@dataclass(frozen=True)
class WhisperModel:
    """WHISPERMODEL. It moves by itself and not under ComfyUI's memory management, like `SpeechModel`."""

    features: WhisperFeatures = field(repr=False)
    keep_on_device: bool = True

    @classmethod
    def load(cls, path: Path, precision: str, *, keep_on_device: bool) -> WhisperModel:
        dtype = PRECISIONS[precision]
        if comfyui.device().type == "cpu" and dtype == torch.float16:
            dtype = torch.float32
        with comfyui.ordinary_tensors():
            return cls(WhisperFeatures.load(path, dtype), keep_on_device)

    def embed(self, audio: dict[str, Any]) -> Tensor:
        """Features [frames, groups, width] of an AUDIO, as loud as it is; 25 frames a second."""
        waveform = load_speech(*speaker_samples(audio), target_lufs=None)
        with comfyui.ordinary_tensors():
            self.features.to(comfyui.device())
            rows = self.features(waveform)
            if not self.keep_on_device:
                self.features.to("cpu")
        return rows


def speaker_samples(audio: dict[str, Any]) -> tuple[Tensor, int]:
    """(samples [channels, n], rate in Hz) of a speaker's AUDIO; InputError as `checked_audio`, and for a batch."""
    waveform, rate = checked_audio(audio)
    if len(waveform) > 1:
        raise InputError(
            f"A recording came with {len(waveform)} in a batch: give each speaker one (audio_1, audio_2 ...)."
        )
    return waveform[0], rate


def _sound(recordings: Sequence[dict[str, Any]], lines: Sequence[Any]) -> dict[str, Any]:
    """What the video sounds like: a single recording as it came, cut to length; several mixed at 16 kHz."""
    if len(recordings) == 1:
        rate = int(recordings[0]["sample_rate"])
        samples = int(len(lines[0]) / SAMPLE_RATE * rate)
        return {"waveform": recordings[0]["waveform"][..., :samples], "sample_rate": rate}
    return {"waveform": torch.from_numpy(mix(lines))[None, None], "sample_rate": SAMPLE_RATE}


def normalized_audio(audio: dict[str, Any], lufs: float) -> dict[str, Any]:
    """AUDIO at another loudness; every channel by the same factor. Raises InputError for what is no recording."""
    waveform, rate = checked_audio(audio)
    scaled = []
    for recording in waveform:  # [channels, n]
        mono = recording.float().mean(0).numpy()
        check_samples(mono, rate, "The recording")
        louder = normalize_loudness(mono, rate, lufs)
        peak = int(abs(mono).argmax())
        gain = float(louder[peak] / mono[peak]) if mono[peak] != 0 else 1.0
        scaled.append(recording * gain)
    return {"waveform": torch.stack(scaled), "sample_rate": rate}
