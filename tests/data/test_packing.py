"""Packs are dense, hold every sample once, and depend on lengths, seed and epoch alone."""

import time

import numpy as np
import pytest

from vlmtune.data.packing import plan_batches, plan_hash, plan_packs


def log_normal(count, *, median, sigma=1.0, longest=4096, seed=0):
    """Lengths as instruction data has them: many short ones, a long tail."""
    draws = np.random.default_rng(seed).lognormal(np.log(median), sigma, count)
    return np.clip(draws, 8, longest).astype(np.int64)


def flat(plan):
    return [index for pack in plan for index in pack]


def tokens(plan, lengths):
    return np.array([lengths[pack].sum() for pack in plan])


@pytest.mark.parametrize('median', [60, 250, 600, 1200])
@pytest.mark.parametrize('count', [2000, 20000])
def test_density(median, count):
    """A pack of 4096 is filled to 97 % and more; the last pack of a window is what costs."""
    lengths = log_normal(count, median=median)
    plan = plan_packs(lengths, max_length=4096, seed=0, epoch=0)
    assert lengths.sum() / (4096 * len(plan)) >= 0.97


@pytest.mark.parametrize('window', [1, 7, 100, 8192])
def test_every_sample_once_and_no_pack_too_long(window):
    lengths = log_normal(1000, median=300, longest=1024)
    plan = plan_packs(lengths, max_length=1024, seed=3, epoch=1, window=window)
    assert sorted(flat(plan)) == list(range(1000))
    assert tokens(plan, lengths).max() <= 1024
    assert all(plan)


def test_a_sample_that_fills_a_pack_stands_alone():
    plan = plan_packs(np.array([10, 5, 10, 5]), max_length=10, seed=0, epoch=0)
    assert sorted(map(sorted, plan)) == [[0], [1, 3], [2]]


def test_a_sample_goes_where_it_fits_best():
    """Three full packs; putting one sample into the emptiest pack makes four."""
    plan = plan_packs(np.array([3, 5, 6, 7, 2, 5, 2]), max_length=10, seed=0, epoch=0)
    assert sorted(sum((3, 5, 6, 7, 2, 5, 2)[i] for i in pack) for pack in plan) == [10, 10, 10]


def test_deterministic_in_seed_and_epoch():
    lengths = log_normal(500, median=100)

    def plan(**kwargs):
        return plan_packs(lengths, **{'max_length': 4096, 'seed': 1, 'epoch': 2, **kwargs})

    assert plan() == plan()
    hashes = {plan_hash(p) for p in (plan(), plan(epoch=3), plan(seed=2), plan(max_length=4000))}
    assert len(hashes) == 4
    assert {frozenset(pack) for pack in plan()} != {frozenset(pack) for pack in plan(epoch=3)}


def test_long_samples_do_not_come_first():
    lengths = log_normal(20000, median=300)
    means = [lengths[pack].mean() for pack in plan_packs(lengths, max_length=4096, seed=0, epoch=0)]
    third = len(means) // 3
    assert 0.85 < np.mean(means[:third]) / np.mean(means[-third:]) < 1.15


def test_a_sample_larger_than_a_pack():
    with pytest.raises(ValueError, match='sample 1 has 11 tokens, a pack holds 10'):
        plan_packs(np.array([3, 11]), max_length=10, seed=0, epoch=0)
    with pytest.raises(ValueError, match='sample 2 has 9 vision patches, a pack holds 8'):
        plan_packs(np.full(3, 5), max_length=10, seed=0, epoch=0, patches=np.array([0, 8, 9]), max_patches=8)


def test_no_samples():
    assert plan_packs(np.array([], dtype=np.int64), max_length=10, seed=0, epoch=0) == []
    assert plan_batches(np.array([], dtype=np.int64), batch_size=2, seed=0, epoch=0, group_by_length=True) == []


# ---- the samples of an epoch, and the second budget


def image_text(count, *, seed=0):
    """Tokens and patches as visual instructions have them: three of four samples have one image."""
    rng = np.random.default_rng(seed)
    patches = np.where(rng.random(count) < 0.75, np.clip(rng.lognormal(np.log(2000), 0.6, count), 256, 10240), 0)
    tokens = np.clip(rng.lognormal(np.log(180), 0.9, count) + patches / 4, 16, 4096)
    return tokens.astype(np.int64), patches.astype(np.int64)


