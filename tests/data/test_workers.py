"""Worker processes: what ends them, when their death is told, what they say that they load."""

import multiprocessing
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from tests.waiting import until
from vlmtune.data import StepDataLoader
from vlmtune.data.workers import DEFAULT_TIMEOUT, begin_work, make_board, note_loading
from vlmtune.engine.ranks import Bounds
from vlmtune.utils.errors import ConfigError


def test_signals_of_the_terminal_and_the_cluster_do_not_end_workers():
    """The parent's SIGTERM does, and its death, also where the worker hangs."""
    context = multiprocessing.get_context('fork')
    went_on = context.Event()

    def work(ready):
        wait, received = signal.sigtimedwait, []

        def listen(*arguments):
            if received:
                went_on.set()
            received.extend([number] if (number := wait(*arguments)) else [])
            return number

        signal.sigtimedwait = listen
        begin_work(0, board=make_board(1))
        ready.set()
        time.sleep(1000)

    def start(ready):
        worker = context.Process(target=work, args=(ready,), daemon=True)
        worker.start()
        assert ready.wait(60)
        return worker

    worker = start(context.Event())
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        subprocess.run(['kill', f'-{number}', str(worker.pid)], check=True)  # another process's, as a terminal's
    assert went_on.wait(60)
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0

    def parent(pid, ready):
        pid.value = start(ready).pid
        os.kill(os.getpid(), signal.SIGKILL)

    pid = context.Value('i', 0)
    process = context.Process(target=parent, args=(pid, context.Event()))
    process.start()
    process.join(60)
    until(lambda: not is_alive(pid.value))


def is_alive(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


class Letters(Dataset):
    """Sample i is the process that loads it; it says so."""

    def row_of(self, index):
        return index

    def where(self, index):
        return f'letters.txt:{index + 1}'

    def __getitem__(self, key):
        note_loading(self, key)
        return torch.tensor(os.getpid())


class Key:
    def __init__(self, sample):
        self.sample = sample


class InOrder:
    epoch = 0

    def __iter__(self):
        return iter([[Key(i)] for i in range(100)])


def loader(**options):
    return StepDataLoader(Letters(), seed=0, batch_sampler=InOrder(), **{'num_workers': 2, **options})


def test_a_death_is_told_to_who_waits_for_a_batch_and_to_nobody_else():
    batches = iter(loader())
    worker = int(next(batches))
    os.kill(worker, signal.SIGKILL)
    os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)  # torch's own handler would raise in here
    str(worker)  # or here
    with pytest.raises(RuntimeError, match=f'pid {worker}. is killed by signal'):
        for _ in batches:
            pass
    batches.close(at_once=True)
    assert multiprocessing.active_children() == []


def test_workers_say_what_they_load():
    batches = iter(loader(prefetch_factor=1))
    pids = [int(next(batches)) for _ in range(4)]
    until(lambda: set(batches.loading().values()) == {'sample 4 (letters.txt:5)', 'sample 5 (letters.txt:6)'})
    assert set(batches.loading()) == set(pids)


def test_closing_ends_workers():
    batches = iter(loader())
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert multiprocessing.active_children() == []
    with pytest.raises(StopIteration):
        next(batches)


def test_workers_that_hang_are_not_waited_for(monkeypatch):
    monkeypatch.setattr(Letters, '__getitem__', lambda *_: time.sleep(1000))
    batches = iter(loader(timeout=0.5))
    with pytest.raises(RuntimeError, match='timed out after 0.5 seconds'):
        next(batches)
    workers = multiprocessing.active_children()
    batches.close(at_once=True)
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL] * 2  # torch would wait for each, and ask
    assert multiprocessing.active_children() == []


def test_the_time_limit():
    """Below what ranks wait for each other, so that the rank whose data does not come can say so."""
    assert loader().timeout == DEFAULT_TIMEOUT < Bounds().step
    assert loader(timeout=7).timeout == 7
    assert loader(timeout=0).timeout == 0
    assert loader(num_workers=0, timeout=7).timeout == 0


def test_a_temporary_folder_with_too_long_a_name(monkeypatch):
    """One byte less, and tensors come through."""
    with tempfile.TemporaryDirectory(dir='/tmp') as short:
        folder = f'{short}/'.ljust(75, 'x')
        os.mkdir(folder)
        monkeypatch.setattr(tempfile, 'tempdir', folder)
        batches = iter(loader())
        assert next(batches).item() > 0
        batches.close(at_once=True)
    monkeypatch.setattr(tempfile, 'tempdir', folder + 'x')
    loader(num_workers=0)
    with pytest.raises(
        ConfigError, match='whose name has 76 bytes; set TMPDIR to one of at most 75, or dataloader_num'
    ):
        loader()
