"""Boxes and names in rows of every format."""

import pytest

from vlmtune.data.map_fns import alpaca_map_fn, llava_map_fn, minicpmv_map_fn, openai_map_fn, sharegpt_map_fn
from vlmtune.structures import BoxPart, ImagePart, TextPart
from vlmtune.utils.errors import ConfigError, DataError

BOX, OTHER = (10, 20, 30, 40), (1.5, 2, 3, 4)
ANSWER = 'A <ref-object> at <bbox>.'
OBJECTS = {'bbox': [list(BOX)], 'ref': ['dog']}
ROWS = [
    (llava_map_fn, {'image': '1.jpg', 'conversations': [
        {'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': ANSWER}]}),
    (sharegpt_map_fn, {'images': ['1.jpg'], 'conversations': [
        {'from': 'user', 'value': '<image>\nWhat?'}, {'from': 'assistant', 'value': ANSWER}]}),
    (minicpmv_map_fn, {'image': {'<image_00>': '1.jpg'}, 'conversations': [
        {'role': 'user', 'content': '<image_00>\nWhat?'}, {'role': 'assistant', 'content': ANSWER}]}),
    (openai_map_fn, {'images': ['1.jpg'], 'messages': [
        {'role': 'user', 'content': '<image>\nWhat?'}, {'role': 'assistant', 'content': ANSWER}]}),
    (openai_map_fn, {'messages': [
        {'role': 'user', 'content': [{'type': 'image', 'path': '1.jpg'}, {'type': 'text', 'text': 'What?'}]},
        {'role': 'assistant', 'content': [{'type': 'text', 'text': ANSWER}]}]}),
    (alpaca_map_fn, {'image': '1.jpg', 'instruction': '<image>\nWhat?', 'output': ANSWER}),
]  # fmt: skip


@pytest.mark.parametrize(('map_fn', 'row'), ROWS)
@pytest.mark.parametrize('convention', ['pixel', 'unit', 'thousand'])
def test_every_format_takes_marks(map_fn, row, convention):
    found = map_fn({**row, 'objects': OBJECTS}, boxes=convention)
    assert found.messages[0].parts == (ImagePart(0), TextPart('What?'))
    assert found.messages[1].parts == (TextPart('A dog at '), BoxPart(0, BOX, convention), TextPart('.'))


@pytest.mark.parametrize(('map_fn', 'row'), ROWS)
def test_a_data_set_has_to_say_how_its_boxes_count(map_fn, row):
    with pytest.raises(DataError, match="has 1 <bbox> mark, .* set boxes= .* 'pixel', 'unit', 'thousand'") as caught:
        map_fn({**row, 'objects': OBJECTS})
    assert caught.value.kind == 'wrong_box'
    with pytest.raises(ConfigError, match="boxes='pixels'; expected one of 'pixel'"):
        map_fn({**row, 'objects': OBJECTS}, boxes='pixels')


def talk(*texts, **fields):
    messages = [{'role': ('user', 'assistant')[i % 2], 'content': text} for i, text in enumerate(texts)]
    return {'messages': messages, **fields}


def boxes_of(row, convention='pixel'):
    conversation = openai_map_fn(row, boxes=convention)
    return [part for message in conversation.messages for part in message.parts if isinstance(part, BoxPart)]


def test_rows_without_boxes_are_as_before():
    row = talk('What is a <ref-object>?', 'A mark.', objects={'bbox': [[1, 2]], 'categories': [7]})
    assert openai_map_fn(row).messages[0].parts == (TextPart('What is a <ref-object>?'),)
    for fields in ({}, {'objects': None}, {'objects': {'bbox': [], 'ref': None}}):
        assert boxes_of(talk('Hi', 'Hello', **fields)) == []


