"""The loader of one rank: what it yields, and settings that cannot be followed."""

import numpy as np
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
        (dict(max_patches=400), 'max_patches=400 is a limit of packs; set pack_to_max_length=True'),
        (dict(pack_to_max_length=True, max_patches=0), 'max_patches=0: expected a positive integer, or None'),
        (dict(prefetch_factor=4), 'prefetch_factor=4 needs num_workers of at least 1'),
        (dict(num_workers=-1), 'num_workers=-1: expected a number of processes, or 0 for none'),
    ],
)
def test_mistakes(settings, message, dataset):
    with pytest.raises(ConfigError, match=message):
        build(dataset, **settings)


def test_too_little_data_for_one_step(dataset):
    with pytest.raises(DataError, match='13 packs of samples do not make one optimizer step of 14'):
        build(dataset, accumulative_counts=14, tail='drop')


# ---- patches, epochs, resuming


def test_a_pack_keeps_its_patch_budget(dataset):
    most = int(dataset.patches.max())
    assert most > 0
    sampler = build(dataset, pack_to_max_length=True, max_patches=most).batch_sampler
    sums = [sum(int(dataset.patches[key.sample]) for key in pack) for pack in sampler]
    assert max(sums) == most
    free = build(dataset, pack_to_max_length=True).batch_sampler
    assert max(sum(int(dataset.patches[key.sample]) for key in pack) for pack in free) > most


def test_a_sample_above_the_patch_budget_is_named(dataset):
    most = int(dataset.patches.max())
    worst = int(dataset.patches.argmax())
    with pytest.raises(
        DataError,
        match=rf'sample {worst} \(data.json\[{worst}\]\): has {most} vision patches, a pack takes '
        rf'max_patches={most - 1}; raise it, or let the processor make the images smaller',
    ):
        build(dataset, pack_to_max_length=True, max_patches=most - 1)


class Unread:
    """A data set that must not be asked for a sample."""

    def __init__(self, dataset):
        self.processor, self.max_length = dataset.processor, dataset.max_length
        self.lengths, self.patches = dataset.lengths, dataset.patches

    def epoch_samples(self, *, seed, epoch):
        return np.arange(len(self.lengths))

    def __getitem__(self, key):
        raise AssertionError(f'{key} was read')


def test_going_to_a_saved_position_reads_no_sample(dataset):
    first = build(Unread(dataset), pack_to_max_length=True, accumulative_counts=2).batch_sampler
    first.start_epoch(2)
    first.finish_step()
    second = build(Unread(dataset), pack_to_max_length=True, accumulative_counts=2).batch_sampler
    second.load_state_dict(first.state_dict())
    assert second.current_packs() == first.current_packs() != []


def test_the_seed_of_the_workers_depends_on_seed_and_epoch_alone(dataset):
    def seed_of(loader, epoch):
        loader.batch_sampler.start_epoch(epoch)
        iter(loader)
        return loader.generator.initial_seed()

    going_on, resumed = build(dataset), build(dataset)
    seeds = [seed_of(going_on, epoch) for epoch in (0, 1, 2)]
    assert len(set(seeds)) == 3
    assert seed_of(resumed, 2) == seeds[2]
    assert seed_of(build(dataset, seed=1), 0) != seeds[0]
