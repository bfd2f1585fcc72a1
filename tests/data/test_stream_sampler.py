"""Windows are planned while the run goes on, in an order of their own, and a resume is exact."""

import json
from itertools import islice

import pytest
import torch

from tests.data.streams import Counted, flat, row, sampler_of, take
from vlmtune.data import build_train_loader, stream_rows
from vlmtune.data.row_streams import IterableStream
from vlmtune.utils.errors import CheckpointError

# ---- order


def test_every_row_once_a_pass_and_in_another_order_in_the_next(stream, write):
    dataset = stream(stream_rows(write([row(i) for i in range(20)])))
    places = flat(take(sampler_of(dataset), 40))
    first, second = places[:20], places[20:40]
    everything = {f'rows.jsonl:{line}' for line in range(1, 21)}
    assert set(first) == set(second) == everything
    assert first != second


def test_the_order_is_a_function_of_the_seed(stream, write):
    dataset = stream(stream_rows(write([row(i) for i in range(20)])))
    whole = take(sampler_of(dataset), 6)
    assert take(sampler_of(dataset), 6) == whole != take(sampler_of(dataset, seed=1), 6)


def test_rows_of_a_window_stay_in_it(stream, write):
    """And are shuffled there: rows 1 to 8 come first, in another order."""
    places = flat(take(sampler_of(stream(stream_rows(write([row(i) for i in range(20)])))), 10))
    assert places[:8] != [f'rows.jsonl:{i}' for i in range(1, 9)]
    assert set(places[:8]) == {f'rows.jsonl:{i}' for i in range(1, 9)}


def test_a_source_that_ends_with_a_window(stream):
    places = flat(take(sampler_of(stream([row(i) for i in range(16)])), 30))
    assert sorted(places[:16]) == sorted(places[16:32]) == sorted(f'rows[{i}]' for i in range(16))


def test_packs_keep_both_budgets(stream):
    dataset = stream([row(i) for i in range(64)], shuffle_window=64)
    for pack in islice(sampler_of(dataset), 20):
        assert sum(len(key.sample.planned) for key in pack) <= 64


def test_without_packing(stream):
    sampler = sampler_of(stream([row(i) for i in range(16)]), pack_to_max_length=False, batch_size=4, shuffle=False)
    assert flat(take(sampler, 2)) == [f'rows[{i}]' for i in range(8)]


@pytest.mark.parametrize('total', [2, 4])
def test_ranks_share_every_step(stream, total):
    rows = [row(i) for i in range(40)]
    alone = take(sampler_of(stream(rows), accumulative_counts=total), 6)
    ranks = [
        take(sampler_of(stream(rows), accumulative_counts=total // 2, rank=rank, world_size=2), 6) for rank in range(2)
    ]
    for whole, *shares in zip(alone, *ranks, strict=True):
        assert sorted(whole) == sorted(shares[0] + shares[1])


def test_memory_is_bounded_by_the_window(stream):
    """Three windows are read for the packs of the first; not the source, which has a hundred."""
    rows = Counted(800)
    dataset = stream(IterableStream(rows, name='rows'))
    next(iter(sampler_of(dataset)))
    assert rows.read <= 8
    take(sampler_of(dataset), 1)
    assert rows.read <= 3 * 8


# ---- resuming


@pytest.mark.parametrize('steps', [0, 1, 3, 7, 12])
@pytest.mark.parametrize('counts', [1, 3])
def test_a_resume_goes_on_where_it_was(steps, counts, stream, write):
    path = write([row(i) for i in range(20)])
    whole = take(sampler_of(stream(stream_rows(path)), accumulative_counts=counts), steps + 8)
    first = sampler_of(stream(stream_rows(path)), accumulative_counts=counts)
    take(first, steps)
    state = json.loads(json.dumps(first.state_dict()))
    second = sampler_of(stream(stream_rows(path)), accumulative_counts=counts)
    second.load_state_dict(state)
    assert take(second, 8) == whole[steps:]


def test_a_resume_yields_the_same_batches(stream, write):
    """With workers, which have been handed more than was learned when the state is taken."""
    path = write([row(i) for i in range(40)])

    def loader():
        return build_train_loader(stream(stream_rows(path)), seed=0, pack_to_max_length=True, num_workers=2)

    first = loader()
    batches = iter(first)
    for _ in range(5):
        next(batches)
        first.batch_sampler.finish_step()
    second = loader()
    second.batch_sampler.load_state_dict(first.batch_sampler.state_dict())
    for _, a, b in zip(range(4), batches, second, strict=False):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_resume_reads_one_window(stream):
    rows = [row(i) for i in range(800)]
    first = sampler_of(stream(rows))
    take(first, 100)

    class Skippable(Counted):
        def skip(self, count):
            for each in self.rows[count:]:
                self.read += 1
                yield each

    source = Skippable(800)
    second = sampler_of(stream(IterableStream(source, name='rows')))
    second.load_state_dict(first.state_dict())
    assert source.read == 8


@pytest.mark.parametrize('pack', [True, False])
def test_another_source_is_refused(pack, stream, write):
    """Also where the plan is the same, as that of batches is: it asks for the number of samples alone."""
    path = write([row(i) for i in range(20)])
    first = sampler_of(stream(stream_rows(path)), pack_to_max_length=pack)
    take(first, 2)
    state = first.state_dict()
    write([row(i, words=9) for i in range(20)])
    with pytest.raises(CheckpointError, match='the data of this run is not that of the checkpoint'):
        sampler_of(stream(stream_rows(path)), pack_to_max_length=pack).load_state_dict(state)


def test_a_position_that_no_window_has_is_refused(stream, write):
    path = write([row(i) for i in range(20)])
    state = sampler_of(stream(stream_rows(path))).state_dict()
    for consumed in (-1, 10**6):
        with pytest.raises(CheckpointError, match=f'stands at pack {consumed} of a window that has'):
            sampler_of(stream(stream_rows(path))).load_state_dict({**state, 'consumed': consumed})
