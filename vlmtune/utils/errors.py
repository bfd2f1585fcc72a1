"""Failures that a user can mend. The command line prints them as one line and exits with 1."""

import re

from vlmtune.utils.secrets import without_secrets

_CONTROL = re.compile(
    r'[\x00-\x09\x0b-\x1f\x7f-\x9f]+'
)  # line breaks are ours: lists of mistakes, tracebacks of workers

_NAME = 160  # characters of a name out of a file
_REASON = 300  # characters of what a library says

DATA_ERROR_KINDS = {
    'unreadable_row': 'row cannot be read',
    'wrong_row': 'row is not of the format',
    'mark_mismatch': 'image marks and images differ',
    'wrong_box': 'boxes and their marks differ, or a box is none',
    'empty_answer': 'answer is empty',
    'missing_image': 'image is missing',
    'broken_image': 'image is broken',
    'oversized_image': 'image is too large',
    'refused_image': 'image may not be read (outside the folder, a URL)',
    'unfit_sample': 'row does not fit the model or its chat template',
    'nothing_learned': 'no token is learned',
}
"""What can be wrong with a row: the word that programs read, and what people read."""


def one_line(text: str) -> str:
    """A name out of a file, for a message: what is no plain character is written out, and what is too long is cut."""
    return repr(text[:_NAME])[1:-1]


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line; its class where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:_REASON]


class UserError(Exception):
    """Something the user gave cannot be used; the message says what was found, what was expected, what to do.

    Attributes:
        told_by_first_rank: the first rank of the run fails with the same message, or with one that holds it.
    """

    told_by_first_rank = False

    def __init__(self, message: str = '', *rest: object) -> None:
        # Names out of files are shown, and may hold what terminals obey.
        shown = _CONTROL.sub(lambda found: repr(found[0])[1:-1], str(message))
        super().__init__(without_secrets(shown), *rest)


class Stopped(BaseException):
    """A signal asked the run to end. Not an Exception, as KeyboardInterrupt is none.

    Args:
        message: what became of the run, and how to go on with it.
        exit_code: of the process.
    """

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ConfigError(UserError):
    """A config file or an override is wrong."""


class DataError(UserError):
    """A data file, a row or an image is wrong.

    Args:
        message: what was found, what was expected, what to do.
        kind: the sort of mistake, one of ``DATA_ERROR_KINDS``; reports count by it.
    """

    def __init__(self, message: str, *, kind: str = 'wrong_row') -> None:
        super().__init__(message)
        if kind not in DATA_ERROR_KINDS:
            raise ValueError(f'kind {kind!r} of a DataError; expected one of {", ".join(DATA_ERROR_KINDS)}')
        self.kind = kind


class ModelError(UserError):
    """A model directory, a family or a tuning request is wrong."""


class TrainingError(UserError):
    """Training cannot go on."""


class CheckpointError(UserError):
    """A checkpoint or an export is missing, broken or foreign."""
