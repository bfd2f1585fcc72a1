"""The format of MiniCPM-V's fine-tuning data."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlmtune.data.image_refs import to_image_ref
from vlmtune.data.map_fns.marks import IMAGE_MARK, Mark, place_images, split_at_marks
from vlmtune.data.map_fns.objects import place_objects
from vlmtune.data.map_fns.rows import image_refs, require_list, require_mapping, require_text
from vlmtune.data.map_fns.turns import Turn, build_conversation, parse_role
from vlmtune.structures import BoxConvention, Conversation, ImageRef, Role
from vlmtune.utils.errors import DataError

_ROLES: dict[str, Role] = {'user': 'user', 'assistant': 'assistant'}
_NAMED_MARK = re.compile(r'<image_\d+>')


def minicpmv_map_fn(row: Mapping[str, Any], *, boxes: BoxConvention | None = None) -> Conversation:
    """``{"id", "image", "conversations": [{"role": "user" | "assistant", "content"}]}``.

    ``image`` is missing (text only), one image or a list, shown at the ``<image>`` marks in order; or a dict
    ``{"<image_00>": path, ...}``, each shown where its own mark stands, in any order, also more than once. Without any
    mark, all images come first in the first user message, as MiniCPM-V places them.

    Raises:
        DataError: the row is not of this format, some images have a mark and some have none, or a mark has no image.
    """
    roles, texts = [], []
    for i, value in enumerate(require_list(row, 'conversations')):
        message = require_mapping(value, f'conversations[{i}]')
        roles.append(parse_role(message.get('role'), _ROLES, where=f"conversations[{i}]['role']"))
        texts.append(require_text(message, 'content', where=f'conversations[{i}]'))
    placed = _place(texts, row)
    spoken = enumerate(zip(roles, placed, strict=True))
    turns = [Turn(role, pieces, f'conversations[{i}]') for i, (role, pieces) in spoken]
    return build_conversation(place_objects(turns, row, boxes=boxes))


def _place(texts: Sequence[str], row: Mapping[str, Any]) -> list[list[str | ImageRef]]:
    image = row.get('image')
    if isinstance(image, Mapping) and not {'bytes', 'path'} & set(image):
        named = {str(name): to_image_ref(value) for name, value in image.items() if value is not None}
        refs, pattern = list(named.values()), _NAMED_MARK
    else:
        named, refs, pattern = {}, image_refs(row), IMAGE_MARK
    if refs and not any(pattern.search(text) for text in texts):
        first: list[str | ImageRef] = [*refs, texts[0]]
        rest: list[list[str | ImageRef]] = [[text] for text in texts[1:]]
        return [first, *rest]
    return _place_named(texts, named) if named else place_images(texts, refs)


def _place_named(texts: Sequence[str], named: Mapping[str, ImageRef]) -> list[list[str | ImageRef]]:
    split = [split_at_marks(text, _NAMED_MARK) for text in texts]
    marks = {piece.name for pieces in split for piece in pieces if isinstance(piece, Mark)}
    if marks != set(named):
        message = f'has the marks {_list(marks)} but the images {_list(named)}; expected a mark for each image'
        raise DataError(message, kind='mark_mismatch')
    return [[named[piece.name] if isinstance(piece, Mark) else piece for piece in pieces] for pieces in split]


def _list(names: Any) -> str:
    return ', '.join(sorted(names))
