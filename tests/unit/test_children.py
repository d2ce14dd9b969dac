"""Child processes that may die: every request is answered, whatever became of its child."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.children import ask

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")

SCRIPT = """
import os, sys, time
from support.children import serve

def answer(request):
    if request == "abort":
        os.abort()
    if request == "raise":
        raise ValueError("no such kernel")
    if request == "hang":
        time.sleep(60)
    return {"outcome": "fault" if request == "poison" else "right", "pid": os.getpid(), "request": request}

serve(answer, seconds=2)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_a_death_is_a_fault_and_the_rest_goes_on(script: Path) -> None:
    requests = ["a", "abort", "b", "raise", "poison", "c", "hang", "d"]
    answers = ask(script, requests, workers=1)
    assert [a["outcome"] for a in answers] == [
        *("right", "fault", "right", "fault"),
        *("fault", "right", "fault", "right"),
    ]
    assert [a.get("request") for a in answers] == ["a", None, "b", None, "poison", "c", None, "d"]
    assert "-6" in answers[1]["error"]
    assert "ValueError: no such kernel" in answers[3]["error"]
    assert "no answer within 2 s" in answers[6]["error"]
    assert answers[5]["pid"] not in (answers[2]["pid"], answers[4]["pid"])


def test_answers_come_in_order_from_several_workers(script: Path) -> None:
    requests = [str(n) for n in range(7)]
    answers = ask(script, requests, workers=3)
    assert [a["request"] for a in answers] == requests
    assert len({a["pid"] for a in answers}) == 3
    alone = ask(script, requests[:3], workers=1, alone=True)
    assert len({a["pid"] for a in alone}) == 3


def test_a_script_that_cannot_run_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text("import nothing_of_that_name")
    with pytest.raises(RuntimeError, match="nothing_of_that_name"):
        ask(path, ["a"])
