"""The reduced set: every kernel once or twice at awkward layouts, small enough to run under a memory checker.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \\
        python -m pytest -m cuda -k reduced

Without the caching allocator each tensor is an allocation of its own, so that a read beyond its end is seen.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.attention_cases import laid_out, reference, relative_error
from torch import nn
from wanvideo_infinitetalk.fp8_optimization import QUANTIZATIONS, quantize_linears
from wanvideo_infinitetalk.wanvideo.kernels.layout import layout_violations
from wanvideo_infinitetalk.wanvideo.linear.base import relative_l2
from wanvideo_infinitetalk.wanvideo.modules.attention import run_backend
from wanvideo_infinitetalk.wanvideo.modules.backends import backends, lookup, unavailable_reasons

pytestmark = pytest.mark.cuda

DEVICE = "cuda"

KERNELS = [b.name for b in backends() if not b.emulation and b.name != "comfy"]

# (layout, elements off, queries, keys, head_dim): contiguous at an odd address, rows off 16 bytes, a slice of fused
# q, k, v; lengths one past and one short of a tile.
LAYOUTS = [("offset", 1, 129, 255, 128), ("padded rows", 3, 65, 129, 64), ("fused", 0, 127, 193, 128)]


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case[0])
@pytest.mark.parametrize("kernel", KERNELS)
def test_reduced_attention(kernel: str, case: tuple[str, int, int, int, int]) -> None:
    device = torch.device(DEVICE, 0)
    if reasons := unavailable_reasons(kernel, device):
        pytest.skip("; ".join(reasons))
    layout, offset, queries, keys, dim = case
    q, k, v = (
        laid_out(torch.randn(2, length, 3, dim, device=device, dtype=torch.bfloat16), layout, offset)
        for length in (queries, keys, keys)
    )
    assert layout == "fused" or all(layout_violations(x) for x in (q, k, v))
    out = run_backend(kernel, q, k, v)
    torch.cuda.synchronize()
    assert out.is_contiguous()
    assert relative_error(out, reference(q, k, v, None)) < lookup(kernel).bound[q.dtype]


def awkward(layout: str, rows: int, features: int) -> torch.Tensor:
    """Activations [rows, features] bf16 that no 16-byte kernel can read as they lie."""
    if layout == "offset":
        return torch.randn(rows * features + 1, device=DEVICE, dtype=torch.bfloat16)[1:].view(rows, features)
    return torch.randn(rows, features + 3, device=DEVICE, dtype=torch.bfloat16)[:, 1:-2]


@pytest.mark.parametrize("out_features", [96, 100])
@pytest.mark.parametrize("layout", ["offset", "column slice"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_reduced_linear(quantization: str, layout: str, out_features: int) -> None:
    linear = nn.Linear(128, out_features, device=DEVICE, dtype=torch.bfloat16).requires_grad_(False)
    x = awkward(layout, 17, 128)
    expected = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    model = nn.ModuleDict({"blocks": nn.ModuleList([linear])})
    quantize_linears(model, quantization, torch.bfloat16)
    out = model.get_submodule("blocks.0")(x)
    torch.cuda.synchronize()
    bound = 0.2 if quantization == "fp4_scaled" else 0.1 if "e5m2" in quantization else 0.06
    assert relative_l2(out, expected) < (0.01 if quantization == "disabled" else bound)
