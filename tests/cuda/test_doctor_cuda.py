"""A package that takes its process down, on a real GPU: rejected with the reason, and everything goes on without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.cuda

CRASHING = """
import os
def sageattn(*args, **kwargs):
    os.abort()
sageattn_qk_int8_pv_fp8_cuda_sm90 = sageattn_qk_int8_pv_fp8_cuda = sageattn_qk_int8_pv_fp16_cuda = sageattn
"""

GENERATE = """
import torch
from wanvideo_infinitetalk.wanvideo.modules.attention import attention
q, k, v = (torch.randn(1, 512, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
out = attention(q, k, v, "sageattn").float()
expected = attention(q, k, v, "eager").float()
assert torch.cosine_similarity(out.flatten(), expected.flatten(), 0) > 0.99
"""


@pytest.fixture
def crashing_package(tmp_path: Path) -> dict[str, str]:
    """An environment in which `sageattention` 2.2.0 is installed and aborts whoever calls it."""
    (tmp_path / "sageattention.py").write_text(CRASHING)
    info = tmp_path / "sageattention-2.2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sageattention\nVersion: 2.2.0\n")
    path = os.pathsep.join([str(tmp_path), *(p for p in sys.path if p)])
    return os.environ | {"PYTHONPATH": path, "INFINITETALK_TRIAL": "on", "INFINITETALK_CACHE": str(tmp_path / "cache")}


def run(code: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)


def test_the_doctor_rejects_it_and_ends_well(crashing_package, tmp_path):
    report = tmp_path / "report.json"
    code = "import sys; from wanvideo_infinitetalk.cli.parser import main; sys.exit(main(sys.argv[1:]))"
    done = run(code, crashing_package, "doctor", "--report", str(report))
    assert done.returncode == 0, done.stderr
    rows = {row["kernel"]: row for row in json.loads(report.read_text())["kernels"] if row["mode"] == "sageattn"}
    if torch.cuda.get_device_capability() == (9, 0):
        reasons = " ".join(rows["sageattention_2_fp8_sm90"]["reasons"])
        assert "failed its self-test: it kills its process (SIGABRT)" in reasons
    assert sum(row["first"] for row in rows.values()) == 1
    assert not any(row["supported"] for name, row in rows.items() if name.startswith("sageattention"))


def test_the_mode_goes_on_with_another_kernel(crashing_package):
    done = run(GENERATE, crashing_package)
    assert done.returncode == 0, done.stderr
