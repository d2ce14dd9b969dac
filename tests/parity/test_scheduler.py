"""Schedulers: grids bit for bit, trajectories within rel 5e-6 (float32, noise taken from the golden)."""

import re

import pytest
import torch
from support.goldens import relative_error
from wanvideo_infinitetalk.pipeline.schedulers import SCHEDULERS, make_scheduler

TOLERANCE = 5e-6


def _velocity(x: torch.Tensor) -> torch.Tensor:
    return 0.3 * x + 0.1 * torch.sin(x)


def _cases(golden, pattern: str):
    for key in sorted(golden.outputs):
        if match := re.fullmatch(pattern, key):
            yield key, *match.groups()


def test_grids_equal_the_goldens(golden) -> None:
    item = golden("scheduler")
    seen = set()
    for key, name, steps, shift in _cases(item, r"(.+)\.steps(\d+)\.shift([\d.]+)\.sigmas"):
        name = name.replace("_beta", "/beta")
        scheduler = make_scheduler(name, int(steps), float(shift))
        assert torch.equal(scheduler.sigmas, item.outputs[key]), key
        expected = item.outputs[key.replace("sigmas", "timesteps")]
        assert torch.equal(scheduler.timesteps, expected), key
        assert scheduler.timesteps.dtype == expected.dtype
        seen.add(name)
    assert seen <= set(SCHEDULERS)
    assert len(seen) >= 6


def test_the_official_grid_and_trajectory(golden) -> None:
    item = golden("scheduler")
    cases = list(_cases(item, r"official\.steps(\d+)\.shift([\d.]+)\.timesteps"))
    assert cases
    for key, steps, shift in cases:
        scheduler = make_scheduler("multitalk", int(steps), float(shift))
        assert torch.equal(scheduler.timesteps, item.outputs[key][:-1]), key
        x = item.inputs["x0"]
        for i, expected in enumerate(item.outputs[key.replace("timesteps", "trajectory")][1:]):
            x = scheduler.step(_velocity(x), i, x)
            assert relative_error(x, expected) <= TOLERANCE, (key, i)


@pytest.mark.parametrize("name", ["unipc", "dpm++", "dpm++_sde", "euler", "lcm"])
def test_trajectories(golden, name: str) -> None:
    item = golden("scheduler")
    cases = list(_cases(item, re.escape(name) + r"\.traj\.steps(\d+)\.shift([\d.]+)"))
    assert cases
    for key, steps, shift in cases:
        scheduler = make_scheduler(name, int(steps), float(shift))
        expected = item.outputs[key]
        noise = item.outputs.get(f"{key}.noise")
        assert scheduler.needs_noise == (noise is not None)
        x = item.inputs["x0"]
        for i in range(int(steps)):
            x = scheduler.step(_velocity(x), i, x, None if noise is None else noise[i])
            assert relative_error(x, expected[i + 1]) <= TOLERANCE, (key, i)
