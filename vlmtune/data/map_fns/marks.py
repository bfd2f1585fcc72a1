"""Image marks in text: where a format writes ``<image>``, an image stands."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from vlmtune.structures import ImageRef
from vlmtune.utils.errors import DataError


class Mark(NamedTuple):
    """An image mark found in a text."""

    name: str


IMAGE_MARK = re.compile('<image>')


def split_at_marks(text: str, pattern: re.Pattern[str] = IMAGE_MARK) -> list[str | Mark]:
    """Texts and marks, in order.

    The one line break on each side of a mark goes with the mark (``'<image>\\nWhat?'`` is a mark and ``'What?'``):
    what separates an image from the text is the business of the chat template. Texts beside a mark that are nothing
    but white space are dropped. A text without marks stays as it is.
    """
    pieces: list[str | Mark] = []
    at = 0
    for match in re.finditer(rf'(?:\r?\n)?({pattern.pattern})(?:\r?\n)?', text):
        pieces += [text[at : match.start()], Mark(match[1])]
        at = match.end()
    if not pieces:
        return [text]
    pieces.append(text[at:])
    return [piece for piece in pieces if isinstance(piece, Mark) or piece.strip()]


def place_images(texts: Sequence[str], refs: Sequence[ImageRef]) -> list[list[str | ImageRef]]:
    """Every ``<image>`` mark in the texts replaced by the next image.

    Raises:
        DataError: marks and images differ in number.
    """
    split = [split_at_marks(text) for text in texts]
    count = sum(isinstance(piece, Mark) for pieces in split for piece in pieces)
    if count != len(refs):
        marks, images = plural(count, '<image> mark'), plural(len(refs), 'image')
        message = f'has {marks} but {images}; expected one mark per image, fix the row'
        raise DataError(message, kind='mark_mismatch')
    left = iter(refs)
    return [[next(left) if isinstance(piece, Mark) else piece for piece in pieces] for pieces in split]


def plural(count: int, noun: str) -> str:
    """``1 image``, ``2 images``."""
    return f'{count} {noun}' if count == 1 else f'{count} {noun}s'
