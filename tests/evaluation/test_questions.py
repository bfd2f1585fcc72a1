import json

import pytest
from PIL import Image

from vlmtune.data import (
    MixedDataset,
    Processor,
    StreamingDataset,
    SupervisedDataset,
    chat_template_map_fn,
    llava_map_fn,
    load_rows,
    openai_map_fn,
)
from vlmtune.evaluation import open_questions
from vlmtune.structures import BoxPart, Conversation, ImagePart, ImageRef, Message, TextPart
from vlmtune.utils.errors import ConfigError, DataError


@pytest.fixture(scope='module')
def processor(tiny_model):
    return Processor(str(tiny_model('qwen2_5_vl')))


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / 'images'
    folder.mkdir()
    Image.new('RGB', (60, 40), 'red').save(folder / 'a.png')
    return folder


def talk(*turns, **extra):
    """A row of LLaVA's format; the user begins."""
    roles = ('human', 'gpt') * len(turns)
    return {'conversations': [{'from': role, 'value': text} for role, text in zip(roles, turns, strict=False)], **extra}


def data(tmp_path, rows, map_fn=llava_map_fn, name='test.jsonl', **options):
    (tmp_path / name).write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return dict(
        type=SupervisedDataset,
        rows=dict(type=load_rows, path=str(tmp_path / name)),
        dataset_map_fn=dict(type=map_fn),
        template_map_fn=dict(type=chat_template_map_fn),
        image_folder=str(tmp_path / 'images'),
        **options,
    )


def test_the_last_answer_is_the_reference_and_the_rest_is_asked(processor, images, tmp_path):
    rows = [talk('One?', '1'), talk('<image>\nColour?', 'red', 'Sure?', 'yes', image='a.png')]
    one, two = open_questions(data(tmp_path, rows), processor)
    assert (one.index, one.references, one.text, one.images) == (0, ('1',), 'One?', ())
    assert (two.index, two.references, two.text) == (1, ('yes',), 'Sure?')
    assert [message.role for message in two.conversation.messages] == ['user', 'assistant', 'user']
    assert [str(image) for image in two.images] == ['a.png']
    assert two.where == 'test.jsonl:2'
    assert two.prompt.image_sizes == ((40, 60),)
    assert (two.prompt.input_ids == processor.image_token_id).sum() > 0
    shown = processor.tokenizer.decode(two.prompt.input_ids)
    assert 'red' in shown
    assert 'yes' not in shown
    assert shown.endswith('assistant\n')


@pytest.mark.parametrize(
    ('value', 'want'),
    [('cat', ('cat',)), (['cat', 'a cat'], ('cat', 'a cat')), (3, ('3',)), ([{'answer': 'cat'}] * 2, ('cat', 'cat'))],
)
def test_references_come_from_a_key_of_the_row(processor, images, tmp_path, value, want):
    rows = [talk('What is it?', truth=value), talk('What is it?', 'a dog', truth=value)]
    asked = open_questions(data(tmp_path, rows), processor, reference_key='truth')
    assert [question.references for question in asked] == [want, want]
    assert [question.conversation.messages[-1].role for question in asked] == ['user', 'user']


def test_a_row_that_ends_with_the_user_has_no_reference(processor, images, tmp_path):
    rows = [{'messages': [{'role': 'user', 'content': 'Why?'}]}]
    (question,) = open_questions(data(tmp_path, rows, openai_map_fn), processor)
    assert question.references == ()
    with pytest.raises(DataError, match='answer of the assistant'):  # one cannot learn from it
        openai_map_fn(rows[0])


@pytest.mark.parametrize('row', [talk('Why?', 'because'), talk('Why?', truth=[]), talk('Why?', truth=[{'text': 'x'}])])
def test_a_key_without_references_names_the_row(processor, images, tmp_path, row):
    with pytest.raises(DataError, match=r"sample 1 \(test.jsonl:2\): 'truth' is .* expected a text or a list of texts"):
        open_questions(data(tmp_path, [talk('One?', truth='1'), row]), processor, reference_key='truth')


def test_nothing_is_planned_and_no_pixel_is_decoded(processor, images, tmp_path):
    whole = (images / 'a.png').read_bytes()
    (images / 'cut.png').write_bytes(whole[:50])  # the header is there, the pixels are not
    rows = [talk('<image>\nColour?', 'red', image='cut.png')]
    assert len(open_questions(data(tmp_path, rows, cache_dir=str(tmp_path / 'plans')), processor)) == 1
    assert not (tmp_path / 'plans').exists()


