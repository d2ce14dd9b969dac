"""The page: its form becomes a job, its table and player show it; what is wrong is shown as a sentence."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support.service_files import NO_WORKERS, SETTINGS, base_of, write_inputs
from wanvideo_infinitetalk.cli.tiny_models import TinySet
from wanvideo_infinitetalk.media.video import VideoWriter
from wanvideo_infinitetalk.service.access import Access
from wanvideo_infinitetalk.service.folder import ServiceFolder
from wanvideo_infinitetalk.service.queue import Progress
from wanvideo_infinitetalk.service.requests import Requests

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "apps/wanvideo_module/wanvideo_gradio_app.py"

pytestmark = pytest.mark.filterwarnings("ignore")  # of gradio's own
ALICE = "alice-has-this-token"
NOBODY = SimpleNamespace(username=None, headers={})


@pytest.fixture
def requests(tiny_set: TinySet, tmp_path: Path) -> Iterator[Requests]:
    requests = Requests(ServiceFolder.make(tmp_path / "service"), base_of(tiny_set))
    (requests.folder.path / "page").mkdir()
    yield requests
    requests.queue.close()


@pytest.fixture
def page(requests: Requests):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[web]'")
    from wanvideo_infinitetalk.service.page import Page

    page = Page(requests, lambda: {"kernels": []})
    page.blocks()
    return page


def filled(page, folder: Path, **changes) -> dict:
    """The form's components with values: an image, one recording, settings of a small job."""
    inputs = write_inputs(folder)
    values = dict.fromkeys(page.fields) | SETTINGS | {"image": str(inputs["image"]), "audio 1": str(inputs["audio"])}
    values |= {"mode": "infinitetalk", "attention_mode": "auto", "preset": "", "quantization": ""} | changes
    return {page.fields[name]: value for name, value in values.items()}


def test_the_form_becomes_a_job(page, requests: Requests, tmp_path: Path) -> None:
    painted = Image.new("RGBA", (40, 40))
    painted.paste((0, 0, 0, 255), (0, 0, 20, 40))
    nothing = Image.new("RGBA", (40, 40))
    form = filled(page, tmp_path, **{"mask 1": {"background": None, "layers": [nothing, painted], "composite": None}})
    form[page.fields["prompt"]] = " she listens\n\nshe speaks "
    form[page.fields["attention_mode"]] = "sage3_fp8"
    job = requests.queue.get(page.make(form, NOBODY))
    assert job.request["prompt"] == "she listens | she speaks"
    assert (job.request["attention_mode"], job.request["mode"]) == ("sage3_fp8", "infinitetalk")
    assert SETTINGS.items() <= job.request.items()
    assert len(job.request["masks"]) == 1
    mask = np.asarray(Image.open(requests.folder.upload("local", "mask", job.request["masks"][0])))
    assert (mask == 255 * (np.arange(40) < 20)).all(), "white where it was painted, whatever the paint"
    assert not {"preset", "quantization", "video"} & job.request.keys(), "what is empty is not asked for"
    assert list((requests.folder.path / "page").iterdir()) == []


def test_what_is_wrong_is_a_sentence(page, requests: Requests, tmp_path: Path) -> None:
    import gradio as gr

    for changes, sentence in (
        ({"audio 1": None}, '"audio" is missing'),
        ({"frames": 10}, "4n"),
        ({"image": str(tmp_path / "speech.wav")}, "image"),
        ({"audio 2": str(tmp_path / "speech.wav"), "box 1": "0 0 50 100"}, "The place of speaker 2 is missing"),
        ({"box 1": "0 0 50 100", "mask 1": {"layers": [Image.new("RGBA", (40, 40), "red")]}}, "keep one of them"),
        ({"box 1": "0 0 50 101"}, "The box 0 0 50 101 cannot be used"),
        ({"more": '{"steps": 3}'}, "steps stands in the form and among"),
        ({"more": '{"image": "x"}'}, "no field image"),
        ({"more": "steps 3"}, "More settings is not JSON"),
    ):
        with pytest.raises(gr.Error) as error:
            page.make(filled(page, tmp_path, **changes), NOBODY)
        assert sentence in str(error.value)
        assert str(requests.folder.path) not in str(error.value)
    assert requests.queue.jobs() == []
    assert not [path for path in requests.folder.uploads("local").rglob("*") if path.is_file()]


