"""wav2vec2 features per video frame: what the audio layers of InfiniteTalk read.

16 kHz speech -> convolutions, 50 rows per second -> one row per video frame -> the outputs of all transformer layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..wanvideo.checkpoints.files import CheckpointFile
from ..wanvideo.checkpoints.quantized import Weights
from ..wanvideo.checkpoints.reading import fitting, json_object, reading
from ..wanvideo.checkpoints.shards import index_in
from ..wanvideo.checkpoints.state_dict import check_heads, fill_module, kind_of, layers_of, size_of, stated_config
from ..wanvideo.encoders.base import Encoder, check_tensors, check_unused, empty_transformer
from ..wanvideo.errors import CheckpointError, InputError

__all__ = ["FOLDER_NAMES", "SAMPLE_RATE", "Wav2Vec2Features", "wav2vec2_config", "wav2vec2_files", "weights_in"]

SAMPLE_RATE = 16_000
"""Hz. What wav2vec2 reads."""

FOLDER_NAMES = ("model.safetensors", "pytorch_model.bin")
"""What the weights in a Hugging Face folder are called."""

PIECE_FRAMES = 200
"""Rows of the convolutions' output (320 samples each) computed at once: 4 s."""

EAGER_TOKENS = 750
"""Up to this many video frames attention is transformers' eager one; its score matrix grows with the square. Beyond,
the same weights run through `scaled_dot_product_attention`, whose memory grows with the length only."""

_STRIDES: dict[tuple[int, ...], list[int]] = {(10, 3, 3, 3, 3, 2, 2): [5, 2, 2, 2, 2, 2, 2]}  # by kernel sizes

_ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish")


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 2**31


# What a folder's config.json (or our metadata) may add to the shapes -> whether a value is of that kind.
_CONFIG_FIELDS: dict[str, Callable[[Any], bool]] = {
    "num_attention_heads": _is_count,
    "conv_stride": lambda value: isinstance(value, (list, tuple)) and all(map(_is_count, value)),
    "feat_extract_norm": lambda value: value in ("group", "layer"),
    "do_stable_layer_norm": lambda value: isinstance(value, bool),
    "layer_norm_eps": lambda value: type(value) in (int, float) and 0 < value < 1,
    "hidden_act": lambda value: value in _ACTIVATIONS,
    "feat_extract_activation": lambda value: value in _ACTIVATIONS,
}


def wav2vec2_config(state: Mapping[str, Tensor], fields: Mapping[str, Any], what: str = "The file") -> dict[str, Any]:
    """Arguments for transformers' Wav2Vec2Config, from the shapes of a state dict without prefix.

    `fields` (from a config.json) says what shapes cannot: the number of heads (else 64 channels each), the strides of
    the convolutions (else those of every public wav2vec2), whether layer norms stand before or after (else as
    the public models with such a front end have it). Raises CheckpointError for other models.
    """
    stem = "feature_extractor.conv_layers."
    convs = [size_of(state, f"{stem}{n}.conv.weight", 3, what) for n in range(layers_of(state, stem, what))]
    layers = layers_of(state, "encoder.layers.", what)
    positions = "encoder.pos_conv_embed.conv.parametrizations.weight.original1"
    if not convs or not layers or positions not in state:
        raise CheckpointError(f"{what} is {kind_of(state)}, not a whole wav2vec2 model.")
    hidden, group, span = size_of(state, positions, 3, what)
    kernels = [shape[-1] for shape in convs]
    stable = f"{stem}1.layer_norm.weight" in state
    config: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "intermediate_size": size_of(state, "encoder.layers.0.feed_forward.intermediate_dense.weight", 2, what)[0],
        "conv_dim": [shape[0] for shape in convs],
        "conv_kernel": kernels,
        "conv_stride": _STRIDES.get(tuple(kernels)),
        "conv_bias": f"{stem}0.conv.bias" in state,
        "feat_extract_norm": "layer" if stable else "group",
        "do_stable_layer_norm": stable,
        "num_conv_pos_embeddings": span,
        "num_conv_pos_embedding_groups": hidden // group,
    }
    for name, fits in _CONFIG_FIELDS.items():
        if name in fields and not fits(fields[name]):
            raise CheckpointError(
                f"{what} is configured with {name} = {str(fields[name])[:40]}, which is no value of that kind; "
                "download its config.json again."
            )
    config |= {name: fields[name] for name in _CONFIG_FIELDS if name in fields}
    if config["conv_stride"] is None:
        raise CheckpointError(f"{what} has convolutions of sizes {kernels} and no config.json stating their strides.")
    if len(config["conv_stride"]) != len(kernels):
        raise CheckpointError(
            f"{what} has {len(kernels)} convolutions, but is configured with the strides {config['conv_stride'][:20]}."
        )
    check_heads(hidden, config["num_attention_heads"], what)
    # Masking is for training; without it there is no `masked_spec_embed` to look for.
    return config | {"mask_time_prob": 0.0, "mask_feature_prob": 0.0, "layerdrop": 0.0}


