"""The LLaVA format."""

from collections.abc import Mapping
from typing import Any

from vlmtune.data.map_fns.marks import place_images
from vlmtune.data.map_fns.objects import place_objects
from vlmtune.data.map_fns.rows import image_refs, require_list, require_mapping, require_text
from vlmtune.data.map_fns.turns import Turn, build_conversation, parse_role
from vlmtune.structures import BoxConvention, Conversation, Role

_ROLES: dict[str, Role] = {'human': 'user', 'gpt': 'assistant'}


def llava_map_fn(row: Mapping[str, Any], *, boxes: BoxConvention | None = None) -> Conversation:
    """``{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}``.

    ``image`` is missing (text only), one image or a list. Every ``<image>`` mark shows the next image, where it stands.
    An image without a mark is an error: LLaVA's own loader would load it and never show it.

    Raises:
        DataError: the row is not of this format, or marks and images differ in number.
    """
    roles, texts = [], []
    for i, value in enumerate(require_list(row, 'conversations')):
        message = require_mapping(value, f'conversations[{i}]')
        roles.append(parse_role(message.get('from'), _ROLES, where=f"conversations[{i}]['from']"))
        texts.append(require_text(message, 'value', where=f'conversations[{i}]'))
    placed = place_images(texts, image_refs(row))
    spoken = enumerate(zip(roles, placed, strict=True))
    turns = [Turn(role, pieces, f'conversations[{i}]') for i, (role, pieces) in spoken]
    return build_conversation(place_objects(turns, row, boxes=boxes))
