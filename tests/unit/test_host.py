"""Copies to host memory: on a CPU nothing is copied but what does not lie in order."""

from __future__ import annotations

import torch
from wanvideo_infinitetalk.wanvideo.runtime.host import to_host


def test_on_a_cpu_it_is_the_same_memory_in_order() -> None:
    frames = torch.rand(2, 3, 4)
    assert to_host(frames).data_ptr() == frames.data_ptr()
    assert to_host(frames.permute(2, 0, 1)).is_contiguous()
