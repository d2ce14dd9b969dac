"""The prompt: cleaning, tokens, and the UMT5-XXL encoder of transformers filled from the public checkpoint."""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...fp8_optimization import Quantization, quantize_linear
from ..checkpoints.files import CheckpointFile
from ..checkpoints.quantized import Weights
from ..checkpoints.reading import fitting, small_file
from ..checkpoints.state_dict import bare_names, fill_module, layers_of, size_of
from ..errors import CheckpointError, InputError
from .base import Encoder, check_tensors, check_unused, empty_transformer

logger = logging.getLogger(__name__)

__all__ = [
    "MAX_TOKENS",
    "TEXT_QUANTIZATIONS",
    "TextEncoder",
    "Tokenizer",
    "clean_prompt",
    "load_tokenizer",
    "text_quantization",
    "transformers_names",
]

MAX_TOKENS = 512
"""The DiT's text length, end mark included."""

HUB_TOKENIZER = "google/umt5-xxl"

TEXT_QUANTIZATIONS = ("disabled", "fp8_e4m3fn")
"""How the encoder's linears may be stored; all are computed in 16 or 32 bits."""

# Linears that stay in 16 bits: transformers casts their activations to the dtype of this weight.
_UNQUANTIZED = ("wo",)


def text_quantization(name: str) -> Quantization:
    """The one of TEXT_QUANTIZATIONS that `name` spells, in any case and with any separators. Raises InputError."""
    return Quantization.parse(name, TEXT_QUANTIZATIONS, "text encoder quantization")


