"""What leaves the GPU: through pinned memory, with the colors and the bytes that the CPU would give."""

from __future__ import annotations

import pytest
import torch
from wanvideo_infinitetalk.media.color import match_colors
from wanvideo_infinitetalk.media.video import to_bytes
from wanvideo_infinitetalk.wanvideo.runtime import host
from wanvideo_infinitetalk.wanvideo.runtime.host import to_host

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_copies_go_through_pinned_memory(dtype) -> None:
    frames = (torch.rand(5, 3, 48, 32, device="cuda") * 255).to(dtype).permute(0, 2, 3, 1)
    copied = to_host(frames)
    assert copied.is_pinned()
    assert copied.is_contiguous()
    assert torch.equal(copied, frames.cpu())


def test_where_no_memory_can_be_pinned_the_copy_is_an_ordinary_one(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = torch.rand(5, 3, device="cuda")
    empty = torch.empty

    def full(*given: object, **options: object) -> torch.Tensor:
        if options.get("pin_memory"):
            raise RuntimeError("CUDA error: out of memory")
        return empty(*given, **options)

    monkeypatch.setattr(host.torch, "empty", full)
    assert torch.equal(to_host(frames), frames.cpu())


def test_colors_and_bytes_are_those_of_the_cpu() -> None:
    frames = torch.rand(3, 9, 48, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    reference = frames[:, 0].roll(7, 1) * 0.5
    ours = match_colors(frames.cuda(), reference.cuda(), 1.0)
    expected = match_colors(frames, reference, 1.0)
    assert float((ours.cpu() - expected).abs().max()) < 1e-4
    values = torch.rand(100_000, generator=torch.Generator().manual_seed(1)) * 1.2 - 0.1
    assert torch.equal(to_bytes(values.cuda()).cpu(), to_bytes(values))
