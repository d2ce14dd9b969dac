"""The pack in a real ComfyUI, over its API."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support import make_workflows, tiny_comfy, tiny_core, workflows
from support.comfy_server import PACK, Server, messages, saved_files
from support.tiny_comfy import link_preset, node_of, shrink
from support.video import streams_of
from wanvideo_infinitetalk.cli.tiny_models import TinySet

pytestmark = pytest.mark.comfyui

ROOT = workflows.ROOT
PUBLIC: dict[str, Any] = json.loads((ROOT / "tests/data/nodes.json").read_text())
OWN = set(json.loads((ROOT / "locales/en/nodeDefs.json").read_text()))
"""Ids of this pack's own, which are the ones that it translates into English."""


@pytest.fixture
def prompt() -> dict[str, Any]:
    return shrink(workflows.load("infinitetalk_tiny"))


def combo_values(entry: list[Any]) -> list[Any] | None:
    """Values of a combo in either of the two forms that /object_info has."""
    if isinstance(entry[0], list):
        return entry[0]
    return entry[1].get("options") if entry[0] == "COMBO" else None


def test_the_pack_is_imported_without_a_warning(server: Server) -> None:
    assert re.search(rf"seconds: .*{PACK}", server.log)
    startup = server.log.split("To see the GUI go to")[0]
    suspicious = [
        line for line in startup.splitlines() if re.search(r"import failed|traceback|warning|error", line, re.I)
    ]
    assert not [line for line in suspicious if PACK in line], suspicious


def test_all_nodes_are_registered_as_saved_workflows_know_them(server: Server) -> None:
    info = server.get("/object_info")
    ours = {name for name, node in info.items() if PACK in str(node.get("python_module"))}
    assert ours == set(PUBLIC) | OWN
    for name, public in PUBLIC.items():
        node = info[name]
        for section in ("required", "optional"):
            given = node["input"].get(section, {})
            assert list(given) == public["input_order"].get(section, []), name
            for key, entry in given.items():
                expected = public["inputs"][key]
                values = combo_values(entry)
                assert ("COMBO" if values is not None else entry[0]) == expected["type"], f"{name}.{key}"
                assert entry[1].get("default") == expected.get("default"), f"{name}.{key}"
                if values is not None and isinstance(expected["options"], list):
                    assert values[: len(expected["options"])] == expected["options"], f"{name}.{key}"
        assert node["output_name"] == [output["name"] for output in public["outputs"]], name
        assert node["display_name"] == public["display_name"]


def test_models_are_found_in_comfyui_folders(server: Server) -> None:
    info = server.get("/object_info")
    found = {
        "dit": ("InfiniteTalkModelLoader", "model"),
        "lora": ("InfiniteTalkLora", "lora"),
        "wav2vec": ("InfiniteTalkWav2VecLoader", "model"),
        "clip": ("InfiniteTalkClipVisionLoader", "clip_name"),
    }
    for kind, (node, widget) in found.items():
        assert make_workflows.REAL[kind] in (combo_values(info[node]["input"]["required"][widget]) or [])


@pytest.mark.parametrize("name", sorted(make_workflows.WORKFLOWS))
def test_example_workflow_ends_in_a_video_with_sound(
    server: Server, tiny_set: TinySet, tmp_path: Path, name: str
) -> None:
    prompt = shrink(workflows.load(name))
    if name == "infinitetalk_humo":
        prompt = tiny_comfy.humo_template(prompt, tiny_set)
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", messages(entry, "execution_error")
    (file,) = saved_files(entry, node_of(prompt, "SaveVideo"))
    frames, shown, sound = streams_of(server.download(file, tmp_path))
    assert frames == 25
    assert sound == pytest.approx(shown, abs=0.07) or name == "infinitetalk_humo"  # whose recording is shorter


