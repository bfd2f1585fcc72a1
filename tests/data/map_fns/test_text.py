"""Plain text rows."""

import pytest

from vlmtune.data.map_fns import text_map_fn
from vlmtune.structures import Conversation, Message, TextPart
from vlmtune.utils.errors import DataError


@pytest.mark.parametrize(
    ('row', 'options'), [({'text': ' <image>\nx'}, {}), ({'body': ' <image>\nx'}, {'key': 'body'})]
)
def test_one_learned_message(row, options):
    message = Message('assistant', (TextPart(' <image>\nx'),), loss=True)
    assert text_map_fn(row, **options) == Conversation((message,))


@pytest.mark.parametrize(
    ('bad', 'message'), [({}, "has no 'text'"), ({'text': ' '}, 'is empty'), ({'text': ['x']}, 'of type list')]
)
def test_a_wrong_row_is_named(bad, message):
    with pytest.raises(DataError, match=message):
        text_map_fn(bad)
