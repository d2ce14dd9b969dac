"""Trial before trust: a backend that crashes, hangs or lies in a child process is refused with the reason."""

import json
import runpy
import textwrap

import pytest
import torch
from wanvideo_infinitetalk.cli.parser import main
from wanvideo_infinitetalk.wanvideo.errors import BackendUnavailableError
from wanvideo_infinitetalk.wanvideo.modules import attention as door
from wanvideo_infinitetalk.wanvideo.modules.backends import forget_availability, unavailable_reasons, unregister
from wanvideo_infinitetalk.wanvideo.modules.backends import selftest as trial

CPU = torch.device("cpu")

PLUGIN = """
import os, sys, time
import torch
from wanvideo_infinitetalk.wanvideo.modules.backends import Backend, Contract, register
from wanvideo_infinitetalk.wanvideo.modules.backends.sdpa import eager_attention

def run(q, k, v, attn_mask, softmax_scale, causal):
    {body}
    return eager_attention(q, k, v, attn_mask, softmax_scale, causal)

package = dict(package="torch", module="torch", versions=">=2")
register(Backend("{name}", Contract(dtypes=(torch.bfloat16,), head_dims=(64,), device_types=("cpu",), **package), run))
"""


@pytest.fixture
def backend(tmp_path, monkeypatch):
    """Registers a backend from a file of its own, as a binary package's adapter would be; returns its name."""
    monkeypatch.setenv(trial.SWITCH, "on")
    monkeypatch.setenv("INFINITETALK_CACHE", str(tmp_path / "cache"))
    forget_availability()
    names = []

    def make(body: str) -> str:
        name = f"tried_{len(names)}"
        file = tmp_path / f"{name}.py"
        file.write_text(PLUGIN.format(body=textwrap.indent(body, "    ").strip(), name=name))
        runpy.run_path(str(file))
        names.append(name)
        return name

    yield make
    for name in names:
        unregister(name)
    forget_availability()


def test_a_right_backend_is_trusted_and_the_verdict_is_kept(backend, monkeypatch):
    name = backend("pass")
    assert unavailable_reasons(name, CPU) == ()
    kept = json.loads(trial.cache_file().read_text())
    (stored,) = kept.values()
    assert stored["ok"]
    assert stored["cosine"] > 0.999
    assert stored["cases"] >= 6
    # The second process does not try again.
    forget_availability()
    monkeypatch.setattr(trial, "run_trial", lambda *a, **k: pytest.fail("tried again"))
    assert unavailable_reasons(name, CPU) == ()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("os.abort()", "it kills its process (SIGABRT)"),
        ("raise RuntimeError('CUDA error: misaligned address')", "CUDA error: misaligned address"),
        ("return torch.randn_like(q)", "it gives wrong numbers"),
        ("return q * float('nan')", "it gives non-finite numbers"),
        ("k -= k.mean(1, keepdim=True)", "it changes its inputs"),
        ("sys.exit(3)", "its process ends with code 3"),
    ],
)
def test_a_bad_backend_is_refused_with_its_reason(backend, body, reason):
    name = backend(body)
    (why,) = unavailable_reasons(name, CPU)
    assert "failed its trial" in why
    assert reason in why
    x = torch.randn(1, 16, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(BackendUnavailableError, match="failed its trial"):
        door.run_backend(name, x, x, x)


def test_a_hang_is_a_verdict(backend):
    result = trial.run_trial(backend("time.sleep(60)"), CPU, timeout=5)
    assert not result.ok
    assert result.reason == "it does not answer within 5 seconds"


def test_a_mode_goes_on_with_its_next_backend(backend, monkeypatch):
    name = backend("os.abort()")
    monkeypatch.setitem(door.MODE_BACKENDS, "sageattn_3_fp8", (name, "emulated_fp8"))
    q, k, v = (torch.randn(1, 64, 2, 64, dtype=torch.bfloat16) for _ in range(3))
    out = door.attention(q, k, v, "sageattn_3_fp8")
    expected = door.attention(q, k, v, "eager")
    assert torch.cosine_similarity(out.float().flatten(), expected.float().flatten(), 0) > 0.99


def test_the_doctor_survives_a_package_that_kills_its_process(backend, monkeypatch, capsys, tmp_path):
    name = backend("os.abort()")
    monkeypatch.setitem(door.MODE_BACKENDS, "sageattn_3_fp8", (name, "emulated_fp8"))
    file = tmp_path / "report.json"
    assert main(["doctor", "--device", "cpu", "--report", str(file)]) == 0
    assert name in capsys.readouterr().out
    rows = {row["kernel"]: row for row in json.loads(file.read_text())["kernels"] if row["mode"] == "sageattn_3_fp8"}
    assert "it kills its process (SIGABRT)" in rows[name]["reasons"][0]
    assert not rows[name]["serves"]
    assert rows["emulated_fp8"]["first"]


def test_our_own_backends_need_no_trial(monkeypatch):
    monkeypatch.setenv(trial.SWITCH, "on")
    monkeypatch.setattr(trial, "run_trial", lambda *a, **k: pytest.fail("tried"))
    forget_availability()
    assert unavailable_reasons("sdpa", CPU) == ()
    assert unavailable_reasons("emulated_nvfp4", CPU) == ()


def test_a_damaged_cache_is_tried_again(backend):
    name = backend("pass")
    trial.cache_file().parent.mkdir(parents=True)
    trial.cache_file().write_text("{not json")
    assert unavailable_reasons(name, CPU) == ()
    assert json.loads(trial.cache_file().read_text())


def test_the_verdict_depends_on_versions(monkeypatch):
    before = trial.environment("torch", CPU)
    monkeypatch.setattr(trial.metadata, "version", lambda name: "99.0")
    after = trial.environment("torch", CPU)
    assert before != after
    assert after["package"] == "torch 99.0"
