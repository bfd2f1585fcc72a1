"""An interrupted run ends with the bits of one that was not; what does not fit the checkpoint is an error."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from vlmtune.utils.errors import CheckpointError


def interrupt(whole, path, *, after):
    """A work dir as a run that was killed behind step ``after`` leaves it."""
    shutil.copytree(whole, path)
    for checkpoint in path.glob('iter_*.pth'):
        if int(checkpoint.stem.removeprefix('iter_')) > after:
            shutil.rmtree(checkpoint)
    return path


@pytest.mark.parametrize('pack', [True, False], ids=['packed', 'padded'])
@pytest.mark.parametrize('workers', [0, 2])
def test_resume_is_exact(pack, workers, run, contents, differences, tmp_path):
    """Dropout, two micro-batches a step; interrupted in the middle of an epoch, at its end, and in the next one."""
    settings = dict(dataloader_num_workers=workers, pack_to_max_length=pack, save_steps=1)
    whole = run('whole', **settings)
    expected = contents(max(whole.glob('iter_*.pth'), key=lambda p: int(p.stem[5:])))
    last = expected['trainer']['iteration']
    per_epoch = last // 2
    assert len(expected['messages']['train/loss']['values']) == last >= 10
    for after in (2, per_epoch, per_epoch + 1) if workers == 0 else (per_epoch - 2,):
        resumed = interrupt(whole, tmp_path / f'killed{after}', after=after)
        run(resumed.name, resume=True, **settings)
        assert differences(contents(resumed / f'iter_{last}.pth'), expected) == []


def test_resume_from_an_explicit_checkpoint(run, contents, differences):
    whole = run('whole', save_steps=2, max_steps=4, max_epochs=None)
    run('other', resume=str(whole / 'iter_2.pth'), save_steps=2, max_steps=4, max_epochs=None)
    ends = [contents(whole.parent / name / 'iter_4.pth') for name in ('whole', 'other')]
    assert differences(*ends) == []


def test_the_same_seed_repeats_a_run_and_another_does_not(run, contents, differences):
    first, second, other = (
        contents(run(name, seed=seed, max_steps=3, max_epochs=None) / 'iter_3.pth')
        for name, seed in (('a', 1), ('b', 1), ('c', 2))
    )
    assert differences(first, second) == []
    assert differences(first['weights'], other['weights'])
    assert first['trainer']['sampler']['plan'] != other['trainer']['sampler']['plan']


def test_resuming_a_finished_run_changes_nothing_and_says_so(run, contents, differences, caplog):
    done = run('done', max_steps=2, max_epochs=None)
    before = contents(done / 'iter_2.pth')
    assert 'nothing is left to train' not in caplog.text
    run('done', resume=True, max_steps=2, max_epochs=None)
    assert 'nothing is left to train: iteration 2 of 2 is done' in caplog.text
    assert differences(contents(done / 'iter_2.pth'), before) == []


def test_nothing_to_resume_starts_fresh_and_says_so(run, caplog):
    with caplog.at_level('INFO', 'vlmtune'):
        work_dir = run('fresh', resume=True, max_steps=1, max_epochs=None)
    assert f'nothing to resume in {work_dir}: starting fresh' in caplog.text
    assert (work_dir / 'iter_1.pth').is_dir()


def test_a_broken_newest_checkpoint_is_passed_over_and_named(run, contents, differences, caplog):
    settings = dict(save_steps=1, max_steps=3, max_epochs=None)
    whole = run('whole', **settings)
    expected = contents(whole / 'iter_3.pth')
    (whole / 'iter_3.pth' / 'model.safetensors').write_bytes(b'cut')
    (whole / 'iter_2.pth' / 'manifest.json').unlink()
    with caplog.at_level('INFO', 'vlmtune'):
        run('whole', resume=True, **settings)
    assert 'passed over a broken checkpoint' in caplog.text
    assert 'model.safetensors has 3 bytes' in caplog.text
    assert 'iter_2.pth has no manifest.json' in caplog.text
    assert 'iter_1.pth at iteration 1 of 3' in caplog.text
    assert differences(contents(whole / 'iter_3.pth'), expected) == []


@pytest.mark.parametrize('how', ['resume', 'load_from'])
def test_a_broken_path_is_found_before_anything_is_loaded(how, run):
    done = run('done', max_steps=1, max_epochs=None) / 'iter_1.pth'
    (done / 'model.safetensors').write_bytes(b'cut')
    for path in (done, done.parent / 'iter_9.pth', done.parent):
        how_to = dict(resume=str(path)) if how == 'resume' else dict(load_from=str(path))
        with pytest.raises(CheckpointError):  # not the ModelError of a model that is not there
            run('next', pretrained_model_name_or_path='/nowhere', **how_to)


def test_the_folder_of_checkpoints_is_not_one(run):
    work_dir = run('done', max_steps=1, max_epochs=None)
    with pytest.raises(CheckpointError, match=r'done is a work dir, expected a checkpoint: resume from .*iter_1\.pth$'):
        run('next', resume=str(work_dir), data_path='/no/data.json')


# ---- runs that do not fit the checkpoint


@pytest.fixture
def finished(run):
    return run('done', max_steps=1, max_epochs=None) / 'iter_1.pth'


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(seed=8), 'the data of this run is not that of the checkpoint'),
        (dict(max_length=90), 'the data of this run is not that of the checkpoint'),
        (
            dict(tune={'projector': 'full'}),
            'the checkpoint does not fit the tuned parts: 0 tensors are missing .*use the config',
        ),
        (dict(lora_r=2), r'is \(4, 64\) in the checkpoint, \(2, 64\) here|in the checkpoint'),
        (
            dict(recipe=dict(optimizer='SGD')),
            r'holds the state of AdamW .*; this run has SGD .*; use the config that made it, or --reset-optimizer',
        ),
    ],
)
def test_what_does_not_fit_is_an_error(changes, message, run, finished):
    with pytest.raises(CheckpointError, match=message):
        run('next', resume=str(finished), max_steps=2, max_epochs=None, **changes)


def test_weights_alone_cannot_be_resumed_but_started_from(run, caplog):
    done = run('done', save_optimizer=False, max_steps=1, max_epochs=None) / 'iter_1.pth'
    assert list(done.glob('optimizer*')) == []
    assert 'save_optimizer=False: checkpoints hold weights only' in caplog.text
    with pytest.raises(CheckpointError, match=r'holds weights only .*; use load_from to start from them'):
        run('next', resume=str(done), data_path='/no/data.json')  # before any data is read
    with pytest.raises(CheckpointError, match=r'iter_1.pth holds weights only .*; use load_from'):
        run('done', resume=True, data_path='/no/data.json')
    again = run('again', load_from=str(done), max_steps=1, max_epochs=None, lr=0.0) / 'iter_1.pth'
    before, after = (load_file(path / 'model.safetensors') for path in (done, again))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_work_dir_that_was_moved_resumes(run, contents, differences, tmp_path):
    settings = dict(save_steps=1, max_steps=3, max_epochs=None)
    whole = run('whole', **settings)
    expected = contents(whole / 'iter_3.pth')
    shutil.rmtree(whole / 'iter_3.pth')
    (whole / 'last_checkpoint').write_text('iter_2.pth\n')
    whole.rename(tmp_path / 'moved')
    moved = run('moved', resume=True, **settings)
    assert differences(contents(moved / 'iter_3.pth'), expected) == []
    assert not whole.exists()


def test_nothing_to_resume_and_weights_to_load(run, finished, caplog):
    with caplog.at_level('INFO', 'vlmtune'):
        work_dir = run('next', resume=True, load_from=str(finished), max_steps=1, max_epochs=None, lr=0.0)
    assert 'weights loaded' in caplog.text or str(finished) in caplog.text
    before, after = (load_file(path / 'model.safetensors') for path in (finished, work_dir / 'iter_1.pth'))
    assert all(torch.equal(before[name], after[name]) for name in before)
