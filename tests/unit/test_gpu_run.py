"""The driver of GPU runs: steps end within their time, each with a log, and a failure is told."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_run", ROOT / "tools/gpu_run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_run"] = module
    spec.loader.exec_module(module)
    return module


def known_order(tool: ModuleType) -> list[str]:
    return [name.removeprefix("benchmarks:") for name in tool.STEPS if name.startswith("benchmarks:")]


def step(tool: ModuleType, name: str, code: str, limit: int = 60):
    return tool.Step(name, ("-c", code), 1, limit)


def test_every_test_file_and_benchmark_has_a_step(tool: ModuleType) -> None:
    for path in (ROOT / "tests/cuda").glob("test_*.py"):
        assert f"tests:{path.stem.removeprefix('test_')}" in tool.STEPS
    known = set(known_order(tool))
    # What several of them share is no benchmark. Others measure a CPU, finished videos, or several GPUs.
    others = {"__init__", "common", "fused_cases", "memory", "service", "cluster", "measure", "parallel"}
    assert {p.stem for p in (ROOT / "benchmarks").glob("*.py")} - others == known
    found = tool.chosen(["doctor", "benchmarks:", "doctor"])
    assert [s.name for s in found] == ["doctor", *(f"benchmarks:{name}" for name in known_order(tool))]
    with pytest.raises(SystemExit, match="there is no step 'tset'"):
        tool.chosen(["tset"])


@pytest.mark.slow
def test_a_step_ends_in_time_and_leaves_a_log(tool: ModuleType, tmp_path: Path) -> None:
    fine = tool.run(step(tool, "a:b", "import os; print(os.environ['OMP_NUM_THREADS'])"), None, tmp_path, 3, 60)
    assert (fine.code, fine.last) == (0, "3")
    assert (tmp_path / "a-b.log").read_text().startswith("$ ")
    wrong = tool.run(step(tool, "wrong", "raise SystemExit(3)"), None, tmp_path, 1, 60)
    assert "FAILED (3)" in str(wrong)
    begin = time.monotonic()
    late = tool.run(step(tool, "late", "import time; print('begun'); time.sleep(60)"), None, tmp_path, 1, 12)
    assert late.code is None
    assert time.monotonic() - begin < 40
    assert "begun\n\nended after 12 s" in (tmp_path / "late.log").read_text()
    assert tool.run(step(tool, "never", ""), None, tmp_path, 1, 5).code is None


def test_steps_are_spread_over_gpus(tool: ModuleType, tmp_path: Path) -> None:
    code = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(1)"
    steps = [step(tool, f"s{n}", code) for n in range(4)]
    outcomes = list(tool.run_all(steps, 2, tmp_path, 60))
    assert sorted(o.step.name for o in outcomes) == ["s0", "s1", "s2", "s3"]
    assert {o.last for o in outcomes} == {"0", "1"}
    tool.pack(tmp_path, tmp_path / "all.tgz")
    with tarfile.open(tmp_path / "all.tgz") as tar:
        assert {"s0.log", "s3.log"} <= set(tar.getnames())


def test_the_command_tells_what_failed(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/gpu_run.py"), "--out", str(tmp_path), "benchmarks:vram"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == (0 if torch.cuda.is_available() else 1), done.stderr
    if not torch.cuda.is_available():
        assert "benchmarks:vram: FAILED (1)" in done.stdout
        assert "This benchmark needs an NVIDIA GPU" in (tmp_path / "summary.txt").read_text()
