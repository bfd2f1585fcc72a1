"""A run goes on under other settings, from a checkpoint of other ranks, and from none that somebody made up."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from vlmtune.apps.train import train
from vlmtune.utils.disk import hash_file
from vlmtune.utils.errors import CheckpointError

# ---- another number of packs a step, another optimizer


@pytest.fixture(scope='module')
def every_step(module_run):
    """Nine packs an epoch, two a step; saved after every step of two epochs."""
    return module_run('every_step', save_steps=1)


@pytest.fixture(scope='module')
def module_run(write_recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp('resume')

    def go(name, **overrides):
        train(str(write_recipe(folder / 'recipe.py')), work_dir=str(folder / name), overrides=overrides)
        return folder / name

    return go


def rates(checkpoint):
    return json.loads((checkpoint / 'trainer.json').read_text())['messages']['train/lr']['values']


def test_epochs_go_on_where_the_data_stands_when_steps_change_their_size(run, every_step, caplog):
    """Step 6 of 10 is step 11 of 18: nine packs of the first epoch are learned and two of the second."""
    expected = rates(run('small', accumulative_counts=1) / 'iter_18.pth')
    with caplog.at_level('INFO', 'vlmtune'):
        resumed = run('next', resume=str(every_step / 'iter_6.pth'), accumulative_counts=1)
    trainer = json.loads((resumed / 'iter_18.pth' / 'trainer.json').read_text())
    assert 'a step of this run takes 1 packs, one of the checkpoint 2: its 6 steps count as 11' in caplog.text
    assert trainer['sampler']['epoch'] == 1
    assert rates(resumed / 'iter_18.pth')[-7:] == expected[-7:]
    assert len(set(expected)) > 15


def test_steps_go_on_counting_when_it_is_steps_that_end_the_run(run, every_step):
    resumed = run('next', resume=str(every_step / 'iter_6.pth'), accumulative_counts=1, max_steps=9, max_epochs=None)
    trainer = json.loads((resumed / 'iter_9.pth' / 'trainer.json').read_text())
    assert (trainer['sampler']['epoch'], trainer['sampler']['consumed']) == (1, 2 + 3)
    assert len(trainer['messages']['train/loss']['values']) == 9


def test_reset_optimizer_goes_on_without_moments(run, every_step, contents, caplog):
    """Iteration, data and schedule are those of the checkpoint."""
    usual = contents(run('usual', resume=str(every_step / 'iter_6.pth'), save_steps=1) / 'iter_7.pth')
    reset = contents(
        run('reset', resume=str(every_step / 'iter_6.pth'), save_steps=1, reset_optimizer=True) / 'iter_7.pth'
    )
    assert 'reset_optimizer: the optimizer starts without the moments of' in caplog.text
    assert reset['trainer']['sampler'] == usual['trainer']['sampler']
    for name in ('train/loss', 'train/lr'):
        assert reset['messages'][name] == usual['messages'][name]
    assert any(not torch.equal(reset['weights'][name], usual['weights'][name]) for name in usual['weights'])
    steps = [number['numbers']['step'] for number in reset['optimizer']['optimizer_0.safetensors']['numbers']['units']]
    assert set(steps) == {1}


def test_reset_optimizer_takes_another_optimizer(run, every_step):
    options = dict(recipe=dict(optimizer='SGD'), lr=1e-3, save_steps=1)
    resumed = run('next', resume=str(every_step / 'iter_6.pth'), reset_optimizer=True, **options)
    assert rates(resumed / 'iter_10.pth')[-4:] == rates(run('fresh', **options) / 'iter_10.pth')[-4:]


def test_a_schedule_that_was_changed_takes_effect_at_the_step_of_the_checkpoint(run, every_step, caplog):
    """As when a run is made longer."""
    longer = dict(max_epochs=3, lr=5e-3, horizon=3)
    expected = rates(run('longer', **longer) / 'iter_15.pth')
    resumed = run('next', resume=str(every_step / 'iter_6.pth'), **longer)
    assert rates(resumed / 'iter_15.pth') == rates(every_step / 'iter_6.pth') + expected[6:]
    assert 'the schedules are those of this config, at this step: ' in caplog.text
    assert 'learning rates [0.005, 0.005, 0.005], not [0.01, 0.01, 0.01]' in caplog.text


def test_settings_of_the_optimizer_that_do_not_take_effect_are_named(run, every_step, write_recipe, tmp_path, caplog):
    recipe = write_recipe(tmp_path / 'other.py')
    text = recipe.read_text().replace('lr=lr)', 'lr=lr, weight_decay=0.5, betas=[0.8, 0.9])')
    recipe.write_text(text)
    train(str(recipe), work_dir=str(tmp_path / 'next'), resume=str(every_step / 'iter_9.pth'))
    assert 'goes on with its own weight_decay=0.0, not 0.5; --reset-optimizer takes this' in caplog.text
    assert 'goes on with its own betas=(0.9, 0.999), not (0.8, 0.9)' in caplog.text
    assert 'schedules are those' not in caplog.text


# ---- checkpoints that somebody made up


def forge(checkpoint, name, change):
    """Change a json file, and the manifest so that it holds."""
    path, manifest = checkpoint / name, json.loads((checkpoint / 'manifest.json').read_text())
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))
    manifest['files'][name] = dict(size=path.stat().st_size, sha256=hash_file(path))
    (checkpoint / 'manifest.json').write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ('name', 'change', 'message'),
    [
        ('trainer.json', lambda c: [1], 'trainer.json was changed: it lacks what vlmtune writes'),
        (
            'trainer.json',
            lambda c: c['sampler'].update(consumed=10**9),
            'stands at pack 1000000000 of epoch 1, which has',
        ),
        ('trainer.json', lambda c: {**c, 'sampler': {}}, 'trainer.json was changed: KeyError'),
        ('trainer.json', lambda c: c.update(messages={'a': 'b'}), 'trainer.json was changed: TypeError'),
        ('rng_0.json', lambda c: c.update(torch=[1, 2]), 'rng_0.json was changed'),
        ('rng_0.json', lambda c: c.update(python='x'), 'rng_0.json was changed: ValueError'),
    ],
)
def test_values_that_vlmtune_never_writes(name, change, message, run, every_step, tmp_path):
    checkpoint = tmp_path / 'iter_6.pth'
    shutil.copytree(every_step / 'iter_6.pth', checkpoint)
    forge(checkpoint, name, change)
    with pytest.raises(CheckpointError, match=message):
        run('next', resume=str(checkpoint))


def test_files_that_were_added_are_refused(run, every_step, tmp_path):
    checkpoint = tmp_path / 'iter_6.pth'
    shutil.copytree(every_step / 'iter_6.pth', checkpoint)
    shutil.copy(checkpoint / 'optimizer_0.safetensors', checkpoint / 'optimizer_1.safetensors')
    with pytest.raises(CheckpointError, match='optimizer_1.safetensors was added after it was saved; remove it'):
        run('next', resume=str(checkpoint))


def test_a_rank_without_generators_of_its_own_is_seeded_and_told_so(run, every_step, tmp_path, caplog):
    """As when there are more ranks than before."""
    ends = []
    for name in ('a', 'b'):
        checkpoint = tmp_path / name / 'iter_9.pth'
        shutil.copytree(every_step / 'iter_9.pth', checkpoint)
        manifest = json.loads((checkpoint / 'manifest.json').read_text())
        del manifest['files']['rng_0.json']
        (checkpoint / 'manifest.json').write_text(json.dumps({**manifest, 'world_size': 3}))
        with caplog.at_level('INFO', 'vlmtune'):
            ends.append(load_file(run(f'next_{name}', resume=str(checkpoint)) / 'iter_10.pth' / 'model.safetensors'))
    assert 'rank 0 has no random generators in' in caplog.text
    assert 'saved by 3 processes, this run has 1' in caplog.text
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
