"""The page of GPU results, and the benchmarks that fill it, tried at small sizes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

JUNIT = """<testsuites><testsuite name="pytest">
<properties><property name="system" value="Linux-6.1.2-x7-gpu-x86_64-with-glibc2.39"/>
<property name="gpu" value="NVIDIA X"/><property name="torch" value="2.11"/></properties>
<testcase classname="tests.cuda.test_a" name="test_p[sdpa-disabled]" time="1.5">
  <properties><property name="latents" value="0.01"/></properties>
  <system-out>--------------------------------- Captured Out ---------------------------------
#x1B[31mfp4: 480 cases#x1B[0m</system-out></testcase>
<testcase classname="tests.cuda.test_a" name="test_p[fp4-disabled]" time="1">
  <properties><property name="latents" value="0.02"/></properties></testcase>
<testcase classname="tests.cuda.test_b" name="test_q" time="0"><skipped message="not installed"/></testcase>
<testcase classname="tests.cuda.test_b" name="test_r" time="0"><failure message="wrong | numbers&#10;more"/></testcase>
</testsuite></testsuites>"""


def write_page(tmp_path: Path, *options: str) -> str:
    out = tmp_path / "page.md"
    command = [sys.executable, str(ROOT / "tools/cuda_results.py"), *options, "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return out.read_text()


def test_the_page_tells_what_the_suite_did(tmp_path: Path) -> None:
    (tmp_path / "cuda.xml").write_text(JUNIT)
    log = "========= COMPUTE-SANITIZER\n44 passed, 3 skipped in 93.1s\n========= ERROR SUMMARY: 0 errors\n"
    (tmp_path / "sanitize.log").write_text(log)
    page = write_page(tmp_path, "--junit", str(tmp_path / "cuda.xml"), "--sanitizer", str(tmp_path / "sanitize.log"))
    assert "| gpu | NVIDIA X |" in page
    assert "| system | Linux, glibc 2.39 |" in page
    assert "| [tests](#tests) | **1 failed** | 2 of 4 passed, 1 skipped |" in page
    assert "| [memory checker](#memory-checker) | no error |  |" in page
    assert page.index("## Summary") < page.index("## Tests")
    assert "4 tests in 2 s: 2 passed, 1 failed, 0 error, 1 skipped." in page
    assert "| test_a | 2 | 2 | 0 | 0 | 0 | 2.5 |" in page
    assert "* `test_b::test_r`: wrong | numbers" in page
    assert "* 1 tests: not installed" in page
    assert "|  | sdpa | fp4 |\n| --- | --- | --- |\n| disabled | 0.01 | 0.02 |" in page
    assert "```text\nfp4: 480 cases\n```" in page
    assert "44 passed, 3 skipped in 93.1s\n========= ERROR SUMMARY: 0 errors" in page


def test_the_page_tells_how_long_it_took_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "cuda.xml").write_text(JUNIT.replace('name="pytest"', 'name="pytest" time="1.2"'))
    page = write_page(tmp_path, "--junit", str(tmp_path / "cuda.xml"))
    assert "4 tests in 1 s (2 s of tests, several at a time): 2 passed" in page


def test_the_page_takes_benchmarks_and_any_other_json(tmp_path: Path) -> None:
    known = {
        "title": "Guards",
        "environment": {"gpu": "NVIDIA Y", "torch": "2.11"},
        "tables": [{"title": "One block", "rows": [{"variant": "sdpa", "ms": 87.123456}]}],
        "goals": [{"what": "ratio", "value": 1.2, "limit": 1.1, "met": False}],
    }
    (tmp_path / "a.json").write_text(json.dumps(known))
    (tmp_path / "doctor.json").write_text(
        json.dumps({"kernels": [{"kernel": "own", "reasons": ["x", "y"]}], "ok": True})
    )
    (tmp_path / "cuda.xml").write_text(JUNIT)
    page = write_page(
        tmp_path,
        "--junit",
        str(tmp_path / "cuda.xml"),
        "--json",
        *(str(tmp_path / f"{n}.json") for n in ("a", "doctor")),
    )
    assert "| [Guards](#guards) | **0 of 1 goals met** | ratio: 1.2, at most 1.1 |" in page
    assert "| [doctor](#doctor) | no goals |  |" in page
    assert "### Guards\n\nMeasured on another machine: gpu NVIDIA Y." in page
    assert "| ratio | 1.2 | 1.1 | **missed** |" in page
    assert "| variant | ms |\n| --- | --- |\n| sdpa | 87.12 |" in page
    assert "### doctor\n\nkernels\n\n| kernel | reasons |\n| --- | --- |\n| own | x; y |\n\n* ok: True" in page


def test_long_tables_are_folded(tmp_path: Path) -> None:
    for length in (5, 50):
        rows = [{"kernel": f"k{number}"} for number in range(length)]
        (tmp_path / "a.json").write_text(json.dumps({"tables": [{"title": "All", "rows": rows}]}))
        page = write_page(tmp_path, "--json", str(tmp_path / "a.json"))
        assert ("All\n\n<details><summary>50 rows</summary>\n\n| kernel |" in page) == (length == 50)
        assert "| k4 |" in page


def measured(folder: Path, **rounds: int) -> dict[str, dict]:
    """The JSON files of small benchmarks, run one after the other in one process."""
    code = f"""
