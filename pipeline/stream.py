"""Videos that are handed out window by window, with the sound that belongs to it, and written to no file.

    for window in generate_stream(microphone(), job, rate=48000):
        show(window.frames, window.sound)

`stream_video` makes those of a recording, `generate_stream` those of speech that is spoken meanwhile. A window is
computed when it is asked for: who does not ask holds the work up, and nothing piles up.

Speech that is spoken meanwhile is read up to the end of the next window and no further: of FlashTalk's 28 new frames
the first is made 1.12 s after its speech, the last at once, and all of them come out when the window is computed.
"""

from __future__ import annotations

import contextvars
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..fp8_optimization import how_linears_run
from ..media.audio import SpeechStream
from ..media.video import StreamWriter
from ..multitalk.wav2vec import SAMPLE_RATE
from ..wanvideo.errors import InputError
from ..wanvideo.modules.attention import count_kernels
from ..wanvideo.runtime.compilation import compile_limits
from ..wanvideo.runtime.precision import fp16_accumulation
from .attention_policy import SAFER
from .flashtalk import SAMPLES_A_FRAME, SpeechRing
from .loaded_models import LoadedModels
from .long_video import Callbacks, FinishedWindow, generate_windows
from .make_video import (
    FPS,
    NO_FILE,
    Checked,
    Events,
    Job,
    check,
    encodes_streams,
    explained_memory,
    make_ready,
    named,
    sound_of,
)
from .plan import Plan
from .sampling import what_ran
from .windows import Window, windows_from

__all__ = ["StreamRecorder", "StreamedWindow", "generate_stream", "stream_video"]

logger = logging.getLogger(__name__)

Sound = NDArray[np.float32]


@dataclass(frozen=True)
class StreamedWindow:
    """What a window adds to the video.

    Attributes:
        index, count: which of how many windows; 0 where their number is not known yet.
        frames: [n, H, W, 3], uint8 on the CPU, 25 a second.
        sound: of these frames, mono samples [m] in [-1, 1], as loud as they came; None: the video is silent.
        rate: samples a second.
    """

    index: int
    count: int
    frames: Tensor
    sound: Sound | None
    rate: int | None


def stream_video(
    job: Job, events: Events | None = None, loaded: LoadedModels | None = None
) -> Iterator[StreamedWindow]:
    """The windows of a job of any mode, in order, as `make_video` would write them.

    Args:
        job: its `out` is `NO_FILE`.
        events, loaded: as of `make_video`; no window is announced as written.

    Raises:
        InputError, CheckpointError, BackendUnavailableError: at once.
        InfiniteTalkError: while it runs.
    """
    checked, job = _checked(job, live=False), named(job)
    sound, rate = sound_of(job)
    total = checked.plan.total

    def sound_in(window: Window) -> Sound | None:
        if sound is None or rate is None:
            return None
        begin = window.start + window.overlap
        return sound[_samples(begin, rate) : _samples(_sound_until(window, total), rate)]

    return _stream(job, checked, events or Events(), loaded or LoadedModels(), sound_in, rate, None)


def generate_stream(
    audio_chunks: Iterable[NDArray[Any] | Tensor],
    job: Job,
    rate: int = SAMPLE_RATE,
    events: Events | None = None,
    loaded: LoadedModels | None = None,
) -> Iterator[StreamedWindow]:
    """The windows of a video of speech that is spoken meanwhile, in order.

    Args:
        audio_chunks: pieces of speech of any sizes, float samples [n] or [channels, n]; the next one is asked for when
            the next window needs it, and may let wait. The video ends with them, or with `job.max_frames`.
        job: of a mode whose speech may be encoded as it streams (`flashtalk`); without recordings, its `out` `NO_FILE`.
        rate: of the pieces, Hz.
        events, loaded: as of `make_video`; the number of windows is 0, and none is announced as written.

    Raises:
        InputError, CheckpointError, BackendUnavailableError: at once.
        InfiniteTalkError: while it runs, for speech without a frame, or with samples that are no sound, too.
    """
    if job.audio:
        raise InputError("The speech of a stream comes in pieces: leave the recordings out.")
    if not encodes_streams(job.config):
        raise InputError(
            f"The mode {job.config.mode} reads whole recordings: choose flashtalk, with the speech encoding stream."
        )
    speech = SpeechStream(rate)
    checked, job = _checked(job, live=True), named(job)
    arriving = _Arriving(iter(audio_chunks), speech, checked.plan, job.max_frames)
    return _stream(job, checked, events or Events(), loaded or LoadedModels(), arriving.sound_in, rate, arriving)


def _checked(job: Job, *, live: bool) -> Checked:
    if str(job.out) != NO_FILE:
        raise InputError(f"A stream is written to no file: set out to '{NO_FILE}'.")
    if job.resume:
        raise InputError("A stream keeps nothing that a later run could go on with: leave resume out.")
    if job.comment:
        raise InputError("A stream carries no comment: leave it out.")
    if job.gpus > 1:
        raise InputError(f"A stream is computed on one GPU, not {job.gpus}: leave out their number.")
    return check(named(job), live=live)


def _samples(frame: int, rate: int) -> int:
    """Samples until a video frame."""
    return frame * rate // FPS


