"""Rows with messages."""

import base64

import pytest

from vlmtune.data.map_fns import openai_map_fn
from vlmtune.structures import ImagePart, ImageRef, TextPart
from vlmtune.utils.errors import ConfigError, DataError

ANSWER = {'role': 'assistant', 'content': 'A.'}
URI = 'data:image/png;base64,' + base64.b64encode(b'png').decode()


def ask(content, *, answer=ANSWER, **fields):
    return {'messages': [{'role': 'user', 'content': content}, answer], **fields}


def parts(conversation, message=0):
    found = conversation.messages[message].parts
    return [part.text if isinstance(part, TextPart) else part.index for part in found]


def test_texts():
    row = {'messages': [{'role': 'developer', 'content': 'S'}, {'role': 'user', 'content': 'Q'}, ANSWER]}
    found = openai_map_fn(row)
    assert [(message.role, message.text) for message in found.messages] == [
        ('system', 'S'),
        ('user', 'Q'),
        ('assistant', 'A.'),
    ]


@pytest.mark.parametrize(
    ('part', 'ref'),
    [
        ({'type': 'image', 'image': 'a.png'}, ImageRef('a.png')),
        ({'type': 'image', 'path': 'a.png'}, ImageRef('a.png')),
        ({'type': 'image', 'image': {'bytes': b'png', 'path': 'a.png'}}, ImageRef(data=b'png')),
        ({'type': 'image', 'image': URI, 'index': None, 'text': None}, ImageRef(data=b'png')),
        ({'type': 'image_url', 'image_url': {'url': URI, 'detail': 'low'}}, ImageRef(data=b'png')),
        ({'type': 'image_url', 'image_url': 'a.png'}, ImageRef('a.png')),
        ({'type': 'image_url', 'image_url': {'url': 'https://x.org/a.png'}}, ImageRef('https://x.org/a.png')),
    ],
)
def test_an_image_inside_a_part(part, ref):
    found = openai_map_fn(ask([{'type': 'text', 'text': 'See '}, part, {'type': 'text', 'text': 'What?'}]))
    assert parts(found) == ['See ', 0, 'What?']
    assert found.images == (ref,)


def test_images_beside_the_messages_in_order():
    content = [{'type': 'image'}, {'type': 'text', 'text': 'and'}, {'type': 'image'}]
    found = openai_map_fn(ask(content, images=['a', b'b']))
    assert parts(found) == [0, 'and', 1]
    assert found.images == (ImageRef('a'), ImageRef(data=b'b'))


def test_images_by_index_in_any_order_and_twice():
    content = [{'type': 'image', 'index': index} for index in (1, 0, 1)]
    found = openai_map_fn(ask(content, images=['a', 'b']))
    assert list(found.shown_images()) == [0, 1, 2]
    assert [ref.path for ref in found.images] == ['b', 'a', 'b']


def test_marks_in_texts_show_the_images_of_the_row():
    row = ask('<image>\nWhat?', images=['a', 'b'])
    row['messages'] += [{'role': 'user', 'content': 'And <image>?'}, ANSWER]
    found = openai_map_fn(row)
    assert parts(found) == [0, 'What?']
    assert parts(found, 2) == ['And ', 1, '?']


def test_a_mark_is_text_without_images_and_in_parts():
    assert parts(openai_map_fn(ask('What does <image> mean in HTML?'))) == ['What does <image> mean in HTML?']
    content = [{'type': 'image'}, {'type': 'text', 'text': '<image>'}]
    assert openai_map_fn(ask(content, images=['a'])).messages[0].parts == (ImagePart(0), TextPart('<image>'))


@pytest.mark.parametrize(
    ('flags', 'loss'),
    [
        ({}, None),
        ({'loss': True}, True),
        ({'loss': False}, False),
        ({'weight': 0}, False),
        ({'weight': 1.0}, True),
        ({'weight': None, 'loss': None}, None),
        ({'loss': 1, 'weight': 1}, True),
    ],
)
def test_the_loss_flag(flags, loss):
    row = ask('Q', answer={**ANSWER, **flags})
    row['messages'] += [{'role': 'user', 'content': 'Q', 'loss': False}, ANSWER]
    found = openai_map_fn(row)
    assert [message.loss for message in found.messages] == [None, loss, None, None]


def test_roles_in_any_order():
    row = {'messages': [ANSWER, {'role': 'user', 'content': 'a'}, {'role': 'user', 'content': 'b'}, ANSWER, ANSWER]}
    assert len(openai_map_fn(row).messages) == 5


