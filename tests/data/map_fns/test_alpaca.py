"""Alpaca rows."""

import pytest

from vlmtune.data.map_fns import alpaca_map_fn
from vlmtune.utils.errors import DataError


def texts(row):
    return [(message.role, message.text) for message in alpaca_map_fn(row).messages]


@pytest.mark.parametrize('nothing', [None, '', '<noinput>'])
def test_without_input(nothing):
    row = {'instruction': 'Count', 'input': nothing, 'output': '1 2', 'system': None, 'history': []}
    assert texts(row) == [('user', 'Count'), ('assistant', '1 2')]


def test_everything():
    row = {
        'instruction': 'Sort',
        'input': '2 1',
        'output': '1 2',
        'system': 'Be brief.',
        'history': [['Hi', 'Hello'], ('Ready?', 'Yes')],
    }
    assert texts(row) == [
        ('system', 'Be brief.'),
        ('user', 'Hi'),
        ('assistant', 'Hello'),
        ('user', 'Ready?'),
        ('assistant', 'Yes'),
        ('user', 'Sort\n2 1'),
        ('assistant', '1 2'),
    ]


def test_marks_show_images_only_where_there_are_images():
    row = {'instruction': '<image>\nWhat?', 'output': 'A cat'}
    assert texts(row)[0] == ('user', '<image>\nWhat?')
    found = alpaca_map_fn({**row, 'images': ['a.png']})
    assert found.messages[0].image_indices == (0,)
    assert found.messages[0].text == 'What?'


@pytest.mark.parametrize(
    ('bad', 'message'),
    [
        ({'output': 'x'}, "has no 'instruction'"),
        ({'instruction': 'x'}, "has no 'output'"),
        ({'instruction': 'x', 'output': ''}, r"'output' \(assistant\) is empty"),
        ({'instruction': 'x', 'output': '<nooutput>'}, 'nooutput'),
        ({'instruction': '', 'input': '', 'output': 'x'}, r"'instruction' \(user\) is empty"),
        ({'instruction': 'x', 'output': 'y', 'history': ['a']}, r"'history'\[0\] is 'a'"),
        ({'instruction': 'x', 'output': 'y', 'history': 'ab'}, "'history' is of type str"),
        ({'instruction': 'x', 'output': 'y', 'images': ['a']}, '0 <image> marks but 1 image;'),
        ({'instruction': 'x', 'output': 7}, "'output' is of type int"),
    ],
)
def test_a_wrong_row_is_named(bad, message):
    with pytest.raises(DataError, match=message):
        alpaca_map_fn(bad)
