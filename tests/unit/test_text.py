"""The text encoder: prompts, tokenizers, every kind of file, and features compared with transformers' own use."""

from __future__ import annotations

import io
import logging

import pytest
import sentencepiece
import tokenizers
import torch
from safetensors.torch import save_file
from support.corruptions import write_llama_t5, write_parts
from support.goldens import relative_error
from support.parts import hugging_face_t5_names, hugging_face_to_official_t5, transformers_t5
from wanvideo_infinitetalk.wanvideo.checkpoints.state_dict import owns_aligned_memory
from wanvideo_infinitetalk.wanvideo.encoders import text as text_module
from wanvideo_infinitetalk.wanvideo.encoders.text import TextEncoder, clean_prompt, load_tokenizer
from wanvideo_infinitetalk.wanvideo.errors import CheckpointError, InputError

WORDS = [
    "a",
    "woman",
    "is",
    "talking",
    "to",
    "the",
    "camera",
    "in",
    "a",
    "bright",
    "room",
    "while",
    "the",
    "wind",
    "moves",
    "her",
    "hair",
    "and",
    "the",
    "light",
    "changes",
]


@pytest.fixture(scope="module")
def spiece() -> bytes:
    """A small real SentencePiece model, laid out as UMT5's: pad 0, end 1, unknown 2."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 3),
        model_writer=model,
        vocab_size=40,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def words_json() -> str:
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in dict.fromkeys(WORDS))]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=20)
    return tokenizer.to_str()


@pytest.fixture(scope="module")
def reference():
    return transformers_t5()


@pytest.fixture(scope="module")
def state(reference):
    return hugging_face_t5_names(reference)


@pytest.fixture(scope="module")
def encoder(state, spiece):
    return TextEncoder.from_state_dict(state, text_module.SentencePieceTokenizer(spiece, "The tokenizer"))


PROMPTS = ["a woman is talking", "", "the light changes in a room while the wind moves"]


# --- prompts and tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a   b\n\tc ", "a b c"),
        ("schÃ¶n", "schön"),
        ("&amp;quot;yes&amp;quot; &lt;3", '"yes" <3'),
        ("“quoted”", '"quoted"'),
        ("", ""),
    ],
)
def test_prompts_are_cleaned(raw, clean):
    assert clean_prompt(raw) == clean


def test_tokens_end_with_the_end_mark(encoder, spiece):
    plain = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    assert encoder.tokenize(" a  woman ") == [*plain.encode("a woman"), 1]
    assert encoder.tokenize("") == [1]


def test_long_prompts_are_cut_and_said(encoder, caplog):
    prompt = " ".join(WORDS * 60)
    whole = encoder.tokenizer(prompt)
    with caplog.at_level(logging.WARNING):
        ids = encoder.tokenize(prompt)
    assert ids == [*whole[:511], 1]
    assert f"{len(whole)} tokens; the last {len(whole) - 512} are left out" in caplog.text
    assert encoder.encode([prompt])[0].shape == (512, 64)


def test_tokenizers_from_files_and_folders(tmp_path, spiece, words_json):
    (tmp_path / "sp").mkdir()
    (tmp_path / "sp" / "spiece.model").write_bytes(spiece)
    (tmp_path / "js").mkdir()
    (tmp_path / "js" / "tokenizer.json").write_text(words_json, encoding="utf-8")
    expected = [*sentencepiece.SentencePieceProcessor(model_proto=spiece).encode("a woman"), 1]
    assert load_tokenizer(tmp_path / "sp")("a woman") == expected
    assert load_tokenizer(tmp_path / "sp" / "spiece.model")("a woman") == expected
    for source in (tmp_path / "js", tmp_path / "js" / "tokenizer.json"):
        # Neither the truncation nor the padding that the file asks for.
        assert load_tokenizer(source)("a woman is talking to the camera") == [3, 4, 5, 6, 7, 8, 9, 1]


def test_tokenizers_that_are_rejected(tmp_path):
    with pytest.raises(CheckpointError, match="No tokenizer given"):
        load_tokenizer(None)
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"nowhere\.model does not exist"):
        load_tokenizer(tmp_path / "nowhere.model")
    (tmp_path / "spiece.model").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match="no SentencePiece model"):
        load_tokenizer(tmp_path / "spiece.model")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path / "tokenizer.json")
    other = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    (tmp_path / "tokenizer.json").write_text(other.to_str())
    with pytest.raises(CheckpointError, match="no end mark"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_vocabulary_that_lost_its_beginning(tmp_path, spiece, words_json):
    (tmp_path / "spiece.model").write_bytes(spiece[2 + spiece[1] :])  # its first piece
    (tmp_path / "tokenizer.json").write_text(words_json.replace('["<pad>",0.0],', "").replace('"id":1', '"id":0'))
    for name in ("spiece.model", "tokenizer.json"):
        with pytest.raises(CheckpointError, match="end mark as number 0"):
            load_tokenizer(tmp_path / name)


def test_the_hub_is_asked_only_when_named(tmp_path, monkeypatch, spiece):
    import huggingface_hub

    asked = []

    def download(repository, name):
        asked.append((repository, name))
        if name != "spiece.model":
            raise FileNotFoundError(f"{name} is not there")
        (tmp_path / name).write_bytes(spiece)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(CheckpointError, match="google/umt5-xxl to download it"):
        load_tokenizer(None, near=tmp_path / "other" / "t5.safetensors")
    assert asked == []
    assert load_tokenizer("google/umt5-xxl")("") == [1]
    assert asked == [("google/umt5-xxl", "tokenizer.json"), ("google/umt5-xxl", "spiece.model")]


def test_offline_says_what_to_do(monkeypatch):
    import huggingface_hub

    def offline(repository, name):
        raise ConnectionError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(CheckpointError, match=r"cannot be downloaded \(offline\); download its tokenizer\.json"):
        load_tokenizer("google/umt5-xxl")


# --- features --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_agrees_with_the_librarys_own_use(encoder, reference):
    rows = encoder.encode(PROMPTS)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        ids = torch.tensor([encoder.tokenize(prompt)])
        expected = reference(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        assert row.dtype == torch.float32
        assert relative_error(row, expected) <= 2e-5


def test_empty_lists_and_single_strings(encoder):
    assert encoder.encode([]) == []
    with pytest.raises(InputError, match="list of prompts"):
        encoder.encode("a woman")


# --- files -----------------------------------------------------------------------------------------------------------


def content(spiece: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(spiece), dtype=torch.uint8)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("prefix", ["", "text_encoder."])
def test_reads_files(tmp_path, state, encoder, spiece, suffix, official, prefix):
    named = hugging_face_to_official_t5(state) if official else state
    assert ("blocks.0.attn.q.weight" in named) == official
    tensors = {prefix + name: tensor.clone() for name, tensor in named.items()}
    path = tmp_path / f"t5{suffix}"
    (tmp_path / "google" / "umt5-xxl").mkdir(parents=True)
    (tmp_path / "google" / "umt5-xxl" / "spiece.model").write_bytes(spiece)
    if suffix == ".pth":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    loaded = TextEncoder.load(path, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(loaded.encode(PROMPTS), encoder.encode(PROMPTS), strict=True))
    parameters = list(loaded.model.parameters())
    assert all(owns_aligned_memory(parameter) for parameter in parameters)
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in parameters)
    assert sum(parameter.numel() == 120 * 64 for parameter in parameters) == 1  # one table of words
    assert loaded.dim == 64


def test_a_tied_table_may_be_stored_under_either_name(state, encoder):
    tokens = encoder.tokenizer
    inner = {("encoder.embed_tokens.weight" if k == "shared.weight" else k): v for k, v in state.items()}
    both = {**inner, "shared.weight": state["shared.weight"]}
    for tensors in (inner, both):
        rows = TextEncoder.from_state_dict(tensors, tokens).encode(PROMPTS)
        assert torch.equal(rows[0], encoder.encode(PROMPTS)[0])


def test_the_file_may_carry_its_tokenizer(tmp_path, state, encoder, spiece):
    save_file({**state, "spiece_model": content(spiece)}, tmp_path / "t5.safetensors")
    loaded = TextEncoder.load(tmp_path / "t5.safetensors", dtype=torch.float32)
    assert loaded.tokenize("a woman") == encoder.tokenize("a woman")
    direct = TextEncoder.from_state_dict({**state, "spiece_model": content(spiece)})
    assert direct.tokenize("a woman") == encoder.tokenize("a woman")
    save_file({**state, "spiece_model": torch.zeros(9, dtype=torch.uint8)}, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match="tokenizer inside the text encoder"):
        TextEncoder.load(tmp_path / "bad.safetensors")


def quantized(state, dtype, scale_name, per_row=False):
    """Linear weights in fp8 with the scale that ComfyUI's files carry; also what they stand for."""
    stored, meant = {}, {}
    for name, tensor in state.items():
        if ("SelfAttention" in name or "Dense" in name) and "bias" not in name:
            amax = tensor.abs().amax(dim=1, keepdim=True) if per_row else tensor.abs().max()
            scale = (amax / torch.finfo(dtype).max).float()
            stored[name] = (tensor / scale).to(dtype)
            stored[name.removesuffix("weight") + scale_name] = scale.flatten() if per_row else scale
            meant[name] = stored[name].float() * scale
        else:
            stored[name] = meant[name] = tensor
    return stored, meant


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(
    ("scale_name", "per_row"), [("scale_weight", False), ("weight_scale", False), ("weight_scale", True)]
)
@pytest.mark.parametrize("official", [False, True])
def test_scaled_fp8(tmp_path, state, encoder, spiece, dtype, scale_name, per_row, official):
    stored, meant = quantized(state, dtype, scale_name, per_row)
    if scale_name == "scale_weight":
        stored["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    if official:
        stored = hugging_face_to_official_t5(stored)
    save_file({**stored, "spiece_model": content(spiece)}, tmp_path / "t5.safetensors")
    loaded = TextEncoder.load(tmp_path / "t5.safetensors", dtype=torch.float32)
    expected = TextEncoder.from_state_dict(meant, encoder.tokenizer)
    assert relative_error(loaded.encode(PROMPTS)[2], expected.encode(PROMPTS)[2]) <= 1e-6


@pytest.mark.parametrize("carries_vocabulary", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gguf_of_llama_cpp(tmp_path, state, encoder, spiece, dtype, carries_vocabulary):
    """The weights are the dequantized ones, rounded once, and the header's vocabulary gives SentencePiece's tokens."""
    path = tmp_path / "umt5-xxl-encoder-Q8_0.gguf"
    meant = write_llama_t5(path, state, spiece if carries_vocabulary else None)
    if not carries_vocabulary:
        with pytest.raises(CheckpointError, match="carries no tokenizer and none lies next to it"):
            TextEncoder.load(path)
        (tmp_path / "spiece.model").write_bytes(spiece)
    loaded = TextEncoder.load(path, dtype=dtype)
    expected = TextEncoder.from_state_dict(meant, encoder.tokenizer, dtype=dtype)
    weights = loaded.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.model.state_dict().items())
    assert not torch.equal(meant["shared.weight"], state["shared.weight"])
    words = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    for text in ("a woman is talking", "ﬁne  x, 世界 ½ Ａ", "", "  lead", "wo\u0308man", "</s> <pad>"):
        assert loaded.tokenizer(text) == [*words.encode(text), words.eos_id()], text
    assert torch.equal(loaded.encode(PROMPTS)[0], expected.encode(PROMPTS)[0])


def test_parts_in_a_folder_with_its_tokenizer(tmp_path, state, encoder, spiece):
    """As google/umt5-xxl is published."""
    index = write_parts(tmp_path / "umt5", state, {})
    (tmp_path / "umt5" / "spiece.model").write_bytes(spiece)
    for path in (index, index.parent):
        loaded = TextEncoder.load(path, dtype=torch.float32)
        assert torch.equal(loaded.encode(PROMPTS)[0], encoder.encode(PROMPTS)[0])


@pytest.mark.parametrize("length", [3, 39, 41])
def test_a_gguf_vocabulary_whose_parts_do_not_fit(tmp_path, state, spiece, length, monkeypatch):
    import gguf

    add = gguf.GGUFWriter.add_token_scores
    monkeypatch.setattr(gguf.GGUFWriter, "add_token_scores", lambda self, scores: add(self, [0.0] * length))
    write_llama_t5(tmp_path / "t5.gguf", state, spiece)
    with pytest.raises(CheckpointError, match=r"t5\.gguf"):
        TextEncoder.load(tmp_path / "t5.gguf")


def test_plain_fp8(state, encoder):
    stored = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}
    loaded = TextEncoder.from_state_dict(stored, encoder.tokenizer)
    expected = TextEncoder.from_state_dict({k: v.float() for k, v in stored.items()}, encoder.tokenizer)
    assert torch.equal(loaded.encode(PROMPTS)[0], expected.encode(PROMPTS)[0])


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.03), (torch.float16, 0.005)])
def test_16_bit_weights(state, encoder, dtype, limit):
    half = TextEncoder.from_state_dict(state, encoder.tokenizer, dtype=dtype)
    got, expected = half.encode(PROMPTS)[2], encoder.encode(PROMPTS)[2]
    assert half.dtype == dtype
    assert (got - expected).norm() < limit * expected.norm()
    wide = {p.dtype for n, p in half.model.named_parameters() if n.endswith("wo.weight")}
    assert wide == {torch.float32 if dtype == torch.float16 else dtype}


