"""A lock that a killed process has left is told before DeepSpeed waits for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlmtune.engine.build_locks import check_build_locks, left_locks
from vlmtune.utils.errors import TrainingError

HOLD = 'import os, sys; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print("held", flush=True); sys.stdin.read()'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_EXTENSIONS_DIR', str(tmp_path))
    for name in ('cpu_adam', 'deepspeed_shm_comm', 'of_somebody_else'):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.mark.parametrize('name', ['cpu_adam', 'deepspeed_shm_comm'])
def test_one_that_nobody_holds_is_an_error(folder, name):
    (folder / name / 'lock').touch()
    with pytest.raises(TrainingError, match=rf'{name}/lock is the lock of a build, .* remove it'):
        check_build_locks()


@pytest.mark.parametrize('linked', [False, True])
def test_one_of_a_living_process_and_those_of_others_are_none(linked, folder, tmp_path_factory, monkeypatch):
    """Also where the way to the folder leads over a link, as to homes of clusters."""
    if linked:
        link = tmp_path_factory.mktemp('home') / 'link'
        link.symlink_to(folder)
        monkeypatch.setenv('TORCH_EXTENSIONS_DIR', str(link))
    check_build_locks()
    (folder / 'of_somebody_else' / 'lock').touch()
    lock = folder / 'cpu_adam' / 'lock'
    with subprocess.Popen([sys.executable, '-c', HOLD, lock], stdin=-1, stdout=-1) as holder:
        assert holder.stdout.readline() == b'held\n'
        check_build_locks()
        holder.kill()
    assert left_locks() == [lock]


@pytest.mark.parametrize('taken_again', [False, True])
def test_one_that_is_released_while_we_look_is_none(taken_again, folder, monkeypatch):
    lock = folder / 'cpu_adam' / 'lock'
    lock.touch()
    os.utime(lock, (1, 1))

    def release():
        lock.unlink()
        if taken_again:
            lock.touch()
        return set()

    monkeypatch.setattr('vlmtune.engine.build_locks._open_files', release)
    check_build_locks()


def test_one_that_is_released_between_two_looks_is_none(folder, monkeypatch):
    monkeypatch.setattr(Path, 'glob', lambda root, pattern: [root / 'cpu_adam' / 'lock'])
    check_build_locks()
