"""Guidance: the formulas, the passes that they take, and adaptive projection."""

from __future__ import annotations

import pytest
import torch
from wanvideo_infinitetalk.pipeline.guidance import (
    FULL,
    NULL,
    PROMPT,
    SPEECH,
    Formula,
    Pass,
    Projection,
    guide,
    per_step,
)
from wanvideo_infinitetalk.wanvideo.errors import InputError

V = {which: torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(n)) for n, which in
     enumerate((FULL, SPEECH, PROMPT, NULL))}  # fmt: skip


def _velocity(
    formula: Formula, projection: Projection | None = None, velocities: dict[Pass, torch.Tensor] = V
) -> tuple[torch.Tensor, list[Pass]]:
    made: list[Pass] = []

    def evaluate(which: Pass) -> torch.Tensor:
        made.append(which)
        return velocities[which]

    return formula.velocity(evaluate, projection), made


def _additive(text: float, audio: float) -> torch.Tensor:
    return V[NULL] + text * (V[FULL] - V[SPEECH]) + audio * (V[SPEECH] - V[NULL])


@pytest.mark.parametrize(
    ("text", "audio", "passes"),
    [
        (5.0, 4.0, [FULL, SPEECH, NULL]),
        (5.0, 1.0, [FULL, SPEECH]),
        (3.0, 3.0, [FULL, NULL]),
        (1.0, 4.0, [FULL, PROMPT]),
        (1.0, 1.0, [FULL]),
    ],
)
def test_the_additive_formula_makes_no_pass_that_cancels(text, audio, passes) -> None:
    v, made = _velocity(guide(text, audio))
    assert made == passes
    expected = _additive(text, audio) if text != 1 else V[PROMPT] + audio * (V[FULL] - V[PROMPT])
    assert torch.allclose(v, expected, atol=1e-5)


@pytest.mark.parametrize(("text", "audio"), [(5.0, 4.0), (5.0, 1.0), (5.0, 0.2)])
def test_the_nested_formula(text, audio) -> None:
    v, _ = _velocity(guide(text, audio, "nested"))
    expected = V[NULL] + text * ((V[FULL] - V[SPEECH]) + audio * (V[SPEECH] - V[NULL]))
    assert torch.allclose(v, expected, atol=1e-5)


def test_without_text_guidance_the_formulas_agree() -> None:
    assert guide(1.0, 4.0, "nested") == guide(1.0, 4.0)


def _project_out(d: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return d - (d * v).sum() / (v * v).sum() * v


def test_apg_limits_projects_and_remembers() -> None:
    projection = Projection(momentum=-0.75, norm_threshold=0.5)
    text_sum = audio_sum = torch.zeros_like(V[FULL])
    for step in range(3):
        # Other velocities at each step: what is remembered then has a direction of its own.
        step_v = {which: v.roll(step, dims=0) + step * v.flip(1) for which, v in V.items()}
        full, speech, null = step_v[FULL], step_v[SPEECH], step_v[NULL]
        text_sum = full - speech - 0.75 * text_sum
        audio_sum = speech - null - 0.75 * audio_sum
        text, audio = (_project_out(d * min(1, 0.5 / float(d.norm())), full) for d in (text_sum, audio_sum))
        v, made = _velocity(guide(5.0, 4.0, projected=True), projection, step_v)
        assert made == [FULL, SPEECH, NULL]
        assert torch.allclose(v, full + 4 * text + 3 * audio, atol=1e-5)
        assert abs(float(((v - full) * full).sum())) < 1e-3  # nothing is added along v


def test_apg_with_audio_alone_and_below_the_limit() -> None:
    v, made = _velocity(guide(1.0, 4.0, projected=True), Projection(norm_threshold=1e9))
    assert made == [FULL, PROMPT]
    assert torch.allclose(v, V[FULL] + 3 * _project_out(V[FULL] - V[PROMPT], V[FULL]), atol=1e-5)


def test_apg_of_equal_predictions_is_finite() -> None:
    same = torch.zeros(2, 2)
    assert guide(5.0, 4.0, projected=True).velocity(lambda which: same, Projection()).eq(0).all()


def test_formulas_that_do_not_go_together() -> None:
    with pytest.raises(InputError, match="additive, nested"):
        guide(5.0, 4.0, "product")
    with pytest.raises(InputError, match="additive formula only"):
        guide(5.0, 4.0, "nested", projected=True)


def test_schedules(caplog: pytest.LogCaptureFixture) -> None:
    assert per_step(5, 3, "cfg") == [5.0, 5.0, 5.0]
    assert per_step([5, 2], 4, "cfg") == [5.0, 2.0, 2.0, 2.0]
    assert not caplog.messages
    assert per_step([5, 2, 1], 2, "cfg") == [5.0, 2.0]
    assert "2 of the 3 numbers in the cfg schedule are used" in caplog.text
    with pytest.raises(InputError, match="audio cfg schedule is empty"):
        per_step([], 2, "audio cfg")
