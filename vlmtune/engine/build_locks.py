"""Locks of the parts that DeepSpeed compiles when they are first used: a killed process leaves its lock behind."""

import os
import time
from pathlib import Path

import psutil

from vlmtune.utils.errors import TrainingError

_PARTS = 'deepspeed_shm_comm cpu_adam cpu_adagrad cpu_lion fused_adam fused_lamb fused_lion utils async_io'.split()


def check_build_locks() -> None:
    """Look for locks that DeepSpeed would wait for without end.

    Raises:
        TrainingError: there is one.
    """
    for lock in left_locks():
        raise TrainingError(
            f'{lock} is the lock of a build, and no process here holds it: DeepSpeed would wait for it for ever; '
            'a killed run has left it: remove it, unless another machine is building in that folder'
        )


def left_locks() -> list[Path]:
    """The locks in the folder of torch's extensions that are DeepSpeed's and held by no process of this machine."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get('TORCH_EXTENSIONS_DIR') or get_default_build_root()).resolve()  # as open files are named
    found = (lock for name in _PARTS for lock in (*root.glob(f'{name}/lock'), *root.glob(f'*/{name}/lock')))
    locks = {lock: seen for lock in found if (seen := _which(lock)) is not None}
    if not locks:
        return []
    held = _open_files()
    left = sorted(lock for lock in locks if str(lock) not in held)
    if left:
        time.sleep(0.5)  # a lock is closed a moment before it is removed
    return [lock for lock in left if _which(lock) == locks[lock]]


def _which(lock: Path) -> tuple[int, int] | None:
    """Tells a lock from the next one of that name, which may well get its inode; None: it is released."""
    try:
        status = lock.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _open_files() -> set[str]:
    found: set[str] = set()
    for process in psutil.process_iter():
        try:
            found.update(file.path for file in process.open_files())
        except psutil.Error:  # it has ended, or is somebody else's
            continue
    return found
