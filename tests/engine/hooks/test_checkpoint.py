"""Checkpoints come every N optimizer steps and at the end; old ones go when a new one is safe."""

import json

import pytest

from vlmtune.engine import CheckpointHook
from vlmtune.engine.checkpoint import verify


def saved(work_dir):
    return sorted(int(path.stem[5:]) for path in work_dir.glob('iter_*.pth'))


@pytest.mark.parametrize(
    ('interval', 'keep', 'left'), [(2, -1, [2, 4, 5]), (2, 2, [4, 5]), (1, 1, [5]), (100, -1, [5]), (5, 3, [5])]
)
def test_when_and_how_many(interval, keep, left, run):
    work_dir = run('done', max_steps=5, max_epochs=None, recipe=dict(tune=dict(projector='full')),
                   save_steps=interval, save_total_limit=keep)  # fmt: skip
    assert saved(work_dir) == left
    assert (work_dir / 'last_checkpoint').read_text() == 'iter_5.pth\n'


def test_what_a_checkpoint_holds(run):
    checkpoint = run('done', max_steps=2, max_epochs=None) / 'iter_2.pth'
    manifest = verify(checkpoint)
    assert {name for name in manifest['files'] if not name.startswith('processor/')} == {
        'model.safetensors',
        'optimizer_0.safetensors',
        'trainer.json',
        'rng_0.json',
        'config.py',
        'adapter_config.json',
    }
    assert (manifest['iteration'], manifest['world_size'], manifest['resumable']) == (2, 1, True)
    assert {'processor/tokenizer.json', 'processor/preprocessor_config.json'} <= manifest['files'].keys()
    trainer = json.loads((checkpoint / 'trainer.json').read_text())
    assert (trainer['iteration'], trainer['seed']) == (2, 7)


def test_work_dir_full_of_another_programs_checkpoints(run, tmp_path):
    """They are neither read nor removed."""
    (tmp_path / 'shared').mkdir()
    (tmp_path / 'shared' / 'iter_1.pth').write_bytes(b'pickle')
    work_dir = run('shared', resume=True, max_steps=4, max_epochs=None, save_steps=2, save_total_limit=1)
    assert saved(work_dir) == [1, 4]
    assert (work_dir / 'iter_1.pth').read_bytes() == b'pickle'


def test_a_resume_finishes_what_a_kill_behind_a_save_left(run):
    """The new checkpoint has its name, the pointer and the old ones are as before."""
    settings = dict(max_steps=4, max_epochs=None, save_steps=1)
    work_dir = run('done', **settings)
    (work_dir / 'last_checkpoint').write_text('iter_3.pth\n')
    run('done', resume=True, **settings, save_total_limit=2)
    assert saved(work_dir) == [3, 4]
    assert (work_dir / 'last_checkpoint').read_text() == 'iter_4.pth\n'


def test_weights_alone_say_so_every_time(run, caplog):
    with caplog.at_level('INFO', 'vlmtune'):
        work_dir = run('done', max_steps=2, max_epochs=None, save_steps=1, save_optimizer=False)
    assert 'save_optimizer=False: checkpoints hold weights only, this run cannot be resumed' in caplog.text
    for step in (1, 2):
        assert f'saved {work_dir / f"iter_{step}.pth"} (weights only: it cannot be resumed)' in caplog.text
        assert verify(work_dir / f'iter_{step}.pth')['resumable'] is False


def test_a_step_that_is_saved_is_not_saved_again(run, monkeypatch):
    """A signal may come in the step after which a checkpoint is due: the loop then asks the hook for another."""
    times = []

    def save_twice(hook, runner, *args, **kwargs):
        real(hook, runner, *args, **kwargs)
        times.append([verify(hook.save(runner))['saved_at'] for _ in range(2)])

    real = CheckpointHook.after_train_iter
    monkeypatch.setattr(CheckpointHook, 'after_train_iter', save_twice)
    work_dir = run('done', max_steps=3, max_epochs=None, save_steps=2)
    assert [first == second for first, second in times] == [True] * 3
    assert saved(work_dir) == [1, 2, 3]
