"""Writes example_workflows/: canvas and API format of each workflow, and its thumbnail; and subgraphs/.

    cd tests && python -m support.make_workflows

The workflows are laid out in columns; widgets that are not named keep the node's default.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wanvideo_infinitetalk import __version__

from support.comfy_host import hosted
from support.workflows import CORE, FOLDER, ROOT, SUBGRAPHS, Look, look_of, to_api

PACK = ("wanvideo-infinitetalk", __version__)
CORE_PACK = ("comfy-core", "0.3.64")
"""Name in the registry, version; of ComfyUI the oldest that the pack is for."""

COLUMN, GAP, NOTE = 420, 40, 420
TITLE, SOCKET, WIDGET = 40, 22, 26
TALL = {"LoadImage": 320, "LoadAudio": 140, "LoadVideo": 260, "InfiniteTalkTextEncode": 330, "SaveVideo": 420}


@dataclass
class Node:
    """One node of a workflow: `widgets` by name, `links` as socket -> (key of the node, number of its output)."""

    type: str
    widgets: dict[str, Any] = field(default_factory=dict)
    links: dict[str, tuple[str, int]] = field(default_factory=dict)
    title: str | None = None


@dataclass
class Workflow:
    """Columns of keys from left to right, and what the keys stand for."""

    columns: list[list[str]]
    nodes: dict[str, Node]
    notes: tuple[str, str]  # English, Chinese


# Values of widgets that the page adds by itself.
PAGE_WIDGETS = {
    "LoadImage": ["image"],
    "LoadVideo": ["image"],
    "LoadAudio": [None, None],
    "InfiniteTalkSampler": ["fixed"],
}

PROMPT = "A woman is talking to the camera, with natural expressions and small movements of the head."
NEGATIVE = (
    "still picture, blurry, low quality, overexposed, subtitles, watermark, deformed face, extra fingers, bad hands"
)

REAL = {
    "dit": "wan2.1_i2v_480p_14B_fp8_scaled.safetensors",
    "adapter": "Wan2_1-InfiniTetalk-Single_fp16.safetensors",
    "multi_adapter": "Wan2_1-InfiniteTalk-Multi_fp16.safetensors",
    "lora": "lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16.safetensors",
    "vae": "wan_2.1_vae.safetensors",
    "text": "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    "clip": "clip_vision_h.safetensors",
    "wav2vec": "wav2vec2-chinese-base_fp16.safetensors",
    "gguf": "wan2.1-i2v-14b-480p-Q4_K_M.gguf",
    "humo": "humo_17B_fp8_e4m3fn.safetensors",
    "whisper": "whisper_large_v3_fp16.safetensors",
}
TINY = {
    "dit": "wan2.1-i2v-tiny.safetensors",
    "adapter": "infinitetalk-tiny.safetensors",
    "vae": "wan2.1-vae-tiny.safetensors",
    "text": "umt5-tiny.safetensors",
    "clip": "clip-vision-tiny.safetensors",
    "wav2vec": "wav2vec2-tiny.safetensors",
}

HUB = "https://huggingface.co"
WAN = f"{HUB}/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
KIJAI = f"{HUB}/Kijai/WanVideo_comfy/resolve/main"
HUMO = f"{HUB}/Comfy-Org/HuMo_ComfyUI/resolve/main/split_files"

# Kind -> (folder of ComfyUI's models, where the file is), for every file of `REAL`.
PLACES = {
    "dit": ("diffusion_models", f"{WAN}/diffusion_models"),
    "gguf": ("diffusion_models", f"{HUB}/city96/Wan2.1-I2V-14B-480P-gguf/resolve/main"),
    "humo": ("diffusion_models", f"{HUMO}/diffusion_models"),
    "adapter": ("diffusion_models", f"{KIJAI}/InfiniteTalk"),
    "multi_adapter": ("diffusion_models", f"{KIJAI}/InfiniteTalk"),
    "lora": ("loras", f"{KIJAI}/Lightx2v"),
    "vae": ("vae", f"{WAN}/vae"),
    "text": ("text_encoders", f"{WAN}/text_encoders"),
    "clip": ("clip_vision", f"{WAN}/clip_vision"),
    "wav2vec": ("wav2vec2", f"{HUB}/Kijai/wav2vec2_safetensors/resolve/main"),
    "whisper": ("audio_encoders", f"{HUMO}/audio_encoders"),
}
MODELS = {
    REAL[kind]: {"name": REAL[kind], "url": f"{place}/{REAL[kind]}", "directory": folder}
    for kind, (folder, place) in PLACES.items()
}
"""File name -> what ComfyUI's dialog of missing models offers to download, and the folder for it."""