def test_the_services_own_modes_are_kept(page, requests: Requests) -> None:
    from wanvideo_infinitetalk.service.page import Page

    requests.base = requests.base | {"attention_mode": "sageattn", "mode": "multitalk"}
    own = Page(requests, dict)
    own.blocks()
    assert [own.fields[name].value for name in ("attention_mode", "mode")] == ["sageattn", "multitalk"]
    assert [page.fields[name].value for name in ("attention_mode", "mode")] == ["auto", "infinitetalk"]


def test_the_table_and_the_player_follow_the_selected_job(page, requests: Requests, tmp_path: Path) -> None:
    import gradio as gr
    from wanvideo_infinitetalk.service.page import NOTHING

    first, id = page.make(filled(page, tmp_path), NOBODY), page.make(filled(page, tmp_path), NOBODY)
    table, status, _, gallery, settings, again, cancel, shown = page.look(id, NOTHING, NOBODY)
    assert table == {
        "headers": ["No.", "State", "How far", "Prompt"],
        "data": [[2, "queued", "1 ahead", ""], [1, "queued", "0 ahead", ""]],
    }
    assert status == "<b>2: queued</b> · 1 ahead"
    assert (settings["seed"], settings["steps"]) == (42, 1), "those that it will be made with"
    assert (gallery, again.interactive, cancel.interactive) == (gr.skip(), True, True)
    assert page.running(NOBODY) == first, "a page that is opened shows it"
    requests.queue.cancel(first)
    requests.queue.claim(0)
    requests.queue.report(id, 0, Progress("Generating", 1, 4, 1, 2))
    requests.folder.output("local", id).partial.write_bytes(b"video")
    table, status, player, *_, shown = page.look(id, shown, NOBODY)
    assert f"/api/jobs/{id}/video?ticket=" in player
    assert table["data"][1] == [1, "cancelled", "", ""]
    assert table["data"][0][2].startswith("window 2 of 4, 0:0")
    assert status.startswith("<b>2: running</b> · Generating · window 2 of 4, 0:0")
    assert status.endswith(" left · step 1 of 2")
    again = page.look(id, shown, NOBODY)
    assert again[2:7] == (gr.skip(),) * 5, "where nothing is new it plays on"
    page.cancel(id, NOBODY)
    assert requests.queue.get(id).cancelling
    bob = SimpleNamespace(username="bob", headers={})
    assert page.look(id, shown, bob)[:3] == (table | {"data": []}, "", "")
    zh = SimpleNamespace(username=None, headers={"accept-language": "zh-CN,zh;q=0.9"})
    table, status, *_ = page.look(id, NOTHING, zh)
    assert table["headers"] == ["编号", "状态", "进度", "提示词"]
    assert status.startswith("<b>2: 正在取消</b> · 生成 · 窗口 2/4, 剩余 0:0")


def test_a_job_can_be_asked_for_again_as_it_was(page, requests: Requests, tmp_path: Path) -> None:
    """With another attempt's files equal to the last byte, and the settings that the form has no field for."""
    layer = Image.new("RGBA", (40, 40))
    layer.paste((0, 0, 0, 255), (20, 0, 40, 40))
    editor = {"background": None, "layers": [layer], "composite": None}
    given = {"audio 2": str(tmp_path / "speech.wav"), "box 1": "0, 0, 50, 100", "mask 2": editor}
    given |= {
        "prompt": "one\ntwo",
        "attention_mode": "sage3_fp4",
        "more": '{"seed": 18446744073709551615, "cfg": [2, 3]}',
    }
    given |= {"preset": "low-memory", "steps": 2}
    first = requests.queue.get(page.make(filled(page, tmp_path, **given), NOBODY))
    form = dict(zip([*page.fields, *page.previews], page.again(first.id, NOBODY), strict=True))
    assert (form["preset"], form["prompt"], form["attention_mode"]) == ("low-memory", "one\ntwo", "sage3_fp4")
    assert (form["seed"], form["cfg"], form["shift"]) == (None, None, 7.0)
    assert json.loads(form["more"]) == {"seed": 2**64 - 1, "cfg": [2, 3]}
    assert {preview.size for preview in (form[one] for one in page.previews)} == {(40, 40)}
    second = requests.queue.get(page.make({page.fields[name]: form[name] for name in page.fields}, NOBODY))
    jobs = [requests.folder.job(job, requests.base) for job in (first, second)]
    assert jobs[0].comment == jobs[1].comment
    for kind in ("image", "audio"):
        one, two = [first.request[kind], second.request[kind]]
        for a, b in zip(*([ids] if isinstance(ids, str) else ids for ids in (one, two)), strict=True):
            paths = [requests.folder.upload("local", kind, id) for id in (a, b)]
            assert paths[0].read_bytes() == paths[1].read_bytes()
    for job in (first, second):
        masks = [np.asarray(Image.open(requests.folder.upload("local", "mask", id))) for id in job.request["masks"]]
        assert [(mask > 0).nonzero()[1].min() for mask in masks] == [0, 20]
        assert [(mask > 0).mean() for mask in masks] == [0.5, 0.5]
    requests.folder.upload("local", "audio", first.request["audio"][1]).unlink()
    with pytest.raises(gr_error(), match="audio of this job was deleted"):
        page.again(first.id, NOBODY)


