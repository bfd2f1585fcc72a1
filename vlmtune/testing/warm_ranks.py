"""Runs of one or several ranks in forked children of one process, which pays for the imports once.

``WarmRanks`` starts ``python -m vlmtune.testing.warm_ranks`` and sends it requests, one line of JSON each. Every rank
calls ``vlmtune.apps.train.train``, or another app, with the arguments of the request, as torchrun would have started
it. When a rank has failed, the others get some seconds to notice it themselves.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

BOUND = 900.0  # seconds of a run; the first one with DeepSpeed compiles for minutes on a busy machine
GRACE = 60.0  # seconds for the others when a rank has failed


class Ended(NamedTuple):
    """How a run ended: exit codes by rank (negative: a signal), and what every rank said."""

    codes: list[int]
    said: list[str]


class WarmRanks:
    """A process that has imported everything, and the runs that it forks.

    Args:
        logs: a folder for what the ranks say.
    """

    def __init__(self, logs: Path) -> None:
        self._logs, self._numbers = logs, count()
        command = [sys.executable, '-m', 'vlmtune.testing.warm_ranks']
        self._parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(
        self,
        world_size: int,
        *,
        faults: Mapping[str, Any] | None = None,
        app: str = 'vlmtune.apps.train.train',
        **arguments: Any,
    ) -> Ended:
        """One run to its end.

        Args:
            world_size: ranks; 1 runs without a process group.
            faults: of ``vlmtune.testing.faults.install``; None disturbs nothing.
            app: what every rank calls.
            arguments: of it; paths may be ``Path``.
        """
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        log = self._logs / str(next(self._numbers))
        request = dict(world_size=world_size, log=log, faults=faults, app=app, arguments=arguments)
        print(json.dumps(request, default=str), file=self._parent.stdin, flush=True)
        answer = self._parent.stdout.readline()
        if not answer:
            raise RuntimeError('the parent of the ranks has ended')
        return Ended(json.loads(answer), [path.read_text('utf-8', 'replace') for path in sorted(log.iterdir())])

    def close(self) -> None:
        """End the parent."""
        assert self._parent.stdin is not None
        self._parent.stdin.close()
        self._parent.wait(30)


# ---- the parent


def serve() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # deepspeed greets on standard output
    _warm_up()
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(_run(**{**request, 'log': Path(request['log'])})), file=answers, flush=True)


def _warm_up() -> None:
    """Import what runs import."""
    import torch

    import vlmtune.apps.train  # noqa: F401  # first: it keeps the next three away from transformers

    for name in ('peft', 'deepspeed', 'transformers.models.llava.modeling_llava'):
        __import__(name)
    torch.set_num_threads(1)


def _run(world_size: int, log: Path, faults: dict[str, Any] | None, app: str, arguments: dict[str, Any]) -> list[int]:
    log.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    ranks = [_fork(rank, world_size, port, log, faults, app, arguments) for rank in range(world_size)]
    codes: dict[int, int] = {}
    end = time.monotonic() + BOUND
    while len(codes) < world_size:
        for rank in ranks:
            if rank not in codes and (status := os.waitpid(rank, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(status[1])
                end = min(end, time.monotonic() + GRACE) if codes[rank] else end
        if time.monotonic() > end:
            for rank in set(ranks) - set(codes):
                os.kill(rank, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[rank] for rank in ranks]


def _fork(
    rank: int,
    world_size: int,
    port: int,
    log: Path,
    faults: dict[str, Any] | None,
    app: str,
    arguments: dict[str, Any],
) -> int:
    """Start a rank; returns its process id."""
    if child := os.fork():
        return child
    code = 1
    try:
        file = os.open(log / f'rank_{rank}.txt', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if world_size > 1:
            names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
            os.environ.update({name: str(value) for name, value in names.items()})
        if faults is not None:
            from vlmtune.testing.faults import install

            install(rank=rank, **faults)
        from vlmtune.utils.imports import import_name

        logging.getLogger('vlmtune').addHandler(logging.StreamHandler())
        logging.getLogger('vlmtune').setLevel(logging.INFO)
        import_name(app)(**arguments, launcher='pytorch' if world_size > 1 else 'none')
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == '__main__':
    serve()