GROUPS = {
    "Models 模型": "#3f789e",
    "Image and speech 图像与语音": "#8a5a9e",
    "Video 视频": "#3f9e5a",
}
"""Title -> color."""


def notes(english: str, chinese: str, *kinds: str) -> tuple[str, str]:
    """Both notes of a workflow, with the files of those kinds and their folders."""
    rows = [f"| {MODELS[REAL[kind]]['directory']} | [{REAL[kind]}]({MODELS[REAL[kind]]['url']}) |" for kind in kinds]
    table = "\n".join(rows)
    return (
        f"{english}\n\n## Models\n| ComfyUI/models/ | file |\n|---|---|\n{table}\n\nOther versions of these models "
        "work as well: choose them in the loaders.\n",
        f"{chinese}\n\n## 模型\n| ComfyUI/models/ | 文件 |\n|---|---|\n{table}\n\n"
        "这些模型的其他版本也可以：在加载器中选择。\n",
    )


FILES = ("dit", "adapter", "lora", "vae", "text", "clip", "wav2vec")


def loaders(
    files: dict[str, str], *, adapter: str = "adapter", dit: str = "dit", swap: int = 20
) -> tuple[dict[str, Node], list[list[str]]]:
    """The loader nodes of every workflow, in two columns."""
    real = "lora" in files
    nodes = {
        "adapter": Node("InfiniteTalkAdapterLoader", {"model": files[adapter]}),
        "dit": Node(
            "InfiniteTalkModelLoader",
            {"model": files[dit], "attention_mode": "auto"},
            {"multitalk_model": ("adapter", 0)},
        ),
        "vae": Node("InfiniteTalkVAELoader", {"model_name": files["vae"], "precision": "bf16" if real else "fp32"}),
        "t5": Node("InfiniteTalkTextEncoderLoader", {"model_name": files["text"]}),
        "clip": Node("InfiniteTalkClipVisionLoader", {"clip_name": files["clip"]}),
        "wav2vec": Node("InfiniteTalkWav2VecLoader", {"model": files["wav2vec"]}),
        "prompt": Node(
            "InfiniteTalkTextEncode", {"positive_prompt": PROMPT, "negative_prompt": NEGATIVE}, {"t5": ("t5", 0)}
        ),
    }
    first = ["adapter", "t5", "wav2vec", "clip", "vae"]
    if real:
        nodes["lora"] = Node("InfiniteTalkLora", {"lora": files["lora"]})
        nodes["swap"] = Node("InfiniteTalkBlockSwap", {"blocks_to_swap": swap, "prefetch_blocks": 1})
        nodes["dit"].links |= {"lora": ("lora", 0), "block_swap_args": ("swap", 0)}
        first = ["lora", "swap", *first]
    return nodes, [first, ["dit", "prompt"]]


def clip_encode(image: tuple[str, int]) -> Node:
    return Node("InfiniteTalkClipVisionEncode", {}, {"clip_vision": ("clip", 0), "image_1": image})


def speech(frames: int, links: dict[str, tuple[str, int]], **widgets: Any) -> Node:
    return Node(
        "InfiniteTalkSpeech",
        {"num_frames": frames, **widgets},
        {"wav2vec_model": ("wav2vec", 0), "audio_1": ("speech", 0), **links},
    )


def sampling(prefix: str, **widgets: Any) -> tuple[dict[str, Node], list[list[str]]]:
    """Everything behind the embeds: sampler, images, the saved video."""
    nodes = {
        "sampler": Node(
            "InfiniteTalkSampler",
            {"steps": 4, "cfg": 1.0, "shift": 7.0, "seed": 2, "scheduler": "dpm++_sde", **widgets},
            {
                "model": ("dit", 0),
                "image_embeds": ("long", 0),
                "text_embeds": ("prompt", 0),
                "multitalk_embeds": ("embeds", 0),
            },
        ),
        "images": Node("InfiniteTalkImagesFromSamples", {}, {"samples": ("sampler", 0)}),
        "video": Node("CreateVideo", {"fps": 25.0}, {"images": ("images", 0), "audio": ("embeds", 1)}),
        "save": Node(
            "SaveVideo",
            {"filename_prefix": f"video/{prefix}", "format": "auto", "codec": "auto"},
            {"video": ("video", 0)},
        ),
    }
    return nodes, [["sampler"], ["images", "video", "save"]]


