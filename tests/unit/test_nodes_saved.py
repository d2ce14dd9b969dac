"""Public nodes in saved workflows: what they ask for is done, or answered with a sentence; unused ones are quiet."""

from __future__ import annotations

import itertools
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_comfy, workflows
from support.comfy_host import Host, NodeError, hosted
from support.tiny_comfy import node_of, shrink
from wanvideo_infinitetalk.wanvideo.errors import CheckpointError, InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory):
    base = tmp_path_factory.mktemp("comfy")
    tiny_comfy.fill(base)
    with hosted(base) as host:
        yield host


@pytest.fixture
def prompt() -> dict[str, Any]:
    return shrink(workflows.load("infinitetalk_tiny"))


def call(host: Host, class_type: str, **inputs: Any) -> tuple[Any, ...]:
    return host.nodes[class_type].execute(**inputs).args


def widgets(host: Host, class_type: str, **changes: Any) -> dict[str, Any]:
    """The required widgets of a node at their defaults."""
    found = {i.id: i for i in host.nodes[class_type].GET_SCHEMA().inputs if not i.optional}
    values = {}
    for name, widget in found.items():
        options = widget.as_dict()
        if widget.get_io_type() == "COMBO":
            values[name] = options.get("default", next(iter(options["options"]), ""))
        elif "default" in options:
            values[name] = options["default"]
    return {**values, **changes}


def saved_ids(host: Host) -> list[str]:
    from wanvideo_infinitetalk.comfy_nodes.saved import SAVED_NODES

    return [node.GET_SCHEMA().node_id for node in SAVED_NODES]


def test_nodes_that_nothing_needs_do_not_disturb(host: Host, prompt) -> None:
    """With widgets at any value, and none of their required sockets connected."""
    save = node_of(prompt, "SaveVideo")
    for number, public_id in enumerate(saved_ids(host)):
        prompt[f"9{number:02}"] = {"class_type": public_id, "inputs": widgets(host, public_id)}
    assert save in host.run(prompt, save)


# Where each type that is not supported goes into a node that runs.
SOCKETS = {
    "WANVIDCONTEXT": ("InfiniteTalkSampler", "context_options"),
    "LOOPARGS": ("InfiniteTalkSampler", "loop_args"),
    "FREEINITARGS": ("InfiniteTalkSampler", "freeinit_args"),
}


def test_what_is_not_supported_is_said_before_anything_runs_and_once(host: Host, prompt) -> None:
    from wanvideo_infinitetalk.comfy_nodes.saved import UNSUPPORTED

    assert "WanVideoContextOptions" in UNSUPPORTED
    for public_id, row in UNSUPPORTED.items():
        prompt["900"] = {"class_type": public_id, "inputs": widgets(host, public_id)}
        first = row.inputs()[0].id
        prompt["900"]["inputs"].setdefault(first, ["1", 0])
        with pytest.raises(NodeError, match="not part of this pack, remove it") as caught:
            host.run(
                {"1": {"class_type": "SolidMask", "inputs": {"value": 1, "width": 8, "height": 8}}, **prompt}, "900"
            )
        assert caught.value.node_id == "900"
        assert row.display_name in str(caught.value)
        assert host.executed == []
        assert len(host.shown) == 1
        with pytest.raises(InputError, match="not part of this pack"):
            call(host, public_id)


@pytest.mark.parametrize("socket", SOCKETS)
def test_the_sockets_of_unsupported_nodes_stop_the_prompt(host: Host, prompt, socket: str) -> None:
    from wanvideo_infinitetalk.comfy_nodes.saved import UNSUPPORTED

    class_type, name = SOCKETS[socket]
    public_id = next(key for key, row in UNSUPPORTED.items() if row.outputs[0][0] == socket)
    prompt["900"] = {"class_type": public_id, "inputs": widgets(host, public_id)}
    prompt[node_of(prompt, class_type)]["inputs"][name] = ["900", 0]
    with pytest.raises(NodeError, match="not part of this pack") as caught:
        host.run(prompt)
    assert caught.value.node_id == "900"


# --- samplers ----------------------------------------------------------------------------------------------------


def sampler_inputs(prompt: dict[str, Any]) -> dict[str, Any]:
    return prompt[node_of(prompt, "InfiniteTalkSampler")]["inputs"]


