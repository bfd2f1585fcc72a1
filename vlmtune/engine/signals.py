"""SIGTERM, SIGUSR1 and Ctrl-C: while it trains, a run saves and leaves; before and after, it leaves at once.

Handlers write with ``os.write``: they may run in the middle of a print.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn, Self

from mmengine.config import Config
from mmengine.dist import get_rank

from vlmtune.engine import ranks
from vlmtune.utils.errors import ConfigError, Stopped

__all__ = ['SIGNALS', 'StopSignals', 'Stopped', 'leave_at_once']

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ECHO = 2.0  # seconds: a terminal, slurm and torchrun may hand on what the process also got itself


def exit_code(number: int, *, requeue_exit_code: int | None = None) -> int:
    """What the shell is told: 143 for SIGTERM, 130 for Ctrl-C, and for SIGUSR1 what the config says, or 143."""
    if number == signal.SIGUSR1:
        return 128 + signal.SIGTERM if requeue_exit_code is None else requeue_exit_code
    return 128 + number


def check_requeue_exit_code(cfg: Config) -> None:
    """Raises if ``requeue_exit_code`` of a config is none.

    Raises:
        ConfigError: it is no exit code.
    """
    code = cfg.get('requeue_exit_code')
    if code is not None and (not isinstance(code, int) or isinstance(code, bool) or not 0 <= code <= 255):
        raise ConfigError(f'requeue_exit_code={code!r}: expected a number from 0 to 255, or None for 143')


class _SignalHandler:
    """A context in which signals come to ``_handle``."""

    def __init__(self, *, requeue_exit_code: int | None = None) -> None:
        self.requeue_exit_code = requeue_exit_code
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(_handled(self._handle))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _handle(self, number: int) -> None:
        raise NotImplementedError


class StopSignals(_SignalHandler):
    """Notes signals, so that all ranks can agree on them and save: ``with StopSignals() as signals``.

    A second signal, unless it is the echo of the first, ends the process at once.

    Args:
        requeue_exit_code: of the process after SIGUSR1, by which slurm announces the end of the time; None: 143.
    """

    def __init__(self, *, requeue_exit_code: int | None = None) -> None:
        super().__init__(requeue_exit_code=requeue_exit_code)
        self._noted: dict[int, float] = {}

    def flags(self) -> list[float]:
        """One number for each of ``SIGNALS``: 1 if it has come to this process. Add them up over the ranks.

        A launcher that was killed could not hand SIGTERM on: its ranks would train on beside a run that resumes theirs.
        """
        if not self._noted and ranks.orphaned():
            if get_rank() == 0:
                _write('the launcher has died; its ranks end as if it had sent SIGTERM')
            self._handle(signal.SIGTERM)
        return [float(number in self._noted) for number in SIGNALS]

    def asked(self, sums: Sequence[float]) -> signal.Signals | None:
        """The signal that any rank got, from the sums of all ranks' flags."""
        return next((number for number, count in zip(SIGNALS, sums, strict=True) if count), None)

    def leave_saved(self, asked: signal.Signals, *, iteration: int, checkpoint: str | Path) -> NoReturn:
        """End the run after an agreed signal, once it is saved.

        Args:
            asked: the signal.
            iteration: optimizer steps done.
            checkpoint: where they are saved.

        Raises:
            Stopped: always.
        """
        with ranks.together('leaving'):  # a launcher ends all when one has left, and one may still be tidying up
            pass
        raise Stopped(
            f'stopped by {_in_words(asked)} after step {iteration}; saved in {checkpoint}',
            exit_code=exit_code(asked, requeue_exit_code=self.requeue_exit_code),
        )

    def _handle(self, number: int) -> None:
        now = time.monotonic()
        if self._noted and now - min(self._noted.values()) > ECHO:
            _write(f'a second signal ({_in_words(number)}): left at once, nothing more was saved')
            os._exit(exit_code(number, requeue_exit_code=self.requeue_exit_code))
        if not self._noted and get_rank() == 0:
            _write(f'{_in_words(number)}: will save and leave after this step; a second one leaves at once')
        self._noted.setdefault(number, now)


class leave_at_once(_SignalHandler):
    """Where there is nothing to save yet: ``with leave_at_once() as leaving``.

    Alone, a process unwinds and raises Stopped. One of several ends on the spot: others hold the connections that it
    would wait for.

    Attributes:
        requeue_exit_code: as in StopSignals; may be set when the config has been read.
    """

    def _handle(self, number: int) -> None:
        code = exit_code(number, requeue_exit_code=self.requeue_exit_code)
        message = f'ended by {_in_words(number)}; no step was under way, nothing was saved'
        if not ranks.several():
            raise Stopped(message, exit_code=code)
        if get_rank() == 0:
            _write(message)
        os._exit(code)


@contextmanager
def _handled(handle: Callable[[int], None]) -> Iterator[None]:
    """Within it, this process (and no child that is forked from it) calls ``handle`` with the signals that come."""
    process = os.getpid()

    def handler(number: int, _: FrameType | None) -> None:
        if os.getpid() == process:
            handle(number)
        elif number == signal.SIGTERM:  # a child has to end when it is told
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    if threading.current_thread() is not threading.main_thread():  # Python handles signals in that one only
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


def _in_words(number: int) -> str:
    return 'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name


def _write(message: str) -> None:
    os.write(2, f'\n{message}\n'.encode())
