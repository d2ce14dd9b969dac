"""The Triton attention kernels on the GPU, called directly: right against float64 at any length, stride and size.

Bounds are relative L2. A kernel may exceed the same numerics in plain torch by 5 %; where the exact result is nearly
zero, or one key decides, a fixed bound stands instead.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from wanvideo_infinitetalk.wanvideo.kernels import sage_fp4, sage_fp8
from wanvideo_infinitetalk.wanvideo.kernels.emulation import int8_fp8_attention, nvfp4_attention
from wanvideo_infinitetalk.wanvideo.kernels.layout import count_guards
from wanvideo_infinitetalk.wanvideo.kernels.quantizers import nvfp4_tensor_scale, quantize_nvfp4
from wanvideo_infinitetalk.wanvideo.linear.base import relative_l2

pytestmark = pytest.mark.cuda

NO_WORSE, ROUNDING = 1.05, 0.004
"""Over the plain-torch numerics: the factor, and what bf16 output and a different order of sums may add."""

KERNELS = {
    "fp8": (sage_fp8.sage_fp8_attention, int8_fp8_attention, 0.05),
    "fp4": (sage_fp4.sage_fp4_attention, nvfp4_attention, 0.25),
}
Attend = Callable[..., torch.Tensor]


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def check(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    attend, plain, _ = KERNELS[name]
    wanted = exact(q, k, v, scale)
    before = [x.clone() for x in (q, k, v)]
    out = attend(q, k, v, scale)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert out.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True)), "an input changed"
    assert relative_l2(out, wanted) <= NO_WORSE * relative_l2(plain(q, k, v, scale), wanted) + ROUNDING
    return out


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("keys", [1, 2, 31, 63, 64, 65, 127, 128, 129, 255, 257, 511, 1025])
def test_any_length_of_keys(name: str, head_dim: int, keys: int) -> None:
    check(name, random(1, 70, 2, head_dim), random(1, keys, 2, head_dim), random(1, keys, 2, head_dim))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("queries", [1, 63, 64, 65, 127, 128, 129, 191, 257])
def test_any_length_of_queries_and_batch(name: str, queries: int) -> None:
    check(name, random(3, queries, 2, 128), random(3, 300, 2, 128), random(3, 300, 2, 128))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_dtype(name: str, dtype: torch.dtype) -> None:
    check(name, *(random(1, length, 3, 128, dtype=dtype) for length in (200, 333, 333)))


def test_head_dim_96_in_fp8() -> None:
    check("fp8", random(1, 200, 2, 96), random(1, 333, 2, 96), random(1, 333, 2, 96))


@pytest.mark.parametrize("name", KERNELS)
def test_a_softmax_scale(name: str) -> None:
    check(name, random(1, 200, 2, 128), random(1, 300, 2, 128), random(1, 300, 2, 128), scale=0.2)


@pytest.mark.parametrize("name", KERNELS)
def test_strides_are_read_without_a_copy(name: str) -> None:
    fused = random(2, 300, 3, 4, 128)
    heads_first = random(2, 4, 300, 128).transpose(1, 2)
    expanded = random(1, 300, 4, 128).expand(2, -1, -1, -1)
    sliced = random(2, 400, 6, 128)[:, 50:350, 1:5]
    with count_guards() as stats:
        check(name, *fused.unbind(2))
        check(name, heads_first, expanded, sliced)
    assert stats.copies == 0


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("offset", [1, 2, 4, 7])
def test_any_other_layout_is_copied_once_and_right(name: str, offset: int) -> None:
    def shifted() -> torch.Tensor:
        return random(200 * 2 * 64 + offset).narrow(0, offset, 200 * 2 * 64).view(1, 200, 2, 64)

    def odd_rows() -> torch.Tensor:
        return random(1, 200, 2 * 64 + offset)[..., : 2 * 64].unflatten(2, (2, 64))

    with count_guards() as stats:
        check(name, shifted(), odd_rows(), random(1, 64, 2, 200).permute(0, 3, 2, 1))
    assert stats.copies == 3


@pytest.mark.parametrize("name", KERNELS)
def test_outlier_channels(name: str) -> None:
    q, k, v = random(1, 500, 4, 128), random(1, 700, 4, 128), random(1, 700, 4, 128)
    k[..., ::32] += 10 * random(1, 1, 4, 4)
    q[..., ::32] *= 4
    v[..., ::32] = 10 * v[..., ::32] + 3
    check(name, q, k, v)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("size", [3e4, 1e5, 1e30])
def test_large_values_of_v_stay_finite(name: str, size: float) -> None:
    q, k, v = random(1, 200, 2, 128), random(1, 300, 2, 128), random(1, 300, 2, 128) * size
    assert check(name, q, k, v).isfinite().all()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("size", [300.0, 3e4])
def test_large_scores_stay_finite(name: str, size: float) -> None:
    attend = KERNELS[name][0]
    q, k, v = random(1, 200, 2, 128) * size, random(1, 300, 2, 128) * size, random(1, 300, 2, 128)
    out = attend(q, k, v)
    assert out.isfinite().all()
    assert out.abs().max() <= v.abs().max() * 1.1  # a mean of rows of V


@pytest.mark.parametrize("name", KERNELS)
def test_one_key_that_decides(name: str) -> None:
    """Scores so far apart that the exact result is one row of V."""
    k = 40 * torch.nn.functional.one_hot(torch.arange(100), 128).bfloat16().cuda()[None, :, None]
    v = random(1, 100, 1, 128)
    assert relative_l2(KERNELS[name][0](k, k, v), v.double()) < (0.04 if name == "fp8" else 0.12)


@pytest.mark.parametrize("name", KERNELS)
def test_equal_rows_zeros_and_constants(name: str) -> None:
    attend, _, bound = KERNELS[name]
    q, v = random(1, 200, 2, 128), random(1, 300, 2, 128)
    row = random(1, 1, 2, 128)
    for k in (row.expand(1, 300, 2, 128), 3e4 * torch.ones_like(v), torch.zeros_like(v)):
        assert relative_l2(attend(q, k, v), exact(q, k, v)) < bound
    assert relative_l2(attend(torch.zeros_like(q), v, v), exact(torch.zeros_like(q), v, v)) < bound
    assert (attend(q, v, torch.zeros_like(v)) == 0).all()
    constant = row.expand(1, 300, 2, 128)
    assert relative_l2(attend(q, v, constant), exact(q, v, constant)) < bound


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_what_is_not_finite_is_not_hidden(name: str, poison: float, which: str) -> None:
    qkv = {"q": random(1, 300, 2, 128), "k": random(1, 300, 2, 128), "v": random(1, 300, 2, 128)}
    qkv[which][0, 77, 0, 5] = poison
    out = KERNELS[name][0](**qkv)
    if which == "q":
        assert out[0, 77, 0].isnan().all()
    elif which == "k":
        assert out[0, :, 0].isnan().all()
    else:
        assert out[0, :, 0, 5].isnan().all()
    assert out[0, :, 1].isfinite().all()


@pytest.mark.parametrize("name", KERNELS)
def test_long_sequences_with_a_mean_in_v(name: str) -> None:
    """16,000 keys: a sum that loses bits as it grows, or an offset beyond 2^31, would show."""
    q, k, v = random(1, 130, 2, 128), random(1, 16_001, 2, 128), random(1, 16_001, 2, 128) + 1
    out = check(name, q, k, v)
    if name == "fp8":
        assert relative_l2(out, exact(q, k, v)) < 0.01


def _hopper_or_skip() -> None:
    if not sage_fp8.runs_on_hopper(torch.device("cuda", torch.cuda.current_device()), 128):
        pytest.skip("this GPU or Triton runs the Triton kernel only")


FP8_KERNELS = ["hopper", "triton", "triton, 16-bit P and V"]


def run_fp8(kernel: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One of `FP8_KERNELS` on an output that holds NaN before."""
    out = torch.full_like(q, float("nan"))
    operands = sage_fp8.quantize(q, k, v, q.shape[-1] ** -0.5, e4m3_v="16-bit" not in kernel)
    if kernel == "hopper":
        _hopper_or_skip()
        sage_fp8.attend_hopper(operands, out)
    else:
        sage_fp8.attend_portable(operands, out)
    return out


