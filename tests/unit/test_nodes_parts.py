"""Nodes one by one, where the example workflows do not reach."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import make_workflows, tiny_comfy
from support.comfy_host import Host, NodeError, hosted
from wanvideo_infinitetalk.cli.tiny_models import decoder_weights
from wanvideo_infinitetalk.wanvideo.checkpoints.lora import LoraSpec
from wanvideo_infinitetalk.wanvideo.encoders.small_decoder import SmallDecoder
from wanvideo_infinitetalk.wanvideo.errors import CheckpointError, InputError

TINY = make_workflows.TINY


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory):
    base = tmp_path_factory.mktemp("comfy")
    tiny_comfy.fill(base)
    with hosted(base) as host:
        yield host


def run(host: Host, class_type: str, **inputs: Any) -> tuple[Any, ...]:
    with torch.inference_mode():
        return host.nodes[class_type].execute(**inputs).args


def sound(seconds: float = 1.0, rate: int = 22_050, channels: int = 2) -> dict[str, Any]:
    t = torch.arange(int(seconds * rate)) / rate
    wave = 0.2 * torch.sin(2 * torch.pi * 200 * t) * torch.sin(2 * torch.pi * 3 * t)
    return {"waveform": wave.repeat(1, channels, 1), "sample_rate": rate}


# --- values of other nodes

PIXELS = torch.rand(2, 32, 48, 3)
SAMPLES = sound()["waveform"]

WRONG: dict[str, dict[str, Any]] = {
    "IMAGE": {
        "two axes": PIXELS[0, ..., 0],
        "three axes": PIXELS[0],
        "five axes": PIXELS[None],
        "channels first": PIXELS.movedim(-1, 1),
        "two channels": PIXELS[..., :2],
        "none in the batch": PIXELS[:0],
        "no rows": PIXELS[:, :0],
        "no channels": PIXELS[..., :0],
        "NaN": PIXELS.masked_fill(PIXELS > 0.9, torch.nan),
        "infinite": PIXELS.masked_fill(PIXELS > 0.9, torch.inf),
        "-1 to 1": PIXELS * 2 - 1,
        "0 to 255": PIXELS * 255,
        "bytes": (PIXELS * 255).to(torch.uint8),
        "bool": PIXELS > 0.5,
        "array": PIXELS.numpy(),
        "list": [PIXELS],
    },
    "AUDIO": {
        "one axis": {"waveform": SAMPLES[0, 0], "sample_rate": 22050},
        "two axes": {"waveform": SAMPLES[0], "sample_rate": 22050},
        "none in the batch": {"waveform": SAMPLES[:0], "sample_rate": 22050},
        "no channels": {"waveform": SAMPLES[:, :0], "sample_rate": 22050},
        "no samples": {"waveform": SAMPLES[..., :0], "sample_rate": 22050},
        "NaN": {"waveform": SAMPLES / 0, "sample_rate": 22050},
        "16 bits": {"waveform": (SAMPLES * 2**15).to(torch.int16), "sample_rate": 22050},
        "no rate": {"waveform": SAMPLES, "sample_rate": 0},
        "a negative rate": {"waveform": SAMPLES, "sample_rate": -1},
        "a huge rate": {"waveform": SAMPLES, "sample_rate": 10**9},
        "rate as text": {"waveform": SAMPLES, "sample_rate": "22050"},
        "array": {"waveform": SAMPLES.numpy(), "sample_rate": 22050},
        "without a rate": {"waveform": SAMPLES},
        "empty": {},
        "text": "speech.wav",
    },
}
RIGHT: dict[str, Any] = {"IMAGE": PIXELS, "AUDIO": sound()}


@pytest.fixture(scope="module")
def values(host: Host, wav2vec, clip) -> dict[str, Any]:
    """A value for every type of input that nodes with images or sound need."""
    (vae,) = run(host, "InfiniteTalkVAELoader", model_name=TINY["vae"], precision="fp32")
    return {**RIGHT, "CLIP_VISION": clip, "WANVAE": vae, "WAV2VECMODEL": wav2vec}


@pytest.mark.parametrize(("kind", "form"), [(kind, form) for kind in WRONG for form in WRONG[kind]])
def test_no_node_takes_another_value_for_an_image_or_a_sound(host: Host, values, kind: str, form: str) -> None:
    tried = 0
    for name, node in host.nodes.items():
        inputs = node.GET_SCHEMA().inputs
        for wrong in [given.id for given in inputs if given.get_io_type() == kind]:
            given = {i.id: _value(i, values) for i in inputs if not i.optional or i.get_io_type() in values}
            with pytest.raises(InputError) as caught:
                run(host, name, **{**given, wrong: WRONG[kind][form]})
            assert str(caught.value).endswith("."), (name, wrong)
            tried += 1
    assert tried >= {"IMAGE": 8, "AUDIO": 5}[kind]


def _value(widget: Any, values: dict[str, Any]) -> Any:
    kind = widget.get_io_type()
    if kind in values:
        return values[kind]
    default = widget.options.get("default")
    return widget.options["options"][0] if default is None and kind == "COMBO" else default


def test_what_is_a_little_beyond_an_image_is_one(host: Host, clip) -> None:
    """As resizing with overshoots and high dynamic range make it; and gray, and with transparency."""
    for image in (PIXELS * 1.2 - 0.1, PIXELS * 3, PIXELS[..., :1], torch.cat([PIXELS, PIXELS[..., :1]], -1)):
        assert look(host, clip, image_1=image).positive.isfinite().all()
    gray = PIXELS[..., :1].expand(-1, -1, -1, 3)
    assert torch.equal(look(host, clip, image_1=PIXELS[..., :1]).positive, look(host, clip, image_1=gray).positive)


def test_several_recordings_are_not_one_speaker(host: Host, wav2vec) -> None:
    two = sound()
    two["waveform"] = two["waveform"].repeat(2, 1, 1)
    with pytest.raises(InputError, match="2 in a batch"):
        embed(host, wav2vec, two)


# --- audio


@pytest.fixture(scope="module")
def wav2vec(host: Host) -> Any:
    loader = {"model": TINY["wav2vec"], "base_precision": "fp16", "load_device": "offload_device"}
    return run(host, "InfiniteTalkWav2VecLoader", **loader)[0]


def test_a_neighbors_configuration_is_not_this_files(host: Host, tmp_path, tiny_set) -> None:
    """ComfyUI's folders are shared: config.json there belongs to the file with the name of a folder's weights."""
    from wanvideo_infinitetalk.comfy_nodes.models import SpeechModel

    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for file in (tiny_set.wav2vec_file, tiny_set.wav2vec / "model.safetensors"):
        shutil.copy(file, tmp_path)
    SpeechModel.load(tmp_path / tiny_set.wav2vec_file.name, "fp32", keep_on_device=False)
    with pytest.raises(CheckpointError, match="holds a bert model"):
        SpeechModel.load(tmp_path / "model.safetensors", "fp32", keep_on_device=False)


def test_a_wrong_lora_is_rejected_before_the_weights_are_read(host: Host, tmp_path, tiny_set, monkeypatch) -> None:
    from wanvideo_infinitetalk.comfy_nodes import models

    monkeypatch.setattr(models, "load_dit", lambda *args, **kwargs: pytest.fail("read"))
    save_file({"blocks.0.self_attn.q.diff": torch.ones(3)}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=r"lora\.safetensors was made for another model"):
        models.VideoModel.load(
            tiny_set.model,
            adapter=None,
            precision="fp32",
            quantization="disabled",
            attention_mode="sdpa",
            loras=(LoraSpec(tmp_path / "lora.safetensors"),),
        )


def embed(host: Host, wav2vec: Any, *recordings: dict[str, Any], **changes: Any) -> tuple[Any, Any, int]:
    settings: dict[str, Any] = {
        "normalize_loudness": True,
        "num_frames": 1000,
        "fps": 25.0,
        "audio_scale": 1.0,
        "audio_cfg_scale": 1.0,
        "multi_audio_type": "para",
    }
    speakers = {f"audio_{i + 1}": recording for i, recording in enumerate(recordings)}
    return run(host, "InfiniteTalkSpeech", wav2vec_model=wav2vec, **speakers, **{**settings, **changes})  # type: ignore[return-value]


def test_frames_follow_the_recording_the_limit_and_the_rate(host: Host, wav2vec) -> None:
    assert embed(host, wav2vec, sound(2.0))[2] == 50
    assert embed(host, wav2vec, sound(2.0), num_frames=30)[2] == 30
    assert embed(host, wav2vec, sound(2.0), fps=12.5)[2] == 25
    embeds, audio, frames = embed(host, wav2vec, sound(2.0), num_frames=30)
    assert len(embeds["audio_features"][0]) == frames
    assert audio["sample_rate"] == 22_050
    assert audio["waveform"].shape[-1] == pytest.approx(30 / 25 * 22_050, abs=22_050 / 25)


def test_speakers_talk_at_once_or_in_turn(host: Host, wav2vec) -> None:
    at_once = embed(host, wav2vec, sound(1.0), sound(2.0))
    in_turn = embed(host, wav2vec, sound(1.0), sound(2.0), multi_audio_type="add")
    assert at_once[2] == 50
    assert in_turn[2] == 75
    assert len(in_turn[0]["audio_features"]) == 2
    assert in_turn[1]["waveform"].shape[-1] == pytest.approx(3 * 16_000, abs=700)


@pytest.mark.parametrize("change", [{"add_noise_floor": True}, {"normalize_loudness": False}])
def test_what_is_done_to_the_sound_reaches_the_features(host: Host, wav2vec, change: dict[str, Any]) -> None:
    plain = embed(host, wav2vec, sound())[0]["audio_features"][0]
    assert not torch.equal(embed(host, wav2vec, sound(), **change)[0]["audio_features"][0], plain)


def test_clicks_are_smoothed(host: Host, wav2vec) -> None:
    clicked = sound(rate=16_000)
    clicked["waveform"][..., 8000] = 1.0
    rough = embed(host, wav2vec, clicked)[0]["audio_features"][0]
    assert not torch.equal(embed(host, wav2vec, clicked, smooth_transients=True)[0]["audio_features"][0], rough)


def test_scales_and_masks_travel_along(host: Host, wav2vec) -> None:
    masks = torch.ones(2, 8, 8)
    embeds = embed(host, wav2vec, sound(), sound(), audio_scale=0.5, audio_cfg_scale=3.0, ref_target_masks=masks)[0]
    assert (embeds["audio_scale"], embeds["audio_cfg_scale"]) == (0.5, 3.0)
    assert embeds["ref_target_masks"] is masks


def test_recordings_without_a_gap(host: Host, wav2vec) -> None:
    with pytest.raises(InputError, match="audio_3 is given without audio_2"):
        embed(host, wav2vec, sound(), audio_3=sound())


def test_loudness_is_brought_to_where_it_is_asked(host: Host) -> None:
    from wanvideo_infinitetalk.media.audio import integrated_loudness

    (louder,) = run(host, "InfiniteTalkNormalizeLoudness", audio=sound(3.0), lufs=-14.0)
    assert louder["waveform"].shape == sound(3.0)["waveform"].shape
    mono = louder["waveform"][0].mean(0).numpy()
    assert integrated_loudness(mono, 22_050) == pytest.approx(-14.0, abs=0.2)
    silence = {"waveform": torch.zeros(1, 1, 8000), "sample_rate": 8000}
    assert not run(host, "InfiniteTalkNormalizeLoudness", audio=silence, lufs=-14.0)[0]["waveform"].any()


def test_a_video_is_measured_against_each_recording(host: Host) -> None:
    from wanvideo_infinitetalk.measure import footage

    generator = torch.Generator().manual_seed(0)
    images = torch.rand(50, 32, 96, 3, generator=generator)
    numbers = {"fps": 25.0, "frame_window_size": 21, "motion_frame": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(footage, "missing", lambda: "a package")  # where landmarks are, too
        report, found, page = run(host, "InfiniteTalkMeasure", images=images, audio_1=sound(2.0), **numbers)
        two = run(host, "InfiniteTalkMeasure", images=images, audio_1=sound(2.0), audio_2=sound(2.0), **numbers)
    assert "correlation" in report
    assert json.loads(found)["whole"]["join_change"]["value"] == pytest.approx(1, abs=0.2)
    assert page.startswith("<!doctype html>")
    assert [len(json.loads(one)["speakers"]) for one in (found, two[1])] == [1, 2]


def test_the_hub_is_named_when_it_cannot_be_reached(host: Host) -> None:
    inputs = {"model": "facebook/wav2vec2-base-960h", "base_precision": "fp32", "load_device": "main_device"}
    with pytest.raises(NodeError, match="download it by hand"):
        host.run({"1": {"class_type": "InfiniteTalkWav2VecDownloader", "inputs": inputs}})


def test_a_folder_in_the_models_folder_is_taken_instead_of_a_download(host: Host) -> None:
    import shutil

    shutil.copytree(host.base / "tiny/wav2vec2-tiny", host.base / "models/wav2vec2/chinese-wav2vec2-base")
    inputs = {"model": "TencentGameMate/chinese-wav2vec2-base", "base_precision": "fp32", "load_device": "main_device"}
    outputs = host.run({"1": {"class_type": "InfiniteTalkWav2VecDownloader", "inputs": inputs}})
    assert outputs["1"][0].features.layers == 2


@pytest.mark.parametrize("kind", ["wav2vec2", "audio_encoders"])
@pytest.mark.parametrize("name", ["wav2vec2-base-960h", "facebook/wav2vec2-base-960h"])
def test_all_folders_of_speech_models_are_searched(host: Host, tmp_path, monkeypatch, kind: str, name: str) -> None:
    import shutil
    import sys

    known = sys.modules["folder_paths"].folder_names_and_paths
    folders, endings = known[kind]
    monkeypatch.setitem(known, kind, ([*folders, str(tmp_path)], endings))
    shutil.copytree(host.base / "tiny/wav2vec2-tiny", tmp_path / name)
    inputs = {"model": "facebook/wav2vec2-base-960h", "base_precision": "fp32", "load_device": "main_device"}
    host.cache.clear()
    outputs = host.run({"1": {"class_type": "InfiniteTalkWav2VecDownloader", "inputs": inputs}})
    assert outputs["1"][0].features.layers == 2


# --- text


def test_conditioning_of_core_nodes_is_taken_over(host: Host) -> None:
    words, none = torch.randn(1, 7, 64), torch.randn(1, 5, 64)
    (embeds,) = run(host, "InfiniteTalkTextEmbedBridge", positive=[[words, {}]], negative=[[none, {}]])
    assert torch.equal(embeds.positive[0], words[0])
    assert torch.equal(embeds.negative, none[0])
    assert run(host, "InfiniteTalkTextEmbedBridge", positive=[[words, {}]])[0].negative is None
    for combined in ([[words, {}], [words, {}]], [[words.repeat(2, 1, 1), {}]], []):
        with pytest.raises(InputError, match="connect one CLIP Text Encode"):
            run(host, "InfiniteTalkTextEmbedBridge", positive=combined)


@pytest.fixture(scope="module")
def t5(host: Host) -> Any:
    loader = {"model_name": TINY["text"], "precision": "fp32", "quantization": "disabled"}
    return run(host, "InfiniteTalkTextEncoderLoader", **loader)[0]


def prompts(host: Host, t5: Any, positive: str, negative: str = "", **options: Any) -> Any:
    return run(host, "InfiniteTalkTextEncode", positive_prompt=positive, negative_prompt=negative, t5=t5, **options)[0]


def test_pieces_and_weights_of_a_prompt(host: Host, t5) -> None:
    plain = [prompts(host, t5, text).positive[0] for text in ("a woman talks", "she waves")]
    pieces = prompts(host, t5, " a (woman:1.5) talks | she waves", "a (woman:1.5) talks | she waves")
    assert len(pieces.positive) == 2
    assert torch.equal(pieces.positive[0], plain[0] * 1.5)
    assert torch.equal(pieces.positive[1], plain[1])
    assert torch.equal(pieces.negative, t5.encode("a (woman:1.5) talks | she waves", "cpu"))  # as it stands


def test_weights_do_not_pass_from_one_prompt_to_the_other_by_the_cache(host: Host, t5) -> None:
    """Each text first as the one, then as the other; also in the node that loads the encoder itself."""
    text = "a (man:0.5) at sea | and a dog"
    first = prompts(host, t5, text, "a man at sea", use_disk_cache=True)
    second = prompts(host, t5, "a man at sea", text, use_disk_cache=True)
    again = prompts(host, None, text, text, use_disk_cache=True)
    once = {"model_name": TINY["text"], "precision": "fp32", "quantization": "disabled", "device": "cpu"}
    third = run(
        host, "InfiniteTalkTextEncodeCached", **once, positive_prompt=text, negative_prompt=text, use_disk_cache=True
    )[0]
    for made in (first, again, third):
        assert torch.equal(made.positive[0], second.positive[0] * 0.5)
        assert len(made.positive) == 2
    assert torch.equal(first.negative, second.positive[0])
    for made in (second, again, third):
        assert torch.equal(made.negative, t5.encode(text, "cpu"))


def test_a_weight_that_is_none(host: Host, t5) -> None:
    for prompt, words in {"(x:1.2.3)": "1.2.3 in the prompt is not a number", "(x:101)": "from 0 to 100"}.items():
        with pytest.raises(InputError, match=words):
            prompts(host, t5, prompt)


def test_the_text_encoder_may_be_kept_in_fp8(host: Host) -> None:
    made = {}
    for quantization in ("disabled", "fp8_e4m3fn"):
        loader = {"model_name": TINY["text"], "precision": "fp32", "quantization": quantization}
        (model,) = run(host, "InfiniteTalkTextEncoderLoader", **loader)
        made[quantization] = run(host, "InfiniteTalkTextEncode", positive_prompt="a", negative_prompt="b", t5=model)[
            0
        ].positive[0]
    stored = {parameter.dtype for parameter in model.encoder.model.parameters()}
    assert torch.float8_e4m3fn in stored
    difference = (made["fp8_e4m3fn"] - made["disabled"]).norm() / made["disabled"].norm()
    assert 0 < difference < 0.15


# --- images


DAMAGED_FEATURES: dict[str, Any] = {
    "another name": {"x": torch.ones(2, 4)},
    "no rows": {"features": torch.ones(0, 4)},
    "one axis": {"features": torch.ones(4)},
    "whole numbers": {"features": torch.ones(2, 4, dtype=torch.int64)},
    "NaN": {"features": torch.full((2, 4), torch.nan)},
    "cut": b"short",
    "empty": b"",
    "folder": None,
}


@pytest.mark.parametrize("damage", DAMAGED_FEATURES)
@pytest.mark.parametrize("identity", ["encoder", None])
def test_a_damaged_prompt_cache_heals(host: Host, tmp_path, caplog, identity: str | None, damage: str) -> None:
    from wanvideo_infinitetalk.comfy_nodes.models import _cached

    made = []

    def encode(prompt: str) -> torch.Tensor:
        made.append(prompt)
        return torch.full((3, 4), float(len(made)))

    first = _cached("a \ud800 prompt", "encoder", tmp_path, encode)
    (file,) = tmp_path.glob("*.safetensors")
    content = DAMAGED_FEATURES[damage]
    file.unlink()
    if content is None:
        file.mkdir()
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        save_file(content, file)
    assert torch.equal(_cached("a \ud800 prompt", identity, tmp_path, encode), first + 1)
    assert "is made again" in caplog.text
    if identity is not None and damage != "folder":
        assert torch.equal(_cached("a \ud800 prompt", identity, tmp_path, encode), first + 1)
        assert len(made) == 2


@pytest.fixture(scope="module")
def clip(host: Host) -> Any:
    return run(host, "InfiniteTalkClipVisionLoader", clip_name=TINY["clip"], precision="fp32")[0]


def look(host: Host, clip: Any, **changes: Any) -> Any:
    settings = {
        "clip_vision": clip,
        "image_1": torch.rand(1, 40, 60, 3, generator=torch.Generator().manual_seed(1)),
        "strength_1": 1.0,
        "strength_2": 1.0,
        "crop": "center",
        "combine_embeds": "average",
        "force_offload": True,
    }
    return run(host, "InfiniteTalkClipVisionEncode", **{**settings, **changes})[0]


def test_images_are_combined(host: Host, clip) -> None:
    second = torch.rand(1, 40, 60, 3, generator=torch.Generator().manual_seed(2))
    one, two = look(host, clip).positive, look(host, clip, image_1=second).positive
    assert one.shape == (1, 257, clip.clip.hidden_size)
    combine = {"image_2": second, "strength_2": 0.5}
    torch.testing.assert_close(look(host, clip, **combine).positive, (one + 0.5 * two) / 2)
    torch.testing.assert_close(look(host, clip, **combine, combine_embeds="sum").positive, one + 0.5 * two)
    both = look(host, clip, **combine, combine_embeds="concat").positive
    torch.testing.assert_close(both, torch.cat([one, 0.5 * two], dim=1))
    assert look(host, clip, negative_image=second).negative is not None
    assert not torch.allclose(look(host, clip, crop="disabled").positive, one)


@pytest.mark.parametrize("crop", ["center", "disabled"])
def test_tiles_are_looked_at_one_by_one(host: Host, clip, crop: str) -> None:
    image = torch.rand(1, 40, 60, 3, generator=torch.Generator().manual_seed(3))
    whole = look(host, clip, image_1=image, crop=crop).positive
    seen = image[:, :, 10:50] if crop == "center" else image
    height, width = seen.shape[1] // 2, seen.shape[2] // 2
    parts = [
        look(host, clip, image_1=seen[:, y : y + height, x : x + width], crop="disabled").positive[0]
        for y in (0, height)
        for x in (0, width)
    ]
    # The 16 x 16 tokens of each tile become 8 x 8 of the whole: means of 2 x 2.
    grid = torch.zeros(16, 16, parts[0].shape[-1])
    for n, part in enumerate(parts):
        tokens = part[1:].unflatten(0, (8, 2, 8, 2)).mean((1, 3))
        grid[n // 2 * 8 : n // 2 * 8 + 8, n % 2 * 8 : n % 2 * 8 + 8] = tokens
    tiles = torch.cat([torch.stack(parts)[:, 0].mean(0, keepdim=True), grid.flatten(0, 1)])[None]
    for share in (1.0, 0.25, 0.0):
        found = look(host, clip, image_1=image, crop=crop, tiles=2, ratio=share, strength_1=2.0).positive
        torch.testing.assert_close(found, 2 * (share * tiles + (1 - share) * whole), atol=1e-4, rtol=1e-4)
    assert look(host, clip, image_1=image, negative_image=image, crop=crop, tiles=2).negative is not None


def test_an_image_without_as_many_tiles_is_rejected(host: Host, clip) -> None:
    with pytest.raises(InputError, match="no 16 x 16 tiles"):
        look(host, clip, image_1=torch.rand(1, 8, 40, 3), tiles=16)


def test_a_core_clip_vision_model_is_asked_for_its_penultimate_states(host: Host) -> None:
    class Core:
        def encode_image(self, image: torch.Tensor, crop: str) -> Any:
            states = image.mean() * torch.ones(1, 257, 1280)
            return type("Output", (), {"penultimate_hidden_states": states, "crop": crop})

    embeds = look(host, Core(), image_1=torch.full((1, 8, 8, 3), 0.25))
    assert torch.equal(embeds.positive, torch.full((1, 257, 1280), 0.25))


@pytest.mark.parametrize("change", [{"combine_embeds": "batch", "image_2": torch.rand(1, 8, 8, 3)}])
def test_what_clip_does_not_do_is_said(host: Host, clip, change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="not part of this pack"):
        look(host, clip, **change)


# --- the VAE and video models


def test_a_compiled_vae_decodes_the_same(host: Host, monkeypatch) -> None:
    from wanvideo_infinitetalk.wanvideo.runtime.compilation import CompileSettings

    torch._dynamo.reset()
    settings = CompileSettings(backend="eager")
    (plain,) = run(host, "InfiniteTalkVAELoader", model_name=TINY["vae"], precision="fp32")
    (compiled,) = run(host, "InfiniteTalkVAELoader", model_name=TINY["vae"], precision="fp32", compile_args=settings)
    latents = torch.randn(1, 16, 2, 4, 4)
    torch.testing.assert_close(compiled.decode(latents), plain.decode(latents))
    assert "forward" in compiled.vae.model.decoder.__dict__
    torch._dynamo.reset()


@pytest.fixture
def small(host: Host) -> Any:
    """WANVAE of a small decoder."""
    path = host.base / "models/vae_approx/lighttaew2_1.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file(decoder_weights(), path)
    return run(host, "InfiniteTalkSmallDecoderLoader", model_name=path.name, precision="fp32")[0]


TILES = {"tile_x": 272, "tile_y": 272, "tile_stride_x": 144, "tile_stride_y": 128, "enable_vae_tiling": False}


def test_the_decode_node_takes_a_small_decoder(host: Host, small) -> None:
    latents = {"samples": torch.randn(1, 16, 3, 4, 6)}
    (images,) = run(host, "InfiniteTalkDecode", vae=small, samples=latents, **TILES)
    plain = SmallDecoder.from_state_dict(decoder_weights(), denormalize=True)
    torch.testing.assert_close(images, (plain.decode(latents["samples"])[0].permute(1, 2, 3, 0) + 1) / 2)
    (at_once,) = run(
        host, "InfiniteTalkSmallDecoderLoader", model_name="lighttaew2_1.safetensors", precision="fp32", parallel=True
    )
    seen: list[int] = []
    handle = at_once.vae.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    (together,) = run(host, "InfiniteTalkDecode", vae=at_once, samples=latents, **TILES)
    handle.remove()
    torch.testing.assert_close(together, images)
    assert seen == [3]
    x = latents["samples"]
    assert at_once._working_bytes(x, pixels=False) == 3 * small._working_bytes(x, pixels=False)
    assert not small.resident.offloader.loaded
    (half,) = run(host, "InfiniteTalkSmallDecoderLoader", model_name="lighttaew2_1.safetensors")
    assert half.vae.dtype == torch.float16


def test_a_small_decoder_encodes_nothing_and_says_so(host: Host, small) -> None:
    image = torch.rand(1, 64, 64, 3)
    widgets = {"motion_frame": 9, "frame_window_size": 17, "force_offload": False, "colormatch": "disabled"}
    encode = {"num_frames": 17, "noise_aug_strength": 0.0, "start_latent_strength": 1.0, "end_latent_strength": 1.0}
    for call in (
        lambda vae: run(host, "InfiniteTalkEncode", vae=vae, image=image, **TILES),
        lambda vae: run(host, "InfiniteTalkLongVideo", vae=vae, width=64, height=64, **widgets),
        lambda vae: run(
            host,
            "InfiniteTalkImageToVideo",
            vae=vae,
            width=64,
            height=64,
            start_image=image,
            force_offload=True,
            **encode,
        ),
        lambda vae: run(host, "InfiniteTalkSmallDecoder", vae=vae, decoder=vae),
    ):
        with pytest.raises(InputError, match="encodes no images: connect vae to InfiniteTalk VAE Loader, or join"):
            call(small)


@pytest.mark.parametrize(("asked", "used"), [(1, 1), (2, 1), (4, 5), (9, 9), (12, 13), (24, 25)])
def test_motion_frames_of_any_number_are_rounded_with_a_line_in_the_log(host: Host, asked, used, caplog) -> None:
    (vae,) = run(host, "InfiniteTalkVAELoader", model_name=TINY["vae"], precision="fp32")
    widgets = {"frame_window_size": 81, "force_offload": False, "colormatch": "mkl", "width": 64, "height": 64}
    plan, _ = run(host, "InfiniteTalkLongVideo", vae=vae, motion_frame=asked, **widgets)
    assert plan.motion_frames == used
    assert (f"motion_frame {asked} is not 4n + 1" in caplog.text) == (asked != used)


def test_a_joined_decoder_encodes_as_the_vae_and_decodes_as_the_decoder(host: Host, small) -> None:
    (vae,) = run(host, "InfiniteTalkVAELoader", model_name=TINY["vae"], precision="fp32")
    (both,) = run(host, "InfiniteTalkSmallDecoder", vae=vae, decoder=small)
    video, latents = torch.rand(1, 3, 5, 32, 32), torch.randn(1, 16, 2, 4, 4)
    assert torch.equal(both.encode(video), vae.encode(video))
    assert torch.equal(both.decode(latents), small.decode(latents))
    both.unload()
    assert not vae.resident.offloader.loaded
    assert not small.resident.offloader.loaded
    assert both.described() == {**vae.described(), "decoder": small.described()["VAE"]}
    assert vae.described().keys() == {"VAE"}
    other = replace(small, vae=SmallDecoder.from_state_dict(decoder_weights(), denormalize=False))
    assert other.described() != small.described(), "which latents it takes decides"


def test_a_preview_leaves_the_latents_as_they_are(host: Host) -> None:
    from wanvideo_infinitetalk.comfy_nodes import comfyui

    for dtype in (torch.float32, torch.bfloat16):
        latents = torch.randn(16, 3, 4, 4).to(dtype)
        kept = latents.clone()
        comfyui.Progress(1, torch.device("cpu"))(1, 1, latents)
        assert torch.equal(latents, kept)


def test_minmax_uses_the_whole_range_of_colors(host: Host) -> None:
    (vae,) = run(host, "InfiniteTalkVAELoader", model_name=TINY["vae"], precision="fp32")
    latents = {"samples": torch.randn(1, 16, 1, 4, 4) * 0.1}
    shown = {}
    for normalization in ("default", "minmax", "none"):
        shown[normalization] = run(
            host, "InfiniteTalkDecode", vae=vae, samples=latents, normalization=normalization, **TILES
        )[0]
    assert shown["minmax"].min() == 0
    assert shown["minmax"].max() == 1
    torch.testing.assert_close(shown["none"], shown["default"] * 2 - 1)


def test_decoding_goes_on_in_tiles_when_memory_runs_out(host: Host, monkeypatch, caplog) -> None:
    (vae,) = run(host, "InfiniteTalkVAELoader", model_name=TINY["vae"], precision="fp32")
    latents = torch.randn(1, 16, 1, 40, 40)
    expected = vae.decode(latents)
    stream = vae.vae._decode_stream

    def scarce(part: torch.Tensor) -> Any:
        if part.shape[-1] > 34:
            raise torch.OutOfMemoryError("scarce")
        return stream(part)

    monkeypatch.setattr(vae.vae, "_decode_stream", scarce)
    tiled = vae.decode(latents)
    assert tiled.shape == expected.shape
    assert "trying again in tiles" in caplog.text


def test_compile_settings_reach_the_model(host: Host, monkeypatch) -> None:
    from wanvideo_infinitetalk.comfy_nodes import models

    # Trying Inductor takes half a minute on a CPU; tests/unit/test_compilation.py does it.
    checked: list[Any] = []
    monkeypatch.setattr(models, "check_compiler", lambda settings, device: checked.append(settings))
    widgets = {
        "backend": "inductor",
        "fullgraph": True,
        "mode": "default",
        "dynamic": False,
        "dynamo_cache_size_limit": 200,
        "compile_transformer_blocks_only": True,
    }
    (settings,) = run(host, "InfiniteTalkTorchCompile", **widgets)
    assert settings.fullgraph
    assert settings.variants == 200
    loader = {"model": TINY["dit"], "base_precision": "fp32", "quantization": "disabled", "load_device": "main_device"}
    (compiled,) = run(host, "InfiniteTalkModelLoader", **loader, compile_args=settings)
    run(host, "InfiniteTalkVAELoader", model_name=TINY["vae"], compile_args=settings)
    assert checked == [settings, settings]
    assert all("forward" in block.__dict__ for block in compiled.model.blocks)
    (plain,) = run(host, "InfiniteTalkModelLoader", **loader)
    assert plain.weights is not compiled.weights
    assert plain.weights.resident.offloader.loaded  # main_device


@pytest.mark.parametrize("precision", ["fp16", "fp16_fast"])
def test_fp16_fast_accumulates_in_fp16_while_it_runs_only(host: Host, monkeypatch, precision: str) -> None:
    from wanvideo_infinitetalk.comfy_nodes import sampling

    seen = []
    monkeypatch.setattr(
        sampling, "_one_window", lambda *given: seen.append(torch.backends.cuda.matmul.allow_fp16_accumulation)
    )
    monkeypatch.setattr(sampling, "check_request", lambda *given, **inputs: None)
    loader = {"model": TINY["dit"], "quantization": "disabled", "load_device": "offload_device"}
    (model,) = run(host, "InfiniteTalkModelLoader", **loader, base_precision=precision)
    settings = sampling.SamplerSettings(steps=1, cfg=1.0, shift=5.0, seed=0, scheduler="euler")
    sampling.sample(model, None, settings, text=object(), speech=None, start=None)
    assert seen == [precision == "fp16_fast"]
    assert not torch.backends.cuda.matmul.allow_fp16_accumulation


# --- presets


def test_the_presets_are_the_command_s(host: Host) -> None:
    """Every setting of every preset has an output; what a preset does not set is the command's default."""
    from wanvideo_infinitetalk.comfy_nodes.options import PRESET_OUTPUTS
    from wanvideo_infinitetalk.pipeline.presets import PRESETS, preset_values

    widget = host.nodes["InfiniteTalkPreset"].GET_SCHEMA().inputs[0]
    assert widget.options["options"] == list(PRESETS)
    read = {"blocks_to_swap": lambda swap: swap.blocks, "text_encoder_device": {"gpu": "auto", "cpu": "cpu"}.get}
    for name, settings in PRESETS.items():
        assert settings.keys() <= PRESET_OUTPUTS.keys(), f"without an output: {settings.keys() - PRESET_OUTPUTS.keys()}"
        outputs = dict(zip(PRESET_OUTPUTS, run(host, "InfiniteTalkPreset", preset=name), strict=True))
        expected = {field: value for field, value in preset_values(name).items() if field in PRESET_OUTPUTS}
        assert {field: read.get(field, lambda same: same)(value) for field, value in outputs.items()} == expected
        assert settings.items() <= expected.items()


def test_the_outputs_of_a_preset_fit_the_widgets_that_they_are_for(host: Host) -> None:
    node = host.nodes["InfiniteTalkPreset"].GET_SCHEMA()
    outputs = {output.display_name: output for output in node.outputs}
    links = [(node_id, name) for node_id, names in tiny_comfy.PRESET_LINKS.items() for name in names]
    assert sorted(outputs) == sorted(name for _, name in links)
    given = [
        dict(zip(outputs, run(host, "InfiniteTalkPreset", preset=preset), strict=True))
        for preset in node.inputs[0].options["options"]
    ]
    for node_id, name in links:
        schema = host.nodes[node_id].GET_SCHEMA()
        (widget,) = [widget for widget in schema.inputs if widget.id == name]
        assert outputs[name].io_type == widget.get_io_type(), name
        assert schema.display_name in outputs[name].tooltip
        choices = widget.options.get("options")
        assert choices is None or all(values[name] in choices for values in given), name
