"""Several data sets as one: how often each is seen, and that each keeps its own settings."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from vlmtune.data import (
    MixedDataset,
    StreamingDataset,
    SupervisedDataset,
    alpaca_map_fn,
    build_train_loader,
    chat_template_map_fn,
    llava_map_fn,
    load_rows,
)
from vlmtune.registry import DATASETS
from vlmtune.structures import IGNORE_INDEX, SampleKey
from vlmtune.utils.errors import CheckpointError, ConfigError, DataError


@pytest.fixture(scope='module')
def mine(processor):
    return processor('llava', prompt_template='vicuna')


def text_rows(count, *, of):
    """Rows of two turns that say which data set they are from."""
    turns = [('human', 'First?'), ('gpt', f'first {of}'), ('human', 'Second?'), ('gpt', f'second {of}')]
    talk = [{'from': who, 'value': text} for who, text in turns]
    return [{'id': str(i), 'conversations': talk} for i in range(count)]


@pytest.fixture
def member(tmp_path):
    """``member('a', 4, loss='last_turn', max_length=64)``: the config of one data set, over a file a.json."""

    def config(name, count, *, loss='all_turns', bad=0, **settings):
        path = tmp_path / f'{name}.json'
        path.write_text(json.dumps([{'id': 'bad'}] * bad + text_rows(count, of=name)))
        template = dict(type=chat_template_map_fn, loss=loss)
        options = dict(dataset_map_fn=dict(type=llava_map_fn), template_map_fn=template, max_length=128)
        rows = dict(type=load_rows, path=str(path))
        return {**dict(type=SupervisedDataset, rows=rows), **options, **settings}

    return config


@pytest.fixture
def mix(mine):
    def build(*members, **settings):
        config = dict(type=MixedDataset, datasets=list(members), **settings)
        return DATASETS.build(config, default_args=dict(processor=mine))

    return build


def seen(dataset, *, seed=0, epoch=0):
    """How often every sample comes in an epoch."""
    return np.bincount(dataset.epoch_samples(seed=seed, epoch=epoch), minlength=len(dataset)).tolist()


# ---- how often


def test_two_and_a_half_means_two_and_a_half(member, mix):
    dataset = mix(member('a', 3), member('b', 10), repeats=[1, 2.5])
    times = seen(dataset)
    assert times[:3] == [1, 1, 1]
    assert Counter(times[3:]) == {2: 5, 3: 5}
    assert dataset.counts == [3, 25]


def test_the_half_is_another_one_in_another_epoch(member, mix):
    """Over many epochs every sample comes equally often: 2.5 times, with a standard error of 0.05 here."""
    dataset = mix(member('a', 3), member('b', 10), repeats=[1, 2.5])
    epochs = [seen(dataset, epoch=epoch)[3:] for epoch in range(100)]
    assert len(set(map(tuple, epochs))) > 50
    assert np.mean(epochs, axis=0) == pytest.approx([2.5] * 10, abs=0.25)
    assert seen(dataset, epoch=3) == seen(dataset, epoch=3) != seen(dataset, epoch=3, seed=1)


def test_members_draw_independently(member, mix):
    dataset = mix(member('a', 10), member('b', 10), repeats=[0.5, 0.5])
    halves = [np.array_split(seen(dataset, epoch=epoch), 2) for epoch in range(5)]
    assert any((a != b).any() for a, b in halves)


def test_less_than_once(member, mix):
    assert Counter(seen(mix(member('a', 10), repeats=[0.3]))) == {0: 7, 1: 3}


def test_once_if_nothing_is_said(member, mix):
    assert mix(member('a', 3), member('b', 2)).epoch_samples(seed=0, epoch=0).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ('total', 'counts'),
    [(None, [7, 3]), (100, [70, 30]), (5, [4, 1])],  # 3.5 rounds to even: 4
)
def test_weights_are_shares_of_the_epoch(total, counts, member, mix):
    dataset = mix(member('a', 2), member('b', 8), weights=[0.7, 0.3], samples_per_epoch=total)
    times = seen(dataset)
    assert [sum(times[:2]), sum(times[2:])] == counts
    assert max(times[:2]) - min(times[:2]) <= 1
    assert max(times[2:]) - min(times[2:]) <= 1


def test_weights_need_not_sum_to_one(member, mix):
    assert mix(member('a', 2), member('b', 8), weights=[7, 3]).counts == [7, 3]


def test_epoch_samples_fit_what_was_asked_for_exactly(member, mix):
    dataset = mix(*[member(name, 3) for name in 'abc'], weights=[1, 1, 1], samples_per_epoch=10)
    assert sum(dataset.counts) == len(dataset.epoch_samples(seed=0, epoch=0)) == 10


# ---- each member's own settings


def learned(dataset, index, processor):
    labels = dataset[SampleKey(0, index)]['labels']
    return processor.tokenizer.decode(labels[labels != IGNORE_INDEX]).replace('</s>', '').split()


def test_each_member_has_its_own_loss_rule(member, mix, mine):
    dataset = mix(member('a', 1, loss='last_turn'), member('b', 1, loss='first_turn'), member('c', 1))
    assert learned(dataset, 0, mine) == ['second', 'a']
    assert learned(dataset, 1, mine) == ['first', 'b']
    assert learned(dataset, 2, mine) == ['first', 'c', 'second', 'c']


def test_formats_and_image_folders_differ(member, mix, mine, tiny_data):
    seen_data = tiny_data('llava', rows=1)
    pictures = member('unused', 1, rows=dict(type=load_rows, path=str(seen_data.data_path)))
    pictures['image_folder'] = str(seen_data.image_folder)
    text = member('b', 1, rows=[{'instruction': 'Sort.', 'output': '1 2'}], dataset_map_fn=dict(type=alpaca_map_fn))
    dataset = mix(text, pictures)
    assert 'pixel_bytes' not in dataset[0]
    assert 'pixel_bytes' in dataset[SampleKey(0, 1)]
    assert dataset.patches.tolist() == [0, dataset.samples[1].patches]


def test_attributes_are_the_members_joined(member, mix):
    dataset = mix(member('a', 2), member('b', 3, bad=1, on_bad_sample='skip', bad_sample_budget=0.5))
    a, b = dataset.members
    assert len(dataset) == 5
    for name in ('lengths', 'supervised', 'patches'):
        joined = getattr(dataset, name)
        assert joined.dtype == np.int64
        assert joined.tolist() == [*getattr(a, name), *getattr(b, name)]
    assert len(dataset.rows) == 6
    assert [dataset.row_of(i) for i in range(5)] == [0, 1, 3, 4, 5]
    assert [dataset.where(i) for i in (0, 1, 2)] == ['a.json[0]', 'a.json[1]', 'b.json[1]']
    assert [(bad.index, bad.where) for bad in dataset.bad_samples] == [(2, 'b.json[0]')]
    assert dataset.place(3) == (b, 1)
    assert [len(sample) for sample in dataset.samples] == dataset.lengths.tolist()
    assert torch.equal(dataset[4]['input_ids'], b[2]['input_ids'])
    with pytest.raises(IndexError):
        dataset.samples[5]


def test_a_bad_row_is_named_by_its_own_file(member, mix):
    with pytest.raises(DataError, match=r'sample 0 \(b.json\[0\]\)'):
        mix(member('a', 2), member('b', 3, bad=1))


# ---- training on it


def test_an_epoch_of_the_loader_holds_the_repeats(member, mix):
    loader = build_train_loader(mix(member('a', 4), member('b', 4), repeats=[1, 2.5]), seed=0, pack_to_max_length=True)
    keys = [key.sample for pack in loader.batch_sampler for key in pack]
    assert Counter(key >= 4 for key in keys) == {False: 4, True: 10}
    assert sum(len(batch['position_ids'][batch['position_ids'] == 0]) for batch in loader) == 14


def test_resuming_takes_the_same_mixture(member, mix):
    config = dict(datasets=(member('a', 8), member('b', 8)), seed=0, repeats=[1, 2.5])

    def sampler(*, seed=0, repeats=(1, 2.5)):
        dataset = mix(*config['datasets'], repeats=list(repeats))
        return build_train_loader(dataset, seed=seed, batch_size=2).batch_sampler

    first = sampler()
    first.start_epoch(1)
    first.finish_step()
    second = sampler()
    second.load_state_dict(first.state_dict())
    assert list(second) == list(first)
    for other in (sampler(repeats=(1, 2)), sampler(seed=1)):
        with pytest.raises(CheckpointError, match='the data of this run is not that of the checkpoint'):
            other.load_state_dict(first.state_dict())


# ---- mistakes


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(repeats=[1]), r'repeats=\[1\] for 2 data sets; expected a number above 0 for each'),
        (dict(repeats=[1, 0]), r'repeats=\[1, 0\] for 2 data sets; expected a number above 0 for each'),
        (dict(weights=[1, -1]), r'weights=\[1, -1\] for 2 data sets; expected a number above 0 for each'),
        (dict(weights=[1, 1], repeats=[1, 1]), 'give repeats or weights, not both'),
        (dict(repeats=[1, 1], samples_per_epoch=4), 'samples_per_epoch=4 must be positive and goes with weights'),
        (dict(weights=[1, 1], samples_per_epoch=0), 'samples_per_epoch=0 must be positive and goes with weights'),
        (dict(weights=[1, 1000]), r'data set 0 \(2 samples\) has no part in an epoch of 4; raise its weight'),
    ],
)
def test_numbers_that_do_not_fit(settings, message, member, mix):
    with pytest.raises(ConfigError, match=message):
        mix(member('a', 2), member('b', 2), **settings)


def test_members_that_do_not_fit_together(member, mix):
    with pytest.raises(ConfigError, match=r'its data sets have max_length \[64, 128\]; give all of them the same'):
        mix(member('a', 2), member('b', 2, max_length=64))
    with pytest.raises(ConfigError, match=r'datasets=\[\] is empty'):
        mix()


def test_a_mixture_is_no_member(member, mix):
    inner = dict(type=MixedDataset, datasets=[member('b', 2)])
    for other in (inner, mix(member('c', 2))):
        with pytest.raises(ConfigError, match='data set 1 is a MixedDataset itself; list its data sets'):
            mix(member('a', 2), other)


def test_a_stream_is_no_member(member, mix):
    stream = {**member('b', 2), 'type': StreamingDataset}
    with pytest.raises(ConfigError, match='data set 1 is a stream, whose samples cannot be counted'):
        mix(member('a', 2), stream)
