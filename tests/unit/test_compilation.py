"""torch.compile: one graph for all blocks in every attention mode, no new one from window to window, same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.models import random_inputs, random_model
from wanvideo_infinitetalk.wanvideo.errors import BackendUnavailableError, InfiniteTalkError, InputError
from wanvideo_infinitetalk.wanvideo.runtime.compilation import (
    CompileSettings,
    check_compiler,
    check_with_block_swap,
    compile_limits,
    compile_model,
    undo_compile,
)
from wanvideo_infinitetalk.wanvideo.runtime.offload import BlockSwap, Offloader

MODES = ("sdpa", "eager", "sageattn_3_fp4", "sageattn_3_fp8", "sageattn_3", "sageattn")


SLOW = pytest.mark.slow
"""Inductor builds C++ on the CPU: half a minute."""


class Counter:
    """A backend of torch.compile that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def counter() -> Iterator[Counter]:
    torch._dynamo.reset()
    yield Counter()
    torch._dynamo.reset()


def settings_of(counter: Counter, **changes: Any) -> CompileSettings:
    return CompileSettings(**{"backend": counter, "fullgraph": True, **changes})


@pytest.mark.parametrize("mode", MODES)
def test_blocks_are_one_graph_in_every_mode(counter: Counter, mode: str) -> None:
    model = random_model(attention_mode=mode)
    inputs = random_inputs()
    with torch.no_grad():
        expected = model(**inputs)
        settings = settings_of(counter)
        compile_model(model, settings)
        with compile_limits(settings):
            for _ in range(3):  # windows of the same size
                assert torch.equal(model(**inputs), expected)
            assert counter.graphs == 1, "blocks of one shape share one graph"
            again = model(**{**inputs, "t": inputs["t"] * 0.5})
        assert not torch.equal(again, expected)
        assert counter.graphs == 1
        undo_compile(model)
        assert torch.equal(model(**inputs), expected)


def test_the_whole_model_is_one_graph(counter: Counter) -> None:
    model = random_model()
    inputs = random_inputs()
    with torch.no_grad():
        expected = model(**inputs)
        compile_model(model, settings_of(counter, blocks_only=False))
        for _ in range(2):
            torch.testing.assert_close(model(**inputs), expected)
    assert counter.graphs == 1


def test_compiled_blocks_may_be_swapped(counter: Counter) -> None:
    model = random_model()
    inputs = random_inputs()
    with torch.no_grad():
        expected = model(**inputs)
        compile_model(model, settings_of(counter))
        offloader = Offloader(model, "cpu", BlockSwap(blocks=9))
        offloader.load()
        for _ in range(2):
            assert torch.equal(model(**inputs), expected)
    assert counter.graphs == 1


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda), pytest.param("cpu", marks=SLOW)])
def test_inductor_gives_the_same_numbers(counter: Counter, device: str) -> None:
    model = random_model().to(device)
    inputs = {name: value.to(device) for name, value in random_inputs().items()}
    check_compiler(CompileSettings(), device)
    with torch.no_grad():
        expected = model(**inputs)
        compile_model(model, CompileSettings(backend="inductor", fullgraph=True))
        torch.testing.assert_close(model(**inputs), expected, atol=2e-4, rtol=2e-4)


def test_limits_hold_inside_only() -> None:
    import torch._dynamo.config as config

    before = config.force_parameter_static_shapes
    with compile_limits(CompileSettings(variants=7, dynamic=True, static_parameter_shapes=False)):
        assert getattr(config, "recompile_limit", config.cache_size_limit) == 7
        assert config.force_parameter_static_shapes is False
    assert config.force_parameter_static_shapes is before
    with compile_limits(None):
        pass


def test_what_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(InputError, match="compile_transformer_blocks_only off"):
        compile_model(torch.nn.Linear(2, 2), CompileSettings())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (CompileSettings(blocks_only=False), "compile_transformer_blocks_only on"),
        (CompileSettings(mode="reduce-overhead"), "CUDA graphs"),
        (CompileSettings(backend="cudagraphs"), "CUDA graphs"),
    ],
)
def test_block_swap_is_refused_where_weights_must_not_move(settings: CompileSettings, words: str) -> None:
    check_with_block_swap(settings, None)
    check_with_block_swap(settings, BlockSwap())
    with pytest.raises(InputError, match=words):
        check_with_block_swap(settings, BlockSwap(blocks=1))
    check_with_block_swap(CompileSettings(), BlockSwap(blocks=1))


def test_a_compiler_that_is_not_there_is_said(counter: Counter) -> None:
    """Inductor's own error, without a C++ compiler and without what earlier runs have compiled."""
    import torch._inductor.config as config

    check_compiler(None, "cpu")
    check_compiler(CompileSettings(backend="eager"), "cpu")
    sentence = r"backend inductor \(.*C\+\+ compiler.*or do not compile\.$"
    none = config.patch({"cpp.cxx": (None, "/no/compiler"), "force_disable_caches": True})
    with none, pytest.raises(BackendUnavailableError, match=sentence):
        check_compiler(CompileSettings(), "cpu")
    with pytest.raises(BackendUnavailableError, match=r"backend nonsense \("):
        check_compiler(CompileSettings(backend="nonsense"), "cpu")


def test_what_torch_cannot_compile_is_said(counter: Counter) -> None:
    class Breaking(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return x

    model, settings = Breaking(), settings_of(counter, blocks_only=False)
    compile_model(model, settings)
    sentence = r"^torch\.compile cannot compile this model \([^\n]*\): run it"
    with pytest.raises(InfiniteTalkError, match=sentence), compile_limits(settings):
        model(torch.ones(2))
