"""The guard: the same object where the contract holds, one fresh aligned copy where it does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from wanvideo_infinitetalk.wanvideo.kernels.layout import (
    ALIGNMENT,
    aligned_contiguous,
    aligned_rows,
    aligned_strided,
    count_guards,
    even_strides,
    layout_violations,
    private_copy,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.float8_e4m3fn]
GUARDS = [aligned_contiguous, aligned_strided]


def at_offset(offset: int, dtype: torch.dtype, shape: tuple[int, ...] = (2, 32)) -> torch.Tensor:
    """A contiguous view `offset` elements into aligned storage."""
    count = 1
    for size in shape:
        count *= size
    storage = torch.arange(count + offset, dtype=torch.float32).remainder(100).to(dtype)
    assert storage.data_ptr() % 64 == 0
    return storage[offset:].view(shape)


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", range(16))
def test_offset(guard: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, offset: int) -> None:
    x = at_offset(offset, dtype)
    aligned = offset * x.element_size() % 16 == 0
    with count_guards() as stats:
        y = guard(x)
    assert (y is x) == aligned
    assert stats.calls == 1
    assert stats.copies == (0 if aligned else 1)
    assert stats.bytes == (0 if aligned else x.numel() * x.element_size())
    assert y.data_ptr() % 16 == 0
    assert y.is_contiguous()
    assert torch.equal(y.view(torch.uint8), x.clone().view(torch.uint8))


BASE = torch.arange(2 * 8 * 4 * 16, dtype=torch.float32).view(2, 8, 4, 16).to(torch.bfloat16)
WIDE = torch.zeros(2, 8, 65, dtype=torch.bfloat16)
FUSED = torch.zeros(2, 8, 3, 4, 16, dtype=torch.bfloat16)

# view, whether a 16-byte kernel may read it by its strides, whether it is contiguous as well
VIEWS = {
    "whole": (BASE, True, True),
    "sliced tokens": (BASE[:, 2:5], True, False),
    "sliced heads": (BASE[:, :, 1:3], True, False),
    "half a head": (BASE[..., 8:], True, False),
    "a quarter": (BASE[..., 4:8], False, False),
    "transposed": (BASE.transpose(1, 2), True, False),
    "channels first": (BASE.transpose(-1, -2), False, False),
    "expanded": (BASE[:1].expand(3, 8, 4, 16), True, False),
    "fused qkv": (FUSED.unbind(2)[1], True, False),
    "padded rows": (WIDE[..., :64], False, False),
    "odd width": (torch.zeros(4, 15, dtype=torch.bfloat16), False, True),
    "one row of odd width": (torch.zeros(1, 15, dtype=torch.bfloat16), True, True),
    "size-1 dimension with an odd stride": (torch.zeros(64).as_strided((4, 1, 8), (8, 3, 1)), True, True),
    "every second": (BASE[..., ::2], False, False),
    "empty": (BASE[:, :0], True, True),
    "scalar": (torch.zeros(()), True, True),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views(name: str) -> None:
    x, strided_is_enough, contiguous = VIEWS[name]
    assert (layout_violations(x) == []) == strided_is_enough
    assert (aligned_strided(x) is x) == strided_is_enough
    assert (aligned_contiguous(x) is x) == contiguous
    for guard in GUARDS:
        y = guard(x)
        assert torch.equal(y, x)
        assert y.shape == x.shape
        assert y.data_ptr() % 16 == 0
        assert y is x or y.is_contiguous()


def test_all_violations_are_named() -> None:
    storage = torch.zeros(4096, dtype=torch.bfloat16)
    x = storage[1:].as_strided((4, 5, 6), (101, 10, 2), 3)
    assert layout_violations(x, max_extent=300) == [
        "it starts 6 bytes past a multiple of 16",
        "its last stride is 2, not 1",
        "dimension 0 has a stride of 202 bytes, no multiple of 16",
        "dimension 1 has a stride of 20 bytes, no multiple of 16",
        "its last element lies 353 elements from its first, beyond 299",
    ]


def test_extent_counts_what_is_stepped_over() -> None:
    """A small slice of a huge tensor may lie beyond 32-bit offsets; the meta device has sizes without memory."""
    huge = torch.empty(3, 2**30, dtype=torch.bfloat16, device="meta")
    assert layout_violations(huge[:2, :8]) == []
    assert layout_violations(huge[:, :8]) == [
        f"its last element lies {2**31 + 7} elements from its first, beyond {2**31 - 1}"
    ]


@pytest.mark.parametrize(("max_extent", "fits"), [(127, False), (128, True)])
def test_the_last_offset_lies_below_the_extent(max_extent: int, fits: bool) -> None:
    x = torch.zeros(2, 64, dtype=torch.bfloat16)  # the last element is 127 from the first
    assert (layout_violations(x, max_extent=max_extent) == []) == fits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.bool])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 257])
def test_rows_are_padded_to_aligned_addresses(dtype: torch.dtype, width: int) -> None:
    x = (torch.randn(2, 3, 4, width) > 0).to(dtype)
    y = aligned_rows(x)
    assert layout_violations(y) == []
    assert torch.equal(x, y)
    assert aligned_rows(y) is y


def test_broadcast_rows_are_copied_once() -> None:
    x = torch.randn(1, 1, 5, 13).expand(8, 4, 5, 13)
    with count_guards() as stats:
        y = aligned_rows(x)
    assert layout_violations(y) == []
    assert torch.equal(x, y)
    assert stats.copies == 1
    assert stats.bytes == 5 * 13 * 4
    assert y.stride()[:2] == (0, 0)


def test_private_copy_shares_nothing() -> None:
    x = torch.randn(3, 4)
    y = private_copy(x)
    y.zero_()
    assert x.abs().sum() > 0


def test_nested_counts_add_up() -> None:
    x = at_offset(1, torch.bfloat16)
    with count_guards() as outer:
        aligned_contiguous(x)
        with count_guards() as inner:
            aligned_contiguous(x)
            aligned_strided(BASE)
    assert (inner.calls, inner.copies) == (2, 1)
    assert (outer.calls, outer.copies) == (3, 2)
    aligned_contiguous(x)
    assert outer.calls == 3


def test_gradients_flow_through_the_copy() -> None:
    x = torch.randn(65, requires_grad=True)
    aligned_contiguous(x[1:]).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0] + [1.0] * 64


@pytest.mark.parametrize("guard", GUARDS)
def test_compiles_without_a_graph_break(guard: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: guard(x.transpose(0, 1)) * 2, fullgraph=True, backend="eager")
    x = torch.randn(4, 6)
    with count_guards():
        assert torch.equal(compiled(x), x.t() * 2)


def test_the_guard_costs_microseconds() -> None:
    """Host time only; the bound is generous, the point is that nothing is launched or copied."""
    import timeit

    x = torch.zeros(1, 64, 8, 64)
    best = min(timeit.repeat(lambda: aligned_strided(x), number=1000, repeat=5)) / 1000
    assert best < 50e-6


def test_even_strides_change_no_address_and_copy_nothing() -> None:
    x = torch.randn(1, 17, 64, 1).transpose(2, 3)  # [1, 17, 1, 64], strides of 1 for one head
    assert x.stride(2) == 1
    even = even_strides(x)
    assert even.stride(2) * 4 % ALIGNMENT == 0
    assert even.data_ptr() == x.data_ptr()
    assert torch.equal(even, x)
    plain = torch.randn(2, 17, 4, 64)
    assert even_strides(plain) is plain


def test_the_last_element_lies_below_the_largest_extent() -> None:
    x = torch.zeros(4, 8)  # its last element lies 31 elements from its first
    assert layout_violations(x, max_extent=32) == []
    assert layout_violations(x, max_extent=31) == ["its last element lies 31 elements from its first, beyond 30"]
