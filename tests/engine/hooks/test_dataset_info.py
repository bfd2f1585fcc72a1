"""The log shows one sample as the model gets it."""

import re

import pytest

from vlmtune.data import Processor, SupervisedDataset, chat_template_map_fn, llava_map_fn, load_rows
from vlmtune.engine.hooks.dataset_info import DatasetInfoHook, describe_sample
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
    assert re.search(r'\d+ of them learned; (9|10) packs or batches and 5 optimizer steps per epoch', caplog.text)
    assert caplog.text.count('ASSISTANT:⟦ The square is') == 1


class _Runner:
    """As much of a runner as the hook looks at."""

    rank = 0

    def __init__(self, dataset):
        self.train_dataloader = type('Loader', (), {'dataset': dataset})
        self.train_loop = type('Loop', (), {'sampler': type('Sampler', (), {'plan': [], '__len__': lambda _: 0})()})


def test_a_sample_that_is_not_there(dataset):
    with pytest.raises(ConfigError, match='DatasetInfoHook: index=17, but the data set has 17 samples'):
        DatasetInfoHook(index=17).before_train(_Runner(dataset))
