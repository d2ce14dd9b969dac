"""Whisper features per video frame: what the audio layers of HuMo read (arXiv 2509.08519).

16 kHz speech -> log-mel and encoder, 30 s at a time, 50 rows per second -> the hidden states in five groups -> 25 rows
per second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ..wanvideo.checkpoints.files import CheckpointFile
from ..wanvideo.checkpoints.quantized import Weights
from ..wanvideo.checkpoints.reading import fitting, json_object
from ..wanvideo.checkpoints.state_dict import (
    check_heads,
    fill_module,
    layers_of,
    size_of,
    stated_config,
    stated_number,
)
from ..wanvideo.encoders.base import Encoder, check_tensors, check_unused, empty_transformer
from ..wanvideo.errors import CheckpointError, InputError
from ..wanvideo.modules.humo import resample_features
from .wav2vec import SAMPLE_RATE, weights_in

__all__ = ["GROUPS", "WhisperFeatures", "grouped", "whisper_file"]

LAYERS = 32
"""Of the encoder of whisper-large."""

GROUPS = ((0, 8), (8, 16), (16, 24), (24, 32), (32, 33))
"""Hidden states [first, last) of which each row of features is the mean: those before the layers and after each of the
first 31, by eight; and the normed one after the last alone."""

BLOCK = 30 * SAMPLE_RATE
"""Samples that the encoder sees at once."""

FPS = 25
SAMPLES_PER_FRAME = SAMPLE_RATE // FPS
ROWS_PER_SECOND = 50

_KIND = "a Whisper model"
_ANCHOR = "encoder.layers.0.self_attn_layer_norm.weight"
_UNUSED = r"(decoder|proj_out)\..*"
"""Of the part that writes text."""


def grouped(hidden: Tensor) -> Tensor:
    """Hidden states [B, rows, 33, C] -> the means of the groups [B, rows, 5, C]."""
    return torch.stack([hidden[:, :, first:last].mean(2) for first, last in GROUPS], dim=2)


class WhisperFeatures(Encoder):
    """The encoder of whisper-large-v3, resampled to video frames."""

    @classmethod
    def load(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> WhisperFeatures:
        """Read a Hugging Face folder or one file, with the decoder or without; CheckpointError for anything else."""
        with _opened(path) as (weights, fields):
            model = _model_for(weights, fields)
            fill_module(model, _encoder_tensors(weights), what=weights.what, dtype=dtype, device=device)
        return cls(model)

    @staticmethod
    def inspect(path: str | Path) -> int:
        """Raise what `load` raises, without reading a weight; the width of the features."""
        with _opened(path) as (weights, fields):
            return int(_model_for(weights, fields).config.d_model)

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Tensor],
        fields: Mapping[str, Any] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        what: str = "The Whisper model",
    ) -> WhisperFeatures:
        """The same from tensors. `fields` may hold `encoder_attention_heads`, which shapes do not show."""
        weights = _weights(state, what)
        model = _model_for(weights, fields or {})
        fill_module(model, _encoder_tensors(weights), what=what, dtype=dtype, device=device)
        return cls(model)

    @staticmethod
    def frames_of(samples: int) -> int:
        """Video frames that so many 16 kHz samples fill: samples // 640."""
        return samples // SAMPLES_PER_FRAME

    @torch.no_grad()
    def __call__(self, waveform: NDArray[Any] | Tensor) -> Tensor:
        """Features [frames, 5, C], float32 on the CPU, of 16 kHz mono samples [n]; 25 frames per second.

        Raises InputError for samples that are not [n], not finite, or too few for a frame.
        """
        samples = torch.as_tensor(waveform).float()
        if samples.ndim != 1:
            raise InputError(f"Whisper takes mono samples [n]; got {list(samples.shape)}.")
        if self.frames_of(samples.numel()) < 1:
            raise InputError(f"The recording is too short: {samples.numel()} samples of 16 kHz fill no video frame.")
        if not torch.isfinite(samples).all():
            raise InputError("The recording has samples that are NaN or infinite; export it again.")
        rows = torch.cat([grouped(hidden) for hidden in self.hidden_states(samples)], dim=1)  # [1, rows, 5, C]
        rows = rows[:, : 2 * self.frames_of(samples.numel())]
        groups, width = rows.shape[2:]
        frames = resample_features(rows.flatten(2), ROWS_PER_SECOND, FPS)[0]
        features: Tensor = frames.unflatten(-1, (groups, width))
        return features

    @torch.no_grad()
    def hidden_states(self, samples: Tensor) -> Iterator[Tensor]:
        """Of each 30 s of samples [n] the encoder's states [1, 1500, 33, C], float32 on the CPU; the end in silence."""
        for start in range(0, samples.numel(), BLOCK):
            mel = self.log_mel(samples[start : start + BLOCK]).to(self.device, self.dtype)
            states = self.model(mel, output_hidden_states=True, return_dict=True).hidden_states
            yield torch.stack([state.float().cpu() for state in states], dim=2)

    def log_mel(self, samples: Tensor) -> Tensor:
        """[1, mels, 3000] of at most 30 s of samples, padded with silence."""
        from transformers import WhisperFeatureExtractor

        extractor: Any = WhisperFeatureExtractor
        extractor = extractor(feature_size=self.model.config.num_mel_bins)
        mel: Tensor = extractor(samples.numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
        return mel


def whisper_file(path: str | Path) -> Path:
    """The file of weights of a Hugging Face folder, or the file itself."""
    path = Path(path).expanduser()
    return weights_in(path, "Whisper") if path.is_dir() else path


class _opened:
    """`with _opened(path) as (weights, fields)`: the tensors and what the folder or the metadata states."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()

    def __enter__(self) -> tuple[Weights, dict[str, Any]]:
        fields = json_object(self.path / "config.json") if self.path.is_dir() else {}
        kind = fields.get("model_type", "whisper")
        if kind != "whisper":
            raise CheckpointError(f"{self.path} holds a {str(kind)[:40]} model, not Whisper.")
        file = whisper_file(self.path)
        self.file = CheckpointFile(file).__enter__()
        fields = {**fields, **stated_config(self.file.metadata, str(file))}
        return _weights(self.file, f"The Whisper model {self.path}"), fields

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)


def _weights(source: CheckpointFile | Mapping[str, Tensor], what: str) -> Weights:
    return Weights.of(source, (_ANCHOR,), kind=_KIND, what=what)


def _encoder_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("encoder."): x for name, x in tensors.items() if name.startswith("encoder.")}


def _model_for(weights: Weights, fields: Mapping[str, Any]) -> Any:
    """transformers' encoder that the weights fill, on the meta device."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    what = weights.what
    with fitting(what):
        blank = weights.blank()
        tensors = _encoder_tensors(blank)
        layers = layers_of(tensors, "layers.", what)
        if layers != LAYERS:
            raise CheckpointError(
                f"{what} has {layers} encoder layers; HuMo reads those of whisper-large-v3, which has {LAYERS}."
            )
        width, mels, _ = size_of(tensors, "conv1.weight", 3, what)
        heads = stated_number(fields, "encoder_attention_heads", max(1, width // 64), what)
        check_heads(width, heads, what)
        config = WhisperConfig(
            d_model=width,
            encoder_layers=layers,
            encoder_attention_heads=heads,
            encoder_ffn_dim=size_of(tensors, "layers.0.fc1.weight", 2, what)[0],
            num_mel_bins=mels,
            max_source_positions=size_of(tensors, "embed_positions.weight", 2, what)[0],
            activation_function="gelu",
        )
        model = empty_transformer(WhisperEncoder, config, "sdpa")
    check_tensors(model, tensors, what)
    check_unused(blank, [f"encoder.{name}" for name in model.state_dict()], _UNUSED, what)
    return model
