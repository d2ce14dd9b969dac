"""What can be known when Run is pressed is said then; what other inputs tell is said before the model is read."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from support import make_workflows, tiny_comfy, workflows
from support.comfy_host import Host, NodeError, Rejected, hosted
from support.tiny_comfy import node_of, shrink

TINY = make_workflows.TINY


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory):
    base = tmp_path_factory.mktemp("comfy")
    tiny_comfy.fill(base)
    # Every file also lies in every other folder, as one put into the wrong place would.
    folders = {
        kind: base / "models" / kind for kind in ("vae", "vae_approx", "text_encoders", "clip_vision", "wav2vec2")
    }
    files = {"dit": base / "models/diffusion_models" / TINY["dit"], "vae": base / "models/vae" / TINY["vae"]}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
        for name, file in files.items():
            if file.parent != folder:
                shutil.copy(file, folder / f"wrong-{name}.safetensors")
    shutil.copy(files["vae"], base / "models/diffusion_models/wrong-vae.safetensors")
    with hosted(base) as host:
        yield host


@pytest.fixture
def prompt(host: Host) -> dict[str, Any]:
    host.cache.clear()
    return shrink(workflows.load("infinitetalk_tiny"))


TILES = {"enable_vae_tiling": True, "tile_x": 256, "tile_y": 256, "tile_stride_x": 288, "tile_stride_y": 288}
ENDS = {"width": 64, "height": 64, "num_frames": 9, "noise_aug_strength": 0.0, "start_latent_strength": 1.0}
ENDS |= {"end_latent_strength": 1.0, "force_offload": True}

# What is wrong -> class, its widgets (and names of sockets to which an image is connected), words, times it is shown.
EARLY: dict[str, tuple[str, dict[str, Any], tuple[str, ...], str, int]] = {
    "a scheduler of others": (
        "InfiniteTalkSampler",
        {"scheduler": "rcm", "riflex_freq_index": 0},
        (),
        "choose lcm instead",
        2,
    ),
    "a scheduler of nobody": (
        "WanVideoSampler",
        {"scheduler": "fast", "riflex_freq_index": 0},
        (),
        "There is no scheduler 'fast'",
        2,
    ),
    "riflex": ("InfiniteTalkSampler", {"scheduler": "lcm", "riflex_freq_index": 6}, (), "riflex_freq_index to 0", 2),
    "a scheduler of others, v2": ("WanVideoSchedulerv2", {"scheduler": "deis"}, (), "choose dpm\\+\\+", 1),
    "a schedule of others": ("WanVideoScheduler", {"scheduler": "euler", "enhance_hf": True}, (), "enhance_hf off", 2),
    "riflex, v2": ("WanVideoSamplerExtraArgs", {"riflex_freq_index": 6}, (), "riflex_freq_index to 0", 1),
    "an attention mode of others": (
        "InfiniteTalkModelLoader",
        {"model": TINY["dit"], "attention_mode": "radial_sage_attention"},
        (),
        "choose sageattn_3_fp8",
        2,
    ),
    "an adapter as model": (
        "InfiniteTalkModelLoader",
        {"model": TINY["adapter"], "attention_mode": "sdpa"},
        (),
        "is an InfiniteTalk adapter",
        2,
    ),
    "a VAE as model": (
        "InfiniteTalkModelLoader",
        {"model": "wrong-vae.safetensors", "attention_mode": "sdpa"},
        (),
        "is a Wan2.1 VAE",
        2,
    ),
    "a model as adapter": ("MultiTalkModelLoader", {"model": TINY["dit"]}, (), "is a diffusion transformer", 1),
    "a model as VAE": ("WanVideoVAELoader", {"model_name": "wrong-dit.safetensors"}, (), "is a diffusion transf", 1),
    "a VAE as small decoder": (
        "InfiniteTalkSmallDecoderLoader",
        {"model_name": "wrong-vae.safetensors"},
        (),
        "given as the decoder, is a Wan2.1 VAE",
        1,
    ),
    "a VAE as text encoder": (
        "LoadWanVideoT5TextEncoder",
        {"model_name": "wrong-vae.safetensors", "precision": "bf16"},
        (),
        "given as the text encoder, is a Wan2.1 VAE",
        1,
    ),
    "a VAE as text encoder, cached": (
        "WanVideoTextEncodeCached",
        {"model_name": "wrong-vae.safetensors"},
        (),
        "given as the text encoder, is a Wan2.1 VAE",
        1,
    ),
    "a model as CLIP": (
        "InfiniteTalkClipVisionLoader",
        {"clip_name": "wrong-dit.safetensors"},
        (),
        "is a diffusion",
        1,
    ),
    "a model as CLIP, public": (
        "LoadWanVideoClipTextEncoder",
        {"model_name": "wrong-dit.safetensors"},
        (),
        "is a diffusion",
        1,
    ),
    "a VAE as wav2vec2": ("Wav2VecModelLoader", {"model": "wrong-vae.safetensors"}, (), "is a Wan2.1 VAE", 1),
    "a file that is gone": ("WanVideoVAELoader", {"model_name": "gone.safetensors"}, (), "no file 'gone", 1),
    "a window of 16": ("InfiniteTalkLongVideo", {"frame_window_size": 16, "motion_frame": 9}, (), "4n \\+ 1", 2),
    "no room for new frames": (
        "WanVideoImageToVideoMultiTalk",
        {"frame_window_size": 25, "motion_frame": 24},
        (),
        "no room",
        2,
    ),
    "gaps between tiles": ("InfiniteTalkDecode", TILES, (), "leave gaps: set tile_stride below", 5),
    "gaps between tiles, encoding": ("WanVideoEncode", TILES, (), "leave gaps: set tile_stride below", 5),
    "a mask for the encoder": ("InfiniteTalkEncode", {}, ("mask",), "disconnect mask", 1),
    "no text encoder": ("InfiniteTalkTextEncode", {"use_disk_cache": False}, (), "connect t5", 1),
    "no text encoder, single": ("WanVideoTextEncodeSingle", {"use_disk_cache": False}, (), "connect t5", 1),
    "no VAE": ("InfiniteTalkImageToVideo", {**ENDS, "fun_or_fl2v_model": True}, (), "connect vae", 1),
    "an end behind the video": (
        "WanVideoImageToVideoEncode",
        {**ENDS, "fun_or_fl2v_model": False},
        ("vae", "end_image"),
        "turn fun_or_fl2v_model on",
        3,
    ),
    "control": ("WanVideoEmptyEmbeds", {}, ("control_embeds",), "disconnect control_embeds", 1),
    "reference latents": ("InfiniteTalkEmptyVideo", {}, ("extra_latents",), "disconnect extra_latents", 1),
    "a batch of CLIP features": (
        "InfiniteTalkClipVisionEncode",
        {"combine_embeds": "batch"},
        ("image_2",),
        "choose average or sum or concat",
        2,
    ),
}


@pytest.mark.parametrize("case", EARLY)
def test_it_is_said_when_run_is_pressed(host: Host, case: str) -> None:
    class_type, widgets, linked, words, times = EARLY[case]
    image = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 8, "height": 8}}
    node = {"class_type": class_type, "inputs": {**widgets, **{name: ["1", 0] for name in linked}}}
    with pytest.raises(NodeError, match=words) as caught:
        host.run({"1": image, "2": node}, "2")
    assert isinstance(caught.value.error, Rejected)
    assert caught.value.class_type == class_type
    assert host.executed == []
    assert len(host.shown) == times
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", [case for case, row in EARLY.items() if not row[2] and "connect" not in row[3]])
def test_what_comes_by_a_link_is_not_judged_before_it_is_known(host: Host, case: str) -> None:
    class_type, widgets, _, _, _ = EARLY[case]
    assert host.nodes[class_type].validate_inputs(**dict.fromkeys(widgets)) is True


def test_numbers_and_values_that_are_named_are_checked_as_comfyui_would(host: Host) -> None:
    """ComfyUI checks neither of inputs that a node checks itself."""
    long, sampler = host.nodes["InfiniteTalkLongVideo"], host.nodes["InfiniteTalkSampler"]
    assert "frame_window_size" in long.validate_inputs(frame_window_size=10001, motion_frame=9)
    assert "riflex_freq_index" in sampler.validate_inputs(scheduler="euler", riflex_freq_index=-1)
    loader = host.nodes["WanVideoModelLoader"]
    assert "no attention mode" in loader.validate_inputs(attention_mode="none")
    assert sampler.validate_inputs(scheduler="euler", riflex_freq_index=0) is True


def foreign_sockets(host: Host) -> list[tuple[str, str]]:
    from wanvideo_infinitetalk.comfy_nodes.saved import UNSUPPORTED
    from wanvideo_infinitetalk.comfy_nodes.schema import ANSWERED, FOREIGN

    return [
        (node_id, socket.id)
        for node_id, node in host.nodes.items()
        for socket in node.GET_SCHEMA().inputs
        if socket.get_io_type() in FOREIGN.keys() - ANSWERED and node_id not in UNSUPPORTED
    ]


def test_a_foreign_socket_is_answered_when_run_is_pressed(host: Host) -> None:
    found = foreign_sockets(host)
    assert len(found) > 20
    for node_id, name in found:
        assert f"disconnect {name}" in host.nodes[node_id].validate_inputs(**{name: None})


def test_types_whose_nodes_answer_are_not_answered_twice(host: Host) -> None:
    from wanvideo_infinitetalk.comfy_nodes.saved import SAVED_NODES
    from wanvideo_infinitetalk.comfy_nodes.schema import ANSWERED, FOREIGN

    made = {output.io_type for node in SAVED_NODES for output in node.GET_SCHEMA().outputs}
    assert made & set(FOREIGN) == ANSWERED


# --- before the model is read ------------------------------------------------------------------------------------

# What is wrong -> the class that has it, widgets that change, inputs that go, words, the class that says it.
BEFORE: dict[str, tuple[str, dict[str, Any], tuple[str, ...], str, str]] = {
    "no prompt": ("InfiniteTalkSampler", {}, ("text_embeds",), "connect text_embeds", "InfiniteTalkSampler"),
    "no speech": ("InfiniteTalkSampler", {}, ("multitalk_embeds",), "connect multitalk_embeds", "InfiniteTalkSampler"),
    "no image": ("InfiniteTalkLongVideo", {}, ("start_image",), "connect start_image", "InfiniteTalkSampler"),
    "no step left": ("InfiniteTalkSampler", {"start_step": 5}, (), "start step", "InfiniteTalkSampler"),
    "an end step": ("InfiniteTalkSampler", {"end_step": 1}, (), "end_step", "InfiniteTalkSampler"),
    "no step at all": (
        "InfiniteTalkSampler",
        {"denoise_strength": 0.0},
        (),
        "denoise_strength 0",
        "InfiniteTalkSampler",
    ),
    "a schedule of four steps": (
        "InfiniteTalkSampler",
        {"scheduler": "flowmatch_distill", "steps": 3},
        (),
        "set steps to 4",
        "InfiniteTalkSampler",
    ),
    "a place outside": (
        "InfiniteTalkLongVideo",
        {"output_path": "../../elsewhere.mp4"},
        (),
        "leads outside",
        "InfiniteTalkLongVideo",
    ),
    "a huge window": (
        "InfiniteTalkLongVideo",
        {"width": 2048, "height": 8192, "frame_window_size": 9997},
        (),
        "too large",
        "InfiniteTalkLongVideo",
    ),
}


@pytest.mark.parametrize("case", BEFORE)
def test_it_is_said_before_the_model_is_read(host: Host, prompt, case: str) -> None:
    class_type, change, gone, words, says = BEFORE[case]
    inputs = prompt[node_of(prompt, class_type)]["inputs"]
    inputs.update(change)
    for name in gone:
        del inputs[name]
    with pytest.raises(NodeError, match=words) as caught:
        host.run(prompt)
    assert caught.value.class_type == says
    assert node_of(prompt, "InfiniteTalkModelLoader") not in host.executed
    assert "\n" not in str(caught.value.error)


@pytest.mark.parametrize("kind", ["v2", "settings"])
def test_other_samplers_say_it_before_the_model_is_read_too(host: Host, prompt, kind: str) -> None:
    sampler = node_of(prompt, "InfiniteTalkSampler")
    given = prompt[sampler]["inputs"]
    if kind == "settings":
        prompt["800"] = {"class_type": "WanVideoSamplerSettings", "inputs": given}
        prompt[sampler] = {"class_type": "WanVideoSamplerFromSettings", "inputs": {"sampler_inputs": ["800", 0]}}
        del given["multitalk_embeds"]
    else:
        schedule = {name: given.pop(name) for name in ("scheduler", "steps", "shift")}
        prompt["800"] = {"class_type": "WanVideoSchedulerv2", "inputs": {**schedule, "start_step": 0, "end_step": -1}}
        plain = ("model", "image_embeds", "cfg", "seed", "force_offload", "text_embeds")
        inputs = {name: given[name] for name in plain} | {"scheduler": ["800", 0]}
        prompt[sampler] = {"class_type": "WanVideoSamplerv2", "inputs": inputs}
    with pytest.raises(NodeError, match="connect multitalk_embeds"):
        host.run(prompt)
    assert node_of(prompt, "InfiniteTalkModelLoader") not in host.executed


def test_an_object_of_another_pack_is_answered_before_the_model_is_read(host: Host, prompt) -> None:
    prompt["800"] = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 8, "height": 8}}
    prompt[node_of(prompt, "InfiniteTalkSampler")]["inputs"]["image_embeds"] = ["800", 0]
    with pytest.raises(NodeError, match="comes from a node of another pack"):
        host.run(prompt)
    assert node_of(prompt, "InfiniteTalkModelLoader") not in host.executed
