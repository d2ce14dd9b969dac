"""Two complete sets of tiny checkpoints, in the formats and key names of the public ones.

They exist to try the whole way from an image and a recording to a video within seconds and without a download: their
files pass through the same loaders as the 14B ones.

The talking set makes drawn faces speak (docs/demo-model.md). Its DiT, adapter, VAE and wav2vec2 are trained and come
with the package; its text encoder and its CLIP are random, and made here. The random set paints noise: a DiT of two
layers of two heads of 64, a VAE of the public layout with 4 instead of 96 base channels, 16 latent channels and strides
4x8x8, a small decoder beside it, a CLIP that yields 257 tokens of 1280, FlashTalk in two parts, and HuMo in both its
forms with a Whisper.
Random numbers come from NumPy's PCG64, so that the same bytes are written everywhere.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from .. import assets
from ..pipeline.make_video import ModelFiles
from ..wanvideo.errors import InputError

State = dict[str, Tensor]

DIM, HEADS, LAYERS, FFN = 128, 2, 2, 256
TEXT_DIM, TEXT_FFN, TEXT_HEADS, TEXT_LAYERS = 64, 128, 2, 2
CLIP_DIM, CLIP_FFN, CLIP_LAYERS, CLIP_TOKENS, CLIP_PATCH = 1280, 64, 2, 257, 14
AUDIO_DIM, AUDIO_FFN, AUDIO_LAYERS, AUDIO_CONV = 128, 128, 2, 32
AUDIO_HIDDEN, AUDIO_OUT, AUDIO_TOKENS = 64, 64, 8
VAE_DIM, VAE_LATENT = 4, 16
DECODER_WIDTHS = (16, 8, 8, 8)
WHISPER_DIM, WHISPER_MELS, WHISPER_POSITIONS = 32, 128, 1500
HUMO_HIDDEN, HUMO_OUT, HUMO_TOKENS = 64, 64, 16

TALKING_PARTS = ("model", "adapter", "vae", "wav2vec")
TALKING_BYTES = 12 * 2**20
"""What the trained files may weigh together."""
TALKING_CLIP_DIM = 64
TALKING_DEFAULTS: dict[str, float] = {
    "width": 128,
    "height": 128,
    "frames": 81,
    "motion_frames": 9,
    "steps": 8,
    "shift": 3.0,
    "cfg": 1.0,
    "audio_cfg": 1.0,
}
"""What the talking set was trained for; like the distilled 14B models it needs no guidance."""
RANDOM_DEFAULTS: dict[str, float] = TALKING_DEFAULTS | {"width": 64, "height": 64, "frames": 17, "steps": 2}
"""Noise needs no more."""

FLASHTALK_DEFAULTS: dict[str, float] = {"width": 64, "height": 64, "steps": 2}

HUMO_DEFAULTS: dict[str, float] = {"width": 64, "height": 64, "steps": 2}

ONLY_RANDOM = ("decoder", "flashtalk", "humo", "humo_small", "whisper")
"""Files of a `TinySet` that the talking set lacks."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Of an attention of transformers."""

# kernels of the seven convolutions of wav2vec2
WAV2VEC_KERNELS = (10, 3, 3, 3, 3, 2, 2)

WAV2VEC_CONFIG = {
    "architectures": ["Wav2Vec2Model"],
    "model_type": "wav2vec2",
    "hidden_size": AUDIO_DIM,
    "num_hidden_layers": AUDIO_LAYERS,
    "num_attention_heads": AUDIO_DIM // 64,
    "intermediate_size": AUDIO_FFN,
    "conv_dim": [AUDIO_CONV] * len(WAV2VEC_KERNELS),
    "conv_kernel": list(WAV2VEC_KERNELS),
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_bias": False,
    "num_feat_extract_layers": len(WAV2VEC_KERNELS),
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "feat_extract_norm": "group",
    "do_stable_layer_norm": False,
}

