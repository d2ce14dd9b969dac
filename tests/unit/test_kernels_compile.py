"""The GPU kernels without a GPU: compiled for each architecture, and their logic run by Triton's interpreter.

Triton compiles for a named architecture on any machine; what comes out shows whether the tensor-core instructions are
there that are meant. The interpreter runs a kernel as numpy code, in a process of its own because the choice is made
when the kernel is imported. It truncates float32 to e4m3 instead of rounding, so bounds are wide where e4m3 is written.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from wanvideo_infinitetalk.wanvideo.errors import BackendUnavailableError, InputError
from wanvideo_infinitetalk.wanvideo.kernels import _common, linear, packages, reference, sage_fp4, sage_fp8, selftest
from wanvideo_infinitetalk.wanvideo.kernels.packages import triton_version
from wanvideo_infinitetalk.wanvideo.linear.base import relative_l2

KERNELS = "wanvideo_infinitetalk.wanvideo.kernels."
SHARED_MEMORY = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB that a block may use, by architecture."""

FLOATS = {"k_sums", "k_lows", "k_highs", "v_peaks", "k_mean", "q_mean", "q_scale", "k_scale", "v_scale"}
FLOATS |= {"q_outer", "k_outer", "v_outer", "q_norm", "k_norm"}
INTS = {"q_batch", "q_token", "q_head", "k_batch", "k_token", "k_head", "v_batch", "v_token", "v_head"}
INTS |= {"queries", "keys", "heads", "run", "runs", "tiles"}
INTS |= {"columns"}
FLOATS |= {"product", "row_scale", "column_scale", "scale"}
INTS |= {"rows_per_batch", "factor_batch", "offset_batch", "gate_batch", "length"}
FLOATS |= {"factor", "offset", "gate", "cos", "sin"}
SCALARS = {"logit_scale", "eps", "alpha"}


def triton_module(name: str) -> Any:
    pytest.importorskip("triton", reason="Triton is not installed")
    return importlib.import_module(KERNELS + name)


