"""The messages format of OpenAI's API and of transformers' chat templates."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from vlmtune.data.image_refs import to_image_ref
from vlmtune.data.map_fns.marks import Mark, plural, split_at_marks
from vlmtune.data.map_fns.objects import place_objects
from vlmtune.data.map_fns.rows import image_refs, require_list, require_mapping, require_text
from vlmtune.data.map_fns.turns import Turn, build_conversation, parse_role
from vlmtune.structures import BoxConvention, Conversation, ImageRef, Role
from vlmtune.utils.errors import ConfigError, DataError

_ROLES: dict[str, Role] = {'system': 'system', 'developer': 'system', 'user': 'user', 'assistant': 'assistant'}
_IMAGE_KEYS = ('image', 'path', 'base64', 'url')


def openai_map_fn(
    row: Mapping[str, Any], *, boxes: BoxConvention | None = None, turns: Literal['all', 'first'] = 'all'
) -> Conversation:
    """``{"messages": [{"role", "content", "loss"}], "images": [...]}``.

    ``content`` is a text or a list of parts::

        {"type": "text", "text": "What is this?"}
        {"type": "image"}                                   the next of the row's images
        {"type": "image", "index": 0}                       that one of the row's images
        {"type": "image", "image": <anything that is an image>}
        {"type": "image_url", "image_url": {"url": <path or data URI>}}

    In a content that is a text, ``<image>`` marks show the next of the row's ``images``; in a row without images, and
    in parts, ``<image>`` is plain text. All images of a row must be shown. Roles may come in any order, if the chat
    template takes it, but the assistant must speak last. ``loss`` (or OpenAI's ``weight``) of a message is true, false,
    1 or 0 and says whether this answer is learned.

    Args:
        row: as above.
        boxes: the convention of the boxes in ``objects``.
        turns: 'first' leaves out what follows the first answer, and the images that only later turns show.

    Raises:
        DataError: the row is not of this format, or images shown and images given differ.
    """
    if turns not in ('all', 'first'):
        raise ConfigError(f"openai_map_fn: turns={turns!r}; expected 'all' or 'first'")
    images = _RowImages(image_refs(row))
    read: list[Turn] = []
    for i, value in enumerate(require_list(row, 'messages')):
        where = f'messages[{i}]'
        message = require_mapping(value, where)
        role = parse_role(message.get('role'), _ROLES, where=f"{where}['role']")
        read.append(Turn(role, _pieces(message, images, where=where), where, _loss(message, where=where)))
    images.finish()
    placed = place_objects(read, row, boxes=boxes)
    return build_conversation(_through_first_answer(placed) if turns == 'first' else placed, alternate=False)


def _through_first_answer(turns: Sequence[Turn]) -> Sequence[Turn]:
    end = next((i for i, turn in enumerate(turns) if turn.role == 'assistant'), len(turns))
    return turns[: end + 1]


class _RowImages:
    """The images beside the messages, handed out in order or by index; never both ways in one row."""

    def __init__(self, refs: list[ImageRef]) -> None:
        self.refs = refs
        self.in_order = 0
        self.indices: set[int] = set()

    def next(self) -> ImageRef | None:
        self.in_order += 1
        return self.refs[self.in_order - 1] if self.in_order <= len(self.refs) else None

    def at(self, index: Any, *, where: str) -> ImageRef:
        if isinstance(index, bool) or not isinstance(index, int):
            raise DataError(f'{where} has the image index {index!r}; expected a whole number')
        if not 0 <= index < len(self.refs):
            message = f'{where} shows image {index}, but the row has {len(self.refs)} images; indices start at 0'
            raise DataError(message, kind='mark_mismatch')
        self.indices.add(index)
        return self.refs[index]

    def finish(self) -> None:
        """Raises DataError unless exactly the images that were given are shown."""
        if self.in_order and self.indices:
            raise DataError('shows some images by index and some in order; expected one way in a row')
        shown = len(self.indices) or self.in_order
        if shown != len(self.refs):
            given = plural(len(self.refs), 'image')
            message = f'shows {plural(shown, "image")} but has {given}; expected the same number, fix the row'
            raise DataError(message, kind='mark_mismatch')


def _pieces(message: Mapping[str, Any], images: _RowImages, *, where: str) -> list[str | ImageRef]:
    content = message.get('content')
    if isinstance(content, str):
        if not images.refs:
            return [content]
        split = split_at_marks(content)
        return [piece for piece in (images.next() if isinstance(p, Mark) else p for p in split) if piece is not None]
    if not isinstance(content, list | tuple):
        raise DataError(f"{where}['content'] is of type {type(content).__name__}; expected a text or a list of parts")
    pieces = []
    for i, value in enumerate(content):
        name = f"{where}['content'][{i}]"
        piece = _piece(require_mapping(value, name), images, where=name)
        if piece is not None:
            pieces.append(piece)
    return pieces


def _piece(part: Mapping[str, Any], images: _RowImages, *, where: str) -> str | ImageRef | None:
    """The text or image of one part; None for an image that the row lacks (``finish`` reports both counts)."""
    kind = part.get('type')
    if kind == 'text':
        return require_text(part, 'text', where=where)
    if kind == 'image_url':
        url = part.get('image_url')
        return to_image_ref(url.get('url') if isinstance(url, Mapping) else url)
    if kind != 'image':
        raise DataError(f"{where}['type'] is {kind!r}; expected text, image or image_url")
    inline = [part[key] for key in _IMAGE_KEYS if part.get(key) is not None]
    if len(inline) + (part.get('index') is not None) > 1:
        raise DataError(f'{where} names its image in several ways; expected one of index, {", ".join(_IMAGE_KEYS)}')
    if inline:
        return to_image_ref(inline[0])
    if part.get('index') is not None:
        return images.at(part['index'], where=where)
    return images.next()


def _loss(message: Mapping[str, Any], *, where: str) -> bool | None:
    given = {key: message[key] for key in ('loss', 'weight') if message.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1):
            raise DataError(f'{where}[{key!r}] is {value!r}; expected true, false, 1 or 0')
    flags = {bool(value) for value in given.values()}
    if len(flags) > 1:
        raise DataError(f"{where} has a 'loss' and a 'weight' that disagree; expected one of them")
    return flags.pop() if flags else None