IMAGE = {'type': 'image'}


@pytest.mark.parametrize(
    ('bad', 'message'),
    [
        ({'conversations': []}, "has no 'messages', only 'conversations'"),
        (ask([IMAGE, IMAGE, IMAGE], images=['a', 'b']), 'shows 3 images but has 2 images'),
        (ask([IMAGE]), 'shows 1 image but has 0 images'),
        (ask('<image><image>', images=['a']), 'shows 2 images but has 1 image;'),
        (ask('What?', images=['a']), 'shows 0 images but has 1 image;'),
        (
            ask([{'type': 'image', 'index': 0}, {'type': 'image', 'index': 0}], images=['a', 'b']),
            'shows 1 image but has 2',
        ),
        (ask([{'type': 'image', 'index': 2}], images=['a']), r"\['content'\]\[0\] shows image 2, but the row has 1 "),
        (ask([{'type': 'image', 'index': -1}], images=['a']), 'shows image -1'),
        (ask([{'type': 'image', 'index': '0'}], images=['a']), "image index '0'"),
        (ask([{'type': 'image', 'index': 0}, IMAGE], images=['a']), 'some images by index and some in order'),
        (ask([{'type': 'image', 'index': 0, 'image': 'a'}], images=['a']), 'names its image in several ways'),
        (ask([{'type': 'image', 'image': 's3://x.org/a.png'}]), 'image is a URL .*download it first'),
        (ask([{'type': 'image_url', 'image_url': {'url': 'ftp://x.org/a.png'}}]), 'download it first'),
        (ask([{'type': 'image_url'}]), 'image of type NoneType'),
        (ask([{'type': 'video', 'video': None}]), "is 'video'; expected text, image or image_url"),
        (ask([{'type': 'text'}]), r"has no messages\[0\]\['content'\]\[0\]\['text'\]"),
        (ask(['hi']), 'is of type str; expected a dict'),
        (ask([]), r'messages\[0\] \(user\) is empty'),
        (ask(None), "'content'.* is of type NoneType"),
        (ask('Q', answer={'role': 'tool', 'content': '1'}), "is 'tool'; expected one of system"),
        (
            ask('Q', answer={'role': 'assistant', 'content': '', 'tool_calls': [{}]}),
            'tool_calls, which is not supported',
        ),
        (ask('Q', answer={**ANSWER, 'loss': 0.5}), r"messages\[1\]\['loss'\] is 0.5"),
        (ask('Q', answer={**ANSWER, 'loss': True, 'weight': 0}), 'disagree'),
        (ask('Q', answer={**ANSWER, 'loss': False}), 'switches the loss off for every answer'),
        ({'messages': [{'role': 'user', 'content': 'Q', 'loss': True}, ANSWER]}, 'only messages of the assistant'),
        ({'messages': [ANSWER, {'role': 'user', 'content': 'Q'}]}, 'is the last message and from the user'),
        ({'messages': [{'role': 'user', 'content': 'Q'}]}, 'has no answer'),
    ],
)
def test_a_wrong_row_is_named(bad, message):
    with pytest.raises(DataError, match=message):
        openai_map_fn(bad)


# ---- the first turn only


def test_the_first_turn_only():
    """Rows as llava-instruct-mix holds them: parts with an index, and every key in every part."""
    row = {
        'messages': [
            {'role': 'system', 'content': 'S'},
            {
                'role': 'user',
                'content': [
                    {'type': 'text', 'text': 'Q1', 'index': None},
                    {'type': 'image', 'text': None, 'index': 0},
                ],
            },
            {'role': 'assistant', 'content': [{'type': 'text', 'text': 'A1', 'index': None}]},
            {'role': 'user', 'content': [{'type': 'image', 'text': None, 'index': 1}]},
            {'role': 'assistant', 'content': 'A2'},
        ],
        'images': ['a.png', 'b.png'],
    }
    assert len(openai_map_fn(row).messages) == 5
    found = openai_map_fn(row, turns='first')
    assert [(message.role, message.text) for message in found.messages] == [
        ('system', 'S'),
        ('user', 'Q1'),
        ('assistant', 'A1'),
    ]
    assert parts(found, 1) == ['Q1', 0]
    assert found.images == (ImageRef('a.png'),)
    with pytest.raises(ConfigError, match="turns='one'; expected 'all' or 'first'"):
        openai_map_fn(row, turns='one')
