"""One run at a time in a work dir: two would remove each other's checkpoints."""

import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vlmtune.engine import ranks
from vlmtune.utils.errors import ConfigError

LOCK_FILE = '.lock'


@contextmanager
def only_run_in(work_dir: Path, *, rank: int) -> Iterator[None]:
    """Hold the work dir until the end of the block, or of the process, however it ends; all ranks call it.

    The first rank has a POSIX record lock: processes forked from it, such as data workers, do not inherit it, so that
    none of them keeps the work dir after a kill. Network file systems know such locks as well.

    Raises:
        ConfigError: another run has the work dir.
    """
    with ExitStack() as held:
        with ranks.together(f'claiming {work_dir}'):
            if rank == 0:
                work_dir.mkdir(parents=True, exist_ok=True)
                file = held.enter_context((work_dir / LOCK_FILE).open('a', encoding='utf-8'))
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    raise ConfigError(
                        f'another run is at work in {work_dir.absolute()}: wait for its end, '
                        'or choose another --work-dir'
                    ) from error
        yield