def split_sampler(prompt: dict[str, Any], **changes: Any) -> None:
    """The sampler of a workflow as sampler v2 with a scheduler and extra arguments."""
    sampler = node_of(prompt, "InfiniteTalkSampler")
    given = {"start_step": 0, "end_step": -1, **prompt[sampler]["inputs"]}
    schedule = {name: given[name] for name in ("scheduler", "steps", "shift", "start_step", "end_step")}
    prompt["800"] = {"class_type": "WanVideoSchedulerv2", "inputs": {**schedule, **changes}}
    extra = {name: given[name] for name in ("multitalk_embeds", "riflex_freq_index", "rope_function") if name in given}
    prompt["801"] = {"class_type": "WanVideoSamplerExtraArgs", "inputs": extra}
    plain = ("model", "image_embeds", "cfg", "seed", "force_offload", "text_embeds")
    inputs = {name: given[name] for name in plain} | {"scheduler": ["800", 0], "extra_args": ["801", 0]}
    prompt[sampler] = {"class_type": "WanVideoSamplerv2", "inputs": inputs}


def test_sampler_v2_makes_the_same_video(host: Host, prompt) -> None:
    sampler = node_of(prompt, "InfiniteTalkSampler")
    expected = host.run(prompt)[sampler][0]
    split_sampler(prompt)
    found = host.run(prompt)[sampler][0]
    assert torch.equal(found["samples"], expected["samples"])
    assert torch.equal(found["video"], expected["video"])


def test_sampler_from_settings_makes_the_same_video(host: Host, prompt) -> None:
    sampler = node_of(prompt, "InfiniteTalkSampler")
    expected = host.run(prompt)[sampler][0]
    prompt["800"] = {"class_type": "WanVideoSamplerSettings", "inputs": prompt[sampler]["inputs"]}
    prompt[sampler] = {"class_type": "WanVideoSamplerFromSettings", "inputs": {"sampler_inputs": ["800", 0]}}
    assert torch.equal(host.run(prompt)[sampler][0]["samples"], expected["samples"])


def test_the_scheduler_node_gives_what_the_sampler_takes(host: Host, prompt) -> None:
    sampler = node_of(prompt, "InfiniteTalkSampler")
    inputs = sampler_inputs(prompt)
    expected = host.run(prompt)[sampler][0]["samples"]
    names = ("scheduler", "steps", "shift")
    prompt["800"] = {"class_type": "WanVideoScheduler", "inputs": {"start_step": 0, "end_step": -1}}
    prompt["800"]["inputs"] |= {name: inputs[name] for name in names}
    outputs = [output.display_name for output in host.nodes["WanVideoScheduler"].GET_SCHEMA().outputs]
    inputs |= {name: ["800", outputs.index(name)] for name in (*names, "sigmas", "start_step", "end_step")}
    found = host.run(prompt)
    sigmas, steps = found["800"][:2]
    assert len(sigmas) == steps + 1
    assert torch.equal(found[sampler][0]["samples"], expected)


