"""Plain text, for continued pretraining."""

from collections.abc import Mapping
from typing import Any

from vlmtune.data.map_fns.rows import require_text
from vlmtune.data.map_fns.turns import Turn, build_conversation
from vlmtune.structures import Conversation


def text_map_fn(row: Mapping[str, Any], *, key: str = 'text') -> Conversation:
    """``{"text": "..."}``: one assistant message with ``loss=True`` and nothing else, so every token is learned.

    A conversation of this form (a single message, from the assistant) is how plain text is told from a chat. It holds
    no images, and ``<image>`` in it is plain text.

    Args:
        row: a row of the data set.
        key: the column that holds the text.

    Raises:
        DataError: no text, or an empty one.
    """
    turn = Turn('assistant', [require_text(row, key)], repr(key), loss=True)
    return build_conversation([turn], alternate=False)
