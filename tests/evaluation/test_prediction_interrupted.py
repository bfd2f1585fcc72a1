"""A run that was stopped goes on where it was, and begins anew where anything it depends on is another."""

import pytest
import torch
from PIL import Image

from tests.evaluation.watched import SHORT, Watched, answers, ask, read
from vlmtune.evaluation import predict


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