WAV2VEC_PREPROCESSOR = {
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "feature_size": 1,
    "sampling_rate": 16000,
    "do_normalize": True,
    "padding_value": 0,
    "return_attention_mask": False,
}


@dataclass(frozen=True)
class TinySet:
    """Where the files of the set lie.

    `wav2vec_file` is the same model as the folder `wav2vec`, in one file. `ONLY_RANDOM` are in the random set only:
    `flashtalk` is a folder with a model in two parts, its audio layers among them;
    `humo` reads references in condition channels, as the 17B model does, and `humo_small` in x, as the 1.7B one.
    """

    model: Path
    adapter: Path
    vae: Path
    text_encoder: Path
    clip_vision: Path
    wav2vec: Path
    wav2vec_file: Path
    decoder: Path
    flashtalk: Path
    humo: Path
    humo_small: Path
    whisper: Path

    @classmethod
    def in_folder(cls, folder: str | Path) -> TinySet:
        folder = Path(folder)
        return cls(
            model=folder / "wan2.1-i2v-tiny.safetensors",
            adapter=folder / "infinitetalk-tiny.safetensors",
            vae=folder / "wan2.1-vae-tiny.safetensors",
            text_encoder=folder / "umt5-tiny.safetensors",
            clip_vision=folder / "clip-vision-tiny.safetensors",
            wav2vec=folder / "wav2vec2-tiny",
            wav2vec_file=folder / "wav2vec2-tiny.safetensors",
            decoder=folder / "taew2_1-tiny.safetensors",
            flashtalk=folder / "flashtalk-tiny",
            humo=folder / "humo-17b-tiny.safetensors",
            humo_small=folder / "humo-1.7b-tiny.safetensors",
            whisper=folder / "whisper-tiny.safetensors",
        )

    @property
    def model_files(self) -> ModelFiles:
        """The set as a job takes it, decoded by its VAE."""
        return ModelFiles(self.model, self.vae, self.text_encoder, self.wav2vec, self.clip_vision, adapter=self.adapter)

    def is_complete(self) -> bool:
        """Whether a video can be made with it."""
        return all(path.exists() for name, path in vars(self).items() if name not in ONLY_RANDOM)

    @property
    def flashtalk_files(self) -> ModelFiles:
        """The random set's FlashTalk as a job takes it."""
        return ModelFiles(self.flashtalk, self.vae, self.text_encoder, self.wav2vec, self.clip_vision)

    def humo_files(self, small: bool = False) -> ModelFiles:
        """The random set's HuMo as a job takes it."""
        model = self.humo_small if small else self.humo
        return ModelFiles(model, self.vae, self.text_encoder, whisper=self.whisper)