def long_video(image: tuple[str, int], **widgets: Any) -> Node:
    return Node(
        "InfiniteTalkLongVideo",
        {"motion_frame": 9, **widgets},
        {"vae": ("vae", 0), "start_image": image, "clip_embeds": ("look", 0)},
    )


def talking_picture() -> Workflow:
    nodes, left = loaders(REAL)
    after, right = sampling("infinitetalk")
    nodes |= {
        "image": Node("LoadImage", {"image": "portrait.png"}),
        "speech": Node("LoadAudio", {"audio": "speech.wav"}),
        "look": clip_encode(("image", 0)),
        "embeds": speech(1500, {}),
        "long": long_video(("image", 0), width=480, height=480),
        **after,
    }
    both = notes(
        "# A talking picture, in 4 steps\nAn image and a recording become a video, as long as the recording or "
        "`num_frames`. The LoRA makes it in 4 steps with cfg 1; without it set 40 steps, cfg 5, and "
        "`audio_cfg_scale` 4.",
        "# 会说话的图片，4 步\n一张图像和一段录音变成视频，长度为录音或 `num_frames`。LoRA 使它以 4 步、cfg 1 完成；"
        "不用它时请设 40 步、cfg 5、`audio_cfg_scale` 4。",
        *FILES,
    )
    return Workflow([*left, ["image", "speech", "look"], ["embeds", "long"], *right], nodes, both)


def low_memory() -> Workflow:
    made = talking_picture()
    nodes, left = loaders(REAL, dit="gguf", swap=40)
    made.nodes |= nodes
    made.nodes["prompt"].widgets["device"] = "cpu"
    made.nodes["long"].widgets["tiled_vae"] = True
    made.nodes["save"].widgets["filename_prefix"] = "video/infinitetalk_low_memory"
    both = notes(
        "# A talking picture on a card of 8 to 12 GB\n4-bit weights (GGUF), all blocks in host memory, the text "
        "encoder on the CPU, the VAE in tiles, 4 steps. Out of memory: a smaller `frame_window_size` or size. It has "
        "not been tried on such a card.",
        "# 在 8 到 12 GB 显卡上的会说话的图片\n4 位权重（GGUF），所有块放在主机内存，文本编码器在 CPU "
        "上，VAE 分块，4 步。"
        "显存不足时：减小 `frame_window_size` 或尺寸。未在这样的显卡上试过。",
        *(kind if kind != "dit" else "gguf" for kind in FILES),
    )
    return Workflow([*left, *made.columns[len(left) :]], made.nodes, both)


def humo() -> Workflow:
    nodes = {
        "dit": Node("InfiniteTalkModelLoader", {"model": REAL["humo"], "attention_mode": "auto"}),
        "vae": Node("InfiniteTalkVAELoader", {"model_name": REAL["vae"], "precision": "bf16"}),
        "t5": Node("InfiniteTalkTextEncoderLoader", {"model_name": REAL["text"]}),
        "whisper": Node("InfiniteTalkWhisperLoader", {"model": REAL["whisper"]}),
        "prompt": Node(
            "InfiniteTalkTextEncode", {"positive_prompt": PROMPT, "negative_prompt": NEGATIVE}, {"t5": ("t5", 0)}
        ),
        "image": Node("LoadImage", {"image": "portrait.png"}, title="Reference 参考图"),
        "speech": Node("LoadAudio", {"audio": "speech.wav"}),
        "humo": Node(
            "InfiniteTalkHuMo",
            {"num_frames": 97, "audio_cfg_scale": 5.5},
            {
                "vae": ("vae", 0),
                "whisper_model": ("whisper", 0),
                "reference_images": ("image", 0),
                "audio": ("speech", 0),
            },
        ),
        "sampler": Node(
            "InfiniteTalkSampler",
            {"steps": 40, "cfg": 5.0, "shift": 5.0, "seed": 2, "scheduler": "unipc"},
            {"model": ("dit", 0), "image_embeds": ("humo", 0), "text_embeds": ("prompt", 0)},
        ),
        "decode": Node("InfiniteTalkDecode", {}, {"vae": ("vae", 0), "samples": ("sampler", 0)}),
        "video": Node("CreateVideo", {"fps": 25.0}, {"images": ("decode", 0), "audio": ("speech", 0)}),
        "save": Node(
            "SaveVideo",
            {"filename_prefix": "video/humo", "format": "auto", "codec": "auto"},
            {"video": ("video", 0)},
        ),
    }
    both = notes(
        "# HuMo: a new video of the person\nThe person of the reference image (or things, or clothes: "
        "several images in "
        "one batch) speaks the recording in a new picture that the prompt describes: one window of "
        "about four seconds. "
        "`cfg` guides by the prompt, `audio_cfg_scale` by the speech.",
        "# HuMo：人物的新视频\n参考图中的人（或物、或衣服：一个批次中的多张图像）在提示词描述的新画面中说出录音："
        "约四秒的一个窗口。`cfg` 按提示词引导，`audio_cfg_scale` 按语音引导。",
        "humo",
        "vae",
        "text",
        "whisper",
    )
    columns = [["t5", "whisper", "vae"], ["dit", "prompt"], ["image", "speech"], ["humo"], ["sampler"]]
    return Workflow([*columns, ["decode", "video", "save"]], nodes, both)


