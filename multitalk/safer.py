"""No black frames: what a step with non-finite values leads to.

A window whose model gives NaN or infinity starts over in the next safer attention mode of a ladder, and what follows
stays there. The check is one reduction and one synchronisation a step; the look for the block and the kernels costs a
second evaluation, and only then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from ..wanvideo.errors import InfiniteTalkError
from ..wanvideo.modules.attention import AttentionMode, count_kernels, serves
from .guidance import PASSES, Pass

__all__ = ["SAFER", "AttentionPolicy", "Ladder", "NonFinite", "refuse_non_finite", "safer_modes"]

log = logging.getLogger(__name__)

T = TypeVar("T")

AttentionPolicy = str | Callable[[int, int], AttentionMode]
"""One attention mode for all steps, or (step, steps) -> the mode of that step."""


SAFER: dict[str, tuple[str, ...]] = {
    "sageattn_3": ("sageattn_3_fp8", "sdpa"),
    "sageattn_3_fp4": ("sageattn_3_fp8", "sdpa"),
    "sdpa": (),
}
"""Attention mode -> what comes after it when it gave non-finite values, one after the other. For the others, sdpa."""


def safer_modes(mode: str, device: torch.device) -> list[str]:
    """The rungs below `mode` that can run on `device`."""
    return [safer for safer in SAFER.get(mode, ("sdpa",)) if serves(safer, device)]


class NonFinite(Exception):
    """A step gave non-finite values: its index, the first block that did, and the attention kernels it called."""

    def __init__(self, step: int, block: int | None, kernels: Sequence[str]) -> None:
        super().__init__(step, block, kernels)
        self.step, self.block, self.kernels = step, block, kernels

    def __str__(self) -> str:
        block = "" if self.block is None else f", first in block {self.block}"
        return block + (f" (attention by {', '.join(self.kernels)})" if self.kernels else "")


class Ladder:
    """Attention policies from less to more safe, and the rung that the run stands on.

    Args:
        policy: to begin with; None leaves the mode to the model.
        fallback: what comes after it, without what `policy` gives in every step anyway; None: `safer_modes` of the
            mode that failed.
        steps: of the whole schedule.
        device: where the model runs.
    """

    def __init__(
        self,
        model: object,
        policy: AttentionPolicy | None,
        fallback: Sequence[AttentionPolicy] | None,
        steps: int,
        device: torch.device,
    ) -> None:
        self.model, self.steps, self.device = model, steps, device
        self._policy = policy
        same = {self.name(step) for step in range(steps)}
        self._rungs = None if fallback is None else [safer for safer in fallback if same != {safer}]

    def mode(self, step: int) -> AttentionMode | None:
        """What the model is given in this step."""
        policy = self._policy
        return policy(step, self.steps) if callable(policy) else policy

    def name(self, step: int) -> str:
        """What serves self-attention in this step, for people."""
        mode = self.mode(step)
        if mode is None:
            mode = getattr(self.model, "attention_mode", "of the model")
        return mode(0, "self") if callable(mode) else str(mode)

    def climb(self, attempt: Callable[[], T], generator: torch.Generator, place: str = "") -> T:
        """What `attempt` returns; while it raises NonFinite it starts over, one rung safer, with the same randomness.

        Args:
            attempt: asks `mode` in each step.
            generator: of all random numbers that `attempt` draws.
            place: where it is, such as "window 2, ".

        Raises InfiniteTalkError when there is no safer rung.
        """
        state = generator.get_state()
        while True:
            try:
                return attempt()
            except NonFinite as strike:
                self._step_up(strike, place)
                generator.set_state(state)

    def _step_up(self, strike: NonFinite, place: str) -> None:
        found = (
            f"{place}step {strike.step + 1} of {self.steps}: the model gave non-finite values with attention mode "
            f"{self.name(strike.step)}{strike}"
        )
        if self._rungs is None:
            self._rungs = list(safer_modes(self.name(strike.step), self.device))
        if not self._rungs:
            raise InfiniteTalkError(
                f"In {found}, and there is no safer mode left: the weights, the adapter or the embeddings hold "
                "values that this precision cannot carry; try another file or bf16 weights."
            ) from None
        self._policy = self._rungs.pop(0)
        log.warning("In %s. The window starts over with %s.", found, self.name(strike.step))


def refuse_non_finite(
    velocity: torch.Tensor, step: int, model: object, evaluate: Callable[[Pass], torch.Tensor]
) -> None:
    """Raises NonFinite when `velocity` holds NaN or infinity. The one synchronisation of a step.

    Args:
        evaluate: the model in this step, to look where it begins.
    """
    if not bool(torch.isfinite(velocity).all()):
        raise NonFinite(step, *_first_bad_block(model, evaluate))


def _first_bad_block(model: object, evaluate: Callable[[Pass], torch.Tensor]) -> tuple[int | None, tuple[str, ...]]:
    """The first block whose output is not finite, and the kernels called by then, found by running the step again.

    No block for models without a list of blocks, or when the values are finite this time.
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, torch.nn.ModuleList):
        return None, ()
    bad: list[int] = []

    def look(index: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            if not bad and isinstance(output, torch.Tensor) and not bool(torch.isfinite(output).all()):
                bad.append(index)

        return hook

    handles = [block.register_forward_hook(look(index)) for index, block in enumerate(blocks)]
    try:
        with count_kernels() as kernels:
            for which in PASSES:
                evaluate(which)
                if bad:
                    break
    finally:
        for handle in handles:
            handle.remove()
    return (bad[0] if bad else None), tuple(kernels)