def test_bad_rows_stop_or_are_left_out_within_the_budget(processor, images, tmp_path):
    rows = [talk('One?', '1'), talk('<image>\nHue?', 'red', image='gone.png'), talk('Two?', '2'), talk('Three?', '3')]
    with pytest.raises(DataError, match=r'sample 1 \(test.jsonl:2\): image not found: .*gone.png'):
        open_questions(data(tmp_path, rows), processor)
    lenient = dict(on_bad_sample='skip', bad_sample_budget=0.25)
    asked = open_questions(data(tmp_path, rows, **lenient), processor)
    assert [question.index for question in asked] == [0, 2, 3]
    assert [(bad.index, bad.error, bad.images) for bad in asked.bad] == [(1, 'missing_image', ('gone.png',))]
    assert len(open_questions(data(tmp_path, rows, **lenient), processor, limit=3)) == 2  # one of few may always be bad
    with pytest.raises(DataError, match='2 of 5 rows are bad, more than bad_sample_budget=0.25'):
        open_questions(data(tmp_path, [*rows, rows[1]], **lenient), processor)
    with pytest.raises(DataError, match='1 of 4 rows are bad, more than bad_sample_budget=0'):
        open_questions(data(tmp_path, rows, on_bad_sample='skip', bad_sample_budget=0), processor)


def test_without_any_row_that_can_be_asked_it_stops(processor, images, tmp_path):
    rows = [talk('<image>\nColour?', 'red', image='gone.png')]
    with pytest.raises(DataError, match='none of 1 rows can be asked'):
        open_questions(data(tmp_path, rows, on_bad_sample='skip', bad_sample_budget=1.0), processor)


def test_members_of_a_mixture_are_asked_once_each_with_their_own_images(processor, images, tmp_path):
    other = tmp_path / 'other'
    other.mkdir()
    Image.new('RGB', (20, 90), 'blue').save(other / 'a.png')
    row = talk('<image>\nColour?', 'red', image='a.png')
    members = [data(tmp_path, [row, row], name='one.jsonl'), data(tmp_path, [row], name='two.jsonl')]
    members[1]['image_folder'] = str(other)
    asked = open_questions(dict(type=MixedDataset, datasets=members, repeats=[3, 1]), processor)
    assert [question.index for question in asked] == [0, 1, 2]
    assert [question.where.partition(':')[0] for question in asked] == ['one.jsonl', 'one.jsonl', 'two.jsonl']
    assert [question.prompt.image_sizes[0] for question in asked] == [(40, 60), (40, 60), (90, 20)]
    assert len(open_questions(dict(type=MixedDataset, datasets=members), processor, limit=1)) == 1


def test_a_stream_cannot_be_asked(processor, images, tmp_path):
    with pytest.raises(
        ConfigError, match='StreamingDataset cannot be read by themselves; expected a SupervisedDataset'
    ):
        open_questions({**data(tmp_path, [talk('One?', '1')]), 'type': StreamingDataset}, processor)


def boxed(row):
    parts = (ImagePart(0), TextPart('Where?'))
    box = BoxPart(0, (0.5, 0.0, 1.0, 0.5), 'unit')
    return Conversation((Message('user', parts), Message('assistant', (box,))), (ImageRef(path='a.png'),))


def test_boxes_of_references_are_in_the_convention_of_the_model(processor, images, tmp_path):
    (question,) = open_questions(data(tmp_path, [talk('Where?', 'x')], boxed), processor)
    whole = processor.tokenize(boxed(None), image_sizes=question.prompt.image_sizes)
    learned = processor.tokenizer.decode(whole.labels[whole.labels >= 0], skip_special_tokens=True)
    assert question.references == (learned.strip(),)
    assert any(letter.isdigit() for letter in learned)


def test_workers_ask_the_same(processor, images, tmp_path):
    rows = [talk(f'How many is {i}?', str(i)) for i in range(600)]  # more than a range of rows
    alone = list(open_questions(data(tmp_path, rows, planning_workers=0), processor))
    shared = list(open_questions(data(tmp_path, rows, planning_workers=2), processor))
    assert [(q.index, q.where, q.references) for q in shared] == [(q.index, q.where, q.references) for q in alone]
    assert all((a.prompt.input_ids == b.prompt.input_ids).all() for a, b in zip(alone, shared, strict=True))


def test_a_mistake_in_a_map_function_says_which_row(processor, images, tmp_path):
    with pytest.raises(KeyError) as caught:
        open_questions(data(tmp_path, [talk('One?', '1')], lambda row: row['nothing']), processor)
    assert 'sample 0 (test.jsonl:' in caught.value.__notes__[0]
