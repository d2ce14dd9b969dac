"""What block swap costs: a 14B-shaped fp8 model with none, half and all of its blocks in host memory.

    python -m benchmarks.block_swap [--json F]
    python -m benchmarks.block_swap --layers 10        where memory is short: each setting holds a model of its own

The settings take turns, step by step, each denoising the same noise with the same random weights: the latents must be
identical. Needs some 45 GB on the GPU and 30 GB of host memory for 40 layers. Run from the root of the repository.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import sys
import time
from dataclasses import dataclass

import torch
from wanvideo_infinitetalk.wanvideo.modules.model import WanConfig, WanModel
from wanvideo_infinitetalk.wanvideo.runtime.offload import BlockSwap, Offloader

from .common import (
    PUBLIC_14B,
    PUBLIC_GRID,
    SMALL,
    SMALL_GRID,
    begin,
    interleaved,
    parser,
    random_inputs,
    random_model,
    ratio,
)

GOAL = 1.05
QUANTIZATION = "fp8_e4m3fn_scaled_fast"
NONE = "none"


@dataclass
class Setting:
    """One model with some of its blocks swapped, and the latents [16, T, h, w] that it denoises."""

    name: str
    blocks: int
    model: WanModel
    offloader: Offloader
    given: dict[str, torch.Tensor]
    latents: torch.Tensor
    step_size: float

    def step(self) -> None:
        """One Euler step of a flow from noise to data."""
        velocity = self.model(**(self.given | {"x": self.latents}))
        self.latents = self.latents - self.step_size * velocity[0]


def settings(
    config: WanConfig, grid: tuple[int, int, int], mode: str, device: torch.device, steps: int
) -> list[Setting]:
    """No, half and all blocks swapped; the weights are copies of one model, packed from the GPU into host memory."""
    first = random_model(config, device, torch.bfloat16, QUANTIZATION, mode)
    given = random_inputs(config, grid, device)
    made = []
    layers = config.num_layers
    for name, blocks in ((NONE, 0), ("half", layers // 2), ("all", layers)):
        begin = time.perf_counter()
        model = copy.deepcopy(first) if blocks else first
        offloader = Offloader(model, device, BlockSwap(blocks=blocks))
        offloader.load()
        made.append(Setting(name, blocks, model, offloader, given, given["x"].clone(), 1 / steps))
        print(f"{name}: {blocks} of {layers} blocks swapped, ready in {time.perf_counter() - begin:.1f} s", flush=True)
    return made


def peak_bytes(one: Setting, device: torch.device) -> int:
    """Device memory of one step: this setting's own weights and slots, and whatever the step allocates."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    one.model(**one.given)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before + one.offloader.device_bytes


def main() -> int:
    options = parser(__doc__, rounds=4)
    options.add_argument("--layers", type=int, help="of the model (40)")
    options.add_argument("--attention-mode", default="sdpa", metavar="M", help="(%(default)s)")
    report, arguments = begin(options, "block_swap", "Block swap")
    mode = arguments.attention_mode
    config, grid = (SMALL, SMALL_GRID) if report.small else (PUBLIC_14B, PUBLIC_GRID)
    config = dataclasses.replace(config, num_layers=arguments.layers or config.num_layers)

    with torch.inference_mode():
        made = settings(config, grid, mode, report.device, arguments.rounds + 1)
        peaks = {one.name: peak_bytes(one, report.device) for one in made}  # warms up, too
        times = interleaved({one.name: one.step for one in made}, arguments.rounds, report.device)
    rows: list[dict[str, str | int | float]] = []
    for one in made:
        same = torch.equal(one.latents, made[0].latents)
        rows.append(
            {
                "swapped": f"{one.name} ({one.blocks} of {config.num_layers})",
                "step, ms": statistics.median(times[one.name]),
                "ratio to none": ratio(times, one.name, NONE),
                "latents": "identical" if same else "DIFFERENT",
                "peak, GiB": peaks[one.name] / 2**30,
                "weights on the device, GiB": one.offloader.device_bytes / 2**30,
            }
        )
        if not same:
            report.failed(f"The latents differ with {one.name} of the blocks swapped.")
    tokens = grid[0] * grid[1] * grid[2]
    report.table(
        f"{config.num_layers} layers of {config.dim}, {tokens} tokens, attention {mode}, {QUANTIZATION}: "
        f"medians of {arguments.rounds} steps",
        rows,
    )
    report.goal("all blocks swapped / none", ratio(times, "all", NONE), GOAL)
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
