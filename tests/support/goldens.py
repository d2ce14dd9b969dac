"""Reading golden numbers: `X.safetensors` (weights.*, inputs.*, outputs.*) with its sidecar `X.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


@dataclass(frozen=True)
class Golden:
    """One item: its configuration and its tensors, stored dtypes kept (see `float()`)."""

    name: str
    config: dict[str, Any]
    sidecar: dict[str, Any]
    weights: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]

    def float(self) -> Golden:
        """The same with every 16- and 32-bit float tensor as float32 (16-bit ones are stored only where exact)."""

        def up(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {k: v.float() if v.dtype in (torch.bfloat16, torch.float16) else v for k, v in tensors.items()}

        return Golden(self.name, self.config, self.sidecar, up(self.weights), up(self.inputs), up(self.outputs))


def load_golden(folder: Path, item: str) -> Golden:
    sidecar = json.loads((folder / f"{item}.json").read_text())
    parts: dict[str, dict[str, torch.Tensor]] = {"weights": {}, "inputs": {}, "outputs": {}}
    for key, tensor in load_file(folder / f"{item}.safetensors").items():
        kind, _, name = key.partition(".")
        parts[kind][name] = tensor
    return Golden(item, sidecar["config"], sidecar, **parts)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute error over the root mean square of the expectation, in float64."""
    a, e = actual.double(), expected.double()
    assert a.shape == e.shape, f"shape {tuple(a.shape)}, expected {tuple(e.shape)}"
    return float((a - e).abs().max() / e.square().mean().sqrt())
