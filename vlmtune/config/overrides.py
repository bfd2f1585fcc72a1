"""``--cfg-options``: reading them, and deciding where each one takes effect."""

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmengine.config.lazy import LazyObject

from vlmtune.config.evaluate import Changes
from vlmtune.config.mistakes import raise_mistakes
from vlmtune.config.names import RUNNER_NAMES, unknown_name
from vlmtune.config.source import NameUse, Source
from vlmtune.config.tree import DeepKey

OPTION = '--cfg-options'


def parse_cfg_options(options: Iterable[str]) -> dict[str, Any]:
    """``['lr=1e-5', 'tune.llm=full']`` -> ``{'lr': 1e-5, 'tune.llm': 'full'}``.

    A value is a Python literal (``dict(a=1)`` too, and ``true`` and ``false`` in any case) or a list of texts without
    quotes (``[a.jpg,b.jpg]``); anything else is a string.

    Raises:
        ConfigError: an option is not ``key=value``, a key is given twice, or a list has quotes or brackets that make
            no literal.
    """
    found: dict[str, Any] = {}
    mistakes = []
    for option in options:
        key, equals, text = option.partition('=')
        if not equals or not all(part.isidentifier() or part.isdigit() for part in key.split('.')):
            mistakes.append(f'{OPTION}: expected key=value, such as lr=1e-5 or tune.llm=full, got {option!r}')
        elif key in found:
            mistakes.append(f'{OPTION}: {key!r} is given twice')
        else:
            try:
                found[key] = _parse_value(text)
            except ValueError:
                mistakes.append(f"{OPTION} {key}: expected a list such as ['a.jpg', 'b.jpg'], got {text}")
    raise_mistakes(mistakes, where=OPTION)
    return found


def _parse_value(text: str) -> Any:
    if text.lower() in ('true', 'false'):
        return text.lower() == 'true'
    try:
        return _literal(ast.parse(text.strip(), mode='eval').body)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return _list_of_texts(text) if re.fullmatch(r'\s*\[.*\]\s*', text, re.DOTALL) else text


def _list_of_texts(text: str) -> list[Any]:
    items = text.strip()[1:-1]
    if set(items) & set('[](){}\'"'):
        raise ValueError(f'quotes or brackets inside of {text}')
    return [_parse_value(item.strip()) for item in items.split(',') if item.strip()]


def _literal(node: ast.expr) -> Any:
    """``ast.literal_eval`` that also reads ``dict(a=1)``, as configs write it."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict' and not node.args:
        return {_key(keyword): _literal(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.List):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_literal(item) for item in node.elts)
    return ast.literal_eval(node)


def _key(keyword: ast.keyword) -> str:
    if keyword.arg is None:
        raise ValueError('** in a value')
    return keyword.arg


@dataclass
class Plan:
    """Where the overrides take effect: in the files while they are evaluated, and in the result afterwards."""

    changes: Changes = field(default_factory=Changes)
    afterwards: list[DeepKey] = field(default_factory=list)  # without keys: the whole top-level value
    mistakes: list[str] = field(default_factory=list)


def plan_overrides(source: Source, overrides: Mapping[str, Any]) -> Plan:
    """Decides for each override.

    A setting replaces the right side of its one assignment. A Runner's own part is set in the finished config, and in
    the file as well if something there is derived from it. Keys below a name that the file reads are set inside the
    file, before it is read.
    """
    plan = Plan()
    for full, value in overrides.items():
        key = DeepKey.parse(full, value)
        mistake = _why_impossible(source, key)
        if mistake:
            plan.mistakes.append(f'{OPTION} {key}: {mistake}')
            continue
        derived = source.binds(key.root) and source.reads(key.root)
        if key.root in RUNNER_NAMES or (key.keys and not derived):
            plan.afterwards.append(key)
        if key.keys and derived:
            plan.changes.deep.append(key)
        elif not key.keys and (derived or key.root not in RUNNER_NAMES):
            plan.changes.values[key.root] = _as_object(source, key)
    return plan


def _why_impossible(source: Source, key: DeepKey) -> str | None:
    name = key.root
    if not source.binds(name) and name not in RUNNER_NAMES:
        return unknown_name(name, RUNNER_NAMES | {name for file in source for name in file.names if file.binds(name)})
    if source.is_dump and name not in RUNNER_NAMES:
        return (
            f'{source.shown} is a dumped config, where nothing follows its settings any more; '
            'override the original config, or give the deep key of the value itself'
        )
    if name in RUNNER_NAMES and not source.reads(name):
        return None
    for file, use in source.holders(name):
        trouble = _edited_after_use(file, name, use) if key.keys else _not_declared_once(file, use)
        if trouble:
            return trouble
    return None


def _not_declared_once(file: Source, use: NameUse) -> str | None:
    for _, line, how in use.changes:
        return f'it is {how} at {file.at(line)}, so an override would be lost; declare it once, on a line of its own'
    if len(use.plain) > 1:
        return f'it is assigned again at {file.at(use.plain[1][1].lineno)}; declare it once'
    for _, line in use.edits:
        return f'it is edited at {file.at(line)}, so an override would be lost; declare it once'
    return None


def _edited_after_use(file: Source, name: str, use: NameUse) -> str | None:
    between = [at for at in use.reads if use.first_set < at < use.last_touch]
    if not between:
        return None
    line = file.tree.body[between[0]].lineno
    return f'{name!r} is used at {file.at(line)} and changed after that; declare it once'


def _as_object(source: Source, key: DeepKey) -> Any:
    """A class by name where the file has a class: ``optim_type=SGD``, ``optim_type=torch.optim.SGD``."""
    for file, use in source.holders(key.root):
        right = use.plain[0][1].value
        item = file.imports.get(right.id) if isinstance(right, ast.Name) else None
        if item is not None and item.name is not None and isinstance(key.value, str):
            module, _, name = key.value.rpartition('.')
            return LazyObject(module or item.module, name, f'{OPTION} {key.root}')
    return key.value
