"""The page of a service: a form for a job, its queue, the video that grows window by window, and those that are made.

It is made of Gradio's components and asks `Requests`, as the API does. The browser's language chooses between English
and Chinese.
"""

from __future__ import annotations

import html
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, reduce
from importlib import resources
from importlib.resources import as_file
from pathlib import Path
from typing import Any, NoReturn

import gradio as gr
import gradio.processing_utils
from fastapi import FastAPI
from PIL import Image, ImageChops, ImageDraw

from .. import assets
from ..fp8_optimization import QUANTIZATIONS
from ..media.images import load_image
from ..media.masks import MAX_SPEAKERS, box_mask, load_mask, read_box
from ..media.video import VideoFrames
from ..pipeline.bounds import BOUNDS, shown
from ..pipeline.plan import HUMO, MODES
from ..pipeline.presets import PRESETS
from ..wanvideo.errors import InfiniteTalkError, InputError, plain
from ..wanvideo.modules.attention import ATTENTION_MODES, canonical_mode
from .access import LOCAL, Access
from .folder import LISTS, new_id
from .queue import ENDED, Record
from .requests import Requests
from .settings import build, read_json, settings_in, settings_of
from .texts import CHINESE, ENGLISH

__all__ = ["add_page"]

TICK = 1.0
"""Seconds between two looks at the queue."""

JOBS, FINISHED = 50, 12
"""How many of the latest jobs are listed, and of those that are done, shown as images."""

MISSION = ("auto", "sage3_fp8", "sage3_fp4")
ATTENTION = (*MISSION, *(mode for mode in ATTENTION_MODES if mode not in map(canonical_mode, MISSION)))
"""Attention modes, two of them by the names that users know."""

NUMBERS = ("width", "height", "frames", "motion_frames", "max_frames", "steps", "cfg", "audio_cfg", "shift", "seed")
"""Settings of the form that are numbers; what is left empty is left to presets and defaults."""

SETTINGS_OF_FORM = (
    *("one_after_the_other", "prompt", "negative", "mode", "attention_mode", "preset", "quantization"),
    *NUMBERS,
)
EXACT = 2**53
"""Whole numbers that a browser's numbers hold."""

COLUMNS = ("number", "state", "how_far", "asked_for")
"""Of the table of jobs."""

FILE_NAMES = {"image": "image.png", "video": "video.mp4", "audio": "recording.wav"}
"""Kind of an upload -> the name under which a browser gets it back; what it is, its content says."""

PAINT = "#f97316"
SMALL = (768, 768)
"""Pixels that images have at most, on which a place is painted or clicked."""

TEXTS = gr.I18n(en=ENGLISH, zh=CHINESE, **{"zh-CN": CHINESE})

CSS = """
.gallery-container .grid-container { grid-template-columns: repeat(auto-fill, minmax(100px, 1fr)) !important }
.gallery-container .grid-wrap { min-height: 0 !important }
.wrap:not(:focus-within) > .options { display: none }
"""
"""Small images, also where there is one only; and lists of choices close when the focus leaves them."""

PLAYER = """<video controls autoplay playsinline style="width: 100%; max-height: 70vh" src="{address}"
 onloadedmetadata="this.currentTime = (window.seen || {{}})['{id}'] || 0"
 ontimeupdate="(window.seen = window.seen || {{}})['{id}'] = this.currentTime"></video>"""
"""It is put in place again when a window is finished, and goes on where it was."""

