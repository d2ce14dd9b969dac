"""Self-tests: a backend that crashes, hangs or is wrong in a child process is rejected with the reason."""

import json
import runpy
import textwrap

import pytest
import torch
from support.corruptions import JSONS, VALUES
from wanvideo_infinitetalk.cli.parser import main
from wanvideo_infinitetalk.wanvideo.errors import BackendUnavailableError
from wanvideo_infinitetalk.wanvideo.kernels import selftest
from wanvideo_infinitetalk.wanvideo.modules import attention as modes
from wanvideo_infinitetalk.wanvideo.modules.backends import RUNTIME, lookup, runtime, unavailable_reasons, unregister

CPU = torch.device("cpu")

PLUGIN = """
import os, sys, time
import torch
from wanvideo_infinitetalk.wanvideo.modules.backends import Backend, Contract, Device, Package, register
from wanvideo_infinitetalk.wanvideo.modules.backends.contract import head_dims
from wanvideo_infinitetalk.wanvideo.modules.backends.sdpa import run_eager

def run(inputs):
    q, k = inputs.q, inputs.k
    {body}
    return run_eager(inputs)

device = Device(types=("cpu",), package=Package("torch", ">=2", "torch"))
register(Backend("{name}", Contract(dtypes=(torch.bfloat16,), head_dim=head_dims(64), device=device), run))
"""


@pytest.fixture
def backend(tmp_path, monkeypatch):
    """Registers a backend from a file of its own, as a binary package's adapter would be; returns its name."""
    monkeypatch.setenv(selftest.SWITCH, "on")
    monkeypatch.setenv("INFINITETALK_CACHE", str(tmp_path / "cache"))
    RUNTIME.forget_availability()
    names = []

    def make(body: str) -> str:
        name = f"tested_{len(names)}"
        file = tmp_path / f"{name}.py"
        file.write_text(PLUGIN.format(body=textwrap.indent(body, "    ").strip(), name=name))
        runpy.run_path(str(file))
        names.append(name)
        return name

    yield make
    for name in names:
        unregister(name)
    RUNTIME.forget_availability()


