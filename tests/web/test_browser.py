"""The page in a browser: image and recording in, a video watched while it grows, cancel, phone and Chinese."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[web]'")
playwright_api = pytest.importorskip("playwright.sync_api", reason="needs playwright from pip")

ROOT = Path(__file__).parents[2]
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
SCREENSHOTS = Path(os.environ.get("SCREENSHOTS", ROOT / "out"))
OPTIONS = ["--port", "0", "--device", "cpu", "--frames", "33", "--max-frames", "90", "--steps", "4"]

PLAYER = "video[src*=ticket]"
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


def fill(page: Any) -> None:
    """Send the demo's image and recording as files."""
    for place, name in ((0, "portrait.png"), (2, "speech.wav")):  # the second one takes a source video
        with page.expect_response(lambda answer: "/upload" in answer.url):
            page.locator("input[type=file]").nth(place).set_input_files(ROOT / "assets" / name)
    page.locator("audio, [aria-label='Play']").first.wait_for(state="attached")


def test_image_and_recording_become_a_video_that_is_watched_while_it_grows(page: Any, address: str) -> None:
    fill(page)
    page.get_by_label("What to show").fill("a woman listens\na woman speaks")
    page.get_by_role("button", name="Make the video").click()
    page.locator(PLAYER).wait_for(state="attached", timeout=120_000)
    page.wait_for_function(LENGTH)
    first = page.evaluate(LENGTH)
    assert jobs(address)[0]["state"] == "running", "it plays before the job has ended"
    page.wait_for_function(f"before => ({LENGTH})() > before", arg=first, timeout=120_000)
    page.wait_for_function(f"() => Math.abs(({LENGTH})() - 90 / 25) < 0.1", timeout=120_000)
    page.get_by_text("done").first.wait_for(timeout=60_000)
    (job,) = jobs(address)
    assert (job["state"], job["result"]["frames"]) == ("done", 90)
    assert job["request"]["prompt"] == "a woman listens | a woman speaks"
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / "page.png")


def test_a_running_job_is_cancelled(page: Any, address: str) -> None:
    before = len(jobs(address))
    page.get_by_role("button", name="Fill in the demo").click()
    page.wait_for_function("() => document.querySelectorAll('img[src*=file]').length > 0")
    page.get_by_role("button", name="Make the video").click()
    page.locator(PLAYER).wait_for(state="attached", timeout=120_000)
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("cancelled").first.wait_for(timeout=60_000)
    assert len(jobs(address)) == before + 1
    assert jobs(address)[0]["state"] == "cancelled"


def test_what_is_missing_is_said(page: Any, address: str) -> None:
    page.get_by_role("button", name="Make the video").click()
    page.get_by_text('"audio" is missing').first.wait_for(timeout=30_000)


def test_the_page_fits_a_phone_and_speaks_chinese(browser: Any, address: str) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844}, locale="zh-CN")
    page.goto(address)
    page.get_by_role("button", name="生成视频").wait_for(timeout=30_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert "[object" not in page.inner_text("body")
    page.close()