def gr_error() -> type[Exception]:
    import gradio as gr

    return gr.Error


@pytest.mark.parametrize(
    ("carried", "sentence"),
    [
        ({"steps": 3, "mode": "multitalk", "scheduler": "euler"}, ""),
        ({"mode": "humo"}, "mode humo is no choice here"),
        ({"quantization": "<img src=x onerror=alert(1)>"}, "&lt;img"),
        ({"preset": "none"}, "no preset"),
        ({"image": "/etc/passwd"}, "no field image"),
        (None, "carries no settings"),
    ],
)
def test_the_settings_of_a_video_fill_the_form(page, carried: dict | None, sentence: str, tmp_path: Path) -> None:
    import gradio as gr

    with VideoWriter(tmp_path / "its.mp4", comment=json.dumps(carried) if carried else "") as writer:
        writer.append(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
    if sentence:
        with pytest.raises(gr.Error) as error:
            page.from_file(str(tmp_path / "its.mp4"))
        assert sentence in error.value.message
        assert "<" not in error.value.message
        return
    form = dict(zip([*page.fields, *page.previews], page.from_file(str(tmp_path / "its.mp4")), strict=True))
    assert (form["steps"], form["mode"], form["more"]) == (3, "multitalk", '{"scheduler": "euler"}')
    assert all(form[name] == gr.skip() for name in ("image", "audio 1", "mask 1", "box 1", page.previews[0]))


def test_two_clicks_make_a_box(page, tmp_path: Path) -> None:
    image = str(write_inputs(tmp_path)["image"])
    first = page.show_image(image, None, None, "", "0 0 50 100", "0 0")
    assert [(np.asarray(one) == (249, 115, 22)).all(axis=2).any() for one in first[:4]] == [False, False, True, False]
    assert [editor["background"].size for editor in first[4:]] == [(40, 40)] * 4
    assert page.show_image(None, None, *[None] * 4) == [None] * 8
    assert page.draw(image, None, None).size == (40, 40)
    at = [SimpleNamespace(index=index) for index in ([30, 4], [10, 36])]
    box, preview, corner = page.click(image, None, "", None, at[0])
    assert (box, corner) == ("", (75, 10))
    box, preview, corner = page.click(image, None, box, corner, at[1])
    assert (box, corner) == ("25, 10, 75, 90", None)
    drawn = (np.asarray(preview) == (249, 115, 22)).all(axis=2)
    assert (drawn.any(axis=0).nonzero()[0][[0, -1]] == [10, 29]).all()
    with pytest.raises(gr_error(), match="The box 25, 10, 25, 10 cannot be used"):
        page.click(image, None, "", (25, 10), SimpleNamespace(index=[10, 4]))


def test_a_page_for_humo_asks_for_references(tiny_set: TinySet, requests: Requests, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[web]'")
    from wanvideo_infinitetalk.service.page import Page

    requests.base = requests.base | {"files": tiny_set.humo_files(), "mode": "humo", "width": 64, "height": 48}
    page = Page(requests, dict)
    page.blocks()
    assert not {"image", "video", "audio 2", "mask 1"} & page.fields.keys()
    values = dict.fromkeys(page.fields) | {"mode": "humo", "attention_mode": "auto", "steps": 1, "max_frames": 5}
    image = str(write_inputs(tmp_path)["image"])
    values["references"] = [(image, None), (image, None)]
    job = requests.queue.get(page.make({page.fields[name]: value for name, value in values.items()}, NOBODY))
    assert len(job.request["references"]) == 2
    form = dict(zip(page.fields, page.again(job.id, NOBODY), strict=True))
    assert [Path(path).read_bytes() for path in form["references"]] == [Path(image).read_bytes()] * 2
    assert (form["mode"], form["steps"]) == ("humo", 1)


def test_the_page_is_served_and_asks_for_a_login_where_there_are_tokens(requests: Requests) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[web]'")
    from fastapi.testclient import TestClient
    from wanvideo_infinitetalk.service.api import create_app
    from wanvideo_infinitetalk.service.page import add_page

    for access in (Access(), Access({ALICE: "alice"})):
        app = create_app(requests, NO_WORKERS, access)
        add_page(app, requests, access)
        with TestClient(app, base_url="http://127.0.0.1:8000") as http:
            assert http.get("/").status_code == 200
            assert http.get("/health").json()["alive"] == 1, "the API is beside it"
            closed = http.get("/config").status_code == 401
            assert closed == bool(access.tokens)
            if closed:
                wrong = http.post("/login", data={"username": "bob", "password": ALICE})
                assert wrong.status_code == 400
                assert http.post("/login", data={"username": "alice", "password": ALICE}).status_code == 200
                assert http.get("/config").status_code == 200


@pytest.mark.parametrize(
    "path", ["http://192.0.2.1/x.png", "https://[2001:db8::1]/x.png", "/etc/passwd", "{service}/jobs.sqlite", "../x"]
)
def test_addresses_and_paths_sent_to_the_page_are_not_opened(path: str, requests: Requests, monkeypatch) -> None:
    """As a client that is no browser can send them; the addresses are reserved for documentation."""
    gradio = pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[web]'")
    from fastapi.testclient import TestClient
    from wanvideo_infinitetalk.service.api import create_app
    from wanvideo_infinitetalk.service.page import add_page

    app = create_app(requests, NO_WORKERS)
    add_page(app, requests, Access())
    monkeypatch.setattr(gradio.processing_utils.sh, "get", None)
    path = path.format(service=requests.folder.path)
    with TestClient(app, base_url="http://127.0.0.1:8000") as http:
        config = http.get("/config").json()
        make = next(one for one in config["dependencies"] if one["api_name"] == "make")
        types = {one["id"]: one["type"] for one in config["components"]}
        image = {"path": path, "url": path, "meta": {"_type": "gradio.FileData"}}
        data = [image if types[id] == "image" else None for id in make["inputs"]]
        begun = http.post("/gradio_api/call/make", json={"data": data})
        assert begun.status_code == 200, begun.text
        answer = http.get(f"/gradio_api/call/make/{begun.json()['event_id']}").text
    assert "event: error" in answer
    if path.startswith("http"):
        assert "addresses are not opened" in answer
    assert requests.queue.jobs() == []
    assert not [file for file in (requests.folder.path / "page").rglob("*") if file.is_file()]


def test_every_text_is_in_both_languages() -> None:
    pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[web]'")
    from wanvideo_infinitetalk.service.texts import CHINESE, ENGLISH

    stages = CHINESE.keys() - ENGLISH.keys()
    assert not ENGLISH.keys() - CHINESE.keys()
    source = (ROOT / "pipeline/make_video.py").read_text(encoding="utf-8")
    said = set(re.findall(r'"((?:Checking|Encoding|Loading|Generating)(?:[ ,][^"\n]*)?)"', source))
    assert stages == said - {"Encoding"}, "of the VAE's parts, which the page does not show"


def test_the_script_of_a_bare_clone_says_what_to_install(tmp_path: Path) -> None:
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "-S", str(SCRIPT)], capture_output=True, text=True, cwd=tmp_path, check=False, env=bare
    )
    assert ran.returncode == 2
    assert ran.stderr == (
        f'The package is not installed in this Python. Run "{sys.executable}" -m pip install "{ROOT}{os.sep}.[web]"\n'
    )
