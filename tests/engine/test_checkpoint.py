"""A checkpoint is whole or it is not there; what is broken or foreign is named, and never costs the last good one."""

import json
import os
from pathlib import Path

import pytest

from vlmtune.engine import checkpoint
from vlmtune.utils.errors import CheckpointError

FILES = {'model.safetensors': b'weights' * 100, 'trainer.json': b'{}', 'processor/tokenizer.json': b'{"a": 1}'}


@pytest.fixture
def write(tmp_path):
    """``write(3)``: iter_3.pth, sealed; ``at`` is when."""

    def go(iteration: int, *, at: float | None = None, content: bytes = b'') -> Path:
        target = tmp_path / checkpoint.checkpoint_name(iteration)
        staging = checkpoint.start(target)
        for name, data in FILES.items():
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_bytes(data + content)
        checkpoint.seal(staging, target, meta=dict(iteration=iteration, world_size=1, resumable=True))
        if at is not None:
            edit(target, saved_at=at)
        return target

    return go


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


# ---- looking for damage


def damage_missing(target):
    (target / 'trainer.json').unlink()


def damage_changed(target):
    data = (target / 'model.safetensors').read_bytes()
    (target / 'model.safetensors').write_bytes(data[:50] + b'X' + data[51:])


def damage_truncated(target):
    os.truncate(target / 'model.safetensors', 5)


def damage_no_manifest(target):
    (target / checkpoint.MANIFEST).unlink()


def damage_half_manifest(target):
    os.truncate(target / checkpoint.MANIFEST, 30)


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (damage_missing, 'iter_1.pth: trainer.json is missing'),
        (damage_changed, r'model.safetensors was changed or damaged \(sha256 differs\)'),
        (damage_truncated, 'model.safetensors has 5 bytes, expected 700'),
        (damage_no_manifest, 'has no manifest.json: it was not finished, or vlmtune did not write it'),
        (damage_half_manifest, r'manifest.json is not valid json'),
        (lambda target: edit(target, format='other'), 'does not describe a vlmtune checkpoint'),
        (lambda target: (target / checkpoint.MANIFEST).write_text('[]'), 'does not describe a vlmtune checkpoint'),
        (lambda target: edit(target, version=2), 'has format version 2, this vlmtune reads 1'),
        (lambda target: edit(target, files=...), 'was changed: it lacks what vlmtune writes into it'),
        (lambda target: edit(target, files={'a': 1}), 'was changed: it lacks what vlmtune writes into it'),
        (lambda target: edit(target, world_size=...), 'was changed: it lacks what vlmtune writes into it'),
    ],
)
def test_damage_is_named(damage, message, write):
    target = write(1)
    damage(target)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.verify(target)


def test_what_is_not_there_or_is_a_file(tmp_path):
    with pytest.raises(CheckpointError, match=r'checkpoint /.*/iter_1.pth does not exist'):
        checkpoint.verify(tmp_path / 'iter_1.pth')
    (tmp_path / 'iter_1.pth').write_bytes(b'pickle')
    with pytest.raises(CheckpointError, match=r'iter_1.pth is a file, expected a directory as vlmtune writes it'):
        checkpoint.verify(tmp_path / 'iter_1.pth')


def test_sizes_alone_do_not_see_a_changed_byte(write):
    target = write(1)
    damage_changed(target)
    checkpoint.verify(target, hashes=False)


# ---- the newest one that holds


def test_the_newest_is_the_one_saved_last_not_the_highest_number(write, tmp_path):
    """A new run in an old work dir counts from 1 again."""
    write(900, at=1.0)
    newest = write(2, at=2.0)
    assert checkpoint.find_latest(tmp_path) == checkpoint.Found(newest, ())


def test_broken_ones_are_passed_over_and_it_says_why(write, tmp_path):
    good = write(1, at=1.0)
    damage_changed(write(2, at=2.0))
    damage_no_manifest(write(3))
    (tmp_path / 'iter_4.pth').write_bytes(b'pickle')
    write(5, at=0.5)
    found = checkpoint.find_latest(tmp_path)
    assert found.path == good
    assert len(found.skipped) == 3
    text = '\n'.join(found.skipped)
    assert 'iter_2.pth: model.safetensors was changed' in text
    assert 'iter_3.pth has no manifest.json' in text
    assert 'iter_4.pth is a file' in text


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


# ---- purging


@pytest.mark.parametrize(('keep', 'left'), [(-1, [1, 2, 3, 4]), (3, [2, 3, 4]), (1, [4]), (0, [4]), (9, [1, 2, 3, 4])])
def test_the_newest_stay(keep, left, write, tmp_path):
    for iteration in (1, 2, 3, 4):
        write(iteration, at=float(iteration))
    removed = checkpoint.purge(tmp_path, keep=keep)
    assert names(tmp_path.iterdir()) == [f'iter_{i}.pth' for i in left]
    assert names(removed) == [f'iter_{i}.pth' for i in (1, 2, 3, 4) if i not in left]


def test_broken_ones_do_not_count_as_kept(write, tmp_path):
    """One good checkpoint always stays."""
    write(1, at=1.0)
    damage_truncated(write(2, at=2.0))
    damage_missing(write(3, at=3.0))
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
