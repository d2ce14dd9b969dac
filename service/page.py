"""The page of a service: a form for a job, its queue, and the video that grows window by window.

It is made of Gradio's components and asks `Requests`, as the API does. The browser's language chooses between English
and Chinese.
"""

from __future__ import annotations

import html
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from importlib.resources import as_file
from pathlib import Path
from typing import Any, NoReturn

import gradio as gr
import gradio.processing_utils
import numpy as np
from fastapi import FastAPI
from PIL import Image

from .. import assets
from ..fp8_optimization import QUANTIZATIONS
from ..media.audio import read_audio
from ..media.images import load_image
from ..pipeline.bounds import BOUNDS
from ..pipeline.plan import HUMO, MODES
from ..pipeline.presets import PRESETS
from ..wanvideo.errors import InfiniteTalkError, InputError
from .access import LOCAL, Access
from .queue import Record
from .requests import Requests

__all__ = ["add_page"]

SPEAKERS = 4
TICK = 1.0
"""Seconds between two looks at the queue."""

ATTENTION = ("auto", "sage3_fp8", "sage3_fp4", "sdpa")
NUMBERS = ("width", "height", "frames", "motion_frames", "max_frames", "steps", "cfg", "audio_cfg", "shift", "seed")
"""Settings of the form that are numbers; what is left empty is left to presets and defaults."""

OF_IMAGES = tuple(mode for mode in MODES if mode != HUMO)
"""Modes that take what the form asks for."""

SETTINGS_OF_FORM = ("one_after_the_other", "prompt", "mode", "attention_mode", "preset", "quantization", *NUMBERS)

Shown = tuple[list[list[Any]], str]
"""The rows of the table of jobs, and which state of which video plays."""
NOTHING: Shown = ([], "")

COLUMNS = ("state", "ahead", "windows", "prompt", "id")
"""Of the table of jobs."""

# No key is one of Gradio's own, such as "image", whose texts would hide it.
ENGLISH = {
    "picture": "Image of the person who will speak",
    "source_video": "or a source video, whose movements are kept",
    "recording": "Recording of speech",
    "mask": "Where this speaker is (paint; not needed for one, or side by side)",
    "in_turn": "One after the other, instead of together",
    "prompt": "What to show; one line for each window, the last one for all that follow",
    "preset": "Preset",
    "mode": "Mode",
    "attention": "Quantization of attention",
    "quantization": "Quantization of weights",
    "size": "Size and sampling (empty: from the image, the preset or the model)",
    "make": "Make the video",
    "demo": "Fill in the demo",
    "jobs": "Jobs",
    "cancel": "Cancel",
    "again": "Use these again",
    "doctor": "Doctor",
    "examine": "Try every attention mode here",
    "width": "Width",
    "height": "Height",
    "frames": "Frames of a window",
    "motion_frames": "Frames carried over",
    "max_frames": "Frames at most",
    "steps": "Steps",
    "cfg": "Guidance by the prompt",
    "audio_cfg": "Guidance by the speech",
    "shift": "Shift",
    "seed": "Seed",
}
CHINESE = {
    "picture": "要说话的人的图像",
    "source_video": "或源视频，保留其动作",
    "recording": "语音录音",
    "mask": "该说话人的位置（涂抹；单人或并排时不需要）",
    "in_turn": "依次说话，而不是同时",
    "prompt": "要显示的内容；每行对应一个窗口，最后一行用于其后所有窗口",
    "preset": "预设",
    "mode": "模式",
    "attention": "注意力的量化",
    "quantization": "权重的量化",
    "size": "尺寸与采样（留空：取自图像、预设或模型）",
    "make": "生成视频",
    "demo": "填入演示",
    "jobs": "任务",
    "cancel": "取消",
    "again": "再次使用这些设置",
    "doctor": "诊断",
    "examine": "在这里试用每种注意力模式",
    "width": "宽度",
    "height": "高度",
    "frames": "每个窗口的帧数",
    "motion_frames": "延续的帧数",
    "max_frames": "最多帧数",
    "steps": "步数",
    "cfg": "提示词引导",
    "audio_cfg": "语音引导",
    "shift": "偏移",
    "seed": "种子",
}
for texts, speaker in ((ENGLISH, "Speaker"), (CHINESE, "说话人")):
    texts |= {f"speaker {number}": f"{speaker} {number}" for number in range(1, SPEAKERS + 1)}
