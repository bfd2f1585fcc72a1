"""``vlmtune train --nproc N``: the same command in N processes of one machine, started by torchrun."""

import contextlib
import logging
import os
import signal
from collections.abc import Sequence

import psutil
import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from vlmtune.utils.errors import UserError

logger = logging.getLogger(__name__)

_SIGNALS = 'SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1'  # torchrun's own, and the one with which slurm says that time is up
_PATIENCE = 7800  # seconds from a signal to the end: a step and a save within their default bounds


class ProcessFailed(UserError):
    """One of the processes ended without a word."""


def launch(
    arguments: Sequence[str],
    *,
    nproc: int,
    max_restarts: int = 0,
    requeue_exit_code: int | None = None,
    debug: bool = False,
) -> int:
    """Runs ``vlmtune <arguments>`` in ``nproc`` processes and waits for them.

    It is ``torchrun --standalone --nproc-per-node N -m vlmtune ...``, without torchrun's own traceback at the end. When
    one process fails the others are stopped. Ctrl-C, SIGTERM and SIGUSR1 are handed on, so that they can save and
    leave, which may take as long as a step and a save may; a second signal ends all at once.

    Args:
        arguments: of each process.
        nproc: processes.
        max_restarts: how often all of them are started again when one has failed.
        requeue_exit_code: returned after SIGUSR1; None: 143.
        debug: let torchrun say what it does.

    Returns:
        0, 1 for a failure of which the processes have told, or the exit code of a run that a signal ended: 143, 130 for
        Ctrl-C, ``requeue_exit_code``.

    Raises:
        ProcessFailed: a process ended without a word; says which, and how.
        UserError: there are fewer GPUs than processes.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else nproc
    if nproc > gpus:
        raise UserError(f'--nproc {nproc}: this machine has {gpus} GPUs; one process uses one')
    threads = max(1, (os.cpu_count() or 1) // nproc)
    for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'):  # torchrun and mmengine would set 1, and warn
        os.environ.setdefault(name, str(threads))
    if not debug:
        os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')  # a lost connection is a page of C++ otherwise
        _silence('torch.distributed.elastic', 'torch.distributed.run')
    options = ['--standalone', '--nproc-per-node', str(nproc), '--max-restarts', str(max_restarts)]
    options += ['--signals-to-handle', _SIGNALS, '--shutdown-timeout', str(_PATIENCE)]
    codes = {1, 130, 143, 143 if requeue_exit_code is None else requeue_exit_code}
    others = set(psutil.Process().children())
    try:
        torchrun.run(torchrun.parse_args([*options, '-m', 'vlmtune', *arguments]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in codes:  # it has said why: a failure, or a signal that went to the processes themselves
            return failure.exitcode
        raise ProcessFailed(f'process {rank} of {nproc} {_ending(failure.exitcode)}') from error
    except SignalException as error:
        _end(set(psutil.Process().children()) - others)
        logger.warning('ended by %s', signal.Signals(error.sigval).name)
        if error.sigval == signal.SIGUSR1:
            return 143 if requeue_exit_code is None else requeue_exit_code
        return 128 + int(error.sigval)
    return 0


def _end(processes: set[psutil.Process]) -> None:
    """Kill what a second signal has left behind."""
    for process in processes:
        for one in (*process.children(recursive=True), process):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def _ending(exitcode: int) -> str:
    if exitcode >= 0:
        return f'failed with exit code {exitcode}'
    name = signal.Signals(-exitcode).name
    return f'was ended by {name}' + (', as the system does when memory is short' if name == 'SIGKILL' else '')


def _silence(*packages: str) -> None:
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(packages):
            logging.getLogger(name).setLevel(logging.CRITICAL)
