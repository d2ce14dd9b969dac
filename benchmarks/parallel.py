"""One forward of InfiniteTalk on several GPUs against one of them: speed-up, exchanges, errors.

    python -m benchmarks.parallel [--gpus 2 4 ...] [--rounds N] [--json F]

All GPUs compute the forward alone, each for itself, and together, in turns; the figures are those of the first. The
weights are random, the error is that of the predicted velocity. Run from the root of the repository.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from wanvideo_infinitetalk.pipeline.make_video import devices_of
from wanvideo_infinitetalk.pipeline.processes import Processes, Seat
from wanvideo_infinitetalk.wanvideo.linear.base import relative_l2
from wanvideo_infinitetalk.wanvideo.modules.model import WanConfig
from wanvideo_infinitetalk.wanvideo.runtime.parallel import ALONE, Mesh

from .common import PUBLIC_14B, PUBLIC_GRID, SMALL, SMALL_GRID, begin, interleaved, parser, random_inputs, random_model

VARIANTS = (("sdpa", "disabled"), ("sageattn_3_fp8", "fp8_e4m3fn_scaled_fast"))
"""Attention mode and quantization of the linear layers."""

GRIDS = {"one speaker, 480 x 832": PUBLIC_GRID, "33 frames of 448 x 768": (9, 28, 48)}


@dataclass(frozen=True)
class Measure:
    """What the processes measure: forwards of a model on a grid of tokens."""

    config: WanConfig
    grid: tuple[int, int, int]
    mode: str
    quantization: str
    rounds: int


@dataclass(frozen=True)
class Measured:
    """Milliseconds of each round alone, together, and of the exchanges alone; the error of together against alone."""

    alone: list[float]
    together: list[float]
    exchanges: list[float]
    error: float


def measure(seat: Seat, given: Measure) -> Measured:
    """Runs in each process."""
    device = seat.device
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with torch.inference_mode():
        model = random_model(given.config, device, dtype, given.quantization)
        inputs = random_inputs(given.config, given.grid, device)

        def forward(mesh: Mesh) -> Callable[[], torch.Tensor]:
            def call() -> torch.Tensor:
                model.mesh = mesh
                dist.barrier()
                velocity: torch.Tensor = model(**inputs, attention_mode=given.mode)
                return velocity

            return call

        alone, together = forward(ALONE), forward(seat.mesh)
        error = relative_l2(together(), alone())
        calls = {"alone": alone, "together": together, "exchanges": exchanges(seat, given, dtype)}
        times = interleaved(calls, given.rounds, device)
    return Measured(times["alone"], times["together"], times["exchanges"], error)


def exchanges(seat: Seat, given: Measure, dtype: torch.dtype) -> Callable[[], object]:
    """The exchanges of one forward, one behind the other, with nothing to hide behind."""
    split = seat.mesh.tokens
    assert split is not None
    frames, rows, columns = given.grid
    places, config = rows * columns, given.config
    tokens = frames * split.counts(places)[split.rank]
    x = torch.randn(1, tokens, config.num_heads, config.head_dim, device=seat.device, dtype=dtype)

    def call() -> object:
        dist.barrier()
        for _ in range(config.num_layers):
            parts = [split.heads(x, frames, places) for _ in range(3)]
            whole = [finish() for finish in parts]
            split.tokens(whole[0], frames, places)
        return None

    return call


def main() -> int:
    options = parser(__doc__, rounds=5)
    options.add_argument("--gpus", type=int, nargs="+", default=[2], metavar="N", help="how many (%(default)s)")
    report, arguments = begin(options, "parallel", "One forward on several GPUs")
    config, grids = PUBLIC_14B, GRIDS
    if arguments.small:
        config, grids = replace(SMALL, num_heads=max(2, *arguments.gpus)), {"small": SMALL_GRID}
    rows = []
    for gpus in arguments.gpus:
        processes = Processes(devices_of(report.device, gpus), 1, measure)
        try:
            for title, grid in grids.items():
                for mode, quantization in VARIANTS:
                    found: Measured = processes.call(Measure(config, grid, mode, quantization, arguments.rounds))
                    speed_up = statistics.median(a / t for a, t in zip(found.alone, found.together, strict=True))
                    rows.append(
                        {
                            "video": title,
                            "variant": f"{mode}, {quantization}",
                            "GPUs": gpus,
                            "one, ms": statistics.median(found.alone),
                            "together, ms": statistics.median(found.together),
                            "speed-up": speed_up,
                            "efficiency": speed_up / gpus,
                            "exchanges alone, ms": statistics.median(found.exchanges),
                            "relative L2": found.error,
                        }
                    )
        finally:
            processes.close()
    report.table(f"{config.num_layers} layers of {config.dim}: medians", rows)
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
