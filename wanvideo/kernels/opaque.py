"""Functions that choose between a kernel and its eager form, each call one operation of a compiled graph.

Inductor's kernels of these groups are slower than ours, into which it cannot look. So on a GPU a compiled graph holds
the call whole, and what computes it is chosen when it runs. On a CPU there is no kernel to keep: there the compiler is
shown the eager form.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.library import custom_op

from .linear import QuantizedRows

__all__ = ["Part", "opaque_in_graphs"]

Function = TypeVar("Function", bound=Callable[..., Any])

Part = Literal["tensor", "rows", "rows if asked"]
"""Of a result: a tensor, `QuantizedRows`, or these where the last argument is True and a tensor otherwise."""

_functions: dict[str, Callable[..., Any]] = {}


def opaque_in_graphs(*parts: Part) -> Callable[[Function], Function]:
    """A decorator for functions of tensors, numbers and tuples of tensors, whose result has these parts.

    The tensors of a result must be fresh and contiguous. The first argument is a tensor; only the last one may be given
    by its name.
    """

    def decorate(function: Function) -> Function:
        name = function.__name__
        _functions[name] = function

        @functools.wraps(function)
        def call(*arguments: Any, **last: Any) -> Any:
            if not torch.compiler.is_compiling() or not is_kept(arguments[0]):
                return function(*arguments, **last)
            arguments = (*arguments, *last.values())
            kinds, tensors, numbers = _packed(arguments)
            values = iter(_operation(name, kinds, tensors, numbers))
            made = tuple(_part(part, values, arguments[-1] is True) for part in parts)
            return made if len(made) > 1 else made[0]

        return call  # type: ignore[return-value]

    return decorate


def is_kept(x: Tensor) -> bool:
    """Whether a call that begins with `x` stays whole in a compiled graph."""
    return x.is_cuda


def _packed(arguments: tuple[Any, ...]) -> tuple[str, list[Tensor], list[float]]:
    """What an operation can take: the kind of each argument, a letter or the length of a tuple; tensors; numbers."""
    kinds = ""
    tensors: list[Tensor] = []
    numbers: list[float] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            kinds += "t"
            tensors.append(argument)
        elif isinstance(argument, tuple):
            kinds += str(len(argument))
            tensors.extend(argument)
        else:
            kinds += "b" if isinstance(argument, bool) else "i" if isinstance(argument, int) else "f"
            numbers.append(float(argument))
    return kinds, tensors, numbers


def _unpacked(kinds: str, tensors: list[Tensor], numbers: list[float]) -> Iterator[Any]:
    rest, left = iter(tensors), iter(numbers)
    for kind in kinds:
        if kind == "t":
            yield next(rest)
        elif kind.isdigit():
            yield tuple(next(rest) for _ in range(int(kind)))
        else:
            yield {"b": bool, "i": int, "f": float}[kind](next(left))


def _part(part: Part, values: Iterator[Tensor], asked: bool) -> Any:
    first = next(values)
    return QuantizedRows(first, next(values)) if part == "rows" or (part == "rows if asked" and asked) else first


def _flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for part in result for x in _flat(part)]


def _call(name: str, kinds: str, tensors: list[Tensor], numbers: list[float]) -> list[Tensor]:
    return _flat(_functions[name](*_unpacked(kinds, tensors, numbers)))


# A fake is what the eager form makes of fake tensors.
_operation = custom_op("wanvideo_infinitetalk::elementwise", _call, mutates_args=())
_operation.register_fake(_call)
