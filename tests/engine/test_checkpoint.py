"""A checkpoint is whole or it is not there; what is broken or foreign is named, and never costs the last good one."""

import errno
import json
import os
import threading
from pathlib import Path

import pytest

from vlmtune.engine import checkpoint
from vlmtune.utils import disk
from vlmtune.utils.disk import Written, hash_file
from vlmtune.utils.errors import CheckpointError

FILES = {'model.safetensors': b'weights' * 100, 'trainer.json': b'{}', 'processor/tokenizer.json': b'{"a": 1}'}
META = dict(iteration=1, world_size=1, resumable=True)


@pytest.fixture
def write(tmp_path):
    """``write(3)``: iter_3.pth, sealed; ``at`` is when."""

    def go(iteration: int, *, at: float | None = None, content: bytes = b'') -> Path:
        target = tmp_path / checkpoint.checkpoint_name(iteration)
        staging = stage(target, content=content)
        checkpoint.seal(staging, target, files=announced(staging), meta={**META, 'iteration': iteration})
        if at is not None:
            edit(target, saved_at=at)
        return target

    return go


def stage(target: Path, *, content: bytes = b'') -> Path:
    staging = checkpoint.start(target)
    for name, data in FILES.items():
        (staging / name).parent.mkdir(exist_ok=True)
        (staging / name).write_bytes(data + content)
    return staging


def announced(staging: Path) -> dict[str, Written]:
    return {name: Written((staging / name).stat().st_size, hash_file(staging / name)) for name in FILES}


def edit(target: Path, **changes: object) -> None:
    path = target / checkpoint.MANIFEST
    manifest = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in manifest.items() if v is not ...}))


def names(paths):
    return sorted(path.name for path in paths)


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
    threading.Timer(0.3, (staging / 'rng_1.json').write_bytes, [b'{}']).start()
    checkpoint.seal(staging, tmp_path / 'iter_1.pth', files=files, meta=META, patience=20.0)  # it takes a while
    assert (tmp_path / 'iter_1.pth' / 'rng_1.json').exists()


def test_a_file_that_is_shorter_than_what_was_written(tmp_path):
    staging = stage(tmp_path / 'iter_1.pth')
    files = announced(staging)
    os.truncate(staging / 'model.safetensors', 5)
    with pytest.raises(CheckpointError, match='model.safetensors has 5 bytes right after 700 were written to it'):
        checkpoint.seal(staging, tmp_path / 'iter_1.pth', files=files, meta=META)


# ---- the newest one that holds


def test_the_newest_is_the_one_saved_last_not_the_highest_number(write, tmp_path):
    """A new run in an old work dir counts from 1 again."""
    write(900, at=1.0)
    newest = write(2, at=2.0)
    assert checkpoint.find_latest(tmp_path) == checkpoint.Found(newest, ())


def test_broken_ones_are_passed_over_and_it_says_why(write, damage, tmp_path):
    good = write(1, at=1.0)
    damage(write(2, at=2.0), 'changed')
    damage(write(3), 'no manifest')
    (tmp_path / 'iter_4.pth').write_bytes(b'pickle')
    write(5, at=0.5)
    found = checkpoint.find_latest(tmp_path)
    assert found.path == good
    assert len(found.skipped) == 3
    text = '\n'.join(found.skipped)
    assert 'iter_2.pth: model.safetensors was changed' in text
    assert 'iter_3.pth has no manifest.json' in text
    assert 'iter_4.pth is a file' in text


def test_the_newest_is_the_one_saved_last_though_the_clock_was_put_back(write, tmp_path):
    write(1, at=2e10)  # some centuries ahead
    newest = write(2)
    assert checkpoint.find_latest(tmp_path).path == newest


def test_sizes_are_looked_at_quickly(write, damage, tmp_path):
    damage(write(1), 'changed')
    assert checkpoint.find_latest(tmp_path).path is None
    assert checkpoint.find_latest(tmp_path, hashes=False).path == tmp_path / 'iter_1.pth'


def test_nothing_there(tmp_path):
    assert checkpoint.find_latest(tmp_path / 'nowhere') == checkpoint.Found(None, ())
    (tmp_path / 'iter_x.pth').mkdir()
    (tmp_path / 'iter_1.pth.tmp').mkdir()
    assert checkpoint.find_latest(tmp_path) == checkpoint.Found(None, ())


def test_the_pointer_is_relative_so_that_a_work_dir_can_move(write, tmp_path):
    checkpoint.point_to(write(1))
    checkpoint.point_to(write(2))
    assert (tmp_path / 'last_checkpoint').read_text() == 'iter_2.pth\n'
    assert names(tmp_path.iterdir()) == ['iter_1.pth', 'iter_2.pth', 'last_checkpoint']


@pytest.mark.parametrize('text', ['../../home\n', '/', 'x' * 10**6, '\udcff', ''])
def test_a_pointer_that_was_tampered_with_leads_nowhere(text, write, tmp_path):
    for iteration in (1, 2):
        write(iteration, at=float(iteration))
    (tmp_path / 'last_checkpoint').write_text(text, errors='surrogateescape')
    assert names(checkpoint.purge(tmp_path, keep=1)) == ['iter_1.pth']


# ---- purging


@pytest.mark.parametrize(('keep', 'left'), [(-1, [1, 2, 3, 4]), (3, [2, 3, 4]), (1, [4]), (0, [4]), (9, [1, 2, 3, 4])])
def test_the_newest_stay(keep, left, write, tmp_path):
    for iteration in (1, 2, 3, 4):
        write(iteration, at=float(iteration))
    removed = checkpoint.purge(tmp_path, keep=keep)
    assert names(tmp_path.iterdir()) == [f'iter_{i}.pth' for i in left]
    assert names(removed) == [f'iter_{i}.pth' for i in (1, 2, 3, 4) if i not in left]


def test_broken_ones_do_not_count_as_kept(write, damage, tmp_path):
    """One good checkpoint always stays."""
    write(1, at=1.0)
    damage(write(2, at=2.0), 'truncated')
    damage(write(3, at=3.0), 'missing')
    checkpoint.purge(tmp_path, keep=1)
    assert names(tmp_path.iterdir()) == ['iter_1.pth']


def test_the_one_just_saved_stays_though_the_clock_went_back(write, tmp_path):
    write(1, at=100.0)
    checkpoint.point_to(write(2, at=50.0))
    checkpoint.purge(tmp_path, keep=1)
    assert names(tmp_path.glob('iter_*')) == ['iter_1.pth', 'iter_2.pth']


def test_what_others_wrote_is_left_alone(write, tmp_path):
    (tmp_path / 'iter_1.pth').write_bytes(b'pickle')
    (tmp_path / 'iter_2.pth').mkdir()
    (tmp_path / 'best.pth').mkdir()
    for iteration in (3, 4):
        write(iteration, at=float(iteration))
    checkpoint.purge(tmp_path, keep=1)
    assert names(tmp_path.iterdir()) == ['best.pth', 'iter_1.pth', 'iter_2.pth', 'iter_4.pth']


def test_what_a_killed_run_left_half_written_goes(write, tmp_path):
    checkpoint.start(tmp_path / 'iter_7.pth')
    write(8)
    checkpoint.purge(tmp_path, keep=1)
    assert names(tmp_path.iterdir()) == ['iter_8.pth']
