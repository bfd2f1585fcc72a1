import json
import os
import signal
import threading

import pytest
import torch
from PIL import Image

from tests.evaluation.watched import SHORT, Watched, ask
from vlmtune.evaluation import generate, predict
from vlmtune.utils.errors import CheckpointError, UserError


def answers(rows):
    """What does not depend on the clock."""
    return [{name: value for name, value in row.items() if name != 'seconds'} for row in rows]


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_row_says_what_was_asked_and_answered(loaded, folder):
    model, processor = loaded
    questions, file = ask(folder, processor), folder / 'out' / 'predictions.jsonl'
    rows = predict(model, processor, questions, file=file, generation=SHORT)
    assert rows == read(file)
    assert [row['index'] for row in rows] == list(range(7))
    alone = generate(model, processor, [q.conversation for q in questions], image_root=folder, **SHORT)
    assert [row['prediction'] for row in rows] == alone
    assert len(set(alone)) > 3  # the model does see the pictures
    first, second = rows[0], rows[2]
    assert first['question'] == 'What is in picture 0?'
    assert first['where'] == 'rows.jsonl:1'
    assert first['images'] == [str(folder / '0.png')]
    assert first['image_sizes'] == [[60, 40]]
    assert first['references'] == ['thing 0']
    assert first['image_tokens'] == int((questions[0].prompt.input_ids == processor.image_token_id).sum()) > 0
    assert first['prompt_tokens'] == len(questions[0].prompt)
    assert first['scores'] == {}
    assert (second['images'], second['image_sizes'], second['image_tokens']) == ([], [], 0)
    assert all(row['seconds'] > 0 for row in rows)
    assert sorted(os.listdir(file.parent)) == ['predictions.jsonl', 'predictions.jsonl.about']


def test_tokens_and_the_end_of_an_answer_are_those_of_the_model(loaded, folder):
    model, processor = loaded
    questions = ask(folder, processor)
    rows = predict(model, processor, questions, file=folder / 'a.jsonl', batch_size=4, generation=SHORT)
    assert [(row['output_tokens'], row['finish']) for row in rows] == [(6, 'length')] * 7
    text = rows[0]['prediction']
    stop = text[1:3]
    assert stop
    stopped = predict(
        model, processor, questions, file=folder / 'b.jsonl', batch_size=4, generation=dict(SHORT, stop_strings=[stop])
    )
    assert stopped[0]['prediction'] == text[: text.index(stop)].strip()
    assert stopped[0]['finish'] == 'stop'
    assert stopped[0]['output_tokens'] < 6


def test_a_token_that_ends_an_answer_is_counted_and_is_no_text(loaded, folder, monkeypatch):
    model, processor = loaded
    watched = Watched(model)
    free = predict(watched, processor, ask(folder, processor), file=folder / 'a.jsonl', generation=SHORT)
    longest = max(ask(folder, processor), key=lambda question: len(question.prompt)).index
    ids = watched.outputs[0][0, -6:].tolist()
    monkeypatch.setattr(model.generation_config, 'eos_token_id', ids[-1])
    row = predict(model, processor, ask(folder, processor), file=folder / 'b.jsonl', generation=SHORT, model_key='b')[
        longest
    ]
    assert (row['finish'], row['output_tokens']) == ('stop', ids.index(ids[-1]) + 1)
    assert free[longest]['finish'] == 'length'


def test_batches_are_of_like_length_and_kind_and_change_no_answer(loaded, folder):
    model, processor = loaded
    questions = ask(folder, processor)
    alone = predict(model, processor, questions, file=folder / 'a.jsonl', generation=SHORT)
    watched = Watched(model)
    several = predict(watched, processor, questions, file=folder / 'b.jsonl', batch_size=3, generation=SHORT)
    assert answers(several) == answers(alone)
    assert [len(batch['input_ids']) for batch in watched.batches] == [3, 1, 3]
    assert ['pixel_values' in batch for batch in watched.batches] == [True, True, False]
    longest = max(len(question.prompt) for question in questions)
    assert watched.batches[0]['input_ids'].shape[1] == longest  # what may not fit comes first
    assert not any(question.prompt.image_sizes == () for question in questions if question.images)


def in_ranks(world_size, share):
    """``share(rank, gather)`` in threads; returns what each returned or raised."""
    barrier, slots, results = threading.Barrier(world_size, timeout=60), [None] * world_size, [None] * world_size

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


class Stop(BaseException):
    """As Ctrl-C."""


