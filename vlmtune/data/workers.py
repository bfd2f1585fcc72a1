"""The processes that load samples: what signals do to them, what each is loading, and when its death is told.

They are in the process group of the run, so Ctrl-C and the signals of a cluster reach them as well; they go on until
the run itself has come to the end of its step.
"""

import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmtune.data.sample_places import places
from vlmtune.utils.errors import ConfigError

DEFAULT_TIMEOUT = 300.0
"""Seconds that a batch may take. Less than ranks wait for each other (timeouts.step), so that the rank whose data does
not come can say so."""
_LOOK_AGAIN = 2.0  # seconds; for the parent
_NOTE = 256  # bytes that a worker has to say what it loads
_LONGEST_FOLDER = 107 - len('/pymp-12345678/listener-12345678')  # bytes; 107 is what the name of a socket may have


class _Desk:
    note: np.ndarray | None = None  # in a worker: uint8[_NOTE], read by the parent


def check_temporary_folder() -> None:
    """Workers hand tensors over through sockets in it; with a name that is too long the run would hang.

    Raises:
        ConfigError: it has one.
    """
    folder = tempfile.gettempdir()
    if (length := len(os.fsencode(folder))) > _LONGEST_FOLDER:
        raise ConfigError(
            f'TMPDIR={folder}: data workers cannot open sockets in a folder whose name has {length} bytes; set TMPDIR '
            f'to one of at most {_LONGEST_FOLDER}, or dataloader_num_workers=0'
        )


def make_board(workers: int) -> Tensor:
    """uint8[workers, bytes], shared: what each worker is loading."""
    return torch.zeros(workers, _NOTE, dtype=torch.uint8).share_memory_()


def note_loading(dataset: Any, key: Any) -> None:
    """Say which sample is loaded now, for the message if this worker dies or hangs; does nothing elsewhere."""
    if _Desk.note is not None:
        text = f'{os.getpid()} {places(dataset, [key])[0]}'.encode()[: _NOTE - 1]
        _Desk.note[: len(text) + 1] = np.frombuffer(text + b'\0', dtype=np.uint8)


def begin_work(worker_id: int, *, board: Tensor) -> None:
    """A DataLoader's ``worker_init_fn``: only the parent's SIGTERM ends a worker, and the parent's death.

    The latter also where the worker hangs; torch looks for it between two batches.

    Args:
        worker_id: counted from 0.
        board: see ``make_board``.
    """
    _Desk.note = board[worker_id].numpy()
    for ignored in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # threads that start later inherit it
    threading.Thread(target=_end_with_the_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_the_parent(parent: int) -> None:
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, _LOOK_AGAIN)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)


class _Deaths:
    """Stands before torch's handler of SIGCHLD, which raises wherever the process is when a worker dies.

    In the middle of an exchange between ranks or of a save that would leave the others waiting. So it is let through
    only where somebody waits for a batch, and asked again when somebody begins to.
    """

    def __init__(self) -> None:
        self.waiting = False
        self._tell: Callable[[int, FrameType | None], Any] | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.waiting and self._tell is not None:
            self._tell(number, frame)

    def install(self) -> None:
        """Take the place of torch's handler; it sets it when the first workers are started, once per process."""
        current = signal.getsignal(signal.SIGCHLD)
        if callable(current) and current is not self and threading.current_thread() is threading.main_thread():
            self._tell = current
            signal.signal(signal.SIGCHLD, self)

    def ask(self) -> None:
        """Raise if a worker has died since somebody asked.

        Raises:
            RuntimeError: torch's, which names process and signal.
        """
        self(signal.SIGCHLD, None)


_deaths = _Deaths()


class WorkerBatches:
    """The batches of a DataLoader's workers; a worker that has died is told by ``next`` and nowhere else.

    Args:
        start: makes torch's iterator, which starts the workers.
        board: where they note what they load.
    """

    def __init__(self, start: Callable[[], Iterator[Any]], *, board: Tensor) -> None:
        self._board = board.zero_()
        before = set(multiprocessing.active_children())
        self._batches: Iterator[Any] | None = start()
        self._workers = [process for process in multiprocessing.active_children() if process not in before]
        _deaths.install()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._batches is None:
            raise StopIteration
        _deaths.waiting = True
        try:
            _deaths.ask()
            return next(self._batches)
        finally:
            _deaths.waiting = False

    def loading(self) -> dict[int, str]:
        """What each worker loads, or loaded last, by process id: ``sample 3 (train.jsonl:4)``."""
        notes = [bytes(note).partition(b'\0')[0].decode(errors='replace') for note in self._board.numpy()]
        return {int(pid): sample for pid, _, sample in (note.partition(' ') for note in notes if note)}

    def close(self, *, at_once: bool = False) -> None:
        """End the workers: those that do not end when torch asks them to are killed.

        Args:
            at_once: do not ask; one of them hangs or has died.
        """
        if at_once:
            self._kill()
        self._batches = None
        self._kill()

    def _kill(self) -> None:
        for process in self._workers:
            if process.is_alive():
                process.kill()
