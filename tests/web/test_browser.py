"""The page in a browser: videos that grow, are made again, and are cancelled; places of speakers, keyboard, phone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from wanvideo_infinitetalk.media.video import VideoWriter

pytestmark = pytest.mark.slow

pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[web]'")
playwright_api = pytest.importorskip("playwright.sync_api", reason="needs playwright from pip")

ROOT = Path(__file__).parents[2]
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
SCREENSHOTS = Path(os.environ.get("SCREENSHOTS", ROOT / "out"))
OPTIONS = ["--port", "0", "--device", "cpu", "--frames", "33", "--max-frames", "90", "--steps", "4"]

PLAYER = "video[src*=ticket]"
NAME_OF_FOCUS = """() => {
    const one = document.activeElement, label = one.labels && one.labels[0]
    return one === document.body ? "end" : (one.ariaLabel || (label || one).innerText || one.title || "").trim()
}"""
LENGTH = f"() => {{ const player = document.querySelector('{PLAYER}'); return player && player.duration }}"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a service that the script has started, with the demo's tiny models."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium (set CHROMIUM to its program)")
    script = ROOT / "apps/wanvideo_module/wanvideo_gradio_app.py"
    argv = [sys.executable, str(script), str(tmp_path_factory.mktemp("service")), *OPTIONS]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    yield process.stdout.readline().removeprefix("service: ").strip()
    process.terminate()
    assert process.wait(30) == 143
    process.stdout.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright_api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page, opened; it asks no other host, and its scripts raise no error."""
    others, errors = [], []
    page = browser.new_page(viewport={"width": 1280, "height": 1000}, locale="en-US")
    page.on("request", lambda sent: others.append(sent.url) if sent.url.startswith("http") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.get_by_role("button", name="Make the video").wait_for(timeout=30_000)
    yield page
    page.close()
    assert [url for url in others if not url.startswith(f"{address}/")] == []
    assert errors == []


def jobs(address: str) -> list[dict[str, Any]]:
    return httpx.get(f"{address}/api/jobs").json()


def follow(page: Any, address: str, reached: Callable[[], bool], patience: float = 120) -> None:
    """Wait until `reached()`, as long as the jobs go on; where nothing has moved for `patience` seconds, it fails."""
    seen, when = None, time.monotonic()
    while not reached():
        now = [(job["state"], job["progress"]) for job in jobs(address)]
        if now != seen:
            seen, when = now, time.monotonic()
        assert time.monotonic() - when < patience, (
            f"nothing has moved: {now[:1]}, {page.locator('#status').inner_text()}"
        )
        page.wait_for_timeout(100)


def send(page: Any, place: Any, path: Path) -> None:
    """Choose a file as a user does, and wait until the page has sent it."""
    with page.expect_response(lambda answer: "/upload" in answer.url):
        place.set_input_files(path)


def settled(page: Any, shown: Any) -> dict[str, float]:
    """The box of what is shown, once it neither moves nor grows."""
    before = None
    for _ in range(100):
        page.wait_for_timeout(300)
        box = shown.bounding_box()
        if box is not None and box == before and box["height"] > 0:
            return box
        before = box
    raise AssertionError(f"it still moves: {before}")


def fill(page: Any) -> None:
    """Send the demo's image and recording as files."""
    for kind, name in (("image", "portrait.png"), ("audio", "speech.wav")):
        send(page, page.locator(f"input[type=file][accept^={kind}]").first, ROOT / "assets" / name)
    page.get_by_role("button", name="Play").first.wait_for()


def test_image_and_recording_become_a_video_that_is_watched_while_it_grows(page: Any, address: str) -> None:
    fill(page)
    page.get_by_label("What to show", exact=False).fill("a woman listens\na woman speaks")
    page.get_by_role("button", name="Make the video").click()
    follow(page, address, lambda: bool(page.evaluate(LENGTH)))
    first = page.evaluate(LENGTH)
    assert jobs(address)[0]["state"] == "running", "it plays before the job has ended"
    page.wait_for_function("() => /window 2 of 4, .* left/.test(document.querySelector('#status').innerText)")
    follow(page, address, lambda: (page.evaluate(LENGTH) or 0) > first)
    follow(page, address, lambda: abs((page.evaluate(LENGTH) or 0) - 90 / 25) < 0.1)
    follow(page, address, lambda: "1: done" in page.locator("#status").inner_text())
    (job,) = jobs(address)
    assert (job["state"], job["result"]["frames"]) == ("done", 90)
    assert job["request"]["prompt"] == "a woman listens | a woman speaks"


def test_a_finished_video_is_chosen_and_made_again_with_models_that_are_loaded(page: Any, address: str) -> None:
    page.get_by_role("button", name="Thumbnail 1").click()
    page.locator(PLAYER).wait_for(state="attached")
    page.get_by_role("button", name="Settings of this video").click()
    page.get_by_text('"multitalk"').wait_for()
    SCREENSHOTS.mkdir(exist_ok=True)
    page.get_by_role("button", name="Use these again").click()
    page.get_by_role("button", name="Play").first.wait_for()
    page.get_by_role("button", name="Size and sampling").click()
    page.wait_for_function("() => [...document.querySelectorAll('input[type=number]')].some(one => one.value == 42)")
    page.screenshot(path=SCREENSHOTS / "page-again.png", full_page=True)
    page.get_by_label("Frames at most").fill("33")
    page.get_by_role("button", name="Make the video").click()
    follow(page, address, lambda: len(jobs(address)) == 2)
    again, first = jobs(address)
    follow(page, address, lambda: "2: done" in page.locator("#status").inner_text())
    again, first = jobs(address)
    assert {"model", "VAE"} <= set(again["result"]["reused"])
    assert not first["result"]["reused"]
    assert (again["request"]["seed"], again["request"]["prompt"]) == (42, first["request"]["prompt"])
    page.screenshot(path=SCREENSHOTS / "page.png")


def test_the_settings_of_an_mp4_fill_the_form(page: Any, address: str, tmp_path: Path) -> None:
    (tmp_path / "made here.mp4").write_bytes(httpx.get(f"{address}{jobs(address)[0]['video']}").content)
    page.get_by_role("button", name="Use the settings of an MP4").click()
    page.get_by_role("button", name="Size and sampling").click()
    chosen = page.locator("input[type=file][accept='.mp4']")
    chosen.set_input_files(tmp_path / "made here.mp4")
    page.wait_for_function("() => [...document.querySelectorAll('input[type=number]')].some(one => one.value == 42)")
    assert page.get_by_label("What to show").input_value() == "a woman listens\na woman speaks"
    with VideoWriter(tmp_path / "film.mp4", comment="a film") as writer:
        writer.append(torch.zeros(2, 32, 32, 3, dtype=torch.uint8))
    page.get_by_role("button", name="Clear").last.click()
    chosen.set_input_files(tmp_path / "film.mp4")
    page.get_by_text("film.mp4 carries no settings").wait_for()


def test_two_speakers_one_by_two_clicks_one_by_paint(page: Any, address: str) -> None:
    page.get_by_role("button", name="Fill in the demo").click()
    page.get_by_role("button", name="Play").first.wait_for()
    page.get_by_role("button", name="Speaker 2").click()
    send(page, page.locator("input[type=file][accept^=audio]").last, ROOT / "assets" / "speech.wav")
    places = page.get_by_role("button", name="Where this speaker is")
    places.nth(0).click()
    for x, y in ((0.1, 0.05), (0.5, 0.95)):
        shown = page.locator(".image-frame img").nth(1)
        box, before = settled(page, shown), shown.get_attribute("src")
        page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])
        page.wait_for_function("before => ![...document.images].some(one => one.src == before)", arg=before)
    assert page.get_by_label("Left, top").input_value() == "10, 5, 50, 95"
    places.nth(1).click()
    page.get_by_role("tab", name="or paint").last.click()
    canvas = page.locator(".pixi-target canvas").last
    canvas.wait_for()
    canvas.scroll_into_view_if_needed()
    box = settled(page, canvas)
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.3 * box["height"])
    page.mouse.down()
    for y in (0.4, 0.5, 0.6):
        page.mouse.move(box["x"] + 0.65 * box["width"], box["y"] + y * box["height"], steps=5)
    page.mouse.up()
    page.screenshot(path=SCREENSHOTS / "page-places.png", full_page=True)
    page.wait_for_timeout(1000)
    before = len(jobs(address))
    page.get_by_role("button", name="Make the video").click()
    follow(page, address, lambda: len(jobs(address)) > before)
    assert [len(jobs(address)[0]["request"][name]) for name in ("audio", "masks")] == [2, 2]
    page.get_by_role("button", name="Cancel").click()
    follow(page, address, lambda: jobs(address)[0]["state"] == "cancelled")