def test_a_box_lies_on_the_last_image_before_it():
    row = talk('<image><image>Where?', '<bbox>', '<image>In <bbox>?', 'No.', images=['a', 'b', 'c'])
    row['objects'] = {'bbox': [BOX, OTHER]}
    assert boxes_of(row) == [BoxPart(1, BOX, 'pixel'), BoxPart(2, OTHER, 'pixel')]
    row['objects']['image_id'] = [2, 0]
    assert boxes_of(row) == [BoxPart(2, BOX, 'pixel'), BoxPart(0, OTHER, 'pixel')]


def test_an_answer_may_be_boxes_only_and_names_are_plain_text():
    row = talk('<image>Where?', '<bbox><bbox>', images=['a'], objects={'bbox': [BOX, OTHER]})
    assert openai_map_fn(row, boxes='pixel').messages[1].parts == (
        BoxPart(0, BOX, 'pixel'),
        BoxPart(0, OTHER, 'pixel'),
    )
    row = talk('<image>Is it <ref-object>?', 'No.', images=['a'], objects={'ref': ['<bbox>']})
    assert openai_map_fn(row, boxes='pixel').messages[0].parts[1:] == (TextPart('Is it <bbox>?'),)


@pytest.mark.parametrize(
    ('answer', 'objects', 'says'),
    [
        ('<bbox>', None, "has 1 <bbox> mark but 0 in 'objects'"),
        ('<bbox>', {'bbox': [BOX, BOX]}, "has 1 <bbox> mark but 2 in 'objects'"),
        ('none', {'bbox': [BOX]}, 'has 0 <bbox> marks but 1 in'),
        ('<ref-object>', {'ref': []}, 'has 1 <ref-object> mark but 0 in'),
        ('<bbox>', [BOX], "'objects' is of type list; expected a dict"),
        ('<bbox>', {'bbox': 'x'}, r"'objects'\['bbox'\] is of type str; expected a list"),
        ('<bbox>', {'bbox': [[1, 2]]}, r"'objects'\['bbox'\]\[0\] is \[1, 2\]; expected four numbers, \[x1"),
        ('<bbox>', {'bbox': [[1, 2, 3, '4']]}, 'expected four numbers'),
        ('<bbox>', {'bbox': [[1, 2, 3, True]]}, 'expected four numbers'),
        ('<bbox>', {'bbox': [None]}, 'is None; expected four numbers'),
        ('<ref-object>', {'ref': [3]}, r"'objects'\['ref'\]\[0\] is of type int; expected a text"),
        ('<bbox>', {'bbox': [BOX], 'image_id': [1]}, 'of box 0 is 1; the row shows 1 image'),
        ('<bbox>', {'bbox': [BOX], 'image_id': [-1]}, 'of box 0 is -1'),
        ('<bbox>', {'bbox': [BOX], 'image_id': [0, 0]}, 'expected one whole number for each of the boxes'),
        ('<bbox>', {'bbox': [BOX], 'image_id': ['0']}, 'expected one whole number for each'),
        ('<bbox>', {'bbox': [BOX], 'bbox_type': 'norm1'}, "is 'norm1', but dataset_map_fn says boxes='pixel'"),
    ],
)  # fmt: skip
def test_wrong_objects_are_told(answer, objects, says):
    with pytest.raises(DataError, match=says) as caught:
        boxes_of(talk('<image>Where?', answer, images=['a'], objects=objects))
    assert caught.value.kind == 'wrong_box'


def test_ms_swifts_own_word_may_agree():
    objects = {'bbox': [BOX], 'bbox_type': 'real'}
    assert boxes_of(talk('<image>Where?', '<bbox>', images=['a'], objects=objects)) == [BoxPart(0, BOX, 'pixel')]


def test_a_box_before_any_image_is_an_error():
    row = talk('<bbox> of what?', 'This.', '<image>', 'Ah.', images=['a'], objects={'bbox': [BOX]})
    with pytest.raises(DataError, match='has box 0 before any image; expected the image first, or its number'):
        boxes_of(row)
    row['objects']['image_id'] = [0]
    assert boxes_of(row) == [BoxPart(0, BOX, 'pixel')]
