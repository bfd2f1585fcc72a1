"""Evaluates a parsed config file and its bases, with some right sides replaced.

Imported names become mmengine's ``LazyObject``, so that reading a config imports neither torch nor transformers; only
the standard library is really imported. The syntax tree is changed, never the text, so every message has the line of
the user's file.
"""

import ast
import builtins
import copy
import importlib
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mmengine.config import ConfigDict
from mmengine.config.lazy import LazyObject

from vlmtune.config.lazy import raw_items
from vlmtune.config.source import Base, ImportedName, Source
from vlmtune.config.tree import DeepKey
from vlmtune.utils.errors import ConfigError

_REPLACEMENT = '__vlmtune_replacement__'
_SET_DEEP = '__vlmtune_set_deep__'
_NOTHING = object()


@dataclass
class Changes:
    """What to change while a file is evaluated."""

    values: dict[str, Any] = field(default_factory=dict)  # {setting: the value of its right side}
    deep: list[DeepKey] = field(default_factory=list)  # set right after the last statement that touches their root

    def seen_through(self, base: Base, again: Mapping[str, Any]) -> 'Changes':
        """The same changes under the base file's own names; ``again`` is what the importing file sets anew."""
        values = {base.origin(name): value for name, value in {**again, **self.values}.items()}
        deep = [(base.origin(key.root), key) for key in self.deep]
        return Changes(
            {there: value for there, value in values.items() if there is not None},
            [key.under(there) for there, key in deep if there is not None],
        )


@dataclass
class Evaluated:
    """The names of an evaluated file, and those among them that are imports and so no part of the config."""

    namespace: dict[str, Any]
    imported: dict[str, Any]

    @property
    def values(self) -> dict[str, Any]:
        """The config itself."""
        return {name: value for name, value in self.namespace.items() if not self.is_import(name)}

    def is_import(self, name: str) -> bool:
        """Whether the name still holds what was imported under it."""
        return self.imported.get(name, _NOTHING) is self.namespace[name]


def evaluate(source: Source, changes: Changes) -> Evaluated:
    """Runs the file after its bases; nothing that it names is imported.

    A setting of a base that the file sets anew is set *in the base*, so that what the base derives from it follows.

    Raises:
        ConfigError: the file fails; with file and line.
    """
    with _blamed_on(source):
        imported = {name: _import_object(source, item) for name, item in source.imports.items()}
        again = _set_again(source, imported)
    namespace = dict(imported)
    for base in source.bases:
        inner = evaluate(base.source, changes.seen_through(base, again))
        for here, there in (base.names or {name: name for name in inner.namespace}).items():
            if there not in inner.namespace:
                raise ConfigError(f'{source.at(base.line)}: {base.source.shown} has no {there!r}')
            namespace[here] = inner.namespace[there]
            if inner.is_import(there):
                imported[here] = namespace[here]
    namespace |= {
        '__file__': str(source.path),
        _REPLACEMENT: lambda name: copy.deepcopy(changes.values[name]),
        _SET_DEEP: lambda number, root: changes.deep[number].apply(root),
    }
    with _blamed_on(source):
        exec(compile(_changed_tree(source, changes), str(source.path), 'exec'), namespace)
    public = {name: value for name, value in namespace.items() if not name.startswith('__')}
    return Evaluated(dict(raw_items(ConfigDict(public))), imported)


def is_constant(source: Source, name: str) -> bool:
    """Whether a name has one plain assignment whose right side uses imports and builtins only."""
    use = source.names[name]
    if len(use.plain) != 1 or use.changes:
        return False
    reads = {node.id for node in ast.walk(use.plain[0][1]) if isinstance(node, ast.Name)} - {name}
    return reads <= set(source.imports) | set(dir(builtins)) and name not in _read_names(use.plain[0][1])


def _read_names(statement: ast.stmt) -> set[str]:
    nodes = (node for node in ast.walk(statement) if isinstance(node, ast.Name))
    return {node.id for node in nodes if isinstance(node.ctx, ast.Load)}


def _set_again(source: Source, imported: Mapping[str, Any]) -> dict[str, Any]:
    """{name: value} for the constants that the file sets although a base has derived something from them."""
    values = {}
    for name, use in source.names.items():
        if source.set_again(name) and is_constant(source, name):
            node = use.plain[0][1].value
            assert node is not None
            values[name] = eval(compile(ast.Expression(node), str(source.path), 'eval'), dict(imported))
    return values


def _import_object(source: Source, item: ImportedName) -> Any:
    """The standard library for real, everything else as a LazyObject."""
    if item.module.partition('.')[0] not in sys.stdlib_module_names:
        return LazyObject(list(item.submodules) or item.module, item.name, f'{source.shown}, line {item.line}')
    for submodule in item.submodules:
        importlib.import_module(submodule)
    module = importlib.import_module(item.module)
    return getattr(module, item.name) if item.name else module


def _changed_tree(source: Source, changes: Changes) -> ast.Module:
    body: list[ast.stmt] = []
    for at, statement in source.statements:
        body.append(_replaced(statement, changes.values))
        for number, key in enumerate(changes.deep):
            use = source.names.get(key.root)
            if use is not None and use.is_set and use.last_touch == at:
                body.append(_statement(f'{key.root} = {_SET_DEEP}({number}, {key.root})', like=statement))
    return ast.Module(body, type_ignores=[])


def _replaced(statement: ast.stmt, values: Mapping[str, Any]) -> ast.stmt:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
    elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
        target = statement.target
    else:
        return statement
    if isinstance(target, ast.Name) and target.id in values:
        return _statement(f'{target.id} = {_REPLACEMENT}({target.id!r})', like=statement)
    return statement


def _statement(code: str, *, like: ast.stmt) -> ast.stmt:
    new = ast.parse(code).body[0]
    for node in ast.walk(new):
        ast.copy_location(node, like)
    return new


@contextmanager
def _blamed_on(source: Source) -> Iterator[None]:
    """Turns any failure of the user's code into one line with the user's line number."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(source.path) and frame.lineno]
        place = source.at(lines[-1]) if lines else source.shown
        hint = '; a setting that is None is reckoned with here' if "'NoneType'" in str(error) else ''
        raise ConfigError(f'{place}: {type(error).__name__}: {error}{hint}') from error