def test_a_running_job_is_cancelled(page: Any, address: str) -> None:
    before = len(jobs(address))
    page.get_by_role("button", name="Fill in the demo").click()
    page.get_by_role("button", name="Play").first.wait_for()
    page.get_by_role("button", name="Make the video").click()
    follow(page, address, lambda: page.locator(PLAYER).count() > 0)
    page.get_by_role("button", name="Cancel").click()
    follow(page, address, lambda: ": cancelled" in page.locator("#status").inner_text())
    assert len(jobs(address)) == before + 1
    assert jobs(address)[0]["state"] == "cancelled"


def test_what_is_missing_is_said(page: Any, address: str) -> None:
    page.get_by_role("button", name="Make the video").click()
    page.get_by_text('"audio" is missing').first.wait_for()


def test_the_keyboard_reaches_everything(page: Any, address: str) -> None:
    """By Tab alone, each with a name; a job is chosen by Enter."""
    page.get_by_role("button", name="Thumbnail 1").wait_for()
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(NAME_OF_FOCUS))
    for name in (
        *(
            "Make a video",
            "Doctor",
            "Drop an image",
            "Drop a video",
            "Speaker 1",
            "Drop an audio",
            "Where this speaker",
        ),
        *("Speaker 2", "Speaker 4", "One after", "What to show", "Mode", "Quantization", "Preset", "Size and sampling"),
        *("Fill in the demo", "Make the video", "Use the settings", "Thumbnail 1", "Settings of this"),
    ):
        assert any(one.startswith(name) for one in reached), (name, reached)
    assert "" not in reached
    assert str(len(jobs(address))) in reached, "the number of the latest job, in the table"
    page.get_by_role("button", name="Thumbnail 1").focus()
    page.keyboard.press("Enter")
    page.locator(PLAYER).wait_for(state="attached")


@pytest.mark.parametrize(("locale", "make"), [("zh-CN", "生成"), ("en-US", "Make the video")])
def test_the_page_fits_a_phone_in_both_languages(browser: Any, address: str, locale: str, make: str) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844}, locale=locale)
    page.goto(address)
    page.get_by_role("button", name=make, exact=True).wait_for()
    page.get_by_role("button", name="Thumbnail 1").or_(page.locator(".thumbnail-item")).first.click()
    page.locator(PLAYER).wait_for(state="attached")
    closed = page.locator("button.label-wrap:not(.open)")
    while closed.count():
        closed.first.click()
        page.wait_for_timeout(200)
    page.wait_for_timeout(1000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert "[object" not in page.inner_text("body")
    assert ("完成" in page.inner_text("#status")) == (locale == "zh-CN")
    page.screenshot(path=SCREENSHOTS / f"phone-{locale}.png", full_page=True)
    page.close()
