"""A checkpoint is whole or it is not there; what is broken or foreign is named, and never costs the last good one."""

import errno
import os
import threading
from functools import partial

import pytest

from tests.engine.sealed import FILES, META, announced, names, seal, stage
from vlmtune.engine import checkpoint
from vlmtune.utils import disk
from vlmtune.utils.disk import Written
from vlmtune.utils.errors import CheckpointError


@pytest.fixture
def write(tmp_path):
    """``write(3)``: iter_3.pth, sealed; ``at`` is when."""
    return partial(seal, tmp_path)


# ---- writing


def test_what_was_sealed_verifies(write, tmp_path):
    target = write(12)
    manifest = checkpoint.verify(target)
    assert target == tmp_path / 'iter_12.pth'
    assert manifest['iteration'] == 12
    assert manifest['files'].keys() == FILES.keys()
    assert manifest['files']['trainer.json']['size'] == 2
    assert names(tmp_path.iterdir()) == ['iter_12.pth']


def test_a_name_that_is_taken_is_replaced_by_the_new_one(write, tmp_path):
    write(1)
    assert (write(1, content=b'new') / 'trainer.json').read_bytes() == b'{}new'
    assert names(tmp_path.iterdir()) == ['iter_1.pth']


@pytest.mark.parametrize('kind', ['file', 'directory'])
def test_what_another_program_wrote_under_the_name_is_kept_aside(kind, write, tmp_path):
    """mmengine calls its files like our directories, XTuner its DeepSpeed directories."""
    foreign = tmp_path / 'iter_1.pth'
    if kind == 'file':
        foreign.write_bytes(b'pickle')
    else:
        foreign.mkdir()
        (foreign / 'mp_rank_00_model_states.pt').write_bytes(b'pickle')
    checkpoint.verify(write(1))
    assert (tmp_path / 'iter_1.pth.old').exists()


def test_a_write_that_stops_half_way_leaves_nothing_that_looks_whole(tmp_path):
    target = tmp_path / 'iter_1.pth'
    staging = checkpoint.start(target)
    (staging / 'model.safetensors').write_bytes(b'half')
    assert not target.exists()
    assert checkpoint.find_latest(tmp_path) == checkpoint.Found(None, ())
    assert list(checkpoint.start(target).iterdir()) == []  # and the next attempt starts from nothing


# ---- a disk that fails


class FaultyOs:
    """``os`` whose k-th call of one function fails."""

    def __init__(self, call: str, at: int = 1) -> None:
        self.call, self.left = call, at

    def __getattr__(self, name):
        return self.go if name == self.call else getattr(os, name)

    def go(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.ENOSPC, 'No space left on device')
        return getattr(os, self.call)(*args, **kwargs)


@pytest.mark.parametrize(
    ('call', 'at'),
    [('write', 1), ('fsync', 1), ('fsync', 2), ('fsync', 3), ('open', 1), ('replace', 1), ('replace', 2)],
)
def test_what_was_there_under_the_name_survives_a_disk_that_fails(call, at, write, tmp_path, monkeypatch):
    write(1)
    staging = stage(tmp_path / 'iter_1.pth', content=b'new')
    files = announced(staging)
    monkeypatch.setattr(disk, 'os', FaultyOs(call, at))
    with pytest.raises(OSError, match='No space left'):
        checkpoint.seal(staging, tmp_path / 'iter_1.pth', files=files, meta=META)
    checkpoint.discard(staging)
    assert (tmp_path / 'iter_1.pth' / 'trainer.json').read_bytes() == b'{}'
    assert checkpoint.find_latest(tmp_path) == checkpoint.Found(tmp_path / 'iter_1.pth', ())
    assert names(tmp_path.iterdir()) == ['iter_1.pth']


def test_killed_between_the_two_renames_the_old_one_is_found(write, tmp_path):
    write(1).rename(tmp_path / 'iter_1.pth.old')
    stage(tmp_path / 'iter_1.pth', content=b'new')
    assert checkpoint.find_latest(tmp_path) == checkpoint.Found(tmp_path / 'iter_1.pth.old', ())
    checkpoint.purge(tmp_path, keep=1)
    assert names(tmp_path.iterdir()) == ['iter_1.pth.old']
    write(1, content=b'new')
    checkpoint.purge(tmp_path, keep=2)
    assert names(tmp_path.iterdir()) == ['iter_1.pth']