def test_humo_under_the_wrappers_ids(server: Server, tiny_set: TinySet, tmp_path: Path) -> None:
    prompt = tiny_comfy.humo_prompt(tiny_set)
    tiles = {"enable_vae_tiling": False, "tile_x": 272, "tile_y": 272, "tile_stride_x": 144, "tile_stride_y": 128}
    decode = {"vae": ["vae", 0], "samples": ["sampler", 0], **tiles}
    saved = {"video": ["video", 0], "filename_prefix": "humo", "format": "auto", "codec": "auto"}
    nodes = {
        "decode": ("WanVideoDecode", decode),
        "video": ("CreateVideo", {"images": ["decode", 0], "audio": ["audio", 0], "fps": 25.0}),
        "save": ("SaveVideo", saved),
    }
    prompt |= {node_id: {"class_type": kind, "inputs": inputs} for node_id, (kind, inputs) in nodes.items()}
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", messages(entry, "execution_error")
    (file,) = saved_files(entry, "save")
    assert streams_of(server.download(file, tmp_path))[0] == 5
    assert "HuMo's guidance and noise levels are those of ComfyUI-WanVideoWrapper" in server.log


def test_a_core_model_runs_with_our_attention(server: Server) -> None:
    sampler = {"seed": 1, "steps": 2, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    sampler |= {"positive": ["text", 0], "negative": ["bad", 0], "latent_image": ["empty", 0]}
    nodes = {
        "model": ("UNETLoader", {"unet_name": tiny_core.MODEL, "weight_dtype": "default"}),
        "text": ("TinyConditioning", {"seed": 1}),
        "bad": ("TinyConditioning", {"seed": 2}),
        "empty": ("EmptyHunyuanLatentVideo", {"width": 64, "height": 64, "length": 9, "batch_size": 1}),
        "ours": ("InfiniteTalkAttention", {"model": ["model", 0], "attention_mode": "sageattn_3_fp8"}),
        "core": ("KSampler", {**sampler, "model": ["model", 0]}),
        "patched": ("KSampler", {**sampler, "model": ["ours", 0]}),
    }
    for name in ("core", "patched"):
        nodes[f"save {name}"] = ("SaveLatent", {"samples": [name, 0], "filename_prefix": name})
    prompt = {node_id: {"class_type": kind, "inputs": inputs} for node_id, (kind, inputs) in nodes.items()}
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", messages(entry, "execution_error")
    core, patched = (
        load_file(next((server.base / "output").glob(f"{name}_*.latent")))["latent_tensor"]
        for name in ("core", "patched")
    )
    error = float((patched - core).norm() / core.norm())
    assert 0 < error < 0.05  # 8 bits
    assert "attention mode sageattn_3_fp8 runs" in server.log


def test_a_preset_is_linked_to_the_widgets(server: Server, prompt) -> None:
    outputs = server.get("/object_info")["InfiniteTalkPreset"]["output_name"]
    link_preset(prompt, "fast", outputs)
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", messages(entry, "execution_error")


def test_one_line_says_what_ran(server: Server, prompt) -> None:
    server.run(prompt)
    assert re.search(
        r"wan2\.1-i2v-tiny\.safetensors, .* s: Attention auto.*; linears .* x bfloat16; guard copies \d+ of \d+ calls",
        server.log,
    )


def test_a_second_run_takes_the_models_that_are_there(server: Server, prompt) -> None:
    server.run(prompt)
    loaded = server.log.count("Loaded wan2.1-i2v-tiny")
    sampler = node_of(prompt, "InfiniteTalkSampler")
    prompt[sampler]["inputs"]["seed"] = 4242
    entry = server.run(prompt)
    cached = {node for message in messages(entry, "execution_cached") for node in message["nodes"]}
    assert node_of(prompt, "InfiniteTalkModelLoader") in cached
    assert sampler not in cached
    assert server.log.count("Loaded wan2.1-i2v-tiny") == loaded


def test_a_value_that_is_no_choice_is_rejected_on_its_node(server: Server, prompt) -> None:
    loader = node_of(prompt, "InfiniteTalkModelLoader")
    prompt[loader]["inputs"]["model"] = "gone.safetensors"
    status, answer = server.post("/prompt", {"prompt": prompt})
    if status == 400:  # ComfyUI knows the choices of V3 combos
        assert loader in answer["node_errors"]
        return
    (error,) = messages(server.wait(answer["prompt_id"]), "execution_error")
    assert error["node_id"] == loader
    assert "no file 'gone.safetensors'" in error["exception_message"]


@pytest.mark.parametrize(
    ("class_type", "change", "words"),
    [
        ("InfiniteTalkModelLoader", {"attention_mode": "radial_sage_attention"}, "choose sageattn_3_fp8"),
        ("InfiniteTalkModelLoader", {"model": make_workflows.TINY["adapter"]}, "is an InfiniteTalk adapter"),
        ("InfiniteTalkSampler", {"scheduler": "deis"}, "choose dpm"),
        ("InfiniteTalkLongVideo", {"frame_window_size": 16}, "4n + 1"),
    ],
)
def test_what_widgets_tell_is_answered_when_run_is_pressed(
    server: Server, prompt, class_type: str, change: dict[str, Any], words: str
) -> None:
    node = node_of(prompt, class_type)
    prompt[node]["inputs"].update(change)
    status, answer = server.post("/prompt", {"prompt": prompt})
    assert status == 400
    assert list(answer["node_errors"]) == [node]
    assert all(words in error["details"] for error in answer["node_errors"][node]["errors"])


@pytest.mark.parametrize(
    ("change", "gone", "words"),
    [
        ({}, "text_embeds", "connect text_embeds"),
        ({}, "multitalk_embeds", "connect multitalk_embeds"),
        ({"start_step": 9}, "samples", "leaves none of"),
    ],
)
def test_what_does_not_fit_is_answered_before_the_model_is_read(
    server: Server, prompt, change: dict[str, Any], gone: str, words: str
) -> None:
    sampler, loader = node_of(prompt, "InfiniteTalkSampler"), node_of(prompt, "InfiniteTalkModelLoader")
    prompt[sampler]["inputs"] = {k: v for k, v in {**prompt[sampler]["inputs"], **change}.items() if k != gone}
    prompt[loader]["inputs"]["base_precision"] = "fp16_fast"  # as no other test has it, so that it is not kept
    entry = server.run(prompt)
    (error,) = messages(entry, "execution_error")
    assert error["node_id"] == sampler
    assert words in error["exception_message"]
    assert loader not in error["executed"]


def test_public_nodes_that_nothing_needs_do_not_disturb(server: Server, prompt) -> None:
    info = server.get("/object_info")
    for number, name in enumerate(PUBLIC):
        given = {}
        for key, entry in info[name]["input"].get("required", {}).items():
            values = combo_values(entry)
            if values or "default" in entry[1]:
                given[key] = entry[1].get("default", (values or [None])[0])
        prompt[str(1000 + number)] = {"class_type": name, "inputs": given}
    assert server.run(prompt)["status"]["status_str"] == "success"


def test_interruption_ends_within_a_step_and_the_next_run_works(server: Server, prompt) -> None:
    sampler = node_of(prompt, "InfiniteTalkSampler")
    prompt[sampler]["inputs"].update(steps=200, seed=7)
    prompt_id = server.queue(prompt)
    time.sleep(6)
    begin = time.monotonic()
    server.fetch("/interrupt", {})
    entry = server.wait(prompt_id, 60)
    assert time.monotonic() - begin < 20
    (stopped,) = messages(entry, "execution_interrupted")
    assert stopped["node_id"] in prompt
    prompt[sampler]["inputs"].update(steps=1)
    assert server.run(prompt)["status"]["status_str"] == "success"


def test_documents_and_translations_are_delivered(server: Server) -> None:
    for node in (*PUBLIC, *OWN):
        for page in (f"{node}.md", f"{node}/zh.md"):
            status, body = server.fetch(f"/extensions/{PACK}/docs/{page}")
            assert status == 200, page
            assert len(body) > 100
    translations = server.get("/i18n")
    assert set(translations["en"]["nodeDefs"]) >= OWN
    assert set(translations["zh"]["nodeDefs"]) >= OWN | set(PUBLIC)


def test_workflows_are_offered_as_templates(server: Server) -> None:
    templates = server.get("/workflow_templates")
    assert set(make_workflows.WORKFLOWS) <= set(templates[PACK])
    for name in make_workflows.WORKFLOWS:
        assert server.fetch(f"/api/workflow_templates/{PACK}/{name}.jpg")[0] == 200


def test_the_blueprint_is_offered(server: Server) -> None:
    status, body = server.fetch("/global_subgraphs")
    if status == 404:
        pytest.skip("this ComfyUI has no blueprints of custom nodes")
    (found,) = [key for key, entry in json.loads(body).items() if entry["info"]["node_pack"].endswith(PACK)]
    entry = server.get(f"/global_subgraphs/{found}")
    assert entry["name"] == make_workflows.BLUEPRINT
    assert json.loads(entry["data"])["definitions"]["subgraphs"][0]["name"] == make_workflows.BLUEPRINT
