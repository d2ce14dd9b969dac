"""Step caches: which steps they leave out, what stands in place of those, and that a threshold of 0 changes nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from support.models import TINY, random_inputs, random_model
from wanvideo_infinitetalk.pipeline.attention_policy import SAFER
from wanvideo_infinitetalk.pipeline.conditioning import WindowInputs
from wanvideo_infinitetalk.pipeline.guidance import FULL, NULL
from wanvideo_infinitetalk.pipeline.nonfinite import FallbackModes
from wanvideo_infinitetalk.pipeline.plan import plan_schedule
from wanvideo_infinitetalk.pipeline.sampling import denoise
from wanvideo_infinitetalk.pipeline.step_cache import (
    PROFILES,
    EasyCache,
    MagCache,
    StepCache,
    TeaCache,
    profiled,
)
from wanvideo_infinitetalk.wanvideo.errors import InputError
from wanvideo_infinitetalk.wanvideo.modules.model import WanConfig
from wanvideo_infinitetalk.wanvideo.modules.techniques import BlockResidual

STEPS = 12
CACHES: dict[str, StepCache] = {
    # A random model changes much more from step to step than a trained one.
    "easycache": EasyCache(1.0, start_step=2),
    "teacache": TeaCache(1.0, start_step=2),
    "teacache, projection": TeaCache(1.0, start_step=2, projected=True),
    "teacache, polynomial": TeaCache(0.6, start_step=2, coefficients=(0.5, 0.1, 0.0)),
    "magcache": MagCache(0.1, start_step=2, ratios=(1.0, 0.97, 0.99, 0.98, 0.96)),
}


class Watched:
    """A tiny transformer that counts its forwards, and those that ran its blocks."""

    def __init__(self) -> None:
        self.model = random_model(dataclasses.replace(TINY, audio=None))
        self.config, self.dtype, self.embed_time = self.model.config, self.model.dtype, self.model.embed_time
        self.ran: list[bool] = []
        self.model.blocks[0].register_forward_hook(lambda *given: self.ran.__setitem__(-1, True))

    def __call__(self, *given: Any, **options: Any) -> torch.Tensor:
        self.ran.append(False)
        return self.model(*given, **options)


def run(cache: StepCache | None, *, cfg: float = 1.0, steps: int = STEPS) -> tuple[torch.Tensor, Watched]:
    """Latents, and the model that made them."""
    model = Watched()
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    inputs = random_inputs(dataclasses.replace(TINY, audio=None))
    given = WindowInputs(normal(5, TINY.text_dim), normal(5, TINY.text_dim), y=inputs["y"], clip=inputs["clip_fea"])
    schedule = plan_schedule("euler", steps, 5.0, cfg=cfg, techniques=() if cache is None else (cache,))
    latents, _ = denoise(
        model,
        schedule,
        normal(*inputs["x"].shape[-4:]),
        given,
        generator=generator,
        modes=FallbackModes(model, "sdpa", SAFER, steps, torch.device("cpu")),
    )
    return latents, model


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_leaves_out_steps_and_stays_close(name: str, caplog: pytest.LogCaptureFixture) -> None:
    exact, _ = run(None)
    with caplog.at_level("INFO"):
        latents, model = run(CACHES[name])
    left_out = STEPS - sum(model.ran)
    assert 0 < left_out < STEPS - 2
    assert f"step cache: {left_out} of {STEPS} passes were not computed" in caplog.text
    error = float((latents - exact).norm() / exact.norm())
    assert 0 < error < 0.5


@pytest.mark.parametrize("name", CACHES)
def test_a_threshold_of_nothing_computes_all(name: str) -> None:
    exact, _ = run(None)
    latents, model = run(dataclasses.replace(CACHES[name], threshold=0.0))
    assert all(model.ran)
    assert len(model.ran) == STEPS
    torch.testing.assert_close(latents, exact, atol=0, rtol=0)


@pytest.mark.parametrize(("start", "end", "may"), [(0, -1, range(1, 12)), (4, 8, range(4, 9)), (9, 3, [])])
@pytest.mark.parametrize("name", CACHES)
def test_only_steps_of_the_range_are_left_out(name: str, start: int, end: int, may: Any) -> None:
    cache = dataclasses.replace(CACHES[name], threshold=100.0, start_step=start, end_step=end)
    assert [step for step in range(STEPS) if cache.may_reuse(step, STEPS)] == list(may)
    if isinstance(cache, MagCache):
        cache = dataclasses.replace(cache, most_in_a_row=99)
    _, model = run(cache)
    computed = STEPS - len(may) + (isinstance(cache, EasyCache) and start < 2)  # which needs two steps for its rate
    assert sum(model.ran) == computed


@pytest.mark.parametrize("name", CACHES)
def test_all_passes_of_a_step_are_left_out_together(name: str) -> None:
    _, model = run(CACHES[name], cfg=3.0)
    # Caches by residual call the model in steps that are left out too, without its blocks.
    if isinstance(CACHES[name], EasyCache):
        assert len(model.ran) < 2 * STEPS
        assert len(model.ran) % 2 == 0
        return
    assert len(model.ran) == 2 * STEPS
    pairs = list(zip(model.ran[::2], model.ran[1::2], strict=True))
    assert all(prompt == negative for prompt, negative in pairs)
    assert not all(prompt for prompt, _ in pairs)


# --- formulas ----------------------------------------------------------------------------------------------------


def test_the_decisions_of_easycache() -> None:
    cache = EasyCache(0.2, start_step=0)
    reuse = cache.begin(None, 6)
    x = torch.linspace(1, 2, 16).reshape(16, 1, 1, 1)
    velocities = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]
    seen, error, rate, before, offset = [], 0.0, None, None, None
    for step, level in enumerate(velocities):
        v = reuse.velocity(FULL, step, x, torch.zeros(1), lambda level=level, x=x: x * level)
        computed = torch.allclose(v, x * level, atol=1e-7)
        # By hand: two computed steps give a rate, then the estimate grows until it passes the threshold.
        if before is not None and rate is not None:
            error += rate * float((x - before[0]).abs().mean() / before[1].abs().mean())
        expected = rate is None or error >= 0.2
        if expected:
            error = 0.0
            if before is not None:
                rate = float((x * level - before[1]).abs().mean() / (x - before[0]).abs().mean())
            offset = x * level - x
        assert offset is not None
        made = x * level if expected else x + offset
        torch.testing.assert_close(v, made)
        before = (x, made)
        seen.append(computed)
        x = x - 0.1 * v
    assert reuse.passes - reuse.reused == sum(seen)
    assert seen[:2] == [True, True]
    assert not all(seen)


def test_the_decisions_of_teacache() -> None:
    model = random_model()
    coefficients = (0.2, 0.5, 0.01)
    cache = TeaCache(1.0, start_step=1, coefficients=coefficients)
    reuse = cache.begin(model, 10)
    levels = torch.linspace(1000, 100, 10)
    error, before, expected, found = 0.0, None, [], []
    for step, level in enumerate(levels):
        embedding = model.embed_time(level[None], 1)[0]
        if before is not None:
            d = float((embedding - before).abs().mean() / before.abs().mean())
            error += coefficients[0] * d**2 + coefficients[1] * d + coefficients[2]
        before = embedding
        computes = step == 0 or error >= 1.0
        error = 0.0 if computes else error
        expected.append(computes)

        def compute(residual: BlockResidual) -> torch.Tensor:
            found.append(not residual.reuse)
            residual.value = torch.ones(1)
            return torch.zeros(1)

        reuse.velocity(NULL, step, torch.zeros(1), level[None], compute)
    assert found == expected
    assert 0 < sum(expected) < 10


@pytest.mark.parametrize(
    ("threshold", "most", "computed"),
    # Of a ratio of 0.9 in every step: |1 - 0.9| = 0.1, + |1 - 0.81| = 0.29, + 0.271 = 0.561
    [(0.05, 9, [0, 1, 2, 3, 4, 5]), (0.2, 9, [0, 2, 4]), (0.3, 9, [0, 3]), (9.0, 2, [0, 3]), (9.0, 0, range(6))],
)
def test_the_decisions_of_magcache(threshold: float, most: int, computed: Any) -> None:
    reuse = MagCache(threshold, most_in_a_row=most, ratios=(1.0, 0.9, 0.9)).begin(None, 6)
    found = []

    def compute(residual: BlockResidual) -> torch.Tensor:
        if not residual.reuse:
            found.append(reuse._step)
            residual.value = torch.ones(1)
        return torch.zeros(1)

    reuse._mag = dataclasses.replace(reuse._mag, ratios=(1.0, *[0.9] * 5))
    for step in range(6):
        reuse.velocity(FULL, step, torch.zeros(1), torch.zeros(1), compute)
    assert found == list(computed)


def test_ratios_of_another_number_of_steps_are_the_nearest() -> None:
    reuse = MagCache(9.0, most_in_a_row=9, ratios=(1.0, 0.9, 0.8)).begin(None, 5)
    products = []

    def compute(residual: BlockResidual) -> torch.Tensor:
        products.append(reuse._product)
        residual.value = torch.ones(1)
        return torch.zeros(1)

    for step in range(5):
        reuse.velocity(FULL, step, torch.zeros(1), torch.zeros(1), compute)
    assert products == pytest.approx([1.0, 1.0, 0.9, 0.72, 0.576])  # of 1, 1, 0.9, 0.8, 0.8


def test_a_reused_residual_stands_in_place_of_the_blocks() -> None:
    model, inputs, residual = random_model(), random_inputs(), BlockResidual()
    plain = model(**inputs)
    assert torch.equal(model(**inputs, residual=residual), plain)
    model.blocks[0].register_forward_pre_hook(lambda *given: pytest.fail("a block ran"))
    again = model(**inputs, residual=BlockResidual(residual.value, reuse=True))
    torch.testing.assert_close(again, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CACHES)
def test_where_it_is_kept_changes_nothing(name: str) -> None:
    here, _ = run(dataclasses.replace(CACHES[name], on_host=False))
    assert torch.equal(here, run(CACHES[name])[0])


# --- what was measured -------------------------------------------------------------------------------------------

T2V_1_3B = WanConfig(model_type="t2v", in_dim=16, dim=1536, num_heads=12, num_layers=30)
T2V_14B, I2V_14B = WanConfig(model_type="t2v", in_dim=16), WanConfig()


@pytest.mark.parametrize(
    ("config", "name", "profile"),
    [
        (T2V_1_3B, "wan2.1_t2v_1.3B.safetensors", "t2v 1.3B"),
        (T2V_14B, "wan2.1_t2v_14B_720p.safetensors", "t2v 14B"),
        (I2V_14B, "wan2.1_i2v_480p_14B.safetensors", "i2v 14B 480p"),
        (I2V_14B, "InfiniteTalk-merged.gguf", "i2v 14B 480p"),
        (I2V_14B, "Wan2_1-I2V-14B-720P_fp8.safetensors", "i2v 14B 720p"),
    ],
)
def test_the_profile_of_a_model(config: WanConfig, name: str, profile: str) -> None:
    measured = PROFILES[profile]
    tea, mag = TeaCache(coefficients=()), MagCache()
    assert profiled(tea, config, name) == TeaCache(coefficients=measured.embedding)
    projected = dataclasses.replace(tea, projected=True)
    assert profiled(projected, config, name) == TeaCache(coefficients=measured.projection, projected=True)
    if measured.ratios:
        assert profiled(mag, config, name) == MagCache(ratios=measured.ratios)
        assert measured.ratios[0] == 1
        assert all(0.8 < ratio < 1.1 for ratio in measured.ratios)
    else:
        with pytest.raises(InputError, match=r"MagCache has no ratios .* use EasyCache"):
            profiled(mag, config, name)


def test_the_published_curves_have_the_lengths_of_their_schedules() -> None:
    assert {name: len(profile.ratios) for name, profile in PROFILES.items()} == {
        "t2v 1.3B": 0,
        "t2v 14B": 50,
        "i2v 14B 480p": 40,
        "i2v 14B 720p": 40,
    }
    assert {len(c) for profile in PROFILES.values() for c in (profile.embedding, profile.projection)} == {5}


def test_what_needs_no_measure_is_left_as_it_is() -> None:
    for cache in (EasyCache(), TeaCache(), TeaCache(coefficients=(1.0, 0.0)), MagCache(ratios=(1.0, 0.9))):
        assert profiled(cache, TINY, "tiny") is cache
    with pytest.raises(InputError, match="turn use_coefficients off"):
        profiled(TeaCache(coefficients=()), TINY, "tiny")
    with pytest.raises(InputError, match="MagCache has no ratios"):
        run(MagCache())