def test_models_that_are_refused(tmp_path, state, spiece):
    with pytest.raises(CheckpointError, match="CLIP"):
        TextEncoder.from_state_dict({"vision_model.embeddings.class_embedding": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="diffusion transformer"):
        TextEncoder.from_state_dict({"patch_embedding.weight": torch.zeros(1)})
    t5 = {k: v for k, v in state.items() if "block.1.layer.0.SelfAttention.relative_attention_bias" not in k}
    with pytest.raises(CheckpointError, match="T5 encoder, not UMT5"):
        TextEncoder.from_state_dict(t5)
    with pytest.raises(CheckpointError, match="lacks 1 of"):
        TextEncoder.from_state_dict({k: v for k, v in state.items() if "block.1.layer.1.layer_norm" not in k})
    with pytest.raises(CheckpointError, match=r"lacks embed_tokens\.weight"):
        TextEncoder.from_state_dict({k: v for k, v in state.items() if "shared" not in k})
    packed = {k: v.to(torch.uint8) if k.endswith("wi_0.weight") else v for k, v in state.items()}
    with pytest.raises(CheckpointError, match="uint8"):
        TextEncoder.from_state_dict(packed)
    with pytest.raises(InputError, match="float8"):
        TextEncoder.from_state_dict(state, dtype=torch.float8_e4m3fn)
    save_file(state, tmp_path / "t5.safetensors")
    with pytest.raises(CheckpointError, match="none lies next to it"):
        TextEncoder.load(tmp_path / "t5.safetensors")
    small = transformers_t5(vocab_size=32)
    with pytest.raises(CheckpointError, match="do not belong together"):
        TextEncoder.from_state_dict({**hugging_face_t5_names(small), "spiece_model": content(spiece)})
    with pytest.raises(InputError, match="without a tokenizer"):
        TextEncoder.from_state_dict(state).encode(["a"])


def test_production_names():
    """A few names of the published file, written out."""
    names = ["token_embedding.weight", "norm.weight", "blocks.23.attn.q.weight", "blocks.0.attn.q.weight"]
    names += ["blocks.7.ffn.gate.0.weight", "blocks.7.pos_embedding.embedding.weight", "blocks.7.norm2.weight"]
    assert text_module.transformers_names(names) == {
        "embed_tokens.weight": "token_embedding.weight",
        "final_layer_norm.weight": "norm.weight",
        "block.23.layer.0.SelfAttention.q.weight": "blocks.23.attn.q.weight",
        "block.0.layer.0.SelfAttention.q.weight": "blocks.0.attn.q.weight",
        "block.7.layer.1.DenseReluDense.wi_0.weight": "blocks.7.ffn.gate.0.weight",
        "block.7.layer.0.SelfAttention.relative_attention_bias.weight": "blocks.7.pos_embedding.embedding.weight",
        "block.7.layer.1.layer_norm.weight": "blocks.7.norm2.weight",
    }