def make_tiny(folder: str | Path, *, random: bool = False) -> TinySet:
    """Write a set into `folder` (made when missing) and return its paths; the same bytes on every call.

    Args:
        random: the set of random weights instead of the one that talks.

    Raises InputError when the folder cannot be written to.
    """
    tiny = TinySet.in_folder(folder)
    try:
        tiny.wav2vec.mkdir(parents=True, exist_ok=True)
        if random:
            _save(tiny.model, dit_weights(), {"num_heads": HEADS}, RANDOM_DEFAULTS)
            _save(tiny.adapter, adapter_weights(), {"audio_blocks": AUDIO_LAYERS})
            _save(tiny.vae, vae_weights())
            _save(tiny.decoder, decoder_weights())
            _save_parts(tiny.flashtalk, dit_weights() | adapter_weights(dtype=torch.bfloat16))
            for path, channels in ((tiny.humo, 36), (tiny.humo_small, 16)):
                _save(path, humo_weights(channels), {"num_heads": HEADS}, HUMO_DEFAULTS)
            _save(tiny.whisper, whisper_weights())
            _save(tiny.clip_vision, clip_weights())
            speech = wav2vec_weights()
        else:
            model = _trained("model")
            _save(tiny.model, load(model), _config_of(model), TALKING_DEFAULTS)
            for name in ("adapter", "vae"):
                getattr(tiny, name).write_bytes(_trained(name))
            _save(tiny.clip_vision, clip_weights(TALKING_CLIP_DIM))
            speech = load(_trained("wav2vec"))
        _save(tiny.text_encoder, text_encoder_weights())
        _save(tiny.wav2vec / "model.safetensors", speech)
        _save(tiny.wav2vec_file, {f"wav2vec2.{name}": value for name, value in _old_weight_norm(speech).items()})
        (tiny.wav2vec / "config.json").write_text(json.dumps(WAV2VEC_CONFIG, indent=2, sort_keys=True) + "\n")
        (tiny.wav2vec / "preprocessor_config.json").write_text(json.dumps(WAV2VEC_PREPROCESSOR, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"The tiny checkpoints cannot be written to {folder}: {error.strerror or error}.") from error
    return tiny


def _trained(name: str) -> bytes:
    return files(assets).joinpath("talking").joinpath(f"{name}.safetensors").read_bytes()


def _config_of(content: bytes) -> dict[str, int]:
    """What the metadata of a safetensors file of ours says that shapes do not."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return dict(json.loads(header["__metadata__"]["config"]))


class _Weights:
    """A state dict that grows by names; each tensor's numbers follow from its name and shape alone."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.state: State = {}
        self.dtype = dtype

    def normal(self, name: str, *shape: int, std: float, mean: float = 0.0) -> None:
        generator = np.random.Generator(np.random.PCG64(zlib.crc32(f"{name} {shape}".encode())))
        numbers = generator.standard_normal(shape, dtype=np.float32) * np.float32(std) + np.float32(mean)
        self.state[name] = torch.from_numpy(numbers).to(self.dtype)

    def linear(self, name: str, out: int, into: int, *kernel: int, bias: bool = True, gain: float = 1.0) -> None:
        """A matrix, or the kernel of a convolution, that keeps the magnitude of its input."""
        fan_in = into * int(np.prod(kernel)) if kernel else into
        self.normal(f"{name}.weight", out, into, *kernel, std=gain * fan_in**-0.5)
        if bias:
            self.normal(f"{name}.bias", out, std=0.02)

    def linears(self, shapes: Mapping[str, tuple[int, ...]], prefix: str = "", bias: bool = True) -> None:
        """`linear` for every name and shape (out, into, and of convolutions the kernel); `prefix` begins the names."""
        for name, shape in shapes.items():
            self.linear(f"{prefix}{name}", *shape, bias=bias)

    def norm(self, name: str, dim: int, bias: bool = True) -> None:
        self.normal(f"{name}.weight", dim, std=0.1, mean=1.0)
        if bias:
            self.normal(f"{name}.bias", dim, std=0.02)


def _every(names: Iterable[str], *shape: int) -> dict[str, tuple[int, ...]]:
    """Linear layers of one shape."""
    return dict.fromkeys(names, shape)


def dit_weights(model_type: str = "i2v", in_dim: int | None = None, dtype: torch.dtype = torch.bfloat16) -> State:
    """The DiT, bare public names; `model_type` "t2v" leaves the image branch out and takes 16 channels."""
    image = model_type == "i2v"
    w = _Weights(dtype)
    w.linears(
        {
            "patch_embedding": (DIM, in_dim or (36 if image else 16), 1, 2, 2),
            "text_embedding.0": (DIM, TEXT_DIM),
            "text_embedding.2": (DIM, DIM),
            "time_embedding.0": (DIM, 256),
            "time_embedding.2": (DIM, DIM),
            "time_projection.1": (6 * DIM, DIM),
        }
    )
    attentions = [f"{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in ("q", "k", "v", "o")]
    qk_norms = ["self_attn.norm_q", "self_attn.norm_k", "cross_attn.norm_q", "cross_attn.norm_k"]
    if image:
        w.norm("img_emb.proj.0", CLIP_DIM)
        w.linears({"img_emb.proj.1": (CLIP_DIM, CLIP_DIM), "img_emb.proj.3": (DIM, CLIP_DIM)})
        w.norm("img_emb.proj.4", DIM)
        attentions += ["cross_attn.k_img", "cross_attn.v_img"]
        qk_norms += ["cross_attn.norm_k_img"]
    for n in range(LAYERS):
        w.normal(f"blocks.{n}.modulation", 1, 6, DIM, std=0.3)
        w.linears(_every(attentions, DIM, DIM) | {"ffn.0": (FFN, DIM), "ffn.2": (DIM, FFN)}, f"blocks.{n}.")
        w.norm(f"blocks.{n}.norm3", DIM)
        for name in qk_norms:
            w.norm(f"blocks.{n}.{name}", DIM, bias=False)
    w.normal("head.modulation", 1, 2, DIM, std=0.1)
    w.linear("head.head", 2 * 2 * VAE_LATENT, DIM, gain=0.5)
    return w.state


def adapter_weights(dim: int = DIM, layers: int = LAYERS, dtype: torch.dtype = torch.float16) -> State:
    """The InfiniteTalk adapter: audio projection, one audio cross-attention and one norm per block."""
    features = AUDIO_LAYERS * AUDIO_DIM
    w = _Weights(dtype)
    projection = {
        "proj1": (AUDIO_HIDDEN, 5 * features),
        "proj1_vf": (AUDIO_HIDDEN, 8 * features),
        "proj2": (AUDIO_HIDDEN, AUDIO_HIDDEN),
        "proj3": (AUDIO_TOKENS * AUDIO_OUT, AUDIO_HIDDEN),
    }
    w.linears(projection, "audio_proj.")
    w.norm("audio_proj.norm", AUDIO_OUT)
    attention = {"q_linear": (dim, dim), "kv_linear": (2 * dim, AUDIO_OUT), "proj": (dim, dim)}
    for n in range(layers):
        w.linears(attention, f"blocks.{n}.audio_cross_attn.")
        w.norm(f"blocks.{n}.norm_x", dim)
    return w.state


def humo_weights(in_dim: int) -> State:
    """HuMo, bare public names: a text-to-video DiT of `in_dim` channels, the audio projection, and in each block an
    attention to its tokens."""
    w = _Weights(torch.bfloat16)
    projection = {
        "audio_proj_glob_1.layer": (HUMO_HIDDEN, 8 * 5 * WHISPER_DIM),
        "audio_proj_glob_2.layer": (HUMO_HIDDEN, HUMO_HIDDEN),
        "audio_proj_glob_3.layer": (HUMO_TOKENS * HUMO_OUT, HUMO_HIDDEN),
    }
    w.linears(projection, "audio_proj.")
    w.norm("audio_proj.audio_proj_glob_norm.layer", HUMO_OUT)
    attention = {"q": (DIM, DIM), "k": (DIM, HUMO_OUT), "v": (DIM, HUMO_OUT), "o": (DIM, DIM)}
    for n in range(LAYERS):
        wrapper = f"blocks.{n}.audio_cross_attn_wrapper."
        w.linears(attention, f"{wrapper}audio_cross_attn.")
        for name in ("norm_q", "norm_k"):
            w.norm(f"{wrapper}audio_cross_attn.{name}", DIM, bias=False)
        w.norm(f"{wrapper}norm1_audio", DIM)
    return dit_weights("t2v", in_dim) | w.state


def whisper_weights(dtype: torch.dtype = torch.float16) -> State:
    """The encoder of a Whisper with the 32 layers of the large one, in transformers' names."""
    w = _Weights(dtype)
    dim = WHISPER_DIM
    w.linears({"conv1": (dim, WHISPER_MELS, 3), "conv2": (dim, dim, 3)}, "model.encoder.")
    w.normal("model.encoder.embed_positions.weight", WHISPER_POSITIONS, dim, std=0.1)
    for n in range(32):
        layer = f"model.encoder.layers.{n}."
        w.linears(_every(("q_proj", "v_proj", "out_proj"), dim, dim), f"{layer}self_attn.")
        w.linear(f"{layer}self_attn.k_proj", dim, dim, bias=False)
        w.linears(_every(("fc1", "fc2"), dim, dim), layer)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            w.norm(f"{layer}{name}", dim)
    w.norm("model.encoder.layer_norm", dim)
    return w.state


def vae_weights(dim: int = VAE_DIM, dtype: torch.dtype = torch.float32) -> State:
    """The Wan2.1 VAE: widths dim x (1, 2, 4, 4), two residual blocks per level, official names."""
    w = _Weights(dtype)
    levels = [dim, 2 * dim, 4 * dim, 4 * dim]
    width = levels[-1]
    w.linears(
        {
            "encoder.conv1": (dim, 3, 3, 3, 3),
            "conv1": (2 * VAE_LATENT, 2 * VAE_LATENT, 1, 1, 1),
            "conv2": (VAE_LATENT, VAE_LATENT, 1, 1, 1),
            "decoder.conv1": (width, VAE_LATENT, 3, 3, 3),
        }
    )
    # Time is halved on the encoder's second and third level, and doubled on the decoder's first and second.
    _vae_levels(w, "encoder.downsamples", dim, levels, blocks=2, timed=(1, 2))
    _vae_levels(w, "decoder.upsamples", width, levels[::-1], blocks=3, timed=(0, 1), up=True)
    for part, out in (("encoder", 2 * VAE_LATENT), ("decoder", 3)):
        last = width if part == "encoder" else dim
        _vae_middle(w, f"{part}.middle", width)
        w.normal(f"{part}.head.0.gamma", last, 1, 1, 1, std=0.1, mean=1.0)
        # half gain: most decoded values then lie inside [-1, 1]
        w.linear(f"{part}.head.2", out, last, 3, 3, 3, gain=0.5)
    return w.state


def _vae_levels(
    w: _Weights, name: str, width: int, levels: Sequence[int], *, blocks: int, timed: Sequence[int], up: bool = False
) -> None:
    """Levels of residual blocks, between two of them a change of size; that of the decoder (`up`) halves the width."""
    index = 0
    for level, out in enumerate(levels):
        for _ in range(blocks):
            _residual(w, f"{name}.{index}", width, out)
            index, width = index + 1, out
        if level < len(levels) - 1:
            width = out // 2 if up else out
            w.linear(f"{name}.{index}.resample.1", width, out, 3, 3)
            if level in timed:
                w.linear(f"{name}.{index}.time_conv", 2 * out if up else out, out, 3, 1, 1)
            index += 1


def _residual(w: _Weights, name: str, into: int, out: int) -> None:
    w.normal(f"{name}.residual.0.gamma", into, 1, 1, 1, std=0.1, mean=1.0)
    w.linear(f"{name}.residual.2", out, into, 3, 3, 3)
    w.normal(f"{name}.residual.3.gamma", out, 1, 1, 1, std=0.1, mean=1.0)
    w.linear(f"{name}.residual.6", out, out, 3, 3, 3, gain=0.3)
    if into != out:
        w.linear(f"{name}.shortcut", out, into, 1, 1, 1)


def _vae_middle(w: _Weights, name: str, width: int) -> None:
    _residual(w, f"{name}.0", width, width)
    w.normal(f"{name}.1.norm.gamma", width, 1, 1, std=0.1, mean=1.0)
    w.linear(f"{name}.1.to_qkv", 3 * width, width, 1, 1)
    w.linear(f"{name}.1.proj", width, width, 1, 1, gain=0.3)
    _residual(w, f"{name}.2", width, width)


def decoder_weights(widths: Sequence[int] = DECODER_WIDTHS, dtype: torch.dtype = torch.float16) -> State:
    """A small decoder of Wan2.1 latents, public names, without the encoder that public files have beside it."""
    w = _Weights(dtype)
    w.linear("decoder.1", widths[0], VAE_LATENT, 3, 3)
    for level, (width, out) in enumerate(pairwise(widths)):
        first = 3 + 6 * level
        for block in range(first, first + 3):
            shapes = {"conv.0": (width, 2 * width, 3, 3), "conv.2": (width, width, 3, 3)}
            w.linears(shapes, f"decoder.{block}.")
            w.linear(f"decoder.{block}.conv.4", width, width, 3, 3, gain=0.5)
        w.linear(f"decoder.{first + 4}.conv", (2 if level else 1) * width, width, 1, 1, bias=False)
        w.linear(f"decoder.{first + 5}", out, width, 3, 3, bias=False)
    w.linear("decoder.22", 3, widths[-1], 3, 3, bias=False)
    w.normal("decoder.22.bias", 3, std=0.02, mean=0.5)  # most frames then lie inside [0, 1]
    return w.state


def text_encoder_weights(dtype: torch.dtype = torch.float32) -> State:
    """A UMT5 encoder, official names, with its SentencePiece model carried as `spiece_model` (bytes)."""
    spiece = tokenizer_model()
    w = _Weights(dtype)
    w.normal("token_embedding.weight", vocabulary_size(spiece), TEXT_DIM, std=1.0)
    layers = _every(("attn.k", "attn.v", "attn.o"), TEXT_DIM, TEXT_DIM)
    layers |= _every(("ffn.gate.0", "ffn.fc1"), TEXT_FFN, TEXT_DIM) | {"ffn.fc2": (TEXT_DIM, TEXT_FFN)}
    for n in range(TEXT_LAYERS):
        block = f"blocks.{n}"
        w.norm(f"{block}.norm1", TEXT_DIM, bias=False)
        # T5 does not divide by sqrt(head_dim): small queries keep the softmax soft
        w.linear(f"{block}.attn.q", TEXT_DIM, TEXT_DIM, bias=False, gain=0.2)
        w.linears(layers, f"{block}.", bias=False)
        w.normal(f"{block}.pos_embedding.embedding.weight", 32, TEXT_HEADS, std=0.5)
        w.norm(f"{block}.norm2", TEXT_DIM, bias=False)
    w.norm("norm", TEXT_DIM, bias=False)
    w.state["spiece_model"] = torch.frombuffer(bytearray(spiece), dtype=torch.uint8).clone()
    return w.state


def tokenizer_model() -> bytes:
    """The small SentencePiece model (unigram with byte fallback; pad 0, eos 1, unk 2 as in UMT5)."""
    return files(assets).joinpath("tiny-spiece.model").read_bytes()


def vocabulary_size(spiece: bytes) -> int:
    import sentencepiece

    return int(sentencepiece.SentencePieceProcessor(model_proto=spiece).get_piece_size())


def clip_weights(dim: int = CLIP_DIM, dtype: torch.dtype = torch.float16) -> State:
    """The CLIP vision tower in the names of transformers: 16 x 16 patches of 14 pixels and a class token."""
    w = _Weights(dtype)
    model = "vision_model"
    w.normal(f"{model}.embeddings.class_embedding", dim, std=1.0)
    w.linear(f"{model}.embeddings.patch_embedding", dim, 3, CLIP_PATCH, CLIP_PATCH, bias=False)
    w.normal(f"{model}.embeddings.position_embedding.weight", CLIP_TOKENS, dim, std=0.5)
    w.norm(f"{model}.pre_layrnorm", dim)
    mlp = {"mlp.fc1": (CLIP_FFN, dim), "mlp.fc2": (dim, CLIP_FFN)}
    for n in range(CLIP_LAYERS):
        layer = f"{model}.encoder.layers.{n}"
        w.norm(f"{layer}.layer_norm1", dim)
        w.linears(_every((f"self_attn.{part}" for part in PROJECTIONS), dim, dim) | mlp, f"{layer}.")
        w.norm(f"{layer}.layer_norm2", dim)
    w.norm(f"{model}.post_layernorm", dim)
    return w.state


def wav2vec_weights(dtype: torch.dtype = torch.float32) -> State:
    """wav2vec2 in the names of transformers, weight norm of the positional convolution as parametrization."""
    w = _Weights(dtype)
    w.normal("masked_spec_embed", AUDIO_DIM, std=1.0)
    for n, kernel in enumerate(WAV2VEC_KERNELS):
        conv = f"feature_extractor.conv_layers.{n}.conv"
        w.linear(conv, AUDIO_CONV, AUDIO_CONV if n else 1, kernel, bias=False, gain=1.4)
    w.norm("feature_extractor.conv_layers.0.layer_norm", AUDIO_CONV)
    w.norm("feature_projection.layer_norm", AUDIO_CONV)
    w.linear("feature_projection.projection", AUDIO_DIM, AUDIO_CONV)
    conv = "encoder.pos_conv_embed.conv"
    w.normal(f"{conv}.bias", AUDIO_DIM, std=0.02)
    w.normal(f"{conv}.parametrizations.weight.original0", 1, 1, 128, std=0.02, mean=0.2)
    w.normal(f"{conv}.parametrizations.weight.original1", AUDIO_DIM, AUDIO_DIM // 16, 128, std=0.05)
    w.norm("encoder.layer_norm", AUDIO_DIM)
    feed_forward = {
        "feed_forward.intermediate_dense": (AUDIO_FFN, AUDIO_DIM),
        "feed_forward.output_dense": (AUDIO_DIM, AUDIO_FFN),
    }
    layers = _every((f"attention.{part}" for part in PROJECTIONS), AUDIO_DIM, AUDIO_DIM) | feed_forward
    for n in range(AUDIO_LAYERS):
        layer = f"encoder.layers.{n}"
        w.linears(layers, f"{layer}.")
        w.norm(f"{layer}.layer_norm", AUDIO_DIM)
        w.norm(f"{layer}.final_layer_norm", AUDIO_DIM)
    return w.state


def _old_weight_norm(state: State) -> State:
    """The names of weight norm before torch 2: weight_g and weight_v."""
    return {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): value
        for name, value in state.items()
    }


def _save_parts(folder: Path, state: State, parts: int = 2) -> None:
    """Write a model in parts with their index, as diffusers does."""
    folder.mkdir(exist_ok=True)
    names = sorted(state)
    index: dict[str, str] = {}
    for part in range(parts):
        file = f"diffusion_pytorch_model-{part + 1:05}-of-{parts:05}.safetensors"
        inside = names[part * len(names) // parts : (part + 1) * len(names) // parts]
        config = {"num_heads": HEADS, "audio_blocks": AUDIO_LAYERS}
        _save(folder / file, {name: state[name] for name in inside}, config, FLASHTALK_DEFAULTS)
        index |= dict.fromkeys(inside, file)
    size = sum(value.nbytes for value in state.values())
    content = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(content, indent=1) + "\n")


def _save(
    path: Path, state: State, config: Mapping[str, int] | None = None, defaults: Mapping[str, float] | None = None
) -> None:
    """Write a safetensors file; its metadata has `config`, which shapes do not show, and `defaults` of settings."""
    facts = {"config": config, "defaults": defaults}
    metadata = {name: json.dumps(value, sort_keys=True) for name, value in facts.items() if value}
    content = save(state, metadata=metadata or None)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    if metadata:  # safetensors writes several entries in a random order
        header["__metadata__"] = metadata
    text = json.dumps(header, separators=(",", ":")).encode().ljust(start - 8)
    path.write_bytes(content[:8] + text + content[start:])
