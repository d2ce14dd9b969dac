"""A stand-in for a GPU whose every kernel loads 16 bytes at a time, on the CPU.

`checking_kernels` rejects each operand of a linear layer, matrix product, layer norm or attention call that such a
kernel would fault on or misread, and repairs nothing. It can also hand out awkward results, as a kernel that returns
a view of a padded buffer does. `guard_sites` removes one guard at a time, so that a test can show that each is needed.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from wanvideo_infinitetalk.wanvideo.kernels import layout
from wanvideo_infinitetalk.wanvideo.kernels.inputs import Inputs
from wanvideo_infinitetalk.wanvideo.modules import attention as modes
from wanvideo_infinitetalk.wanvideo.modules.backends import Backend, Contract, Device, register, unregister

AWKWARD = ("offset", "transposed", "sliced")
"""Ways in which a tensor of right shape and values lies wrongly in memory, see `awkward`."""


class LayoutRejected(RuntimeError):
    """What a checking kernel raises where a real one would fault, abort or return wrong numbers."""


def awkward(x: torch.Tensor, kind: str | None) -> torch.Tensor:
    """The same values in another layout.

    "offset" starts one element into its storage and is contiguous; "transposed" has its last two axes swapped in
    memory; "sliced" is cut out of rows that are one element longer. None returns `x` itself.
    """
    if kind is None or x.ndim < 2:
        return x
    if kind == "offset":
        return torch.cat((x.new_zeros(1), x.reshape(-1)))[1:].view(x.shape)
    if kind == "transposed":
        return x.transpose(-1, -2).clone(memory_format=torch.contiguous_format).transpose(-1, -2)
    if kind == "sliced":
        return torch.cat((x, x.new_zeros(*x.shape[:-1], 1)), dim=-1)[..., :-1]
    raise ValueError(kind)


def reject_violations(what: str, x: torch.Tensor, *, either_order: bool = False) -> None:
    """Raise `LayoutRejected` for an operand outside the contract of a 16-byte kernel.

    Args:
        either_order: a matrix product also reads an operand whose last two axes are swapped in memory.
    """
    reasons = layout.layout_violations(x)
    if reasons and not (either_order and x.ndim > 1 and not layout.layout_violations(x.transpose(-1, -2))):
        raise LayoutRejected(f"{what} of {tuple(x.shape)}: {', '.join(reasons)}")


class CheckingKernels(TorchFunctionMode):
    """Checks the operands of `linear`, `matmul` and `layer_norm`; counts in `seen` what it checked."""

    def __init__(self, results: str | None) -> None:
        super().__init__()
        self.results = results
        self.seen: dict[str, int] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        names = {F.linear: "linear", torch.matmul: "matmul", F.layer_norm: "layer_norm", torch.add: "add"}
        name = names.get(func)
        if name in ("linear", "layer_norm"):
            reject_violations(f"the input of {name}", args[0])
        if name == "matmul":
            reject_violations("the left operand of matmul", args[0], either_order=True)
            reject_violations("the right operand of matmul", args[1], either_order=True)
        out = func(*args, **(kwargs or {}))
        return out if name is None else self.result(name, out)

    def result(self, name: str, out: torch.Tensor) -> torch.Tensor:
        self.seen[name] = self.seen.get(name, 0) + 1
        return awkward(out, self.results)

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention_mode: str = "") -> torch.Tensor:
        """In the place of `attention`: the same arguments, no repair."""
        return self.result("attention", _checked_attention(Inputs(q, k, v)))


@contextlib.contextmanager
def checking_kernels(*modules: ModuleType, results: str | None = None) -> Iterator[CheckingKernels]:
    """Every kernel inside the `with` block rejects what a 16-byte kernel would misread.

    Args:
        modules: those whose `attention` is replaced, so that even the repair behind it is out of the way.
        results: how the results of all kernels lie in memory, see `awkward`.
    """
    kernels = CheckingKernels(results)
    with pytest.MonkeyPatch.context() as patch, kernels:
        for module in modules:
            patch.setattr(module, "attention", kernels.attention)
        yield kernels


@contextlib.contextmanager
def checking_backend() -> Iterator[str]:
    """Register an attention backend whose contract repairs nothing and which rejects; gives the name of its mode."""
    name = "checking"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    register(Backend(name, Contract(dtypes=dtypes, layout="any", device=Device(types=())), _checked_attention))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(modes.MODE_BACKENDS, name, (name,))
        try:
            yield name
        finally:
            unregister(name)


def _checked_attention(inputs: Inputs) -> torch.Tensor:
    tensors = {"q": inputs.q, "k": inputs.k, "v": inputs.v}
    for name, x in tensors.items():
        reject_violations(f"attention's {name}", x)
    q, k, v = (x.transpose(1, 2) for x in tensors.values())
    out = F.scaled_dot_product_attention(q, k, v, inputs.attn_mask, is_causal=inputs.causal, scale=inputs.softmax_scale)
    return out.transpose(1, 2).clone(memory_format=torch.contiguous_format)


Site = tuple[str, int]
"""A guard in the source: the function it stands in, and the position of the call in its code."""


@contextlib.contextmanager
def guard_sites(module: ModuleType, without: Site | None = None) -> Iterator[set[Site]]:
    """Collect the guards of `module` that run inside the `with` block.

    Args:
        without: the guard that is taken out: it returns what it is given.
    """
    sites: set[Site] = set()

    def watched(guard: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(x: torch.Tensor, *args: Any) -> torch.Tensor:
            frame = sys._getframe(1)
            site = (f"{frame.f_code.co_name}:{frame.f_lineno}", frame.f_lasti)
            sites.add(site)
            return x if site == without else guard(x, *args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("aligned_contiguous", "aligned_strided"):
            patch.setattr(module, name, watched(getattr(layout, name)))
        yield sites
