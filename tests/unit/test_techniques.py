"""Techniques that need no training: their formulas, the steps and passes that they hold for, and that they are off."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from support.models import random_inputs, random_model
from torch import nn
from wanvideo_infinitetalk.cli.demo import demo_job
from wanvideo_infinitetalk.pipeline.attention_policy import SAFER
from wanvideo_infinitetalk.pipeline.conditioning import WindowInputs
from wanvideo_infinitetalk.pipeline.guidance import FULL, NULL, PROMPT, SPEECH
from wanvideo_infinitetalk.pipeline.make_video import check
from wanvideo_infinitetalk.pipeline.nonfinite import FallbackModes
from wanvideo_infinitetalk.pipeline.plan import plan_schedule
from wanvideo_infinitetalk.pipeline.sampling import denoise
from wanvideo_infinitetalk.pipeline.step_cache import MagCache
from wanvideo_infinitetalk.pipeline.techniques import EnhanceVideo, SkipLayers, forward_options
from wanvideo_infinitetalk.wanvideo.errors import InputError
from wanvideo_infinitetalk.wanvideo.modules.techniques import (
    BlockResidual,
    NormalizedAttention,
    cross_frame_gain,
    normalized_guidance,
)
from wanvideo_infinitetalk.wanvideo.runtime.compilation import CompileSettings, compile_limits, compile_model


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- formulas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "tau", "alpha"), [(11.0, 2.5, 0.25), (3.0, 100.0, 1.0), (2.0, 0.5, 0.5)])
def test_normalized_guidance_is_the_formula(scale: float, tau: float, alpha: float, dtype: torch.dtype) -> None:
    positive, negative = (normal(1, 6, 2, 8, seed=s, dtype=dtype) for s in (1, 2))
    found = normalized_guidance(positive, negative, scale, tau, alpha)
    assert found.dtype == dtype
    z, n = positive.double(), negative.double()
    for token in range(6):
        guided = scale * z[0, token] - (scale - 1) * n[0, token]
        ratio = float(guided.abs().sum() / z[0, token].abs().sum())
        expected = alpha * guided * min(1, tau / ratio) + (1 - alpha) * z[0, token]
        torch.testing.assert_close(
            found[0, token].double(), expected, atol=1e-5, rtol=1e-5 if dtype == torch.float32 else 8e-3
        )


def test_what_moves_away_by_nothing_is_the_prompt_alone() -> None:
    positive, negative = normal(1, 4, 2, 8, seed=1), normal(1, 4, 2, 8, seed=2)
    torch.testing.assert_close(normalized_guidance(positive, negative, 1.0, 2.5, 0.5), positive)
    assert torch.equal(normalized_guidance(positive, negative, 9.0, 2.5, 0.0), positive)
    zeros = torch.zeros(1, 4, 2, 8)
    assert torch.isfinite(normalized_guidance(zeros, zeros, 9.0, 2.5, 0.5)).all()


def test_the_gain_is_the_mean_attention_across_frames() -> None:
    frames, places, heads, width = 3, 4, 2, 8
    q, k = normal(2, frames * places, heads, width, seed=1), normal(2, frames * places, heads, width, seed=2)
    found = cross_frame_gain(q, k, (frames, 2, 2), 5.0)
    assert found.shape == (2, 1, 1, 1)
    for b in range(2):
        total = 0.0
        for place in range(places):
            for head in range(heads):
                rows, columns = (x[b, place::places, head].double() for x in (q, k))
                shares = (rows @ columns.T / width**0.5).softmax(-1)
                total += float(shares.sum() - shares.trace()) / (frames * (frames - 1))
        expected = max(1.0, (frames + 5.0) * total / (places * heads))
        assert float(found[b]) == pytest.approx(expected, rel=1e-5)


def test_the_gain_is_never_below_one() -> None:
    q = 10 * normal(1, 12, 2, 8, seed=1)  # each frame attends to itself alone
    assert float(cross_frame_gain(q, q, (3, 2, 2), 0.0)) == 1
    assert float(cross_frame_gain(q[:, :4], q[:, :4], (1, 2, 2), 50.0)) == 1


# --- the model ---------------------------------------------------------------------------------------------------


class Nothing(nn.Module):
    """A block that leaves tokens as they are."""

    def forward(self, x: torch.Tensor, given: Any, modes: Any) -> torch.Tensor:
        return x


def test_skipped_blocks_are_as_if_they_were_not_there() -> None:
    model, inputs = random_model(), random_inputs()
    whole, skipped = model(**inputs), model(**inputs, skip_blocks=(1,))
    model.blocks[1] = Nothing()
    assert torch.equal(skipped, model(**inputs))
    assert not torch.equal(skipped, whole)


def test_enhance_a_video_changes_what_the_gain_reaches() -> None:
    model, inputs = random_model(), random_inputs()
    plain = model(**inputs)
    assert not torch.equal(model(**inputs, enhance=20.0), plain)
    still = {name: x[..., :1, :, :] if name in ("x", "y") else x for name, x in inputs.items()}
    still["audio"] = inputs["audio"][:, :1]
    assert torch.equal(model(**still, enhance=20.0), model(**still))  # one frame alone


def test_a_negative_prompt_in_the_attention() -> None:
    model, inputs = random_model(), random_inputs()
    plain, away = model(**inputs), normal(5, model.config.text_dim, seed=3)
    assert not torch.allclose(model(**inputs, nag=NormalizedAttention(away)), plain, atol=1e-3)
    torch.testing.assert_close(model(**inputs, nag=NormalizedAttention(away, scale=1.0)), plain)
    same = inputs["context"] if inputs["context"].ndim == 2 else inputs["context"][0]
    torch.testing.assert_close(model(**inputs, nag=NormalizedAttention(same)), plain, atol=1e-4, rtol=1e-4)


def compiled_options() -> dict[str, dict[str, Any]]:
    return {
        "enhance": {"enhance": 5.0},
        "skip_blocks": {"skip_blocks": (1,)},
        "nag": {"nag": NormalizedAttention(normal(5, random_model().config.text_dim, seed=3))},
        "residual": {"residual": BlockResidual()},
    }


@pytest.mark.parametrize("blocks_only", [True, False])
@pytest.mark.parametrize("name", compiled_options())
def test_techniques_in_a_compiled_model(name: str, blocks_only: bool) -> None:
    inputs, settings = random_inputs(), CompileSettings(backend="eager", fullgraph=True, blocks_only=blocks_only)
    options, model = compiled_options()[name], random_model()
    torch._dynamo.reset()
    with torch.no_grad(), compile_limits(settings):
        expected = random_model()(**inputs, **options)
        compile_model(model, settings)
        torch.testing.assert_close(model(**inputs, **compiled_options()[name]), expected)
        if name == "residual":
            reused = BlockResidual(options[name].value, reuse=True)
            torch.testing.assert_close(model(**inputs, residual=reused), expected)
    torch._dynamo.reset()


# --- steps and passes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "end", "steps"),
    [(0.0, 1.0, range(10)), (0.1, 1.0, range(1, 10)), (0.25, 0.5, range(3, 6)), (0.9, 0.9, [9]), (0.95, 1.0, [])],
)
def test_the_steps_of_a_technique(start: float, end: float, steps: Any) -> None:
    technique = EnhanceVideo(2.0, start, end)
    held = [step for step in range(10) if forward_options([technique], FULL, step, 10)]
    assert held == list(steps)


def test_each_technique_has_its_passes() -> None:
    both = (EnhanceVideo(3.0), SkipLayers((1, 2), 0.0))
    for which in (FULL, PROMPT):
        assert forward_options(both, which, 0, 4) == {"enhance": 3.0}
    for which in (SPEECH, NULL):
        assert forward_options(both, which, 0, 4) == {"enhance": 3.0, "skip_blocks": (1, 2)}
    assert forward_options((), NULL, 0, 4) == {}


@pytest.mark.parametrize(
    ("technique", "cfg", "words"),
    [
        (EnhanceVideo(2.0, 0.6, 0.4), 5.0, "start_percent below end_percent"),
        (SkipLayers((1,), 0.5, 0.2), 5.0, "start_percent below end_percent"),
        (SkipLayers((1,)), 1.0, "set cfg above 1"),
    ],
)
def test_techniques_that_cannot_be(technique: Any, cfg: float, words: str) -> None:
    with pytest.raises(InputError, match=words):
        plan_schedule("euler", 4, 5.0, cfg=cfg, techniques=(technique,))


class Recorder:
    """A model that gives zeros and remembers what it was given."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, *given: Any, **options: Any) -> Any:
        changes = ("enhance", "skip_blocks", "nag")
        self.calls.append({"context": float(context[0, 0])} | {k: v for k, v in options.items() if k in changes})
        return torch.zeros(1, *x.shape)


