"""Every number of the table of bounds: what the library, the command and the nodes take, and what they reject."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny_comfy
from support.comfy_host import Host, hosted
from wanvideo_infinitetalk.cli import parser as cli
from wanvideo_infinitetalk.pipeline.bounds import BOUNDS, Bound, check_numbers, parse_number
from wanvideo_infinitetalk.pipeline.make_video import Job, ModelFiles, make_video
from wanvideo_infinitetalk.pipeline.plan import GenerateConfig, plan_schedule, plan_video
from wanvideo_infinitetalk.pipeline.schedulers import SCHEDULERS
from wanvideo_infinitetalk.wanvideo.errors import InputError

CONFIG = {field.name for field in fields(GenerateConfig)} & BOUNDS.keys()
JOB = {field.name for field in fields(Job)} & BOUNDS.keys()
OPTIONS = {
    action.dest: action.option_strings[0]
    for action in cli.parser()._subparsers._group_actions[0].choices["generate"]._actions
    if action.dest in BOUNDS
}
HUGE = 10**5000
NAMES = sorted(BOUNDS)


def next_to(bound: Bound, edge: float, way: float) -> float:
    return edge + int(math.copysign(1, way)) if bound.whole else math.nextafter(edge, way)


def inside(bound: Bound) -> list[Any]:
    """The bounds themselves, numbers of numpy, and a list where one is taken."""
    least = next_to(bound, bound.least, math.inf) if bound.positive else bound.least
    typed = np.uint64(bound.most) if bound.whole else np.float64(bound.most)
    return [least, bound.most, typed, *([[least, bound.most]] if bound.per_step else [])]


def outside(bound: Bound) -> list[Any]:
    """Just beyond either bound, far beyond, not a number, and of another type."""
    below = bound.least if bound.positive else next_to(bound, bound.least, -math.inf)
    wrong: list[Any] = [below, next_to(bound, bound.most, math.inf), HUGE, -HUGE, 1e39, math.nan, math.inf, -math.inf]
    wrong += ["1", True, 1j, {}, [1] if not bound.per_step else "1,2"]
    wrong += [1.5] if bound.whole else []
    wrong += [[bound.most, math.nan], [bound.most, below], ["1"]] if bound.per_step else []
    wrong += [] if bound.optional else [None]
    return wrong


def cases(names: Any, values: Any) -> list[Any]:
    return [pytest.param(n, v, id=f"{n}-{i}") for n in sorted(names) for i, v in enumerate(values(BOUNDS[n]))]


def rejected(sentence: str, name: str) -> None:
    assert sentence.startswith(f"{name} ")
    assert BOUNDS[name].words in sentence
    assert sentence.endswith(".")
    assert len(sentence) < 250


@pytest.mark.parametrize(("name", "value"), cases(BOUNDS, inside))
def test_what_is_within_is_taken(name: str, value: Any) -> None:
    check_numbers(**{name: value})
    if not isinstance(value, np.generic):
        text = ",".join(map(repr, value)) if isinstance(value, list) else repr(value)
        assert parse_number(name, text) == value


@pytest.mark.parametrize(("name", "value"), cases(CONFIG, outside))
def test_the_plan_rejects_what_is_outside(name: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        plan_video(replace(GenerateConfig(), **{name: value}), (64, 64), [10])
    rejected(str(caught.value), name)


@pytest.mark.parametrize(("name", "value"), cases(JOB, outside))
def test_a_job_is_rejected_before_its_files_are_looked_at(name: str, value: Any) -> None:
    nowhere = ModelFiles(*["nowhere.safetensors"] * 5)
    with pytest.raises(InputError) as caught:
        make_video(Job(files=nowhere, audio=("nowhere.wav",), out="out.mp4", **{name: value}))
    rejected(str(caught.value), name)


@pytest.mark.parametrize(("name", "value"), cases({"steps", "shift", "cfg", "audio_cfg", "start_step"}, outside))
def test_the_schedule_of_a_single_window_rejects_them_too(name: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        plan_schedule(**{"scheduler": "euler", "steps": 4, "shift": 5.0, name: value})
    rejected(str(caught.value), name)


def test_the_command_has_every_number_of_a_job() -> None:
    only_in_the_library = {"area", "total_frames", "sigmas", "apg_momentum", "apg_norm_threshold"}
    assert OPTIONS.keys() >= (CONFIG | JOB) - only_in_the_library


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_the_parser_answers_what_is_outside(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    bound = BOUNDS[name]
    digits = "9" * 5000  # more than Python turns into a number
    numbers = [v for v in outside(bound) if isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) != HUGE]
    for text in (*map(str, numbers), digits, "-" + digits, "1e9", "", " ", "one", "1;2", "1,,2", "1,nan"):
        with pytest.raises(SystemExit) as caught:
            cli.main(["generate", f"{OPTIONS[name]}={text}"])
        assert caught.value.code == 2
        last = capsys.readouterr().err.rstrip().splitlines()[-1]
        assert f"argument {OPTIONS[name]}: " in last
        assert bound.words in last
        assert len(last) < 250


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 4, 1000, 10_000])
@pytest.mark.parametrize("shift", [1e-30, 1e-3, 7.0, 1000.0])
def test_a_grid_falls_or_is_rejected(scheduler: str, steps: int, shift: float) -> None:
    try:
        sigmas = plan_schedule(scheduler, steps, shift).scheduler.sigmas
    except InputError:
        assert steps != 4 or shift < 1e-3
        return
    assert len(sigmas) == steps + 1
    assert bool((sigmas.diff() < 0).all())


# --- nodes


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory):
    base: Path = tmp_path_factory.mktemp("comfy")
    tiny_comfy.fill(base)
    with hosted(base) as host:
        yield host


def test_every_node_rejects_numbers_outside_of_its_widgets(host: Host) -> None:
    """By a link, and as NaN, they pass ComfyUI's own check."""
    tried = 0
    for node_id, node in host.nodes.items():
        for widget in node.GET_SCHEMA().inputs:
            options = widget.as_dict()
            if widget.get_io_type() not in ("INT", "FLOAT") or not {"min", "max"} <= options.keys():
                continue
            bound = Bound(options["min"], options["max"], widget.get_io_type() == "INT")
            for value in (next_to(bound, bound.least, -math.inf), next_to(bound, bound.most, math.inf), math.nan, "1"):
                with pytest.raises(InputError, match=rf"^{widget.id} .* cannot be used: give a"):
                    node.execute(**{widget.id: value})
                tried += 1
            assert node_id
    assert tried > 150


