"""Speech: recordings become what the lips follow, frame by frame."""

from __future__ import annotations

from typing import Any

import torch

from ..media.mixing import in_order
from .comfyui import io
from .models import SpeechModel, normalized_audio
from .schema import SpeechEmbedsType, Wav2VecType, node_schema
from .types import SpeechEmbeds

_FRAMES = {"default": 81, "min": 1, "max": 10000, "step": 1}


class InfiniteTalkSpeech(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        more_speakers = [
            io.Audio.Input(f"audio_{i}", optional=True, tooltip=f"What speaker {i} says.") for i in (2, 3, 4)
        ]
        return node_schema(
            "InfiniteTalkSpeech",
            "InfiniteTalk Speech",
            "Turn one to four recordings into speech features for the sampler.",
            group="audio",
            aliases=["audio embeds", "wav2vec2", "speech", "lip sync", "语音", "对口型"],
            inputs=[
                Wav2VecType.Input("wav2vec_model", tooltip="From InfiniteTalk Wav2Vec2 Loader."),
                io.Audio.Input("audio_1", tooltip="What the first (or only) speaker says."),
                io.Boolean.Input(
                    "normalize_loudness",
                    default=True,
                    tooltip="Bring each recording to -23 LUFS, the loudness that the model was trained with.",
                ),
                io.Int.Input(
                    "num_frames", **_FRAMES, tooltip="Longest video, in frames; a shorter recording ends it earlier."
                ),
                io.Float.Input(
                    "fps",
                    default=25.0,
                    min=1.0,
                    max=60.0,
                    step=0.1,
                    tooltip="Frames per second of the video. InfiniteTalk was trained at 25.",
                ),
                io.Float.Input(
                    "audio_scale",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    tooltip="How strongly speech moves the mouth and face; 0 leaves it out.",
                ),
                io.Float.Input(
                    "audio_cfg_scale",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    tooltip="Guidance by speech: above 1 the lips follow more closely, for one more pass per step.",
                ),
                io.Combo.Input(
                    "multi_audio_type",
                    options=["para", "add"],
                    default="para",
                    tooltip="para: the speakers talk at the same time. add: one after the other.",
                ),
                *more_speakers,
                io.Mask.Input(
                    "ref_target_masks",
                    optional=True,
                    tooltip="Where each speaker is, one mask per speaker in a batch. "
                    "Without it the speakers stand side by side, the first on the left. "
                    "With one speaker, nobody else in the image speaks.",
                ),
                io.Boolean.Input(
                    "add_noise_floor",
                    default=False,
                    optional=True,
                    tooltip="Add faint noise (-60 dB) so that complete silence does not confuse the lips.",
                ),
                io.Boolean.Input(
                    "smooth_transients",
                    default=False,
                    optional=True,
                    tooltip="Soften clicks and pops, which the lips would answer with twitches.",
                ),
            ],
            outputs=[
                SpeechEmbedsType.Output(display_name="multitalk_embeds", tooltip="For InfiniteTalk Sampler."),
                io.Audio.Output(display_name="audio", tooltip="All speakers together: the sound of the video."),
                io.Int.Output(
                    display_name="num_frames", tooltip="Frames that the recordings fill, at most num_frames."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        wav2vec_model: SpeechModel,
        audio_1: dict[str, Any],
        normalize_loudness: bool,
        num_frames: int,
        fps: float,
        audio_scale: float,
        audio_cfg_scale: float,
        multi_audio_type: str,
        audio_2: dict[str, Any] | None = None,
        audio_3: dict[str, Any] | None = None,
        audio_4: dict[str, Any] | None = None,
        ref_target_masks: torch.Tensor | None = None,
        add_noise_floor: bool = False,
        smooth_transients: bool = False,
    ) -> Any:
        embeds = wav2vec_model.embed(
            in_order({"audio_1": audio_1, "audio_2": audio_2, "audio_3": audio_3, "audio_4": audio_4}),
            normalize=normalize_loudness,
            max_frames=num_frames,
            fps=fps,
            one_after_the_other=multi_audio_type == "add",
            noise_floor=add_noise_floor,
            smooth=smooth_transients,
            audio_scale=audio_scale,
            audio_cfg=audio_cfg_scale,
            masks=ref_target_masks,
        )
        return io.NodeOutput(embeds.mapping(), embeds.audio, embeds.num_frames)


class InfiniteTalkSilence(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkSilence",
            "InfiniteTalk Silence",
            "Speech features of silence: the person moves but does not talk.",
            group="audio",
            aliases=["silence", "no audio", "静音"],
            inputs=[io.Int.Input("num_frames", **_FRAMES, tooltip="Length of the video in frames.")],
            outputs=[SpeechEmbedsType.Output(display_name="multitalk_embeds", tooltip="For InfiniteTalk Sampler.")],
        )

    @classmethod
    def execute(cls, num_frames: int) -> Any:
        return io.NodeOutput(SpeechEmbeds(speakers=(), num_frames=num_frames).mapping())


class InfiniteTalkNormalizeLoudness(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkNormalizeLoudness",
            "InfiniteTalk Normalize Loudness",
            "Bring a recording to a loudness, measured after ITU-R BS.1770. Silence stays as it is.",
            group="audio",
            aliases=["loudness", "lufs", "volume", "响度"],
            inputs=[
                io.Audio.Input("audio", tooltip="The recording."),
                io.Float.Input(
                    "lufs",
                    default=-23.0,
                    min=-100.0,
                    max=0.0,
                    step=0.1,
                    tooltip="Loudness in LUFS: closer to 0 is louder. Broadcasters use -23.",
                ),
            ],
            outputs=[io.Audio.Output(display_name="audio", tooltip="The recording at that loudness.")],
        )

    @classmethod
    def execute(cls, audio: dict[str, Any], lufs: float) -> Any:
        return io.NodeOutput(normalized_audio(audio, lufs))
