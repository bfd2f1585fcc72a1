"""Checks of plain values: what a config may hold, and the ranges of the shared settings."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vlmtune.config.lazy import is_object, object_place, raw_items
from vlmtune.config.names import RUNNER_NAMES

OBJECT_KEYS = ('type', 'constructor')
"""Keys that may hold a class or a function; everything else is plain data, so that a dump reloads equal."""

_PLAIN = (type(None), bool, int, float, complex, str, bytes, set, frozenset)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_Rule = tuple[Callable[[Any], bool], str]
_POSITIVE_INT: _Rule = (lambda value: _is_int(value) and value > 0, 'a positive integer')
_COUNT: _Rule = (lambda value: _is_int(value) and value >= 0, 'an integer, 0 or more')
_SHARE: _Rule = (lambda value: _is_number(value) and 0 <= value < 1, 'a number from 0 to below 1')
_NOT_NEGATIVE: _Rule = (lambda value: _is_number(value) and value >= 0, 'a number, 0 or more')
_BOOL: _Rule = (lambda value: isinstance(value, bool), 'True or False')

RULES: dict[str, _Rule] = {
    'max_length': _POSITIVE_INT,
    'pack_to_max_length': _BOOL,
    'lora_r': _POSITIVE_INT,
    'lora_alpha': (lambda value: _is_number(value) and value > 0, 'a positive number'),
    'lora_dropout': _SHARE,
    'gradient_checkpointing': _BOOL,
    'batch_size': _POSITIVE_INT,
    'accumulative_counts': _POSITIVE_INT,
    'dataloader_num_workers': _COUNT,
    'max_epochs': (  # every epoch is packed at the start, to know the number of steps
        lambda value: value is None or (_is_number(value) and 0 < value <= 100_000),
        'a positive number, to 100,000',
    ),
    'max_steps': (lambda value: value is None or (_is_int(value) and value > 0), 'a positive integer'),
    'lr': _NOT_NEGATIVE,
    'weight_decay': _NOT_NEGATIVE,
    'max_norm': (lambda value: value is None or (_is_number(value) and value > 0), 'a positive number or None'),
    'warmup_ratio': _SHARE,
    'seed': (  # numpy takes no larger one
        lambda value: value is None or (_is_int(value) and 0 <= value < 2**32),
        f'an integer, 0 to {2**32 - 1}, or None',
    ),
    'save_steps': _POSITIVE_INT,
    'save_total_limit': (
        lambda value: _is_int(value) and (value > 0 or value == -1),
        'a positive integer, or -1 to keep all',
    ),
    'evaluation_freq': (lambda value: value is None or (_is_int(value) and value >= 0), 'an integer, 0 or more'),
    'evaluation_inputs': (
        lambda value: isinstance(value, list | tuple) and all(isinstance(text, str) for text in value),
        'a list of strings',
    ),
}
"""{setting: whether a value is right, and what is expected}; arguments of the same names get no other check."""


def value_mistakes(values: Mapping[str, Any]) -> Iterator[str]:
    """Settings out of range, and objects where only plain data may stand."""
    for name, value in raw_items(values):
        if name in RULES and not RULES[name][0](value):
            yield f'{name}: expected {RULES[name][1]}, got {value!r}'
    yield from misplaced_objects(values)


def misplaced_objects(values: Mapping[str, Any]) -> Iterator[str]:
    """Classes, functions and other objects outside ``type=``; ``optim_type = AdamW`` is a setting like any other."""
    for name, value in raw_items(values):
        if name in RUNNER_NAMES or not is_object(value):
            yield from _misplaced(value, name)


def _misplaced(value: Any, place: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in raw_items(value):
            if not (key in OBJECT_KEYS and is_object(inner)):
                yield from _misplaced(inner, f'{place}.{key}')
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _misplaced(inner, f'{place}.{index}')
    elif is_object(value):
        yield f'{place}: only type= may hold an object; write dict(type={object_place(value)[1]}), or a plain value'
    elif not isinstance(value, _PLAIN):
        yield f'{place}: holds {value!r} of class {type(value).__name__}; a config holds plain data only'
