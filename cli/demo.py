"""The demo: the whole job on tiny models that talk, with an image and a spoken sentence of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path

from .. import assets
from ..pipeline.make_video import Job
from ..pipeline.plan import GenerateConfig
from .tiny_models import TALKING_DEFAULTS, TinySet, make_tiny

__all__ = ["demo_job"]

SIZE, STEPS = int(TALKING_DEFAULTS["width"]), int(TALKING_DEFAULTS["steps"])
FRAMES, MOTION = int(TALKING_DEFAULTS["frames"]), int(TALKING_DEFAULTS["motion_frames"])


@contextmanager
def demo_job(
    out: str | Path,
    *,
    image: str | Path | None = None,
    audio: str | Path | None = None,
    models: str | Path | None = None,
    attention_mode: str = "auto",
    quantization: str = "disabled",
    device: str = "auto",
) -> Iterator[Job]:
    """The demo's job; its files are there as long as the context is open.

    Args:
        image, audio: others than the demo's own.
        models: folder to keep the tiny checkpoints in, or one that holds a set, such as the random one, which is used
            as it is. None: they are removed afterwards.
    """
    shipped = files(assets)
    with (
        tempfile.TemporaryDirectory(prefix="infinitetalk-") as temporary,
        as_file(shipped.joinpath("portrait.png")) as portrait,
        as_file(shipped.joinpath("speech.wav")) as recording,
    ):
        folder = temporary if models is None else models
        tiny = TinySet.in_folder(folder)
        if not tiny.is_complete():
            tiny = make_tiny(folder)
        yield Job(
            files=tiny.model_files,
            audio=(recording if audio is None else audio,),
            image=portrait if image is None else image,
            out=out,
            prompt="A woman speaks to the camera in the evening light.",
            config=GenerateConfig(
                width=SIZE,
                height=SIZE,
                frames=FRAMES,
                motion_frames=MOTION,
                steps=STEPS,
                shift=TALKING_DEFAULTS["shift"],
                cfg=TALKING_DEFAULTS["cfg"],
                audio_cfg=TALKING_DEFAULTS["audio_cfg"],
            ),
            attention_mode=attention_mode,
            quantization=quantization,
            device=device,
        )
