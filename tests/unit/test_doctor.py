"""The doctor: what is supported, why not, how accurate, and what its exit code says."""

import dataclasses
import json

import pytest
import torch
from wanvideo_infinitetalk.cli import doctor
from wanvideo_infinitetalk.cli.parser import main
from wanvideo_infinitetalk.fp8_optimization import QUANTIZATIONS
from wanvideo_infinitetalk.wanvideo.modules import attention as modes
from wanvideo_infinitetalk.wanvideo.modules.backends import RUNTIME


@pytest.fixture(scope="module")
def report():
    return doctor.examine(torch.device("cpu"))


def test_every_mode_and_backend_has_a_row(report):
    rows = {(row.mode, row.kernel) for row in report.kernels}
    assert rows == {(mode, name) for mode, names in modes.MODE_BACKENDS.items() for name in names}
    assert [row.quantization for row in report.linears] == list(QUANTIZATIONS)


def test_each_quantization_says_how_it_runs_here(report):
    how = {row.quantization: row.how for row in report.linears}
    assert how.pop("fp4_scaled").startswith("fp4, unpacked per call instead of the FP4 matmul (it runs on cuda")
    assert how.pop("disabled") == "bfloat16"
    assert how == {name: f"{name} (computed in float32)" if name.endswith("_fast") else name for name in how}


def test_each_precision_is_supported_without_a_gpu(report):
    assert report.precisions == {"16-bit": True, "8-bit": True, "4-bit": True}
    assert report.healthy


def test_accuracy_is_measured(report):
    by_kernel = {row.kernel: row for row in report.kernels}
    assert by_kernel["sdpa"].cosine > 0.9999
    assert 0.995 < by_kernel["emulated_nvfp4"].cosine < 0.9999
    assert 0.999 < by_kernel["emulated_fp8"].cosine < 0.99999
    assert by_kernel["emulated_nvfp4"].relative_l2 > by_kernel["emulated_fp8"].relative_l2 > 0


def test_one_kernel_per_mode_is_the_one_it_takes(report):
    for mode in {row.mode for row in report.kernels if row.supported}:
        assert sum(row.first for row in report.kernels if row.mode == mode) == 1


def test_what_cannot_run_says_why(report):
    row = next(r for r in report.kernels if r.kernel == "sageattn3_block_means")
    assert not row.supported
    assert any("cpu" in reason for reason in row.reasons)
    assert row.advice == ""  # installing the package would not help on a CPU


def test_advice_is_given_where_only_the_package_is_missing():
    name = "sageattn3_block_means"
    assert doctor._advice(name, ("the package sageattn3 is not installed",)).startswith("install sageattn3")
    assert doctor._advice(name, ("the package sageattn3 is not installed", "another GPU")) == ""


def test_a_precision_without_any_kernel_is_unhealthy():
    for name in modes.MODE_BACKENDS["sageattn_3_fp4"]:
        RUNTIME.reject(name, "not today")
    try:
        sick = doctor.examine(torch.device("cpu"))
    finally:
        for name in modes.MODE_BACKENDS["sageattn_3_fp4"]:
            RUNTIME.reject(name, None)
    assert sick.precisions == {"16-bit": True, "8-bit": True, "4-bit": False}
    assert not sick.healthy
    assert any("not today" in row.verdict for row in sick.kernels)


def test_a_kernel_that_raises_is_a_row_of_the_report(monkeypatch):
    run = doctor.run_backend

    def broken(name, *given):
        if name == "emulated_fp8":
            raise RuntimeError("CUDA error: invalid argument\nmore of it")
        return run(name, *given)

    monkeypatch.setattr(doctor, "run_backend", broken)
    sick = doctor.examine(torch.device("cpu"))
    row = next(r for r in sick.kernels if r.kernel == "emulated_fp8")
    assert row.reasons == ("it fails: CUDA error: invalid argument",)
    assert sick.precisions["8-bit"] is False


def test_the_report_is_json(report):
    again = json.loads(json.dumps(report.as_json()))
    assert again["healthy"] is True
    assert again["environment"]["torch"] == torch.__version__


def test_the_command_prints_the_tables_and_writes_the_report(capsys, tmp_path):
    file = tmp_path / "report.json"
    assert main(["doctor", "--device", "cpu", "--report", str(file)]) == 0
    out = capsys.readouterr().out
    assert all(mode in out for mode in modes.MODE_BACKENDS)
    assert all(quantization in out for quantization in QUANTIZATIONS)
    assert f"report: {file}" in out
    assert json.loads(file.read_text())["healthy"] is True


def test_the_command_ends_with_2_when_a_precision_has_no_kernel(capsys, monkeypatch, report):
    sick = dataclasses.replace(report, precisions={"16-bit": True, "8-bit": False, "4-bit": True})
    monkeypatch.setattr(doctor, "examine", lambda device: sick)
    assert main(["doctor", "--device", "cpu"]) == 2
    assert "No attention mode of 8-bit is supported here" in capsys.readouterr().err
