"""MiniCPM-V rows."""

import pytest

from vlmtune.data.map_fns import minicpmv_map_fn
from vlmtune.structures import ImageRef, TextPart
from vlmtune.utils.errors import DataError


def row(*texts, image=None):
    roles = ('user', 'assistant')
    messages = [{'role': roles[i % 2], 'content': text} for i, text in enumerate(texts)]
    return {'id': '0', 'image': image, 'conversations': messages}


def parts(conversation):
    return [
        [part.text if isinstance(part, TextPart) else conversation.images[part.index].path for part in message.parts]
        for message in conversation.messages
    ]


TWO = {'<image_00>': 'a.jpg', '<image_01>': 'b.jpg'}


@pytest.mark.parametrize(
    ('texts', 'image', 'expected'),
    [
        (('Hi', 'Hello'), None, [['Hi'], ['Hello']]),
        (('<image>\nWhat?', 'A'), 'a.jpg', [['a.jpg', 'What?'], ['A']]),
        (('What?', 'A'), 'a.jpg', [['a.jpg', 'What?'], ['A']]),
        (('What?', 'A', 'B', 'C'), ['a.jpg', 'b.jpg'], [['a.jpg', 'b.jpg', 'What?'], ['A'], ['B'], ['C']]),
        (('What?', 'A', 'See <image>', 'C'), 'a.jpg', [['What?'], ['A'], ['See ', 'a.jpg'], ['C']]),
        (('Compare', 'A'), TWO, [['a.jpg', 'b.jpg', 'Compare'], ['A']]),
        (
            ('<image_01>\nagainst\n<image_00>', 'A', '<image_01>?', 'B'),
            TWO,
            [['b.jpg', 'against', 'a.jpg'], ['A'], ['b.jpg', '?'], ['B']],
        ),
        (('See <image_0> .', 'A'), {'<image_0>': 'a.jpg', '<image_1>': None}, [['See ', 'a.jpg', ' .'], ['A']]),
    ],
)
def test_placement(texts, image, expected):
    found = minicpmv_map_fn(row(*texts, image=image))
    assert parts(found) == expected
    assert list(found.shown_images()) == list(range(len(found.images)))


def test_a_dict_of_bytes_is_one_image():
    found = minicpmv_map_fn(row('<image>\nWhat?', 'A', image={'bytes': b'x', 'path': None}))
    assert found.images == (ImageRef(data=b'x'),)
    assert found.messages[0].text == 'What?'


@pytest.mark.parametrize(
    ('bad', 'message'),
    [
        (row('<image_00>', 'A', image=TWO), 'has the marks <image_00> but the images <image_00>, <image_01>'),
        (row('<image_00><image_02>', 'A', image={'<image_00>': 'a'}), 'has the marks <image_00>, <image_02> but'),
        (row('<image>', 'A', image=['a', 'b']), 'has 1 <image> mark but 2 images'),
        (row('<image>', 'A'), 'has 1 <image> mark but 0 images'),
        ({'conversations': [{'role': 'system', 'content': 'x'}]}, "is 'system'; expected one of user, assistant"),
        ({'conversations': [{'from': 'human', 'value': 'x'}]}, "'role'.* is None"),
        ({'id': 1, 'image': 'a'}, "has no 'conversations'"),
    ],
)
def test_a_wrong_row_is_named(bad, message):
    with pytest.raises(DataError, match=message):
        minicpmv_map_fn(bad)
