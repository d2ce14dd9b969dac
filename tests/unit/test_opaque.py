"""Calls that a compiled graph holds whole: the same numbers, one graph, honest fakes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.models import random_inputs, random_model
from wanvideo_infinitetalk.benchmarks import common, fused_cases
from wanvideo_infinitetalk.wanvideo.kernels import opaque
from wanvideo_infinitetalk.wanvideo.modules import elementwise
from wanvideo_infinitetalk.wanvideo.runtime.compilation import CompileSettings, compile_limits, compile_model

CPU = torch.device("cpu")


class Graphs:
    """A backend of torch.compile that runs graphs as they are, and keeps them."""

    def __init__(self) -> None:
        self.seen: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        self.seen.append(graph)
        return graph.forward

    def operations(self) -> list[str]:
        """The groups that are in the graphs whole."""
        nodes = [node for graph in self.seen for node in graph.graph.nodes]
        return [node.args[0] for node in nodes if "wanvideo_infinitetalk.elementwise" in str(node.target)]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """Calls on the CPU stay whole as well."""
    monkeypatch.setattr(opaque, "is_kept", lambda x: True)
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("group", [*fused_cases.GROUPS, "add_rows", "gelu_rows"])
@torch.no_grad()
def test_every_group_is_one_operation(graphs: Graphs, group: str, rows: bool) -> None:
    given = fused_cases.calls(2, 3, 2, 32, CPU, torch.bfloat16, "normal")
    x, y, _ = given["gated_residual"]
    call = {**given, "add_rows": (x, y), "gelu_rows": (x,)}[group]
    if rows and group not in ("modulated_norm", "affine_norm", "add_modulated_norm", "add_affine_norm"):
        pytest.skip("there is nothing to ask for")
    last = {"rows": True} if rows else {}
    function = getattr(elementwise, group)
    got = torch.compile(function, fullgraph=True, backend=graphs)(*call, **last)
    wanted = function(*call, **last)
    assert type(got) is type(wanted)
    torch.testing.assert_close(opaque._flat(got), opaque._flat(wanted), atol=0, rtol=0)
    assert graphs.operations() == [group]
    packed = (group, *opaque._packed((*call, *last.values())))
    torch.library.opcheck(opaque._operation, packed, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("quantization", ["disabled", "fp8_e4m3fn_scaled_fast"])
@torch.no_grad()
def test_blocks_are_one_graph_with_the_calls_in_it(graphs: Graphs, quantization: str) -> None:
    torch.manual_seed(0)
    model = common.random_model(common.SMALL, CPU, torch.bfloat16, quantization)
    inputs = common.random_inputs(common.SMALL, common.SMALL_GRID, CPU)
    expected = model(**inputs)
    settings = CompileSettings(backend=graphs, fullgraph=True)  # type: ignore[arg-type]
    compile_model(model, settings)
    with compile_limits(settings):
        for scale in (1.0, 1.0, 0.5):  # windows and steps
            got = model(**{**inputs, "t": inputs["t"] * scale})
            if scale == 1:
                assert torch.equal(got, expected)
    assert len(graphs.seen) == 1
    found = graphs.operations()
    assert found.count("add_affine_norm") == 2
    assert {"modulated_norm", "qk_norm_rope", "add_modulated_norm", "gated_residual"} <= set(found)
    assert ("gelu_rows" in found) == (quantization != "disabled")
    assert found.count("quantize_rows_fp8") == (0 if quantization == "disabled" else 7)


@torch.no_grad()
def test_on_a_cpu_the_compiler_sees_the_eager_form() -> None:
    torch._dynamo.reset()
    graphs = Graphs()
    model, inputs = random_model(), random_inputs()
    compile_model(model, CompileSettings(backend=graphs, fullgraph=True))  # type: ignore[arg-type]
    model(**inputs)
    assert graphs.seen
    assert not graphs.operations()
    torch._dynamo.reset()