@pytest.mark.parametrize("node", ["InfiniteTalkEmptyVideo", "InfiniteTalkImageToVideo", "InfiniteTalkLongVideo"])
def test_windows_that_no_gpu_holds(host: Host, node: str) -> None:
    given: dict[str, Any] = {"width": 2048, "height": 8000, "num_frames": 1001}
    if node == "InfiniteTalkLongVideo":
        given |= {"frame_window_size": given.pop("num_frames"), "motion_frame": 9, "vae": None}
        given |= {"force_offload": False, "colormatch": "disabled"}
    if node == "InfiniteTalkImageToVideo":
        given |= dict.fromkeys(("noise_aug_strength", "start_latent_strength", "end_latent_strength"), 0.0)
        given |= {"force_offload": False}
    with pytest.raises(InputError, match=r"1001 frames of 2048 x 8000 pixels is too large"):
        host.nodes[node].execute(**given)


SAMPLER = {
    "steps": "steps",
    "cfg": "cfg",
    "shift": "shift",
    "seed": "seed",
    "start_step": "start_step",
    "end_step": "end_step",
    "denoise": "denoise_strength",
}


@pytest.mark.parametrize("field", SAMPLER)
def test_the_sampler_rejects_what_its_widgets_let_through(host: Host, field: str) -> None:
    from wanvideo_infinitetalk.comfy_nodes.sampling import SamplerSettings

    good: dict[str, Any] = {"steps": 4, "cfg": 1.0, "shift": 5.0, "seed": 0, "scheduler": "euler"}
    SamplerSettings(**good)
    for value in outside(BOUNDS[SAMPLER[field]]):
        with pytest.raises(InputError) as caught:
            SamplerSettings(**{**good, field: value})
        rejected(str(caught.value), SAMPLER[field])


def test_a_schedule_that_a_small_denoise_makes_too_long(host: Host) -> None:
    from wanvideo_infinitetalk.comfy_nodes.sampling import SamplerSettings

    with pytest.raises(InputError, match="makes a schedule of 300,000 steps"):
        SamplerSettings(steps=30, cfg=1.0, shift=5.0, seed=0, scheduler="euler", denoise=1e-4)
