"""Calls that may kill their process, made in child processes that are cheap to lose.

`ask(script, requests)` runs `python script`, which calls `serve(answer)`. That process imports torch and never touches
the GPU; for the calls it forks, so that a child costs a CUDA context and not an import of torch. A child answers one
request after the other until a fault poisons it or takes it down; then the next child goes on behind that request.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FAULT = "fault"
"""The outcome of a request whose child died, did not answer, or said so itself: that child is not asked again."""

SECONDS = 120
"""For one answer: the first one of a child makes a CUDA context and may compile a kernel."""

Answer = dict[str, Any]


def ask(script: Path, requests: Sequence[Any], *, workers: int | None = None, alone: bool = False) -> list[Answer]:
    """An answer with an "outcome" for each request, in order.

    Args:
        requests: values that JSON can hold.
        workers: processes that fork, each with a share of the requests; None: as many as there are cores, at most 16.
        alone: a child for every request.
    """
    count = max(1, min(workers or min(os.cpu_count() or 1, 16), len(requests)))
    with ThreadPoolExecutor(count) as pool:
        shares = list(pool.map(lambda i: _share(script, list(requests[i::count]), alone), range(count)))
    return [shares[i % count][i // count] for i in range(len(requests))]


def _share(script: Path, requests: list[Any], alone: bool) -> list[Answer]:
    done = subprocess.run(
        [sys.executable, str(script), *(["--alone"] if alone else [])],
        input="".join(json.dumps(request) + "\n" for request in requests),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        check=False,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(answers) != len(requests):
        raise RuntimeError(f"{script} answered {len(answers)} of {len(requests)} requests: {done.stderr[-2000:]}")
    return answers


def serve(answer: Callable[[Any], Answer], seconds: float = SECONDS) -> None:
    """Answer the requests on standard input, one line each, by `answer` in forked children."""
    requests = [json.loads(line) for line in sys.stdin]
    most = 1 if "--alone" in sys.argv else len(requests)
    answered = 0
    while answered < len(requests):
        for found in _forked(answer, requests[answered : answered + most], seconds):
            sys.stdout.write(json.dumps(found) + "\n")
            answered += 1
    sys.stdout.flush()


def _forked(answer: Callable[[Any], Answer], requests: list[Any], seconds: float) -> list[Answer]:
    """What one child answers, at least one answer."""
    reads, writes = os.pipe()
    with tempfile.TemporaryFile() as errors:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.close(reads)
            os.dup2(errors.fileno(), 2)
            _answer_all(answer, requests, writes)
        os.close(writes)
        received, late = b"", False
        while select.select([reads], [], [], seconds)[0]:
            more = os.read(reads, 65536)
            if not more:
                break
            received += more
        else:
            late = True
            os.kill(child, signal.SIGKILL)
        os.close(reads)
        _, status = os.waitpid(child, 0)
        answers = [json.loads(line) for line in received.decode().splitlines()]
        if len(answers) < len(requests) and (not answers or answers[-1]["outcome"] != FAULT):
            errors.seek(0)
            last = (errors.read().decode(errors="replace").strip().splitlines() or [""])[-1][:200]
            died = f"exit status {os.waitstatus_to_exitcode(status)}: {last}"
            answers.append({"outcome": FAULT, "error": f"no answer within {seconds:g} s" if late else died})
    return answers


def _answer_all(answer: Callable[[Any], Answer], requests: list[Any], writes: int) -> None:
    """In the child; does not return."""
    status = 1
    try:
        for request in requests:
            found = answer(request)
            os.write(writes, (json.dumps(found) + "\n").encode())
            if found["outcome"] == FAULT:
                break
        else:
            status = 0
    except BaseException as error:  # noqa: BLE001 - a forked child must never return into its parent's code
        os.write(2, f"\n{type(error).__name__}: {error}\n".encode())
    os._exit(status)
