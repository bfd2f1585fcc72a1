"""The folder that an export writes. It imports nothing slow: refusals come at once."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmtune.utils.errors import CheckpointError, ConfigError

_SIZE = re.compile(r'\d+(\.\d+)?[KMGT]i?B', re.IGNORECASE)


def check_shard_size(size: str) -> None:
    """Raise unless ``size`` reads like '5GB'.

    Raises:
        ConfigError: it does not.
    """
    if not _SIZE.fullmatch(str(size)):
        raise ConfigError(f'--max-shard-size {size}: expected a number and a unit, for example 5GB or 200MB')


def check_output(output: str) -> Path:
    """The folder to write, which must not exist or be empty.

    Raises:
        CheckpointError: something is there, or it cannot be made.
    """
    path = Path(output).expanduser()
    if path.is_dir() and any(path.iterdir()):
        raise CheckpointError(f'{path} is not empty; nothing was written, name a new or empty folder')
    if path.exists() and not path.is_dir():
        raise CheckpointError(f'{path} is a file; nothing was written, name a new or empty folder')
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise CheckpointError(f'{path} cannot be made: {parent} is no folder that you may write to; name another')
    return path


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` to write into. It becomes ``path`` if the block ends well, else nothing is left."""
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f'.{path.name}.', dir=path.parent))
    try:
        yield staging
        _publish(staging)
        if path.is_dir():
            path.rmdir()
        os.rename(staging, path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _publish(folder: Path) -> None:
    """Give everything the usual permissions; mkdtemp and safetensors make theirs private."""
    mask = os.umask(0)
    os.umask(mask)
    for path in [folder, *folder.rglob('*')]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
