"""Everything that docs/cuda-results.md is made of, in one call on a machine with NVIDIA GPUs. Standard library only.

    python tools/gpu_run.py                              all steps, one after the other
    python tools/gpu_run.py tests sanitize --out DIR     some of them
    python tools/gpu_run.py --gpus 4 tests: benchmarks:  the suite file by file, spread over four GPUs
    python tools/gpu_run.py --list                       the steps, with what they took on an H200

Each step is a process on one GPU with a time limit and a log file of its own, so that one that hangs or dies costs no
other. Needs no installation of this package, only its dependencies. The exit status is 1 when a step failed.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        arguments: of Python; `{out}` stands for the folder of results.
        seconds: that it takes, about. limit: after which it is ended.
        under: a program that runs Python, with its options.
        environment: added to that of every step.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: int
    limit: int
    under: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def _tests(name: str, *arguments: str, seconds: int, limit: int) -> Step:
    junit = ("--junitxml={out}/" + name.replace(":", "-") + ".xml", "-o", "junit_logging=system-out")
    return Step(name, ("-m", "pytest", "-m", "cuda", "-q", "-rs", "--durations=20", *junit, *arguments), seconds, limit)


def _benchmark(name: str, *arguments: str, seconds: int, limit: int) -> Step:
    return Step(
        f"benchmarks:{name}",
        ("-m", f"benchmarks.{name}", "--json", "{out}/" + name + ".json", *arguments),
        seconds,
        limit,
    )


SUITE_SECONDS = {
    "attention_cuda": 60,
    "contract_truth": 130,
    "doctor_cuda": 75,
    "fp8_cuda": 50,
    "fused_cuda": 25,
    "kernels_cuda": 40,
    "layers_cuda": 95,
    "pipeline_cuda": 170,
    "raw_calls": 25,
    "reduced_cuda": 25,
}
"""File of tests/cuda -> seconds on an H200; one that is not named here is taken for a minute."""


def _steps() -> dict[str, Step]:
    files = sorted(path.stem.removeprefix("test_") for path in (ROOT / "tests/cuda").glob("test_*.py"))
    steps = [
        # Files side by side: their many small kernels leave a GPU idle most of the time.
        _tests("tests", "-n", "4", "--dist", "loadfile", seconds=230, limit=570),
        *(
            _tests(f"tests:{name}", f"tests/cuda/test_{name}.py", seconds=SUITE_SECONDS.get(name, 60), limit=400)
            for name in files
        ),
        _tests("tests:rest", "tests", "--ignore=tests/cuda", seconds=60, limit=300),
        Step(
            "sanitize",
            ("-m", "pytest", "-q", "-rs", "tests/cuda/test_reduced_cuda.py"),
            40,
            300,
            under=(
                shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer",
                *("--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "1"),
            ),
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        ),
        _benchmark("guard_cost", "--rounds", "25", seconds=60, limit=180),
        _benchmark("attention", seconds=75, limit=200),
        _benchmark("linear", seconds=45, limit=150),
        _benchmark("fused", seconds=60, limit=250),
        _benchmark("vram", seconds=60, limit=200),
        _benchmark("vae", seconds=45, limit=150),
        _benchmark("forward", seconds=75, limit=300),
        _benchmark("window", "--profile", seconds=150, limit=300),
        _benchmark("stream", seconds=300, limit=500),
        _benchmark("lipsync", seconds=210, limit=400),
        _benchmark("block_swap", "--rounds", "3", seconds=80, limit=300),
        Step(
            "doctor",
            ("-m", "wanvideo_infinitetalk.cli", "doctor", "--report", "{out}/doctor.json"),
            40,
            200,
        ),
    ]
    return {step.name: step for step in steps}


STEPS = _steps()
DEFAULT = [name for name in STEPS if not name.startswith("tests:")]


def chosen(names: Sequence[str]) -> list[Step]:
    """The steps of these names, each once; "benchmarks:" stands for all whose names begin so."""
    found: dict[str, Step] = {}
    for name in names:
        matching = [n for n in STEPS if n == name or (name.endswith(":") and n.startswith(name))]
        if not matching:
            raise SystemExit(f"there is no step '{name}': choose of {', '.join(STEPS)}")
        found |= {n: STEPS[n] for n in matching}
    return list(found.values())


# ------------------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Outcome:
    """How a step ended: `code` None where it ran past its limit or was not begun."""

    step: Step
    code: int | None
    seconds: float
    last: str

    def __str__(self) -> str:
        verdict = {0: "ok", None: "not finished"}.get(self.code, f"FAILED ({self.code})")
        return f"{self.step.name}: {verdict}, {self.seconds:.0f} s: {self.last}"


def run(step: Step, gpu: int | None, out: Path, threads: int, limit: float) -> Outcome:
    """Run one step on one GPU, at most `limit` seconds; its output goes to a log file."""
    if limit < 10:
        return Outcome(step, None, 0.0, "no time was left to begin it")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in (str(ROOT / ".build"), os.environ.get("PYTHONPATH", "")) if p),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "INFINITETALK_CACHE": str(out / "cache"),
        **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}),
        **step.environment,
    }
    command = [*step.under, sys.executable, *(word.format(out=out) for word in step.arguments)]
    log = out / f"{step.name.replace(':', '-')}.log"
    begin = time.monotonic()
    with log.open("w") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            file.write(f"{error}\n")
            return Outcome(step, 127, 0.0, str(error))
        code: int | None
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            file.write(f"\nended after {limit:.0f} s\n")
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Outcome(step, code, time.monotonic() - begin, lines[-1][:160] if lines else "")


def run_all(steps: Sequence[Step], gpus: int, out: Path, seconds: float) -> Iterator[Outcome]:
    """Outcomes as they come: one step at a time on each GPU, the longest first, all of it within `seconds`."""
    deadline = time.monotonic() + seconds
    waiting: queue.SimpleQueue[Step | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    for step in sorted(steps, key=lambda s: -s.seconds) if gpus > 1 else steps:
        waiting.put(step)
    threads = max(1, (os.cpu_count() or 1) // gpus)

    def worker(gpu: int) -> None:
        waiting.put(None)
        while (step := waiting.get()) is not None:
            limit = min(step.limit, deadline - time.monotonic())
            done.put(run(step, gpu if gpus > 1 else None, out, threads, limit))

    for gpu in range(gpus):
        threading.Thread(target=worker, args=(gpu,), daemon=True).start()
    for _ in steps:
        yield done.get()


def pack(out: Path, archive: Path) -> None:
    """Logs, figures and the page in one file."""
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted(out.iterdir()):
            if path.suffix in (".log", ".json", ".xml", ".md", ".txt"):
                tar.add(path, path.name)


def write_page(out: Path) -> None:
    """`out`/cuda-results.md from what the steps left there."""
    known = [name.removeprefix("benchmarks:") for name in STEPS if name.startswith("benchmarks:")] + ["doctor"]
    options = {
        "--junit": sorted(out.glob("tests*.xml")),
        "--json": [path for name in known if (path := out / f"{name}.json").exists()],
        "--sanitizer": list(out.glob("sanitize.log")),
    }
    words = [word for option, paths in options.items() if paths for word in (option, *map(str, paths))]
    if words:
        command = [sys.executable, str(ROOT / "tools/cuda_results.py"), *words, "--out", str(out / "cuda-results.md")]
        subprocess.run(command, check=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder of results (%(default)s)")
    parser.add_argument("--archive", type=Path, metavar="F.tgz", help="pack the results into one file, too")
    parser.add_argument("--gpus", type=int, default=1, help="run as many steps at a time (%(default)s)")
    parser.add_argument("--minutes", type=float, default=60, help="for all steps together (%(default)s)")
    parser.add_argument("--list", action="store_true", help="name the steps and end")
    arguments = parser.parse_args(argv)
    if arguments.list:
        for step in STEPS.values():
            sys.stdout.write(f"{step.name:28} {step.seconds:4} s, at most {step.limit} s\n")
        return 0
    steps = chosen(arguments.steps or DEFAULT)
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    # The repository root is the package; the link gives it its name.
    (ROOT / ".build").mkdir(exist_ok=True)
    link = ROOT / ".build/wanvideo_infinitetalk"
    if not link.exists():
        link.symlink_to("..", target_is_directory=True)
    failed = False
    summary = out / "summary.txt"
    summary.write_text("")
    for outcome in run_all(steps, arguments.gpus, out, arguments.minutes * 60):
        failed = failed or outcome.code != 0
        sys.stdout.write(f"{outcome}\n")
        sys.stdout.flush()
        with summary.open("a") as file:
            file.write(f"{outcome}\n")
        if arguments.archive is not None:
            pack(out, arguments.archive)
    write_page(out)
    if arguments.archive is not None:
        pack(out, arguments.archive)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
