"""Every attention mode that can run on this GPU, through the entry point, on generated calls of every layout and size.

`ATTENTION_CASES=N` sets the number of cases per mode (default 480); `pytest -s` prints the summary. The same calls with
quantized linears around them: test_layers_cuda.py.
"""

from __future__ import annotations

import collections
import os
import sys
import time

import pytest
import torch
from support.attention_cases import Case, case, faults, tensors
from support.mode_bounds import backend_of, bound_of
from wanvideo_infinitetalk.wanvideo.kernels.layout import count_guards
from wanvideo_infinitetalk.wanvideo.modules.attention import MODE_BACKENDS, attention, run_backend
from wanvideo_infinitetalk.wanvideo.modules.backends import backends, unavailable_reasons

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(600)]

CASES = int(os.environ.get("ATTENTION_CASES", "480"))
SHOWN = 5

MODES = ("sdpa", "eager", "sageattn", "sageattn_3", "sageattn_3_fp4", "sageattn_3_fp8", "flash_attn_2", "flash_attn_3")
DIRECT = ("emulated_fp8", "emulated_nvfp4", "emulated_nvfp4_plain")
DEVICE = "cuda"


def check(name: str, one: Case) -> tuple[str | None, list[str], int]:
    """(backend, what is wrong, copies made) for one case."""
    qkv = tensors(one, DEVICE)
    backend = backend_of(name, one, qkv)
    if backend is None:
        return None, [], 0
    before = [x.clone() for x in qkv]
    with count_guards() as stats:
        if name in MODE_BACKENDS:
            out = attention(*qkv, name, softmax_scale=one.scale)
        else:
            out = run_backend(name, *qkv, softmax_scale=one.scale)
    found = faults(one, qkv, out, bound_of(name, one))
    if not all(torch.equal(x, y) for x, y in zip(qkv, before, strict=True)):
        found.append("an input was changed")
    return backend, found, stats.copies


@pytest.mark.parametrize("name", [*MODES, *DIRECT])
def test_generated_calls(name: str) -> None:
    device = torch.device(DEVICE, 0)
    names = MODE_BACKENDS.get(name, (name,))
    missing = {n: unavailable_reasons(n, device) for n in names}
    if all(missing.values()):
        pytest.skip("; ".join(f"{n}: {', '.join(reasons)}" for n, reasons in missing.items()))
    count = CASES if name in MODES else max(1, CASES // 4)
    started = time.monotonic()
    ran: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    copies = 0
    for number in range(count):
        one = case(number)
        backend, found, copied = check(name, one)
        copies += copied
        ran[backend or "not supported"] += 1
        if found:
            failures.append(f"{backend}: {'; '.join(found)}: {one}")
    seconds = time.monotonic() - started
    summary = f"{name}: {count} cases, {dict(ran)}, {copies} copies, {len(failures)} wrong, {seconds:.1f} s"
    sys.stdout.write(f"\n{summary}\n")
    assert not failures, "\n".join([summary, *failures[:SHOWN]])
    assert ran["not supported"] < count


MASKED = [b.name for b in backends() if b.contract.masks and b.name != "comfy"]


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("form", ["bool", "additive"])
@pytest.mark.parametrize("offset", [0, 1, 3, 8])
@pytest.mark.parametrize("keys", [17, 64, 255])
def test_masks_of_any_address(name: str, form: str, offset: int, keys: int) -> None:
    device = torch.device(DEVICE, 0)
    if reasons := unavailable_reasons(name, device):
        pytest.skip(", ".join(reasons))
    q, k, v = (torch.randn(2, n, 3, 64, device=device, dtype=torch.bfloat16) for n in (50, keys, keys))
    allowed = torch.rand(2, 1, 50, keys, device=device) > 0.4
    allowed[..., 0] = True
    values = allowed if form == "bool" else torch.where(allowed, 0.0, -torch.inf).to(q.dtype)
    mask = values.new_empty(values.numel() + offset)[offset:].view(values.shape).copy_(values)
    want = attention(q.double(), k.double(), v.double(), "eager", attn_mask=allowed)
    got = run_backend(name, q, k, v, attn_mask=mask)
    assert float((got.double() - want).norm() / want.norm()) < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
def test_queries_without_any_key_get_zeros(dtype: torch.dtype, causal: bool) -> None:
    q, k, v = (torch.randn(2, n, 3, 64, device=DEVICE, dtype=dtype) for n in (50, 60, 60))
    allowed = torch.rand(2, 1, 50, 60, device=DEVICE) > 0.4
    allowed[1, :, 7] = False
    out = attention(q, k, v, "sdpa", attn_mask=allowed, causal=causal)
    want = attention(q.double(), k.double(), v.double(), "eager", attn_mask=allowed, causal=causal)
    assert out[1, 7].eq(0).all()
    assert float((out.double() - want).norm() / want.norm()) < 0.01


@pytest.mark.parametrize("name", ["sdpa", "sageattn_3_fp4", "sageattn_3_fp8"])
def test_the_current_stream_is_used(name: str) -> None:
    """Work queued on a side stream is seen by the kernel, which runs there too."""
    q, k, v = (torch.randn(1, 512, 4, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    want = attention(q, k, v, name)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(q)
        torch.cuda._sleep(50_000_000)
        late.copy_(q)
        out = attention(late, k, v, name)
    stream.synchronize()
    assert torch.equal(out, want)


@pytest.mark.parametrize("name", ["sdpa", "sageattn_3_fp4", "sageattn_3_fp8"])
def test_compiled_and_eager_agree(name: str) -> None:
    torch._dynamo.reset()
    x = torch.randn(2 * 200 * 3 * 4 * 64 + 1, device=DEVICE, dtype=torch.bfloat16)[1:].view(2, 200, -1)

    def block(x: torch.Tensor) -> torch.Tensor:
        q, k, v = (x * 1.5).unflatten(-1, (3, 4, 64)).unbind(2)
        return attention(q[:, 1:], k, v, name).flatten(2) + 1

    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x), atol=0.02, rtol=0.02)