def two_speakers() -> Workflow:
    nodes, left = loaders(REAL, adapter="multi_adapter")
    after, right = sampling("infinitetalk_two")
    nodes |= {
        "image": Node("LoadImage", {"image": "two_people.png"}),
        "speech": Node("LoadAudio", {"audio": "speech.wav"}, title="Left speaker 左边的人"),
        "second": Node("LoadAudio", {"audio": "speech_2.wav"}, title="Right speaker 右边的人"),
        "masks": Node("InfiniteTalkSpeakerMasks", {"speakers": 2}, {"image": ("image", 0)}),
        "look": clip_encode(("image", 0)),
        "embeds": speech(1500, {"audio_2": ("second", 0), "ref_target_masks": ("masks", 0)}, multi_audio_type="add"),
        "long": long_video(("image", 0), width=832, height=480),
        **after,
    }
    both = notes(
        "# Two speakers\nEach speaker has a recording and a mask. `multi_audio_type` add: one speaks "
        "after the other; "
        "para: both at once. *Speaker Masks* gives each half of the image to one; write boxes into it, "
        "or connect masks "
        "that you painted, white where the speaker is.",
        "# 两位说话人\n每位说话人有一段录音和一张遮罩。`multi_audio_type` 为 add：一个接一个说；para："
        "同时说。*说话人遮罩* 把图像的"
        "两半各给一人；可以在其中写方框，或连接您画的遮罩，说话人所在处为白色。",
        *(kind if kind != "adapter" else "multi_adapter" for kind in FILES),
    )
    people = ["image", "speech", "second", "masks"]
    return Workflow([*left, people, ["look", "embeds", "long"], *right], nodes, both)


def dubbing() -> Workflow:
    nodes, left = loaders(REAL)
    after, right = sampling("infinitetalk_dubbed", start_step=1)
    nodes |= {
        "source": Node("LoadVideo", {"file": "source.mp4"}),
        "parts": Node("GetVideoComponents", {}, {"video": ("source", 0)}),
        "scaled": Node(
            "ImageScale",
            {"upscale_method": "lanczos", "width": 832, "height": 480, "crop": "center"},
            {"image": ("parts", 0)},
        ),
        "speech": Node("LoadAudio", {"audio": "speech.wav"}, title="New speech 新的语音"),
        "look": clip_encode(("scaled", 0)),
        "embeds": speech(1500, {}),
        "long": long_video(("scaled", 0), width=832, height=480, colormatch="reinhard"),
        **after,
    }
    both = notes(
        "# Dubbing: video to video\nThe people of a source video (25 frames per second) speak the new recording. "
        "`start_step` of the sampler says how close it stays to the source: 0 is free, 1 or 2 of 4 steps keep "
        "movements and background.",
        "# 配音：视频到视频\n源视频（每秒 25 帧）中的人说出新的录音。采样器的 `start_step` "
        "决定与源视频有多接近：0 为自由，"
        "4 步中的 1 或 2 保留动作和背景。",
        *FILES,
    )
    return Workflow([*left, ["source", "parts", "scaled", "speech"], ["look", "embeds", "long"], *right], nodes, both)


