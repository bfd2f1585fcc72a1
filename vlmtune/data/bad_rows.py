"""Rows that cannot be used: what is told of each, and how many there may be."""

import fcntl
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from vlmtune.structures import ImageRef
from vlmtune.utils.json_lines import as_line

OnBadSample: TypeAlias = Literal['error', 'skip']


@dataclass(frozen=True)
class BadSample:
    """A row that could not be used. ``kind`` is 'bad' or 'overlong', ``error`` the kind of the DataError."""

    index: int
    where: str
    reason: str
    kind: str = 'bad'
    error: str = 'wrong_row'
    images: tuple[str, ...] = ()


def paths_of(images: Iterable[ImageRef]) -> tuple[str, ...]:
    """The paths of those images that are files, for ``BadSample.images``."""
    return tuple(image.path for image in images if image.path is not None)


def over_budget(bad: int, count: int, budget: float) -> bool:
    """Whether more than the share ``budget`` of ``count`` rows are bad; unless it is 0, one always may be."""
    return bad > (max(budget * count, 1) if budget else 0)


def note_bad_sample(bad: BadSample, *, file: Path | None) -> None:
    """Add a sample to a file, once; several workers and ranks may do so at the same time."""
    if file is None:
        return
    line = as_line(asdict(bad)).encode()
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    with os.fdopen(handle, 'rb+', buffering=0) as noted:
        fcntl.flock(noted, fcntl.LOCK_EX)  # until it is closed
        if line not in (noted.readall() or b''):  # an earlier epoch met it
            noted.write(line)
