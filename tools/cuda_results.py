"""Write docs/cuda-results.md from what the GPU suite and the benchmarks left behind. Standard library only.

python -m pytest -m cuda --junitxml=cuda.xml -o junit_logging=system-out
make sanitize 2>&1 | tee sanitize.log
python -m benchmarks.guard_cost --json guards.json      (and the others)
(or all of these, with a log for each: python tools/gpu_run.py)
python tools/cuda_results.py --junit cuda.xml --sanitizer sanitize.log --json guards.json ... --out docs/cuda-results.md
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

MACHINE = ("gpu", "driver", "torch")
"""Facts of which one that differs makes figures incomparable; tables from elsewhere say so."""

COLOR = re.compile(r"(\x1b|#x1B)\[[0-9;]*m")
HEADING = re.compile(r"^-+ Captured \w+ -+$", re.MULTILINE)
COUNTING = re.compile(r"ERROR SUMMARY|\d+ (passed|failed|skipped|errors?)\b.* in [\d.]+s")
GLIBC = re.compile(r"-with-glibc([\d.]+)$")
LONG = 20
"""Rows of a table, and lines of text, from which on it is folded."""


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Test:
    """One test case of a JUnit file; `outcome` is passed, failed, error or skipped."""

    file: str
    name: str
    outcome: str
    seconds: float
    message: str
    printed: str
    figures: dict[str, str]


@dataclass
class Suite:
    """A JUnit file: its tests, the facts about the machine that ran them, and the seconds that it took."""

    tests: list[Test] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def read_junit(path: Path) -> Suite:
    suite = Suite()
    for element in ET.parse(path).iter("testsuite"):
        suite.facts |= _properties(element)
        suite.tests += [_test(case) for case in element.iter("testcase")]
        suite.seconds += float(element.get("time", 0))
    return suite


def _properties(element: ET.Element) -> dict[str, str]:
    found = {p.get("name", ""): p.get("value", "") for p in element.findall("properties/property")}
    return {name: _fact(name, value) for name, value in found.items()}


def _test(case: ET.Element) -> Test:
    outcome, message = "passed", ""
    for kind, called in (("skipped", "skipped"), ("failure", "failed"), ("error", "error")):
        found = case.find(kind)
        if found is not None:
            outcome, message = called, found.get("message", "")
    return Test(
        # A file that is skipped as a whole has a name alone.
        file=(case.get("classname") or case.get("name") or "").split(".")[-1],
        name=case.get("name", ""),
        outcome=outcome,
        seconds=float(case.get("time", 0)),
        message=message,
        printed=_plain("\n".join(out.text or "" for out in case.findall("system-out"))),
        figures=_properties(case),
    )


def _plain(text: str) -> str:
    """Without colors, and without what pytest writes above captured output."""
    return HEADING.sub("", COLOR.sub("", text)).strip()


# ------------------------------------------------------------------------------------------------------------- writing


def page(suites: Sequence[Suite], benchmarks: Sequence[tuple[str, Mapping[str, Any]]], sanitizer: Sequence[str]) -> str:
    """The whole page.

    Args:
        benchmarks: name of the file and its content.
        sanitizer: outputs of compute-sanitizer.
    """
    machines = [suite.facts for suite in suites] + [_facts(content) for _, content in benchmarks]
    machine = next((facts for facts in machines if facts), {})
    tests, seconds = [t for suite in suites for t in suite.tests], sum(suite.seconds for suite in suites)
    verdicts = [*_summary(tests, bool(suites), sanitizer), *(_verdict(name, content) for name, content in benchmarks)]
    parts = [
        "# Results on the GPU",
        "What the GPU suite and the benchmarks gave on one machine. `tools/cuda_results.py` writes this page; long "
        "tables are folded.",
        *(["## Summary", table(verdicts)] if verdicts else []),
        table([{"": name, "value": value} for name, value in machine.items()]) if machine else "",
    ]
    if suites:
        parts += ["## Tests", *_tests(tests, seconds)]
    if sanitizer:
        parts += ["## Memory checker", *(_sanitizer(log) for log in sanitizer)]
    if benchmarks:
        parts += ["## Benchmarks"]
    for name, content in benchmarks:
        parts += _benchmark(name, content, machine)
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(tests: Sequence[Test], any_suite: bool, sanitizer: Sequence[str]) -> Iterator[dict[str, str]]:
    """What the suite and the memory checker gave, in a row each."""
    if any_suite:
        counts = Counter(test.outcome for test in tests)
        bad = counts["failed"] + counts["error"]
        yield {
            "what": "[tests](#tests)",
            "result": f"**{bad} failed**" if bad else "none failed",
            "": f"{counts['passed']} of {len(tests)} passed, {counts['skipped']} skipped",
        }
    if sanitizer:
        errors = sum(int(n) for log in sanitizer for n in re.findall(r"ERROR SUMMARY: (\d+) error", _plain(log)))
        finished = all("ERROR SUMMARY" in log for log in sanitizer)
        result = f"**{errors} errors**" if errors else "no error" if finished else "**no summary found**"
        yield {"what": "[memory checker](#memory-checker)", "result": result, "": ""}


def _verdict(name: str, content: Mapping[str, Any]) -> dict[str, str]:
    """What a benchmark gave, in a row: how many of its goals were met, and those that were not."""
    title = str(content.get("title", name))
    judged = [goal for goal in content.get("goals", []) if goal.get("met") is not None]
    missed = [goal for goal in judged if not goal["met"]]
    failures = len(content.get("failures", []))
    result = f"{len(judged) - len(missed)} of {len(judged)} goals met" if judged else "no goals"
    return {
        "what": f"[{title}](#{_anchor(title)})",
        "result": f"**{failures} failures**" if failures else f"**{result}**" if missed else result,
        "": "; ".join(f"{goal['what']}: {_cell(goal['value'])}, at most {_cell(goal['limit'])}" for goal in missed),
    }


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _tests(tests: Sequence[Test], seconds: float) -> Iterator[str]:
    counts = Counter(test.outcome for test in tests)
    summary = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "error", "skipped"))
    of_tests = sum(test.seconds for test in tests)
    together = f" ({of_tests:.0f} s of tests, several at a time)" if of_tests > 1.1 * seconds > 0 else ""
    yield f"`pytest -m cuda`: {len(tests)} tests in {seconds or of_tests:.0f} s{together}: {summary}."
    yield table(
        [_file_row(file, [t for t in tests if t.file == file]) for file in dict.fromkeys(t.file for t in tests)]
    )
    bad = [test for test in tests if test.outcome in ("failed", "error")]
    if bad:
        yield "### Failed"
        yield "\n".join(f"* `{test.file}::{test.name}`: {_first_line(test.message)}" for test in bad)
    skipped = Counter(test.message for test in tests if test.outcome == "skipped")
    if skipped:
        yield "### Skipped, and why"
        yield "\n".join(f"* {count} tests: {_first_line(reason)}" for reason, count in skipped.most_common())
    yield from _figures(tests)
    printing = [test for test in tests if test.printed]
    if printing:
        yield "### What the tests printed"
        yield folded("output", "```text\n" + "\n\n".join(test.printed for test in printing) + "\n```")


def _file_row(file: str, tests: Sequence[Test]) -> dict[str, str | int]:
    counts = Counter(test.outcome for test in tests)
    return {
        "file": file,
        "tests": len(tests),
        **{outcome: counts[outcome] for outcome in ("passed", "failed", "error", "skipped")},
        "seconds": f"{sum(test.seconds for test in tests):.1f}",
    }


def _figures(tests: Sequence[Test]) -> Iterator[str]:
    """What tests recorded, one table per test function and figure; two parameters become rows and columns."""
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for test in tests:
        function, _, case = test.name.partition("[")
        for name, value in test.figures.items():
            groups.setdefault((function, name), {})[case.rstrip("]")] = value
    if groups:
        yield "### Figures"
    for (function, name), values in groups.items():
        yield f"`{function}`: {name}"
        yield table(_pivot(values))


def _pivot(values: Mapping[str, str]) -> list[dict[str, str]]:
    cases = {tuple(case.split("-")): value for case, value in values.items()}
    if any(len(case) != 2 for case in cases):
        return [{"case": case, "value": value} for case, value in values.items()]
    columns = dict.fromkeys(case[0] for case in cases)
    rows = dict.fromkeys(case[1] for case in cases)
    return [{"": row} | {column: cases.get((column, row), "") for column in columns} for row in rows]


def _sanitizer(log: str) -> str:
    """The lines of its output that count: what pytest says at the end, and the checker's summary."""
    kept = [line for line in _plain(log).splitlines() if COUNTING.search(line)]
    return "```text\n" + "\n".join(kept or ["no summary found"]) + "\n```"