def tiny() -> Workflow:
    nodes, left = loaders(TINY)
    after, right = sampling("infinitetalk_tiny", steps=8, shift=3.0, scheduler="multitalk")
    nodes |= {
        "image": Node("LoadImage", {"image": "portrait.png"}),
        "speech": Node("LoadAudio", {"audio": "speech.wav"}),
        "look": clip_encode(("image", 0)),
        "embeds": speech(127, {}),
        "long": long_video(("image", 0), width=128, height=128, frame_window_size=81),
        **after,
    }
    both = (
        "# Try the pack in a minute, on any machine\nTiny models that make drawn faces speak: `infinitetalk "
        "make-tiny FOLDER` writes them; put them into ComfyUI/models/ (diffusion_models: wan2.1-i2v-tiny and "
        "infinitetalk-tiny; vae, text_encoders, clip_vision, wav2vec2: one each). portrait.png and speech.wav are in "
        "the pack's assets folder: copy them to ComfyUI/input.\n",
        "# 在任何机器上一分钟内试用本包\n让画出来的脸说话的小模型：`infinitetalk make-tiny 文件夹` "
        "写出它们；放入 ComfyUI/models/"
        "（diffusion_models：wan2.1-i2v-tiny 和 infinitetalk-tiny；vae、text_encoders、clip_vision、"
        "wav2vec2：各一个）。"
        "portrait.png 和 speech.wav 在本包的 assets 文件夹：复制到 ComfyUI/input。\n",
    )
    return Workflow([*left, ["image", "speech", "look"], ["embeds", "long"], *right], nodes, both)


WORKFLOWS = {
    "infinitetalk_talking_picture": talking_picture,
    "infinitetalk_low_memory": low_memory,
    "infinitetalk_humo": humo,
    "infinitetalk_two_speakers": two_speakers,
    "infinitetalk_dubbing": dubbing,
    "infinitetalk_tiny": tiny,
}


