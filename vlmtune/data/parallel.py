"""A function over ranges of numbers, in forked processes: what was loaded before the fork is not loaded again.

The parent hands out ranges one by one over a pipe each, and takes results in order. A worker has two ranges at most, so
that it never waits, and at most ``2 * workers`` results are held.
"""

import gc
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from vlmtune.utils.errors import UserError

logger = logging.getLogger(__name__)

CHUNK = 512  # numbers a range; a range takes a few tenths of a second
_MOST_WORKERS = 32
_AHEAD = 2  # ranges a worker has: the one it works on, and the next
_PATIENCE = 10  # seconds for a worker to end


def default_workers(count: int) -> int:
    """Processes for ``count`` rows: one per core; 0, which is this process, where starting them would take longer.

    Only on Linux: elsewhere a fork of a process that has used system libraries may crash.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == 'linux' else 0
    workers = min(cores, _MOST_WORKERS, count // (2 * CHUNK))
    return workers if workers > 1 else 0


def map_chunks(function: Callable[[range], Any], count: int, *, workers: int, chunk: int = CHUNK) -> Iterator[Any]:
    """``function(range)`` for consecutive ranges of 0..count, in order.

    Args:
        function: runs in the workers; its results are pickled. It sees everything as it is when the first result is
            asked for.
        count: one past the last number.
        workers: processes; 0 works in this one.
        chunk: numbers a range.

    Raises:
        UserError: the function raised it, or a worker was killed. Python's own exceptions are raised as they are, with
            the worker's traceback as a note.
        RuntimeError: any other exception, as text.
    """
    ranges = [range(start, min(start + chunk, count)) for start in range(0, count, chunk)]
    if workers < 1:
        yield from map(function, ranges)
        return
    pool = _Pool(function, ranges, workers=min(workers, len(ranges)))
    try:
        yield from pool.results()
    finally:
        pool.close()


class _Pool:
    def __init__(self, function: Callable[[range], Any], ranges: list[range], *, workers: int) -> None:
        self.ranges = ranges
        self.next = 0  # the range to hand out
        self.processes: dict[Connection, multiprocessing.process.BaseProcess] = {}
        self.given: dict[Connection, list[int]] = {}
        context = multiprocessing.get_context('fork')
        with _ready_to_fork():
            for _ in range(workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(function, theirs, [*self.processes, ours]), daemon=True)
                process.start()
                theirs.close()  # the worker's end is now the worker's alone: when it dies, reading ours tells
                self.processes[ours], self.given[ours] = process, []

    def results(self) -> Iterator[Any]:
        done: dict[int, Any] = {}
        for number in range(len(self.ranges)):
            while number not in done:
                self._hand_out(limit=number + _AHEAD * len(self.processes))
                busy = [connection for connection, given in self.given.items() if given]
                for connection in wait(busy):
                    assert isinstance(connection, Connection)
                    done[self.given[connection][0]] = self._receive(connection)
                    self.given[connection].pop(0)
            yield done.pop(number)

    def _hand_out(self, *, limit: int) -> None:
        for ahead in range(1, _AHEAD + 1):  # one for everybody first
            for connection, given in self.given.items():
                if len(given) < ahead and self.next < min(limit, len(self.ranges)):
                    given.append(self.next)
                    self._send(connection, self.ranges[self.next])
                    self.next += 1

    def _send(self, connection: Connection, task: range) -> None:
        try:
            connection.send(task)
        except OSError as error:
            raise self._killed(connection) from error

    def _receive(self, connection: Connection) -> Any:
        try:
            failed, result = connection.recv()
        except (EOFError, OSError) as error:
            raise self._killed(connection) from error
        if failed:
            raise result
        return result

    def _killed(self, connection: Connection) -> UserError:
        process, task = self.processes[connection], self.ranges[self.given[connection][0]]
        process.join(_PATIENCE)
        code = process.exitcode
        how = f'signal {-code} ({signal.Signals(-code).name})' if code is not None and code < 0 else f'exit code {code}'
        return UserError(
            f'a worker process ended by {how} while it worked on rows {task.start} to {task.stop - 1}; '
            'if the machine ran out of memory, use fewer workers (planning_workers), else look at those rows'
        )

    def close(self) -> None:
        """End the workers, in whatever they are."""
        for connection in self.processes:
            connection.close()
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            process.join(_PATIENCE)
            if process.is_alive():
                process.kill()


@contextmanager
def _ready_to_fork() -> Iterator[None]:
    """What is there is not moved by the garbage collector, so that it stays shared.

    The threads of tokenizers do not exist in a child, which would wait for them forever where the user has switched
    them on, and older versions print a warning where not. Its one switch is a variable of the environment: the children
    keep it, this process does not.
    """
    name = 'TOKENIZERS_PARALLELISM'
    before = os.environ.get(name)
    os.environ[name] = 'false'
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _work(function: Callable[[range], Any], connection: Connection, inherited: list[Connection]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for parents_end in inherited:  # while a copy is open, nobody learns that the parent has died
        parents_end.close()
    torch.set_num_threads(1)  # the parent's threads do not exist here
    try:
        while True:
            task = connection.recv()
            connection.send_bytes(_outcome(function, task))
    except (EOFError, OSError):
        return  # the parent has gone, or has what it wants


def _outcome(function: Callable[[range], Any], task: range) -> bytes:
    """Pickled: (whether it failed, the result or the exception)."""
    try:
        return pickle.dumps((False, function(task)), protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        text = ''.join(traceback.format_exception(error))
        if isinstance(error, UserError):
            return pickle.dumps((True, error))
        if type(error).__module__ != 'builtins':  # nobody knows how to make it again
            return pickle.dumps((True, RuntimeError(f'in a worker process:\n{text}')))
        error.add_note(f'in a worker process:\n{text}')
        return pickle.dumps((True, error))
