"""A run of the command that dies at a chosen moment, in a process of its own.

`python killed_run.py MOMENT SIGNAL LATENTS ARGUMENT...` runs `infinitetalk ARGUMENT...` with a line "announced N" on
stdout for each announced window, and writes the latents of each window to LATENTS. MOMENT is "never" or
"WINDOW:PLACE[:MILLISECONDS]"; then the process sends itself SIGNAL. Videos are lossless: what x264 decides on lossy
ones can vary between runs on equal frames of this size.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from safetensors.torch import save_file
from wanvideo_infinitetalk.cli import parser
from wanvideo_infinitetalk.media import video
from wanvideo_infinitetalk.pipeline import journal, make_video

PLACES = ("encode", "append", "journal", "announced", "finish")


def main(moment: str, signal_number: int, latents: Path, arguments: list[str]) -> int:
    window, _, rest = moment.partition(":")
    place, _, delay = rest.partition(":")
    counts = dict.fromkeys(PLACES, 0)

    def reach(where: str) -> None:
        counts[where] += 1
        if where != place or counts[where] != int(window):
            return
        if delay:
            threading.Thread(target=lambda: (time.sleep(float(delay) / 1000), die()), daemon=True).start()
        else:
            die()

    def die() -> None:
        sys.stdout.flush()
        os.kill(os.getpid(), signal_number)

    def before(target: Any, name: str, where: str) -> Any:
        computed = getattr(target, name)

        def reached(*args: Any, **options: Any) -> Any:
            reach(where)
            return computed(*args, **options)

        return patch.object(target, name, reached)

    save, recorder = journal.Journal.save, make_video.Recorder

    def save_both(self: journal.Journal, state: Any, *args: Any) -> None:
        reach("journal")
        save_file({"latents": state.latents.cpu().contiguous()}, latents / f"{state.windows - 1}.safetensors")
        save(self, state, *args)

    def recording(*given: Any) -> Any:
        *others, announce = given

        def announced(done: int, windows: int) -> None:
            announce(done, windows)
            sys.stdout.write(f"announced {done}\n")
            sys.stdout.flush()
            reach("announced")

        return recorder(*others, announced)

    with (
        before(video.VideoWriter, "append", "encode"),
        before(video, "_put_in_place", "append"),
        patch.object(journal.Journal, "save", save_both),
        before(video.VideoWriter, "_copy_to", "finish"),
        patch.object(make_video, "Recorder", recording),
        patch.object(make_video, "VideoWriter", partial(video.VideoWriter, crf=0)),
    ):
        return parser.main(arguments)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background of a shell
    sys.exit(main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]))
