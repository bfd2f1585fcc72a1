"""A save that fails costs nothing but itself: the checkpoints before it stay, and the message says what to do."""

import errno
import json
import os

import pytest

from vlmtune.engine import checkpoint
from vlmtune.utils import disk
from vlmtune.utils.errors import CheckpointError

STEPS = dict(max_steps=3, max_epochs=None, save_steps=1)


class FaultyDisk:
    """``os`` whose function ``call`` fails from the k-th save on, when it is called for a path that ends so."""

    def __init__(self, call, *, number=errno.ENOSPC, path=''):
        self.call, self.number, self.path = call, number, path

    def __getattr__(self, name):
        return self.go if name == self.call else getattr(os, name)

    def go(self, first, *args, **kwargs):
        path = os.readlink(f'/proc/self/fd/{first}') if isinstance(first, int) else str(first)
        if 'iter_2.pth' in path and self.path in path:
            raise OSError(self.number, os.strerror(self.number))
        return getattr(os, self.call)(first, *args, **kwargs)


@pytest.mark.parametrize(
    ('fault', 'reason'),
    [
        (FaultyDisk('write', path='model.safetensors'), 'No space left on device'),
        (FaultyDisk('write', path='optimizer_0.safetensors', number=errno.EIO), 'Input/output error'),
        (FaultyDisk('fsync', path='processor', number=errno.EDQUOT), 'Disk quota exceeded'),
        (FaultyDisk('open', path='manifest.json'), 'No space left on device'),
        (FaultyDisk('replace'), 'No space left on device'),
    ],
)
def test_a_disk_that_fails_costs_that_checkpoint_only(fault, reason, run, monkeypatch, tmp_path):
    monkeypatch.setattr(disk, 'os', fault)
    with pytest.raises(CheckpointError) as caught:
        run('a', **STEPS)
    monkeypatch.undo()
    newest = tmp_path / 'a' / 'iter_1.pth'
    assert str(caught.value) == (
        f'checkpoint {tmp_path / "a" / "iter_2.pth"} could not be written: {reason}; the newest good one is {newest}'
    )
    assert checkpoint.find_latest(tmp_path / 'a') == checkpoint.Found(newest, ())
    assert [path.name for path in (tmp_path / 'a').glob('iter_*')] == ['iter_1.pth']
    assert (tmp_path / 'a' / 'last_checkpoint').read_text() == 'iter_1.pth\n'


def test_after_the_disk_has_room_again_the_run_ends_as_if_nothing_had_happened(
    run, contents, differences, monkeypatch, tmp_path
):
    expected = contents(run('whole', **STEPS) / 'iter_3.pth')
    monkeypatch.setattr(disk, 'os', FaultyDisk('write', path='trainer.json'))
    with pytest.raises(CheckpointError):
        run('a', **STEPS)
    monkeypatch.undo()
    assert differences(contents(run('a', resume=True, **STEPS) / 'iter_3.pth'), expected) == []


def test_a_pointer_that_cannot_be_written_leaves_a_checkpoint_that_counts(run, monkeypatch, tmp_path):
    class NoPointer(FaultyDisk):
        def go(self, path, *args):
            if 'last_checkpoint' in str(path):
                raise OSError(errno.ENOSPC, 'No space left on device')
            return os.open(path, *args)

    monkeypatch.setattr(disk, 'os', NoPointer('open'))
    with pytest.raises(CheckpointError, match='iter_1.pth is written, but not all behind it: No space left on device'):
        run('a', **STEPS)
    assert checkpoint.find_latest(tmp_path / 'a').path == tmp_path / 'a' / 'iter_1.pth'


def test_a_run_that_could_never_save_does_not_start(run, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, 'free_bytes', lambda path: 1 << 20)
    with pytest.raises(
        CheckpointError, match='has room for 1.0 MiB, a checkpoint takes about .* MiB, spare room included; make room'
    ):
        run('a', **STEPS)
    assert list((tmp_path / 'a').glob('iter_*')) == []
    assert list((tmp_path / 'a').glob('*/metrics.jsonl')) == []


