"""Nodes around ComfyUI's own models."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
from support.comfy_host import Host, hosted

HEADS, WIDTH = 2, 32


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory):
    with hosted(tmp_path_factory.mktemp("comfy")) as host:
        yield host


class Model:
    """A core MODEL, as far as it is asked."""

    def __init__(self, model_options: dict[str, Any]) -> None:
        self.model_options = model_options

    def clone(self) -> Model:
        return Model({name: dict(value) for name, value in self.model_options.items()})


def rows(length: int, *, by_heads: bool) -> torch.Tensor:
    x = torch.randn(2, length, HEADS, WIDTH, generator=torch.Generator().manual_seed(length))
    return x.transpose(1, 2) if by_heads else x.flatten(2)


def masks(lq: int, lk: int) -> list[torch.Tensor | None]:
    """Of every form that ComfyUI's own attention takes."""
    keep = torch.rand(2, lq, lk, generator=torch.Generator().manual_seed(1)) > 0.3
    return [None, keep[0], keep, keep[:, None], keep.float().log().clamp_min(-1e4)]


LAYOUTS = list(itertools.product([False, True], repeat=2))


@pytest.mark.parametrize(("given", "wanted"), LAYOUTS)
@pytest.mark.parametrize("keys", [12, 5])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_every_layout_and_mask_of_the_core(host: Host, given: bool, wanted: bool, keys: int, scale: float) -> None:
    from wanvideo_infinitetalk.comfy_nodes.kernels import core_attention

    q, k, v = (rows(length, by_heads=given) for length in (12, keys, keys))
    for mask in masks(12, keys):
        options: dict[str, Any] = {} if scale is None else {"scale": scale}
        found = core_attention(
            "sdpa", None, q, k, v, HEADS, mask, skip_reshape=given, skip_output_reshape=wanted, **options
        )
        parts = [x if given else x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for x in (q, k, v)]
        shown = mask[:, None] if mask is not None and mask.ndim == 3 else mask
        expected = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=shown, scale=scale)
        expected = expected if wanted else expected.transpose(1, 2).flatten(2)
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("keys", "options", "mode"),
    [(12, {}, "sageattn_3_fp8"), (5, {}, "sdpa"), (12, {"low_precision_attention": False}, "sdpa")],
)
def test_low_precision_is_for_self_attention(
    host: Host, monkeypatch: pytest.MonkeyPatch, keys: int, options: dict[str, Any], mode: str
) -> None:
    from wanvideo_infinitetalk.comfy_nodes import kernels

    modes = []
    monkeypatch.setattr(kernels, "attention", lambda q, k, v, mode, *rest: modes.append(mode) or q)
    q, k = rows(12, by_heads=False), rows(keys, by_heads=False)
    kernels.core_attention("sageattn_3_fp8", None, q, k, k, HEADS, **options)
    assert modes == [mode]


@pytest.mark.parametrize("options", [{"enable_gqa": True}, {"attn_precision": torch.float32}])
def test_what_the_entry_point_lacks_is_the_cores(host: Host, options: dict[str, Any]) -> None:
    from wanvideo_infinitetalk.comfy_nodes.kernels import core_attention

    seen: dict[str, Any] = {}
    q = rows(12, by_heads=True).half()
    out = core_attention(
        "sdpa", lambda q, k, v, heads, **given: seen.update(given) or v, q, q, q, HEADS, skip_reshape=True, **options
    )
    assert out is q
    assert options.items() <= seen.items()
    assert seen["skip_reshape"] is True


def test_the_model_that_is_given_stays_as_it_is(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    model = Model({"transformer_options": {"kept": 1}})
    (patched,) = host.nodes["InfiniteTalkAttention"].execute(model=model, attention_mode="sdpa").args
    assert model.model_options == {"transformer_options": {"kept": 1}}
    options = patched.model_options["transformer_options"]
    assert options["kept"] == 1
    x = rows(12, by_heads=False)
    assert options["optimized_attention_override"](None, x, x, x, HEADS).shape == x.shape
    with caplog.at_level(logging.WARNING):
        host.nodes["InfiniteTalkAttention"].execute(model=patched, attention_mode="sdpa")
    assert "is replaced" in caplog.text
