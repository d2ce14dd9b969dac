"""No black frames: what a step with non-finite values leads to.

A window whose model gives NaN or infinity starts over in the next safer attention mode of a table
(`attention_policy.SAFER`), and what follows stays there. The check is one reduction and one synchronization a step; the
search for the block and the kernels costs a second evaluation, and only then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from ..wanvideo.errors import InfiniteTalkError
from ..wanvideo.modules.attention import AttentionMode, canonical_mode, count_kernels, mode_supported
from ..wanvideo.runtime.parallel import mesh_of
from .attention_policy import safer_modes
from .guidance import Pass

__all__ = ["AttentionPolicy", "FallbackModes", "NonFinite", "check_finite"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

AttentionPolicy = str | Callable[[int, int], AttentionMode]
"""One attention mode for all steps, or (step, steps) -> the mode of that step."""


class NonFinite(Exception):
    """A step gave non-finite values: its index, the first block that did, and the attention kernels it called."""

    def __init__(self, step: int, block: int | None, kernels: Sequence[str]) -> None:
        super().__init__(step, block, kernels)
        self.step, self.block, self.kernels = step, block, kernels

    def __str__(self) -> str:
        block = "" if self.block is None else f", first in block {self.block}"
        return block + (f" (attention by {', '.join(self.kernels)})" if self.kernels else "")


class FallbackModes:
    """The attention mode of each step, and after non-finite values the least safe mode still allowed (`floor`).

    A mode that gave non-finite values is followed by the next one of `fallback` that runs on `device`, for every step
    and block whose mode is not safer anyway: an FP4 run with 16-bit ends keeps its ends when FP8 takes FP4's place.

    Args:
        policy: to begin with; None leaves the mode to the model (its `attention_mode`, or sdpa where it names none).
        fallback: mode -> the next safer one, such as `attention_policy.SAFER`.
        steps: of the whole schedule.
    """

    def __init__(
        self,
        model: object,
        policy: AttentionPolicy | None,
        fallback: Mapping[str, str],
        steps: int,
        device: torch.device,
    ) -> None:
        self.model, self.policy, self.fallback, self.steps, self.device = model, policy, fallback, steps, device
        self.floor: str | None = None

    def mode(self, step: int) -> AttentionMode | None:
        """What the model is given in this step."""
        mode = self.policy(step, self.steps) if callable(self.policy) else self.policy
        if self.floor is None:
            return mode
        asked = self._mode_of_model() if mode is None else mode
        if not callable(asked):
            return self._at_least_floor(asked)
        return lambda block, role: self._at_least_floor(asked(block, role))

    def _mode_of_model(self) -> AttentionMode:
        mode: AttentionMode = getattr(self.model, "attention_mode", "sdpa")
        return mode

    def _at_least_floor(self, mode: str) -> str:
        """`mode`, or the floor where that is safer."""
        mode = canonical_mode(mode)
        return self.floor if self.floor is not None and self.floor in safer_modes(mode, self.fallback) else mode

    def name(self, step: int, block: int | None = None) -> str:
        """The mode of self-attention in this step and block; the least safe of all blocks where none is named."""
        mode = self.mode(step) or self._mode_of_model()
        if not callable(mode):
            return str(mode)
        blocks = range(len(getattr(self.model, "blocks", ())) or 1) if block is None else (block,)
        return max((mode(index, "self") for index in blocks), key=lambda name: len(safer_modes(name, self.fallback)))

    def retry(self, attempt: Callable[[], T], generator: torch.Generator, place: str = "") -> T:
        """What `attempt` returns; while it raises NonFinite it starts over in a safer mode, with the same randomness.

        Args:
            attempt: asks `mode` in each step.
            generator: of all random numbers that `attempt` draws.
            place: where it is, such as "window 2, ".

        Raises InfiniteTalkError when there is no safer mode.
        """
        state = generator.get_state()
        while True:
            try:
                return attempt()
            except NonFinite as error:
                self._fall_back(error, place)
                generator.set_state(state)

    def _fall_back(self, error: NonFinite, place: str) -> None:
        failed = self.name(error.step, error.block)
        found = (
            f"{place}step {error.step + 1} of {self.steps}: the model gave non-finite values with attention mode "
            f"{failed}{error}"
        )
        safer = next((mode for mode in safer_modes(failed, self.fallback) if mode_supported(mode, self.device)), None)
        if safer is None:
            raise InfiniteTalkError(
                f"In {found}, and there is no safer mode left: the weights, the adapter or the embeddings hold "
                "values that this precision cannot carry; try another file or bf16 weights."
            ) from None
        self.floor = safer
        logger.warning("In %s. The window starts over with %s.", found, safer)


def check_finite(
    velocity: torch.Tensor,
    step: int,
    model: object,
    evaluate: Callable[[Pass], torch.Tensor],
    passes: Sequence[Pass],
) -> None:
    """Raises NonFinite when `velocity` holds NaN or infinity. The one synchronization of a step.

    Args:
        evaluate: the model in this step, to find where they begin; `passes`: the ones that this step made.
    """
    if not bool(torch.isfinite(velocity).all()):
        raise NonFinite(step, *_first_bad_block(model, evaluate, passes, velocity.device))


def _first_bad_block(
    model: object, evaluate: Callable[[Pass], torch.Tensor], passes: Sequence[Pass], device: torch.device
) -> tuple[int | None, tuple[str, ...]]:
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
    mesh, index = mesh_of(model), len(blocks)
    try:
        with count_kernels() as kernels:
            for which in passes:
                evaluate(which)
                # Each process sees its own tokens; all of them go on, or stop, together.
                index = mesh.least(min(bad, default=len(blocks)), device)
                if index < len(blocks):
                    break
    finally:
        for handle in handles:
            handle.remove()
    return (index if index < len(blocks) else None), tuple(kernels)
