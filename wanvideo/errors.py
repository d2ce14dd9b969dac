"""Errors that users meet: one sentence saying what is wrong, where, and what to do.

The command line prints the sentence and exits with 2; ComfyUI shows it on the node.
"""

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
