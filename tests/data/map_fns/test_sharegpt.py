"""ShareGPT rows."""

import pytest

from vlmtune.data.map_fns import sharegpt_map_fn
from vlmtune.structures import ImagePart, ImageRef, TextPart
from vlmtune.utils.errors import DataError


def turns(*pairs):
    return [{'from': role, 'value': text} for role, text in pairs]


@pytest.mark.parametrize(('asks', 'answers'), [('human', 'gpt'), ('user', 'assistant')])
def test_both_pairs_of_role_names(asks, answers):
    row = {'conversations': turns((asks, 'See\n<image>'), (answers, 'A'), (asks, 'B'), (answers, 'C')), 'images': ['x']}
    found = sharegpt_map_fn(row)
    assert [message.role for message in found.messages] == ['user', 'assistant', 'user', 'assistant']
    assert found.messages[0].parts == (TextPart('See'), ImagePart(0))
    assert found.images == (ImageRef('x'),)


def test_a_system_text_in_the_conversation_or_beside_it():
    inside = {'conversations': turns(('system', 'Be kind.'), ('human', 'Hi'), ('gpt', 'Hello'))}
    beside = {'conversations': turns(('human', 'Hi'), ('gpt', 'Hello')), 'system': 'Be kind.', 'tools': ''}
    assert sharegpt_map_fn(inside) == sharegpt_map_fn(beside)
    assert [message.role for message in sharegpt_map_fn(beside).messages] == ['system', 'user', 'assistant']


def test_no_system_text():
    row = {'conversations': turns(('human', 'Hi'), ('gpt', 'Hello')), 'system': '', 'images': None}
    assert len(sharegpt_map_fn(row).messages) == 2


PAIR = turns(('human', 'Hi'), ('gpt', 'Hello'))


@pytest.mark.parametrize(
    ('bad', 'message'),
    [
        ({'conversations': PAIR, 'images': ['a', 'b']}, 'has 0 <image> marks but 2 images'),
        ({'conversations': turns(('system', 'S'), *[('human', 'x')])}, 'has no answer'),
        ({'conversations': turns(('system', 'S')) + PAIR, 'system': 'T'}, "in 'system' and in conversations"),
        ({'conversations': PAIR + turns(('system', 'S')) + PAIR}, r'conversations\[2\] is a system message'),
        (
            {'conversations': turns(('human', 'x'), ('function_call', '{}'))},
            "is 'function_call'; expected one of human",
        ),
        ({'conversations': PAIR, 'tools': '[{}]'}, 'row holds tools'),
        ({'conversations': turns(('system', '<image>')) + PAIR, 'images': ['a']}, 'image into a system message'),
        ({'conversations': turns(('human', 'x'), ('gpt', '<image>')), 'images': ['a']}, r'\(assistant\) is empty'),
        (
            {'conversations': turns(('human', 'x'), ('gpt', 'a'), ('gpt', 'b'))},
            r'conversations\[2\] is from the assistant',
        ),
        ({'conversations': PAIR, 'system': 5}, "'system' is of type int"),
        ({'conversations': PAIR, 'images': [3]}, 'image of type int'),
    ],
)
def test_a_wrong_row_is_named(bad, message):
    with pytest.raises(DataError, match=message):
        sharegpt_map_fn(bad)
