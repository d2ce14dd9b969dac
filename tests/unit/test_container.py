"""The container's files: what they copy exists, root does not run it, and its commands are those of the command line.

The images themselves are not built here.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from wanvideo_infinitetalk.cli.parser import parser

ROOT = Path(__file__).parents[2]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Name of a stage of the Dockerfile -> its instructions, those of the stage that it begins with included."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    found: dict[str, list[tuple[str, str]]] = {}
    for line in text.splitlines():
        if line.startswith("FROM"):
            before, name = re.fullmatch(r"FROM (\S+) AS (\S+)", line).groups()
            found[name] = [("FROM", before), *found.get(before, [])]
        elif line and not line.startswith("#"):
            found[name].append(tuple(line.split(maxsplit=1)))
    return found


def values(stage: str, instruction: str) -> list[str]:
    return [value for name, value in stages()[stage] if name == instruction]


def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))


TARGETS = ("cpu", "cuda")


@pytest.mark.parametrize("target", TARGETS, ids=["on a CPU", "on a GPU"])
def test_each_target_runs_the_script_and_not_as_root(target: str) -> None:
    runs = values(target, "RUN")
    assert runs == [f'CONTAINER=1 EXTRAS="$EXTRAS" sh /src/tools/container_setup.sh {target}']
    assert values(target, "USER") == ["infinitetalk"]
    names = [name for name, _ in stages()[target]]
    assert names.index("USER") > names.index("RUN"), "the script makes the user"
    script = (ROOT / "tools/container_setup.sh").read_text(encoding="utf-8")
    assert "useradd --uid 1000 --create-home infinitetalk" in script
    assert values(target, "VOLUME") == ["/data"]
    assert names.index("VOLUME") > names.index("RUN"), "the script makes the folder, for the user"


def test_what_pip_needs_is_copied() -> None:
    """`.dockerignore` leaves out all but what it names."""
    assert values("base", "COPY") == [". /src"]
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    assert [name for name in kept if not (ROOT / name).exists()] == []
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = re.findall(r'^    "wanvideo_infinitetalk\.(\w+)"', text, re.MULTILINE)
    packages = [name for name in named if (ROOT / name).is_dir()]
    assert {*packages, "README.md", "pyproject.toml", "py.typed", "tools/container_setup.sh"} <= kept
    assert {path.name for path in ROOT.glob("*.py")} <= kept


def commands() -> list[list[str]]:
    services = [service["command"] for service in compose()["services"].values()]
    return [json.loads(values("base", "CMD")[0]), *services]


def test_commands_are_those_of_the_command_line_and_need_tokens() -> None:
    assert values("base", "ENTRYPOINT") == ['["infinitetalk"]']
    for command in commands():
        args = parser().parse_args(command)
        assert (args.command, str(args.folder), args.host) == ("serve", "/data", "0.0.0.0")
        assert str(args.tokens) == "/run/secrets/tokens"


def test_the_health_check_asks_the_service() -> None:
    check = values("base", "HEALTHCHECK")[0]
    code = json.loads(check.partition("CMD ")[2])[2]
    compile(code, "HEALTHCHECK", "exec")
    assert "http://127.0.0.1:8000/health" in code
    assert values("base", "EXPOSE") == ["8000"]


def test_compose_opens_the_port_to_this_machine_alone() -> None:
    services = compose()["services"]
    assert set(services) == set(TARGETS)
    for name, service in services.items():
        assert service["build"] == {"context": ".", "target": name}
        assert service["ports"] == ["127.0.0.1:8000:8000"]
        assert service["secrets"] == list(compose()["secrets"])
        assert ("deploy" in service) == (name == "cuda")


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs sh")
def test_the_script_installs_with_pip_what_its_target_names(tmp_path: Path) -> None:
    """With a Python that notes what it is asked for."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    python.chmod(0o755)
    script = str(ROOT / "tools/container_setup.sh")
    for target, index in (("cpu", " --index-url https://download.pytorch.org/whl/cpu"), ("cuda", "")):
        subprocess.run(["sh", script, target], check=True, env={"PATH": "/usr/bin:/bin", "PYTHON": str(python)})
        torch, package, command = (tmp_path / "asked").read_text().splitlines()
        assert torch == f"-m pip install --no-cache-dir{index} torch>=2.8"
        assert package == f"-m pip install --no-cache-dir {ROOT}[web]"
        assert command == "-m wanvideo_infinitetalk.cli --help"
        (tmp_path / "asked").unlink()
    failed = subprocess.run(["sh", script, "gpu"], env={"PYTHON": sys.executable}, capture_output=True, text=True)
    assert failed.returncode == 2
    assert "cpu|cuda" in failed.stderr
