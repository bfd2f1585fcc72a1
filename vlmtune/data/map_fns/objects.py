"""Boxes and names in text, as ms-swift writes them: ``<bbox>`` and ``<ref-object>`` marks, and ``objects`` in the row.

{"objects": {"bbox": [[x1, y1, x2, y2], ...], "ref": ["a dog", ...], "image_id": [0, ...]}, ...}
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vlmtune.data.map_fns.marks import plural
from vlmtune.data.map_fns.turns import Turn
from vlmtune.structures import BOX_CONVENTIONS, BoxConvention, BoxPart, ImageRef
from vlmtune.utils.errors import ConfigError, DataError

_BOX, _NAME = '<bbox>', '<ref-object>'
_MARKS = re.compile(f'({_BOX}|{_NAME})')
_MS_SWIFT_TYPES = {'real': 'pixel', 'norm1': 'unit'}


class _Objects(NamedTuple):
    boxes: list[tuple[float, float, float, float]]
    names: list[str]
    images: list[int] | None


def place_objects(turns: Sequence[Turn], row: Mapping[str, Any], *, boxes: BoxConvention | None) -> list[Turn]:
    """Every ``<bbox>`` mark in the texts replaced by the next box, every ``<ref-object>`` mark by the next name.

    A box lies on the last image shown before its mark, or on that one of the images, counted as they are shown, which
    the row's ``image_id`` names.

    Args:
        turns: images in place.
        row: with ``objects``, if there are marks.
        boxes: how the data set counts. None: it has no boxes; ``objects`` and ``<ref-object>`` are not looked at.

    Raises:
        DataError: boxes in a data set that does not say how they count, marks and objects that differ in number, a
            box that is not four numbers or has no image.
        ConfigError: an unknown convention.
    """
    texts = [piece for turn in turns for piece in turn.pieces if isinstance(piece, str)]
    count = sum(text.count(_BOX) for text in texts)
    if boxes is None:
        if count:
            raise _wrong(
                f'has {plural(count, f"{_BOX} mark")}, but the data set does not say how its boxes count; '
                f'set boxes= in dataset_map_fn to one of {", ".join(map(repr, BOX_CONVENTIONS))}'
            )
        return list(turns)
    if boxes not in BOX_CONVENTIONS:
        raise ConfigError(f'dataset_map_fn: boxes={boxes!r}; expected one of {", ".join(map(repr, BOX_CONVENTIONS))}')
    objects = _read_objects(row, boxes)
    _check_count(count, len(objects.boxes), _BOX, "'objects'['bbox']")
    _check_count(sum(text.count(_NAME) for text in texts), len(objects.names), _NAME, "'objects'['ref']")
    return _place(turns, objects, boxes)


def _place(turns: Sequence[Turn], objects: _Objects, convention: BoxConvention) -> list[Turn]:
    total = sum(isinstance(piece, ImageRef) for turn in turns for piece in turn.pieces)
    names, numbers = iter(objects.names), iter(range(len(objects.boxes)))
    shown, placed = 0, []

    def next_box() -> BoxPart:
        number = next(numbers)
        image = shown - 1 if objects.images is None else objects.images[number]
        if image < 0 and not shown:
            raise _wrong(f'has box {number} before any image; expected the image first, or its number in image_id')
        if not 0 <= image < total:
            raise _wrong(f"'objects'['image_id'] of box {number} is {image}; the row shows {plural(total, 'image')}")
        return BoxPart(image, objects.boxes[number], convention)

    for turn in turns:
        pieces: list[str | ImageRef | BoxPart] = []
        for piece in turn.pieces:
            if isinstance(piece, str):
                pieces += _fill(piece, names, next_box)
            else:
                shown += isinstance(piece, ImageRef)
                pieces.append(piece)
        placed.append(dataclasses.replace(turn, pieces=pieces))
    return placed


def _fill(text: str, names: Iterator[str], next_box: Callable[[], BoxPart]) -> list[str | BoxPart]:
    """One text as texts and boxes, names filled in."""
    filled: list[str | BoxPart] = []
    written = ''
    for piece in _MARKS.split(text):
        if piece == _BOX:
            filled += [written, next_box()]
            written = ''
        else:
            written += next(names) if piece == _NAME else piece
    return [*filled, written]  # empty texts are dropped with all others


def _read_objects(row: Mapping[str, Any], convention: BoxConvention) -> _Objects:
    objects = row.get('objects')
    objects = {} if objects is None else objects
    if not isinstance(objects, Mapping):
        raise _wrong(f"'objects' is of type {type(objects).__name__}; expected a dict with the lists bbox and ref")
    kind = objects.get('bbox_type')
    if kind is not None and _MS_SWIFT_TYPES.get(kind) != convention:
        raise _wrong(f"'objects'['bbox_type'] is {kind!r}, but dataset_map_fn says boxes={convention!r}; fix either")
    boxes = [_read_box(value, i) for i, value in enumerate(_list(objects, 'bbox'))]
    names = _list(objects, 'ref')
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise _wrong(f"'objects'['ref'][{i}] is of type {type(name).__name__}; expected a text")
    images = _list(objects, 'image_id') or None
    if images is not None and (len(images) != len(boxes) or any(type(image) is not int for image in images)):
        raise _wrong(f"'objects'['image_id'] is {images!r:.80}; expected one whole number for each of the boxes")
    return _Objects(boxes, names, images)


def _list(objects: Mapping[str, Any], key: str) -> list[Any]:
    value = objects.get(key)
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise _wrong(f"'objects'[{key!r}] is of type {type(value).__name__}; expected a list")
    return list(value)


def _read_box(value: Any, number: int) -> tuple[float, float, float, float]:
    values = value if isinstance(value, list | tuple) else ()
    if len(values) != 4 or any(isinstance(item, bool) or not isinstance(item, int | float) for item in values):
        raise _wrong(f"'objects'['bbox'][{number}] is {value!r:.80}; expected four numbers, [x1, y1, x2, y2]")
    left, top, right, bottom = values
    return left, top, right, bottom


def _check_count(marks: int, given: int, mark: str, name: str) -> None:
    if marks != given:
        raise _wrong(f'has {plural(marks, f"{mark} mark")} but {given} in {name}; expected the same number')


def _wrong(message: str) -> DataError:
    return DataError(message, kind='wrong_box')
