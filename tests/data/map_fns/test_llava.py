"""LLaVA rows."""

import pytest

from vlmtune.data.map_fns import llava_map_fn
from vlmtune.structures import Conversation, ImagePart, ImageRef, Message, TextPart
from vlmtune.utils.errors import DataError


def row(*values, **fields):
    roles = ('human', 'gpt')
    messages = [{'from': roles[i % 2], 'value': value} for i, value in enumerate(values)]
    return {'id': '7', 'conversations': messages, **fields}


def parts(conversation):
    return [
        [part.text if isinstance(part, TextPart) else part.index for part in message.parts]
        for message in conversation.messages
    ]


def test_one_image():
    found = llava_map_fn(row('<image>\nWhat?', 'A cat.', image='a/b.jpg'))
    assert found == Conversation(
        (Message('user', (ImagePart(0), TextPart('What?'))), Message('assistant', (TextPart('A cat.'),))),
        (ImageRef('a/b.jpg'),),
    )


def test_text_only_without_an_image_key_or_with_a_null_one():
    for fields in ({}, {'image': None}, {'image': []}):
        assert llava_map_fn(row('Hi', 'Hello', **fields)).images == ()


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('<image>\nWhat?', [0, 'What?']),
        ('What?\n<image>', ['What?', 0]),
        ('What?\r\n<image>', ['What?', 0]),
        ('<image>What?', [0, 'What?']),
        ('<image>\n\nWhat?', [0, '\nWhat?']),
        ('See <image> here', ['See ', 0, ' here']),
        ('Line\n<image>\nLine', ['Line', 0, 'Line']),
        ('<image>', [0]),
        ('<image> \n', [0]),
    ],
)
def test_one_line_break_beside_a_mark_goes_with_it(text, expected):
    assert parts(llava_map_fn(row(text, 'A', image='x.png')))[0] == expected


def test_text_without_a_mark_is_untouched():
    assert parts(llava_map_fn(row('\n hi \n', ' a\n'))) == [['\n hi \n'], [' a\n']]


def test_several_images_in_any_turn():
    found = llava_map_fn(row('<image>\n<image>\nCompare', 'Same.', 'And\n<image>', 'No.', image=['a', 'b', 'c']))
    assert parts(found) == [[0, 1, 'Compare'], ['Same.'], ['And', 2], ['No.']]
    assert [ref.path for ref in found.images] == ['a', 'b', 'c']
    assert list(found.shown_images()) == [0, 1, 2]


@pytest.mark.parametrize(
    ('bad', 'message'),
    [
        (row('<image><image>\n<image>', 'A', image=['a', 'b']), 'has 3 <image> marks but 2 images'),
        (row('What?', 'A', image='a'), 'has 0 <image> marks but 1 image;'),
        (row('<image>\nWhat?', 'A'), 'has 1 <image> mark but 0 images'),
        ({'id': 1}, "has no 'conversations', only 'id'"),
        ({'conversations': []}, "'conversations' is empty"),
        ({'conversations': '[]'}, "'conversations' is of type str"),
        ({'conversations': ['hi']}, r'conversations\[0\] is of type str'),
        ({'conversations': [{'from': 'human'}]}, r"has no conversations\[0\]\['value'\]"),
        ({'conversations': [{'from': 'human', 'value': 3}]}, r"conversations\[0\]\['value'\] is of type int"),
        ({'conversations': [{'from': 'bot', 'value': 'x'}]}, r"\['from'\] is 'bot'; expected one of human, gpt"),
        ({'conversations': [{'value': 'x'}]}, r"\['from'\] is None"),
        (
            {'conversations': [{'from': 'gpt', 'value': 'x'}]},
            r'conversations\[0\] is from the assistant; expected user',
        ),
        (row('Hi'), 'has no answer of the assistant'),
        (row('Hi', 'Hello', 'Bye'), r'conversations\[2\] is the last message and from the user'),
        (row('Hi', ' '), r'conversations\[1\] \(assistant\) is empty'),
        (row('\n', 'Hello'), r'conversations\[0\] \(user\) is empty'),
        (row('Hi', 'Hello', image=''), 'empty image path'),
        (row('<image>', 'Hello', image='a', images=['a']), "both 'image' and 'images'"),
        (row('<video>', 'Hello', video='a.mp4'), 'row holds video, which is not supported'),
        (row('Hi \ud83d', 'Hello'), r'conversations\[0\] \(user\) holds half a character'),
    ],
)
def test_a_wrong_row_is_named(bad, message):
    with pytest.raises(DataError, match=message):
        llava_map_fn(bad)


def test_two_turns_of_one_role():
    messages = [{'from': 'human', 'value': 'a'}, {'from': 'human', 'value': 'b'}, {'from': 'gpt', 'value': 'c'}]
    with pytest.raises(DataError, match=r'conversations\[1\] is from the user; expected user and assistant in turn'):
        llava_map_fn({'conversations': messages})
