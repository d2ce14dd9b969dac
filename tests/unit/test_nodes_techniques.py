"""The nodes of techniques reach the model, in long videos and in single windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import tiny_comfy, workflows
from support.comfy_host import Host, NodeError, hosted
from support.tiny_comfy import node_of, shrink
from wanvideo_infinitetalk.wanvideo.errors import InputError


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory):
    base = tmp_path_factory.mktemp("comfy")
    tiny_comfy.fill(base)
    with hosted(base) as host:
        yield host


@pytest.fixture
def prompt() -> dict[str, Any]:
    prompt = shrink(workflows.load("infinitetalk_tiny"))
    prompt[node_of(prompt, "InfiniteTalkModelLoader")]["inputs"].update(base_precision="fp32", attention_mode="sdpa")
    prompt[node_of(prompt, "InfiniteTalkSampler")]["inputs"].update(cfg=3.0)
    return prompt


def single(prompt: dict[str, Any]) -> None:
    """One window of the long video's size in place of it."""
    inputs = prompt[node_of(prompt, "InfiniteTalkLongVideo")]["inputs"]
    window = {
        "class_type": "InfiniteTalkImageToVideo",
        "inputs": {"width": inputs["width"], "height": inputs["height"], "num_frames": 9, "noise_aug_strength": 0.0}
        | {"start_latent_strength": 1.0, "end_latent_strength": 1.0, "force_offload": True}
        | {name: inputs[name] for name in ("vae", "start_image", "clip_embeds")},
    }
    prompt["700"] = window
    prompt[node_of(prompt, "InfiniteTalkSampler")]["inputs"]["image_embeds"] = ["700", 0]


def made(host: Host, prompt: dict[str, Any]) -> torch.Tensor:
    sampler = node_of(prompt, "InfiniteTalkSampler")
    return host.run(prompt, sampler)[sampler][0]["samples"]


# Node -> the sampler's input, widgets that change the video, widgets that change nothing.
NODES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "InfiniteTalkEnhanceVideo": (
        "feta_args",
        {"weight": 30.0, "start_percent": 0.0, "end_percent": 1.0},
        {"weight": 30.0, "start_percent": 0.9, "end_percent": 1.0},
    ),
    "InfiniteTalkSkipLayers": (
        "slg_args",
        {"blocks": "1", "start_percent": 0.0, "end_percent": 1.0},
        {"blocks": "1", "start_percent": 0.9, "end_percent": 1.0},
    ),
    "InfiniteTalkEasyCache": (
        "cache_args",
        {"easycache_thresh": 1.0, "start_step": 0, "end_step": -1, "cache_device": "offload_device"},
        {"easycache_thresh": 1.0, "start_step": 0, "end_step": 1, "cache_device": "main_device"},
    ),
    "InfiniteTalkTeaCache": (
        "cache_args",
        {"rel_l1_thresh": 1.0, "start_step": 1, "end_step": -1, "cache_device": "offload_device"}
        | {"use_coefficients": False, "mode": "e0"},
        {"rel_l1_thresh": 0.0, "start_step": 1, "end_step": -1, "cache_device": "main_device"}
        | {"use_coefficients": False},
    ),
}


@pytest.mark.parametrize("windows", ["long", "single"])
@pytest.mark.parametrize("class_type", NODES)
def test_a_technique_changes_the_video_where_it_holds(host: Host, prompt, class_type: str, windows: str) -> None:
    name, changing, neutral = NODES[class_type]
    prompt[node_of(prompt, "InfiniteTalkSampler")]["inputs"]["steps"] = 4 if name == "cache_args" else 2
    if windows == "single":
        single(prompt)
    plain = made(host, prompt)
    prompt[node_of(prompt, "InfiniteTalkSampler")]["inputs"][name] = ["800", 0]
    prompt["800"] = {"class_type": class_type, "inputs": changing}
    changed = made(host, prompt)
    assert torch.isfinite(changed).all()
    assert not torch.equal(changed, plain)
    prompt["800"]["inputs"] = neutral
    assert torch.equal(made(host, prompt), plain)


@pytest.mark.parametrize("windows", ["long", "single"])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_a_negative_prompt_in_the_attention(host: Host, prompt, windows: str, cfg: float) -> None:
    sampler, text = node_of(prompt, "InfiniteTalkSampler"), node_of(prompt, "InfiniteTalkTextEncode")
    prompt[sampler]["inputs"]["cfg"] = cfg
    if windows == "single":
        single(prompt)
    plain = made(host, prompt)
    t5 = prompt[text]["inputs"]["t5"]
    prompt["800"] = {"class_type": "InfiniteTalkTextEncodeSingle", "inputs": {"prompt": "ugly, blurred", "t5": t5}}
    prompt["801"] = {
        "class_type": "InfiniteTalkNag",
        "inputs": {"original_text_embeds": [text, 0], "nag_text_embeds": ["800", 0]}
        | {"nag_scale": 11.0, "nag_tau": 2.5, "nag_alpha": 0.5},
    }
    prompt[sampler]["inputs"]["text_embeds"] = ["801", 0]
    assert not torch.equal(made(host, prompt), plain)
    prompt["801"]["inputs"]["nag_alpha"] = 0.0
    torch.testing.assert_close(made(host, prompt), plain)


