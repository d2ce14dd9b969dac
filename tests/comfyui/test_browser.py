"""The workflows in a browser: opened as a user opens them, run by the Run button, watched while they run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import make_workflows, workflows
from support.comfy_server import PACK, Server, saved_files
from support.tiny_comfy import shrink
from support.video import streams_of
from support.workflows import CORE, look_of

pytestmark = pytest.mark.comfyui

playwright_api = pytest.importorskip("playwright.sync_api", reason="needs playwright from pip")

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SCREENSHOTS = Path(os.environ.get("SCREENSHOTS", workflows.ROOT / "out"))

RUN = 'button[data-testid="queue-button"], [data-testid="queue-button"] button'
"""The Run button: the marked element itself in newer pages, inside of it before."""

# Every node on the canvas: its id (a string in newer pages) and type, whether the page knows it, its widgets by name.
NODES = """() => app.graph.nodes.map(n => ({
    id: Number(n.id), type: n.type, known: n.type in LiteGraph.registered_node_types,
    module: (LiteGraph.registered_node_types[n.type]?.nodeData || {}).python_module || '',
    widgets: Object.fromEntries((n.widgets || []).map(w => [w.name, w.value])) }))"""

READY = "() => window.app?.graph && Object.keys(window.LiteGraph?.registered_node_types || {}).length > 100"

# Counts what the server reports while a prompt runs.
LISTEN = """() => { window.seen = {};
    for (const kind of ['execution_start', 'execution_error', 'execution_success', 'progress', 'progress_state',
                        'b_preview', 'b_preview_with_metadata'])
        app.api.addEventListener(kind, event => { window.seen[kind] = (window.seen[kind] || 0) + 1;
            if (kind === 'execution_error') window.failure = event.detail; }); }"""


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium (set CHROMIUM to its program)")
    for setting, value in (
        ("Comfy.TutorialCompleted", True),  # else a dialog of the first start covers the page
        ("Comfy.Workflow.Persist", False),
        ("Comfy.Release.Status", "skipped"),
        ("Comfy.Minimap.Visible", False),
        ("LiteGraph.Canvas.LowQualityRenderingZoomThreshold", 0.1),  # text is drawn on small nodes too
    ):
        server.post(f"/settings/{setting}", value)
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1760, "height": 990})
        page.set_default_timeout(90_000)
        # Nothing outside of this machine is asked.
        page.route("**/*", lambda route: route.continue_() if _is_local(route.request.url, server) else route.abort())
        page.goto(server.url, wait_until="domcontentloaded")
        page.wait_for_function(
            "() => window.app?.graph && Object.keys(LiteGraph?.registered_node_types || {}).length > 100"
        )
        page.wait_for_function("() => !document.querySelector('.p-blockui-mask, #splash-loader')")
        page.wait_for_timeout(1500)
        yield page
        browser.close()


def _is_local(url: str, server: Server) -> bool:
    return url.startswith((server.url, "data:", "blob:"))


def open_workflow(page: Any, content: dict[str, Any], name: str) -> None:
    """As if the file were dropped onto the page."""
    page.evaluate(
        "async ([text, name]) => app.handleFile(new File([text], name, {type: 'application/json'}))",
        [json.dumps(content), name],
    )
    page.wait_for_function(f"() => app.graph.nodes.length === {len(content['nodes'])}")
    page.wait_for_timeout(1000)


def drawn(name: str) -> dict[str, Any]:
    return json.loads((workflows.FOLDER / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def looks() -> dict[str, Any]:
    from support.node_docs import node_schemas

    return CORE | {node_id: look_of(schema) for node_id, schema in node_schemas().items()}


@pytest.mark.parametrize("name", sorted(make_workflows.WORKFLOWS))
def test_no_node_is_missing_and_all_widgets_keep_their_values(page: Any, looks: dict[str, Any], name: str) -> None:
    content = drawn(name)
    open_workflow(page, content, f"{name}.json")
    shown = {node["id"]: node for node in page.evaluate(NODES)}
    assert [node["type"] for node in shown.values() if not node["known"]] == []
    for node in content["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        expected = {k: v for k, v in zip(looks[node["type"]].widgets, node["widgets_values"], strict=True) if k}
        widgets = shown[node["id"]]["widgets"]
        assert {k: widgets.get(k) for k in expected} == expected, node["type"]
    ours = [node for node in shown.values() if PACK in node["module"]]
    assert len(ours) >= 10


def test_a_file_of_an_older_release_keeps_its_values_and_links(page: Any, looks: dict[str, Any]) -> None:
    """Fewer widgets at the end of some nodes and one more on another, a socket under its former name, others' nodes."""
    content = drawn("infinitetalk_tiny")
    nodes = {node["type"]: node for node in content["nodes"]}
    kept = {
        "InfiniteTalkVAELoader": 2,
        "InfiniteTalkModelLoader": 5,
        "InfiniteTalkLongVideo": 7,
        "InfiniteTalkSpeech": 6,
        "InfiniteTalkSampler": 12,
    }
    for node_type, count in kept.items():
        nodes[node_type]["widgets_values"] = nodes[node_type]["widgets_values"][:count]
    nodes["InfiniteTalkSampler"]["widgets_values"][1] = 1.0000000000000002  # as the page wrote fractions
    nodes["InfiniteTalkAdapterLoader"]["widgets_values"].append("fp16")
    loader = nodes["InfiniteTalkModelLoader"]
    loader["widgets_values"][0] = r"folder\a-file-that-is-not-here.gguf"
    (socket,) = [socket for socket in loader["inputs"] if socket["name"] == "extra_model"]
    socket["name"] = "vace_model"
    nodes["CreateVideo"] |= {"type": "SomebodysVideoWriter", "widgets_values": {"frame_rate": 25}}
    del nodes["CreateVideo"], nodes["MarkdownNote"]
    open_workflow(page, content, "older.json")
    page.keyboard.press("Escape")  # the dialog about the node of somebody
    page.wait_for_function("() => !document.querySelector('.p-dialog-mask')")
    shown = {node["id"]: node for node in page.evaluate(NODES)}
    assert [node["type"] for node in shown.values() if not node["known"]] == ["SomebodysVideoWriter"]
    whole = {node["type"]: node for node in drawn("infinitetalk_tiny")["nodes"]}
    for node_type, node in nodes.items():
        saved = node["widgets_values"]
        values = [*saved, *whole[node_type]["widgets_values"][len(saved) :]]
        widgets = shown[node["id"]]["widgets"]
        for name, value in zip(looks[node_type].widgets, values, strict=False):
            assert not name or widgets[name] == value, f"{node_type} {name}"
    exported = page.evaluate("async () => (await app.graphToPrompt()).output")[str(loader["id"])]["inputs"]
    assert exported["multitalk_model"] == [str(nodes["InfiniteTalkAdapterLoader"]["id"]), 0]
    assert exported["model"] == loader["widgets_values"][0]


