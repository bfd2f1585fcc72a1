"""Several ranks answer as one would; what one of them fails with all say."""

import os
import signal
import threading

import pytest

from tests.evaluation.watched import SHORT, Watched, answers, ask, read
from vlmtune.evaluation import predict
from vlmtune.utils.errors import UserError


def in_ranks(world_size, share):
    """``share(rank, gather)`` in threads; returns what each returned or raised."""
    barrier, slots, results = threading.Barrier(world_size, timeout=600), [None] * world_size, [None] * world_size

    def run(rank):
        def gather(value):
            slots[rank] = value
            barrier.wait()
            found = list(slots)
            barrier.wait()
            return found

        try:
            results[rank] = share(rank, gather)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize('synced', [False, True])
def test_ranks_share_the_batches_and_answer_as_one_would(loaded, folder, synced):
    model, processor = loaded
    want = predict(model, processor, ask(folder, processor), file=folder / 'a.jsonl', batch_size=2, generation=SHORT)
    models = [Watched(model) for _ in range(3)]

    def share(rank, gather):
        options = dict(rank=rank, world_size=3, gather=gather, synced=synced)
        file, questions = folder / 'b' / 'p.jsonl', ask(folder, processor)
        return predict(models[rank], processor, questions, file=file, batch_size=2, generation=SHORT, **options)

    rows, *others = in_ranks(3, share)
    assert answers(rows) == answers(want)
    assert others == [[], []]
    calls = [['pixel_values' in batch for batch in watched.batches] for watched in models]
    if synced:  # each holds a piece of every layer: none may call one without the others
        assert calls == [[True, False]] * 3
        assert all(batch['synced_gpus'] for watched in models for batch in watched.batches)
    else:
        assert calls == [[True, False], [True, False], []]
    assert sorted(path.name for path in (folder / 'b').iterdir()) == ['p.jsonl', 'p.jsonl.about']


def test_what_one_rank_fails_with_all_say(loaded, folder):
    model, processor = loaded

    def fail(number, inputs):
        raise UserError('the second rank has had enough')

    models, told = [Watched(model), Watched(model, fail)], []

    def share(rank, gather):
        def told_before(value):
            if rank == 1 and models[1].batches:
                assert told == ['the second rank has had enough']  # not when the other one has answered all
            return gather(value)

        options = dict(rank=rank, world_size=2, gather=told_before, tell=lambda error: told.append(str(error)))
        file, questions = folder / 'b' / 'p.jsonl', ask(folder, processor)
        return predict(models[rank], processor, questions, file=file, generation=SHORT, **options)

    assert [str(error) for error in in_ranks(2, share)] == ['the second rank has had enough'] * 2
    done = [line for line in read(folder / 'b' / 'p.jsonl.part0') if 'prediction' in line]
    assert len(done) == 4  # what the other one has answered is kept


def test_a_picture_that_one_rank_cannot_read_stops_all_before_they_call_the_model(loaded, folder):
    model, processor = loaded
    questions = [ask(folder, processor) for _ in range(2)]
    (folder / '1.png').write_bytes((folder / '1.png').read_bytes()[:60])
    models = [Watched(model), Watched(model)]

    def share(rank, gather):
        options = dict(rank=rank, world_size=2, gather=gather, synced=True)
        return predict(models[rank], processor, questions[rank], file=folder / 'p.jsonl', generation=SHORT, **options)

    said = [str(error) for error in in_ranks(2, share)]
    assert said[0] == said[1]
    assert 'rows.jsonl:2' in said[0]
    assert len(models[0].batches) == len(models[1].batches)


def test_several_ranks_need_a_way_to_talk(loaded, folder):
    with pytest.raises(ValueError, match='2 ranks need a gather'):
        predict(*loaded, ask(folder, loaded[1]), file=folder / 'a.jsonl', world_size=2)


@pytest.mark.parametrize('synced', [False, True])
def test_whoever_asks_stops_between_two_batches(synced, loaded, folder):
    """Where ranks call the model together, all stop with the first; else the others answer what is theirs."""
    model, processor = loaded
    models = [Watched(model) for _ in range(2)]
    file = folder / 'p.jsonl'

    def share(rank, gather, should_stop=lambda: False):
        options = dict(rank=rank, world_size=2, gather=gather, synced=synced, generation=SHORT, should_stop=should_stop)
        return predict(models[rank], processor, ask(folder, processor), file=file, **options)

    def stopped(rank, gather):
        return share(rank, gather, lambda: rank == 1 and len(models[1].batches) == 1)

    assert in_ranks(2, stopped) == [None, None]
    assert [len(watched.batches) for watched in models] == ([1, 1] if synced else [4, 1])
    assert not file.exists()
    rows, _ = in_ranks(2, share)
    want = predict(model, processor, ask(folder, processor), file=folder / 'whole.jsonl', generation=SHORT)
    assert answers(rows) == answers(want)
    assert sum(len(watched.batches) for watched in models) == (8 if synced else 7)


def test_a_killed_run_goes_on_under_another_number_of_ranks(loaded, folder):
    model, processor = loaded
    questions = ask(folder, processor)
    options = dict(batch_size=2, generation=SHORT)
    want = predict(model, processor, questions, file=folder / 'whole.jsonl', **options)
    file = folder / 'p.jsonl'
    if not (child := os.fork()):
        killer = Watched(model, lambda number, inputs: number == 3 and os.kill(os.getpid(), signal.SIGKILL))
        predict(killer, processor, questions, file=file, **options)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    models = [Watched(model), Watched(model)]

    def share(rank, gather):
        own = ask(folder, processor)
        return predict(models[rank], processor, own, file=file, rank=rank, world_size=2, gather=gather, **options)

    assert answers(in_ranks(2, share)[0]) == answers(want)
    assert [len(watched.batches) for watched in models] == [1, 1]


def test_ranks_may_have_disks_of_their_own(loaded, folder):
    model, processor = loaded
    want = predict(model, processor, ask(folder, processor), file=folder / 'p.jsonl', generation=SHORT)

    def share(model, rank, gather):
        file, options = folder / str(rank) / 'p.jsonl', dict(rank=rank, world_size=2, gather=gather)
        return predict(model, processor, ask(folder, processor), file=file, generation=SHORT, **options)

    def fail(number, inputs):
        if number == 3:
            raise UserError('enough')

    in_ranks(2, lambda *given: share(Watched(model, fail), *given))
    assert os.listdir(folder / '1') == ['p.jsonl.part1']
    models = [Watched(model), Watched(model)]
    assert answers(in_ranks(2, lambda rank, gather: share(models[rank], rank, gather))[0]) == answers(want)
    assert [len(watched.batches) for watched in models] == [2, 1]
    assert not os.listdir(folder / '1')