def test_the_loop_gives_each_pass_its_options() -> None:
    nag = NormalizedAttention(normal(2, 4))
    schedule = plan_schedule("euler", 2, 5.0, cfg=4.0, techniques=(EnhanceVideo(3.0, 0.5), SkipLayers((1,), 0.0, 0.4)))
    model, inputs = Recorder(), WindowInputs(torch.ones(2, 4), torch.zeros(2, 4), nag=nag)
    denoise(
        model,
        schedule,
        torch.zeros(16, 2, 4, 4),
        inputs,
        generator=torch.Generator().manual_seed(0),
        modes=FallbackModes(model, "sdpa", SAFER, 2, torch.device("cpu")),
    )
    assert model.calls == [
        {"context": 1.0, "nag": nag},
        {"context": 0.0, "skip_blocks": (1,)},
        {"context": 1.0, "nag": nag, "enhance": 3.0},
        {"context": 0.0, "enhance": 3.0},
    ]


# --- before weights are read -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("technique", "words"), [(SkipLayers((99,)), "not all in the model"), (MagCache(), "no ratios for a model like")]
)
def test_a_job_with_a_technique_that_does_not_fit_its_model(tmp_path, tiny_set, technique: Any, words: str) -> None:
    with demo_job(tmp_path / "out.mp4", models=tiny_set.model.parent) as job:
        config = dataclasses.replace(job.config, techniques=(technique,), cfg=3.0)
        with pytest.raises(InputError, match=words):
            check(dataclasses.replace(job, config=config))