def test_all_windows_share_one_negative_prompt(host: Host) -> None:
    from wanvideo_infinitetalk.comfy_nodes.types import TextEmbeds

    two, one = TextEmbeds((torch.zeros(1, 4), torch.zeros(1, 4))), TextEmbeds((torch.zeros(1, 4),))
    given = {"nag_scale": 1.0, "nag_tau": 1.0, "nag_alpha": 0.5}
    node = host.nodes["WanVideoApplyNAG"]
    assert node.execute(original_text_embeds=two, nag_text_embeds=one, **given).args[0].positive is two.positive
    with pytest.raises(InputError, match="remove the \\|"):
        node.execute(original_text_embeds=one, nag_text_embeds=two, **given)


@pytest.mark.parametrize(
    ("change", "words"), [({"blocks": "99"}, "not all in the model"), ({"blocks": "ten"}, "no transformer block")]
)
def test_blocks_that_cannot_be_skipped(host: Host, prompt, change: dict[str, Any], words: str) -> None:
    prompt["800"] = {"class_type": "WanVideoSLG", "inputs": {"start_percent": 0.0, "end_percent": 1.0, **change}}
    prompt[node_of(prompt, "InfiniteTalkSampler")]["inputs"]["slg_args"] = ["800", 0]
    with pytest.raises(NodeError, match=words):
        host.run(prompt)


def test_skipped_layers_need_a_pass_to_skip_them_in(host: Host, prompt) -> None:
    prompt["800"] = {"class_type": "InfiniteTalkSkipLayers", "inputs": NODES["InfiniteTalkSkipLayers"][1]}
    prompt[node_of(prompt, "InfiniteTalkSampler")]["inputs"] |= {"slg_args": ["800", 0], "cfg": 1.0}
    prompt[node_of(prompt, "InfiniteTalkSpeech")]["inputs"]["audio_cfg_scale"] = 1.0
    with pytest.raises(NodeError, match="set cfg above 1"):
        host.run(prompt)


@pytest.mark.parametrize(
    ("class_type", "widgets", "words"),
    [
        ("WanVideoMagCache", {"magcache_thresh": 0.1, "magcache_K": 2}, "no ratios for a model like .* use EasyCache"),
        ("WanVideoTeaCache", {"rel_l1_thresh": 0.1, "use_coefficients": True}, "turn use_coefficients off"),
    ],
)
def test_a_cache_without_a_measure_of_the_model_says_so(host: Host, prompt, class_type, widgets, words: str) -> None:
    common = {"start_step": 1, "end_step": -1, "cache_device": "offload_device"}
    prompt["800"] = {"class_type": class_type, "inputs": common | widgets}
    prompt[node_of(prompt, "InfiniteTalkSampler")]["inputs"]["cache_args"] = ["800", 0]
    with pytest.raises(NodeError, match=words):
        host.run(prompt)


def test_the_widgets_of_caches_reach_them(host: Host) -> None:
    from wanvideo_infinitetalk.pipeline.step_cache import EasyCache, MagCache, TeaCache

    def made(class_type: str, *widgets: Any) -> Any:
        names = [i.id for i in host.nodes[class_type].GET_SCHEMA().inputs]
        return host.nodes[class_type].execute(**dict(zip(names, widgets, strict=False))).args[0]

    main, host_memory = "main_device", "offload_device"
    assert made("WanVideoEasyCache", 0.02, 3, 9, main) == EasyCache(0.02, 3, 9, on_host=False)
    assert made("WanVideoTeaCache", 0.2, 3, 9, host_memory, False) == TeaCache(0.2, 3, 9)
    assert made("WanVideoTeaCache", 0.2, 3, 9, main, True, "e0") == TeaCache(
        0.2, 3, 9, on_host=False, coefficients=(), projected=True
    )
    assert made("WanVideoMagCache", 0.1, 5, 2, -1, host_memory) == MagCache(0.1, 2, -1, most_in_a_row=5)


def test_skipped_blocks_go_with_block_swap(host: Host, prompt) -> None:
    loader = node_of(prompt, "InfiniteTalkModelLoader")
    prompt["800"] = {"class_type": "InfiniteTalkSkipLayers", "inputs": NODES["InfiniteTalkSkipLayers"][1]}
    prompt[node_of(prompt, "InfiniteTalkSampler")]["inputs"]["slg_args"] = ["800", 0]
    expected = made(host, prompt)
    prompt["801"] = {"class_type": "WanVideoVRAMManagement", "inputs": {"offload_percent": 1.0}}
    prompt[loader]["inputs"]["vram_management_args"] = ["801", 0]
    assert torch.equal(made(host, prompt), expected)


def test_another_technique_is_another_video_to_resume(host: Host, prompt) -> None:
    """The description of a video in a file holds them, so that what was begun otherwise is not gone on with."""
    from wanvideo_infinitetalk.pipeline.journal import describe, describe_config
    from wanvideo_infinitetalk.pipeline.plan import GenerateConfig
    from wanvideo_infinitetalk.pipeline.techniques import EnhanceVideo, SkipLayers
    from wanvideo_infinitetalk.wanvideo.modules.techniques import NormalizedAttention

    both = [(), (EnhanceVideo(1.0),), (EnhanceVideo(2.0),), (SkipLayers((1,)),), (SkipLayers((2,)),)]
    both.append((EnhanceVideo(1.0), SkipLayers((1,))))
    described = [describe_config(GenerateConfig(techniques=techniques)) for techniques in both]
    assert all(one != other for i, one in enumerate(described) for other in described[:i])
    nags = [None, NormalizedAttention(torch.zeros(1, 4)), NormalizedAttention(torch.ones(1, 4))]
    nags.append(NormalizedAttention(torch.ones(1, 4), alpha=0.5))
    described = [describe("nag", nag) for nag in nags]
    assert all(one != other for i, one in enumerate(described) for other in described[:i])