def canvas(workflow: Workflow, looks: dict[str, Look], defaults: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The canvas format."""
    ids = {key: i + 1 for i, key in enumerate(key for column in workflow.columns for key in column)}
    assert set(ids) == set(workflow.nodes)
    nodes: dict[str, dict[str, Any]] = {}
    links: list[list[Any]] = []
    x = 0
    for column in workflow.columns:
        y = 0
        for key in column:
            node = workflow.nodes[key]
            nodes[key] = _on_canvas(node, ids[key], (x, y), looks[node.type], defaults.get(node.type, {}))
            y += nodes[key]["size"][1] + GAP + TITLE
        x += COLUMN + GAP
    for key, node in workflow.nodes.items():
        sockets = [s["name"] for s in nodes[key]["inputs"]]
        assert set(node.links) <= set(sockets), f"{node.type}: {set(node.links) - set(sockets)}"
        for slot, socket in enumerate(nodes[key]["inputs"]):
            if socket["name"] in node.links:
                source, output = node.links[socket["name"]]
                link = len(links) + 1
                links.append([link, ids[source], output, ids[key], slot, socket["type"]])
                socket["link"] = link
                nodes[source]["outputs"][output]["links"].append(link)
    for number, text in enumerate(workflow.notes):
        note_id = len(ids) + 1 + number
        nodes[f"note {number}"] = {
            "id": note_id,
            "type": "MarkdownNote",
            "pos": [-COLUMN - 4 * GAP, number * (NOTE + GAP + TITLE)],
            "size": [COLUMN + 2 * GAP, NOTE],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "properties": {},
            "widgets_values": [text],
            "color": "#432",
            "bgcolor": "#653",
        }
    return {
        "last_node_id": len(ids) + len(workflow.notes),
        "last_link_id": len(links),
        "nodes": list(nodes.values()),
        "links": links,
        "groups": _groups(workflow, nodes),
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _groups(workflow: Workflow, nodes: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A frame around the columns of each kind: two of loaders, the last two of what makes the video, the rest."""
    columns = workflow.columns
    made = []
    for (title, color), part in zip(GROUPS.items(), (columns[:2], columns[2:-2], columns[-2:]), strict=True):
        inside = [nodes[key] for column in part for key in column]
        x, y = (min(node["pos"][axis] for node in inside) for axis in (0, 1))
        right, bottom = (max(node["pos"][axis] + node["size"][axis] for node in inside) for axis in (0, 1))
        margin = GAP // 2 - 2  # frames stand side by side without touching
        frame = [x - margin, y - TITLE - 40, right - x + 2 * margin, bottom - y + TITLE + 40 + margin]
        made.append(
            {"id": len(made) + 1, "title": title, "bounding": frame, "color": color, "font_size": 24, "flags": {}}
        )
    return made


def _on_canvas(
    node: Node, node_id: int, place: tuple[int, int], look: Look, defaults: dict[str, Any]
) -> dict[str, Any]:
    unknown = set(node.widgets) - set(look.widgets)
    assert not unknown, f"{node.type} has no widget {unknown}"
    page = iter(PAGE_WIDGETS.get(node.type, []))
    values = [next(page) if not name else node.widgets.get(name, defaults.get(name)) for name in look.widgets]
    rows = max(len(look.sockets), len(look.outputs))
    made: dict[str, Any] = {
        "id": node_id,
        "type": node.type,
        "pos": list(place),
        "size": [COLUMN, TALL.get(node.type, rows * SOCKET + len(values) * WIDGET + 20)],
        "flags": {},
        "order": node_id,
        "mode": 0,
        "inputs": [{"name": name, "type": kind, "link": None} for name, kind in look.sockets],
        "outputs": [{"name": name, "type": kind, "links": []} for name, kind in look.outputs],
        "properties": _properties(node.type, values),
        "widgets_values": values,
    }
    if node.title:
        made["title"] = node.title
    return made


def _properties(node_type: str, values: list[Any]) -> dict[str, Any]:
    """The node's pack, for ComfyUI-Manager, and the files that its widgets name, for the dialog of missing models."""
    pack, version = CORE_PACK if node_type in CORE else PACK
    models = [MODELS[value] for value in values if isinstance(value, str) and value in MODELS]
    return {
        "Node name for S&R": node_type,
        "cnr_id": pack,
        "ver": version,
        **({"models": models} if models else {}),
    }


def _defaults(schema: Any) -> dict[str, Any]:
    """What the widgets of a node of ours hold when it is made: their default, else the first choice."""
    values = {}
    for widget in schema.inputs:
        options = widget.as_dict()
        value = options.get("default")
        values[widget.id] = options["options"][0] if value is None and options.get("options") else value
    return values


def _nodes() -> tuple[dict[str, Look], dict[str, dict[str, Any]]]:
    """Look and default values of every node, by id."""
    with tempfile.TemporaryDirectory() as folder, hosted(Path(folder)) as host:
        schemas = {node_id: node.GET_SCHEMA() for node_id, node in host.nodes.items()}
        looks = CORE | {node_id: look_of(schema) for node_id, schema in schemas.items()}
        return looks, {node_id: _defaults(schema) for node_id, schema in schemas.items()}


def build() -> tuple[dict[str, tuple[dict[str, Any], dict[str, Any]]], dict[str, Any]]:
    """(name -> (canvas format, API format) of every workflow, the blueprint)."""
    looks, defaults = _nodes()
    drawn = {name: canvas(make(), looks, defaults) for name, make in WORKFLOWS.items()}
    return {name: (made, to_api(made, looks)) for name, made in drawn.items()}, blueprint(looks, defaults)


# --- the blueprint -----------------------------------------------------------------------------------------------

BLUEPRINT = "Image and speech to video (InfiniteTalk)"
OUTSIDE = {"image": "image", "speech": "audio"}
"""Nodes of the talking picture that a blueprint leaves out -> the name of its input in their place."""

SHOWN = {
    "prompt": ["positive_prompt"],
    "long": ["width", "height"],
    "embeds": ["num_frames"],
    "sampler": ["steps", "seed"],
}
"""Widgets that stand on the blueprint itself."""

BORDERS = {"input": -10, "output": -20}  # ids that ComfyUI has for the two ends of a subgraph


def blueprint(looks: dict[str, Look], defaults: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The talking picture as one node: an image and a recording in, a video out; in ComfyUI's form of subgraphs."""
    workflow = talking_picture()
    drawn = canvas(workflow, looks, defaults)
    ids = {key: i + 1 for i, key in enumerate(key for column in workflow.columns for key in column)}
    outside = {ids[key]: name for key, name in OUTSIDE.items()}
    left_out = {*outside, ids["save"]}
    nodes = [node for node in drawn["nodes"] if node["type"] != "MarkdownNote" and node["id"] not in left_out]
    inputs = {name: {"name": name, "type": name.upper(), "linkIds": []} for name in outside.values()}
    output = {"name": "video", "type": "VIDEO", "linkIds": []}
    links = []
    for link, source, slot, target, target_slot, kind in drawn["links"]:
        if source in outside:
            inputs[outside[source]]["linkIds"].append(link)
            source, slot = BORDERS["input"], list(inputs).index(outside[source])
        elif target in left_out:
            output["linkIds"].append(link)
            target, target_slot = BORDERS["output"], 0
        ends = {"origin_id": source, "origin_slot": slot, "target_id": target, "target_slot": target_slot}
        links.append({"id": link, **ends, "type": kind})
    right = max(node["pos"][0] + node["size"][0] for node in nodes)
    for entry in (*inputs.values(), output):
        entry["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{BLUEPRINT}/{entry['name']}"))
    inner = {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, BLUEPRINT)),
        "version": 1,
        "state": {
            "lastGroupId": len(drawn["groups"]),
            "lastNodeId": drawn["last_node_id"],
            "lastLinkId": drawn["last_link_id"],
            "lastRerouteId": 0,
        },
        "revision": 0,
        "config": {},
        "name": BLUEPRINT,
        "inputNode": {"id": BORDERS["input"], "bounding": [-4 * GAP - 120, 0, 120, 80]},
        "outputNode": {"id": BORDERS["output"], "bounding": [right + 4 * GAP, 0, 120, 60]},
        "inputs": list(inputs.values()),
        "outputs": [output],
        "widgets": [],
        "nodes": nodes,
        "groups": [],
        "links": links,
        "extra": {},
    }
    node = {
        "id": 1,
        "type": inner["id"],
        "pos": [0, 0],
        "size": [COLUMN, 420],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [{"name": entry["name"], "type": entry["type"], "link": None} for entry in inputs.values()],
        "outputs": [{"name": "video", "type": "VIDEO", "links": []}],
        "title": BLUEPRINT,
        "properties": {"proxyWidgets": [[str(ids[key]), name] for key, names in SHOWN.items() for name in names]},
        "widgets_values": [],
    }
    return {
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [node],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [inner]},
        "extra": {},
    }