import runpy, sys
runs = {rounds}
for name, rounds in runs.items():
    options = [f"--rounds={{rounds}}"] if rounds else []
    sys.argv = [name, "--small", *options, "--json", f"{folder}/{{name}}.json"]
    try:
        runpy.run_module(f"benchmarks.{{name}}", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return {path.stem: json.loads(path.read_text()) for path in folder.iterdir()}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("benchmarks")
    return measured(folder, guard_cost=2, block_swap=2, linear=1, fused=1, vram=0, vae=1, forward=1, window=0, stream=0)


@pytest.mark.slow
def test_lip_sync_is_read_from_a_video(tmp_path: Path) -> None:
    reports = measured(tmp_path, lipsync=0)
    ((row,),) = (table["rows"] for table in reports["lipsync"]["tables"])
    assert (row["mode"], row["quantization"]) == ("sdpa", "disabled")
    assert row["correlation"] > 0.7
    assert row["identity, dB"] > 22
    assert "sdpa, disabled: correlation lost" in {goal["what"] for goal in reports["lipsync"]["goals"]}
    assert_not_judged(reports)


def test_a_stream_is_measured_with_both_decoders(reports: dict[str, dict]) -> None:
    (table,) = reports["stream"]["tables"]
    assert [row["decoder"] for row in table["rows"]] == ["Wan VAE", "taew2_1"]
    assert table["title"].startswith("32 x 32, 13 / 5 frames, 1 steps")
    for row in table["rows"]:
        assert row["frames"] == 20
        assert 0 < row["window, s"] <= row["longest window, s"]
        assert row["first image, s"] > 0
        assert row["frames per second"] == pytest.approx(8 / row["longest window, s"])  # of one window of 8 frames


def test_guards_are_compared_and_counted(reports: dict[str, dict]) -> None:
    block, host = (table["rows"] for table in reports["guard_cost"]["tables"])
    assert len(block) == 2
    assert all(row["guard calls"] > 10 and row["copies"] == 0 and row["without, ms"] > 0 for row in block)
    assert all(0 < row["microseconds"] < 1000 for row in host)


def test_block_swap_changes_no_latents(reports: dict[str, dict]) -> None:
    (table,) = reports["block_swap"]["tables"]
    assert [row["latents"] for row in table["rows"]] == ["identical"] * 3
    assert reports["block_swap"]["failures"] == []
    weights = [row["weights on the device, GiB"] for row in table["rows"]]
    assert weights[2] < weights[0]


def test_linears_are_measured_in_every_quantization(reports: dict[str, dict]) -> None:
    *layers, quantizing, scaling = reports["linear"]["tables"]
    assert len(layers) == 3
    for table in layers:
        errors = {row["linear"]: row["relative L2"] for row in table["rows"]}
        assert errors["bf16"] < 0.003 < errors["fp8_e4m3fn"] < errors["fp8_e5m2"] < errors["fp4_scaled"] < 0.2
        assert all(row["in a row"] > 0 for row in table["rows"])
    assert quantizing["title"].startswith("input to e4m3")
    assert scaling["title"].startswith("scales to product")
    assert [row["form"] for table in (quantizing, scaling) for row in table["rows"]] == ["eager", "eager"]


def test_elementwise_groups_are_measured_and_a_block_with_them(reports: dict[str, dict]) -> None:
    *groups, block = (table["rows"] for table in reports["fused"]["tables"])
    assert len(groups) == 7
    assert all(row["form"] == "eager" and 0.5 < row["ulp, normal"] <= 1 for rows in groups for row in rows)
    assert [row["relative L2 between them"] for row in block] == [0.0, 0.0]  # no kernel of ours runs on a CPU


def test_both_ways_through_the_vae_are_measured(reports: dict[str, dict]) -> None:
    work, errors = (table["rows"] for table in reports["vae"]["tables"])
    ways = ["diffusers", "channels last"]
    assert [row["way"] for row in work] == [*ways, "small decoder", *ways, *ways]
    assert all(row["ms"] > 0 for row in work)
    assert errors[0]["decode"] == errors[0]["encode"] == 0.0  # float32 against itself on a CPU
    assert max(errors[1]["decode"], errors[1]["encode"]) < 1e-5


def test_a_forward_is_compared_with_16_bit_sdpa(reports: dict[str, dict]) -> None:
    (table,) = reports["forward"]["tables"]
    first, *others = table["rows"]
    assert (first["variant"], first["relative L2"]) == ("sdpa, disabled", 0.0)
    assert all(0 < row["relative L2"] < 0.15 for row in others)


def test_the_parts_of_a_window_add_up(reports: dict[str, dict]) -> None:
    (table,) = reports["window"]["tables"]
    rows = {row["part, s"]: row for row in table["rows"]}
    *parts, total, rate, meanwhile = rows
    assert (total, meanwhile) == ("sum", "writing the one before, meanwhile")
    for column in ("noise, in turn", "noise", "ordinary, in turn", "ordinary"):
        assert sum(rows[part][column] for part in parts) == pytest.approx(rows[total][column])
        assert rows[rate][column] == pytest.approx(rows[total][column] / (12 / 25))  # 17 frames, 5 of them carried over
        assert (rows["write"][column] > 0) == column.endswith("in turn") == (rows[meanwhile][column] == 0)


def test_the_vae_is_measured_whole_in_tiles_and_by_length(reports: dict[str, dict]) -> None:
    sizes, lengths = (table["rows"] for table in reports["vram"]["tables"])
    assert [row["tiles"] for row in sizes] == ["none", "32"]
    assert [row["frames"] for row in lengths] == [9, 21]
    assert all(row["encode, s"] > 0 and row["decode, s"] > 0 for row in sizes)


def test_a_small_run_is_not_judged(reports: dict[str, dict]) -> None:
    assert_not_judged(reports)


def assert_not_judged(reports: dict[str, dict]) -> None:
    goals = [goal for report in reports.values() for goal in report["goals"]]
    assert goals
    assert all(goal["met"] is None for goal in goals)
    assert all("--json" not in report["command"] for report in reports.values())