def _sound_until(window: Window, total: int) -> int:
    """The frame at which the sound of a window ends; what is left behind the last one goes with it, up to a frame."""
    end = window.start + window.overlap + window.new
    return end + 1 if end == total else end


class _Arriving:
    """Speech on its way: the windows of its video, each when all its samples are there, and their sound."""

    def __init__(
        self, chunks: Iterator[NDArray[Any] | Tensor], speech: SpeechStream, plan: Plan, most: int | None
    ) -> None:
        self.chunks, self.speech, self.plan, self.most = chunks, speech, plan, most
        self.ring: SpeechRing | None = None
        self.total: int | None = None
        self._sound: Sound = np.zeros(0, np.float32)
        self._begin = 0  # sample of the speech that is the first of them

    def __iter__(self) -> Iterator[Window]:
        assert self.ring is not None
        config = self.plan.config
        for window in windows_from(config.frames, config.motion_frames, early=self.plan.mode.early):
            end = window.end if self.most is None else min(window.end, self.most)
            if self._listen(end) and end == window.end != self.most:
                yield window
                continue
            self.total = min(end, self.ring.received // SAMPLES_A_FRAME)
            self.ring.end(self.total)
            new = self.total - window.start - window.overlap
            if new > 0:
                yield replace(window, new=new, is_last=True)
            elif window.index == 0:
                raise InputError("The speech is shorter than one video frame: give more of it.")
            return

    def _listen(self, frame: int) -> bool:
        """Take pieces until there is speech up to a video frame; False where it ends before."""
        assert self.ring is not None
        while self.ring.received < frame * SAMPLES_A_FRAME:
            chunk = next(self.chunks, None)
            piece = np.zeros(0, np.float32) if chunk is None else self.speech.mono(chunk)
            self.ring.append(self.speech.resample(piece, last=chunk is None))
            self._sound = np.concatenate([self._sound, piece])
            if chunk is None:
                break
        return self.ring.received >= frame * SAMPLES_A_FRAME

    def sound_in(self, window: Window) -> Sound:
        rate = self.speech.rate
        end = _samples(_sound_until(window, -1 if self.total is None else self.total), rate) - self._begin
        sound, self._sound = self._sound[:end], self._sound[end:]
        self._begin += len(sound)
        return sound


def _stream(
    job: Job,
    checked: Checked,
    events: Events,
    loaded: LoadedModels,
    sound_in: Callable[[Window], Sound | None],
    rate: int | None,
    arriving: _Arriving | None,
) -> Iterator[StreamedWindow]:
    """The windows; whoever asks for them computes them, between which nothing of the settings of the work is left."""
    plan, device = checked.plan, checked.device
    with torch.inference_mode(), explained_memory(device):
        ready = make_ready(job, checked, events, loaded)
    waiting: deque[Window] = deque()
    given: Iterable[Window] | None = None
    if arriving is not None:
        assert isinstance(ready.speech, SpeechRing)
        arriving.ring = ready.speech
        given = iter(waiting.popleft, None)
    callbacks = Callbacks(progress=events.step, check_interrupt=events.check_interrupt)
    parts = (ready.model, ready.vae, ready.conditioner, plan, callbacks, SAFER)
    windows = generate_windows(*parts, frames_dtype=torch.uint8, windows=given)

    def compute() -> FinishedWindow:
        with (
            torch.inference_mode(),
            explained_memory(device),
            compile_limits(job.compile_settings),
            fp16_accumulation(job.fp16_accumulation),
        ):
            return next(windows)

    events.stage("Generating" if job.compile_settings is None else "Generating, the first step compiles the model")
    context, counting = contextvars.copy_context(), ExitStack()
    kernels = context.run(counting.enter_context, count_kernels())
    try:
        for window in plan.windows if arriving is None else arriving:
            if arriving is not None:
                waiting.append(window)
            made = context.run(compute)
            yield StreamedWindow(made.index, made.count, made.frames, sound_in(window), rate)
    finally:
        context.run(counting.close)
    linears = how_linears_run(ready.model.blocks, device)
    logger.info("%s", what_ran(linears, job.attention_mode, job.attention_policy, kernels))


class StreamRecorder:
    """Writes windows into a stream in a thread of its own, while the next ones are computed.

    One window is written and one waits; then `add` does. Leaving its context without an error waits for all of them;
    with one it waits for nothing, since whoever reads the stream may never read on.
    """

    def __init__(self, writer: StreamWriter) -> None:
        self.writer = writer
        self._waiting: queue.Queue[StreamedWindow | None] = queue.Queue(1)
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="stream", daemon=True)

    def add(self, window: StreamedWindow | None) -> None:
        """Have a window written; None: there are no more. Raises what `check` raises."""
        while True:
            self.check()
            try:
                return self._waiting.put(window, timeout=0.1)
            except queue.Full:
                continue

    def check(self) -> None:
        """Raise InfiniteTalkError when the stream could not be written."""
        if self._failed is not None:
            raise self._failed

    def _work(self) -> None:
        try:
            while (window := self._waiting.get()) is not None:
                self.writer.append(window.frames, window.sound, window.rate)
            self.writer.close()
        except Exception as error:  # noqa: BLE001 - raised again in the thread of the caller
            self._failed = error

    def __enter__(self) -> StreamRecorder:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            return
        self.add(None)
        while self._thread.is_alive():
            self._thread.join(0.1)
        self.check()
