"""What every scheduler must do, whatever its grid."""

import math

import pytest
import torch
from wanvideo_infinitetalk.pipeline.schedulers import SCHEDULERS, make_scheduler
from wanvideo_infinitetalk.wanvideo.errors import InputError

SHAPE = (4, 3, 2, 2)
SOLVERS = ["unipc", "dpm++", "res_multistep", "euler"]
STOCHASTIC = {"flashtalk", "lcm", "lcm/beta", "dpm++_sde", "dpm++_sde/beta"}


def _run(scheduler, x, velocity, start=0):
    for i in range(start, len(scheduler)):
        x = scheduler.step(velocity(x, float(scheduler.sigmas[i])), i, x, torch.randn(SHAPE))
    return x


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("shift", [0.5, 1.0, 5.0, 11.0])
def test_grids_fall_to_zero_and_timesteps_follow(name, shift) -> None:
    scheduler = make_scheduler(name, 4, shift)
    assert len(scheduler) == 4
    assert scheduler.sigmas.dtype == torch.float32
    assert scheduler.sigmas[-1] == 0
    assert (scheduler.sigmas.diff() < 0).all()
    assert ((scheduler.timesteps.float() - 1000 * scheduler.sigmas[:-1]).abs() <= 1).all()
    assert scheduler.needs_noise == (name in STOCHASTIC)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_perfect_model_is_followed_to_its_target(name) -> None:
    """Whatever the noise, a model that always points at one target leads there."""
    target = torch.randn(SHAPE)
    scheduler = make_scheduler(name, 4, 5.0)
    result = _run(scheduler, torch.randn(SHAPE), lambda x, sigma: (x - target) / sigma)
    assert torch.allclose(result, target, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "flowmatch_distill"])
def test_one_step_runs(name) -> None:
    target = torch.randn(SHAPE)
    result = _run(make_scheduler(name, 1, 5.0), torch.randn(SHAPE), lambda x, sigma: (x - target) / sigma)
    assert torch.allclose(result, target, atol=1e-4)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_later_start_and_a_second_run_carry_nothing_over(name) -> None:
    target, noise, x = torch.randn(3, *SHAPE)

    def velocity(x, sigma):
        return 0.3 * x + 0.1 * torch.sin(x)

    fresh, used = make_scheduler(name, 4, 5.0), make_scheduler(name, 4, 5.0)
    _run(used, x, velocity)
    start = fresh.add_noise(target, noise, 2)
    assert torch.allclose(start, target + float(fresh.sigmas[2]) * (noise - target), atol=1e-6)
    torch.manual_seed(1)
    expected = _run(fresh, start, velocity, start=2)
    torch.manual_seed(1)
    assert torch.equal(_run(used, start, velocity, start=2), expected)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_inputs_stay_as_they_are(name) -> None:
    scheduler = make_scheduler(name, 4, 5.0)
    x = torch.randn(SHAPE)
    for i in range(4):
        v, noise = torch.randn(SHAPE), torch.randn(SHAPE)
        before = [t.clone() for t in (v, x, noise)]
        following = scheduler.step(v, i, x, noise)
        assert all(torch.equal(a, b) for a, b in zip((v, x, noise), before, strict=True))
        x = following


@pytest.mark.parametrize(("name", "order"), [("unipc", 2), ("dpm++", 2), ("res_multistep", 2), ("euler", 1)])
def test_order_of_convergence(name, order) -> None:
    """Gaussian data of deviation 0.5: the exact velocity is known, and so is where a sample ends."""

    def velocity(x, sigma):
        variance = (1 - sigma) ** 2 * 0.25 + sigma**2
        return x * (sigma - (1 - sigma) * 0.25) / variance

    start = torch.randn(SHAPE).double()
    errors = []
    for steps in (64, 128):
        sigmas = [0.95 - 0.9 * i / steps for i in range(steps + 1)]
        first, last = (math.sqrt((1 - s) ** 2 * 0.25 + s**2) for s in (sigmas[0], sigmas[-1]))
        result = _run(make_scheduler(name, steps, 1.0, sigmas), start, velocity)
        errors.append(float((result - start * last / first).abs().max()))
    assert math.log2(errors[0] / errors[1]) > order - 0.3


@pytest.mark.parametrize("name", SOLVERS)
def test_explicit_sigmas(name) -> None:
    sigmas = [1.0, 0.8, 0.4, 0.1, 0.0]
    scheduler = make_scheduler(name, 99, 5.0, sigmas)
    assert torch.equal(scheduler.sigmas, torch.tensor(sigmas))
    assert len(scheduler) == 4
    target = torch.randn(SHAPE)
    result = _run(scheduler, torch.randn(SHAPE), lambda x, sigma: (x - target) / sigma)
    assert torch.allclose(result, target, atol=1e-5)  # finite although ln(1 - sigma) is not at sigma 1


@pytest.mark.parametrize("sigmas", [[1.0], [0.5, 0.5, 0.0], [1.2, 0.0], [0.5, -0.1], [0.5, float("nan"), 0.0]])
def test_sigmas_that_make_no_grid(sigmas) -> None:
    with pytest.raises(InputError, match="are no grid"):
        make_scheduler("euler", 4, 5.0, sigmas)


def test_unknown_names_and_senseless_numbers() -> None:
    with pytest.raises(InputError, match=r"'ddim'.*unipc, unipc/beta"):
        make_scheduler("ddim", 4, 5.0)
    with pytest.raises(InputError, match="'multitalk/beta'"):
        make_scheduler("multitalk/beta", 4, 5.0)
    with pytest.raises(InputError, match="steps 0 cannot be used"):
        make_scheduler("euler", 0, 5.0)
    with pytest.raises(InputError, match="shift"):
        make_scheduler("euler", 4, 0.0)
    with pytest.raises(InputError, match="4 steps, not 6"):
        make_scheduler("flowmatch_distill", 6, 5.0)


def test_stochastic_solvers_ask_for_their_noise() -> None:
    x = torch.randn(SHAPE)
    for name in STOCHASTIC:
        with pytest.raises(ValueError, match="noise"):
            make_scheduler(name, 4, 5.0).step(x, 0, x)
