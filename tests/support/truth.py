"""Raw kernel calls, each tried in a child process, because a CUDA fault cannot be caught.

`outcomes` gives the cases to this file as a script (`support.children`); a death is the outcome "fault".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from support.children import FAULT, ask, serve

RIGHT, WRONG, REJECTED, ABSENT = "right", "wrong", "rejected", "absent"
BAD = (WRONG, REJECTED, FAULT)


@dataclass(frozen=True)
class Raw:
    """One raw call.

    Attributes:
        kernel: a key of `KERNELS`.
        layout: how q, k and v (or the operands) lie in memory, a key of `LAYOUTS`.
        amount: elements of offset or padding.
        sizes: overrides of batch, queries, keys, heads, head_dim.
        options: further arguments of the kernel.
        bound: relative L2 within which a result is right.
    """

    kernel: str
    layout: str = "plain"
    amount: int = 0
    dtype: str = "bfloat16"
    sizes: dict[str, int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    bound: float = 0.02

    def __str__(self) -> str:
        extra = {**self.sizes, **self.options}
        return f"{self.kernel} {self.dtype} {self.layout} {self.amount}" + (f" {extra}" if extra else "")


def outcomes(cases: Sequence[Raw], together: bool) -> list[dict[str, Any]]:
    """What each raw call did: {"outcome", "cosine", "error"}; in one child per case, or in few (`together`)."""
    return ask(Path(__file__), [asdict(case) for case in cases], alone=not together)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:200]


# --- in the child ----------------------------------------------------------------------------------------------------


def _kernels() -> dict[str, Callable[..., Any]]:
    """name -> a call on q, k, v [B, L, H, D], without any guard."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def sdpa(backend: Any) -> Callable[..., Any]:
        def call(q, k, v, mask=None, scale=None):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            if backend is None:
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)

        return call

    def kitchen(q, k, v, mask=None, scale=None):
        import comfy_kitchen

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return comfy_kitchen.int8_attention(q, k, v, scale=scale, attn_mask=mask).transpose(1, 2)

    def sage_1(q, k, v, mask=None, scale=None):
        from sageattention import sageattn

        return sageattn(q, k, v, tensor_layout="NHD", sm_scale=scale)

    def sage_2(q, k, v, mask=None, scale=None):
        import sageattention

        names = {(8, 0): "sageattn_qk_int8_pv_fp16_cuda", (9, 0): "sageattn_qk_int8_pv_fp8_cuda_sm90"}
        name = names.get(torch.cuda.get_device_capability(), "sageattn_qk_int8_pv_fp8_cuda")
        return getattr(sageattention, name)(q, k, v, tensor_layout="NHD", sm_scale=scale)

    def triton(module: str, function: str) -> Callable[..., Any]:
        def call(q, k, v, mask=None, scale=None):
            import importlib

            folder = "wanvideo_infinitetalk.wanvideo.kernels."
            importlib.import_module(f"{folder}_common").aligned_strided = lambda x: x  # without the guard
            kernels = importlib.import_module(folder + module)
            return getattr(kernels, function)(q, k, v, softmax_scale=scale)

        return call

    return {
        "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
        "sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        "sdpa math": sdpa(SDPBackend.MATH),
        "sdpa": sdpa(None),
        "comfy_kitchen_int8": kitchen,
        "sageattention_1": sage_1,
        "sageattention_2": sage_2,
        "triton_fp8": triton("sage_fp8", "sage_fp8_attention"),
        "triton_fp4": triton("sage_fp4", "sage_fp4_attention"),
    }


def _lay_out(x: Any, layout: str, amount: int) -> Any:
    """x [B, L, H, D] in a layout; `amount` in elements."""
    batch, length, heads, dim = x.shape
    if layout == "plain":
        return x
    if layout == "offset":
        return x.new_empty(x.numel() + amount)[amount:].view(x.shape).copy_(x)
    if layout == "row stride":
        return x.new_empty(batch, length, heads * dim + amount)[..., : heads * dim].unflatten(-1, (heads, dim)).copy_(x)
    if layout == "head stride":
        return x.new_empty(batch, length, heads, dim + amount)[..., :dim].copy_(x)
    if layout == "batch stride":
        flat = x.new_empty(batch, length * heads * dim + amount)
        return flat[:, : length * heads * dim].unflatten(-1, (length, heads, dim)).copy_(x)
    if layout == "size-1 stride":
        wide = x.new_empty(batch * length * heads * dim + amount)
        view = wide.as_strided((1, length, heads, dim), (amount, heads * dim, dim, 1))
        return view.copy_(x[:1])
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout == "fused":
        return x.new_empty(batch, length, 3, heads, dim)[:, :, 1].copy_(x)
    if layout == "transposed":
        return x.new_empty(batch, heads, length, dim).transpose(1, 2).copy_(x)
    if layout == "last stride":
        return x.new_empty(batch, length, dim, heads).transpose(2, 3).copy_(x)
    raise ValueError(layout)


