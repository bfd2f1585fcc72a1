"""Mistakes that need no data and no weights are told before either is read, and an earlier run is left alone."""

import os
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.hooks import EMAHook, EmptyCacheHook, Hook, SyncBuffersHook

from vlmtune.data import Processor
from vlmtune.engine.precheck import check_called, check_new_tokens, check_work_dir
from vlmtune.utils.errors import ConfigError, UserError


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(tune=dict(llmm='full')), "unknown 'llmm'"),
        (dict(tune=dict(llm='loora')), "'loora' is not one of"),
        ({'model.quantization': 'nf5'}, "quantization='nf5' is unknown"),
        ({'model.dtype': 'fp16'}, "dtype='fp16' is not supported"),
        ({'model.quantization': 'nf4', 'tune': dict(llm='full')}, 'needs a frozen llm'),
    ],
    ids=['part', 'mode', 'quantization', 'dtype', 'contradiction'],
)
def test_settings_are_checked_before_the_data(changes, message, run, tmp_path):
    with pytest.raises(UserError, match=message):
        run('wrong', data_path='/no/data.json', **changes)
    assert not (tmp_path / 'wrong').exists()


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(vision_cache=True), 'vision_cache=True: expected a folder'),
        (dict(vision_cache='/no/cache', tune=dict(vision_encoder='full')), 'vision_cache: the vision encoder trains'),
        (
            {'vision_cache': '/no/cache', 'train_dataloader.dataset.type': 'vlmtune.data.StreamingDataset'},
            'the images of a StreamingDataset are not known beforehand',
        ),
        (
            {
                'vision_cache': '/no/cache',
                'train_dataloader.dataset.image_transform': dict(type='vlmtune.data.color_jitter', hue=0.1),
            },
            'cannot follow image_transform, which changes the images in every epoch; remove one of the two',
        ),
    ],
    ids=['word', 'trains', 'stream', 'augmented'],
)
def test_a_vision_cache_that_cannot_be_is_told_before_the_data(changes, message, run):
    with pytest.raises(ConfigError, match=message):
        run('cached', data_path='/no/data.json', **changes)


@pytest.mark.parametrize('name', ['points', 'minicpmv2'])
def test_new_tokens_that_no_export_could_write(name, tiny_model, caplog):
    """An export of these families copies the tokenizer of the base."""
    processor = Processor(str(tiny_model(name)), new_tokens=['<cell>'])

    def check(llm):
        check_new_tokens(
            Config(dict(model=dict(tune=dict(llm=llm, embeddings='full', lm_head='full')))), processor=processor
        )

    with pytest.raises(ConfigError, match=r"^'<cell>' is new to .*: nothing could be exported; tune the llm by lora"):
        check('full')
    check('lora')
    assert 'the adapter will work unmerged, but cannot be merged' in caplog.text


@pytest.mark.parametrize('name', ['internvl_chat', 'qwen2_vl'])
def test_new_tokens_that_an_export_can_write(name, tiny_model, caplog):
    tune = dict(llm='full', embeddings='full', lm_head='full')
    processor = Processor(str(tiny_model(name)), new_tokens=['<cell>'])
    check_new_tokens(Config(dict(model=dict(tune=tune))), processor=processor)
    assert 'merged' not in caplog.text


class OnlyWhereNobodyCalls(Hook):
    """As written for mmengine's own validation loop."""

    def after_val_epoch(self, runner, metrics=None):
        """Would look at the scores."""

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Would look at the answers."""


def test_a_hook_that_would_never_be_called_is_told_before_the_data(run):
    told = 'OnlyWhereNobodyCalls: vlmtune never calls after_val_iter, after_val_epoch; .* after_val'
    with pytest.raises(ConfigError, match=told):
        run('unheard', data_path='/no/data.json', custom_hooks=[dict(type=OnlyWhereNobodyCalls)])


class Counted(Hook):
    """Notes how often one was built."""

    built = 0

    def __init__(self):
        Counted.built += 1


def test_a_hook_is_built_once(run):
    run('once', max_steps=1, max_epochs=None, custom_hooks=[dict(type=f'{__name__}.Counted')])
    assert Counted.built == 1


def test_a_hook_that_is_called_in_part_is_told_and_others_are_not(caplog):
    check_called(EmptyCacheHook())
    assert not caplog.text
    check_called(SyncBuffersHook())
    assert 'SyncBuffersHook: vlmtune never calls before_val_epoch; ' in caplog.text
    with pytest.raises(
        ConfigError, match='EMAHook: vlmtune never calls after_load_checkpoint, before_save_checkpoint; '
    ):
        check_called(EMAHook())


def test_a_new_run_leaves_the_checkpoints_of_an_earlier_one_alone(run):
    work_dir = run('done', max_steps=2, max_epochs=None, save_steps=1)
    before = sorted(path.name for path in work_dir.iterdir())
    with pytest.raises(ConfigError, match=r'holds iter_2\.pth of an earlier run; add --resume'):
        run('done', max_steps=1, max_epochs=None)
    assert sorted(path.name for path in work_dir.iterdir()) == before


def test_a_resume_from_elsewhere_leaves_the_checkpoints_of_an_earlier_run_alone(run):
    short = dict(max_steps=1, max_epochs=None)
    first, other = run('first', **short), run('other', **short)
    with pytest.raises(ConfigError, match=r'other holds iter_1\.pth of an earlier run; say --resume without a path'):
        run('other', resume=str(first / 'iter_1.pth'), **short | dict(max_steps=2))
    assert not (other / 'iter_2.pth').exists()
    run('first', resume=str(other / '..' / 'first' / 'iter_1.pth'), **short | dict(max_steps=2))
    assert (first / 'iter_2.pth').exists()
    moved = (first / 'iter_2.pth').rename(other / 'moved')  # to a larger disk
    (first / 'iter_2.pth').symlink_to(moved)
    check_work_dir(str(first), resume=str(first / 'iter_2.pth'))


def test_a_work_dir_that_is_a_file(run, tmp_path):
    (tmp_path / 'taken').write_text('x')
    with pytest.raises(ConfigError, match='is a file'):
        run('taken', max_steps=1, max_epochs=None)


def test_a_work_dir_that_cannot_be_written_is_told_before_the_data(run, tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'access', lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    with pytest.raises(ConfigError, match=r'closed/run: .* may not be written to; choose another --work-dir'):
        run('closed/run', data_path='/no/data.json')
    (tmp_path / 'taken').write_text('x')
    with pytest.raises(ConfigError, match=r'taken/run: .*taken is no folder; choose another --work-dir'):
        run('taken/run', data_path='/no/data.json')


def test_a_resume_says_that_it_takes_another_learning_rate(run, caplog):
    run('done', max_steps=1, max_epochs=None)
    with caplog.at_level('INFO', 'vlmtune'):
        run('done', max_steps=2, max_epochs=None, lr=0.5, resume=True)
    assert 'learning rates [0.5, 0.5, 0.5], not [0.01, 0.01, 0.01]' in caplog.text
