"""HuMo's nodes: the video of the command, under both ids, and a sentence for what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_comfy, workflows
from support.comfy_host import Host, NodeError, hosted
from support.tiny_comfy import node_of, shrink
from support.video import streams_of
from wanvideo_infinitetalk.cli.tiny_models import TinySet


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, tiny_set: TinySet):
    base = tmp_path_factory.mktemp("comfy")
    tiny_comfy.fill_humo(base, tiny_set)
    with hosted(base) as host:
        yield host


@pytest.fixture
def prompt(tiny_set: TinySet) -> dict[str, Any]:
    """A workflow of the wrapper's ids."""
    return tiny_comfy.humo_prompt(tiny_set)


def latents(host: Host, prompt: dict[str, Any]) -> torch.Tensor:
    samples = host.run(prompt, "sampler")["sampler"][0]["samples"]
    assert torch.isfinite(samples).all()
    return samples


def test_the_example_workflow_ends_in_a_video_with_sound(host: Host, tiny_set: TinySet) -> None:
    prompt = tiny_comfy.humo_template(shrink(workflows.load("infinitetalk_humo")), tiny_set)
    frames, shown, sound = streams_of(host.run(prompt)[node_of(prompt, "SaveVideo")][0])
    assert frames == 25
    assert 0 < sound <= shown


@pytest.mark.parametrize("small", [False, True])
def test_speech_and_images_decide_what_is_made(host: Host, prompt, tiny_set: TinySet, small: bool) -> None:
    if small:
        prompt["model"]["inputs"]["model"] = tiny_comfy.humo_name(tiny_set.humo_small)
    whole = latents(host, prompt)
    assert whole.shape == (1, 16, 2, 8, 10)  # the references, which lie behind the video, are cut off
    seen = [whole]
    for changes in ({"audio": None}, {"reference_images": None}, {"audio_scale": 0.5}, {"audio_end_percent": 0.3}):
        changed = {**prompt["humo"]["inputs"], **changes}
        given = {name: value for name, value in changed.items() if value is not None}
        seen.append(latents(host, {**prompt, "humo": {"class_type": "HuMoEmbeds", "inputs": given}}))
    for one in range(len(seen)):
        for other in range(one):
            assert not torch.equal(seen[one], seen[other]), (one, other)


def test_the_latents_are_those_of_the_command(
    host: Host, prompt, tiny_set: TinySet, tmp_path: Path, monkeypatch
) -> None:
    """Under the pack's own id, whose guidance is that of HuMo's release."""
    from wanvideo_infinitetalk.pipeline.make_video import Job, make_video
    from wanvideo_infinitetalk.pipeline.plan import GenerateConfig
    from wanvideo_infinitetalk.pipeline.recorder import Recorder

    prompt["humo"]["class_type"] = "InfiniteTalkHuMo"
    prompt["decode"] = {
        "class_type": "InfiniteTalkDecode",
        "inputs": {
            "vae": ["vae", 0],
            "samples": ["sampler", 0],
            "enable_vae_tiling": False,
            "tile_x": 272,
            "tile_y": 272,
            "tile_stride_x": 144,
            "tile_stride_y": 128,
        },
    }
    images = host.run(prompt, "decode")["decode"][0]
    config = GenerateConfig(
        mode="humo", width=80, height=64, steps=2, shift=5.0, scheduler="unipc", cfg=5.0, audio_cfg=5.5, seed=1
    )
    job = Job(
        files=tiny_set.humo_files(),
        audio=(host.base / "input/humo.wav",),
        references=(host.base / "input/portrait.png",),
        out=tmp_path / "v.mp4",
        prompt="a man",
        negative="bad",
        config=config,
        max_frames=5,
        attention_mode="sdpa",
    )
    seen = []
    monkeypatch.setattr(Recorder, "add", lambda self, window: seen.append(window.frames))
    make_video(job)
    assert (images * 255 - seen[0].float()).abs().max() < 0.51  # rounded to whole levels


def test_guidance_of_the_two_ids(host: Host, prompt) -> None:
    """`HuMoEmbeds` is the wrapper's, the pack's own HuMo's unless it is told otherwise."""
    public = latents(host, prompt)
    prompt["humo"]["class_type"] = "InfiniteTalkHuMo"
    assert not torch.equal(latents(host, prompt), public)
    prompt["humo"]["inputs"]["guidance"] = "wrapper"
    assert torch.equal(latents(host, prompt), public)


def test_the_length_of_the_recording(host: Host, prompt) -> None:
    prompt["humo"]["inputs"]["num_frames"] = -1
    assert latents(host, prompt).shape[2] == 5  # 11,500 samples are 17 frames


WRONG: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "speech without Whisper": ("humo", {"whisper_model": None}, "humo", "connect whisper_model"),
    "images without a VAE": ("humo", {"vae": None}, "humo", "connect vae"),
    "no length": ("humo", {"num_frames": -1, "audio": None}, "humo", "connect audio, or set it"),
    "a span from behind": ("humo", {"audio_start_percent": 1.0, "audio_end_percent": 0.5}, "humo", "lies behind"),
    "a condition without a VAE": ("humo", {"vae": None, "reference_images": None}, "sampler", "connect vae"),
    "InfiniteTalk's model": ("model", {"model": "model"}, "sampler", "is not HuMo"),
    "wav2vec2 as Whisper": ("whisper", {"model": "wav2vec_file"}, "whisper", "is a wav2vec2 model"),
    "a start step": ("sampler", {"start_step": 1}, "sampler", "begins from noise"),
    "latents to begin with": ("sampler", {"samples": ["latents", 0]}, "sampler", "begins from noise"),
    "two prompts": ("text", {"positive_prompt": "a | b"}, "sampler", "prompt"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_said(host: Host, prompt, tiny_set: TinySet, case: str) -> None:
    node, changes, where, words = WRONG[case]
    inputs = prompt[node]["inputs"]
    for name, value in changes.items():
        if value is None:
            del inputs[name]
        else:
            inputs[name] = tiny_comfy.humo_name(getattr(tiny_set, value)) if name == "model" else value
    tiles = {"enable_vae_tiling": False, "tile_x": 272, "tile_y": 272, "tile_stride_x": 144, "tile_stride_y": 128}
    prompt["latents"] = {"class_type": "WanVideoEncode", "inputs": {"vae": ["vae", 0], "image": ["image", 0], **tiles}}
    with pytest.raises(NodeError) as caught:
        host.run(prompt, "sampler")
    assert words in str(caught.value.error)
    assert "\n" not in str(caught.value.error)
    assert caught.value.node_id == where


def test_a_humo_model_is_not_taken_for_another(host: Host, prompt) -> None:
    prompt["humo"] = {"class_type": "WanVideoEmptyEmbeds", "inputs": {"width": 80, "height": 64, "num_frames": 5}}
    with pytest.raises(NodeError, match="is HuMo") as caught:
        host.run(prompt, "sampler")
    assert caught.value.node_id == "sampler"