def _benchmark(name: str, content: Mapping[str, Any], machine: Mapping[str, str]) -> Iterator[str]:
    yield f"### {content.get('title', name)}"
    facts = _facts(content)
    other = {key: facts[key] for key in MACHINE if facts.get(key) and facts[key] != machine.get(key)}
    if other:
        yield "Measured on another machine: " + ", ".join(f"{key} {value}" for key, value in other.items()) + "."
    if content.get("command"):
        yield f"`{content['command']}`" + (" (small sizes: a try, no measurement)" if content.get("small") else "")
    for failure in content.get("failures", []):
        yield f"**Failed:** {failure}"
    yield from _goals(content.get("goals", []))
    if "tables" in content:
        for one in content["tables"]:
            yield one["title"]
            yield folded(f"{len(one['rows'])} rows", table(one["rows"]))
    else:
        yield from _anything(content)


def _goals(goals: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    verdicts = {True: "met", False: "**missed**", None: "not judged"}
    if goals:
        rows = [
            {"goal": g["what"], "value": g["value"], "at most": g["limit"], "": verdicts[g.get("met")]} for g in goals
        ]
        yield folded(f"{len(goals)} goals", table(rows))


def _anything(content: Mapping[str, Any]) -> Iterator[str]:
    """A JSON object of unknown form: lists of objects as tables, the rest as a list."""
    known = ("title", "command", "environment", "benchmark", "small", "goals", "failures")
    rest = {key: value for key, value in content.items() if key not in known}
    for key, value in rest.items():
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            yield key.replace("_", " ")
            yield folded(f"{len(value)} rows", table(value))
    plain = {k: v for k, v in rest.items() if not (isinstance(v, list) and v and isinstance(v[0], dict))}
    if plain:
        yield "\n".join(f"* {key.replace('_', ' ')}: {_cell(value)}" for key, value in plain.items())


def _facts(content: Mapping[str, Any]) -> dict[str, str]:
    facts = content.get("environment", {})
    return {str(key): _fact(str(key), str(value)) for key, value in facts.items()} if isinstance(facts, dict) else {}


def _fact(name: str, value: str) -> str:
    """A fact about the machine; of the system its name and C library, not the build of its kernel."""
    if name != "system":
        return value
    found = GLIBC.search(value)
    return value.split("-")[0] + (f", glibc {found[1]}" if found else "")


def folded(summary: str, text: str) -> str:
    """The text, behind a line that opens it where it is long."""
    if text.count("\n") <= LONG:
        return text
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table; its columns are all keys, in the order in which they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return "; ".join(_cell(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
    return str(value).replace("|", "\\|").replace("\n", " ")


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[0]


# ---------------------------------------------------------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--junit", type=Path, nargs="+", default=[], metavar="F.xml", help="of pytest --junitxml")
    parser.add_argument("--json", type=Path, nargs="+", default=[], metavar="G.json", help="of benchmarks and doctor")
    parser.add_argument("--sanitizer", type=Path, nargs="+", default=[], metavar="L.log", help="of make sanitize")
    parser.add_argument("--out", type=Path, default=Path("docs/cuda-results.md"), help="the page (%(default)s)")
    arguments = parser.parse_args(argv)
    written = page(
        [read_junit(path) for path in arguments.junit],
        [(path.stem, json.loads(path.read_text())) for path in arguments.json],
        [path.read_text(errors="replace") for path in arguments.sanitizer],
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(written)
    sys.stdout.write(f"{arguments.out}: {len(written.splitlines())} lines\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