def test_fifty_thousand_samples_are_planned_densely_in_no_time():
    """0.1 s as measured; the limit leaves room for a busy machine."""
    tokens, _ = image_text(50_000)
    started = time.process_time()
    plan = plan_packs(tokens, max_length=4096, seed=0, epoch=0)
    assert time.process_time() - started < 3
    assert tokens.sum() / (4096 * len(plan)) >= 0.97


def test_only_the_samples_of_the_epoch_and_as_often_as_they_come():
    lengths = log_normal(300, median=100)
    lengths[7] = 5000  # longer than a pack, and not in this epoch
    chosen = np.array([3, 3, 3, *range(100, 200), *range(100, 150)])
    for plan in (
        plan_packs(lengths, max_length=4096, seed=0, epoch=0, indices=chosen),
        plan_batches(lengths, batch_size=4, seed=0, epoch=0, indices=chosen),
        plan_batches(lengths, batch_size=4, seed=0, epoch=0, indices=chosen, group_by_length=True),
    ):
        assert sorted(flat(plan)) == sorted(chosen.tolist())


def test_all_samples_named_are_all_samples():
    lengths = log_normal(300, median=100)
    settings = dict(max_length=4096, seed=0, epoch=0)
    assert plan_packs(lengths, indices=np.arange(300), **settings) == plan_packs(lengths, **settings)


@pytest.mark.parametrize('max_patches', [10240, 12000, 16000, 40000])
def test_both_budgets_hold(max_patches):
    lengths, patches = image_text(5000)
    plan = plan_packs(lengths, max_length=4096, seed=0, epoch=0, patches=patches, max_patches=max_patches)
    assert sorted(flat(plan)) == list(range(5000))
    assert tokens(plan, lengths).max() <= 4096
    assert tokens(plan, patches).max() <= max_patches
    # the tighter budget is nearly used up, or both are
    fill = max(lengths.sum() / 4096, patches.sum() / max_patches) / len(plan)
    assert fill >= 0.95


def test_a_budget_that_never_binds_changes_nothing():
    lengths, patches = image_text(3000)
    settings = dict(max_length=4096, seed=0, epoch=0)
    loose = plan_packs(lengths, patches=patches, max_patches=10**9, **settings)
    assert loose == plan_packs(lengths, patches=patches, **settings) == plan_packs(lengths, **settings)


def test_texts_fill_up_packs_that_take_no_further_image():
    """Two packs: each takes one image and texts. Were the packs closed with their budgets, there would be three."""
    plan = plan_packs(
        np.array([4, 4, 6, 3, 3]), max_length=10, seed=0, epoch=0, patches=np.array([8, 8, 0, 0, 0]), max_patches=8
    )
    assert len(plan) == 2


# ---- batches without packing


@pytest.mark.parametrize('group_by_length', [False, True])
@pytest.mark.parametrize('shuffle', [False, True])
def test_batches_hold_every_sample_once(group_by_length, shuffle):
    lengths = log_normal(1003, median=100)
    plan = plan_batches(lengths, batch_size=4, seed=0, epoch=0, shuffle=shuffle, group_by_length=group_by_length)
    assert sorted(flat(plan)) == list(range(1003))
    assert sorted(map(len, plan)) == [3] + [4] * 250
    again = plan_batches(lengths, batch_size=4, seed=0, epoch=0, shuffle=shuffle, group_by_length=group_by_length)
    assert plan == again
    other = plan_batches(lengths, batch_size=4, seed=0, epoch=1, shuffle=shuffle, group_by_length=group_by_length)
    assert (plan == other) != shuffle


def test_without_shuffling_the_order_is_the_datas():
    assert plan_batches(np.arange(5), batch_size=2, seed=0, epoch=0, shuffle=False) == [[0, 1], [2, 3], [4]]


def test_grouping_saves_padding():
    lengths = log_normal(2000, median=100)

    def padded(**kwargs):
        plan = plan_batches(lengths, batch_size=8, seed=0, epoch=0, **kwargs)
        return sum(len(batch) * lengths[batch].max() for batch in plan) / lengths.sum()

    assert padded(group_by_length=True) < 1.15
    assert padded() > 2