@pytest.mark.parametrize(
    ("change", "words"), [({"scheduler": "deis"}, "choose dpm\\+\\+"), ({"enhance_hf": True}, "turn enhance_hf off")]
)
@pytest.mark.parametrize("public_id", ["WanVideoScheduler", "WanVideoSchedulerv2"])
def test_a_schedule_of_others_is_answered_where_it_is_chosen(host: Host, public_id: str, change, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call(host, public_id, **widgets(host, public_id, **change))


def test_a_noise_level_stands_for_a_step(host: Host) -> None:
    from wanvideo_infinitetalk.comfy_nodes.sampling import SamplerSettings
    from wanvideo_infinitetalk.pipeline.schedulers import make_scheduler

    def settings(**changes: Any) -> Any:
        return SamplerSettings(**{"steps": 8, "cfg": 1.0, "shift": 7.0, "seed": 0, "scheduler": "euler", **changes})

    sigmas = make_scheduler("euler", 8, 7.0).sigmas
    for sigma in (1.0, 0.9, float(sigmas[5]), 0.001):
        (level,) = call(host, "WanVideoSigmaToStep", sigma=sigma)
        made = settings(start_step=level, end_step=level)
        expected = next(i for i, s in enumerate(sigmas) if float(s) <= sigma)
        assert (made.start_step, made.end_step) == (expected, expected)
    half = settings(steps=4, denoise=0.5, start_step=call(host, "WanVideoSigmaToStep", sigma=float(sigmas[6]))[0])
    assert half.first_step == 6  # of the whole schedule of 8


def test_noise_levels_pass_to_the_sampler(host: Host, prompt) -> None:
    sampler = node_of(prompt, "InfiniteTalkSampler")
    prompt["800"] = {"class_type": "WanVideoSigmaToStep", "inputs": {"sigma": 0.0}}
    sampler_inputs(prompt)["start_step"] = ["800", 0]
    with pytest.raises(NodeError, match="The start step 2 leaves none of 2 steps"):
        host.run(prompt)
    prompt["800"]["inputs"]["sigma"] = 1.0
    assert sampler in host.run(prompt)


def test_a_list_of_numbers_for_the_steps(host: Host) -> None:
    values = {"start_value": 4.0, "end_value": 2.0, "default_value": 0.5, "start_percent": 0.25, "end_percent": 0.75}
    made = call(host, "CreateScheduleFloatList", steps=8, interpolation="linear", **values)
    assert made[0] == pytest.approx([0.5, 0.5, 4.0, 10 / 3, 8 / 3, 2.0, 0.5, 0.5])


# --- models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "blocks"), [(1.0, "all"), (0.5, "half"), (0.0, "none")])
def test_vram_management_swaps_blocks_and_changes_no_number(host: Host, prompt, share: float, blocks: str) -> None:
    sampler, loader = node_of(prompt, "InfiniteTalkSampler"), node_of(prompt, "InfiniteTalkModelLoader")
    expected = host.run(prompt)[sampler][0]["samples"]
    prompt["800"] = {"class_type": "WanVideoVRAMManagement", "inputs": {"offload_percent": share}}
    prompt[loader]["inputs"]["vram_management_args"] = ["800", 0]
    outputs = host.run(prompt)
    count = len(outputs[loader][0].model.blocks)
    swap = outputs[loader][0].swap
    assert swap.blocks == {"all": count, "half": -(-count // 2), "none": 0}[blocks]
    assert swap.text_embedding == swap.image_embedding == (share > 0)
    assert torch.equal(outputs[sampler][0]["samples"], expected)


def test_block_swap_is_asked_for_once(host: Host, prompt) -> None:
    prompt["800"] = {"class_type": "WanVideoVRAMManagement", "inputs": {"offload_percent": 1.0}}
    prompt["801"] = {"class_type": "InfiniteTalkBlockSwap", "inputs": widgets(host, "InfiniteTalkBlockSwap")}
    prompt[node_of(prompt, "InfiniteTalkModelLoader")]["inputs"] |= {
        "vram_management_args": ["800", 0],
        "block_swap_args": ["801", 0],
    }
    with pytest.raises(NodeError, match="asked for twice"):
        host.run(prompt)


def test_a_lora_by_its_name(host: Host) -> None:
    from wanvideo_infinitetalk.comfy_nodes import comfyui

    name = comfyui.model_files("loras")[0]
    options = {"strength": 0.5, "merge_loras": False}
    for given in (name, f" {name.rpartition('.')[0]} "):
        (chosen,) = call(host, "WanVideoLoraSelectByName", lora_name=given, **options)
        assert [(lora.path.name, lora.strength, lora.merge) for lora in chosen] == [(name, 0.5, False)]
    (two,) = call(host, "WanVideoLoraSelectByName", lora_name=name, strength=1.0, prev_lora=chosen)
    assert len(two) == 2
    with pytest.raises(CheckpointError, match="no file 'gone'"):
        call(host, "WanVideoLoraSelectByName", lora_name="gone", strength=1.0)


def test_an_attention_mode_in_some_steps_and_blocks(host: Host, prompt) -> None:
    loader, sampler = node_of(prompt, "InfiniteTalkModelLoader"), node_of(prompt, "InfiniteTalkSampler")
    prompt[loader]["inputs"].update(attention_mode="eager", base_precision="fp32")
    override = {"attention_mode": "sageattn_3_fp4", "start_step": 0, "end_step": 1, "verbose": False}
    prompt["800"] = {"class_type": "WanVideoSetAttentionModeOverride", "inputs": {"model": [loader, 0], **override}}
    prompt["801"] = {"class_type": "WanVideoBlockList", "inputs": {"blocks": "1"}}
    made = {"without": host.run(prompt)[sampler][0]["samples"]}
    sampler_inputs(prompt)["model"] = ["800", 0]
    made["all blocks"] = host.run(prompt)[sampler][0]["samples"]
    prompt["800"]["inputs"]["blocks"] = ["801", 0]
    made["one block"] = host.run(prompt)[sampler][0]["samples"]
    prompt["800"]["inputs"].update(start_step=2, end_step=9)
    made["no step of the two"] = host.run(prompt)[sampler][0]["samples"]
    assert torch.equal(made["no step of the two"], made["without"])
    errors = [float((made[name] - made["without"]).norm()) for name in ("all blocks", "one block")]
    assert errors[0] > errors[1] > 0
    prompt["801"]["inputs"]["blocks"] = "1, 99"
    with pytest.raises(NodeError, match="not all in the model"):
        host.run(prompt)


@pytest.mark.parametrize(
    ("text", "blocks"), [("10", (10,)), ("1, 3-5\n9", (1, 3, 4, 5, 9)), ("[2,2]", (2,)), (" 7 - 8 ", (7, 8)), ("", ())]
)
def test_lists_of_blocks(text: str, blocks: tuple[int, ...]) -> None:
    from wanvideo_infinitetalk.pipeline.blocks import parse_blocks

    assert parse_blocks(text) == blocks


@pytest.mark.parametrize("text", ["ten", "-1", "5-3", "1.5", "1000"])
def test_what_is_no_list_of_blocks(text: str) -> None:
    from wanvideo_infinitetalk.pipeline.blocks import parse_blocks

    with pytest.raises(InputError, match="no transformer block"):
        parse_blocks(text)


def test_stretched_positions_are_rejected(host: Host) -> None:
    values = widgets(host, "WanVideoRoPEFunction")
    assert call(host, "WanVideoRoPEFunction", **values) == ("comfy",)
    with pytest.raises(InputError, match="set ntk_scale"):
        call(host, "WanVideoRoPEFunction", **{**values, "ntk_scale_h": 1.5})


def test_experimental_options_that_are_off_change_nothing(host: Host, prompt) -> None:
    sampler = node_of(prompt, "InfiniteTalkSampler")
    expected = host.run(prompt)[sampler][0]["samples"]
    prompt["800"] = {"class_type": "WanVideoExperimentalArgs", "inputs": widgets(host, "WanVideoExperimentalArgs")}
    sampler_inputs(prompt)["experimental_args"] = ["800", 0]
    assert torch.equal(host.run(prompt)[sampler][0]["samples"], expected)


def experimental_switches() -> dict[str, Any]:
    """Public name -> a value that switches something on."""
    numbers = ("zero_star_steps", "tsr_k", "tsr_sigma", "fresca_scale_low", "fresca_scale_high", "fresca_freq_cutoff")
    public = json.loads((ROOT / "tests/data/nodes.json").read_text())["WanVideoExperimentalArgs"]["inputs"]
    on = {"BOOLEAN": True, "STRING": "3", "FLOAT": 0.5, "INT": 1}
    return {name: on[entry["type"]] for name, entry in public.items() if name not in numbers}


@pytest.mark.parametrize("name", experimental_switches())
def test_experimental_options_that_are_on_are_named(host: Host, name: str) -> None:
    values = widgets(host, "WanVideoExperimentalArgs", **{name: experimental_switches()[name]})
    with pytest.raises(InputError, match=f"{name} of WanVideo Experimental Args: not part"):
        call(host, "WanVideoExperimentalArgs", **values)


# --- text and images ---------------------------------------------------------------------------------------------


def test_a_single_text_is_encoded_as_it_stands(host: Host, prompt) -> None:
    text = node_of(prompt, "InfiniteTalkTextEncode")
    t5 = host.run(prompt)[node_of(prompt, "InfiniteTalkTextEncoderLoader")][0]
    (single,) = call(host, "WanVideoTextEncodeSingle", prompt="a | (b:2.0)", t5=t5)
    (both,) = call(host, "WanVideoTextEncode", positive_prompt="x", negative_prompt="a | (b:2.0)", t5=t5)
    assert len(single.positive) == 1
    assert single.negative is None
    assert torch.equal(single.positive[0], both.negative)  # which has no syntax either
    prompt["800"] = {
        "class_type": "WanVideoTextEncodeSingle",
        "inputs": {"prompt": "a", "t5": prompt[text]["inputs"]["t5"]},
    }
    inputs = sampler_inputs(prompt)
    inputs |= {"text_embeds": ["800", 0], "cfg": 5.0}
    with pytest.raises(NodeError, match="negative prompt: connect one, or set cfg to 1"):
        host.run(prompt)
    inputs["cfg"] = 1.0
    assert node_of(prompt, "InfiniteTalkSampler") in host.run(prompt)


def test_a_single_text_shares_the_disk_cache(host: Host, prompt) -> None:
    t5 = host.run(prompt)[node_of(prompt, "InfiniteTalkTextEncoderLoader")][0]
    (made,) = call(host, "WanVideoTextEncodeSingle", prompt="kept on disk", t5=t5, use_disk_cache=True)
    (found,) = call(host, "WanVideoTextEncodeSingle", prompt="kept on disk", use_disk_cache=True)
    assert torch.equal(made.positive[0], found.positive[0])
    with pytest.raises(InputError, match="connect t5"):
        call(host, "WanVideoTextEncodeSingle", prompt="kept nowhere", use_disk_cache=True)


def clip_and_vae(host: Host, prompt: dict[str, Any]) -> tuple[Any, Any]:
    outputs = host.run(prompt)
    vae = outputs[node_of(prompt, "InfiniteTalkVAELoader")][0]
    from wanvideo_infinitetalk.comfy_nodes import comfyui

    (clip,) = call(
        host, "LoadWanVideoClipTextEncoder", model_name=comfyui.model_files("clip_vision")[0], precision="fp32"
    )
    return clip, vae


def test_the_old_image_encoder_is_both_of_ours(host: Host, prompt) -> None:
    clip, vae = clip_and_vae(host, prompt)
    image = torch.rand(1, 96, 64, 3, generator=torch.Generator().manual_seed(0))
    given = widgets(host, "WanVideoImageClipEncode", generation_width=64, generation_height=64, num_frames=9)
    (made,) = call(
        host, "WanVideoImageClipEncode", clip_vision=clip, image=image, vae=vae, **given, clip_embed_strength=2.0
    )
    assert made.width / made.height == pytest.approx(64 / 96, rel=0.3)
    assert made.width * made.height <= 64 * 64 * 1.1
    (plain,) = call(
        host, "WanVideoImageClipEncode", clip_vision=clip, image=image, vae=vae, **given, adjust_resolution=False
    )
    assert (plain.width, plain.height) == (64, 64)
    torch.testing.assert_close(made.clip.positive, 2 * plain.clip.positive)
    latents, mask = call(host, "WanVideoPreviewEmbeds", embeds=plain)
    assert latents["samples"].shape == (1, 16, 3, 8, 8)
    assert torch.equal(latents["samples"], plain.condition[:, 4:])
    assert mask.shape == (3, 8, 8)
    assert mask.amax((1, 2)).tolist() == [1, 0, 0]


def test_a_long_video_has_nothing_to_preview(host: Host, prompt) -> None:
    embeds = host.run(prompt)[node_of(prompt, "InfiniteTalkLongVideo")][0]
    with pytest.raises(InputError, match="nothing to preview"):
        call(host, "WanVideoPreviewEmbeds", embeds=embeds)


# --- joined descriptions -----------------------------------------------------------------------------------------


def descriptions() -> dict[str, tuple[Any, Any, Any]]:
    """Kind -> (first, second, both as one)."""
    from wanvideo_infinitetalk.comfy_nodes.types import ClipEmbeds, HuMoVideo, LongVideo, OneWindow

    look, other = ClipEmbeds(torch.ones(1, 2, 3)), torch.zeros(20, 3, 8, 8)
    image = torch.ones(3, 64, 64)
    long = LongVideo(None, 64, 64, 17, 9, torch.ones(1, 4, 4, 3), look, "auto", "mkl", False, False, "a.mp4")
    later = replace(long, start_images=None, clip=None, color_match="hm", output_path="b.mp4")
    humo = HuMoVideo(None, 64, 64, 9, (image,), None, 1.0, 2.0, (0.0, 1.0), False, "official")
    speech = replace(humo, images=(), audio=torch.ones(9, 5, 8), audio_cfg=3.0)
    window, empty = OneWindow(64, 64, 9, other, look), OneWindow(64, 64, 9, None, ClipEmbeds(other))
    return {
        "window": (window, empty, replace(window, clip=empty.clip)),
        "long": (long, later, replace(long, color_match="hm", output_path="b.mp4")),
        "humo": (humo, speech, replace(speech, images=humo.images)),
    }


@pytest.mark.parametrize("kind", ["window", "long", "humo"])
def test_the_second_description_wins_where_both_state_something(host: Host, kind: str) -> None:
    first, second, both = descriptions()[kind]
    (found,) = host.nodes["WanVideoCombineEmbeds"].execute(embeds_1=first, embeds_2=second).args
    assert [getattr(found, field.name) is getattr(both, field.name) for field in fields(both)] == [True] * len(
        fields(both)
    )


def test_descriptions_of_two_kinds_or_sizes_are_not_joined(host: Host) -> None:
    combine = host.nodes["WanVideoCombineEmbeds"].execute
    kinds = descriptions()
    for first, second in itertools.permutations(kinds, 2):
        with pytest.raises(InputError, match="not run together here: connect one of them"):
            combine(embeds_1=kinds[first][0], embeds_2=kinds[second][0])
    for first, second, _ in kinds.values():
        with pytest.raises(InputError, match=r"different sizes \(64 x 64, .*; 80 x 64"):
            combine(embeds_1=first, embeds_2=replace(second, width=80))
