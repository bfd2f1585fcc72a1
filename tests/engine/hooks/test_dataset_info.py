"""The log shows one sample as the model gets it."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from vlmtune.data import Processor, SupervisedDataset, chat_template_map_fn, llava_map_fn, load_rows
from vlmtune.engine.hooks.dataset_info import DatasetInfoHook, describe_data, describe_sample
from vlmtune.utils.errors import ConfigError


@pytest.fixture
def dataset(tiny_model, tiny_data):
    data = tiny_data('llava', rows=17)
    return SupervisedDataset(
        load_rows(data.data_path),
        processor=Processor(str(tiny_model('llava')), prompt_template='vicuna'),
        dataset_map_fn=llava_map_fn,
        template_map_fn=chat_template_map_fn,
        image_folder=str(data.image_folder),
    )


def test_learned_parts_are_marked_and_image_tokens_counted(dataset):
    colour = dataset.rows[0]['conversations'][1]['value']
    assert describe_sample(dataset.samples[0], processor=dataset.processor) == (
        f'<s>USER: [9 image tokens]\nWhat colour is the square? ASSISTANT:⟦ {colour}</s>⟧'
    )
    several = describe_sample(dataset.samples[3], processor=dataset.processor)
    assert several.count('⟦') == several.count('⟧') == 3
    assert '⟦ You are welcome.</s>⟧' in several


def test_a_text_model(tiny_model, tiny_data):
    processor = Processor(str(tiny_model('qwen2')))
    dataset = SupervisedDataset(
        load_rows(tiny_data('llava', rows=1, images=False).data_path),
        processor=processor,
        dataset_map_fn=llava_map_fn,
        template_map_fn=chat_template_map_fn,
    )
    text = describe_sample(dataset.samples[0], processor=processor)
    assert text.startswith('<|im_start|>system\n')
    assert text.endswith('<|im_end|>⟧\n')


def test_a_run_logs_it_once(run, caplog):
    with caplog.at_level('INFO', 'vlmtune'):
        run('logged', max_steps=1, max_epochs=None)
    assert '17 samples, ' in caplog.text
    assert re.search(r'[\d,]+ tokens, \d+ of them learned; 13 with images, \d+ patches; left out: 0 bad', caplog.text)
    assert re.search(r'; (9|10) packs or batches and 5 optimizer steps per epoch', caplog.text)
    assert caplog.text.count('ASSISTANT:⟦ The square is') == 1
    assert caplog.text.count('images go through ') == 1


def test_a_sample_that_is_not_there(dataset):
    loop = SimpleNamespace(sampler=type('Sampler', (), {'plan': [], '__len__': lambda _: 0})())
    runner = SimpleNamespace(rank=0, train_dataloader=SimpleNamespace(dataset=dataset), train_loop=loop)
    with pytest.raises(ConfigError, match='DatasetInfoHook: index=17, but the data set has 17 samples'):
        DatasetInfoHook(index=17).before_train(runner)


class _Untouched(list):
    """Samples of which none may be read."""

    def __iter__(self):
        raise AssertionError('a walk over all samples')


def test_numbers_come_from_the_plan_alone():
    planned = type('Planned', (), {'__len__': lambda _: 3})()
    planned.lengths, planned.supervised = np.array([5, 6, 7]), np.array([1, 2, 3])
    planned.patches, planned.samples = np.array([0, 4, 8]), _Untouched()
    planned.bad_samples, planned.overlong_samples, planned.truncated = ['bad'], ['long'] * 2, 4
    assert describe_data(planned) == (
        '3 samples, 18 tokens, 6 of them learned; 2 with images, 12 patches; left out: 1 bad, 2 over-long; 4 shortened'
    )


def test_of_a_stream_the_first_sample_is_shown(dataset, caplog):
    sampler = SimpleNamespace(current_packs=lambda: [[SimpleNamespace(sample='seventh')]])
    stream = SimpleNamespace(samples={'seventh': dataset.samples[0]}, where={'seventh': 'rows:7'}.get)
    runner = SimpleNamespace(
        rank=0,
        train_dataloader=SimpleNamespace(dataset=stream),
        train_loop=SimpleNamespace(sampler=sampler),
        processor=dataset.processor,
    )
    hook = DatasetInfoHook()
    with caplog.at_level('INFO', 'vlmtune'):
        hook.before_train(runner)
        hook.before_train_iter(runner, 0)
        hook.before_train_iter(runner, 1)
    assert caplog.text.count('rows:7 (') == caplog.text.count('ASSISTANT:⟦') == 1
