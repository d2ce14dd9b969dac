"""The example workflows run against the node classes, without ComfyUI."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import make_workflows, tiny_comfy, workflows
from support.comfy_host import Host, NodeError, hosted
from support.comfy_stubs import InterruptProcessingException, Progress
from support.tiny_comfy import node_of, shrink
from support.video import streams_of
from wanvideo_infinitetalk.cli.tiny_models import decoder_weights
from wanvideo_infinitetalk.fp8_optimization import stored_summary
from wanvideo_infinitetalk.pipeline import long_video
from wanvideo_infinitetalk.wanvideo.checkpoints.files import read_metadata
from wanvideo_infinitetalk.wanvideo.errors import BackendUnavailableError, CheckpointError, InputError


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory):
    base = tmp_path_factory.mktemp("comfy")
    tiny_comfy.fill(base)
    with hosted(base) as host:
        yield host


@pytest.fixture
def prompt() -> dict[str, Any]:
    return shrink(workflows.load("infinitetalk_tiny"))


@pytest.mark.parametrize("name", sorted(make_workflows.WORKFLOWS.keys() - {"infinitetalk_humo"}))
def test_example_workflow_ends_in_a_video_with_sound(host: Host, name: str) -> None:
    prompt = shrink(workflows.load(name))
    outputs = host.run(prompt)
    path = outputs[node_of(prompt, "SaveVideo")][0]
    frames, shown, sound = streams_of(path)
    assert frames == 25
    assert sound == pytest.approx(shown, abs=0.07)  # AAC packets of 1024 samples at 16 kHz
    images = outputs[node_of(prompt, "InfiniteTalkImagesFromSamples")][0]
    assert images.shape == (25, 64, 64, 3)
    assert torch.isfinite(images).all()
    assert images.std() > 0.01


def test_a_second_run_takes_the_models_that_are_there(host: Host, prompt) -> None:
    first = host.run(prompt)
    loader, sampler = node_of(prompt, "InfiniteTalkModelLoader"), node_of(prompt, "InfiniteTalkSampler")
    prompt[sampler]["inputs"]["seed"] += 1
    second = host.run(prompt)
    assert loader not in host.executed
    assert sampler in host.executed
    assert not torch.equal(first[sampler][0]["samples"], second[sampler][0]["samples"])
    # And also where the node runs again: the same files with the same settings are one copy of the weights.
    host.cache.clear()
    again = host.run(prompt)
    assert again[loader][0].weights is first[loader][0].weights
    assert torch.equal(again[sampler][0]["samples"], second[sampler][0]["samples"])


def test_progress_and_previews_are_shown(host: Host, prompt) -> None:
    host.cache.clear()
    Progress.seen.clear()
    host.run(prompt)
    steps = [(done, total) for done, total, preview in Progress.seen if preview]
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]  # two windows of two steps
    assert any(total > 1e5 and done == total for done, total, _ in Progress.seen)  # bytes of the model


def test_a_long_video_by_a_small_decoder(host: Host, prompt) -> None:
    """Its frames differ from the VAE's, and so do later windows' latents, which begin with what was decoded."""
    path = host.base / "models/vae_approx/taew2_1.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file(decoder_weights(), path)
    sampler, long = node_of(prompt, "InfiniteTalkSampler"), node_of(prompt, "InfiniteTalkLongVideo")
    plain = host.run(prompt)[sampler][0]
    vae = prompt[long]["inputs"]["vae"]
    prompt["100"] = {"class_type": "InfiniteTalkSmallDecoderLoader", "inputs": {"model_name": path.name}}
    prompt["101"] = {"class_type": "InfiniteTalkSmallDecoder", "inputs": {"vae": vae, "decoder": ["100", 0]}}
    prompt[long]["inputs"]["vae"] = ["101", 0]
    made = host.run(prompt)[sampler][0]
    assert made["video"].shape == plain["video"].shape
    assert torch.isfinite(made["video"]).all()
    assert not torch.equal(made["video"][:17], plain["video"][:17])
    assert not torch.equal(made["samples"], plain["samples"])
    prompt[long]["inputs"]["vae"] = ["100", 0]
    with pytest.raises(NodeError, match="encodes no images") as caught:
        host.run(prompt)
    assert caught.value.node_id == long


def test_a_preset_decides_what_is_made(host: Host, prompt) -> None:
    outputs = [output.display_name for output in host.nodes["InfiniteTalkPreset"].GET_SCHEMA().outputs]
    tiny_comfy.link_preset(prompt, "fast", outputs)
    Progress.seen.clear()
    host.run(prompt)
    assert [total for _, total, preview in Progress.seen if preview] == [2 * 4] * 8  # two windows of four steps
    prompt["900"]["inputs"]["preset"] = "low-memory"
    loader = node_of(prompt, "InfiniteTalkModelLoader")
    needed = ("900", node_of(prompt, "InfiniteTalkAdapterLoader"), loader)
    (model,) = host.run({node_id: prompt[node_id] for node_id in needed})[loader]
    assert model.swap.blocks == 40
    assert "fp8_e4m3fn_scaled" in stored_summary(model.model)


def test_flashtalk_by_its_preset(host: Host, prompt) -> None:
    """Windows of 17 frames give out 12, the first one too; its audio layers come in its own file."""
    loader = node_of(prompt, "InfiniteTalkModelLoader")
    folder = host.base / "models/diffusion_models"
    adapter = prompt[node_of(prompt, "InfiniteTalkAdapterLoader")]["inputs"]["model"]
    parts = [folder / prompt[loader]["inputs"]["model"], folder / adapter]
    config = {}
    for part in parts:
        config |= json.loads(read_metadata(part)["config"])
    merged = {name: value for part in parts for name, value in load_file(part).items()}
    save_file(merged, folder / "flashtalk-merged.safetensors", {"config": json.dumps(config)})
    outputs = [output.display_name for output in host.nodes["InfiniteTalkPreset"].GET_SCHEMA().outputs]
    tiny_comfy.link_preset(prompt, "stream", outputs)
    prompt[loader]["inputs"]["model"] = "flashtalk-merged.safetensors"
    with pytest.raises(NodeError, match="audio layers are in its model: leave the adapter"):
        host.run(prompt)
    del prompt[loader]["inputs"]["multitalk_model"]
    Progress.seen.clear()
    made = host.run(prompt)[node_of(prompt, "InfiniteTalkSampler")][0]
    assert [total for _, total, preview in Progress.seen if preview] == [3 * 4] * 12
    assert len(made["video"]) == 25
    assert torch.isfinite(made["video"]).all()


def test_models_are_known_to_the_memory_management(host: Host, prompt) -> None:
    outputs = host.run(prompt)
    sampler = node_of(prompt, "InfiniteTalkSampler")
    prompt[sampler]["inputs"].update(seed=77, force_offload=False)
    host.run(prompt)
    weights = outputs[node_of(prompt, "InfiniteTalkModelLoader")][0].weights
    assert weights.resident.offloader.loaded
    managed = [patcher.model for patcher in host.management.current_loaded_models]
    assert weights.model in managed
    host.management.unload_all_models()
    assert not weights.resident.offloader.loaded


@pytest.mark.parametrize("checks", [1, 6, 16])
def test_interruption_ends_the_run_and_the_next_one_works(host: Host, prompt, checks: int) -> None:
    host.run(prompt)  # what the sampler reads is kept, so that the checks are its own
    sampler = node_of(prompt, "InfiniteTalkSampler")
    prompt[sampler]["inputs"]["seed"] = 1000 + checks
    host.management.interrupt_after = checks
    with pytest.raises(NodeError) as caught:
        host.run(prompt)
    assert isinstance(caught.value.error, InterruptProcessingException)
    assert caught.value.node_id == sampler
    assert sampler in host.run(prompt)


@pytest.mark.parametrize("action", ["encode", "decode"])
def test_interruption_reaches_into_the_vae(host: Host, prompt, action: str) -> None:
    vae = host.run(prompt)[node_of(prompt, "InfiniteTalkVAELoader")][0]
    what = torch.zeros(1, 3, 9, 32, 32) if action == "encode" else torch.zeros(1, 16, 3, 4, 4)
    host.management.interrupt_after = 1  # behind the first of three latent frames
    with pytest.raises(InterruptProcessingException):
        getattr(vae, action)(what)


@pytest.mark.parametrize("blocks", [1, 48])
def test_block_swap_gives_identical_latents(host: Host, prompt, blocks: int) -> None:
    sampler, loader = node_of(prompt, "InfiniteTalkSampler"), node_of(prompt, "InfiniteTalkModelLoader")
    expected = host.run(prompt)[sampler][0]["samples"]
    prompt["100"] = {
        "class_type": "InfiniteTalkBlockSwap",
        "inputs": {"blocks_to_swap": blocks, "offload_img_emb": True, "offload_txt_emb": True},
    }
    prompt["101"] = {
        "class_type": "InfiniteTalkSetBlockSwap",
        "inputs": {"model": [loader, 0], "block_swap_args": ["100", 0]},
    }
    prompt[sampler]["inputs"]["model"] = ["101", 0]
    assert torch.equal(host.run(prompt)[sampler][0]["samples"], expected)


def test_loras_merged_and_unmerged_are_alike_and_change_the_video(host: Host, prompt) -> None:
    sampler, loader = node_of(prompt, "InfiniteTalkSampler"), node_of(prompt, "InfiniteTalkModelLoader")
    prompt[loader]["inputs"].update(base_precision="fp32", attention_mode="eager")
    plain = host.run(prompt)[sampler][0]["samples"]
    lora = {"lora": make_workflows.REAL["lora"], "strength": 1.0}
    prompt["100"] = {"class_type": "InfiniteTalkLora", "inputs": {**lora, "merge_loras": True}}
    prompt[loader]["inputs"]["lora"] = ["100", 0]
    merged = host.run(prompt)[sampler][0]["samples"]
    prompt["100"]["inputs"]["merge_loras"] = False
    unmerged = host.run(prompt)[sampler][0]["samples"]
    assert (merged - plain).abs().max() > 1e-3
    torch.testing.assert_close(unmerged, merged, atol=2e-3, rtol=2e-3)
    # Set LoRAs: on a model without any, and gone again with the node.
    del prompt[loader]["inputs"]["lora"]
    prompt["101"] = {"class_type": "InfiniteTalkSetLoras", "inputs": {"model": [loader, 0], "lora": ["100", 0]}}
    prompt[sampler]["inputs"]["model"] = ["101", 0]
    assert torch.equal(host.run(prompt)[sampler][0]["samples"], unmerged)
    prompt[sampler]["inputs"]["model"] = [loader, 0]
    assert torch.equal(host.run(prompt)[sampler][0]["samples"], plain)


@pytest.mark.parametrize("quantization", ["fp8_e4m3fn", "fp8_e4m3fn_scaled_fast", "fp4_scaled"])
def test_quantized_models_run_with_loras(host: Host, prompt, quantization: str) -> None:
    loader, sampler = node_of(prompt, "InfiniteTalkModelLoader"), node_of(prompt, "InfiniteTalkSampler")
    prompt["100"] = {
        "class_type": "InfiniteTalkLoras",
        "inputs": {f"lora_{i}": "none" for i in range(5)} | {f"strength_{i}": 0.5 for i in range(5)},
    }
    prompt["100"]["inputs"]["lora_3"] = make_workflows.REAL["lora"]
    prompt[loader]["inputs"].update(quantization=quantization, lora=["100", 0])
    assert torch.isfinite(host.run(prompt)[sampler][0]["samples"]).all()


# Beside these, what is said before anything runs, or before the model is read, is in test_nodes_early.py.
WRONG: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "a mode whose package is missing": (
        "InfiniteTalkModelLoader",
        {"attention_mode": "flash_attn_3"},
        BackendUnavailableError,
        "flash_attn_3",
    ),
    "frames outside of the output folder": (
        "InfiniteTalkLongVideo",
        {"output_path": "../elsewhere"},
        InputError,
        "leads outside",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_answered_on_the_node_that_has_it(host: Host, prompt, case: str) -> None:
    class_type, change, error, words = WRONG[case]
    prompt[node_of(prompt, class_type)]["inputs"].update(change)
    with pytest.raises(NodeError, match=words) as caught:
        host.run(prompt)
    assert isinstance(caught.value.error, error)
    assert caught.value.class_type == class_type
    assert "\n" not in str(caught.value.error)


def test_a_silent_person(host: Host, prompt) -> None:
    sampler = node_of(prompt, "InfiniteTalkSampler")
    prompt["100"] = {"class_type": "InfiniteTalkSilence", "inputs": {"num_frames": 9}}
    prompt[sampler]["inputs"]["multitalk_embeds"] = ["100", 0]
    assert host.run(prompt)[sampler][0]["video"].shape[0] == 9


def test_finished_windows_go_to_the_file(host: Host, prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    from wanvideo_infinitetalk.comfy_nodes import sampling

    how = []
    journal = sampling.Journal
    monkeypatch.setattr(sampling, "Journal", lambda *given: how.append(given[2]) or journal(*given))
    long, images = node_of(prompt, "InfiniteTalkLongVideo"), node_of(prompt, "InfiniteTalkImagesFromSamples")
    expected = host.run(prompt)[images][0]
    prompt[long]["inputs"]["output_path"] = "long/talk.mp4"
    frames, path = host.run(prompt)[images]
    assert path == str((host.base / "output/long/talk.mp4").resolve())
    assert streams_of(Path(path))[0] == 25
    assert float((frames - expected[17:]).abs().max()) <= 0.51 / 255  # the last window, as it was written
    assert how == [{"torch": torch.__version__, "tiling of the VAE": "False", "compilation": "none"}]
    prompt["100"] = {"class_type": "LoadAudio", "inputs": {"audio": "six_channels.wav"}}
    speech = prompt[node_of(prompt, "InfiniteTalkSpeech")]["inputs"]
    soundfile.write(
        host.base / "input/six_channels.wav", np.random.default_rng(0).uniform(-0.3, 0.3, (16000, 6)), 16000
    )
    speech["audio_1"] = ["100", 0]
    assert streams_of(Path(host.run(prompt)[images][1]))[2] == pytest.approx(1.0, abs=0.07)
    prompt[long]["inputs"]["output_path"] = "../../elsewhere.mp4"
    with pytest.raises(NodeError, match="leads outside ComfyUI's output folder"):
        host.run(prompt)


def test_frames_go_into_a_folder(host: Host, prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    long, images = node_of(prompt, "InfiniteTalkLongVideo"), node_of(prompt, "InfiniteTalkImagesFromSamples")
    expected = host.run(prompt)[images][0]
    prompt[long]["inputs"]["output_path"] = " long/frames "
    folder = host.base / "output/long/frames"
    folder.mkdir(parents=True)
    for left_over in ("frame_000099.png", "mine.png"):
        (folder / left_over).write_bytes(b"")
    frames, path = host.run(prompt)[images]
    assert path == str(folder.resolve())
    written = sorted(folder.iterdir())
    assert [file.name for file in written] == [*(f"frame_{n:06}.png" for n in range(25)), "mine.png"]
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in written[:25]])
    assert float((pixels / 255 - expected).abs().max()) <= 0.51 / 255
    assert torch.equal(frames, pixels[17:] / 255)  # the last window
    # What is not finished lies beside it, and what was there stays.
    decode = long_video._decode

    def interrupted(*given: Any) -> torch.Tensor:
        if given[3].index == 1:
            raise InterruptProcessingException
        return decode(*given)

    prompt[node_of(prompt, "InfiniteTalkSampler")]["inputs"]["seed"] += 1
    with monkeypatch.context() as patch:
        patch.setattr(long_video, "_decode", interrupted)
        with pytest.raises(NodeError):
            host.run(prompt)
    assert len(list((folder.parent / "frames.partial").iterdir())) == 17
    assert np.array_equal(np.asarray(Image.open(written[12])), pixels[12].numpy())
    host.run(prompt)
    assert not (folder.parent / "frames.partial").exists()
    assert not np.array_equal(np.asarray(Image.open(written[12])), pixels[12].numpy())


@pytest.mark.parametrize(("name", "words"), [("talk.avi", r"end in \.mp4"), ("taken", "Name another folder")])
def test_an_output_path_that_is_neither(host: Host, prompt, name: str, words: str) -> None:
    (host.base / "output/taken").write_bytes(b"a file")
    prompt[node_of(prompt, "InfiniteTalkLongVideo")]["inputs"]["output_path"] = name
    with pytest.raises(NodeError, match=words):
        host.run(prompt)


def test_an_interrupted_video_in_a_file_is_gone_on_with(
    host: Host, prompt, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    long, images = node_of(prompt, "InfiniteTalkLongVideo"), node_of(prompt, "InfiniteTalkImagesFromSamples")
    sampler = node_of(prompt, "InfiniteTalkSampler")
    prompt[long]["inputs"]["output_path"] = "long/whole.mp4"
    frames, whole = host.run(prompt)[images]
    prompt[long]["inputs"]["output_path"] = "long/stopped.mp4"
    decode, made = long_video._decode, []

    def interrupted(*given: Any) -> torch.Tensor:
        if given[3].index == 1:
            raise InterruptProcessingException
        return decode(*given)

    with monkeypatch.context() as patch:
        patch.setattr(long_video, "_decode", interrupted)
        with pytest.raises(NodeError):
            host.run(prompt)
    partial = host.base / "output/long/stopped.partial.mp4"
    assert streams_of(partial)[0] == 17
    assert f"finished is in {partial.resolve()}" in caplog.text
    monkeypatch.setattr(long_video, "_decode", lambda *given: made.append(given[3].index) or decode(*given))
    again, path = host.run(prompt)[images]
    assert made == [1]
    assert torch.equal(again, frames)
    assert Path(path).read_bytes() == Path(whole).read_bytes()
    # Another seed is another video: nothing of the stopped one goes into it.
    prompt[long]["inputs"]["output_path"] = "long/other.mp4"
    with monkeypatch.context() as patch:
        patch.setattr(long_video, "_decode", interrupted)
        with pytest.raises(NodeError):
            host.run(prompt)
    prompt[sampler]["inputs"]["seed"] += 1
    made.clear()
    host.run(prompt)
    assert made == [0, 1]
    assert "begins anew" in caplog.text


def test_one_line_says_what_ran(host: Host, prompt, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        host.run(prompt)
    (line,) = (r.getMessage() for r in caplog.records if "guard copies" in r.getMessage())
    assert re.search(r"Attention \w+ \(policy default\) by .*sdpa \([1-9]\d* calls\)", line), line
    assert re.search(r"linears \d+ x \w+; guard copies 0 of [1-9]\d* calls \(0\.0 MiB\)", line), line


def one_window(prompt: dict[str, Any], image_embeds: dict[str, Any]) -> str:
    """Turn the long video into a single window; the id of the node that decodes it."""
    sampler = node_of(prompt, "InfiniteTalkSampler")
    prompt["200"] = image_embeds
    prompt[sampler]["inputs"]["image_embeds"] = ["200", 0]
    prompt[node_of(prompt, "InfiniteTalkImagesFromSamples")] = {
        "class_type": "InfiniteTalkDecode",
        "inputs": {
            "vae": [node_of(prompt, "InfiniteTalkVAELoader"), 0],
            "samples": [sampler, 0],
            "enable_vae_tiling": False,
            "tile_x": 272,
            "tile_y": 272,
            "tile_stride_x": 144,
            "tile_stride_y": 128,
        },
    }
    return node_of(prompt, "InfiniteTalkDecode")


def keyframes(prompt: dict[str, Any], **inputs: Any) -> dict[str, Any]:
    image = [node_of(prompt, "LoadImage"), 0]
    return {
        "class_type": "InfiniteTalkImageToVideo",
        "inputs": {
            "width": 64,
            "height": 64,
            "num_frames": 9,
            "noise_aug_strength": 0.0,
            "start_latent_strength": 1.0,
            "end_latent_strength": 1.0,
            "force_offload": True,
            "vae": [node_of(prompt, "InfiniteTalkVAELoader"), 0],
            "clip_embeds": [node_of(prompt, "InfiniteTalkClipVisionEncode"), 0],
            "start_image": image,
            "end_image": image,
            **inputs,
        },
    }


def test_one_window_with_and_without_speech(host: Host, prompt) -> None:
    decode = one_window(prompt, keyframes(prompt))
    sampler = node_of(prompt, "InfiniteTalkSampler")
    speaking = host.run(prompt)[decode][0]
    assert speaking.shape == (9, 64, 64, 3)
    del prompt[sampler]["inputs"]["multitalk_embeds"]
    silent = host.run(prompt)[decode][0]
    assert silent.shape == (9, 64, 64, 3)
    assert not torch.equal(speaking, silent)


def test_one_window_takes_one_prompt(host: Host, prompt) -> None:
    one_window(prompt, keyframes(prompt))
    prompt[node_of(prompt, "InfiniteTalkTextEncode")]["inputs"]["positive_prompt"] = "a man talks | a man waves"
    with pytest.raises(NodeError, match="2 pieces for a video of one window"):
        host.run(prompt)


def test_two_samplers_share_the_steps_of_one_window(host: Host, prompt) -> None:
    one_window(prompt, keyframes(prompt))
    first = node_of(prompt, "InfiniteTalkSampler")
    prompt[first]["inputs"].update(scheduler="euler", steps=3)
    whole = host.run(prompt)[first][0]["samples"]
    prompt["300"] = {"class_type": "InfiniteTalkSampler", "inputs": {**prompt[first]["inputs"]}}
    prompt[first]["inputs"]["end_step"] = 1
    prompt["300"]["inputs"].update(start_step=1, samples=[first, 0])
    halves = host.run(prompt)["300"][0]["samples"]
    torch.testing.assert_close(halves, whole)


def test_the_attention_policy_decides_which_steps_are_exact(host: Host, prompt) -> None:
    loader, sampler = node_of(prompt, "InfiniteTalkModelLoader"), node_of(prompt, "InfiniteTalkSampler")
    prompt[loader]["inputs"].update(attention_mode="sageattn_3_fp4", base_precision="fp32")
    prompt["100"] = {
        "class_type": "InfiniteTalkAttentionPolicy",
        "inputs": {"model": [loader, 0], "attention_policy": "uniform"},
    }
    prompt[sampler]["inputs"]["model"] = ["100", 0]
    made = {}
    for policy in ("uniform", "default", "ends_16bit"):
        prompt["100"]["inputs"]["attention_policy"] = policy
        made[policy] = host.run(prompt)[sampler][0]["samples"]
    prompt[loader]["inputs"]["attention_mode"] = "sdpa"
    exact = host.run(prompt)[sampler][0]["samples"]
    # Of two steps both are ends: nothing but SDPA runs.
    assert torch.equal(made["ends_16bit"], exact)
    errors = {policy: (samples - exact).norm() for policy, samples in made.items()}
    assert errors["uniform"] > errors["default"] > 0


def test_the_doctor_reports(host: Host) -> None:
    report = host.run({"1": {"class_type": "InfiniteTalkAttentionDoctor", "inputs": {"device": "cpu"}}})["1"][0]
    assert "sageattn_3_fp4" in report
    assert "A mode of each precision: 16-bit: yes, 8-bit: yes, 4-bit: yes" in report


def test_guidance_may_change_from_step_to_step(host: Host, prompt) -> None:
    sampler = node_of(prompt, "InfiniteTalkSampler")
    values = {"cfg_scale_start": 3.0, "cfg_scale_end": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    prompt["100"] = {
        "class_type": "InfiniteTalkCfgSchedule",
        "inputs": {"steps": 2, "interpolation": "linear", **values},
    }
    prompt[sampler]["inputs"]["cfg"] = ["100", 0]
    outputs = host.run(prompt)
    assert outputs["100"] == ([3.0, 1.0],)
    assert torch.isfinite(outputs[sampler][0]["samples"]).all()


def test_encode_and_decode(host: Host, prompt) -> None:
    vae = [node_of(prompt, "InfiniteTalkVAELoader"), 0]
    decode = one_window(prompt, keyframes(prompt))
    prompt["400"] = {
        "class_type": "InfiniteTalkEncode",
        "inputs": {"image": [node_of(prompt, "LoadImage"), 0], "vae": vae, "enable_vae_tiling": True}
        | {"tile_x": 256, "tile_y": 256, "tile_stride_x": 128, "tile_stride_y": 128},
    }
    prompt[decode]["inputs"].update(samples=["400", 0], enable_vae_tiling=True)
    for name in ("InfiniteTalkSampler", "CreateVideo", "SaveVideo"):
        del prompt[node_of(prompt, name)]
    outputs = host.run(prompt)
    height, width = (side // 16 * 16 for side in outputs[node_of(prompt, "LoadImage")][0].shape[1:3])
    assert outputs["400"][0]["samples"].shape == (1, 16, 1, height // 8, width // 8)
    assert outputs[decode][0].shape == (1, height, width, 3)


def test_prompts_are_kept_on_disk(host: Host, prompt) -> None:
    text = node_of(prompt, "InfiniteTalkTextEncode")
    plain = host.run(prompt)[text][0]
    prompt[text]["inputs"]["use_disk_cache"] = True
    cached = host.run(prompt)[text][0]
    assert torch.equal(cached.positive[0], plain.positive[0])
    del prompt[text]["inputs"]["t5"]
    assert torch.equal(host.run(prompt)[text][0].negative, plain.negative)
    prompt[text]["inputs"]["positive_prompt"] = "never seen before"
    with pytest.raises(NodeError, match="connect t5"):
        host.run(prompt)


def test_the_cached_text_encoder_gives_the_same_embeds(host: Host, prompt) -> None:
    text = node_of(prompt, "InfiniteTalkTextEncode")
    inputs = prompt[text]["inputs"]
    shared = {name: inputs[name] for name in ("positive_prompt", "negative_prompt")}
    prompt["100"] = {
        "class_type": "InfiniteTalkTextEncodeCached",
        "inputs": {
            "model_name": make_workflows.TINY["text"],
            "precision": "bf16",
            "quantization": "disabled",
            "use_disk_cache": True,
            "device": "cpu",
            **shared,
        },
    }
    outputs = host.run(prompt)
    embeds, negative, words = outputs["100"]
    torch.testing.assert_close(embeds.positive[0], outputs[text][0].positive[0])
    torch.testing.assert_close(negative.positive[0], outputs[text][0].negative)
    assert words == shared["positive_prompt"]


def test_comfyuis_own_adapter_is_found_where_comfyui_has_it(host: Host, prompt) -> None:
    sampler, adapter = node_of(prompt, "InfiniteTalkSampler"), node_of(prompt, "InfiniteTalkAdapterLoader")
    expected = host.run(prompt)[sampler][0]["samples"]
    models = host.base / "models"
    (models / "model_patches").mkdir(exist_ok=True)
    (models / "model_patches/infinitetalk-patch.safetensors").write_bytes(
        (models / "diffusion_models" / make_workflows.TINY["adapter"]).read_bytes()
    )
    prompt[adapter]["inputs"]["model"] = "infinitetalk-patch.safetensors"
    assert torch.equal(host.run(prompt)[sampler][0]["samples"], expected)


def test_a_missing_file_is_named(host: Host) -> None:
    from wanvideo_infinitetalk.comfy_nodes import comfyui as host_module

    with pytest.raises(CheckpointError, match=r"no file 'gone\.gguf' in ComfyUI's models/diffusion_models"):
        host_module.model_path("dit", "gone.gguf")
