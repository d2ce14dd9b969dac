"""One forward on several GPUs: the tokens of every latent frame are divided among processes.

All processes run the same code with the same inputs; what is divided is the tokens of a forward, and the passes of a
step. Tokens are divided *inside every latent frame*, so that what belongs to one frame (its audio tokens, the places of
the speakers) stays in one process, and exact. Self-attention needs all tokens: around it `TokenSplit.heads` exchanges
tokens for heads, one all-to-all each for q, k and v and one back (DeepSpeed-Ulysses, arXiv 2309.14509). A process has
all tokens of its share of the heads then, those of one process behind those of another: softmax does not depend on the
order of keys.

The communication is torch.distributed's: NCCL between GPUs, gloo between processes on CPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ..errors import InputError

__all__ = ["ALONE", "Mesh", "PassSplit", "Split", "TokenSplit", "check_tokens", "make_mesh", "mesh_of"]

# torch 2.13 has a new name for it, and warns of the one that 2.8 has.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Pass = TypeVar("Pass")


@dataclass(frozen=True)
class Split:
    """This process among those of a group: which, and of how many."""

    group: dist.ProcessGroup
    rank: int
    size: int

    def counts(self, length: int) -> list[int]:
        """Shares of a length: process r has what lies from length r / n to length (r + 1) / n, rounded down."""
        bounds = [length * rank // self.size for rank in range(self.size + 1)]
        return [bounds[rank + 1] - bounds[rank] for rank in range(self.size)]

    def gather_parts(self, x: Tensor, counts: Sequence[int], axis: int) -> Tensor:
        """What each process has along an axis, `counts` of its length, one behind the other, in all of them."""
        missing = max(counts) - counts[self.rank]
        part = F.pad(x, (0, 0) * (x.ndim - 1 - axis) + (0, missing)) if missing else x.contiguous()
        parts = part.new_empty(self.size, *part.shape)
        _all_gather(parts.flatten(0, 1), part, group=self.group)
        pieces = [piece.narrow(axis, 0, count) for piece, count in zip(parts, counts, strict=True)]
        return torch.cat(pieces, dim=axis)


class TokenSplit(Split):
    """A share of the tokens of each latent frame, for one video at a time.

    T is the number of frames, S that of the places of a frame, s of those that this process has. Any S can be divided.
    """

    def take(self, x: Tensor, frames: int, axis: int = 1) -> Tensor:
        """The axis of tokens T*S -> of this process's tokens T*s; a copy."""
        by_frame: Tensor = x.unflatten(axis, (frames, -1))
        counts = self.counts(int(by_frame.shape[axis + 1]))
        mine = by_frame.narrow(axis + 1, sum(counts[: self.rank]), counts[self.rank])
        return mine.flatten(axis, axis + 1)

    def heads(self, x: Tensor, frames: int, places: int) -> Callable[[], Tensor]:
        """Begin to exchange tokens for heads; the result waits for the exchange.

        Args:
            x: [1, T*s, H, D].

        Returns:
            A function that gives [1, T*S, H/n, D], contiguous, the tokens of one process behind those of another.
        """
        _, tokens, heads, head_dim = x.shape
        counts = [frames * count for count in self.counts(places)]
        sent = x.reshape(tokens, self.size, heads // self.size, head_dim).transpose(0, 1).contiguous()
        received = x.new_empty(frames * places, heads // self.size, head_dim)
        work = dist.all_to_all_single(
            received, sent.flatten(0, 1), counts, [tokens] * self.size, group=self.group, async_op=True
        )

        def finish() -> Tensor:
            work.wait()
            return received.unsqueeze(0)

        return finish

    def tokens(self, x: Tensor, frames: int, places: int) -> Tensor:
        """The way back of `heads`: [1, T*S, H/n, D] -> [1, T*s, H, D], contiguous."""
        _, _, heads, head_dim = x.shape
        counts = [frames * count for count in self.counts(places)]
        received = x.new_empty(self.size, counts[self.rank], heads, head_dim)
        dist.all_to_all_single(
            received.flatten(0, 1), x[0].contiguous(), [counts[self.rank]] * self.size, counts, group=self.group
        )
        return received.transpose(0, 1).flatten(1, 2).unsqueeze(0)

    def gather(self, x: Tensor, frames: int, places: int) -> Tensor:
        """[1, T*s, ...] of each process -> [1, T*S, ...] in all of them, in the order of the grid."""
        by_frame: Tensor = x.squeeze(0).unflatten(0, (frames, -1))
        return self.gather_parts(by_frame, self.counts(places), axis=1).flatten(0, 1).unsqueeze(0)

    def lowest(self, x: Tensor) -> Tensor:
        """The elementwise minimum over all processes."""
        return self._reduced(x, dist.ReduceOp.MIN)

    def highest(self, x: Tensor) -> Tensor:
        """The elementwise maximum over all processes."""
        return self._reduced(x, dist.ReduceOp.MAX)

    def mean(self, x: Tensor, places: int) -> Tensor:
        """The mean over all places of a frame, of the means over those of each process."""
        share = self.counts(places)[self.rank] / places
        return self._reduced(x * share, dist.ReduceOp.SUM)

    def _reduced(self, x: Tensor, operation: Any) -> Tensor:
        reduced = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(reduced, operation, group=self.group)
        return reduced


class PassSplit(Split):
    """A share of the passes of a step."""

    def evaluate(
        self, passes: Sequence[Pass], owner: Mapping[Pass, int], evaluate: Callable[[Pass], Tensor], like: Tensor
    ) -> dict[Pass, Tensor]:
        """What `evaluate` gives for each of the passes, in all processes.

        Args:
            owner: pass -> a number, modulo the size the process that evaluates it.
            like: a tensor of the shape and dtype of what it gives.
        """
        mine = {which: evaluate(which) for which in passes if owner[which] % self.size == self.rank}
        found = {which: mine[which].contiguous() if which in mine else torch.empty_like(like) for which in passes}
        for which in passes:
            source = dist.get_global_rank(self.group, owner[which] % self.size)
            dist.broadcast(found[which], source, group=self.group)
        return found


@dataclass(frozen=True)
class Mesh:
    """How this process shares in the work of all; None where there is nothing to share."""

    world: Split | None = None
    tokens: TokenSplit | None = None
    passes: PassSplit | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, logs and answers."""
        return self.world is None or self.world.rank == 0

    def same(self, x: Tensor) -> Tensor:
        """The first process's `x`, in all of them."""
        if self.world is not None:
            x = x.contiguous()
            dist.broadcast(x, 0)
        return x

    def least(self, number: int, device: torch.device) -> int:
        """The least of the numbers of all processes."""
        if self.world is None:
            return number
        agreed = torch.tensor([number], device=device)
        dist.all_reduce(agreed, dist.ReduceOp.MIN)
        return int(agreed)


ALONE = Mesh()


def check_tokens(size: int, heads: int, places: int) -> None:
    """Raise InputError for a model or a frame whose tokens cannot be divided among `size` processes."""
    if heads % size:
        fitting = [str(n) for n in range(2, heads + 1) if heads % n == 0]
        raise InputError(f"{heads} attention heads cannot be divided among {size} GPUs: use {' or '.join(fitting)}.")
    if places < size:
        raise InputError(
            f"A latent frame of {places} tokens is too small for {size} GPUs: choose a larger size, or fewer."
        )


def mesh_of(model: object) -> Mesh:
    """The mesh that computes a model; `ALONE` for anything that has none."""
    mesh = getattr(model, "mesh", ALONE)
    return mesh if isinstance(mesh, Mesh) else ALONE


def make_mesh(device_type: str, passes: int = 1) -> Mesh:
    """The mesh of all processes of torch.distributed, so many along the passes of a step, the rest along tokens.

    Processes that divide tokens are neighbors, as they exchange most. `init_process_group` comes before.
    """
    size = dist.get_world_size()
    mesh = init_device_mesh(device_type, (passes, size // passes), mesh_dim_names=("passes", "tokens"))
    splits: dict[str, Any] = {}
    for name, kind in (("tokens", TokenSplit), ("passes", PassSplit)):
        if mesh[name].size() > 1:
            splits[name] = kind(mesh[name].get_group(), mesh[name].get_local_rank(), mesh[name].size())
    assert dist.group.WORLD is not None
    return Mesh(Split(dist.group.WORLD, dist.get_rank(), size), **splits)