def compiled(function: Any, arch: int, constants: dict[str, Any], types: dict[str, str], **options: int) -> Any:
    """The kernel compiled for sm_`arch`, pointers at multiples of 16 bytes and nothing known of the integers."""
    import triton
    from triton.backends.compiler import GPUTarget

    signature = {name: types.get(name, "*bf16") for name in function.arg_names if name not in constants}
    signature |= {name: "*fp32" for name in signature if name in FLOATS}
    signature |= {name: "i32" for name in signature if name in INTS}
    signature |= {name: "fp32" for name in signature if name in SCALARS}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if signature.get(name, "").startswith("*")
    }
    signature |= dict.fromkeys(constants, "constexpr")
    if hasattr(function, "is_gluon") and function.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as Source
    else:
        from triton.compiler import ASTSource as Source
    source = Source(function, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def shared_kib(kernel: Any) -> float:
    return kernel.metadata.shared / 1024


@pytest.mark.parametrize(
    ("arch", "instruction"), [(80, "s32.s8.s8.s32"), (89, "s32.s8.s8.s32"), (120, "s32.s8.s8.s32")]
)
def test_fp8_multiplies_8_bit_operands_on_every_gpu(arch: int, instruction: str) -> None:
    function = triton_module("_sage_fp8_triton").attend
    e4m3 = arch >= 89
    constants = {"D": 128, "D_POW2": 128, "BLOCK_M": 128, "BLOCK_N": 64, "KEYS_PER_SCALE": 128, "UNIT": 8}
    types = {"q8": "*i8", "k8": "*i8", "v": "*fp8e4nv" if e4m3 else "*bf16"}
    kernel = compiled(function, arch, {**constants, "E4M3_V": e4m3}, types, num_warps=8, num_stages=3)
    ptx = kernel.asm["ptx"]
    assert instruction in ptx
    if arch != 120 or triton_version() >= (3, 6):  # older ones widen e4m3 there
        assert ("f32.e4m3.e4m3.f32" in ptx) == e4m3
    assert shared_kib(kernel) <= SHARED_MEMORY[arch]


@pytest.mark.parametrize("head_dim", [64, 128])
def test_fp8_uses_hoppers_own_instructions(head_dim: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    version = triton_version()
    if not sage_fp8.HOPPER_TRITON[0] <= version < sage_fp8.HOPPER_TRITON[1]:
        pytest.skip(f"Triton {version} runs the Triton kernel on Hopper")
    from triton.experimental.gluon import language as gl

    def descriptor(name: str, element: Any, block: list[int]) -> str:
        layout = gl.NVMMASharedLayout.get_default_for(block, element)
        return f"tensordesc<{name}[{block[0]}, {block[1]}],{layout!r}>"

    types = {
        "q_desc": descriptor("i8", gl.int8, [64, head_dim]),
        "k_desc": descriptor("i8", gl.int8, [128, head_dim]),
        "v_desc": descriptor("fp8e4nv", gl.float8e4nv, [head_dim, 128]),
        "loops": "*i64",
    }
    function = triton_module("_sage_fp8_hopper").attend
    kernel = compiled(function, 90, {"D": head_dim, "STAGES": sage_fp8.HOPPER_STAGES}, types, num_warps=4, maxnreg=168)
    ptx = kernel.asm["ptx"]
    assert "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8" in ptx
    assert f"wgmma.mma_async.sync.aligned.m64n{head_dim}k32.f32.e4m3.e4m3" in ptx
    assert "cp.async.bulk.tensor.2d" in ptx
    assert "setmaxnreg" in ptx
    assert shared_kib(kernel) <= SHARED_MEMORY[90]


def test_fp8_quantizer_reads_and_writes_16_bytes_at_a_time() -> None:
    function = triton_module("_sage_fp8_quantize").quantize_qkv
    constants = {"D": 128, "D_POW2": 128, "BLOCK": 128, "E4M3_V": True, "UNIT": 8}
    types = {"q8": "*i8", "k8": "*i8", "k_bits": "*i32", "v8": "*fp8e4nv"}
    ptx = compiled(function, 90, constants, types, num_warps=8).asm["ptx"]
    assert "ld.global.v4.b32" in ptx
    assert "st.global.v4.b32" in ptx
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx


@pytest.mark.parametrize("arch", [89, 90, 100, 120])
def test_the_kernels_of_fp8_linears_compile_on_every_gpu_that_multiplies_fp8(arch: int) -> None:
    module = triton_module("_linear_triton")
    types, rounds = {"values": "*fp8e4nv"}, arch < 90
    ptx = compiled(module.quantize_rows, arch, {"K": 5120, "BLOCK": 8192, "ROUND": rounds}, types, num_warps=4).asm[
        "ptx"
    ]
    # Where it is not one instruction, the kernel has rounded before.
    assert ("cvt.rn.satfinite.e4m3x2" if rounds else "cvt.rn.satfinite.e4m3x2.f32") in ptx
    assert "ld.global.v4.b32" in ptx
    constants = {"PER_COLUMN": True, "BIASED": True, "BLOCK": 1024}
    ptx = compiled(module.scale_product, arch, constants, {}, num_warps=4, enable_fp_fusion=False).asm["ptx"]
    assert "fma" not in ptx


@pytest.mark.parametrize(("arch", "instruction"), [(80, "mma.sync"), (90, "wgmma.mma_async")])
def test_fp4_multiplies_in_bf16_on_every_gpu(arch: int, instruction: str) -> None:
    function = triton_module("_sage_fp4_triton").attend
    constants = {"D": 128, "BLOCK": 128, "UNIT": 8}
    kernel = compiled(function, arch, constants, {}, num_warps=8, num_stages=2)
    assert re.search(rf"{instruction}.*f32\.bf16\.bf16", kernel.asm["ptx"])
    assert shared_kib(kernel) <= SHARED_MEMORY[arch]


@pytest.mark.parametrize(
    ("arch", "instruction", "head_dim"),
    [(100, r"tcgen05\.mma", 64), (100, r"tcgen05\.mma", 128), (120, r"mma\.sync", 128)],
)
def test_fp4_uses_block_scaled_instructions_on_blackwell(arch: int, instruction: str, head_dim: int) -> None:
    function = triton_module("_sage_fp4_triton").attend_native
    if triton_version() < sage_fp4.NATIVE_TRITON:
        pytest.skip(f"NVFP4 takes Triton {sage_fp4.NATIVE_TRITON}")
    types = {f"{x}4": "*u8" for x in "qkv"} | {f"{x}_scales": "*fp8e4nv" for x in "qkv"}
    constants = {"D": head_dim, "BLOCK": 128, "BLOCK_N": 128, "UNIT": 8}
    kernel = compiled(function, arch, constants, types, num_warps=8, num_stages=2)
    assert re.search(rf"{instruction}\S*kind::mxf4nvf4\.block_scale", kernel.asm["ptx"])
    assert shared_kib(kernel) <= SHARED_MEMORY[arch]


@pytest.mark.parametrize("native", [False, True])
def test_fp4_quantizers_compile(native: bool) -> None:
    module = triton_module("_sage_fp4_quantize")
    arch = 120 if native else 80
    types = {f"{x}4": "*u8" if native else "*bf16" for x in "qkv"}
    types |= {f"{x}_scales": "*fp8e4nv" if native else "*u8" for x in "qkv"}
    shared = {"D": 128, "UNIT": 8, "NATIVE": native}
    for function, constants in (
        (module.quantize_queries, {**shared, "BLOCK": 128}),
        (module.quantize_keys_values, shared),
    ):
        ptx = compiled(function, arch, constants, types, num_warps=8).asm["ptx"]
        if triton_version() >= (3, 6):  # older ones divide by other means
            assert "div.rn.f32" in ptx  # IEEE division, as in the reference


@pytest.mark.parametrize("arch", [80, 90, 120])
@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("layer_norm", {"ADD_ONE": True, "ADDED": False, "GATED": False, "ROWS": False}),
        ("layer_norm", {"ADD_ONE": True, "ADDED": True, "GATED": False, "ROWS": False}),
        ("layer_norm", {"ADD_ONE": False, "ADDED": True, "GATED": True, "ROWS": True}),
        ("rms_norm", {}),
        ("qk_norm_rope", {"HALF": 64}),
        ("gated_residual", {}),
        ("add_rows", {}),
        ("gelu_rows", {}),
    ],
)
def test_fused_groups_read_and_write_16_bytes_at_a_time(name: str, constants: dict[str, Any], arch: int) -> None:
    rows = constants.get("ROWS", name.endswith("_rows"))
    if rows and arch < 89:
        pytest.skip("quantizes for a matmul that this GPU lacks")
    function = getattr(triton_module("_fused_triton"), name)
    constants = {"C": 5120, "BLOCK": 8192, **constants}
    constants |= {"ROUND": False} if "ROUND" in function.arg_names else {}
    types = {"out": "*fp8e4nv"} if rows else {}
    kernel = compiled(function, arch, constants, types, num_warps=8)
    ptx = kernel.asm["ptx"]
    assert "ld.global.v4.b32" in ptx
    assert "st.global.v4.b32" in ptx
    assert not re.search(r"\.local\.[a-z0-9]*32", ptx)  # the row stays in registers
    # Turned pairs change threads, as do four neighbors in 8 bits.
    assert shared_kib(kernel) <= (33 if name == "qk_norm_rope" else 9 if rows else 1)


