"""Fixtures for every room: tiny models and data sets, written once per session; one torch thread per worker."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from vlmtune.engine.build_locks import left_locks
from vlmtune.testing import TinyData, write_tiny_data, write_tiny_model
from vlmtune.testing.warm_ranks import WarmRanks


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test draws, as the first weights of an adapter, does not depend on the tests before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope='session', autouse=True)
def one_torch_thread() -> None:
    """Workers run side by side, and tiny matrices do not gain from threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope='session', autouse=True)
def ctrl_c() -> None:
    """A shell lets commands in its background ignore Ctrl-C, and they hand that on to their children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope='session', autouse=True)
def no_left_locks() -> None:
    """A suite that was killed while DeepSpeed compiled has left a lock, for which this one would wait."""
    for lock in left_locks():
        lock.unlink(missing_ok=True)


@pytest.fixture(scope='session', autouse=True)
def own_servers() -> None:
    """Servers of tests are on this machine, where no proxy could reach them."""
    os.environ.update(NO_PROXY='127.0.0.1,localhost', no_proxy='127.0.0.1,localhost')


@pytest.fixture(scope='session')
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_model('llava', amplify=4.0)``: the directory of a tiny model; the same arguments give the same directory.

    Tests share the directories: read them, never write into them.
    """
    written: dict[str, Path] = {}

    def factory(model_type: str, **kwargs: object) -> Path:
        key = repr((model_type, sorted(kwargs.items())))
        if key not in written:
            written[key] = write_tiny_model(model_type, tmp_path_factory.mktemp(model_type), **kwargs)  # type: ignore[arg-type]
        return written[key]

    return factory


@pytest.fixture(scope='session')
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyData]:
    """``tiny_data('llava', rows=4)``: a tiny data set; the same arguments give the same files. Read only, as above."""
    written: dict[str, TinyData] = {}

    def factory(format: str = 'llava', **kwargs: object) -> TinyData:
        key = repr((format, sorted(kwargs.items())))
        if key not in written:
            written[key] = write_tiny_data(tmp_path_factory.mktemp(format), format=format, **kwargs)  # type: ignore[arg-type]
        return written[key]

    return factory


@pytest.fixture(scope='session')
def warm_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmRanks]:
    """A process that has imported everything and forks runs of one or several ranks."""
    ranks = WarmRanks(tmp_path_factory.mktemp('ranks'))
    yield ranks
    ranks.close()


@pytest.fixture(scope='session')
def quickstart_data(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> None:
    """``quickstart/data``, written once: a second time would empty files that another worker's tests read."""
    pytest.importorskip('easy_vqa')
    own = tmp_path_factory.getbasetemp()
    shared = own if worker_id == 'master' else own.parent
    with FileLock(shared / 'quickstart.lock'):
        if not (shared / 'quickstart.done').exists():
            program = Path(__file__).parents[1] / 'quickstart' / 'prepare_data.py'
            subprocess.run([sys.executable, program, '--base'], check=True)
            (shared / 'quickstart.done').touch()
