"""Whether the plain values that a config gives to a function of ours are of the kinds that its annotations name."""

import os
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from vlmtune.config.lazy import is_object, raw_items
from vlmtune.config.values import RULES

_WORDS: dict[Any, tuple[type | types.UnionType, str]] = {
    type(None): (type(None), 'None'),
    bool: (bool, 'True or False'),
    int: (int, 'an integer'),
    float: (int | float, 'a number'),
    str: (str, 'a text'),
    os.PathLike: (str | os.PathLike, 'a text'),
}
"""What a config may give for an annotation, and its name in messages."""


def argument_mistakes(hints: Mapping[str, Any], given: Mapping[Any, Any], path: str) -> Iterator[str]:
    """Values of a wrong kind, one line each; of what has a rule of its own (``config/values.py``) that one speaks.

    Args:
        hints: {argument: its annotation}, of one function.
        given: {argument: its value} in the config; an annotation that is no plain data fits whatever it is.
        path: of the function in the config.
    """
    for name, value in raw_items(given):
        if name in hints and name not in RULES and not _fits(value, hints[name]):
            expected = ' or '.join(dict.fromkeys(_words(hints[name])))
            yield f'{path}.{name}: expected {expected}, got {value!r}'


def _fits(value: Any, hint: Any) -> bool:
    if is_object(value) or (isinstance(value, Mapping) and 'type' in dict(raw_items(value))):
        return True  # what is built of it is what counts
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if origin in _WORDS:
        return isinstance(value, _WORDS[origin][0]) and (origin is bool or not isinstance(value, bool))
    if origin is typing.Literal:
        return any(_fits(value, type(word)) for word in inner)  # which word it is, its reader says
    if not isinstance(origin, type) or typing.is_typeddict(origin):
        return not typing.is_typeddict(origin) or isinstance(value, Mapping)
    if issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if issubclass(origin, Collection):
        if not isinstance(value, list | tuple | set | frozenset):
            return False
        alike = len(inner) == 1 or inner[1:] == (...,)
        return not alike or all(_fits(item, inner[0]) for item in value)
    return True


def _words(hint: Any) -> Iterator[str]:
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in inner:
            yield from _words(option)
    elif origin is typing.Literal:
        yield 'one of ' + ', '.join(map(repr, inner))
    elif origin in _WORDS:
        yield _WORDS[origin][1]
    elif typing.is_typeddict(origin) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        yield 'a dict'
    elif isinstance(origin, type) and issubclass(origin, Collection):
        each = ' or '.join(_words(inner[0])) if inner else ''
        yield f'a list (each {each})' if each else 'a list'
