"""Errors that users meet: one sentence saying what is wrong, where, and what to do.

The command line prints the sentence and exits with 2; ComfyUI shows it on the node.
"""

import difflib
import re
from collections.abc import Collection

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Line ends and other characters that control a terminal, or that no encoding has."""


class InfiniteTalkError(Exception):
    """Base of all errors that a user can cause or correct; in text, control characters of names in it are escaped."""

    def __str__(self) -> str:
        return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], super().__str__())


class CheckpointError(InfiniteTalkError):
    """A model file is missing, damaged, or of another kind than asked for."""


class InputError(InfiniteTalkError, ValueError):
    """An image, recording, mask or setting that cannot be used."""


class BackendUnavailableError(InfiniteTalkError):
    """An attention mode or quantization that cannot run here; the message lists every reason."""


def some(names: Collection[str], shown: int = 3) -> str:
    """The first `shown` of `names` in a sentence: "a, b, c and 2 more"."""
    first = ", ".join(list(names)[:shown])
    return first if len(names) <= shown else f"{first} and {len(names) - shown} more"


def plain(name: str) -> str:
    """A name without case and separators: "FP8-e4m3fn" is "fp8e4m3fn"."""
    return name.lower().replace("_", "").replace("-", "").replace(" ", "").replace(".", "")


def nearest(name: str, names: Collection[str]) -> str:
    """ " (the nearest is x)" for the one of `names` that is spelled most like `name`, "" where none is."""
    found = difflib.get_close_matches(plain(name), [plain(other) for other in names], n=1)
    return "".join(f" (the nearest is {other})" for other in names if [plain(other)] == found)
