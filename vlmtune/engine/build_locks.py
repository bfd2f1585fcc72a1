"""Locks of the parts that DeepSpeed compiles when they are first used: a killed process leaves its lock behind."""

import os
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

    root = Path(os.environ.get('TORCH_EXTENSIONS_DIR') or get_default_build_root())
    found = (lock for name in _PARTS for lock in (*root.glob(f'{name}/lock'), *root.glob(f'*/{name}/lock')))
    locks = {lock: lock.stat().st_ino for lock in found}
    if not locks:
        return []
    held = _open_files()
    return sorted(lock for lock, inode in locks.items() if str(lock) not in held and _is_still(lock, inode))


def _is_still(lock: Path, inode: int) -> bool:
    try:
        return lock.stat().st_ino == inode
    except FileNotFoundError:
        return False


def _open_files() -> set[str]:
    found: set[str] = set()
    for process in psutil.process_iter():
        try:
            found.update(file.path for file in process.open_files())
        except psutil.Error:  # it has ended, or is somebody else's
            continue
    return found