@pytest.mark.parametrize("kernel", FP8_KERNELS)
@pytest.mark.parametrize("size", [300.0, 3e4])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_large_scores_in_every_fp8_kernel(kernel: str, size: float, head_dim: int) -> None:
    """Scores of 1e9, many logits per step of int8: P and its sum must round alike, or the output is no mean of V."""
    if kernel == "hopper" and head_dim not in sage_fp8.HOPPER_HEAD_DIMS:
        pytest.skip("head_dim 96 runs on the Triton kernel")
    q, k, v = random(2, 200, 3, head_dim) * size, random(2, 500, 3, head_dim) * size, random(2, 500, 3, head_dim)
    out = run_fp8(kernel, q, k, v)
    assert out.isfinite().all()
    assert out.abs().max() <= v.abs().max() * 1.1


@pytest.mark.parametrize("kernel", FP8_KERNELS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (129, 127), (257, 513), (64, 1500)])
def test_every_fp8_kernel_writes_every_element(kernel: str, queries: int, keys: int) -> None:
    q, k, v = random(2, queries, 3, 128), random(2, keys, 3, 128), random(2, keys, 3, 128)
    out = run_fp8(kernel, q, k, v)
    wanted = exact(q, k, v)
    plain = relative_l2(int8_fp8_attention(q, k, v), wanted)
    assert relative_l2(out, wanted) <= (0.5 if "16-bit" in kernel else NO_WORSE) * plain + ROUNDING


