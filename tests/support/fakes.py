"""Stand-ins for kernel packages and for the GPU, so that adapters are tested where neither is.

A fake rejects everything that the real package would, faults (`KernelFault`) where the real one would take the process
down or return garbage, changes K in place where the real one does, and computes with like precision. Signatures are the
public ones. `FakeGpu` lets the CPU pass for an NVIDIA GPU of a chosen compute capability.
"""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from wanvideo_infinitetalk.wanvideo.kernels import packages
from wanvideo_infinitetalk.wanvideo.kernels.emulation import int8_fp8_attention, nvfp4_attention
from wanvideo_infinitetalk.wanvideo.kernels.selftest import SELF_TESTS
from wanvideo_infinitetalk.wanvideo.modules.backends import RUNTIME

HALF = (torch.float16, torch.bfloat16)


class KernelFault(Exception):
    """What would be a CUDA fault, an abort of the process, or wrong numbers without an error."""


def require_16_bytes(**tensors: torch.Tensor | None) -> None:
    """Fault as a 16-byte kernel does. Written without the project's own guard, which it judges."""
    for name, x in tensors.items():
        if x is None or x.numel() == 0:
            continue
        if x.data_ptr() % 16:
            raise KernelFault(f"{name} starts at an address that is no multiple of 16")
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise KernelFault(f"{name} has last stride {x.stride(-1)}")
        for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
            if size > 1 and stride * x.element_size() % 16:
                raise KernelFault(f"{name} has a row stride of {stride * x.element_size()} bytes")


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, causal: str = "") -> torch.Tensor:
    """Attention on [B, H, L, D] in float64; causal "upper" or "lower" names the corner that the mask is aligned at."""
    q64, k64, v64 = q.double(), k.double(), v.double()
    scores = q64 @ k64.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        shift = k.shape[2] - q.shape[2] if causal == "lower" else 0
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(shift)
        scores = scores.masked_fill(~seen, -torch.inf)
    return (torch.softmax(scores, -1) @ v64).to(q.dtype)