def test_a_purge_that_is_killed_leaves_nothing_that_looks_damaged(write, tmp_path, monkeypatch):
    for iteration in (1, 2):
        write(iteration, at=float(iteration))

    def kill(path, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, 'rmtree', kill)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.purge(tmp_path, keep=1)
    assert checkpoint.find_latest(tmp_path) == checkpoint.Found(tmp_path / 'iter_2.pth', ())
    assert names(tmp_path.iterdir()) == ['iter_1.pth.tmp', 'iter_2.pth']


def test_an_old_one_that_cannot_be_removed_is_no_reason_to_stop(write, tmp_path, monkeypatch, caplog):
    for iteration in (1, 2):
        write(iteration, at=float(iteration))
    monkeypatch.setattr(disk, 'os', FaultyOs('replace'))
    checkpoint.purge(tmp_path, keep=1)
    assert 'old checkpoints could not be removed: ' in caplog.text


def test_what_failed_is_told_with_what_is_left(write, tmp_path):
    full = OSError(errno.ENOSPC, 'No space left on device')
    target = tmp_path / 'iter_3.pth'
    assert 'iter_3.pth could not be written: No space left on device; there is no older one' in str(
        checkpoint.failure(target, full)
    )
    write(2)
    assert str(checkpoint.failure(target, full)).endswith(f'the newest good one is {tmp_path / "iter_2.pth"}')
    write(3)  # renamed, and then the pointer failed
    assert 'iter_3.pth is written, but not all behind it: No space left' in str(checkpoint.failure(target, full))


def test_room_is_looked_for_first(tmp_path, monkeypatch):
    checkpoint.check_space(tmp_path, 1000)
    monkeypatch.setattr(checkpoint, 'free_bytes', lambda path: 2 << 30)
    with pytest.raises(
        CheckpointError,
        match=r'has room for 2.0 GiB, a checkpoint takes about 3.5 GiB, spare room included; make room, choose another',
    ):
        checkpoint.check_space(tmp_path / 'not_yet', int(3.5 * 2**30))
    with pytest.raises(CheckpointError, match='room'):
        checkpoint.check_space(tmp_path, 2 << 30)  # not to the last byte


def test_what_a_killed_run_left_counts_as_room(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, 'free_bytes', lambda path: 0)
    (tmp_path / 'iter_7.pth.tmp').mkdir()
    with (tmp_path / 'iter_7.pth.tmp' / 'model.safetensors').open('wb') as file:
        file.truncate(1 << 30)
    checkpoint.check_space(tmp_path, 1 << 29)
    with pytest.raises(CheckpointError):
        checkpoint.check_space(tmp_path, 1 << 30)
    checkpoint.start(tmp_path / 'iter_8.pth')
    assert names(tmp_path.iterdir()) == ['iter_8.pth.tmp']


def test_what_another_node_announced_and_nobody_sees_here(tmp_path):
    """Without a shared work dir every node writes to its own disk."""
    staging = stage(tmp_path / 'iter_1.pth')
    files = {**announced(staging), 'rng_1.json': Written(2, 'a' * 64)}
    with pytest.raises(CheckpointError, match=r'rng_1.json .* the work dir is not shared between the nodes; choose'):
        checkpoint.seal(staging, tmp_path / 'iter_1.pth', files=files, meta=META, patience=0.1)
    (staging / 'rng_1.json').write_bytes(b'{')
    threading.Timer(0.3, (staging / 'rng_1.json').write_bytes, [b'{}']).start()
    checkpoint.seal(staging, tmp_path / 'iter_1.pth', files=files, meta=META, patience=20.0)  # it takes a while
    assert (tmp_path / 'iter_1.pth' / 'rng_1.json').exists()


def test_a_file_that_is_shorter_than_what_was_written(tmp_path):
    staging = stage(tmp_path / 'iter_1.pth')
    files = announced(staging)
    os.truncate(staging / 'model.safetensors', 5)
    with pytest.raises(CheckpointError, match='model.safetensors has 5 bytes right after 700 were written to it'):
        checkpoint.seal(staging, tmp_path / 'iter_1.pth', files=files, meta=META)