LOOP_BOUNDS = {"integer": 1.0, "integer with a floor": 100.0, "exp2": 1000.0}
"""Loop of the Hopper kernel -> a bound of the scores for which it is taken."""


def run_loop(loop: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One loop of the Hopper kernel, whatever the scores, on an output that holds NaN before."""
    _hopper_or_skip()
    operands = sage_fp8.quantize(q, k, v, q.shape[-1] ** -0.5)
    operands.q_norm.fill_(1.0)
    operands.k_norm.fill_(LOOP_BOUNDS[loop])
    out, before = torch.full_like(q, float("nan")), sage_fp8.loops_taken()
    sage_fp8.attend_hopper(operands, out)
    taken = {name: count - before[name] for name, count in sage_fp8.loops_taken().items() if count != before[name]}
    assert taken == {loop: operands.q_norm.numel()}
    return out


@pytest.mark.parametrize("loop", sage_fp8.LOOPS)
@pytest.mark.parametrize("head_dim", sage_fp8.HOPPER_HEAD_DIMS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (63, 2), (129, 127), (257, 513), (64, 1500), (300, 4096)])
def test_every_loop_at_any_length(loop: str, head_dim: int, queries: int, keys: int) -> None:
    q, k, v = (random(2, length, 3, head_dim) for length in (queries, keys, keys))
    wanted = exact(q, k, v)
    allowed = 1.12 if "integer" in loop else NO_WORSE  # straight lines between powers of two
    plain = relative_l2(int8_fp8_attention(q, k, v), wanted)
    assert relative_l2(run_loop(loop, q, k, v), wanted) <= allowed * plain + ROUNDING


@pytest.mark.parametrize(("sharp", "loop"), [(0.2, 0), (1, 0), (3, 1), (8, 2), (16, 2), (24, 2)])
@pytest.mark.parametrize("head_dim", sage_fp8.HOPPER_HEAD_DIMS)
def test_the_loop_fits_the_scores(sharp: float, loop: int, head_dim: int) -> None:
    """The floor is needed where scores may lie more than 127 octaves apart, and exp2 where 32 bits do not hold them."""
    _hopper_or_skip()
    q, k, v = random(1, 500, 4, head_dim) * sharp, random(1, 700, 4, head_dim), random(1, 700, 4, head_dim)
    operands = sage_fp8.quantize(q, k, v, head_dim**-0.5)
    scores = (operands.q.float() * operands.q_scale[..., None]) @ (operands.k.float() * _steps(operands, 700)).mT
    bound = operands.q_norm.amax(-1) * operands.k_norm
    assert (scores.abs().amax((2, 3)) <= 1.001 * bound).all()
    before = sage_fp8.loops_taken()
    out = check("fp8", q, k, v)
    assert out.isfinite().all()
    if head_dim == 128:  # where the bounds are as the model's
        taken = [name for name, count in sage_fp8.loops_taken().items() if count != before[name]]
        assert taken == [sage_fp8.LOOPS[loop]]


def _steps(operands: sage_fp8.Operands, keys: int) -> torch.Tensor:
    return operands.k_scale.repeat_interleave(128, 2)[:, :, :keys, None]


def test_the_edges_of_every_loop() -> None:
    """Two keys as far apart as a loop allows: the weights stay in order, and none becomes negative or NaN."""
    _hopper_or_skip()
    for octaves in (63.9, 64.1, 119.9, 120.1):
        direction = torch.nn.functional.normalize(torch.randn(128, device="cuda"), dim=0)
        size = (octaves * 128**0.5 / 1.4426950408889634) ** 0.5
        q = (size * direction).expand(1, 128, 1, 128).float().contiguous()
        signs = torch.tensor([1.0, -1.0], device="cuda").repeat(100)
        k = size * signs[None, :, None, None] * direction
        v = signs[None, :, None, None].expand(1, 200, 1, 128).contiguous()
        out = sage_fp8.sage_fp8_attention(q, k, v)
        torch.testing.assert_close(out, torch.ones_like(out), atol=0.02, rtol=0)


def test_the_fp8_kernels_agree() -> None:
    _hopper_or_skip()
    q, k, v = random(1, 700, 4, 128), random(1, 2000, 4, 128), random(1, 2000, 4, 128)
    operands = sage_fp8.quantize(q, k, v, 128**-0.5)
    first, second = torch.empty_like(q), torch.empty_like(q)
    sage_fp8.attend_hopper(operands, first)
    sage_fp8.attend_portable(operands, second)
    # The tiles come in another order, so P rounds against other maxima; and only one of them takes exp2.
    assert relative_l2(first, second.double()) < 0.04


def test_fp4_operands_are_bit_equal_to_the_reference() -> None:
    q, k, v = random(2, 300, 3, 128), 7 * random(2, 333, 3, 128) + 3, 1e5 * random(2, 333, 3, 128)
    operands = sage_fp4.quantize(q, k, v)
    place = torch.arange(operands.padded_keys, device="cuda")
    key = place - place % 64 + 16 * (place % 8 // 2) + 2 * (place % 64 // 8) + place % 2
    padding = (0, 0, 0, operands.padded_keys - 333)
    smooth = torch.nn.functional.pad((k.float() - operands.k_mean[:, None]).transpose(1, 2), padding)
    assert torch.equal(nvfp4_tensor_scale(smooth, (2, 3))[..., 0, 0], operands.k_outer)
    wanted = quantize_nvfp4(smooth[:, :, key], operands.k_outer[..., None, None]).operand(torch.bfloat16)
    assert torch.equal(operands.k, wanted)
    values = torch.nn.functional.pad(v.float().transpose(1, 2), padding).transpose(2, 3)
    assert torch.equal(nvfp4_tensor_scale(values, (2, 3))[..., 0, 0], operands.v_outer)
    wanted = quantize_nvfp4(values, operands.v_outer[..., None, None]).operand(torch.bfloat16)
    assert torch.equal(operands.v, wanted[..., key].transpose(2, 3))
    blocks = torch.nn.functional.pad(q.float().transpose(1, 2), (0, 0, 0, 84)).unflatten(2, (3, 128))
    centered = blocks - operands.q_mean[:, :, :, None]
    centered.flatten(2, 3)[:, :, 300:] = 0
    assert torch.equal(nvfp4_tensor_scale(centered, (3, 4))[..., 0, 0], operands.q_outer)
    wanted = quantize_nvfp4(centered, operands.q_outer[..., None, None]).operand(torch.bfloat16)
    assert torch.equal(operands.q, wanted.flatten(2, 3)[:, :, :300])


def test_fp4_on_inputs_as_models_have_them() -> None:
    """Queries and keys that share directions, values with structure: the papers' kind of input, not white noise."""
    basis = torch.linalg.qr(torch.randn(4, 128, 128, device="cuda"))[0][:, :8]
    topics = torch.randint(0, 8, (1, 2000, 4), device="cuda")
    directions = basis[torch.arange(4, device="cuda"), topics]
    q, k = ((12 * directions + 0.5 * torch.randn_like(directions)).bfloat16() for _ in range(2))
    v = (torch.randn(4, 8, 128, device="cuda")[torch.arange(4, device="cuda"), topics] + 0.2 * directions).bfloat16()
    wanted, got = exact(q, k, v).flatten(), sage_fp4.sage_fp4_attention(q, k, v).double().flatten()
    assert torch.nn.functional.cosine_similarity(wanted, got, dim=0) > 0.995


@pytest.mark.parametrize("name", KERNELS)
def test_a_compiled_graph_keeps_the_call_whole(name: str) -> None:
    attend = KERNELS[name][0]

    def block(fused: torch.Tensor) -> torch.Tensor:
        q, k, v = (fused * 2).unbind(2)
        return attend(q, k, v).flatten(2) + 1

    fused = random(1, 300, 3, 2, 128)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(fused), block(fused))


