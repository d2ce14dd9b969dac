"""The attention mode of each step, block and role: a table, read without a GPU.

SageAttention3's README (thu-ml/SageAttention) advises more precision where a diffusion run is most sensitive: the first
and the last step. A policy is a tuple of rules; the first one that matches decides. Cross attention to audio, text and
image has few keys, where low precision is slower and less accurate: it stays on SDPA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..wanvideo.errors import InputError, plain
from ..wanvideo.modules.attention import MODE_ALIASES, AttentionMode, mode_for_role

CHOSEN = "chosen"
"""In a rule's `mode`: the mode that the user chose, as `mode_for_role` turns it for the role."""

FP4_MODES = ("sageattn_3", "sageattn_3_fp4")
ROLES = ("self", "text", "image", "audio")
STEPS = ("any", "first", "last", "middle")


@dataclass(frozen=True)
class Rule:
    """`mode` for every call that matches all of the other fields.

    Attributes:
        mode: an attention mode, or `CHOSEN`.
        roles: of `ROLES`; empty matches all.
        steps: one of `STEPS`; "first" and "last" are the ends of the whole schedule, also where a run starts late.
        chosen: modes that the user may have chosen; empty matches all.
        blocks: half-open range (start, stop) of block indices, negative ones counted from the end; None matches all.
    """

    mode: str
    roles: tuple[str, ...] = ()
    steps: str = "any"
    chosen: tuple[str, ...] = ()
    blocks: tuple[int, int] | None = None

    def matches(self, step: int, steps: int, block: int, blocks: int, role: str, chosen: str) -> bool:
        place = {"any": True, "first": step == 0, "last": step == steps - 1, "middle": 0 < step < steps - 1}
        inside = self.blocks is None or block in range(*slice(*self.blocks).indices(blocks))
        return (
            place[self.steps]
            and inside
            and (not self.roles or role in self.roles)
            and (not self.chosen or chosen in self.chosen)
        )


POLICIES: dict[str, tuple[Rule, ...]] = {
    # FP4 in the middle, FP8 at both ends; every other mode as chosen.
    "default": (
        Rule(CHOSEN, roles=("text", "image", "audio")),
        Rule("sageattn_3_fp8", steps="first", chosen=FP4_MODES),
        Rule("sageattn_3_fp8", steps="last", chosen=FP4_MODES),
        Rule(CHOSEN),
    ),
    # 16 bit at both ends of any low-precision run.
    "ends_16bit": (
        Rule(CHOSEN, roles=("text", "image", "audio")),
        Rule("sdpa", steps="first", chosen=(*FP4_MODES, "sageattn_3_fp8", "sageattn")),
        Rule("sdpa", steps="last", chosen=(*FP4_MODES, "sageattn_3_fp8", "sageattn")),
        Rule(CHOSEN),
    ),
    # The chosen mode in every step.
    "uniform": (Rule(CHOSEN),),
}
"""The named policies, which the `attention_policy` option of the command and the node offers."""


SAFER: dict[str, str] = {
    "sageattn_3": "sageattn_3_fp8",
    "sageattn_3_fp4": "sageattn_3_fp8",
    "sageattn_3_fp8": "sdpa",
    "sageattn": "sdpa",
    "flash_attn_2": "sdpa",
    "flash_attn_3": "sdpa",
    "comfy": "sdpa",
    "auto": "sdpa",
    "sdpa": "eager",
}
"""Mode -> the next safer one, for a window whose values were not finite. The float32 reference has none."""


def safer_modes(mode: str, table: Mapping[str, str] = SAFER) -> tuple[str, ...]:
    """All modes safer than `mode`, the nearest first."""
    found: list[str] = []
    mode = MODE_ALIASES.get(plain(mode), mode)
    while (mode := table.get(mode, "")) and mode not in found:
        found.append(mode)
    return tuple(found)


def select(policy: str, chosen: str, *, step: int, steps: int, block: int, blocks: int, role: str) -> str:
    """The attention mode of one call.

    Args:
        policy: a name of `POLICIES`.
        chosen: the attention mode that the user chose.
        step: index in the whole schedule of `steps`, so that a run that starts late or skips steps keeps its places.
        block: index of the transformer block, of `blocks`.
        role: "self", "text", "image" or "audio".

    Raises:
        InputError: for an unknown policy.
    """
    if policy not in POLICIES:
        raise InputError(f"There is no attention policy '{policy}'. Choose one of: {', '.join(POLICIES)}.")
    for rule in POLICIES[policy]:
        if rule.matches(step, steps, block, blocks, role, chosen):
            return mode_for_role(chosen if rule.mode == CHOSEN else rule.mode, role)
    raise AssertionError(f"policy '{policy}' has no rule for {role} in step {step}: its last one must match everything")


@dataclass(frozen=True)
class ModeOverride:
    """Another mode of self-attention in a part of a run, whatever the policy says there.

    Attributes:
        mode: an attention mode.
        steps: half-open range (start, stop) of steps.
        blocks: indices of blocks; None: all.
    """

    mode: str
    steps: tuple[int, int]
    blocks: tuple[int, ...] | None = None

    def holds(self, step: int, block: int) -> bool:
        return self.steps[0] <= step < self.steps[1] and (self.blocks is None or block in self.blocks)


def overridden(
    policy: Callable[[int, int], AttentionMode], overrides: Sequence[ModeOverride]
) -> Callable[[int, int], AttentionMode]:
    """`policy` with the `overrides` in force; of several that hold, the last."""

    def mode(asked: AttentionMode, step: int, block: int, role: str) -> str:
        if role == "self":
            for override in reversed(overrides):
                if override.holds(step, block):
                    return override.mode
        return asked(block, role) if callable(asked) else asked

    def of_step(step: int, steps: int) -> AttentionMode:
        asked = policy(step, steps)
        return lambda block, role: mode(asked, step, block, role)

    return of_step if overrides else policy


def bind(policy: str, chosen: str, blocks: int) -> Callable[[int, int], AttentionMode]:
    """`(step, steps) -> (block, role) -> mode`, the form that the generation loop takes.

    Raises:
        InputError: for an unknown policy, at once rather than in the first step.
    """
    select(policy, chosen, step=0, steps=1, block=0, blocks=blocks, role="self")
    return lambda step, steps: (
        lambda block, role: select(policy, chosen, step=step, steps=steps, block=block, blocks=blocks, role=role)
    )