TEXTS = gr.I18n(en=ENGLISH, zh=CHINESE, **{"zh-CN": CHINESE})

PLAYER = """<video controls autoplay playsinline style="width: 100%; max-height: 70vh" src="{address}"
 onloadedmetadata="this.currentTime = (window.seen || {{}})['{id}'] || 0"
 ontimeupdate="(window.seen = window.seen || {{}})['{id}'] = this.currentTime"></video>"""
"""It is put in place again when a window is finished, and goes on where it was."""


def add_page(app: FastAPI, requests: Requests, access: Access) -> None:
    """Mount the page of a service at its root.

    Files that browsers send to it are kept in the service's folder until they are a day old. Where there are tokens, a
    client logs in by name and token.
    """
    gradio.processing_utils.async_ssrf_protected_get = _no_address
    temporary = requests.folder.path / "page"
    temporary.mkdir(exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(temporary)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

    def login(name: str, token: str) -> bool:
        return access.client(token) == name

    gr.mount_gradio_app(
        app,
        Page(requests, app.state.doctor).blocks(),
        path="/",
        auth=login if access.tokens else None,
        max_file_size=requests.limits.upload,
        show_error=True,
        ssr_mode=False,
        footer_links=[],
        i18n=TEXTS,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # none from the network
    )


async def _no_address(url: str) -> NoReturn:
    """In the place of Gradio's download: it takes the address of a file for the file, from whoever sends one."""
    raise gr.Error("Only files are taken: addresses are not opened.", print_exception=False)


class Page:
    """The page's components, and what they do.

    Args:
        doctor: gives the doctor's report.
    """

    def __init__(self, requests: Requests, doctor: Callable[[], dict[str, Any]]) -> None:
        self.requests, self.doctor = requests, doctor
        self.fields: dict[str, gr.components.Component] = {}
        """Name -> component of the form."""

    # --- what is on it

    def blocks(self) -> gr.Blocks:
        with gr.Blocks(title="InfiniteTalk", delete_cache=(3600, 86400), analytics_enabled=False) as page:
            gr.Markdown("# InfiniteTalk")
            with gr.Row():
                with gr.Column():
                    self._form()
                    with gr.Row():
                        demo = gr.Button(TEXTS("demo"))
                        make = gr.Button(TEXTS("make"), variant="primary")
                with gr.Column():
                    selected, shown = gr.State(""), gr.State(NOTHING)
                    player, status = gr.HTML(), gr.Markdown()
                    with gr.Row():
                        again, cancel = gr.Button(TEXTS("again")), gr.Button(TEXTS("cancel"), variant="stop")
                    table = gr.Dataframe(
                        headers=list(COLUMNS),
                        column_widths=["14%", "10%", "12%", "44%", "20%"],
                        label=TEXTS("jobs"),
                        interactive=False,
                    )
                    with gr.Accordion(TEXTS("doctor"), open=False):
                        examine = gr.Button(TEXTS("examine"))
                        report = gr.Dataframe(headers=["mode", "kernel", "verdict", "ms"], interactive=False, wrap=True)
            look: dict[str, Any] = {"inputs": [selected, shown], "outputs": [table, status, player, shown]}
            look |= {"fn": self.look, "show_progress": "hidden"}
            make.click(self.make, set(self.fields.values()), selected).then(**look)
            cancel.click(self.cancel, selected).then(**look)
            table.select(self.select, None, selected).then(**look)
            again.click(self.again, selected, list(self.fields.values()))
            demo.click(self.demo, None, list(self.fields.values()))
            examine.click(self.examine, None, report)
            gr.Timer(TICK).tick(**look)
        return page

    def _form(self) -> None:
        """Components of a job's fields, by the names of `fields`."""
        fields = self.fields
        with gr.Row():
            fields["image"] = gr.Image(label=TEXTS("picture"), type="filepath", sources=["upload", "clipboard"])
            fields["video"] = gr.Video(label=TEXTS("source_video"), sources=["upload"])
        for number in range(1, SPEAKERS + 1):
            with gr.Accordion(TEXTS(f"speaker {number}"), open=number == 1):
                fields[f"audio {number}"] = gr.Audio(label=TEXTS("recording"), type="filepath")
                with gr.Accordion(TEXTS("mask"), open=False):
                    fields[f"mask {number}"] = gr.ImageMask(type="pil", sources=["upload"], show_label=False)
        fields["one_after_the_other"] = gr.Checkbox(label=TEXTS("in_turn"))
        fields["prompt"] = gr.Textbox(label=TEXTS("prompt"), lines=2)
        with gr.Row():
            for name, choices, label in (("mode", OF_IMAGES, "mode"), ("attention_mode", ATTENTION, "attention")):
                own = self.requests.base.get(name, next(iter(choices)))  # the service's, where it has one
                fields[name] = gr.Dropdown(list(dict.fromkeys((*choices, own))), value=own, label=TEXTS(label))
            fields["preset"] = gr.Dropdown(["", *PRESETS], label=TEXTS("preset"))
        with gr.Accordion(TEXTS("size"), open=False):
            fields["quantization"] = gr.Dropdown(["", *QUANTIZATIONS], label=TEXTS("quantization"))
            with gr.Row():
                for name in NUMBERS:
                    precision = 0 if BOUNDS[name].whole else None
                    fields[name] = gr.Number(value=None, label=TEXTS(name), precision=precision, min_width=120)

    # --- what it does

    def make(self, given: dict[gr.components.Component, Any], request: gr.Request) -> str:
        """Queue the job of the form; returns its id."""
        values = {name: given[component] for name, component in self.fields.items()}
        client = _client(request)
        job: dict[str, Any] = {}
        with self._rejections():
            try:
                self._fill(job, values, client)
                return self.requests.accept(job, client).id
            except InfiniteTalkError:  # the next attempt sends its files again
                for id in (job.get("image"), job.get("video"), *job.get("audio", ()), *job.get("masks", ())):
                    if id is not None:
                        self.requests.delete_upload(client, id)
                raise

    def _fill(self, job: dict[str, Any], values: dict[str, Any], client: str) -> None:
        """Make `job` the form as the API takes it, its files uploaded."""
        job |= {name: values[name] for name in SETTINGS_OF_FORM if values[name] not in (None, "")}
        if "prompt" in job:
            job["prompt"] = " | ".join(filter(None, map(str.strip, job["prompt"].splitlines())))
        for kind in ("image", "video"):
            if values[kind]:
                job[kind] = self.requests.take(client, kind, Path(values[kind]))
        recordings = [values[f"audio {number}"] for number in range(1, SPEAKERS + 1)]
        job["audio"], job["masks"] = [], []
        for path in filter(None, recordings):
            job["audio"].append(self.requests.take(client, "audio", Path(path)))
        masks = [_painted(values[f"mask {number}"]) for number, path in enumerate(recordings, 1) if path]
        painted = [mask for mask in masks if mask is not None]
        if painted and len(painted) < len(masks):
            raise InputError("A mask is missing: paint one for each speaker, or none.")
        for mask in painted:
            job["masks"].append(self._mask(client, mask))

    def _mask(self, client: str, mask: Image.Image) -> str:
        with tempfile.NamedTemporaryFile(suffix=".png", dir=self.requests.folder.path / "page") as file:
            mask.save(file, "PNG")
            file.flush()
            return self.requests.take(client, "mask", Path(file.name))

    def look(self, selected: str, shown: Shown, request: gr.Request) -> tuple[Any, ...]:
        """The table of jobs; of the selected one, how far it is and its video. What has not changed stays as it is."""
        jobs = [self.requests.view(job) for job in self.requests.queue.jobs(_client(request), last=50)]
        rows = [[_cell(job, column) for column in COLUMNS] for job in jobs]
        job, status, player, version = self._selected(selected, request), "", "", ""
        if job is not None:
            view = self.requests.view(job)
            status = _status(view, _seconds_left(job))
            if view["video"]:
                version = f"{job.id} {job.progress.windows_done} {job.state}"
                player = PLAYER.format(id=job.id, address=f"{view['video']}&n={job.progress.windows_done}")
        before, playing = shown
        return (
            gr.skip() if rows == before else rows,
            status,
            gr.skip() if version == playing else player,
            (rows, version),
        )

    def select(self, event: gr.SelectData) -> str:
        return str(event.row_value[COLUMNS.index("id")])

    def cancel(self, selected: str, request: gr.Request) -> None:
        if (job := self._selected(selected, request)) is not None:
            self.requests.queue.cancel(job.id)

    def again(self, selected: str, request: gr.Request) -> list[Any]:
        """The form as it was for the selected job."""
        job = self._selected(selected, request)
        if job is None:
            return [gr.skip()] * len(self.fields)
        wanted, folder = job.request, self.requests.folder
        values = {name: wanted.get(name) for name in SETTINGS_OF_FORM}
        values["prompt"] = "\n".join(part.strip() for part in (wanted.get("prompt") or "").split("|"))
        with self._rejections():
            if "image" in wanted:
                values["image"] = np.asarray(load_image(folder.upload(job.client, "image", wanted["image"])))
            for number, id in enumerate(wanted["audio"], 1):
                samples, rate = read_audio(folder.upload(job.client, "audio", id))
                values[f"audio {number}"] = (rate, (samples.clip(-1, 1) * 32767).astype(np.int16))
        return [values.get(name) for name in self.fields]

    def demo(self) -> list[Any]:
        """The form of the demo's image and recording."""
        shipped = resources.files(assets)
        with as_file(shipped / "portrait.png") as image, as_file(shipped / "speech.wav") as recording:
            samples, rate = read_audio(recording)
            values = {
                "image": np.asarray(load_image(image)),
                "audio 1": (rate, (samples.clip(-1, 1) * 32767).astype(np.int16)),
                "prompt": "A woman speaks to the camera in the evening light.",
            }
        return [values.get(name, gr.skip()) for name in self.fields]

    def examine(self) -> list[list[str]]:
        kernels = self.doctor()["kernels"]
        return [
            [row["mode"], row["kernel"], "; ".join(row["reasons"]) or "runs", _rounded(row["milliseconds"])]
            for row in kernels
        ]

    def _selected(self, id: str, request: gr.Request) -> Record | None:
        return self.requests.owned(id, _client(request))

    @contextmanager
    def _rejections(self) -> Iterator[None]:
        """Let what is rejected be shown as its sentence."""
        try:
            yield
        except InfiniteTalkError as error:
            raise gr.Error(self.requests.without_paths(str(error)), print_exception=False) from error


def _client(request: gr.Request) -> str:
    """Who has logged in; without tokens there is nothing to log in to."""
    return request.username or LOCAL


def _painted(mask: dict[str, Any] | None) -> Image.Image | None:
    """What was painted: a layer that is transparent elsewhere, or an image that was put in its place; None: nothing."""
    if not mask:
        return None
    layers = [layer for layer in mask.get("layers") or [] if layer.getchannel("A").getextrema()[1]]
    return layers[0] if layers else mask.get("background")


def _cell(job: dict[str, Any], column: str) -> Any:
    now = job["progress"]
    if column == "windows":
        return f"{now['windows_done']}/{now['windows']}"
    return (job["request"].get("prompt") or "")[:60] if column == "prompt" else job[column]


def _status(job: dict[str, Any], left: float | None) -> str:
    now = job["progress"]
    parts = [f"**{job['state']}**"]
    if job["state"] == "queued":
        parts.append(f"{job['ahead']} ahead")
    if job["state"] == "running":
        parts.append(
            f"{now['stage']}: {now['windows_done']}/{now['windows']} windows, step {now['step']}/{now['steps']}"
        )
        if left is not None:
            parts.append(f"{left:.0f} s left")
    if job["error"]:
        parts.append(html.escape(job["error"]))
    return " · ".join(parts)


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _seconds_left(job: Record) -> float | None:
    """Seconds that a running job needs if it goes on as it did since its start; None before its first step."""
    now = job.progress
    if job.state != "running" or job.started is None or not now.windows or not now.steps:
        return None
    done = min(1.0, (now.windows_done + now.step / now.steps) / now.windows)
    return (time.time() - job.started) * (1 - done) / done if done else None
