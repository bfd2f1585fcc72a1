"""The samples of an optimizer step do not depend on how many ranks share it."""

import json
from functools import partial

import numpy as np
import pytest

from vlmtune.data import PackSampler
from vlmtune.data.packing import plan_packs
from vlmtune.utils.errors import CheckpointError, DataError

LENGTHS = np.random.default_rng(0).integers(5, 60, 40)


def sampler(*, seed=0, max_length=100, **kwargs):
    return PackSampler(partial(plan_packs, LENGTHS, max_length=max_length, seed=seed), **kwargs)


def steps(sampler):
    """The keys of every optimizer step of the rest of the epoch, as the loop takes them."""
    stream, out = iter(sampler), []
    while count := sampler.next_step():
        out.append([key for _ in range(count) for key in next(stream)])
        sampler.finish_step()
    assert next(stream, None) is None
    return out


def supervised(keys):
    return sorted(key for key in keys if key.supervised)


@pytest.mark.parametrize('tail', ['fill', 'drop'])
@pytest.mark.parametrize('total', [2, 4, 6])
def test_one_and_two_ranks_learn_the_same_in_every_step(tail, total):
    alone = steps(sampler(accumulative_counts=total, tail=tail))
    ranks = [steps(sampler(accumulative_counts=total // 2, rank=r, world_size=2, tail=tail)) for r in range(2)]
    assert len(alone) == len(ranks[0]) == len(ranks[1]) > 1
    for whole, *shares in zip(alone, *ranks, strict=True):
        assert supervised(whole) == supervised(shares[0] + shares[1])


def test_ranks_always_take_as_many_micro_batches():
    for world_size in (1, 2, 3, 4):
        for counts in (1, 2, 3):
            ranks = [sampler(accumulative_counts=counts, rank=r, world_size=world_size) for r in range(world_size)]
            assert len({len(list(rank)) for rank in ranks}) == 1


def test_an_epoch_holds_every_sample_once_and_the_next_one_in_another_order():
    one = sampler(accumulative_counts=3)
    orders = []
    for epoch in range(2):
        one.start_epoch(epoch)
        assert len(one) == one.steps_in_epoch(epoch)
        keys = [key for step in steps(one) for key in step]
        assert {key[0] for key in keys} == {epoch}
        assert sorted(key[1] for key in keys) == list(range(40))
        orders.append([key[1] for key in keys])
    assert orders[0] != orders[1]


def test_tail_fill_learns_all_and_fillers_weigh_nothing():
    packs = len(sampler().plan)
    world = next(n for n in (3, 4, 5) if packs % (2 * n) not in (0, n))
    ranks = [sampler(accumulative_counts=2, rank=r, world_size=world) for r in range(world)]
    keys = [key for rank in ranks for step in steps(rank) for key in step]
    assert sorted(key[1] for key in keys if key.supervised) == list(range(40))
    assert any(not key.supervised for key in keys)


def test_tail_drop_leaves_out_what_fills_no_step():
    one = sampler(accumulative_counts=4, tail='drop')
    assert len(one.plan) % 4
    found = steps(one)
    assert len(found) == len(one) == len(one.plan) // 4
    assert all(key.supervised for step in found for key in step)
    with pytest.raises(DataError, match=r'packs of samples do not make one optimizer step of 1000'):
        sampler(accumulative_counts=1000, tail='drop')


def test_state_round_trip_goes_on_where_it_was():
    one = sampler(accumulative_counts=2)
    one.start_epoch(3)
    whole = steps(one)
    one.start_epoch(3)
    for _ in range(3):
        one.finish_step()
    state = json.loads(json.dumps(one.state_dict()))
    assert set(state) == {'epoch', 'consumed', 'plan'}
    other = sampler(accumulative_counts=2)
    other.load_state_dict(state)
    assert (other.epoch, other.consumed) == (3, 6)
    assert steps(other) == whole[3:]


def test_resuming_at_the_end_of_an_epoch():
    one = sampler(accumulative_counts=3)
    steps(one)
    other = sampler(accumulative_counts=3)
    other.load_state_dict(one.state_dict())
    assert other.next_step() == 0
    assert list(other) == []


@pytest.mark.parametrize('tail', ['fill', 'drop'])
@pytest.mark.parametrize('done', [1, 3])
def test_two_ranks_resumed_on_one_learn_the_same_samples(done, tail):
    """With as many packs a step; and the other way round."""
    two = [sampler(accumulative_counts=2, rank=r, world_size=2, tail=tail) for r in range(2)]
    one = sampler(accumulative_counts=4, tail=tail)
    expected = [supervised(keys) for keys in steps(one)][done:]
    one.start_epoch(0)
    for _ in range(done):
        for each in (*two, one):
            each.finish_step()
    assert two[0].state_dict() == two[1].state_dict() == one.state_dict()
    resumed = sampler(accumulative_counts=4, tail=tail)
    resumed.load_state_dict(two[0].state_dict())
    assert [supervised(keys) for keys in steps(resumed)] == expected
    for each in two:
        each.load_state_dict(one.state_dict())
    shares = [steps(each) for each in two]
    assert [supervised([*first, *second]) for first, second in zip(*shares, strict=True)] == expected


@pytest.mark.parametrize('tail', ['fill', 'drop'])
@pytest.mark.parametrize(('saved', 'mine'), [(2, 2), (4, 1), (1, 4), (2, 3)])
def test_steps_so_far_end_with_the_epoch(saved, mine, tail):
    """However large the steps were before, those so far and those to come make the epoch."""
    before, after = (sampler(accumulative_counts=n, tail=tail) for n in (saved, mine))
    before.start_epoch(1)
    for _ in range(3):
        before.finish_step()
    after.load_state_dict(before.state_dict())
    first, so_far = after.steps_so_far()
    assert first == after.steps_in_epoch(0)
    assert so_far + len(steps(after)) == after.steps_in_epoch(1)
    if saved == mine:
        assert so_far == 3


@pytest.mark.parametrize('changes', [dict(consumed=-1), dict(consumed=10**6)])
def test_a_position_that_no_epoch_has_is_refused(changes):
    state = {**sampler().state_dict(), **changes}
    with pytest.raises(CheckpointError, match='the checkpoint stands at pack -?[0-9]+ of epoch 0, which has'):
        sampler().load_state_dict(state)


@pytest.mark.parametrize('change', [dict(seed=1), dict(max_length=90)])
def test_another_plan_is_refused(change):
    state = sampler().state_dict()
    with pytest.raises(
        CheckpointError, match=r'the data of this run is not that of the checkpoint \(plan \w+, saved \w+\)'
    ):
        sampler(**change).load_state_dict(state)


# ---- what the loop and its hooks ask for


@pytest.mark.parametrize('tail', ['fill', 'drop'])
@pytest.mark.parametrize('rank', [0, 1])
def test_current_packs_are_those_of_the_step_that_is_learned(rank, tail):
    """Also while workers are steps ahead: the iterator has run on, the state has not."""
    one = sampler(accumulative_counts=2, rank=rank, world_size=2, tail=tail)
    ahead = list(one)
    seen = []
    while count := one.next_step():
        packs = one.current_packs()
        assert len(packs) == count
        seen += packs
        one.finish_step()
    assert seen == ahead
    assert one.current_packs() == []


def counted_sampler(calls, **kwargs):
    def plan(*, epoch):
        calls.append(epoch)
        return plan_packs(LENGTHS, max_length=100, seed=0, epoch=epoch)

    return PackSampler(plan, **kwargs)


def test_counting_the_steps_of_coming_epochs_plans_each_once():
    calls = []
    one = counted_sampler(calls)
    for _ in range(2):
        assert [one.steps_in_epoch(epoch) for epoch in range(3)] == [one.packs_in_epoch(e) for e in range(3)]
    steps(one)
    assert calls == [0, 1, 2]  # the plan of the current epoch stayed
    one.start_epoch(1)
    steps(one)
    assert calls == [0, 1, 2, 1]
