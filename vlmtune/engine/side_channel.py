"""What one rank knows of the others: their notes in the store of the process group, and two groups with bounds.

``ranks`` is the door to it.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from vlmtune.utils.errors import TrainingError

_ASKING = timedelta(seconds=10)  # how long a question to the store may take
_NOTE, _FAILURE = 'vlmtune/note', 'vlmtune/failure'


class Bounds(NamedTuple):
    """Seconds that ranks wait for each other.

    Attributes:
        step: within training steps.
        other: while data is planned, weights are loaded, answers are made, checkpoints are written.
    """

    step: float = 600.0
    other: float = 7200.0


DEFAULT_BOUNDS = Bounds()


class RankFailed(TrainingError):
    """Another rank failed, and said why."""


class RankMissing(TrainingError):
    """A rank has died or hangs."""


class Note(NamedTuple):
    """What a rank last said about itself."""

    entered: int  # exchanges
    what: str  # it is doing
    when: float  # seconds since 1970, by the clock of its machine
    host: str
    pid: int

    def ending(self) -> str | None:
        """'has died' or 'is stopped', if that can be seen from here."""
        if self.host != socket.gethostname():
            return None
        try:
            os.kill(self.pid, 0)
            state = Path(f'/proc/{self.pid}/stat').read_text('utf-8').rpartition(')')[2].split()[0]
        except ProcessLookupError:
            return 'has died'
        except OSError:  # no /proc, or another user's
            return None
        return {'Z': 'has died', 'X': 'has died', 'T': 'is stopped', 't': 'is stopped'}.get(state)


class Failure(NamedTuple):
    """Why a run ends."""

    rank: int  # who says it
    missing: bool  # that others are missing; False: that it failed itself
    message: str

    def error(self) -> RankMissing | RankFailed:
        """What the other ranks raise."""
        return RankMissing(self.message) if self.missing else RankFailed(f'rank {self.rank} failed: {self.message}')


class Channel:
    """A rank's connections to the others, beside those of the strategy; made by all ranks at once.

    Args:
        store: of the process group.
        bounds: how long ranks wait for each other.
    """

    def __init__(self, store: dist.Store, bounds: Bounds) -> None:
        self.bounds = bounds
        self.store: Any = store.clone()  # type: ignore[attr-defined]  # a connection with a timeout of its own
        self.store.set_timeout(_ASKING)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.step = dist.new_group(backend='gloo', timeout=timedelta(seconds=bounds.step))
        self.other = dist.new_group(backend='gloo', timeout=timedelta(seconds=bounds.other))
        self.entered, self.cut_off, self.parent = 0, False, os.getppid()
        self.note('starting')

    def note(self, what: str) -> None:
        """Let the others know what this rank is doing."""
        mine = Note(self.entered, what, time.time(), socket.gethostname(), os.getpid())
        self._ask(lambda: self.store.set(f'{_NOTE}/{self.rank}', json.dumps(mine)))

    def read(self, key: str) -> Any:
        """The json under a key, or None if it is not there, or the store is not."""
        return self._ask(lambda: json.loads(self.store.get(key)) if self.store.check([key]) else None)

    def tell(self, failure: Failure) -> Failure:
        """Leave word of the first failure of the run; returns the first."""
        self._ask(lambda: self.store.compare_set(_FAILURE, '', json.dumps(failure)))
        return self.told() or failure

    def told(self) -> Failure | None:
        """The first failure of the run."""
        found = self.read(_FAILURE)
        return None if found is None else Failure(*found)

    def _ask(self, question: Callable[[], Any]) -> Any:
        if self.cut_off:  # torch prints a page for every further attempt
            return None
        try:
            return question()
        except dist.DistError:  # the process that held the store has died; the next exchange says so
            self.cut_off = True
            return None

    def notes(self) -> list[Note | None]:
        """By rank; None where there is none, or the store is gone."""
        found = [self.read(f'{_NOTE}/{rank}') for rank in range(self.world_size)]
        return [None if note is None else Note(*note) for note in found]