def test_a_right_backend_is_used_and_the_verdict_is_kept(backend, monkeypatch):
    name = backend("pass")
    assert unavailable_reasons(name, CPU) == ()
    kept = json.loads(selftest.cache_file().read_text())
    (stored,) = kept.values()
    assert stored["ok"]
    assert stored["cosine"] > 0.999
    assert stored["cases"] >= 6
    # The second process does not test again.
    RUNTIME.forget_availability()
    monkeypatch.setattr(runtime, "in_child", lambda *a, **k: pytest.fail("tested again"))
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
def test_a_bad_backend_is_rejected_with_its_reason(backend, body, reason):
    name = backend(body)
    (why,) = unavailable_reasons(name, CPU)
    assert "failed its self-test" in why
    assert reason in why
    x = torch.randn(1, 16, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(BackendUnavailableError, match="failed its self-test"):
        modes.run_backend(name, x, x, x)


def test_a_hang_is_a_verdict(backend):
    result = runtime.self_test(lookup(backend("time.sleep(60)")), CPU, timeout=5)
    assert not result.ok
    assert result.reason == "it does not answer within 5 seconds"


def test_a_mode_goes_on_with_its_next_backend(backend, monkeypatch):
    name = backend("os.abort()")
    monkeypatch.setitem(modes.MODE_BACKENDS, "sageattn_3_fp8", (name, "emulated_fp8"))
    q, k, v = (torch.randn(1, 64, 2, 64, dtype=torch.bfloat16) for _ in range(3))
    out = modes.attention(q, k, v, "sageattn_3_fp8")
    expected = modes.attention(q, k, v, "eager")
    assert torch.cosine_similarity(out.float().flatten(), expected.float().flatten(), 0) > 0.99


def test_the_doctor_survives_a_package_that_kills_its_process(backend, monkeypatch, capsys, tmp_path):
    name = backend("os.abort()")
    monkeypatch.setitem(modes.MODE_BACKENDS, "sageattn_3_fp8", (name, "emulated_fp8"))
    file = tmp_path / "report.json"
    assert main(["doctor", "--device", "cpu", "--report", str(file)]) == 0
    assert name in capsys.readouterr().out
    rows = {row["kernel"]: row for row in json.loads(file.read_text())["kernels"] if row["mode"] == "sageattn_3_fp8"}
    assert "it kills its process (SIGABRT)" in rows[name]["reasons"][0]
    assert not rows[name]["supported"]
    assert rows["emulated_fp8"]["first"]


def test_backends_without_a_package_need_no_self_test(monkeypatch):
    monkeypatch.setenv(selftest.SWITCH, "on")
    monkeypatch.setattr(runtime, "in_child", lambda *a, **k: pytest.fail("tested"))
    RUNTIME.forget_availability()
    assert unavailable_reasons("sdpa", CPU) == ()
    assert unavailable_reasons("emulated_nvfp4", CPU) == ()


@pytest.mark.parametrize("text", JSONS)
def test_a_damaged_cache_is_written_anew(monkeypatch, tmp_path, caplog, text):
    monkeypatch.setenv("INFINITETALK_CACHE", str(tmp_path))
    content = JSONS[text]
    selftest.cache_file().write_bytes(content if isinstance(content, bytes) else content.encode())
    tested = []

    def test() -> selftest.Verdict:
        tested.append(1)
        return selftest.Verdict("x", True)

    for _ in range(2):
        assert selftest.kept_verdict("x", None, CPU, test).ok
    assert len(tested) == 1
    assert len(json.loads(selftest.cache_file().read_text())) >= 1
    assert text == "large number" or "testing again" in caplog.text


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize("field", [None, "backend", "ok", "reason", "cosine", "cases", "more"])
def test_a_damaged_verdict_is_made_anew(monkeypatch, tmp_path, field, value, caplog):
    monkeypatch.setenv("INFINITETALK_CACHE", str(tmp_path))
    good = selftest.Verdict("x", True, "", 0.5, 3)
    selftest.kept_verdict("x", None, CPU, lambda: good)
    stored = json.loads(selftest.cache_file().read_text())
    (key,) = stored
    stored[key] = value if field is None else {**stored[key], field: value}
    selftest.cache_file().write_text(json.dumps(stored))
    again = selftest.kept_verdict("x", None, CPU, lambda: good)
    kept = type(value) is {"ok": bool, "backend": str, "reason": str, "cases": int}.get(str(field))
    kept |= field == "cosine" and type(value) in (int, float, type(None))
    if kept:
        assert json.loads(selftest.cache_file().read_text()) == json.loads(json.dumps(stored))
    else:
        assert again == good
        assert "is damaged: testing again" in caplog.text
        assert json.loads(selftest.cache_file().read_text())[key]["cases"] == 3


def test_the_verdict_depends_on_versions(monkeypatch):
    before = selftest.environment("torch", CPU)
    monkeypatch.setattr(selftest.packages, "installed_version", lambda name: "99.0")
    after = selftest.environment("torch", CPU)
    assert before != after
    assert after["package"] == "torch 99.0"


def test_a_new_driver_is_tested_again(monkeypatch):
    """The driver compiles what a package launches, so that a verdict is one on a driver too."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    gpu = torch.device("cuda", 0)
    keys = set()
    for driver in ("550.54", "580.65", "580.65"):
        monkeypatch.setattr(selftest, "_driver", lambda index, driver=driver: driver)
        assert selftest.environment(None, gpu)["driver"] == driver
        keys.add(selftest._key("sageattn3", None, gpu))
    assert len(keys) == 2


def test_an_answer_is_kept_until_the_reset_but_not_one_that_raised():
    answers, asked = selftest.SelfTests(), []

    def ask():
        asked.append(len(asked))
        if len(asked) == 1:
            raise torch.OutOfMemoryError("full")
        return ["no"]

    with pytest.raises(torch.OutOfMemoryError):
        answers.reasons("question", CPU, ask)
    assert [answers.reasons("question", CPU, ask) for _ in range(3)] == [("no",)] * 3
    assert len(asked) == 2
    answers.reset()
    answers.reasons("question", CPU, ask)
    assert len(asked) == 3
