"""Packs are dense, hold every sample once, and depend on lengths, seed and epoch alone."""

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


def test_a_sample_longer_than_a_pack():
    with pytest.raises(ValueError, match='sample 1 has 11 tokens, a pack holds 10'):
        plan_packs(np.array([3, 11]), max_length=10, seed=0, epoch=0)


def test_no_samples():
    assert plan_packs(np.array([], dtype=np.int64), max_length=10, seed=0, epoch=0) == []
    assert plan_batches(np.array([], dtype=np.int64), batch_size=2, seed=0, epoch=0, group_by_length=True) == []


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
