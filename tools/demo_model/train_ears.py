"""Train the demo's small wav2vec2 to represent what a mouth does: a few minutes on two CPU cores.

`python -m wanvideo_infinitetalk.tools.demo_model.train_ears RECORDINGS.npz EARS.safetensors`

The network is transformers' Wav2Vec2Model at the widths of `tiny.wav2vec_weights`, run as `multitalk.audio` runs it:
convolutions, a resize to one row per video frame, transformer layers. From the output of every layer one linear map
reads opening and width (`rule.mouth_of`) of the frame before, this one and the next; it is thrown away afterwards.
"""

from __future__ import annotations

import argparse
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from ...cli import tiny_models as tiny
from ...media.audio import normalize_loudness
from ...multitalk.wav2vec import SAMPLE_RATE, Wav2Vec2Features
from .recordings import Wave, read_recordings
from .rule import mouth_of

logger = logging.getLogger(__name__)

SECONDS = 12.0
BATCH = 8
RATE = 2e-3


def features(model: Any, speech: Tensor, frames: int) -> Tensor:
    """All layers' outputs [B, frames, layers, hidden] of samples [B, n], with gradients."""
    rows = model.feature_extractor(speech)
    rows = F.interpolate(rows, size=frames, mode="linear", align_corners=True).transpose(1, 2)
    hidden, _ = model.feature_projection(rows)
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in model.encoder.layers]
    model.encoder(hidden)
    for handle in handles:
        handle.remove()
    return torch.stack(outputs, dim=2)


def pieces_of(recordings: list[Wave], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random pieces [count, n] at -23 LUFS and their targets [count, frames, 6]."""
    length = int(SECONDS * SAMPLE_RATE)
    long = [whole for whole in recordings if len(whole) >= length]

    def piece(rng: np.random.Generator) -> tuple[Wave, NDArray[np.float32]]:
        whole = long[int(rng.integers(len(long)))]
        start = int(rng.integers(len(whole) - length + 1))
        speech = normalize_loudness(whole[start : start + length])
        mouth = mouth_of(speech)
        both = np.pad(np.stack([mouth.opening, mouth.width], 1), ((1, 1), (0, 0)), mode="edge")
        return speech, np.concatenate([both[:-2], both[1:-1], both[2:]], axis=1)

    seeds = np.random.SeedSequence(seed).spawn(count)
    with ThreadPoolExecutor() as pool:
        made = list(pool.map(lambda s: piece(np.random.default_rng(s)), seeds))
    speech, target = (torch.from_numpy(np.stack(part)).float() for part in zip(*made, strict=True))
    return speech, target


def train(
    recordings: list[Wave],
    steps: int,
    seed: int = 0,
    minutes: float | None = None,
    pieces: int = 256,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """The trained state dict, bare names; stops early where `minutes` have passed."""
    began = time.monotonic()
    torch.manual_seed(seed)
    ears = Wav2Vec2Features.from_state_dict(tiny.wav2vec_weights(), device=device)
    model = ears.model.requires_grad_(True)  # in eval mode: no dropout
    reader = nn.Linear(ears.hidden_size, 6).to(device)
    parameters = [*model.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01)
    spoken, followed = pieces_of(recordings, pieces, seed)
    for step in range(steps):
        done = max(step / steps, 0.0 if minutes is None else (time.monotonic() - began) / 60 / minutes)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 100) * 0.5 * (1 + np.cos(np.pi * done))
        pick = torch.randint(len(spoken), (BATCH,))
        speech, target = spoken[pick].to(device), followed[pick].to(device)
        if step % 2:  # a folder's preprocessor asks for unit variance, a single file does not
            speech = (speech - speech.mean(1, True)) / torch.sqrt(speech.var(1, correction=0, keepdim=True) + 1e-7)
        read = reader(features(model, speech, target.shape[1]))  # [B, frames, layers, 6]
        error = (read - target[:, :, None]).square()
        loss = error.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 200 == 0:
            logger.info(
                "step %d: opening off by %.4f (rms), loss %.5f",
                step,
                error[:, :, -1, 2].mean().item() ** 0.5,
                loss.item(),
            )
    report(model, reader, pieces_of(recordings, 16, seed + 1), device)
    # contiguous, as safetensors asks
    return {name: value.detach().half().cpu().contiguous() for name, value in model.state_dict().items()}


@torch.no_grad()
def report(model: nn.Module, reader: nn.Module, pieces: tuple[Tensor, Tensor], device: torch.device | str) -> None:
    """Log how well the opening is read from the last layer in `pieces`."""
    speech, target = (part.to(device) for part in pieces)
    read = reader(features(model, speech, target.shape[1]))[:, :, -1, 2]
    both = torch.stack([read.flatten(), target[:, :, 2].flatten()])
    logger.info(
        "opening: correlation %.3f, rms %.3f", torch.corrcoef(both)[0, 1], (both[0] - both[1]).square().mean() ** 0.5
    )


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, default=None)
    parser.add_argument("--pieces", type=int, default=1500, help=f"stretches of {SECONDS:g} s to train on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    recordings = read_recordings(given.recordings)
    state = train(recordings, given.steps, minutes=given.minutes, pieces=given.pieces, device=given.device)
    save_file(state, given.out)


if __name__ == "__main__":
    main()
