"""Predictions: what a row says, and how questions are put into batches."""

import os

import pytest

from tests.evaluation.watched import SHORT, Watched, answers, ask, read
from vlmtune.evaluation import generate, predict
from vlmtune.utils.errors import CheckpointError


def test_a_row_says_what_was_asked_and_answered(loaded, folder, monkeypatch):
    model, processor = loaded
    questions, file = ask(folder, processor), folder / 'out' / 'predictions.jsonl'
    rows = predict(model, processor, questions, file=file, generation=SHORT)
    assert rows == read(file)
    assert [row['index'] for row in rows] == list(range(7))
    monkeypatch.chdir(folder)
    alone = generate(model, processor, [q.conversation for q in questions], **SHORT)
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
