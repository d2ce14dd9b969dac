"""Writes example_workflows/: canvas and API format of each workflow, and its thumbnail.

    cd tests && python -m support.make_workflows

The workflows are laid out in columns; widgets that are not named keep the node's default.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.comfy_host import hosted
from support.workflows import CORE, FOLDER, ROOT, Look, look_of, to_api

COLUMN, GAP = 420, 40
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
    note: str


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
MODELS_NOTE = f"""## Models
| ComfyUI/models/ | file |
|---|---|
| diffusion_models | {REAL["dit"]} ([Comfy-Org]({HUB}/Comfy-Org/Wan_2.1_ComfyUI_repackaged)) |
| diffusion_models | {{adapter}} ([Kijai]({HUB}/Kijai/WanVideo_comfy)) |
| loras | {REAL["lora"]} ([Kijai]({HUB}/Kijai/WanVideo_comfy)) |
| vae | {REAL["vae"]} |
| text_encoders | {REAL["text"]} |
| clip_vision | {REAL["clip"]} |
| wav2vec2 | {REAL["wav2vec"]} ([Kijai]({HUB}/Kijai/wav2vec2_safetensors)) |

Other versions of these models (GGUF, bf16, 720p) work as well: choose them in the loaders.
"""


def loaders(files: dict[str, str], *, adapter: str = "adapter") -> tuple[dict[str, Node], list[list[str]]]:
    """The loader nodes of every workflow, in two columns."""
    real = "lora" in files
    nodes = {
        "adapter": Node("InfiniteTalkAdapterLoader", {"model": files[adapter]}),
        "dit": Node(
            "InfiniteTalkModelLoader",
            {"model": files["dit"], "attention_mode": "auto"},
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
        nodes["swap"] = Node("InfiniteTalkBlockSwap", {"blocks_to_swap": 20, "prefetch_blocks": 1})
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
    note = (
        "# A talking picture\nAn image and a recording become a video, as long as the recording or num_frames.\n\n"
        + MODELS_NOTE.format(adapter=REAL["adapter"])
    )
    return Workflow([*left, ["image", "speech", "look"], ["embeds", "long"], *right], nodes, note)


def two_speakers() -> Workflow:
    nodes, left = loaders(REAL, adapter="multi_adapter")
    after, right = sampling("infinitetalk_two")
    half = {"value": 1.0, "width": 416, "height": 480}
    whole = {"value": 0.0, "width": 832, "height": 480}
    place = {"destination": ("black", 0), "source": ("white", 0)}
    nodes |= {
        "image": Node("LoadImage", {"image": "two_people.png"}),
        "speech": Node("LoadAudio", {"audio": "speech.wav"}, title="Left speaker"),
        "second": Node("LoadAudio", {"audio": "speech_2.wav"}, title="Right speaker"),
        "black": Node("SolidMask", whole, title="Nobody"),
        "white": Node("SolidMask", half, title="Half of the image"),
        "left_mask": Node("MaskComposite", {"x": 0, "y": 0, "operation": "add"}, place, "Where the left one is"),
        "right_mask": Node("MaskComposite", {"x": 416, "y": 0, "operation": "add"}, place, "Where the right one is"),
        "left_image": Node("MaskToImage", {}, {"mask": ("left_mask", 0)}),
        "right_image": Node("MaskToImage", {}, {"mask": ("right_mask", 0)}),
        "batch": Node("ImageBatch", {}, {"image1": ("left_image", 0), "image2": ("right_image", 0)}),
        "masks": Node("ImageToMask", {"channel": "red"}, {"image": ("batch", 0)}, "One mask per speaker"),
        "look": clip_encode(("image", 0)),
        "embeds": speech(1500, {"audio_2": ("second", 0), "ref_target_masks": ("masks", 0)}, multi_audio_type="add"),
        "long": long_video(("image", 0), width=832, height=480),
        **after,
    }
    masks = ["black", "white", "left_mask", "right_mask", "left_image", "right_image", "batch", "masks"]
    note = (
        "# Two speakers\nEach speaker has a recording and a mask. `multi_audio_type` add: one speaks after the other; "
        "para: both at once. Paint masks of your own in place of the halves: white where the speaker is.\n\n"
        + MODELS_NOTE.format(adapter=REAL["multi_adapter"])
    )
    return Workflow([*left, ["image", "speech", "second"], masks, ["look", "embeds", "long"], *right], nodes, note)


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
        "speech": Node("LoadAudio", {"audio": "speech.wav"}, title="New speech"),
        "look": clip_encode(("scaled", 0)),
        "embeds": speech(1500, {}),
        "long": long_video(("scaled", 0), width=832, height=480, colormatch="reinhard"),
        **after,
    }
    note = (
        "# Dubbing: video to video\nThe people of a source video (25 frames per second) speak the new recording. "
        "`start_step` of the sampler says how close it stays to the source: 0 is free, 1 or 2 of 4 steps keep "
        "movements and background.\n\n" + MODELS_NOTE.format(adapter=REAL["adapter"])
    )
    return Workflow([*left, ["source", "parts", "scaled", "speech"], ["look", "embeds", "long"], *right], nodes, note)


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
    note = (
        "# Try the pack in a minute, on any machine\nTiny models that make drawn faces speak: `infinitetalk "
        "make-tiny FOLDER` writes them; put them into ComfyUI/models/ (diffusion_models: wan2.1-i2v-tiny and "
        "infinitetalk-tiny; vae, text_encoders, clip_vision, wav2vec2: one each). portrait.png and speech.wav are in "
        "the pack's assets folder: copy them to ComfyUI/input.\n"
    )
    return Workflow([*left, ["image", "speech", "look"], ["embeds", "long"], *right], nodes, note)


WORKFLOWS = {
    "infinitetalk_talking_picture": talking_picture,
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
    note = {
        "id": len(ids) + 1,
        "type": "MarkdownNote",
        "pos": [-COLUMN - 4 * GAP, 0],
        "size": [COLUMN + 2 * GAP, 520],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [workflow.note],
    }
    return {
        "last_node_id": len(ids) + 1,
        "last_link_id": len(links),
        "nodes": [*nodes.values(), note],
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


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
        "properties": {"Node name for S&R": node.type},
        "widgets_values": values,
    }
    if node.title:
        made["title"] = node.title
    return made


def _defaults(schema: Any) -> dict[str, Any]:
    """What the widgets of a node of ours hold when it is made: their default, else the first choice."""
    values = {}
    for widget in schema.inputs:
        options = widget.as_dict()
        value = options.get("default")
        values[widget.id] = options["options"][0] if value is None and options.get("options") else value
    return values


def build() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Name -> (canvas format, API format) of every workflow."""
    with tempfile.TemporaryDirectory() as folder, hosted(Path(folder)) as host:
        schemas = {node_id: node.GET_SCHEMA() for node_id, node in host.nodes.items()}
        looks = CORE | {node_id: look_of(schema) for node_id, schema in schemas.items()}
        defaults = {node_id: _defaults(schema) for node_id, schema in schemas.items()}
        made = {name: canvas(make(), looks, defaults) for name, make in WORKFLOWS.items()}
        return {name: (drawn, to_api(drawn, looks)) for name, drawn in made.items()}


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


def main() -> None:
    (FOLDER / "api").mkdir(parents=True, exist_ok=True)
    for name, (drawn, prompt) in build().items():
        for path, content in ((FOLDER / f"{name}.json", drawn), (FOLDER / "api" / f"{name}.json", prompt)):
            path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        thumbnail(name).save(FOLDER / f"{name}.jpg", quality=85)


if __name__ == "__main__":
    main()
