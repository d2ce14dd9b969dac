"""What a finished video shows: whether mouths follow the speech, and what drifts."""

from __future__ import annotations

import io as text_io
import json
from collections.abc import Sequence
from typing import Any

import torch

from ..measure.footage import read_frames
from ..measure.report import as_json, as_page
from ..media.audio import load_speech
from ..media.mixing import in_order
from ..media.video import to_bytes
from .comfyui import io
from .kernels import REPORT_WIDTH
from .models import speaker_samples
from .schema import node_schema
from .types import checked_image


class InfiniteTalkMeasure(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        more_speakers = [
            io.Audio.Input(f"audio_{i}", optional=True, tooltip=f"What face {i} says, from left to right.")
            for i in (2, 3, 4)
        ]
        return node_schema(
            "InfiniteTalkMeasure",
            "InfiniteTalk Measure",
            "See whether the mouths of a video follow the speech, whether eyes, face and background stay, and what "
            "drifts. Connect the report to Preview Any. Not validated on real talking videos.",
            group="audio",
            aliases=["lip sync score", "measure", "sync", "quality", "测量", "口型同步"],
            inputs=[
                io.Image.Input("images", tooltip="The frames of the video."),
                io.Audio.Input("audio_1", tooltip="What is said: by everybody, or by the first face from the left."),
                io.Float.Input("fps", default=25.0, min=1.0, max=60.0, step=0.1, tooltip="Frames per second."),
                io.Int.Input(
                    "frame_window_size",
                    default=81,
                    min=1,
                    max=10000,
                    step=4,
                    tooltip="Frames of one window of the video, which says where windows join.",
                ),
                io.Int.Input(
                    "motion_frame",
                    default=9,
                    min=0,
                    max=10000,
                    step=1,
                    tooltip="Frames that a window took over from the one before.",
                ),
                io.Image.Input(
                    "reference",
                    optional=True,
                    tooltip="The image that the video was made from. Without it everything is compared with the first "
                    "frame.",
                ),
                *more_speakers,
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="The tables that infinitetalk measure prints."),
                io.String.Output(display_name="json", tooltip="The same as JSON."),
                io.String.Output(display_name="page", tooltip="The same as an HTML page with plots."),
            ],
        )

    @classmethod
    def execute(
        cls,
        images: torch.Tensor,
        audio_1: dict[str, Any],
        fps: float,
        frame_window_size: int,
        motion_frame: int,
        reference: torch.Tensor | None = None,
        audio_2: dict[str, Any] | None = None,
        audio_3: dict[str, Any] | None = None,
        audio_4: dict[str, Any] | None = None,
    ) -> Any:
        from rich.console import Console

        from ..cli.terminal import measure_tables

        recordings = in_order({"audio_1": audio_1, "audio_2": audio_2, "audio_3": audio_3, "audio_4": audio_4})
        footage = read_frames(
            _Frames(checked_image(images)),
            fps,
            [load_speech(*speaker_samples(recording)) for recording in recordings],
            reference=None if reference is None else _Frames(checked_image(reference))[0],
            window=frame_window_size,
            motion=motion_frame,
        )
        report = text_io.StringIO()
        Console(file=report, width=REPORT_WIDTH).print(*measure_tables(footage), sep="\n")
        return io.NodeOutput(report.getvalue(), json.dumps(as_json(footage), indent=1), as_page(footage))


class _Frames(Sequence[Any]):
    """Frames of an IMAGE [n, H, W, 3] as uint8 arrays, made one at a time."""

    def __init__(self, images: torch.Tensor) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: Any) -> Any:
        return to_bytes(self._images[index, ..., :3]).cpu().numpy()
