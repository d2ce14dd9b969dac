"""A real ComfyUI in a process of its own, and what it is asked over HTTP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path
from typing import Any

from support.workflows import ROOT

PACK = "wanvideo_infinitetalk"


class Server:
    """ComfyUI started from `comfyui` with `python`, its models and outputs below `base`, this pack its only one."""

    def __init__(self, comfyui: Path, python: str, base: Path) -> None:
        self.base = base
        self.log_file = base / "comfyui.log"
        for folder in ("custom_nodes", "input", "output", "user", "temp", "models"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        (base / "custom_nodes" / PACK).symlink_to(ROOT, target_is_directory=True)
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [python, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(base), "--database-url", f"sqlite:///{base / 'user' / 'comfyui.db'}"]
        command += ["--preview-method", "auto", "--disable-api-nodes"]
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=comfyui, stdout=log, stderr=subprocess.STDOUT, env=os.environ | offline
            )
        self._wait_until_up()

    def _wait_until_up(self, seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended at once:\n{self.log[-3000:]}")
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.5)
        self.close()
        raise TimeoutError(f"ComfyUI did not answer within {seconds} s:\n{self.log[-3000:]}")

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    # --- HTTP ----------------------------------------------------------------------------------------------------

    def fetch(self, path: str, data: Any = None) -> tuple[int, bytes]:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"} if body else {})
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def get(self, path: str) -> Any:
        status, body = self.fetch(path)
        assert status == 200, f"{path}: {status} {body[:300]!r}"
        return json.loads(body)

    def post(self, path: str, data: Any) -> tuple[int, Any]:
        status, body = self.fetch(path, data)
        return status, json.loads(body) if body else None

    def queue(self, prompt: dict[str, Any]) -> str:
        """Queue an API-format prompt that ComfyUI finds valid; its id."""
        status, answer = self.post("/prompt", {"prompt": prompt, "client_id": uuid.uuid4().hex})
        assert status == 200, answer
        assert not answer["node_errors"], answer["node_errors"]
        return answer["prompt_id"]

    def wait(self, prompt_id: str, seconds: float = 300) -> dict[str, Any]:
        """What became of a prompt: its entry in the history."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry:
                return entry
            time.sleep(0.3)
        raise TimeoutError(f"the prompt was not done within {seconds} s:\n{self.log[-2000:]}")

    def run(self, prompt: dict[str, Any], seconds: float = 300) -> dict[str, Any]:
        return self.wait(self.queue(prompt), seconds)

    def download(self, file: dict[str, str], folder: Path) -> Path:
        query = urllib.parse.urlencode({key: file.get(key, "") for key in ("filename", "subfolder", "type")})
        status, body = self.fetch(f"/view?{query}")
        assert status == 200
        path = folder / file["filename"]
        path.write_bytes(body)
        return path


def messages(entry: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The events of one kind in a history entry."""
    return [content for name, content in entry["status"]["messages"] if name == kind]


def saved_files(entry: dict[str, Any], node_id: str) -> list[dict[str, str]]:
    outputs = entry["outputs"].get(node_id, {})
    return [file for files in outputs.values() if isinstance(files, list) for file in files if isinstance(file, dict)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