# --- thumbnails --------------------------------------------------------------------------------------------------


def thumbnail(name: str) -> Any:
    """An image of what the workflow does: its people, and the sound below them."""
    import numpy as np
    import soundfile
    from PIL import Image, ImageDraw, ImageOps

    size, strip = 384, 96
    portrait = Image.open(ROOT / "assets/portrait.png").convert("RGB")
    people = {"infinitetalk_two_speakers": 2, "infinitetalk_dubbing": 3}.get(name, 1)
    thumbnail = Image.new("RGB", (size, size), (24, 28, 38))
    width = size // people
    for i in range(people):
        person = ImageOps.fit(portrait, (width - 4, size - strip - 4))
        if people == 2 and i == 1:
            person = ImageOps.mirror(person)
        if name == "infinitetalk_tiny":
            person = person.resize((24, 18), Image.Resampling.BILINEAR).resize(person.size, Image.Resampling.NEAREST)
        thumbnail.paste(person, (i * width + 2, 2))
    samples, _ = soundfile.read(ROOT / "assets/speech.wav", dtype="float32")
    bars = [float(np.abs(part).max()) for part in np.array_split(samples[: len(samples) // 2], 64)]
    draw = ImageDraw.Draw(thumbnail)
    middle = size - strip // 2
    for i, level in enumerate(bars):
        x, half = i * size // 64 + 1, max(1, int(level / max(bars) * (strip // 2 - 8)))
        draw.rectangle((x, middle - half, x + 3, middle + half), fill=(120, 200, 255))
    return thumbnail


def written() -> dict[Path, Any]:
    """Path -> content of every JSON file."""
    workflows, subgraph = build()
    files = {FOLDER / f"{name}.json": drawn for name, (drawn, _) in workflows.items()}
    files |= {FOLDER / "api" / f"{name}.json": prompt for name, (_, prompt) in workflows.items()}
    return {**files, SUBGRAPHS / f"{BLUEPRINT}.json": subgraph}


def main() -> None:
    for path, content in written().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name in WORKFLOWS:
        thumbnail(name).save(FOLDER / f"{name}.jpg", quality=85)


if __name__ == "__main__":
    main()
