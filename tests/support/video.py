"""Looking into finished video files."""

from __future__ import annotations

from pathlib import Path


def streams_of(path: Path) -> tuple[int, float, float]:
    """(frames, seconds of the frames, seconds of the sound) of a video."""
    import av

    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert video.duration is not None
        assert audio.duration is not None
        assert video.time_base is not None
        assert audio.time_base is not None
        seconds = float(video.duration * video.time_base), float(audio.duration * audio.time_base)
        return sum(1 for _ in container.decode(video)), *seconds
