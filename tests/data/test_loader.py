"""The loader of one rank: what it yields, and settings that cannot be followed."""

import pytest
import torch

from vlmtune.data import SupervisedDataset, build_train_loader, chat_template_map_fn, llava_map_fn, load_rows
from vlmtune.utils.errors import ConfigError, DataError


@pytest.fixture(scope='module')
def dataset(processor, tiny_data):
    data = tiny_data('llava', rows=13)
    return SupervisedDataset(
        load_rows(data.data_path),
        processor=processor('llava', prompt_template='vicuna'),
        dataset_map_fn=llava_map_fn,
        template_map_fn=chat_template_map_fn,
        image_folder=str(data.image_folder),
        max_length=128,
    )


def build(dataset, **settings):
    return build_train_loader(dataset, **{'seed': 0, **settings})


def test_packed(dataset):
    loader = build(dataset, pack_to_max_length=True)
    batches = list(loader)
    assert len(loader) == len(batches) < 13
    assert all(batch['input_ids'].shape[0] == 1 and batch['input_ids'].shape[1] <= 128 for batch in batches)
    assert sum(batch['input_ids'].numel() for batch in batches) == dataset.lengths.sum()
    starts = sum(int((batch['position_ids'] == 0).sum()) for batch in batches)
    assert starts == 13


def test_padded(dataset):
    batches = list(build(dataset, batch_size=4))
    assert [len(batch['input_ids']) for batch in batches] == [4, 4, 4, 1]
    assert sum(int(batch['attention_mask'].sum()) for batch in batches) == dataset.lengths.sum()


def test_the_length_counts_optimizer_steps(dataset):
    assert len(build(dataset, accumulative_counts=4)) == 4
    assert len(build(dataset, accumulative_counts=4, tail='drop')) == 3
    assert len(build(dataset, accumulative_counts=2, world_size=2)) == 4


def test_shuffle_and_group_by_length_reach_the_plan(dataset):
    plain = build(dataset, shuffle=False)
    assert [key[1] for batch in plain.batch_sampler for key in batch] == list(range(13))
    grouped = build(dataset, batch_size=13, group_by_length=True)
    lengths = [dataset.lengths[key[1]] for key in next(iter(grouped.batch_sampler))]
    assert lengths == sorted(lengths, reverse=True)


def test_iterating_draws_nothing_from_the_global_generator(dataset):
    """Or a run that looks into the loader would train on other dropout masks."""
    loader = build(dataset, pack_to_max_length=True)
    before = torch.get_rng_state()
    list(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_yield_the_same(dataset):
    alone, helped = (list(build(dataset, pack_to_max_length=True, num_workers=n)) for n in (0, 2))
    for a, b in zip(alone, helped, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (
            dict(pack_to_max_length=True, batch_size=2),
            'batch_size=2 with pack_to_max_length: a pack is one row; set batch_size=1',
        ),
        (dict(batch_size=0), 'batch_size=0 and accumulative_counts=1 must be at least 1'),
        (dict(accumulative_counts=0), 'batch_size=1 and accumulative_counts=0 must be at least 1'),
        (dict(tail='keep'), "tail='keep' is unknown; expected one of fill, drop"),
        (dict(prefetch_factor=4), 'prefetch_factor=4 needs num_workers of at least 1'),
    ],
)
def test_mistakes(settings, message, dataset):
    with pytest.raises(ConfigError, match=message):
        build(dataset, **settings)


def test_too_little_data_for_one_step(dataset):
    with pytest.raises(DataError, match='13 packs of samples do not make one optimizer step of 14'):
        build(dataset, accumulative_counts=14, tail='drop')
