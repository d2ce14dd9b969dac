"""Put the trained parts into the package: `assets/talking/*.safetensors`, public names, float16.

`python -m wanvideo_infinitetalk.tools.demo_model.export --vae FOLDER --dit FOLDER --ears EARS.safetensors OUT_FOLDER`
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...cli.tiny_models import TALKING_BYTES, TALKING_PARTS
from .dit import CONFIG, split_state
from .train_vae import whitened_state
from .training import averaged_state

logger = logging.getLogger(__name__)


def export(vae: Path, vae_dim: int, dit: Path, ears: Path, out: Path) -> int:
    """Write the four files to `out` and return their bytes together.

    Raises ValueError when they are more than `tiny.TALKING_BYTES` or a number does not fit into float16.
    """
    model, adapter = split_state(averaged_state(dit))
    parts: dict[str, tuple[dict[str, Tensor], dict[str, int]]] = {
        "model": (model, {"num_heads": CONFIG.num_heads}),
        "adapter": (adapter, {"audio_blocks": CONFIG.audio.blocks if CONFIG.audio else 0}),
        "vae": (whitened_state(vae, vae_dim, "cpu"), {}),
        "wav2vec": (load_file(ears), {}),
    }
    out.mkdir(parents=True, exist_ok=True)
    total = 0
    for name in TALKING_PARTS:
        state, facts = parts[name]
        halves = {key: value.half().contiguous() for key, value in state.items()}  # as safetensors asks
        lost = [key for key, value in halves.items() if not torch.isfinite(value).all()]
        if lost:
            raise ValueError(f"{name}: {lost[0]} does not fit into float16")
        path = out / f"{name}.safetensors"
        save_file(halves, path, metadata={"config": json.dumps(facts, sort_keys=True)} if facts else None)
        total += path.stat().st_size
        logger.info("%s: %.2f MB", path, path.stat().st_size / 1e6)
    if total > TALKING_BYTES:
        raise ValueError(f"{total} bytes are more than the {TALKING_BYTES} that the package carries")
    return total


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--vae-dim", type=int, default=8)
    parser.add_argument("--dit", type=Path, required=True)
    parser.add_argument("--ears", type=Path, required=True)
    given = parser.parse_args()
    export(given.vae, given.vae_dim, given.dit, given.ears, given.out)


if __name__ == "__main__":
    main()
