"""`infinitetalk batch`: lines of JSON become videos; what is wrong is said with the number of the line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.service_files import FRAMES, SETTINGS, write_inputs
from wanvideo_infinitetalk.cli.parser import main
from wanvideo_infinitetalk.cli.tiny_models import TinySet
from wanvideo_infinitetalk.media.video import VideoFrames
from wanvideo_infinitetalk.pipeline.make_video import ModelFiles
from wanvideo_infinitetalk.service.batch import read_jobs
from wanvideo_infinitetalk.wanvideo.errors import InputError

BASE = {"files": ModelFiles("model", "vae", "text", "speech", "clip"), "seed": 5}
LINE = {"image": "image.png", "audio": "speech.wav", "out": "a.mp4"}


def options(tiny: TinySet) -> list[str]:
    names = {"model": tiny.model, "adapter": tiny.adapter, "vae": tiny.vae, "text-encoder": tiny.text_encoder}
    names |= {"clip-vision": tiny.clip_vision, "wav2vec": tiny.wav2vec}
    return [part for name, path in names.items() for part in (f"--{name}", str(path))]


def write(folder: Path, *lines: object) -> Path:
    path = folder / "jobs.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_batch_makes_its_videos_and_names_the_lines_that_failed(tiny_set, tmp_path, capsys) -> None:
    write_inputs(tmp_path)
    good = LINE | {name: value for name, value in SETTINGS.items() if name != "steps"}
    jobs = write(tmp_path, good, "", good | {"out": "b.mp4", "image": "no.png"}, good | {"out": "sub/c.mp4", "seed": 1})
    arguments = ["batch", str(jobs), *options(tiny_set), "--steps", "1"]
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"video: {tmp_path / name}" for name in ("a.mp4", "sub/c.mp4")]
    assert "1 of 3 jobs failed: line 3 of" in said.err
    assert "no.png" in said.err
    assert len(VideoFrames(tmp_path / "sub/c.mp4")) == FRAMES

    before = (tmp_path / "a.mp4").stat().st_mtime_ns
    write(tmp_path, good, good | {"out": "b.mp4"})
    assert main([*arguments, "--resume"]) == 0
    assert (tmp_path / "a.mp4").stat().st_mtime_ns == before, "what is there is kept"
    assert (tmp_path / "b.mp4").is_file()


def test_lines_override_options_and_a_preset_what_it_stands_for(tmp_path: Path) -> None:
    base = BASE | {"quantization": "fp8_e5m2", "steps": 9}
    lines = read_jobs(
        write(tmp_path, LINE, LINE | {"out": "b.mp4", "seed": 6, "preset": "low-memory", "audio": ["/x.wav", "y.wav"]}),
        base,
    )
    first, second = (line.job for line in lines)
    assert (first.config.seed, first.config.steps, first.quantization) == (5, 9, "fp8_e5m2")
    assert (second.config.seed, second.config.steps, second.quantization) == (6, 40, "fp8_e4m3fn_scaled")
    assert second.audio == (Path("/x.wav"), tmp_path / "y.wav")
    assert first.image == tmp_path / "image.png"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "it is not JSON"),
        ("[]", "give an object"),
        ('{"steps": NaN}', "NaN is no finite number"),
        ('{"steps": 1, "steps": 2}', "a name stands twice"),
        ("[" * 100_000, "it is not JSON"),
        (LINE | {"stesp": 4}, "no field stesp.*the nearest is steps"),
        (LINE | {"steps": 0}, "steps 0 cannot be used"),
        (LINE | {"steps": True}, "steps True cannot be used"),
        (LINE | {"tiled_vae": 1}, "give true or false"),
        (LINE | {"prompt": 5}, "prompt 5 cannot be used"),
        (LINE | {"preset": "slow"}, "There is no preset 'slow'"),
        (LINE | {"device": "cuda"}, "no field device"),
        (LINE | {"files": {}}, "no field files"),
        (LINE | {"audio": []}, "audio .* is no path and no list of them"),
        (LINE | {"image": ["a.png"]}, "image .* is no path"),
        ({"image": "a.png", "out": "a.mp4"}, '"audio" is missing'),
        ({"image": "a.png", "audio": "a.wav"}, '"out" is missing'),
    ],
)
def test_a_line_that_is_no_job_is_named(line: object, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^Line 2 of .*{sentence}"):
        read_jobs(write(tmp_path, LINE | {"out": "z.mp4"}, line), BASE)


def test_two_lines_do_not_make_the_same_video(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Lines 1 and 3 .* make the same video"):
        read_jobs(write(tmp_path, LINE, "", LINE | {"out": "./a.mp4"}), BASE)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe"])
def test_a_file_without_jobs_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "jobs.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"jobs\.jsonl"):
        read_jobs(path, BASE)
    with pytest.raises(InputError, match="cannot be read from"):
        read_jobs(tmp_path, BASE)


def test_a_batch_and_the_workers_need_no_package_of_a_service() -> None:
    code = (
        "import sys\n"
        "for name in ('fastapi', 'starlette', 'uvicorn', 'prometheus_client', 'gradio'): sys.modules[name] = None\n"
        "from wanvideo_infinitetalk.cli.parser import parser\n"
        "parser(['serve', 'batch'])\n"
        "from wanvideo_infinitetalk.service import batch, requests, server, workers\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_flashtalk_from_lines(tiny_set: TinySet, tmp_path: Path) -> None:
    """The mode of all lines, and of one by its preset."""
    inputs = write_inputs(tmp_path)
    names = {name: getattr(tiny_set, name) for name in ("vae", "text_encoder", "clip_vision", "wav2vec")}
    files = [part for name, path in names.items() for part in (f"--{name.replace('_', '-')}", str(path))]
    line = {"image": inputs["image"].name, "audio": inputs["audio"].name, "frames": 9, "steps": 1, "max_frames": 6}
    jobs = write(tmp_path, line | {"out": "a.mp4", "mode": "flashtalk"}, line | {"out": "b.mp4", "preset": "stream"})
    assert main(["batch", str(jobs), "--model", str(tiny_set.flashtalk), *files]) == 0
    assert [len(VideoFrames(tmp_path / name)) for name in ("a.mp4", "b.mp4")] == [6, 6]


def test_humo_from_lines(tiny_set: TinySet, tmp_path: Path) -> None:
    """References in place of the image, with a recording and without."""
    inputs = write_inputs(tmp_path)
    names = {"model": tiny_set.humo, "vae": tiny_set.vae, "text-encoder": tiny_set.text_encoder}
    files = [part for name, path in names.items() for part in (f"--{name}", str(path))]
    line = {"references": inputs["image"].name, "width": 64, "height": 48, "max_frames": 5}
    jobs = write(tmp_path, line | {"out": "a.mp4"}, line | {"out": "b.mp4", "audio": inputs["audio"].name})
    arguments = ["batch", str(jobs), *files, "--whisper", str(tiny_set.whisper), "--mode", "humo", "--steps", "1"]
    assert main(arguments) == 0
    assert [len(VideoFrames(tmp_path / name)) for name in ("a.mp4", "b.mp4")] == [5, 5]