# ------------------------------------------------------------------------------------------- run by the interpreter


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def random_qkv(queries: int, keys: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp16, which the interpreter multiplies as numbers (bf16 it does not), K with a large mean."""
    q, k, v = (torch.randn(1, length, 2, head_dim) for length in (queries, keys, keys))
    return q.half(), (k + 5 * torch.randn(1, 1, 2, head_dim)).half(), v.half()


def interpret_fp8(queries: int, keys: int, head_dim: int) -> None:
    sage_fp8.MAX_RUNS = _common.MAX_RUNS = 4
    q, k, v = random_qkv(queries, keys, head_dim)
    before = [x.clone() for x in (q, k, v)]
    for e4m3_v, bound in ((False, 0.02), (True, 0.13)):
        operands = sage_fp8.quantize(q, k, v, head_dim**-0.5, e4m3_v)
        out = torch.full_like(q, float("nan"))
        sage_fp8.attend_portable(operands, out)
        assert relative_l2(out, exact(q, k, v)) < bound
        # int8 of the smoothed K to half a step.
        step = operands.k_scale.repeat_interleave(128, 2)[:, :, :keys, None]
        smooth = (k.float() - k.float().mean(1, keepdim=True)).transpose(1, 2)
        assert ((operands.k * step - smooth).abs() <= step * 0.51).all()
        # The bound of the scores: the largest norms, of 128 queries and of all keys.
        norms = torch.nn.functional.pad(operands.q.float().norm(dim=-1) * operands.q_scale, (0, -queries % 128))
        torch.testing.assert_close(operands.q_norm, norms.unflatten(-1, (-1, 128)).amax(-1))
        torch.testing.assert_close(operands.k_norm, (operands.k.float() * step).norm(dim=-1).amax(-1))
    for which in range(2):
        for poison in (float("nan"), float("inf")):
            wrong = [x.clone() for x in (q, k, v)]
            wrong[which][0, -1, 0, 3] = poison
            operands = sage_fp8.quantize(*wrong, head_dim**-0.5, False)
            bound = operands.q_norm[:, :, -1] * operands.k_norm
            assert bound[0].isnan().tolist() == [True, False]  # of the head that it is in
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


def interpret_fp4(queries: int, keys: int, head_dim: int) -> None:
    from wanvideo_infinitetalk.wanvideo.kernels.quantizers import nvfp4_tensor_scale, quantize_nvfp4, unpack_e2m1

    sage_fp4.MAX_RUNS = _common.MAX_RUNS = 4
    q, k, v = random_qkv(queries, keys, head_dim)
    v = v * 10000  # the outer scale is at work
    for native in (False, True):
        operands = sage_fp4.quantize(q, k, v, native)
        padding = (0, 0, 0, operands.padded_keys - keys)
        smooth = torch.nn.functional.pad((k.float() - operands.k_mean[:, None]).transpose(1, 2), padding)
        values = torch.nn.functional.pad(v.float().transpose(1, 2), padding).transpose(2, 3)
        for x, outer, stored, scales in (
            (smooth, operands.k_outer, operands.k, operands.k_scales),
            (values, operands.v_outer, operands.v, operands.v_scales),
        ):
            assert torch.equal(nvfp4_tensor_scale(x, (2, 3))[..., 0, 0], outer)
            wanted = quantize_nvfp4(x, outer[..., None, None])
            if native:
                assert torch.equal(unpack_e2m1(stored, first_in_high_half=False), wanted.values)
                assert torch.equal(scales.float(), wanted.block_scales.float())
                continue
            place = torch.arange(operands.padded_keys)
            key = place - place % 64 + 16 * (place % 8 // 2) + 2 * (place % 64 // 8) + place % 2
            product = wanted.operand(torch.bfloat16)
            assert torch.equal(stored, product[:, :, key] if x is smooth else product[..., key].transpose(2, 3))
        blocks = operands.q_mean.shape[2]
        padded = torch.nn.functional.pad(q.float().transpose(1, 2), (0, 0, 0, blocks * 128 - queries))
        centered = padded.unflatten(2, (blocks, 128)) - operands.q_mean[:, :, :, None]
        centered = torch.where((torch.arange(blocks * 128) < queries).view(blocks, 128, 1), centered, 0.0)
        assert torch.equal(nvfp4_tensor_scale(centered, (3, 4))[..., 0, 0], operands.q_outer)
        wanted = quantize_nvfp4(centered, operands.q_outer[..., None, None])
        if native:
            stored_values = unpack_e2m1(operands.q, first_in_high_half=False)
            assert torch.equal(stored_values, wanted.values.flatten(2, 3)[:, :, :queries])
        else:
            assert torch.equal(operands.q, wanted.operand(torch.bfloat16).flatten(2, 3)[:, :, :queries])


def interpret_fp4_attention(queries: int, keys: int, head_dim: int) -> None:
    """Both kernels; the block-scaled product, which the interpreter lacks, is numpy here."""
    import dataclasses

    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle
    from wanvideo_infinitetalk.wanvideo.kernels.emulation import nvfp4_attention
    from wanvideo_infinitetalk.wanvideo.kernels.quantizers import unpack_e2m1

    def numbers(packed: Any, scales: Any, rows_are_packed: bool) -> Any:
        codes = torch.from_numpy(packed.handle.data.astype(np.uint8))
        codes = codes if rows_are_packed else codes.t()
        factor = torch.from_numpy(np.ascontiguousarray(scales.handle.data).view(np.uint8)).view(torch.float8_e4m3fn)
        wide = unpack_e2m1(codes, first_in_high_half=False) * factor.float().repeat_interleave(16, 1)
        return wide.numpy() if rows_are_packed else wide.numpy().T

    def dot_scaled(a: Any, a_scale: Any, a_format: str, b: Any, b_scale: Any, b_format: str, acc: Any) -> Any:
        assert a_format == b_format == "e2m1"
        out = numbers(a, a_scale, True) @ numbers(b, b_scale, False) + acc.handle.data
        return tl.tensor(TensorHandle(out.astype(np.float32), tl.float32), acc.type)

    importlib.import_module(KERNELS + "_sage_fp4_triton").tl.dot_scaled = dot_scaled
    sage_fp4.MAX_RUNS = _common.MAX_RUNS = 4
    q, k, v = random_qkv(queries, keys, head_dim)
    emulated = nvfp4_attention(q, k, v)
    for native in (False, True):
        operands = sage_fp4.quantize(q, k, v, native)
        if not native:
            wide = {name: getattr(operands, name).float() for name in "qkv"}
            operands = dataclasses.replace(operands, **wide)
        out = torch.full_like(q, float("nan"))
        sage_fp4.attend(operands, k, out, head_dim**-0.5)
        assert relative_l2(out, exact(q, k, v)) < 1.05 * relative_l2(emulated, exact(q, k, v)) + 1e-3
        assert relative_l2(out, emulated) < 0.08


def interpret_fused(batch: int, length: int, heads: int, head_dim: int) -> None:
    """Every group against its eager form, in fp16, and in float32, where only the order of sums differs."""
    from wanvideo_infinitetalk.benchmarks.fused_cases import GROUPS
    from wanvideo_infinitetalk.wanvideo.kernels import fused
    from wanvideo_infinitetalk.wanvideo.kernels.rope import Rotation

    width = heads * head_dim
    angles = torch.randn(length, 1, head_dim // 2)
    given = torch.randn(batch, 6, width).split(1, dim=1)  # as the model's modulation: strided by batch
    for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
        x, y = (3 + 2 * torch.randn(batch, length, width)).to(dtype), torch.randn(batch, length, width).to(dtype)
        weight, bias = (torch.randn(width).to(dtype) for _ in range(2))
        calls: dict[str, tuple[Any, ...]] = {
            "modulated_norm": (x, given[0], given[1], 1e-6),
            "affine_norm": (x, weight, bias, 1e-6),
            "rms_norm": (x, weight, 1e-6),
            "qk_norm_rope": (x, y, weight, bias, Rotation(angles.cos(), angles.sin()), heads, 1e-6),
            "gated_residual": (x, y, given[2]),
            "add_modulated_norm": (x, y, given[2], given[0], given[1], 1e-6),
            "add_affine_norm": (x, y, 0.7, weight, bias, 1e-6),
        }
        assert set(calls) == set(GROUPS)
        for group, call in calls.items():
            before = [t.clone() for t in call if isinstance(t, torch.Tensor)]
            got, wanted = getattr(fused, group)(*call), getattr(reference, group)(*call)
            if group.startswith("add_"):  # the norm is that of the rounded sum
                wanted = wanted[0], getattr(reference, group[4:])(got[0], *call[3:])
            torch.testing.assert_close(got, wanted, atol=bound, rtol=bound)
            assert all(
                torch.equal(a, b) for a, b in zip(before, (t for t in call if isinstance(t, torch.Tensor)), strict=True)
            )
        norms = ("modulated_norm", "affine_norm", "add_modulated_norm", "add_affine_norm")
        rows = {name: (*calls[name], True) for name in norms}
        for group, call in {**rows, "add_rows": (x, y), "gelu_rows": (x,)}.items():
            got, wanted = getattr(fused, group)(*call), getattr(reference, group)(*call)
            if group in norms[2:]:
                got, wanted = got[1], getattr(reference, group[4:])(got[0], *call[3:])
            torch.testing.assert_close(got.scale, wanted.scale, atol=bound, rtol=bound)
            # The interpreter truncates to e4m3, but after this kernel's own rounding: one step where float32 differs.
            torch.testing.assert_close(got.values.float(), wanted.values.float(), atol=2.0**-8, rtol=2.0**-3)


def interpret_linear(rows: int, channels: int) -> None:
    """Scales may differ by a unit in the last place, since the CPU divides where a GPU multiplies by the reciprocal."""
    from wanvideo_infinitetalk.wanvideo.kernels import linear

    x = torch.randn(rows, channels).half()
    x[0] = 0.0
    x[:, ::3] *= -0.01  # the smallest numbers of e4m3, and zeros below 0
    x[:, ::7] = -0.0
    values, scale = linear.quantize_rows(x)
    wanted_values, wanted_scale = reference.quantize_rows(x)
    torch.testing.assert_close(scale, wanted_scale, atol=0, rtol=2e-7)
    assert float((values.view(torch.uint8) == wanted_values.view(torch.uint8)).float().mean()) > 0.999
    for bias in (None, torch.randn(channels).half()):
        for columns in (torch.rand(1, 1), torch.rand(1, channels)):
            call = (torch.randn(rows, channels), torch.rand(rows, 1), columns, bias, torch.float16)
            assert torch.equal(linear.scale_product(*call), reference.scale_product(*call))


def interpret_selftest() -> None:
    """The comparison that other GPUs begin with."""
    verdict = selftest.judge("elementwise", selftest._elementwise_comparisons(torch.device("cpu")), selftest._ulp_fault)
    assert verdict.ok, verdict.reason
    assert verdict.cases == 14


CASES = {
    "selftest": (interpret_selftest, [()]),
    "linear": (interpret_linear, [(3, 64), (5, 9000), (1, 1)]),
    "fused": (interpret_fused, [(2, 3, 2, 64), (1, 2, 3, 96), (1, 1, 1, 8)]),
    "fp8": (interpret_fp8, [(70, 200, 64), (5, 1, 128), (3, 257, 96)]),
    "fp4_operands": (interpret_fp4, [(70, 200, 64), (130, 129, 128)]),
    "fp4": (interpret_fp4_attention, [(5, 1, 128), (130, 129, 64)]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_logic_is_right_in_the_interpreter(name: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    ran = subprocess.run(
        [sys.executable, __file__, name],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]


# ----------------------------------------------------------------------------------------------------- what is said


@pytest.mark.parametrize("module", [sage_fp8, sage_fp4])
def test_a_cpu_is_rejected_in_a_sentence(module: Any) -> None:
    name = module.__name__.rsplit(".", 1)[1]
    attend = getattr(module, f"{name}_attention")
    x = torch.zeros(1, 4, 2, 64)
    with pytest.raises(BackendUnavailableError, match="it runs on cuda, the tensors are on cpu"):
        attend(x, x, x)
    with pytest.raises(InputError, match=r"head_dim is 32, it supports 64"):
        attend(x[..., :32], x[..., :32], x[..., :32])
    with pytest.raises(InputError, match="at least one key"):
        attend(x, x[:, :0], x[:, :0])
    with pytest.raises(InputError, match=r"attention takes q \[B, Lq, H, D\] and k, v \[B, Lk, H, D\]"):
        attend(x, x[:, :, :1], x[:, :, :1])
    with pytest.raises(InputError, match="one dtype"):
        attend(x, x.half(), x)


@pytest.mark.parametrize("module", [sage_fp8, sage_fp4])
def test_the_fake_is_contiguous_whatever_the_strides(module: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fused = torch.empty(2, 10, 3, 4, 64, device="cuda", dtype=torch.bfloat16)
        q, k, v = fused.unbind(2)
        out = getattr(module, f"{module.__name__.rsplit('.', 1)[1]}_attention")(q, k, v, 0.1)
        assert out.shape == q.shape
        assert out.is_contiguous()
        assert out.dtype == q.dtype


def test_a_machine_that_cannot_build_kernels_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Triton imports without a C compiler, and fails at the first launch. Here the launch fails for want of a GPU."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, on which kernels are built")
    monkeypatch.setattr(packages, "capability", lambda device: (9, 0))
    monkeypatch.setattr(selftest.SELF_TESTS, "_kept", {})
    reasons = [selftest.device_reasons(_common.TRITON, torch.device("cuda", 0)) for _ in range(2)]
    assert reasons[0] == reasons[1]
    assert len(reasons[0]) == 1
    assert reasons[0][0].startswith("Triton cannot build a kernel here (")
    assert "install a C compiler" in reasons[0][0]
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize(("platform", "package"), [("win32", "triton-windows"), ("linux", "triton")])
def test_a_missing_triton_is_said_once_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, platform: str, package: str
) -> None:
    def missing(module: str) -> Any:
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(packages, "load", missing)
    monkeypatch.setattr(packages.sys, "platform", platform)
    monkeypatch.setattr(packages, "capability", lambda device: (9, 0))
    monkeypatch.setattr(selftest.SELF_TESTS, "_kept", {})
    packages.triton_import_reason.cache_clear()
    try:
        assert selftest.device_reasons(_common.TRITON, torch.device("cpu")) != ()
        assert caplog.records == []
        for needs in (_common.TRITON, linear.FP8):
            for number in (0, 1):
                (reason,) = selftest.device_reasons(needs, torch.device("cuda", number))
                assert f"(No module named 'triton'); pip install {package}, in the version" in reason
    finally:
        packages.triton_import_reason.cache_clear()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"pip install {package}," in record.getMessage()


def test_a_full_gpu_is_not_kept_as_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")

    def full(device: torch.device) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch.cuda, "device", full)
    monkeypatch.setattr(packages, "capability", lambda device: (9, 0))
    monkeypatch.setattr(selftest.SELF_TESTS, "_kept", {})
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            selftest.device_reasons(_common.TRITON, torch.device("cuda", 0))
    assert selftest.SELF_TESTS._kept == {}


if __name__ == "__main__":
    torch.manual_seed(0)
    run, shapes = CASES[sys.argv[1]]
    for shape in shapes:
        run(*shape)