def test_the_page_and_the_builder_agree_on_the_api_format(page: Any) -> None:
    open_workflow(page, drawn("infinitetalk_two_speakers"), "two.json")
    exported = page.evaluate("async () => (await app.graphToPrompt()).output")
    expected = workflows.load("infinitetalk_two_speakers")
    assert set(exported) == set(expected)
    for node_id, node in expected.items():
        given = exported[node_id]["inputs"]
        assert exported[node_id]["class_type"] == node["class_type"]
        assert {k: given.get(k) for k in node["inputs"]} == node["inputs"], node["class_type"]


def test_the_run_button_makes_a_video(server: Server, page: Any, tmp_path: Path) -> None:
    open_workflow(page, drawn("infinitetalk_talking_picture"), "talking.json")
    small = shrink(workflows.load("infinitetalk_talking_picture"), size=128, window=33, frames=57, steps=4)
    page.evaluate(
        """prompt => { for (const node of app.graph.nodes) for (const widget of node.widgets || []) {
            const value = prompt[node.id]?.inputs?.[widget.name];
            if (value !== undefined && !Array.isArray(value)) widget.value = value; } }""",
        small,
    )
    page.evaluate(LISTEN)
    with page.expect_response(lambda r: r.url.endswith("/prompt") and r.request.method == "POST") as queued:
        page.locator(RUN).first.click()
    answer = queued.value.json()
    assert not answer["node_errors"]
    page.wait_for_function(
        "() => seen.b_preview_with_metadata || seen.b_preview || seen.execution_error", timeout=300_000
    )
    (sampler,) = [node_id for node_id, node in small.items() if node["class_type"] == "InfiniteTalkSampler"]
    page.evaluate(f"() => app.canvas.centerOnNode(app.graph.getNodeById({sampler}))")
    page.wait_for_timeout(700)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(SCREENSHOTS / "comfyui-preview.png"))
    entry = server.wait(answer["prompt_id"], 600)
    assert entry["status"]["status_str"] == "success", page.evaluate("() => window.failure")
    page.wait_for_timeout(2000)
    seen = page.evaluate("() => seen")
    assert seen.get("progress", 0) + seen.get("progress_state", 0) >= 8
    (save,) = [node_id for node_id, node in small.items() if node["class_type"] == "SaveVideo"]
    (file,) = saved_files(entry, save)
    frames, shown, sound = streams_of(server.download(file, tmp_path))
    assert frames == 57
    assert sound == pytest.approx(shown, abs=0.07)
    page.evaluate(
        "() => { app.canvas.ds.scale = 0.5; app.canvas.ds.offset = [130, 120]; app.canvas.setDirty(true, true); }"
    )
    page.wait_for_timeout(1500)
    page.screenshot(path=str(SCREENSHOTS / "comfyui-talking-picture.png"))


def test_an_error_is_shown_on_its_node(server: Server, page: Any) -> None:
    content = drawn("infinitetalk_tiny")
    for node in content["nodes"]:
        if node["type"] == "InfiniteTalkModelLoader":
            node["widgets_values"][4] = "radial_sage_attention"
            loader = node["id"]
    open_workflow(page, content, "wrong.json")
    page.locator(RUN).first.click()
    page.wait_for_function("() => Object.keys(app.lastNodeErrors || {}).length", timeout=30_000)  # nothing runs before
    ((node_id, failure),) = page.evaluate("() => app.lastNodeErrors").items()
    assert int(node_id) == loader
    assert all("choose sageattn_3_fp8" in error["details"] for error in failure["errors"])
    page.wait_for_timeout(1000)
    details = page.get_by_text("View details", exact=True)  # newer pages say which node failed, and why on request
    if details.count():
        details.first.click()
        page.wait_for_timeout(1000)
    info = page.get_by_label("Info for InfiniteTalk Model Loader", exact=False)  # the newest ones on a second request
    if info.count():
        info.first.click()
        page.wait_for_timeout(500)
    page.screenshot(path=str(SCREENSHOTS / "comfyui-error.png"))
    assert "choose sageattn_3_fp8" in page.locator("body").inner_text()
