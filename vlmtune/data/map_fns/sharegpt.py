"""The ShareGPT format, as LLaMA-Factory and others read it."""

from collections.abc import Mapping
from typing import Any

from vlmtune.data.map_fns.marks import place_images
from vlmtune.data.map_fns.objects import place_objects
from vlmtune.data.map_fns.rows import image_refs, optional_text, require_list, require_mapping, require_text
from vlmtune.data.map_fns.turns import Turn, build_conversation, parse_role
from vlmtune.structures import BoxConvention, Conversation, Role
from vlmtune.utils.errors import DataError

_ROLES: dict[str, Role] = {
    'human': 'user',
    'user': 'user',
    'gpt': 'assistant',
    'assistant': 'assistant',
    'system': 'system',
}


def sharegpt_map_fn(row: Mapping[str, Any], *, boxes: BoxConvention | None = None) -> Conversation:
    """``{"conversations": [{"from", "value"}], "images": [...], "system": "..."}``.

    ``from`` is human or user, gpt or assistant, or (first only) system; a system text may stand beside the
    conversation instead. Every ``<image>`` mark shows the next of ``images`` (or ``image``), where it stands; an image
    without a mark is an error, as it is in LLaMA-Factory.

    Raises:
        DataError: the row is not of this format, or marks and images differ in number.
    """
    roles, texts, names = [], [], []
    for i, value in enumerate(require_list(row, 'conversations')):
        where = f'conversations[{i}]'
        message = require_mapping(value, where)
        roles.append(parse_role(message.get('from'), _ROLES, where=f"{where}['from']"))
        texts.append(require_text(message, 'value', where=where))
        names.append(where)
    if system := optional_text(row, 'system'):
        if roles[0] == 'system':
            raise DataError("has a system text in 'system' and in conversations[0]; expected one of them")
        roles, texts, names = ['system', *roles], [system, *texts], ["'system'", *names]
    placed = place_images(texts, image_refs(row))
    turns = [Turn(*turn) for turn in zip(roles, placed, names, strict=True)]
    return build_conversation(place_objects(turns, row, boxes=boxes))