@pytest.mark.parametrize("name", KERNELS)
def test_the_operation_is_declared_truly(name: str) -> None:
    operation = (sage_fp8 if name == "fp8" else sage_fp4)._operation
    q, k, v = random(1, 100, 3, 2, 64).unbind(2)
    arguments = (q, k, v, 0.1) if name == "fp8" else (q, k, v, 0.1, False)
    torch.library.opcheck(operation, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", KERNELS)
def test_one_compilation_covers_all_shapes(name: str) -> None:
    """A kernel that is compiled anew for each stride or length would stall a generation."""
    module = sage_fp8 if name == "fp8" else sage_fp4
    kernels = __import__(f"{module.__name__.rsplit('.', 1)[0]}._sage_{name}_quantize", fromlist=["x"])
    attend = KERNELS[name][0]
    attend(*random(1, 100, 3, 2, 128).unbind(2))
    jitted = kernels.key_value_statistics
    device = torch.cuda.current_device()

    def compilations() -> int:
        caches = jitted.device_caches[device]
        return len(caches[0] if isinstance(caches, tuple) else caches)

    before = compilations()
    for length, heads in ((1, 1), (16, 2), (17, 3), (128, 4), (1000, 1)):
        attend(*random(2, length, 3, heads, 128).unbind(2))
    assert compilations() == before
