"""Errors that users meet: one sentence saying what is wrong, where, and what to do.

The command line prints the sentence and exits with 2; ComfyUI shows it on the node.
"""


class InfiniteTalkError(Exception):
    """Base of all errors that a user can cause or mend."""


class CheckpointError(InfiniteTalkError):
    """A model file is missing, damaged, or of another kind than asked for."""


class InputError(InfiniteTalkError, ValueError):
    """A picture, recording, mask or setting that cannot be used."""


class BackendUnavailableError(InfiniteTalkError):
    """An attention mode or quantisation that cannot run here; the message lists every reason."""
