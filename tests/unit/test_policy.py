"""The policy table: which mode runs in which step, block and role."""

import pytest
import torch
from wanvideo_infinitetalk.pipeline import attention_policy as policy
from wanvideo_infinitetalk.wanvideo.errors import InputError
from wanvideo_infinitetalk.wanvideo.modules import attention
from wanvideo_infinitetalk.wanvideo.modules.attention import ATTENTION_MODES
from wanvideo_infinitetalk.wanvideo.modules.backends import lookup


def row(name: str, chosen: str, steps: int, role: str = "self") -> list[str]:
    return [policy.select(name, chosen, step=s, steps=steps, block=3, blocks=40, role=role) for s in range(steps)]


def test_default_runs_fp4_between_fp8_ends():
    fp8, fp4 = "sageattn_3_fp8", "sageattn_3_fp4"
    assert row("default", fp4, 5) == [fp8, fp4, fp4, fp4, fp8]
    assert row("default", fp4, 2) == [fp8, fp8]
    assert row("default", fp4, 1) == [fp8]


@pytest.mark.parametrize("chosen", ["sdpa", "eager", "sageattn_3_fp8", "flash_attn_2", "auto"])
def test_default_leaves_other_modes_alone(chosen):
    assert row("default", chosen, 4) == [chosen] * 4


def test_16bit_ends():
    assert row("ends_16bit", "sageattn_3_fp8", 4) == ["sdpa", "sageattn_3_fp8", "sageattn_3_fp8", "sdpa"]
    assert row("ends_16bit", "flash_attn_3", 3) == ["flash_attn_3"] * 3


def test_uniform_keeps_the_choice_in_every_step():
    assert row("uniform", "sageattn_3_fp4", 3) == ["sageattn_3_fp4"] * 3


@pytest.mark.parametrize("name", policy.POLICIES)
@pytest.mark.parametrize("role", ["text", "image", "audio"])
@pytest.mark.parametrize("chosen", ["sageattn", "sageattn_3", "sageattn_3_fp4", "sageattn_3_fp8"])
def test_cross_attention_never_runs_in_low_precision(name, role, chosen):
    assert row(name, chosen, 4, role) == ["sdpa"] * 4


@pytest.mark.parametrize("name", policy.POLICIES)
@pytest.mark.parametrize("chosen", ATTENTION_MODES)
@pytest.mark.parametrize("role", policy.ROLES)
def test_every_call_has_a_rule(name, chosen, role):
    assert all(mode in ATTENTION_MODES for mode in row(name, chosen, 6, role))


def test_a_run_that_starts_late_keeps_its_places_in_the_schedule():
    for_step = policy.bind("default", "sageattn_3_fp4", blocks=2)
    modes = [for_step(step, 6)(0, "self") for step in range(3, 6)]  # video-to-video from step 3
    assert modes == ["sageattn_3_fp4", "sageattn_3_fp4", "sageattn_3_fp8"]


def test_block_ranges_count_from_both_ends(monkeypatch):
    rules = (policy.Rule("sdpa", blocks=(-2, 40)), policy.Rule(policy.CHOSEN))
    monkeypatch.setitem(policy.POLICIES, "tail", rules)
    modes = [
        policy.select("tail", "sageattn_3_fp8", step=1, steps=3, block=b, blocks=40, role="self")
        for b in (0, 37, 38, 39)
    ]
    assert modes == ["sageattn_3_fp8", "sageattn_3_fp8", "sdpa", "sdpa"]


def test_an_unknown_policy_is_refused_when_bound():
    with pytest.raises(InputError, match=r"no attention policy 'fast'.*default"):
        policy.bind("fast", "sdpa", blocks=2)


# --- the ladder of safer modes


@pytest.mark.parametrize("mode", ATTENTION_MODES)
def test_every_mode_has_a_way_down_to_the_float32_reference(mode):
    below = policy.safer_modes(mode)
    assert mode not in below
    assert set(below) <= set(ATTENTION_MODES)
    assert mode == "eager" or below[-2:] in (("sdpa", "eager"), ("eager",))


def test_the_ladder_of_fp4():
    assert policy.safer_modes("sageattn_3_fp4") == ("sageattn_3_fp8", "sdpa", "eager")
    assert policy.safer_modes("sage3_fp4") == policy.safer_modes("sageattn_3_fp4")
    assert policy.safer_modes("eager") == ()


def test_a_table_that_goes_round_ends():
    assert policy.safer_modes("a", {"a": "b", "b": "c", "c": "b"}) == ("b", "c")


def test_emulations_are_no_rung_on_a_gpu(monkeypatch):
    monkeypatch.setattr(
        attention.RUNTIME,
        "unavailable_reasons",
        lambda name, device: () if lookup(name).emulation or name == "sdpa" else ("no",),
    )
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert attention.mode_supported("sdpa", gpu)
    assert not attention.mode_supported("sageattn_3_fp8", gpu)
    assert attention.mode_supported("sageattn_3_fp8", cpu)