def test_what_a_checkpoint_will_take_is_known_before_the_first(run, monkeypatch):
    """So that the disk is not full half-way through; the optimizer counts."""
    asked, taken = [], []
    real_check, real_seal = checkpoint.check_space, checkpoint.seal
    monkeypatch.setattr(checkpoint, 'check_space', lambda path, size: (asked.append(size), real_check(path, size)))

    def seal(*args, files, **kwargs):
        taken.append(sum(entry.size for entry in files.values()))
        return real_seal(*args, files=files, **kwargs)

    monkeypatch.setattr(checkpoint, 'seal', seal)
    run('a', max_steps=2, max_epochs=None, save_steps=1)
    assert len(asked) == 3
    assert taken[0] == pytest.approx(asked[0], rel=0.05, abs=100_000)
    assert asked[2] == taken[0]


def test_checkpoints_of_a_run_share_what_does_not_change(run):
    work_dir = run('a', max_steps=2, max_epochs=None, save_steps=1)
    first, second = (checkpoint.verify(work_dir / f'iter_{step}.pth')['files'] for step in (1, 2))
    same = {name for name in first if first[name] == second[name]}
    assert {'config.py', 'adapter_config.json', 'processor/tokenizer.json'} <= same
    assert not {'model.safetensors', 'optimizer_0.safetensors', 'trainer.json', 'rng_0.json'} & same


# ---- two ranks

BREAK_DISK = """
import errno
import os

from mmengine.dist import get_rank
from mmengine.hooks import Hook

from vlmtune.utils import disk


class BreakDisk(Hook):
    def __init__(self, *, rank):
        self.rank = rank

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 2 and get_rank() == self.rank:
            disk.os = Full()


class Full:
    def __getattr__(self, name):
        return self.write if name == 'write' else getattr(os, name)

    def write(self, *_):
        raise OSError(errno.ENOSPC, 'No space left on device')
"""


@pytest.mark.parametrize(('rank', 'strategy'), [(0, 'zero2'), (1, None)])
def test_the_failure_of_one_rank_is_everybodys(rank, strategy, train_in_ranks, write_recipe, run, tmp_path):
    """Rank 0 writes the weights that ZeRO gathers from all: the others must not wait for it.

    And what two ranks have saved resumes on two, and on one with as many packs a step.
    """
    (tmp_path / 'break_disk.py').write_text(BREAK_DISK)
    recipe = write_recipe(tmp_path / 'recipe.py')
    text = recipe.read_text().replace('from vlmtune.models', 'from break_disk import BreakDisk\nfrom vlmtune.models')
    recipe.write_text(f'{text}custom_hooks.append(dict(type=BreakDisk, rank={rank}))\n')
    overrides = dict(accumulative_counts=1, lora_dropout=0.0, **STEPS)
    with pytest.raises(AssertionError) as caught:
        train_in_ranks(2, recipe, work_dir=tmp_path / 'a', deepspeed=strategy, overrides=overrides)
    said = str(caught.value)
    assert said.startswith('[1, 1]')
    assert said.count('iter_3.pth could not be written: No space left on device; the newest good one is') >= 2
    assert 'RankFailed' in said
    work_dir = tmp_path / 'a'
    assert sorted(path.name for path in work_dir.glob('iter_*')) == ['iter_1.pth', 'iter_2.pth']
    (work_dir / 'iter_2.pth' / 'rng_1.json').write_text('')
    recipe.write_text(text)
    train_in_ranks(2, recipe, work_dir=work_dir, deepspeed=strategy, resume=True, overrides=overrides)
    assert checkpoint.verify(work_dir / 'iter_3.pth')['world_size'] == 2
    one = run('one', resume=str(work_dir / 'iter_1.pth'), **{**overrides, 'accumulative_counts': 2})
    two, one = (json.loads((path / 'iter_3.pth' / 'trainer.json').read_text()) for path in (work_dir, one))
    assert (one['sampler'], one['iteration']) == (two['sampler'], two['iteration'])
    assert one['messages']['train/loss']['values'] == pytest.approx(two['messages']['train/loss']['values'], rel=1e-5)
    assert one['messages']['train/lr'] == two['messages']['train/lr']