def _attention(raw: Raw) -> tuple[Any, Any]:
    import torch

    sizes = {"batch": 2, "queries": 512, "keys": 512, "heads": 8, "head_dim": 128, **raw.sizes}
    dtype = getattr(torch, raw.dtype)
    torch.manual_seed(0)
    shapes = [(sizes["batch"], sizes[n], sizes["heads"], sizes["head_dim"]) for n in ("queries", "keys", "keys")]
    q, k, v = (_lay_out(torch.randn(s, device="cuda").to(dtype), raw.layout, raw.amount) for s in shapes)
    v.mul_(raw.options["v_peak"] / v.abs().amax()) if "v_peak" in raw.options else None
    scale = raw.options.get("scale")
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * (scale or q.shape[-1] ** -0.5)
    mask = None
    if "mask_offset" in raw.options:
        values = torch.randn(q.shape[0], 1, q.shape[1], k.shape[1], device="cuda").to(dtype)
        offset = raw.options["mask_offset"]
        mask = values.new_empty(values.numel() + offset)[offset:].view(values.shape).copy_(values)
        scores = scores + mask.double()
    want = torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, -1), v.double())
    return _kernels()[raw.kernel](q, k, v, mask=mask, scale=scale), want


def _linear(raw: Raw) -> tuple[Any, Any]:
    """`F.linear` in 16 bits, or `torch._scaled_mm` on fp8 operands with `amount` bytes of offset or padding."""
    import torch

    rows, inner, columns = 256, raw.sizes.get("inner", 512), 384
    torch.manual_seed(0)
    a, b = torch.randn(rows, inner, device="cuda"), torch.randn(columns, inner, device="cuda")
    dtype = torch.bfloat16 if raw.kernel == "linear" else torch.float8_e4m3fn
    a, b = a.to(dtype), b.to(dtype)
    want = a.double() @ b.double().t()

    def bytes_of(x: Any) -> Any:
        return x.view(torch.uint8) if dtype == torch.float8_e4m3fn else x

    if raw.layout == "offset":
        storage = torch.empty(a.numel() + raw.amount, dtype=bytes_of(a).dtype, device="cuda")
        a = storage[raw.amount :].view(a.shape).copy_(bytes_of(a)).view(dtype)
    elif raw.layout == "row stride":
        storage = torch.empty(rows, inner + raw.amount, dtype=bytes_of(a).dtype, device="cuda")
        storage[:, :inner].copy_(bytes_of(a))
        a = storage.view(dtype)[:, :inner]
    if raw.kernel == "linear":
        return torch.nn.functional.linear(a, b), want
    one = torch.ones((), device="cuda")
    return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16), want


def _try(raw: Raw) -> dict[str, Any]:
    import torch

    try:
        got, want = (_linear if raw.kernel in ("linear", "scaled_mm") else _attention)(raw)
        torch.cuda.synchronize()
    except ImportError as error:
        return {"outcome": ABSENT, "error": _last_line(str(error))}
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises is its answer
        text = f"{type(error).__name__}: {error}"
        faulted = ("CUDA error" in text and "NOT_SUPPORTED" not in text) or "misaligned address" in text
        return {"outcome": FAULT if faulted else REJECTED, "error": text.strip().splitlines()[0][:200]}
    got, want = got.double().flatten(), want.flatten()
    cosine = float(torch.nn.functional.cosine_similarity(got, want, dim=0))
    error = float((got - want).norm() / want.norm())
    right = bool(got.isfinite().all()) and error <= raw.bound
    return {"outcome": RIGHT if right else WRONG, "cosine": round(cosine, 5), "error": f"relative L2 {error:.3g}"}


if __name__ == "__main__":
    serve(lambda request: _try(Raw(**request)))
