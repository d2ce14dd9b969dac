"""The page: its form becomes a job, its table and player show it; what is wrong is shown as a sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support.service_files import NO_WORKERS, SETTINGS, base_of, write_inputs
from wanvideo_infinitetalk.cli.tiny_models import TinySet
from wanvideo_infinitetalk.service.access import Access
from wanvideo_infinitetalk.service.folder import ServiceFolder
from wanvideo_infinitetalk.service.requests import Requests

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "apps/wanvideo_module/wanvideo_gradio_app.py"

pytestmark = pytest.mark.filterwarnings("ignore")  # of gradio's own
ALICE = "alice-has-this-token"
NOBODY = SimpleNamespace(username=None)


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
    painted.paste((255, 255, 255, 255), (0, 0, 20, 40))
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
    assert (mask[..., 3] > 0).mean() == 0.5
    assert not {"preset", "quantization", "video"} & job.request.keys(), "what is empty is not asked for"
    assert list((requests.folder.path / "page").iterdir()) == []


def test_what_is_wrong_is_a_sentence(page, requests: Requests, tmp_path: Path) -> None:
    import gradio as gr

    for changes, sentence in (
        ({"audio 1": None}, '"audio" is missing'),
        ({"frames": 10}, "4n"),
        ({"image": str(tmp_path / "speech.wav")}, "image"),
        ({"audio 2": str(tmp_path / "speech.wav"), "mask 1": {"background": Image.new("L", (40, 40), 255)}}, "missing"),
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

    id = page.make(filled(page, tmp_path), NOBODY)
    rows, status, _, shown = page.look(id, NOTHING, NOBODY)
    assert ([row[-1] for row in rows], status, shown) == ([id], "**queued** · 0 ahead", (rows, ""))
    requests.queue.claim(0)
    requests.folder.output("local", id).partial.write_bytes(b"video")
    _, status, player, shown = page.look(id, shown, NOBODY)
    assert f"/api/jobs/{id}/video?ticket=" in player
    again = page.look(id, shown, NOBODY)
    assert (again[0], again[2]) == (gr.skip(), gr.skip()), "where nothing is new it plays on"
    page.cancel(id, NOBODY)
    assert requests.queue.get(id).cancelling
    bob = SimpleNamespace(username="bob")
    assert page.look(id, shown, bob) == ([], "", "", NOTHING)
    again = dict(zip(page.fields, page.again(id, NOBODY), strict=True))
    assert (again["steps"], again["image"].shape, again["audio 1"][0]) == (1, (40, 40, 3), 16000)


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
    from wanvideo_infinitetalk.service.page import CHINESE, ENGLISH

    assert CHINESE.keys() == ENGLISH.keys()


def test_the_script_of_a_bare_clone_says_what_to_install(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-S", str(SCRIPT)], capture_output=True, text=True, cwd=tmp_path, check=False, env=os.environ
    )
    assert ran.returncode == 2
    assert ran.stderr == (
        f'The package is not installed in this Python. Run "{sys.executable}" -m pip install "{ROOT}{os.sep}.[web]"\n'
    )
