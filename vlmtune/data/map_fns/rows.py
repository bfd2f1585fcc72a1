"""Strict access to a row: a missing or odd field is an error that says what was found."""

from collections.abc import Mapping, Sequence
from typing import Any

from vlmtune.data.image_refs import to_image_ref
from vlmtune.structures import ImageRef
from vlmtune.utils.errors import DataError

_UNSUPPORTED = ('video', 'videos', 'audio', 'audios', 'tools', 'tool_calls', 'reasoning_content')


def require_list(row: Mapping[str, Any], key: str) -> list[Any]:
    """The non-empty list at ``row[key]``.

    Raises:
        DataError: no such key, not a list, or an empty one.
    """
    check_keys(row)
    value = row.get(key)
    if value is None:
        raise DataError(f'has no {key!r}, only {_keys(row)}; expected a list of messages, or another dataset_map_fn')
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise DataError(f'{key!r} is of type {type(value).__name__}; expected a list of messages')
    if not value:
        raise DataError(f'{key!r} is empty; expected messages')
    return list(value)


def require_text(row: Mapping[str, Any], key: str, *, where: str = '') -> str:
    """The text at ``row[key]``; it may be empty.

    Raises:
        DataError: no such key, or not a text.
    """
    name = f'{where}[{key!r}]' if where else repr(key)
    value = row.get(key)
    if value is None:
        raise DataError(f'has no {name}; expected a text; the keys are {_keys(row)}')
    if not isinstance(value, str):
        raise DataError(f'{name} is of type {type(value).__name__}; expected a text')
    return value


def optional_text(row: Mapping[str, Any], key: str) -> str:
    """The text at ``row[key]``, '' where there is none.

    Raises:
        DataError: the value is not a text.
    """
    return require_text(row, key) if row.get(key) is not None else ''


def require_mapping(value: Any, where: str) -> Mapping[str, Any]:
    """The message ``value``.

    Raises:
        DataError: it is not a dict, or holds what is not supported, for example tool calls.
    """
    if not isinstance(value, Mapping):
        raise DataError(f'{where} is of type {type(value).__name__}; expected a dict')
    check_keys(value, where=where)
    return value


def check_keys(row: Mapping[str, Any], *, where: str = '') -> None:
    """Refuse what would otherwise be dropped in silence.

    Raises:
        DataError: the row or message holds a video, audio, tools or separate reasoning.
    """
    found = [key for key in _UNSUPPORTED if _is_given(row.get(key))]
    if found:
        raise DataError(
            f'{where or "row"} holds {", ".join(found)}, which is not supported; expected text and images only'
        )


def _is_given(value: Any) -> bool:
    return value is not None and not (hasattr(value, '__len__') and len(value) == 0)


def image_refs(row: Mapping[str, Any]) -> list[ImageRef]:
    """The images at ``row['image']`` or ``row['images']``: one or a list; [] where there is none.

    Raises:
        DataError: both keys hold something, or a value is no image.
    """
    given = {key: row[key] for key in ('image', 'images') if _is_given(row.get(key)) or row.get(key) in ('', b'')}
    if len(given) > 1:
        raise DataError("has both 'image' and 'images'; expected one of them")
    value: Any = next(iter(given.values()), [])
    values = value if isinstance(value, list | tuple) else [value]
    return [to_image_ref(item) for item in values]


def _keys(row: Mapping[str, Any]) -> str:
    return ', '.join(map(repr, row)) or 'no keys at all'