def clean_prompt(text: str) -> str:
    """The prompt as the public pipeline gives it to the tokenizer: mojibake repaired, HTML entities, single spaces."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


# --- tokens ----------------------------------------------------------------------------------------------------------


class Tokenizer(Protocol):
    """Text to token ids, the end mark last."""

    end: int
    size: int

    def __call__(self, text: str) -> list[int]: ...


def _check_end(end: int, what: str) -> None:
    """Reject a vocabulary that lost its beginning: all its numbers would be shifted."""
    if end != 1:
        raise CheckpointError(f"{what} has the end mark as number {end}, where UMT5's is 1: download it again.")


class SentencePieceTokenizer:
    """A SentencePiece model (`spiece.model`), the form in which UMT5's vocabulary is published."""

    def __init__(self, content: bytes, what: str) -> None:
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(content)
            self.size = int(self._model.get_piece_size())
        except (RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(f"{what} is no SentencePiece model; download it again.") from error
        self.end = int(self._model.eos_id())
        _check_end(self.end, what)

    def __call__(self, text: str) -> list[int]:
        return [*self._model.encode(text), self.end]


class JsonTokenizer:
    """A `tokenizer.json` of the tokenizers library."""

    def __init__(self, content: bytes, path: Path) -> None:
        import tokenizers

        try:
            self._model = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{path} is no tokenizer.json; download it again.") from error
        self._model.no_padding()
        self._model.no_truncation()
        end = self._model.token_to_id("</s>")
        if end is None:
            raise CheckpointError(f"{path} has no end mark </s>: it is no UMT5 tokenizer.")
        self.end = int(end)
        _check_end(self.end, str(path))
        self.size = int(self._model.get_vocab_size())

    def __call__(self, text: str) -> list[int]:
        ids = list(self._model.encode(text).ids)
        return ids if ids and ids[-1] == self.end else [*ids, self.end]


_TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
_NEARBY = ("", "google/umt5-xxl", "umt5-xxl", "tokenizer")
_HOW = (
    f"give the folder of {HUB_TOKENIZER}'s tokenizer, its tokenizer.json or spiece.model, or the name {HUB_TOKENIZER} "
    "to download it"
)


def load_tokenizer(source: str | Path | None, near: str | Path | None = None) -> Tokenizer:
    """The tokenizer in `source`: a folder, a tokenizer.json, a spiece.model, or a repository "owner/name" of the hub.

    With None, it is looked for next to the file `near` and in folders there (where the public download puts it). The
    hub is asked only when it is named. Raises CheckpointError saying what to give.
    """
    if source is None:
        if near is not None:
            beside = Path(near).expanduser()
            beside = beside if beside.is_dir() else beside.parent  # a folder that holds the encoder in parts
            for folder in [beside / name for name in _NEARBY]:
                if any((folder / name).is_file() for name in _TOKENIZER_FILES):
                    return load_tokenizer(folder)
        where = "No tokenizer given" if near is None else f"{near} carries no tokenizer and none lies next to it"
        raise CheckpointError(f"{where}: {_HOW}.")
    path = Path(source).expanduser()
    if path.is_dir():
        for name in _TOKENIZER_FILES:
            if (path / name).is_file():
                return load_tokenizer(path / name)
        raise CheckpointError(f"The folder {path} holds no tokenizer.json and no spiece.model: {_HOW}.")
    if path.exists():
        content = small_file(path)
        if path.suffix == ".json" or content[:1] == b"{":
            return JsonTokenizer(content, path)
        return SentencePieceTokenizer(content, f"The tokenizer {path}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and path.suffix not in (".json", ".model"):
        return load_tokenizer(_from_hub(str(source)))
    raise CheckpointError(f"The tokenizer {path} does not exist: {_HOW}.")


def _from_hub(repository: str) -> Path:
    from huggingface_hub import hf_hub_download

    problem: Exception | None = None
    for name in _TOKENIZER_FILES:
        try:
            return Path(hf_hub_download(repository, name))
        except (OSError, ValueError) as error:  # not found, offline, denied: all are one of these
            problem = error
    reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
    raise CheckpointError(
        f"The tokenizer {repository} is not in the local cache and cannot be downloaded ({reason}); "
        "download its tokenizer.json or spiece.model and give the file."
    ) from problem


# --- weights ---------------------------------------------------------------------------------------------------------

_LAYER = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
# Of llama.cpp, in GGUF files.
_GGUF_LAYER = {
    "attn_norm": "layer.0.layer_norm",
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_norm": "layer.1.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
}
_EMBEDDING = "embed_tokens.weight"
_OUTER = {"token_embedding.weight": _EMBEDDING, "norm.weight": "final_layer_norm.weight"}
_GGUF_OUTER = {"token_embd.weight": _EMBEDDING, "enc.output_norm.weight": "final_layer_norm.weight"}


def transformers_names(names: Sequence[str]) -> dict[str, str]:
    """{name in transformers' encoder stack: name in the file}, from official, Hugging Face or llama.cpp's names.

    Any prefix may stand before them. Empty when the names are of no kind. Scales and markers of quantized files are
    left out.
    """
    for anchor, stem, outer, inner in (
        ("blocks.0.attn.q.weight", "blocks.", _OUTER, _LAYER),
        ("enc.blk.0.attn_q.weight", "enc.blk.", _GGUF_OUTER, _GGUF_LAYER),
    ):
        if found := bare_names(names, anchor):
            return {new: name for bare, name in found.items() if (new := _renamed(bare, stem, outer, inner))}
    bare = bare_names(names, "encoder.block.0.layer.0.SelfAttention.q.weight")
    stack = {n.removeprefix("encoder."): name for n, name in bare.items() if re.fullmatch(r"encoder\..*\.weight", n)}
    if "shared.weight" in bare:
        stack[_EMBEDDING] = bare["shared.weight"]
    return stack


def _renamed(name: str, stem: str, outer: Mapping[str, str], layer: Mapping[str, str]) -> str | None:
    if name in outer:
        return outer[name]
    number, _, rest = name.removeprefix(stem).partition(".")
    inner, _, kind = rest.rpartition(".")
    return f"block.{number}.{layer[inner]}.weight" if inner in layer and kind == "weight" else None


def _config(shapes: Mapping[str, Tensor], what: str) -> dict[str, Any]:
    """Arguments of transformers' UMT5Config; `shapes` by the names of the encoder stack."""
    stem = "block.0.layer."
    layers = layers_of(shapes, "block.", what)
    vocabulary, width = size_of(shapes, _EMBEDDING, 2, what)
    buckets, heads = size_of(shapes, f"{stem}0.SelfAttention.relative_attention_bias.weight", 2, what)
    if layers > 1 and f"block.{layers - 1}.layer.0.SelfAttention.relative_attention_bias.weight" not in shapes:
        raise CheckpointError(f"{what} is a T5 encoder, not UMT5 (it has one position table for all layers).")
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": size_of(shapes, f"{stem}0.SelfAttention.q.weight", 2, what)[0] // heads,
        "d_ff": size_of(shapes, f"{stem}1.DenseReluDense.wi_0.weight", 2, what)[0],
        "num_layers": layers,
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
    }


_ANCHORS = (
    "blocks.0.attn.q.weight",
    "enc.blk.0.attn_q.weight",
    "encoder.block.0.layer.0.SelfAttention.q.weight",
)
"""Of official names, of llama.cpp's and of Hugging Face's."""

_UNUSED = r"spiece_model|encoder\.embed_tokens\.weight|(decoder|lm_head)\..*"


def _weights(source: CheckpointFile | Mapping[str, Tensor], what: str) -> Weights:
    return Weights.of(source, _ANCHORS, kind="an UMT5 text encoder", what=what)


def _empty_model(weights: Weights, tokenizer: Tokenizer | None) -> tuple[Any, dict[str, str]]:
    """transformers' model that the weights fill, on the meta device, and {name in its encoder stack: name here}."""
    from transformers import UMT5Config, UMT5EncoderModel

    what, blank = weights.what, weights.blank()
    with fitting(what):
        names = transformers_names(list(blank))
        tensors = {new: blank[name] for new, name in names.items()}
        config = _config(tensors, what)
        # 512 tokens once: eager is fast enough.
        model = empty_transformer(UMT5EncoderModel, UMT5Config(**config))
    if tokenizer is not None and tokenizer.size > config["vocab_size"]:
        raise CheckpointError(
            f"{what} knows {config['vocab_size']} tokens, but its tokenizer has {tokenizer.size}: "
            "they do not belong together."
        )
    model.shared = model.encoder.embed_tokens  # one table, filled once, whatever the release calls it
    check_tensors(model.encoder, tensors, what)
    check_unused(blank, set(names.values()), _UNUSED, what)
    return model, names


class _Renamed(Mapping[str, Tensor]):
    """Tensors under other names, read when they are asked for: one at a time in float32, not 23 GB at once."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TextEncoder(Encoder):
    """Prompts to UMT5 features."""

    def __init__(self, model: Any, tokenizer: Tokenizer | None) -> None:
        super().__init__(model)
        self.tokenizer = tokenizer

    @classmethod
    def load(
        cls,
        path: str | Path,
        tokenizer: str | Path | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        quantization: str = "disabled",
    ) -> TextEncoder:
        """Read an UMT5 encoder in official, Hugging Face or llama.cpp's names: 16 or 32 bits, fp8, scaled fp8 or GGUF.

        `tokenizer` as in `load_tokenizer`; with None the one that the file carries (`spiece_model`) is used, else one
        that lies next to it. `quantization` is one of TEXT_QUANTIZATIONS: how the linears are stored, whatever the file
        holds. Raises CheckpointError for other files and where no tokenizer is found, InputError for other names.
        """
        wanted = text_quantization(quantization)
        if dtype not in _DTYPES:
            raise InputError(f"The text encoder computes in float32, bfloat16 or float16, not {dtype}.")
        with CheckpointFile(path) as file:
            weights, words = cls._opened(file, path, tokenizer)
            if wanted.name == "disabled":
                return cls._filled(weights, words, dtype, device)
            encoder = cls._filled(weights, words, dtype, "cpu")
        for name, module in encoder.model.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith(_UNQUANTIZED):
                # One by one, so that the device never holds all of them in 16 bits.
                quantize_linear(module.to(device), wanted, dtype)
        return encoder.to(device)

    @classmethod
    def inspect(cls, path: str | Path, tokenizer: str | Path | None = None) -> None:
        """Raise what `load` raises, without reading a weight."""
        with CheckpointFile(path) as file:
            _empty_model(*cls._opened(file, path, tokenizer))

    @staticmethod
    def _opened(file: CheckpointFile, path: str | Path, tokenizer: str | Path | None) -> tuple[Weights, Tokenizer]:
        weights = _weights(file, f"The text encoder {path}")
        if tokenizer is None and "spiece_model" in file.shapes:
            return weights, _embedded(file.read("spiece_model"), weights.what)
        return weights, load_tokenizer(tokenizer, near=path)

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Tensor],
        tokenizer: Tokenizer | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        what: str = "The text encoder",
    ) -> TextEncoder:
        """The same from tensors. Without a tokenizer only `encode_ids` works."""
        if dtype not in _DTYPES:
            raise InputError(f"The text encoder computes in float32, bfloat16 or float16, not {dtype}.")
        if tokenizer is None and "spiece_model" in state:
            tokenizer = _embedded(state["spiece_model"], what)
        return cls._filled(_weights(state, what), tokenizer, dtype, device)

    @classmethod
    def _filled(
        cls, weights: Weights, tokenizer: Tokenizer | None, dtype: torch.dtype, device: str | torch.device
    ) -> TextEncoder:
        model, names = _empty_model(weights, tokenizer)
        fill_module(
            model.encoder,
            _Renamed(weights, names),
            what=weights.what,
            dtype=dtype,
            device=device,
            # Its activations pass what float16 holds.
            float32_names=lambda name: dtype == torch.float16 and name.endswith("DenseReluDense.wo.weight"),
        )
        model.eval()
        return cls(model, tokenizer)

    @property
    def dim(self) -> int:
        """Width of a text feature (4096)."""
        return int(self.model.config.d_model)

    def tokenize(self, prompt: str) -> list[int]:
        """Token ids of the cleaned prompt, at most MAX_TOKENS, the end mark last."""
        if self.tokenizer is None:
            raise InputError("This text encoder was made without a tokenizer; give one to turn words into tokens.")
        ids = self.tokenizer(clean_prompt(prompt))
        if len(ids) > MAX_TOKENS:
            logger.warning("The prompt has %d tokens; the last %d are left out", len(ids), len(ids) - MAX_TOKENS)
            ids = [*ids[: MAX_TOKENS - 1], self.tokenizer.end]
        return ids

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """For each prompt its features [tokens, dim], float32 on the encoder's device, without padding rows."""
        if isinstance(prompts, str):
            raise InputError("Give a list of prompts, not one string.")
        if not prompts:
            return []
        tokens = [self.tokenize(prompt) for prompt in prompts]
        longest = max(len(ids) for ids in tokens)
        padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in tokens])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in tokens])
        return self.encode_ids(padded, mask)

    @torch.no_grad()
    def encode_ids(self, ids: Tensor, mask: Tensor) -> list[Tensor]:
        """The same for token ids [B, n] with `mask` [B, n], 1 for a token and 0 for padding behind it."""
        output = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device)).last_hidden_state
        return [row[:length].float() for row, length in zip(output, mask.sum(1).tolist(), strict=True)]


def _embedded(content: Tensor, what: str) -> Tokenizer:
    return SentencePieceTokenizer(content.cpu().numpy().tobytes(), f"The tokenizer inside {what[0].lower()}{what[1:]}")