def _module(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    for key, member in members.items():
        setattr(module, key, member)
    return module


# --- sageattention 1.0.6 ---------------------------------------------------------------------------------------------


def sageattn_1(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    **kwargs: Any,
) -> torch.Tensor:
    """Centers the caller's K in place; multiplies P and V in fp16, tile by tile."""
    assert not kwargs, "the real one takes these and ignores them"
    assert q.dtype in (*HALF, torch.float32), "Input tensors must be in dtype of float16, bfloat16 or float32."
    assert q.dtype == k.dtype == v.dtype, "All tensors must have the same dtype."
    assert q.shape[-1] in (64, 96, 128), "headdim should be in [64, 96, 128]."
    assert q.stride(-1) == 1, "Last dim of qkv must be contiguous."
    assert k.stride(-1) == 1, "Last dim of qkv must be contiguous."
    assert v.stride(-1) == 1, "Last dim of qkv must be contiguous."
    seq = 1 if tensor_layout == "NHD" else 2
    if smooth_k:
        k -= k.mean(dim=seq, keepdim=True)
    if tensor_layout == "NHD":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = (
        q.float() @ k.float().transpose(-1, -2) * (q.shape[-1] ** -0.5 if sm_scale is None else sm_scale)
    ).float()
    if is_causal:
        weights = weights.masked_fill(~torch.ones(weights.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    weights = torch.exp(weights - weights.amax(-1, keepdim=True))
    total = weights.sum(-1, keepdim=True)
    out = torch.zeros(q.shape)
    for start in range(0, k.shape[2], 64):
        tile = weights[..., start : start + 64].half().float() @ v[:, :, start : start + 64].half().float()
        out += tile.half().float()
    out = (out / total).to(q.dtype)
    return out.transpose(1, 2).contiguous() if tensor_layout == "NHD" else out


# --- sageattention 2.2 -----------------------------------------------------------------------------------------------


def _sage_2(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str, is_causal: bool, sm_scale: float | None, tile: int
) -> torch.Tensor:
    assert q.dtype in HALF, "Input tensors must be in dtype of torch.float16 or torch.bfloat16"
    assert q.dtype == k.dtype == v.dtype, "All tensors must have the same dtype."
    if q.shape[-1] > 128:
        raise ValueError(f"Unsupported head_dim: {q.shape[-1]}")
    assert q.stride(-1) == 1, "Last dim of qkv must be contiguous."
    assert k.stride(-1) == 1, "Last dim of qkv must be contiguous."
    assert v.stride(-1) == 1, "Last dim of qkv must be contiguous."
    require_16_bytes(q=q, k=k, v=v)
    if layout == "HND":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if is_causal:
        out = exact(*(x.transpose(1, 2) for x in (q, k, v)), sm_scale, "upper").transpose(1, 2)
    else:
        out = int8_fp8_attention(q, k, v, sm_scale)
    if k.shape[1] < tile:
        out = torch.full_like(out, torch.nan)  # uninitialized shared memory behind the last row of V
    return out if layout == "NHD" else out.transpose(1, 2)


def sageattn_qk_int8_pv_fp16_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str = "fp32",
    smooth_k: bool = True,
    smooth_v: bool = False,
    return_lse: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """V goes to fp16; with another accumulator than "fp32" sums overflow as well."""
    assert not kwargs
    assert not return_lse
    assert smooth_k
    if pv_accum_dtype != "fp32":
        raise KernelFault("an fp16 accumulator overflows on real activations")
    return _sage_2(q, k, v.half().to(v.dtype), tensor_layout, is_causal, sm_scale, tile=64)


def sageattn_qk_int8_pv_fp8_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str = "fp32+fp16",
    smooth_k: bool = True,
    smooth_v: bool = False,
    return_lse: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    assert not kwargs
    assert not return_lse
    assert smooth_k
    if pv_accum_dtype != "fp32+fp32":
        raise KernelFault("another accumulator loses bits or overflows")
    return _sage_2(q, k, v, tensor_layout, is_causal, sm_scale, tile=64)


def sageattn_qk_int8_pv_fp8_cuda_sm90(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str = "fp32+fp32",
    smooth_k: bool = True,
    return_lse: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    assert not kwargs
    assert not return_lse
    assert smooth_k
    if pv_accum_dtype != "fp32+fp32":
        raise KernelFault("another accumulator loses bits")
    return _sage_2(q, k, v, tensor_layout, is_causal, sm_scale, tile=128)


# --- sageattn3 1.0 ---------------------------------------------------------------------------------------------------


class Sage3:
    """`sageattn3_blackwell`, remembering the largest correction term that it built."""

    def __init__(self) -> None:
        self.calls = 0
        self.delta_s_bytes = 0

    def sageattn3_blackwell(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        per_block_mean: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[B, H, L, D]; the mask and any scale in kwargs are ignored, K is centered in place."""
        if attn_mask is not None or kwargs:
            raise KernelFault("ignored without a word: a mask or a softmax scale")
        if q.dtype not in HALF or not q.dtype == k.dtype == v.dtype:
            raise RuntimeError("only fp16 and bf16")
        if q.shape[-1] not in (64, 128):
            raise RuntimeError("only support head_dim 64 and 128")
        require_16_bytes(q=q, k=k, v=v)
        self.calls += 1
        if per_block_mean:
            batch, heads, queries, _ = q.shape
            self.delta_s_bytes = max(self.delta_s_bytes, 4 * batch * heads * -(-queries // 128) * k.shape[2])
        k -= k.mean(dim=-2, keepdim=True)
        if is_causal:
            return exact(q, k, v, None, "upper")
        turned = (x.transpose(1, 2) for x in (q, k, v))
        return nvfp4_attention(*turned, block_means=per_block_mean).transpose(1, 2)


# --- flash-attn ------------------------------------------------------------------------------------------------------


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, causal: bool) -> torch.Tensor:
    if q.dtype not in HALF or not q.dtype == k.dtype == v.dtype:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if q.shape[-1] > 256 or q.shape[-1] % 8:
        raise RuntimeError("head_size must be a multiple of 8 and at most 256")
    require_16_bytes(q=q, k=k, v=v)
    turned = (x.transpose(1, 2) for x in (q, k, v))
    return exact(*turned, scale, "lower" if causal else "").transpose(1, 2).contiguous()


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor:
    """FlashAttention 2 on [B, L, H, D]; the causal mask is aligned at the lower right."""
    assert dropout_p == 0.0
    return _flash(q, k, v, softmax_scale, causal)


def flash_attn_3_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float | None = None, causal: bool = False
) -> torch.Tensor:
    """FlashAttention 3 since 2025-09: the output alone."""
    return _flash(q, k, v, softmax_scale, causal)


def flash_attn_3_func_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float | None = None, causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention 3 before 2025-09: the output and the log-sum-exp."""
    return _flash(q, k, v, softmax_scale, causal), torch.zeros(q.shape[0], q.shape[2], q.shape[1])


# --- ComfyUI ---------------------------------------------------------------------------------------------------------


def optimized_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """ComfyUI's with SageAttention behind it: K may be changed."""
    assert skip_reshape
    assert skip_output_reshape
    assert not kwargs
    assert heads == q.shape[1]
    require_16_bytes(q=q, k=k, v=v, mask=mask)
    scores = q.double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask.double()
    out = (torch.softmax(scores, -1) @ v.double()).to(q.dtype)
    k -= k.mean(dim=2, keepdim=True)
    return out


# --- the stage -------------------------------------------------------------------------------------------------------


class FakeGpu:
    """The CPU as an NVIDIA GPU of one compute capability, with the packages that a test installs on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
        self._monkeypatch = monkeypatch
        self._versions: dict[str, str] = {}
        self.sage3 = Sage3()
        monkeypatch.setattr(packages, "capability", lambda device: capability)
        monkeypatch.setattr(packages, "installed_version", self._versions.get)
        monkeypatch.setattr(packages, "_distribution_of", lambda module: None)
        monkeypatch.setattr(RUNTIME, "_backends", dict(RUNTIME._backends))
        monkeypatch.setattr(RUNTIME, "_rejected", {})
        monkeypatch.setattr(RUNTIME, "announced", set())
        monkeypatch.setattr(SELF_TESTS, "_kept", {})
        for backend in RUNTIME.backends():
            contract = backend.contract
            if contract.package is not None:  # this project's kernels need the real thing
                device = dataclasses.replace(contract.device, types=("cpu", "cuda"))
                RUNTIME.register(dataclasses.replace(backend, contract=dataclasses.replace(contract, device=device)))

    def install(self, distribution: str, version: str, module: str, **members: Any) -> None:
        """Put a package where the adapters look for it."""
        self._versions[distribution] = version
        self._monkeypatch.setitem(sys.modules, module, _module(module, **members))
        RUNTIME.forget_availability()

    def install_known(self, name: str) -> None:
        """One of the packages that this module imitates."""
        sage_2 = {
            f.__name__: f
            for f in (
                sageattn_qk_int8_pv_fp16_cuda,
                sageattn_qk_int8_pv_fp8_cuda,
                sageattn_qk_int8_pv_fp8_cuda_sm90,
            )
        }
        if name == "sageattention_1":
            self.install("sageattention", "1.0.6", "sageattention", sageattn=sageattn_1)
        elif name == "sageattention_2":
            self.install("sageattention", "2.2.0+cu128torch2.8.0.post3", "sageattention", **sage_2)
        elif name == "sageattn3":
            self.install("sageattn3", "1.0.0", "sageattn3", sageattn3_blackwell=self.sage3.sageattn3_blackwell)
        elif name == "flash_attn_2":
            self.install("flash-attn", "2.8.3", "flash_attn", flash_attn_func=flash_attn_func)
        elif name == "flash_attn_3":
            self.install("flash-attn-3", "3.0.0b1", "flash_attn_interface", flash_attn_func=flash_attn_3_func)
        elif name == "fa3_fwd":
            self.install("fa3-fwd", "0.0.3", "fa3_fwd_interface", flash_attn_func=flash_attn_3_func)
        elif name == "comfy":
            self._monkeypatch.setitem(
                sys.modules,
                "comfy.ldm.modules.attention",
                _module("comfy.ldm.modules.attention", optimized_attention=optimized_attention),
            )
            RUNTIME.forget_availability()
        else:
            raise ValueError(f"no fake of {name}")