Given = Mapping[gr.components.Component, Any]
Shown = tuple[Any, ...]
NOTHING: Shown = (None, "", (), "", "")
"""What a browser shows: the table, which state of which video, finished jobs, whose settings, and which buttons."""


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
        css=CSS,
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
        self.humo = requests.base.get("mode") == HUMO
        self.tiny = Path(requests.base["files"].model).is_relative_to(requests.folder.path)
        self.speakers = range(1, 2 if self.humo else MAX_SPEAKERS + 1)
        self.fields: dict[str, gr.components.Component] = {}
        """Name -> component of the form."""
        self.previews: list[gr.Image] = []
        """For each speaker the image with the box drawn, which is clicked on."""

    # --- what is on it

    def blocks(self) -> gr.Blocks:
        with gr.Blocks(title="InfiniteTalk", delete_cache=(3600, 86400), analytics_enabled=False) as page:
            gr.Markdown("# InfiniteTalk")
            if self.tiny:
                gr.Markdown(TEXTS("tiny"))
            with gr.Tab(TEXTS("make_tab")), gr.Row():
                with gr.Column():
                    self._form()
                    with gr.Row():
                        demo = gr.Button(TEXTS("demo"))
                        make = gr.Button(TEXTS("make"), variant="primary")
                    with gr.Accordion(TEXTS("from_file"), open=False):
                        carrying = gr.File(label=TEXTS("carrying"), file_types=[".mp4"], height=120)
                with gr.Column():
                    selected, shown = gr.State(""), gr.State(NOTHING)
                    player, status = gr.HTML(), gr.HTML(elem_id="status")
                    with gr.Row():
                        again = gr.Button(TEXTS("again"), interactive=False)
                        cancel = gr.Button(TEXTS("cancel"), variant="stop", interactive=False)
                    table = gr.Dataframe(
                        headers=[ENGLISH[column] for column in COLUMNS],
                        column_widths=["12%", "20%", "34%", "34%"],
                        label=TEXTS("jobs"),
                        interactive=False,
                        buttons=[],
                    )
                    gallery = gr.Gallery(
                        label=TEXTS("finished"),
                        columns=4,
                        height="auto",
                        allow_preview=False,
                        interactive=False,
                        buttons=[],
                    )
                    with gr.Accordion(TEXTS("its_settings"), open=False):
                        settings = gr.JSON(show_label=False)
            with gr.Tab(TEXTS("doctor")):
                examine = gr.Button(TEXTS("examine"))
                report = gr.Dataframe(show_label=False, interactive=False, wrap=True, buttons=[])
            seen = [table, status, player, gallery, settings, again, cancel, shown]
            look: dict[str, Any] = {"fn": self.look, "inputs": [selected, shown], "outputs": seen}
            look |= {"show_progress": "hidden"}
            form = [*self.fields.values(), *self.previews]
            busy = make.click(
                lambda: gr.Button(TEXTS("checking"), interactive=False), None, make, show_progress="hidden"
            )
            made = busy.then(self.make, set(self.fields.values()), selected)
            made.success(**look, scroll_to_output=True)
            made.then(lambda: gr.Button(TEXTS("make"), interactive=True), None, make, show_progress="hidden")
            cancel.click(self.cancel, selected).then(**look)
            table.select(self.select, None, selected).then(**look)
            gallery.select(self.select_finished, shown, selected).then(**look)
            again.click(self.again, selected, form)
            carrying.upload(self.from_file, carrying, form)
            demo.click(self.demo, None, form)
            examine.click(self.examine, None, report)
            page.load(self.running, None, selected).then(**look)
            gr.Timer(TICK).tick(**look)
        return page

    def _form(self) -> None:
        """Components of a job's fields, by the names of `fields`."""
        fields = self.fields
        if self.humo:
            fields["references"] = gr.Gallery(
                label=TEXTS("shown_things"),
                type="filepath",
                sources=["upload"],
                columns=4,
                height=200,
                interactive=True,
            )
        else:
            with gr.Row():
                fields["image"] = gr.Image(
                    label=TEXTS("picture"),
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    height=240,
                )
                fields["video"] = gr.Video(label=TEXTS("source_video"), sources=["upload"], height=240)
        for number in self.speakers:
            with gr.Accordion(TEXTS(f"speaker {number}"), open=number == 1):
                fields[f"audio {number}"] = gr.Audio(label=TEXTS("recording"), type="filepath", buttons=[])
                if not self.humo:
                    with gr.Accordion(TEXTS("place"), open=False):
                        self._place(number)
        if not self.humo:
            self._show_image()
            fields["one_after_the_other"] = gr.Checkbox(label=TEXTS("in_turn"))
        fields["prompt"] = gr.Textbox(label=TEXTS("prompt"), lines=2)
        modes = [HUMO] if self.humo else [mode for mode in MODES if mode != HUMO]
        with gr.Row():
            for name, choices, label in (("mode", modes, "mode"), ("attention_mode", ATTENTION, "attention")):
                own = self.requests.base.get(name, next(iter(choices)))  # the service's, where it has one
                fields[name] = gr.Dropdown(
                    list(dict.fromkeys((*choices, own))), value=own, label=TEXTS(label), filterable=False
                )
            fields["preset"] = gr.Dropdown(["", *PRESETS], value="", label=TEXTS("preset"), filterable=False)
        with gr.Accordion(TEXTS("size"), open=False):
            fields["quantization"] = gr.Dropdown(
                ["", *QUANTIZATIONS], value="", label=TEXTS("quantization"), filterable=False
            )
            with gr.Row():
                for name in NUMBERS:
                    bound = BOUNDS[name]
                    most = EXACT if bound.most > EXACT else None
                    precision = 0 if bound.whole else None
                    fields[name] = gr.Number(
                        value=None, label=TEXTS(name), precision=precision, maximum=most, min_width=120
                    )
            fields["negative"] = gr.Textbox(label=TEXTS("negative"))
            fields["more"] = gr.Textbox(label=TEXTS("more"), placeholder='{"scheduler": "unipc"}')

    def _place(self, number: int) -> None:
        """Where a speaker is: a box, by two clicks or four numbers, or paint."""
        with gr.Tab(TEXTS("by_box")):
            preview = gr.Image(label=TEXTS("click_corners"), interactive=False, format="png", buttons=[])
            box = gr.Textbox(label=TEXTS("box"), placeholder="0, 0, 50, 100")
        with gr.Tab(TEXTS("by_paint")):
            paint = gr.ImageMask(
                type="pil",
                sources=[],
                transforms=(),
                format="png",
                brush=gr.Brush(default_size=40, colors=[PAINT], color_mode="fixed"),
                show_label=False,
            )
        self.previews.append(preview)
        self.fields[f"box {number}"], self.fields[f"mask {number}"] = box, paint
        corner = gr.State(None)
        given = [self.fields["image"], self.fields["video"], box]
        preview.select(self.click, [*given, corner], [box, preview, corner], show_progress="hidden")
        gr.on([box.submit, box.blur], self.draw, given, preview, show_progress="hidden")

    def _show_image(self) -> None:
        """Let a new image, or source video, be what is clicked and painted on."""
        image, video = self.fields["image"], self.fields["video"]
        boxes, masks = ([self.fields[f"{part} {number}"] for number in self.speakers] for part in ("box", "mask"))
        changes = [image.upload, image.clear, video.upload, video.clear]
        gr.on(changes, self.show_image, [image, video, *boxes], [*self.previews, *masks], show_progress="hidden")

    # --- places

    def show_image(self, image: str | None, video: str | None, *boxes: str | None) -> list[Any]:
        """What is clicked on, and what is painted on, of each speaker."""
        with self._rejections():
            first = _first_frame(image or None, video or None)
        editor = None if first is None else {"background": first, "layers": [], "composite": None}
        return [*(_drawn(first, box) for box in boxes), *([editor] * len(boxes))]

    def draw(self, image: str | None, video: str | None, box: str | None) -> Image.Image | None:
        """The image with the box that was typed."""
        with self._rejections():
            if box is not None and box.strip():
                read_box(box)
            return _drawn(_first_frame(image or None, video or None), box)

    def click(
        self,
        image: str | None,
        video: str | None,
        box: str | None,
        corner: tuple[int, int] | None,
        event: gr.SelectData,
    ) -> tuple[str | None, Image.Image | None, tuple[int, int] | None]:
        """The first click is one corner of a box, the second one the opposite corner."""
        with self._rejections():
            first = _first_frame(image or None, video or None)
            if first is None:
                return box, None, None
            x, y = (round(100 * at / side) for at, side in zip(event.index, first.size, strict=True))
            if corner is None:
                return "", _drawn(first, f"{max(0, x - 1)} {max(0, y - 1)} {min(100, x + 1)} {min(100, y + 1)}"), (x, y)
            left, right = sorted((corner[0], x))
            top, bottom = sorted((corner[1], y))
            box = f"{left}, {top}, {right}, {bottom}"
            read_box(box)
            return box, _drawn(first, box), None

    # --- from the form to a job

    def make(self, given: Given, request: gr.Request) -> str:
        """Queue the job of the form; returns its id."""
        values = {name: given[component] for name, component in self.fields.items()}
        client = _client(request)
        job: dict[str, Any] = {}
        with self._rejections():
            try:
                self._fill(job, values, client)
                return self.requests.accept(job, client).id
            except InfiniteTalkError:  # the next attempt sends its files again
                for id in (job.get("image"), job.get("video"), *(id for name in LISTS for id in job.get(name, ()))):
                    if id is not None:
                        self.requests.delete_upload(client, id)
                raise

    def _fill(self, job: dict[str, Any], values: Mapping[str, Any], client: str) -> None:
        """Make `job` the form as the API takes it, its files uploaded."""
        job |= {name: values[name] for name in SETTINGS_OF_FORM if values.get(name) not in (None, "")}
        if "prompt" in job:
            job["prompt"] = " | ".join(filter(None, map(str.strip, job["prompt"].splitlines())))
        if values.get("more"):
            more = settings_of(read_json(values["more"], "More settings"), ())
            if twice := sorted(more.keys() & job.keys()):
                raise InputError(f"{twice[0]} stands in the form and among the settings as JSON: give it once.")
            job |= more
        for kind in ("image", "video"):
            if values.get(kind):
                job[kind] = self.requests.take(client, kind, Path(values[kind]))
        speakers = [number for number in self.speakers if values[f"audio {number}"]]
        if self.humo:
            job["references"] = []
            for path, _ in values["references"] or ():
                job["references"].append(self.requests.take(client, "image", Path(path)))
        job["audio"] = []
        for number in speakers:
            job["audio"].append(self.requests.take(client, "audio", Path(values[f"audio {number}"])))
        if not self.humo:
            job["masks"] = []
            masks = [_mask_of(values, number) for number in speakers]
            present = [mask for mask in masks if mask is not None]
            if present and len(present) < len(masks):
                raise InputError(
                    f"The place of speaker {speakers[masks.index(None)]} is missing: give a box, or paint, for each "
                    "speaker, or for none."
                )
            for mask in present:
                job["masks"].append(self._take_mask(client, mask))

    def _take_mask(self, client: str, mask: Image.Image) -> str:
        with tempfile.NamedTemporaryFile(suffix=".png", dir=self.requests.folder.path / "page") as file:
            mask.save(file, "PNG")
            file.flush()
            return self.requests.take(client, "mask", Path(file.name))

    # --- and back

    def again(self, selected: str, request: gr.Request) -> list[Any]:
        """The form as it was for the selected job: its settings and its files."""
        job = self._selected(selected, request)
        if job is None:
            return [gr.skip()] * (len(self.fields) + len(self.previews))
        with self._rejections():
            values: dict[str, Any] = self._form_of(self._settings(job))
            for kind in ("image", "video"):
                values[kind] = self._copy(job, kind, job.request.get(kind))
            for number, id in enumerate(job.request.get("audio", ()), 1):
                values[f"audio {number}"] = self._copy(job, "audio", id)
            values["references"] = [self._copy(job, "image", id) for id in job.request.get("references", ())]
            first = _first_frame(values["image"], values["video"])
            masks = [self._upload(job, "mask", id) for id in job.request.get("masks", ())]
            for number, mask in zip(self.speakers, [*masks, *[None] * MAX_SPEAKERS], strict=False):
                values |= {f"box {number}": "", f"mask {number}": _painted_again(first, mask)}
        return self._all(values, first)

    def from_file(self, path: str) -> list[Any]:
        """The form with the settings that a video carries; files stay as they are."""
        with self._rejections():
            values = self._form_of(settings_in(Path(path)))
        return [*(values.get(name, gr.skip()) for name in self.fields), *(gr.skip() for _ in self.previews)]

    def demo(self) -> list[Any]:
        """The form of the demo's image and recording."""
        values: dict[str, Any] = {"prompt": "A woman speaks to the camera in the evening light."}
        shipped = resources.files(assets)
        for name, asset in (("image", "portrait.png"), ("audio", "speech.wav")):
            with as_file(shipped / asset) as file:
                values[name] = str(self._place_copy(file, asset))
        values["audio 1"] = values.pop("audio")
        values["references"] = [values["image"]]
        first = _first_frame(values["image"], None)
        for number in self.speakers:
            values |= {f"box {number}": "", f"mask {number}": _painted_again(first, None)}
        return self._all(dict.fromkeys(self.fields, gr.skip()) | {"video": None} | values, first)

    def _all(self, values: Mapping[str, Any], first: Image.Image | None) -> list[Any]:
        """Values of all fields and previews."""
        return [*(values.get(name) for name in self.fields), *(first for _ in self.previews)]

    def _form_of(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The form's fields for these settings; what has none stands in `more`, but where the service chooses the same.

        Raises InputError for a name that is none of its choices.
        """
        named = {name: settings[name] for name in ("preset", "mode") if settings.get(name)}
        own = json.loads(build(self.requests.base, named | {"out": FILE_NAMES["video"]}).comment)
        values = {name: settings.get(name) for name in SETTINGS_OF_FORM}
        values["prompt"] = "\n".join(part.strip() for part in (values["prompt"] or "").split("|"))
        for name, component in self.fields.items():
            if isinstance(component, gr.Dropdown):
                values[name] = _choice(
                    name, values[name] or component.value, [choice for _, choice in component.choices]
                )
        more = {name: value for name, value in settings.items() if name not in values and value != own.get(name)}
        for name in NUMBERS:
            value = values[name]
            if isinstance(value, list) or (isinstance(value, int) and value > EXACT):  # no field of a browser holds it
                more[name], values[name] = value, None
        return values | {"more": json.dumps(more, ensure_ascii=False) if more else ""}

    def _settings(self, job: Record) -> dict[str, Any]:
        """All settings of a job: those that its video carries, where it is made."""
        files = self.requests.folder.output(job.client, job.id)
        if files.video.is_file():
            return settings_in(files.video)
        settings: dict[str, Any] = json.loads(self.requests.folder.job(job, self.requests.base).comment)
        return settings

    def _upload(self, job: Record, kind: str, id: str) -> Path:
        """Raises InputError for one that was deleted."""
        path = self.requests.folder.upload(job.client, kind, id)
        if not path.is_file():
            raise InputError(f"The {kind} of this job was deleted: fill in the form anew.")
        return path

    def _copy(self, job: Record, kind: str, id: str | None) -> str | None:
        """An upload of a job as a browser may get it back."""
        return None if id is None else str(self._place_copy(self._upload(job, kind, id), FILE_NAMES[kind]))

    def _place_copy(self, file: Path, name: str) -> Path:
        folder = self.requests.folder.path / "page" / new_id()
        folder.mkdir(parents=True)
        return Path(shutil.copyfile(file, folder / name))

    # --- the queue

    def look(self, selected: str, shown: Shown, request: gr.Request) -> tuple[Any, ...]:
        """The jobs; of the selected one, how far it is, its video and settings. What has not changed stays as it is."""
        jobs, texts = self.requests.queue.jobs(_client(request), last=JOBS), _texts(request)
        rows = [[job.number, _state(job, texts), self._how_far(job, texts), _prompt(job)] for job in jobs]
        finished = tuple(job.id for job in jobs if job.state == "done")[:FINISHED]
        status, player, playing, whose, state = "", "", "", "", ""
        job = self._selected(selected, request)
        if job is not None:
            state, whose = job.state, f"{job.id} {job.state == 'done'}"
            status, address = self._status(job, texts), self.requests.view(job)["video"]
            if address is not None:
                playing = f"{job.id} {job.progress.windows_done} {job.state}"
                player = PLAYER.format(id=job.id, address=f"{address}&n={job.progress.windows_done}")
        now = (rows, playing, finished, whose, state)
        new = [one != other for one, other in zip(now, shown, strict=True)]
        return (
            {"headers": [texts[column] for column in COLUMNS], "data": rows} if new[0] else gr.skip(),
            status,
            player if new[1] else gr.skip(),
            [shot for job in jobs if job.id in finished for shot in self._thumbnail(job)] if new[2] else gr.skip(),
            self._settings_or_why(job) if new[3] else gr.skip(),
            gr.Button(interactive=job is not None) if new[4] else gr.skip(),
            gr.Button(interactive=job is not None and state not in ENDED) if new[4] else gr.skip(),
            now,
        )

    def running(self, request: gr.Request) -> str:
        """The job that the page shows when it is opened: the oldest one that is not ended, if any."""
        jobs = self.requests.queue.jobs(_client(request), last=JOBS)
        return next((job.id for job in reversed(jobs) if job.state not in ENDED), "")

    def select(self, event: gr.SelectData, request: gr.Request) -> str:
        jobs = self.requests.queue.jobs(_client(request), last=JOBS)
        return next((job.id for job in jobs if str(job.number) == str(event.row_value[0])), "")

    def select_finished(self, shown: Shown, event: gr.SelectData) -> str:
        return str(shown[2][event.index])

    def cancel(self, selected: str, request: gr.Request) -> None:
        if (job := self._selected(selected, request)) is not None:
            self.requests.queue.cancel(job.id)

    def _how_far(self, job: Record, texts: Mapping[str, str]) -> str:
        """Of a job that waits, its position; of one that runs, its windows and the time left; of others, the length."""
        now, parts = job.progress, []
        if job.state == "queued":
            parts.append(texts["ahead"].format(count=self.requests.queue.ahead(job)))
        if job.state == "running" and now.windows:
            window = min(now.windows_done + 1, now.windows)
            parts.append(texts["windows"].format(window=window, windows=now.windows))
        if (left := _seconds_left(job)) is not None:
            parts.append(texts["left"].format(time=_time(left)))
        if job.state == "done":
            parts.append(texts["frames_made"].format(frames=job.result["frames"]))
        return ", ".join(parts)

    def _status(self, job: Record, texts: Mapping[str, str]) -> str:
        """HTML: the selected job in a line, with what it does at this moment, or why it failed."""
        now, parts = job.progress, [f"<b>{job.number}: {_state(job, texts)}</b>"]
        if job.state == "running":
            parts.append(texts.get(now.stage, now.stage))
        parts.append(self._how_far(job, texts))
        if job.state == "running" and now.steps:
            parts.append(texts["steps_done"].format(step=now.step, steps=now.steps))
        if job.state == "done":
            parts += [f"{job.result['width']} x {job.result['height']}"]
            if "seconds" in job.result:
                parts.append(texts["took"].format(time=_time(job.result["seconds"])))
            address = self.requests.view(job)["video"]
            parts.append(f'<a href="{address}" download="{job.number}.mp4">{texts["download"]}</a>')
        if job.error is not None:
            parts.append(html.escape(self.requests.without_paths(job.error)))
        return " · ".join(filter(None, parts))

    def _thumbnail(self, job: Record) -> list[tuple[Image.Image, str]]:
        """The first frame of a finished video with its number; nothing where the video is gone."""
        try:
            return [(_thumbnail(self.requests.folder.output(job.client, job.id).video), f"{job.number} {_prompt(job)}")]
        except InputError:
            return []

    def _settings_or_why(self, job: Record | None) -> dict[str, Any] | None:
        """The settings of a job, to be read; why they cannot be known, where that is so."""
        try:
            return None if job is None else self._settings(job)
        except InfiniteTalkError as error:
            return {"error": self.requests.without_paths(str(error))}

    def _selected(self, id: str, request: gr.Request) -> Record | None:
        return self.requests.owned(id, _client(request))

    # --- this machine

    def examine(self, request: gr.Request) -> dict[str, list[Any]]:
        texts = _texts(request)
        rows = [
            [row["mode"], row["kernel"], "; ".join(row["reasons"]) or texts["runs"], _rounded(row["milliseconds"])]
            for row in self.doctor()["kernels"]
        ]
        return {"headers": [texts["attention_mode"], texts["kernel"], texts["verdict"], "ms"], "data": rows}

    @contextmanager
    def _rejections(self) -> Iterator[None]:
        """Let what is rejected be shown as its sentence, which a page takes for HTML."""
        try:
            yield
        except InfiniteTalkError as error:
            sentence = html.escape(self.requests.without_paths(str(error)), quote=False)
            raise gr.Error(sentence, duration=30, print_exception=False) from error


def _client(request: gr.Request) -> str:
    """Who has logged in; without tokens there is nothing to log in to."""
    return request.username or LOCAL


def _texts(request: gr.Request) -> Mapping[str, str]:
    """In the language that the browser asks for first."""
    return CHINESE if request.headers.get("accept-language", "").lower().startswith("zh") else ENGLISH


# ------------------------------------------------------------------------------------------------------------- places


@lru_cache(8)
def _first_frame(image: str | None, video: str | None) -> Image.Image | None:
    """The image that the form makes speak, or the first frame of its source video, small; None: of neither.

    Files that a browser has sent have a name of their own for each content.
    """
    if image is None and video is None:
        return None
    first = load_image(image) if image is not None else Image.fromarray(VideoFrames(str(video))[0])
    first.thumbnail(SMALL)
    return first


@lru_cache(4 * FINISHED)
def _thumbnail(video: Path) -> Image.Image:
    first = Image.fromarray(VideoFrames(video)[0])
    first.thumbnail((240, 240))
    return first


def _drawn(first: Image.Image | None, box: str | None) -> Image.Image | None:
    """The image with the box on it, where it is one."""
    try:
        left, top, right, bottom = read_box(box or "")
    except InputError:
        return first
    if first is None:
        return None
    drawn, (width, height) = first.copy(), first.size
    x, y = int(left / 100 * width), int(top / 100 * height)
    corners = [x, y, max(x, round(right / 100 * width) - 1), max(y, round(bottom / 100 * height) - 1)]
    ImageDraw.Draw(drawn).rectangle(corners, outline=PAINT, width=max(3, width // 100))
    return drawn


def _mask_of(values: Mapping[str, Any], number: int) -> Image.Image | None:
    """The mask of a speaker, white where a box is or was painted; None: nothing is said of the place."""
    box, editor = (values[f"box {number}"] or "").strip(), values[f"mask {number}"] or {}
    painted = [layer.getchannel("A") for layer in editor.get("layers") or [] if layer.getchannel("A").getextrema()[1]]
    if box and painted:
        raise InputError(f"Speaker {number} has a box and a painted place: keep one of them.")
    if box:
        first = _first_frame(values["image"] or None, values["video"] or None)
        size = SMALL if first is None else first.size
        return Image.fromarray((box_mask(read_box(box), *size) * 255).byte().numpy())
    return reduce(ImageChops.lighter, painted) if painted else None


def _painted_again(first: Image.Image | None, mask: Path | None) -> dict[str, Any] | None:
    """The value of an editor: the image, and what is painted on it."""
    if first is None:
        return None
    if mask is None:
        return {"background": first, "layers": [], "composite": None}
    alpha = Image.fromarray((load_mask(mask) > 0.5).byte().numpy() * 255).resize(first.size, Image.Resampling.NEAREST)
    layer = Image.new("RGBA", first.size, PAINT)
    layer.putalpha(alpha)
    composite = Image.alpha_composite(first.convert("RGBA"), layer)
    return {"background": first, "layers": [layer], "composite": composite}


# ------------------------------------------------------------------------------------------------------------- values


def _choice(name: str, value: Any, choices: list[str]) -> str:
    """The choice that `value` means, in any way of writing it. Raises InputError for none."""
    same = canonical_mode if name == "attention_mode" else plain
    found = [choice for choice in choices if same(choice) == same(value)]
    if not found:
        raise InputError(f"{name} {shown(value)} is no choice here: {', '.join(filter(None, choices))} are.")
    return found[0]


def _state(job: Record, texts: Mapping[str, str]) -> str:
    return texts["cancelling" if job.cancelling else job.state]


def _prompt(job: Record) -> str:
    return (job.request.get("prompt") or "")[:60]


def _time(seconds: float) -> str:
    """ "2:05" is two minutes and five seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02.0f}"


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _seconds_left(job: Record) -> float | None:
    """Seconds that a running job needs if it goes on as it did since its start; None before its first step."""
    now = job.progress
    if job.state != "running" or job.started is None or not now.windows or not now.steps:
        return None
    done = min(1.0, (now.windows_done + now.step / now.steps) / now.windows)
    return (time.time() - job.started) * (1 - done) / done if done else None