def stop_before(count):
    def before(number, inputs):
        if number == count:
            raise Stop

    return before


def test_a_run_goes_on_where_it_stopped(loaded, folder):
    model, processor = loaded
    questions = ask(folder, processor)
    file, options = folder / 'p.jsonl', dict(batch_size=2, generation=SHORT)
    want = predict(model, processor, questions, file=folder / 'whole.jsonl', **options)
    with pytest.raises(Stop):
        predict(Watched(model, stop_before(3)), processor, questions, file=file, **options)
    assert not file.exists()
    part = folder / 'p.jsonl.part0'
    assert len(read(part)) == 1 + 4
    part.write_text(part.read_text()[:-40])  # the last line was not finished
    watched = Watched(model)
    assert answers(predict(watched, processor, questions, file=file, **options)) == answers(want)
    assert len(watched.batches) == 4 - 1  # the batch of the broken line is asked again, as a whole
    again = Watched(model)
    assert answers(predict(again, processor, questions, file=file, **options)) == answers(want)
    assert not again.batches


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


def change_key(folder, options):
    options['model_key'] = 'another'


def change_settings(folder, options):
    options['generation'] = dict(max_new_tokens=3)


def change_picture(folder, options):
    Image.new('RGB', (60, 40), 'white').save(folder / '0.png')


def change_reference(folder, options):
    (folder / 'rows.jsonl').write_text((folder / 'rows.jsonl').read_text().replace('thing 0', 'another thing'))


@pytest.mark.parametrize('change', [change_key, change_settings, change_picture, change_reference])
def test_another_model_or_question_begins_anew(loaded, folder, change):
    model, processor = loaded
    file, options = folder / 'p.jsonl', dict(generation=SHORT, model_key='one', batch_size=4)
    first = predict(model, processor, ask(folder, processor), file=file, **options)
    (folder / 'metrics.json').write_text('{}')
    change(folder, options)
    with pytest.raises(Stop):  # nothing of the first remains, also if the second is stopped
        predict(Watched(model, stop_before(2)), processor, ask(folder, processor), file=file, **options)
    assert not file.exists()
    assert read(folder / 'earlier_1' / 'p.jsonl') == first
    assert (folder / 'earlier_1' / 'metrics.json').is_file()
    assert not (folder / 'metrics.json').exists()
    watched, options['model_key'] = Watched(model), 'third'
    predict(watched, processor, ask(folder, processor), file=file, **options)
    assert len(watched.batches) == 2  # nor is what the second has answered
    predict(Watched(model), processor, ask(folder, processor), file=file, **options)
    assert not (folder / 'earlier_2').exists()  # what was not finished, or is the same, is not kept


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


def test_a_smaller_batch_goes_on_with_what_is_there(loaded, folder):
    model, processor = loaded
    questions, file = ask(folder, processor), folder / 'p.jsonl'
    with pytest.raises(Stop):
        predict(Watched(model, stop_before(2)), processor, questions, file=file, batch_size=4, generation=SHORT)
    watched = Watched(model)
    assert len(predict(watched, processor, questions, file=file, batch_size=1, generation=SHORT)) == 7
    assert len(watched.batches) == 3


def test_sampling_is_a_function_of_the_seed_alone(loaded, folder):
    model, processor = loaded
    questions = ask(folder, processor)
    sampling = dict(SHORT, do_sample=True, temperature=3.0)
    options = dict(batch_size=2, generation=sampling)
    before = torch.get_rng_state()
    first = predict(model, processor, questions, file=folder / 'a.jsonl', **options)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    with pytest.raises(Stop):
        predict(Watched(model, stop_before(3)), processor, questions, file=folder / 'b.jsonl', **options)
    second = predict(model, processor, questions, file=folder / 'b.jsonl', **options)
    assert answers(second) == answers(first)
    other = predict(model, processor, questions, file=folder / 'c.jsonl', seed=7, **options)
    assert answers(other) != answers(first)


def test_modes_are_as_before(loaded, folder):
    model, processor = loaded
    model.train()
    try:
        predict(model, processor, ask(folder, processor), file=folder / 'a.jsonl', generation=SHORT)
        assert all(module.training for module in model.modules())
    finally:
        model.eval()


def test_a_file_that_cannot_be_written_is_one_line(loaded, folder):
    model, processor = loaded
    (folder / 'out').write_text('a file')
    with pytest.raises(CheckpointError, match='predictions cannot be written to .*out'):
        predict(model, processor, ask(folder, processor), file=folder / 'out' / 'p.jsonl', generation=SHORT)
