"""Files that are on the disk when the call returns.

All that a checkpoint consists of is written by these functions; tests put faults and kills between their system calls.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeAlias

Block: TypeAlias = bytes | memoryview

_PIECE = 1 << 24  # bytes of one write; the whole block is hashed meanwhile


class Written(NamedTuple):
    """What a manifest says of a file."""

    size: int
    sha256: str


def write_file(path: Path, blocks: Iterable[Block]) -> Written:
    """Write a new file, hash it on the way, and flush it to the disk.

    Args:
        path: does not exist; folders above it are made.
        blocks: its content, piece by piece; a piece must not change until the next one is asked for.

    Raises:
        OSError: it could not be written; a part of it may lie there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        with ThreadPoolExecutor(1) as pool:
            size, digest = 0, hashlib.sha256()
            for block in blocks:
                if not (view := memoryview(block)).nbytes:
                    continue  # one of no bytes may have a shape that cannot be cast
                view = view.cast('B')
                hashed = pool.submit(digest.update, view)
                for start in range(0, len(view), _PIECE):
                    _write_all(descriptor, view[start : start + _PIECE])
                hashed.result()
                size += len(view)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Written(size, digest.hexdigest())


def _write_all(descriptor: int, piece: memoryview) -> None:
    while len(piece):
        if not (written := os.write(descriptor, piece)):
            raise OSError(errno.EIO, 'the disk takes no more bytes')
        piece = piece[written:]


def hash_file(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def flush_directory(path: Path) -> None:
    """Let the names in a directory survive a power cut, where the file system can be asked to."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems flush files only
            raise
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Give a file or directory another name, at once; a file takes the place of an older one."""
    os.replace(source, target)


def replace_text(path: Path, text: str) -> None:
    """Replace a small file at once: readers see the old one or the new one."""
    beside = path.with_name(path.name + '.tmp')
    beside.unlink(missing_ok=True)
    try:
        write_file(beside, [text.encode()])
        rename(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    flush_directory(path.parent)


def free_bytes(path: Path) -> int:
    """Bytes that can be written where ``path`` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
