import pytest

from tests.evaluation.watched import SHORT, Watched, ask
from vlmtune.evaluation import predict
from vlmtune.utils.errors import DataError, UserError


def out_of_memory(largest):
    """As torch's on the CPU, for batches of more rows than that."""

    def before(number, inputs):
        if len(inputs['input_ids']) > largest:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")

    return before


def test_out_of_memory_names_the_sample_and_the_batch_size_that_would_do(loaded, folder):
    model, processor = loaded
    questions = ask(folder, processor)
    options = dict(file=folder / 'p.jsonl', generation=SHORT)
    longest = max(questions, key=lambda question: len(question.prompt))
    said = (
        rf'answering {longest.where} \({len(longest.prompt)} tokens, 1 image\) in a batch of 4 .*set batch_size 2 \(tr'
    )
    with pytest.raises(UserError, match=said) as caught:
        predict(Watched(model, out_of_memory(2)), processor, questions, batch_size=4, **options)
    assert '\n' not in str(caught.value)
    with pytest.raises(UserError, match=r'set batch_size 1 \(tried, it fits\)'):
        predict(Watched(model, out_of_memory(1)), processor, questions, batch_size=4, **options)
    assert len(predict(Watched(model, out_of_memory(2)), processor, questions, batch_size=2, **options)) == 7
    with pytest.raises(UserError, match='not even it alone fits: use smaller images'):
        predict(Watched(model, out_of_memory(0)), processor, questions, batch_size=4, model_key='x', **options)


def test_other_errors_of_the_model_are_left_as_they_are(loaded, folder):
    model, processor = loaded

    def fail(number, inputs):
        raise RuntimeError('a shape is wrong')

    with pytest.raises(RuntimeError, match='a shape is wrong'):
        predict(Watched(model, fail), processor, ask(folder, processor), file=folder / 'p.jsonl')


def test_a_picture_that_turns_out_to_be_broken_stops_or_is_left_out(loaded, folder):
    model, processor = loaded
    (folder / '1.png').write_bytes((folder / '1.png').read_bytes()[:60])  # its header tells the size
    options = dict(batch_size=2, generation=SHORT)
    with pytest.raises(DataError, match=r'sample 1 \(rows.jsonl:2\): image cannot be read: .*1.png'):
        predict(model, processor, ask(folder, processor), file=folder / 'a.jsonl', **options)
    questions = ask(folder, processor, on_bad_sample='skip', bad_sample_budget=0.2)
    rows = predict(model, processor, questions, file=folder / 'b.jsonl', **options)
    assert [row['index'] for row in rows] == [0, 2, 3, 4, 5, 6]
    assert [bad.index for bad in questions.bad] == [1]
    anew, watched = ask(folder, processor, on_bad_sample='skip', bad_sample_budget=0.2), Watched(model)
    assert predict(watched, processor, anew, file=folder / 'b.jsonl', **options) == rows
    assert not watched.batches
    assert [bad.index for bad in anew.bad] == [1]
    strict = ask(folder, processor, on_bad_sample='skip', bad_sample_budget=0)
    with pytest.raises(DataError, match='1 of 7 rows are bad, more than bad_sample_budget=0'):
        predict(model, processor, strict, file=folder / 'c.jsonl', **options)
