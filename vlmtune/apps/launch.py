"""``vlmtune train --nproc N``: the same command in N processes of one machine, started by torchrun."""

import logging
import os
import signal
from collections.abc import Sequence

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from vlmtune.utils.errors import UserError

logger = logging.getLogger(__name__)


class ProcessFailed(UserError):
    """One of the processes failed; what it had to say stands above."""


def launch(arguments: Sequence[str], *, nproc: int, debug: bool = False) -> int:
    """Runs ``vlmtune <arguments>`` in ``nproc`` processes and waits for them.

    It is ``torchrun --standalone --nproc-per-node N -m vlmtune ...``, without torchrun's own traceback at the end. When
    one process fails the others are stopped. Ctrl-C and SIGTERM are handed on, so that they can save and leave.

    Returns:
        0, or 128 + the number of the signal that ended it.

    Raises:
        ProcessFailed: says which process, and how it ended.
    """
    threads = max(1, (os.cpu_count() or 1) // nproc)
    os.environ.setdefault('OMP_NUM_THREADS', str(threads))  # torchrun would set 1 and warn
    if not debug:
        _silence('torch.distributed.elastic', 'torch.distributed.run')
    options = ['--standalone', '--nproc-per-node', str(nproc), '-m', 'vlmtune', *arguments]
    try:
        torchrun.run(torchrun.parse_args(options))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise ProcessFailed(f'process {rank} of {nproc} {_ending(failure.exitcode)}') from error
    except SignalException as error:
        logger.warning('ended by %s', signal.Signals(error.sigval).name)
        return 128 + int(error.sigval)
    return 0


def _ending(exitcode: int) -> str:
    if exitcode >= 0:
        return f'failed with exit code {exitcode}; its message stands above'
    name = signal.Signals(-exitcode).name
    return f'was ended by {name}' + (', as the system does when memory is short' if name == 'SIGKILL' else '')


def _silence(*packages: str) -> None:
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(packages):
            logging.getLogger(name).setLevel(logging.CRITICAL)