class Wav2Vec2Features(Encoder):
    """wav2vec2 resampled to video frames: the audio embedding that InfiniteTalk was trained with.

    Between the convolutions (50 rows per second) and the transformer stands a linear resize to one row per video frame;
    the features are the outputs of all transformer layers.
    """

    def __init__(self, model: Any, *, do_normalize: bool = False) -> None:
        super().__init__(model)
        self.do_normalize = do_normalize
        self._long_encoder: Any = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        *,
        do_normalize: bool | None = None,
    ) -> Wav2Vec2Features:
        """Read a Hugging Face folder, or one file with bare names or behind "wav2vec2.".

        `do_normalize` (zero mean and unit variance of the samples) is what the folder's preprocessor_config.json says,
        and False for a file; give True or False to override. Raises CheckpointError for what is no wav2vec2 model.
        """
        path = Path(path).expanduser()
        weights_file, fields, stated = wav2vec2_files(path)
        with CheckpointFile(weights_file) as file:
            fields = {**fields, **stated_config(file.metadata, str(weights_file))}
            weights = _weights(file, f"The wav2vec2 model {path}")
            return cls._filled(weights, fields, dtype, device, stated if do_normalize is None else do_normalize)

    @staticmethod
    def inspect(path: str | Path) -> None:
        """Raise what `load` raises, without reading a weight."""
        path = Path(path).expanduser()
        weights_file, fields, _ = wav2vec2_files(path)
        with CheckpointFile(weights_file) as file:
            fields = {**fields, **stated_config(file.metadata, str(weights_file))}
            _model_for(_weights(file, f"The wav2vec2 model {path}"), fields)

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Tensor],
        fields: Mapping[str, Any] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        do_normalize: bool = False,
        what: str = "The wav2vec2 model",
    ) -> Wav2Vec2Features:
        """The same from tensors; `fields` as in `wav2vec2_config`."""
        return cls._filled(_weights(state, what), fields or {}, dtype, device, do_normalize)

    @classmethod
    def _filled(
        cls,
        weights: Weights,
        fields: Mapping[str, Any],
        dtype: torch.dtype,
        device: str | torch.device,
        do_normalize: bool,
    ) -> Wav2Vec2Features:
        model = _model_for(weights, fields)
        fill_module(model, _one_weight_norm(weights), what=weights.what, dtype=dtype, device=device)
        return cls(model, do_normalize=do_normalize)

    @property
    def layers(self) -> int:
        return int(self.model.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.hidden_size)

    def to(self, device: str | torch.device) -> Wav2Vec2Features:
        self._long_encoder = None
        return super().to(device)

    @staticmethod
    def frames_of(samples: int, fps: float = 25.0) -> int:
        """Video frames that so many 16 kHz samples fill: int(samples / 16000 * fps)."""
        return int(samples / SAMPLE_RATE * fps)

    @staticmethod
    def samples_of(frames: int, fps: float = 25.0) -> int:
        """16 kHz samples that are read for so many video frames."""
        return int(frames / fps * SAMPLE_RATE) + 1

    @torch.no_grad()
    def __call__(self, waveform: NDArray[Any] | Tensor, num_frames: int | None = None, fps: float = 25.0) -> Tensor:
        """Features [num_frames, layers, hidden], float32 on the CPU, of 16 kHz mono samples [n].

        `num_frames` defaults to `frames_of(n, fps)`. The numbers are those of the whole recording at once, for
        any length; working memory besides the result grows with the length only, not with its square.

        Raises InputError for samples that are not [n], not finite, or too few.
        """
        samples = torch.as_tensor(waveform)
        if samples.ndim != 1 or not samples.is_floating_point():
            raise InputError(f"wav2vec2 takes mono float samples [n]; got {list(samples.shape)} of {samples.dtype}.")
        frames = self.frames_of(samples.numel(), fps) if num_frames is None else num_frames
        if frames < 1 or samples.numel() < self._receptive_field()[0]:
            raise InputError(f"The recording is too short: {samples.numel()} samples of 16 kHz fill no video frame.")
        if not torch.isfinite(samples).all():
            raise InputError("The recording has samples that are NaN or infinite; export it again.")
        if self.do_normalize:
            samples = (samples - samples.mean()) / torch.sqrt(samples.var(correction=0) + 1e-7)
        rows = self._convolve(samples)  # [1, rows, channels]
        rows = F.interpolate(rows.transpose(1, 2), size=frames, mode="linear", align_corners=True).transpose(1, 2)
        hidden, _ = self.model.feature_projection(rows)  # [1, frames, hidden]
        return self._encode(hidden)

    # --- the convolutions, piece by piece -----------------------------------------------------------------------

    def _receptive_field(self) -> tuple[int, int]:
        """(samples that one row sees, samples between rows): 400 and 320."""
        field, hop = 1, 1
        config = self.model.config
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            field = (field - 1) * stride + kernel
            hop *= stride
        return field, hop

    def _convolve(self, samples: Tensor) -> Tensor:
        """Rows [1, n, channels] of the convolutional front end over `samples` [m].

        Long recordings go through in pieces that see exactly what the whole would: a row needs 400 samples and no more,
        but for the first layer's norm over time, whose mean and variance are gathered beforehand.
        """
        extractor = self.model.feature_extractor
        field, hop = self._receptive_field()
        total = (samples.numel() - field) // hop + 1
        if total <= PIECE_FRAMES:
            piece = samples[None].to(self.device, self.dtype)
            whole: Tensor = extractor(piece).transpose(1, 2)
            return whole
        first, *others = extractor.conv_layers
        norm = self._group_norm(samples) if self.model.config.feat_extract_norm == "group" else None
        rows = []
        for begin in range(0, total, PIECE_FRAMES):
            end = min(begin + PIECE_FRAMES, total)
            hidden = samples[None, None, begin * hop : (end - 1) * hop + field].to(self.device, self.dtype)
            if norm is None:
                hidden = first(hidden)
            else:
                scale, shift = norm
                hidden = first.activation((first.conv(hidden) * scale + shift).to(self.dtype))
            for layer in others:
                hidden = layer(hidden)
            rows.append(hidden.transpose(1, 2))
        return torch.cat(rows, dim=1)

    def _group_norm(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """The first layer's norm over the whole recording, as a factor and a summand per channel [1, channels, 1]."""
        first = self.model.feature_extractor.conv_layers[0]
        kernel, stride = first.conv.kernel_size[0], first.conv.stride[0]
        total = (samples.numel() - kernel) // stride + 1
        step = PIECE_FRAMES * self._receptive_field()[1] // stride
        sums = torch.zeros(2, first.conv.out_channels, dtype=torch.float64, device=self.device)
        for begin in range(0, total, step):
            end = min(begin + step, total)
            piece = samples[None, None, begin * stride : (end - 1) * stride + kernel].to(self.device, self.dtype)
            hidden = first.conv(piece)[0].double()  # [channels, rows]
            sums += torch.stack((hidden.sum(1), hidden.square().sum(1)))
        mean, square = sums / total
        norm = first.layer_norm
        scale = norm.weight.double() * torch.rsqrt((square - mean.square()).clamp(min=0) + norm.eps)
        shift = norm.bias.double() - mean * scale
        return scale.float()[None, :, None], shift.float()[None, :, None]

    # --- the transformer -----------------------------------------------------------------------------------------

    def _encode(self, hidden: Tensor) -> Tensor:
        """Outputs of all layers, [frames, layers, hidden] on the CPU, of `hidden` [1, frames, hidden]."""
        encoder = self.model.encoder if hidden.shape[1] <= EAGER_TOKENS else self._encoder_for_length()
        out = torch.empty(hidden.shape[1], self.layers, self.hidden_size, dtype=torch.float32)

        def keep(number: int, output: Any) -> None:
            out[:, number].copy_((output[0] if isinstance(output, tuple) else output)[0])

        handles = [
            layer.register_forward_hook(lambda _module, _args, output, i=i: keep(i, output))
            for i, layer in enumerate(encoder.layers)
        ]
        try:
            last = encoder(hidden).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        # Models with norms before each layer close with one more; for the others this is the last layer's output.
        out[:, -1].copy_(last[0])
        return out

    def _encoder_for_length(self) -> Any:
        """The same encoder, sharing its weights, with an attention whose memory grows with the length only."""
        if self._long_encoder is None:
            fields = {k: v for k, v in self.model.config.to_dict().items() if not k.startswith("_")}
            twin = _empty_model(fields, "sdpa")
            twin.load_state_dict(self.model.state_dict(), strict=True, assign=True)
            self._long_encoder = twin.eval().requires_grad_(False).encoder
        return self._long_encoder


def _weights(source: CheckpointFile | Mapping[str, Tensor], what: str) -> Weights:
    return Weights.of(source, ("feature_extractor.conv_layers.0.conv.weight",), kind="a wav2vec2 model", what=what)


_UNUSED = r"masked_spec_embed|(quantizer|project_q|project_hid|lm_head|projector|classifier)\..*"
"""Of training and of other tasks."""


def _model_for(weights: Weights, fields: Mapping[str, Any]) -> Any:
    """transformers' model that the weights fill, on the meta device."""
    with fitting(weights.what):
        tensors = _one_weight_norm(weights.blank())
        model = _empty_model(wav2vec2_config(tensors, fields, weights.what), "eager")
    check_tensors(model, tensors, weights.what)
    check_unused(tensors, model.state_dict(), _UNUSED, weights.what)
    return model


def _empty_model(config: Mapping[str, Any], attention: str) -> Any:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    return empty_transformer(Wav2Vec2Model, Wav2Vec2Config(**config), attention)


def _one_weight_norm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The positional convolution's weight norm in torch's present names, whichever names the file uses."""
    stem = "encoder.pos_conv_embed.conv."
    old = {f"{stem}weight_g": "original0", f"{stem}weight_v": "original1"}
    new = {name: f"{stem}parametrizations.weight.{part}" for name, part in old.items()}
    out = {new.get(name, name): tensor for name, tensor in state.items()}
    plain = out.pop(f"{stem}weight", None)
    if plain is not None:  # the norm was multiplied in: direction = weight, length = its own
        out[f"{stem}parametrizations.weight.original0"] = plain.float().norm(dim=(0, 1), keepdim=True).to(plain.dtype)
        out[f"{stem}parametrizations.weight.original1"] = plain
    return out


def wav2vec2_files(path: str | Path) -> tuple[Path, dict[str, Any], bool]:
    """(weights, fields of config.json, whether recordings are normalized) of a Hugging Face folder, or of one file.

    Raises CheckpointError for a folder without weights or of another model.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        return path, {}, False
    fields = json_object(path / "config.json")
    kind = fields.get("model_type", "wav2vec2")
    if kind != "wav2vec2":
        raise CheckpointError(f"{path} holds a {str(kind)[:40]} model, not wav2vec2.")
    normalize = json_object(path / "preprocessor_config.json").get("do_normalize", False)
    if not isinstance(normalize, bool):
        raise CheckpointError(
            f"{path / 'preprocessor_config.json'} states do_normalize = {str(normalize)[:40]}, which is neither true "
            "nor false; download it again."
        )
    return weights_in(path, "wav2vec2"), fields, normalize


def weights_in(folder: Path, kind: str) -> Path:
    """The file of weights in a Hugging Face folder, or the index of its shards; `kind` names the model in errors."""
    for name in FOLDER_NAMES:
        if (folder / name).is_file():
            return folder / name
    index = index_in(folder)
    if index is not None:
        return index
    with reading(folder):
        candidates = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
    if len(candidates) != 1:
        raise CheckpointError(
            f"{folder} holds no model.safetensors or pytorch_model.bin; give the {kind} folder or file."
        )
    return candidates[0]
