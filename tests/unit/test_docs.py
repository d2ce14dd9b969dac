"""The pages: links lead somewhere, hosts are allowed ones, options exist, figures say where they are from."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
from support import make_workflows
from wanvideo_infinitetalk.cli.parser import parser

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", ".github/**/*.md", "assets/*.md")
    for path in ROOT.glob(pattern)
)
FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
HOSTS = {"huggingface.co", "download.pytorch.org", "127.0.0.1:8188", "127.0.0.1:8000"}
"""Where model files are, PyTorch's index, and ComfyUI and the service on the reader's own machine."""


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(page))):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.resolve().relative_to(ROOT).as_posix()), target


@pytest.mark.parametrize("page", PAGES)
def test_hosts_are_those_of_models_and_of_pytorch(page: str) -> None:
    assert set(re.findall(r"https?://([^/\s)\"'`]+)", text_of(page))) <= HOSTS


def test_options_exist_and_take_what_the_pages_give_them() -> None:
    """Every option that a page names behind `infinitetalk COMMAND`, or in backticks."""
    (commands,) = [action.choices for action in parser()._actions if isinstance(action.choices, dict)]
    known = {name: set(one._option_string_actions) for name, one in commands.items()}
    for page in PAGES:
        joined = text_of(page).replace("\\\n", " ").replace("^\n", " ")
        for name, rest in re.findall(r"infinitetalk ([a-z-]+)((?: [^\n`|#]*)?)", joined):
            if name in known:
                assert set(re.findall(r"(?<!\S)--[a-z0-9-]+", rest)) <= known[name], (page, name, rest)


def test_the_readme_lists_the_files_of_the_workflows() -> None:
    readmes = [text_of("README.md"), text_of("README.zh.md")]
    for name in make_workflows.REAL.values():
        for readme in readmes:
            assert f"/{name})" in readme, name


def test_the_readme_speaks_to_users() -> None:
    for page in ("README.md", "README.zh.md"):
        assert not re.search(r"(^|`)make ", text_of(page), re.MULTILINE)


def test_languages_have_the_same_tables() -> None:
    """Chinese pages hold the rows and the figures of the English ones."""
    for page in PAGES:
        if not page.endswith(".zh.md"):
            continue
        ours, theirs = text_of(page), text_of(page.replace(".zh.md", ".md"))
        assert len(re.findall(r"^ *\|", ours, re.MULTILINE)) == len(re.findall(r"^ *\|", theirs, re.MULTILINE)), page
        figures = [set(re.findall(r"\d+\.\d+", text)) for text in (ours, theirs)]
        assert figures[0] == figures[1], page


def test_figures_of_cards_are_marked() -> None:
    """Each row of the README's tables of memory and of seconds says measured, computed or not tried."""
    rows = re.findall(r"^\| (?:\d+ GB|H200|RTX 4090,).*$", text_of("README.md"), re.MULTILINE)
    assert len(rows) >= 7
    for row in rows:
        assert re.search(r"\*(measured|computed|not tried)\*", row), row


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_files_that_the_engineers_pages_name_exist(page: str) -> None:
    folders = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for name in set(re.findall(r"[\w./-]+\.(?:py|json|yaml)\b", text_of(page))) - {"report.json"}:
        assert (ROOT / name).is_file() or any(any(folder.rglob(name)) for folder in folders), name


def test_make_targets_that_the_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    for page in PAGES:
        named = re.findall(r"(?:^|`)make ([a-z-]+)", text_of(page), re.MULTILINE)
        assert set(named) <= targets, page


def test_reports_of_faults_ask_for_the_doctor() -> None:
    for name in ("ISSUE_TEMPLATE/bug.yml", "ISSUE_TEMPLATE/measurement.yml", "pull_request_template.md"):
        assert "infinitetalk doctor --report" in text_of(f".github/{name}"), name


def test_the_changelog_keeps_its_form() -> None:
    """Keep a Changelog: versions, newest first, and in them kinds of changes, each once."""
    headings = re.findall(r"^(##+) (.+)$", text_of("CHANGELOG.md"), re.MULTILINE)
    assert headings[0] == ("##", "[Unreleased]")
    kinds: list[str] = []
    for level, heading in headings:
        if level == "##":
            kinds = []
            assert re.fullmatch(r"\[Unreleased\]|\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", heading)
        else:
            assert heading in ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
            assert heading not in kinds
            kinds.append(heading)


def test_workflows_pin_their_actions_and_publish_after_the_tests() -> None:
    workflows = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / ".github/workflows").glob("*.yml")}
    for name, text in workflows.items():
        for used in re.findall(r"uses: (\S+)", text):
            assert used.startswith("./") or re.search(r"@[0-9a-f]{40}$", used), (name, used)
        assert set(re.findall(r"https?://([^/\s]+)", text)) <= HOSTS, name
    assert "needs: tests" in workflows["publish.yml"]
