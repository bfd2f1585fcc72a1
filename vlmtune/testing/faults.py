"""Kills and disk errors at counted points of a run: backward passes, optimizer steps, system calls of a save."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from vlmtune.engine.deepspeed import DeepSpeedStrategy
from vlmtune.engine.strategies import WholeWeights
from vlmtune.utils import disk

Result = TypeVar('Result')

TRAINING = ('backward', 'optimizer_step')
SAVING = ('write', 'fsync', 'replace')
KILLS = ('kill', 'kill_halfway')
ERRORS = ('ENOSPC', 'EIO', 'exception')


class Points:
    """Counts the points that a rank comes to, and lets something happen at one of them.

    Args:
        journal: gets the kind of every point, a line each.
        at: number of the point, from 0; None lets nothing happen.
        fault: one of KILLS (halfway through a write: half of the bytes are written) or ERRORS.
    """

    def __init__(self, journal: Path, *, at: int | None, fault: str | None) -> None:
        journal.parent.mkdir(parents=True, exist_ok=True)
        self._journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._at, self._fault, self._next = at, fault, 0

    def reach(self, kind: str, act: Callable[[], Result], *, halfway: Callable[[], object] | None = None) -> Result:
        """Come to a point and, if nothing happens there, go on with ``act``."""
        here, self._next = self._next, self._next + 1
        os.write(self._journal, f'{kind}\n'.encode())
        if here == self._at:
            if self._fault == 'kill_halfway' and halfway is not None:
                halfway()
            if self._fault in KILLS:
                os.kill(os.getpid(), signal.SIGKILL)
            if self._fault == 'exception':
                raise ValueError('made up by a test')
            code = getattr(errno, str(self._fault))
            raise OSError(code, os.strerror(code))
        return act()


class CountingOs:
    """``os`` as ``utils/disk.py`` sees it."""

    def __init__(self, points: Points) -> None:
        self._points = points

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, descriptor: int, data: memoryview) -> int:
        """A point, then os.write."""
        half = data[: len(data) // 2]
        return self._points.reach(
            'write', lambda: os.write(descriptor, data), halfway=lambda: os.write(descriptor, half)
        )

    def fsync(self, descriptor: int) -> None:
        """A point, then os.fsync."""
        self._points.reach('fsync', lambda: os.fsync(descriptor))

    def replace(self, source: Path, target: Path) -> None:
        """A point, then os.replace."""
        self._points.reach('replace', lambda: os.replace(source, target))


def install(*, rank: int, journal: str, on_rank: int = 0, at: int | None = None, fault: str | None = None) -> None:
    """Count in this process, for good, and let one thing happen on one rank.

    Args:
        rank: of this process.
        journal: a folder; rank R writes ``points_R.txt`` there.
        on_rank: where it happens.
        at, fault: see ``Points``.
    """
    points = Points(Path(journal, f'points_{rank}.txt'), at=at if rank == on_rank else None, fault=fault)
    vars(disk)['os'] = CountingOs(points)
    for owner in (WholeWeights, DeepSpeedStrategy):
        for name in TRAINING:
            setattr(owner, name, _counted(getattr(owner, name), name, points))


def _counted(method: Callable[..., Any], name: str, points: Points) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        return points.reach(name, lambda: method(*args, **kwargs))

    return counted
