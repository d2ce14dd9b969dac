"""The settings that a video carries: all of a job, read back as those of a request are, whatever a file holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from wanvideo_infinitetalk.cli.tiny_models import TinySet
from wanvideo_infinitetalk.media.video import VideoWriter, read_comment
from wanvideo_infinitetalk.pipeline.bounds import BOUNDS
from wanvideo_infinitetalk.pipeline.presets import PRESETS, SETTINGS, build_job
from wanvideo_infinitetalk.service.settings import CHOICES, MOST_OF_A_JOB, build, settings_in, settings_of
from wanvideo_infinitetalk.wanvideo.errors import InputError

SENTENCES = {
    "": "carries no settings",
    "a film": "carries no settings",
    "[1, 2]": "carries no settings",
    '{"prompt": "' + "x" * MOST_OF_A_JOB + '"}': "carries no settings",
    "{" * 10_000: "is not JSON",
    '{"steps": 8': "is not JSON",
    '{"steps": 8, "steps": 9}': "stands twice",
    '{"steps": "8"}': "steps 8 cannot be used",
    '{"steps": -1}': "steps -1 cannot be used",
    '{"cfg": {"a": 1}}': "cfg",
    '{"prompt": ["x"]}': "prompt",
    '{"tiled_vae": 1}': "tiled_vae",
    '{"image": "/etc/passwd"}': "There is no field image",
    '{"files": {"model": "/x"}}': "There is no field files",
    '{"device": "cuda"}': "There is no field device",
    '{"techniques": "x"}': "There is no field techniques",
    '{"preset": "../fast"}': "",
}
"""What a file of anybody may carry -> what is said of it; nothing where it is a text, which is read when it is used."""


def video(folder: Path, comment: str) -> Path:
    with VideoWriter(folder / "a video.mp4", comment=comment) as writer:
        writer.append(torch.zeros(2, 32, 32, 3, dtype=torch.uint8))
    return folder / "a video.mp4"


def test_each_setting_is_a_number_a_text_true_or_false() -> None:
    for name, value in SETTINGS.items():
        assert name in BOUNDS or isinstance(value, (bool, str)) or (value is None and name in CHOICES), name


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_the_settings_of_a_video_make_the_same_job(preset: str | None, tiny_set: TinySet, tmp_path: Path) -> None:
    base = {"files": tiny_set.model_files, "device": "cpu", "out": tmp_path / "out.mp4"}
    given = {"seed": 2**63, "cfg": [5.0, 4.5], "steps": 2, "prompt": 'she smiles – 微笑\n"quoted" \ud800', "width": 320}
    job = build_job(base | given | {"audio": ()}, preset)
    carried = settings_in(video(tmp_path, job.comment))
    assert carried.keys() == SETTINGS.keys() - (set() if preset else {"preset"})
    assert carried["prompt"] == given["prompt"].replace("\ud800", "?")
    again = build(base, settings_of(carried, ()))
    assert again.comment == job.comment
    assert (again.config, again.quantization) == (job.config, job.quantization)


@pytest.mark.parametrize("comment", SENTENCES)
def test_what_a_file_carries_is_not_taken_for_settings(comment: str, tmp_path: Path) -> None:
    made = video(tmp_path, comment)
    if not SENTENCES[comment]:
        assert settings_in(made) == json.loads(comment)
        return
    with pytest.raises(InputError, match=SENTENCES[comment]) as error:
        settings_in(made)
    assert len(str(error.value)) < 400
    assert str(tmp_path) not in str(error.value)


def test_files_that_are_no_video(tmp_path: Path) -> None:
    for name, content in (("text.mp4", b"{}"), ("empty.mp4", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError):
            settings_in(tmp_path / name)
    assert read_comment(video(tmp_path, "a title")) == "a title"
