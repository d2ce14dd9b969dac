"""Each guard of the model stands where it is needed.

Every named place is fed inputs that are sliced, transposed or start at an odd offset, and kernels whose results lie so,
through kernels that reject what a 16-byte kernel would fault on (support/checking.py). With its guards a place must
give the numbers of the tidy case; with any one of them taken out, some case must be rejected.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from support.checking import AWKWARD, LayoutRejected, awkward, checking_kernels, guard_sites
from torch import nn
from wanvideo_infinitetalk.multitalk import multitalk
from wanvideo_infinitetalk.wanvideo.kernels.layout import count_guards, layout_violations
from wanvideo_infinitetalk.wanvideo.modules import humo

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Place:
    """One named place: its module, a call, tidy inputs, and how many guards run in it.

    `shown_elsewhere` of them are needed in another place only: what reaches them here is always fresh.
    """

    module: ModuleType
    call: Callable[[Inputs], torch.Tensor]
    inputs: Inputs
    guards: int
    shown_elsewhere: int = 0


GRID = (2, 4, 4)
TOKENS, PER_FRAME = 32, 16


def _filled(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.eval().requires_grad_(False)


def _audio_projection() -> Place:
    module = _filled(multitalk.AudioProjModel(3, 4, 2, 8, 16, 8, 4))
    inputs = {"first": torch.randn(2, 1, 3, 2, 8), "later": torch.randn(2, 2, 4, 2, 8)}
    return Place(multitalk, lambda i: module(i["first"], i["later"]), inputs, 5)


def _single_stream() -> Place:
    module = _filled(multitalk.SingleStreamAttention(16, 8, 2, True))
    inputs = {"x": torch.randn(1, TOKENS, 16), "audio": torch.randn(2, 4, 8)}
    return Place(multitalk, lambda i: module(i["x"], i["audio"], GRID), inputs, 7)


def _multi_stream() -> Place:
    module = _filled(multitalk.SingleStreamMultiAttention(16, 2, encoder_hidden_states_dim=8))
    inputs = {"x": torch.randn(1, TOKENS, 16), "audio": torch.randn(1, 2, 8, 8), "map": torch.rand(3, TOKENS)}
    # Rotated q and k are fresh, so their guards are idle here; without a map nothing is rotated.
    return Place(multitalk, lambda i: module(i["x"], i["audio"], GRID, i["map"]), inputs, 7, shown_elsewhere=2)


def _multi_stream_without_map() -> Place:
    module = _filled(multitalk.SingleStreamMultiAttention(16, 2, encoder_hidden_states_dim=8))
    inputs = {"x": torch.randn(1, TOKENS, 16), "audio": torch.randn(1, 2, 8, 8)}
    return Place(multitalk, lambda i: module(i["x"], i["audio"], GRID, human_num=2), inputs, 7)


def _reference_map() -> Place:
    inputs = {"q": torch.randn(1, TOKENS, 2, 8), "k": torch.randn(1, TOKENS, 2, 8), "masks": torch.rand(3, PER_FRAME)}

    def call(i: Inputs) -> torch.Tensor:
        return multitalk.calculate_x_ref_attn_map(i["q"], i["k"][:, :PER_FRAME], i["masks"])

    return Place(multitalk, call, inputs, 3)


def _humo_projection() -> Place:
    module = _filled(humo.HuMoAudioProjModel(4, 2, 8, 16, 8, 4))
    return Place(humo, lambda i: module(i["audio"]), {"audio": torch.randn(1, 2, 4, 2, 8)}, 5)


def _humo_cross_attention() -> Place:
    module = _filled(humo.WanHuMoCrossAttention(16, 16, 2, kv_dim=8))
    inputs = {"x": torch.randn(1, TOKENS, 16), "audio": torch.randn(1, 8, 8)}
    return Place(humo, lambda i: module(i["x"], i["audio"], torch.tensor([GRID])), inputs, 5)


def _humo_wrapper() -> Place:
    module = _filled(humo.AudioCrossAttentionWrapper(16, 16, 2, kv_dim=8))
    inputs = {"x": torch.randn(1, TOKENS, 16), "audio": torch.randn(1, 8, 8)}
    # The cross attention's own result guard is idle here: the sum that follows makes a fresh tensor.
    return Place(humo, lambda i: module(i["x"], i["audio"], GRID, 0.5), inputs, 7, shown_elsewhere=1)


PLACES: dict[str, Callable[[], Place]] = {
    "the audio projection": _audio_projection,
    "SingleStreamAttention.forward": _single_stream,
    "SingleStreamMultiAttention.forward": _multi_stream,
    "SingleStreamMultiAttention.forward, no map": _multi_stream_without_map,
    "calculate_x_ref_attn_map": _reference_map,
    "HuMo's audio projection": _humo_projection,
    "WanHuMoCrossAttention.forward": _humo_cross_attention,
    "AudioCrossAttentionWrapper.forward": _humo_wrapper,
}


def _run(place: Place, inputs_lie: str | None, results_lie: str | None) -> torch.Tensor:
    laid_out = {name: awkward(x, inputs_lie) for name, x in place.inputs.items()}
    before = {name: x.clone() for name, x in laid_out.items()}
    with checking_kernels(place.module, results=results_lie) as kernels:
        out = place.call(laid_out)
    assert kernels.seen, "no kernel was checked"
    for name, x in laid_out.items():
        assert torch.equal(x, before[name]), f"{name} was written to"
    if layout_violations(out) or not out.is_contiguous():
        raise LayoutRejected("the result")
    return out


CASES = [case for case in itertools.product((None, *AWKWARD), repeat=2) if case != (None, None)]


@pytest.mark.parametrize("name", PLACES)
def test_awkward_layouts_give_the_same_numbers(name: str) -> None:
    place = PLACES[name]()
    expected = _run(place, None, None)
    for case in CASES:
        torch.testing.assert_close(_run(place, *case), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PLACES)
def test_every_guard_is_needed(name: str) -> None:
    place = PLACES[name]()
    with guard_sites(place.module) as sites:
        _run(place, None, None)
    assert len(sites) == place.guards

    def rejected(without: tuple[str, int]) -> bool:
        for case in CASES:
            with guard_sites(place.module, without):
                try:
                    _run(place, *case)
                except LayoutRejected:
                    return True
        return False

    needless = sorted(site for site in sites if not rejected(site))
    assert len(needless) == place.shown_elsewhere, needless


@pytest.mark.parametrize("name", PLACES)
def test_tidy_inputs_are_not_copied(name: str) -> None:
    place = PLACES[name]()
    with count_guards() as stats:
        place.call(place.inputs)
    assert stats.calls >= place.guards
    assert stats.copies == 0
