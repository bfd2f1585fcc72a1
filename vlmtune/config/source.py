"""One config file as text: what it imports, what it builds on, and where each top-level name is set and read.

Nothing is executed here. Positions are indices of top-level statements, because "read later" is about statements.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from vlmtune.config.locate import find_base
from vlmtune.utils.errors import ConfigError

DUMP_MARK = '# vlmtune resolved config'
"""First line of a dumped config, whose values are no longer linked to the settings they came from."""

MODULES_MARK = '# modules of the user:'
"""A line of a dumped config: the folder of its recipe, for modules that lie there."""

MODULES_PATTERN = re.compile(rf'^{MODULES_MARK} (.+)$', re.MULTILINE)
_BLOCKS = {ast.If: 'if', ast.For: 'for', ast.While: 'while', ast.Try: 'try', ast.With: 'with', ast.Match: 'match'}


@dataclass
class NameUse:
    """How a file treats one top-level name."""

    plain: list[tuple[int, ast.Assign | ast.AnnAssign]] = field(default_factory=list)  # name = value
    changes: list[tuple[int, int, str]] = field(default_factory=list)  # (statement, line, how) any other re-binding
    edits: list[tuple[int, int]] = field(default_factory=list)  # (statement, line) name.key = ..., name.append(...)
    reads: list[int] = field(default_factory=list)  # statements that use the value

    @property
    def is_set(self) -> bool:
        """Whether anything binds the name; a name that is only read is not set."""
        return bool(self.plain or self.changes)

    @property
    def first_set(self) -> int:
        """The first statement that binds the name."""
        return min([at for at, _ in self.plain] + [at for at, _, _ in self.changes])

    @property
    def last_touch(self) -> int:
        """The last statement that sets or edits the name."""
        touches = [at for at, _ in self.plain] + [at for at, _, _ in self.changes] + [at for at, _ in self.edits]
        return max(touches)


@dataclass(frozen=True)
class ImportedName:
    """One name bound by an import statement.

    ``from module import name``; or ``import module as x`` (``name`` is None); or ``import a.b`` and ``import a.c``,
    which both bind ``a`` (``submodules`` holds what was written).
    """

    module: str
    name: str | None
    line: int
    submodules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Base:
    """One ``from x import ...`` inside ``with read_base():``."""

    source: 'Source'
    line: int
    names: dict[str, str] | None  # {name here: name there}, or None for *

    def origin(self, name: str) -> str | None:
        """The base file's name for what is called ``name`` in the file that imports it."""
        return name if self.names is None else self.names.get(name)


class Source:
    """The parsed file and, through ``bases``, everything it builds on.

    Args:
        path: the config file.
        shown: how messages name it.
        parents: the files that led here, to detect circles.

    Raises:
        ConfigError: it cannot be read or parsed, or a base is missing.
    """

    def __init__(self, path: Path, *, shown: str | None = None, parents: tuple[Path, ...] = ()) -> None:
        self.path = path.resolve()
        self.shown = shown or str(path)
        if self.path in parents:
            raise ConfigError(f'{self.shown}: the read_base imports go round in a circle')
        self.text, self.tree = _parse(self.path, self.shown)
        self.is_dump = self.text.startswith(DUMP_MARK)
        self.mistakes: list[str] = []
        self.bases: list[Base] = []
        self.imports: dict[str, ImportedName] = {}
        self.names: dict[str, NameUse] = {}
        self.statements: list[tuple[int, ast.stmt]] = []  # without imports and read_base blocks
        for at, statement in enumerate(self.tree.body):
            if _is_read_base(statement):
                self._read_bases(statement, (*parents, self.path))
            elif isinstance(statement, ast.Import | ast.ImportFrom):
                self._read_import(statement)
            else:
                self.statements.append((at, statement))
                self._read_statement(at, statement)

    def __iter__(self) -> Iterator['Source']:
        """This file and its bases, deepest first."""
        for base in self.bases:
            yield from base.source
        yield self

    @cached_property
    def module_folders(self) -> list[Path]:
        """Folders whose modules the file may import by their bare name: its own, and for a dump its recipe's."""
        folders = [self.path.parent]
        mark = MODULES_PATTERN.search(self.text) if self.is_dump else None
        return folders + ([Path(mark[1])] if mark else [])

    def at(self, line: int) -> str:
        """``file:line``, for messages."""
        return f'{self.shown}:{line}'

    def binds(self, name: str) -> bool:
        """Whether this file or a base that it imports the name from sets it."""
        return any(True for _ in self.holders(name))

    def reads(self, name: str) -> bool:
        """Whether this file or a base that it imports the name from uses its value."""
        if name in self.names and self.names[name].reads:
            return True
        return any(base.source.reads(there) for base, there in self._below(name))

    def set_again(self, name: str) -> Base | None:
        """The base that has derived something from the name already, although this file sets it anew."""
        for base, there in self._below(name):
            if self.names[name].is_set and base.source.binds(there) and base.source.reads(there):
                return base
        return None

    def holders(self, name: str) -> Iterator[tuple['Source', NameUse]]:
        """The files of the chain that set the name, and how."""
        for base, there in self._below(name):
            yield from base.source.holders(there)
        if name in self.names and self.names[name].is_set:
            yield self, self.names[name]

    def _below(self, name: str) -> list[tuple[Base, str]]:
        pairs = [(base, base.origin(name)) for base in self.bases]
        return [(base, there) for base, there in pairs if there is not None]

    def use(self, name: str) -> NameUse:
        """The record of a name, made if missing."""
        return self.names.setdefault(name, NameUse())

    def _read_bases(self, block: ast.stmt, parents: tuple[Path, ...]) -> None:
        assert isinstance(block, ast.With)
        for node in block.body:
            if not isinstance(node, ast.ImportFrom):
                raise ConfigError(f'{self.at(node.lineno)}: only `from x import ...` may stand under read_base()')
            base = Source(self._find_base(node), parents=parents)
            names = {alias.asname or alias.name: alias.name for alias in node.names}
            self.bases.append(Base(base, node.lineno, None if '*' in names else names))

    def _find_base(self, node: ast.ImportFrom) -> Path:
        path = find_base(node.module or '', level=node.level, beside=self.path.parent)
        if path is None:
            dots = '.' * node.level
            raise ConfigError(
                f'{self.at(node.lineno)}: base config {dots}{node.module or ""} not found, '
                f'neither beside {self.path} nor in an installed package'
            )
        return path

    def _read_import(self, node: ast.Import | ast.ImportFrom) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                self._read_module_import(alias, node.lineno)
            return
        if node.level > 1 or (node.level and not node.module):
            self.mistakes.append(f'{self.at(node.lineno)}: a config has no package; import the module by its name')
            return
        for alias in node.names:
            if alias.name == '*':
                self.mistakes.append(f'{self.at(node.lineno)}: `import *` is for configs under read_base() only')
            else:
                self.imports[alias.asname or alias.name] = ImportedName(str(node.module), alias.name, node.lineno)

    def _read_module_import(self, alias: ast.alias, line: int) -> None:
        if alias.asname:
            self.imports[alias.asname] = ImportedName(alias.name, None, line)
            return
        top = alias.name.partition('.')[0]
        before = self.imports[top].submodules if top in self.imports else ()
        self.imports[top] = ImportedName(top, None, line, (*before, alias.name))

    def _read_statement(self, at: int, statement: ast.stmt) -> None:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            self.mistakes.append(
                f'{self.at(statement.lineno)}: {statement.name!r} is defined in the config; '
                'move it to a .py file beside the config and import it'
            )
            return
        for node in ast.walk(statement):
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.mistakes.append(f'{self.at(node.lineno)}: imports stand at the top level of a config')
        edited = _edited_name(statement)
        if edited is not None:
            self.use(edited.id).edits.append((at, statement.lineno))
        self._read_stores(at, statement)
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node is not edited:
                self.use(node.id).reads.append(at)

    def _read_stores(self, at: int, statement: ast.stmt) -> None:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, 'target', None)]
        plain = None
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            plain = targets[0] if len(targets) == 1 and isinstance(targets[0], ast.Name) else None
            if isinstance(plain, ast.Name):
                self.use(plain.id).plain.append((at, statement))
        for node in _stored_names(statement):
            if node is not plain:
                self.use(node.id).changes.append((at, node.lineno, _how(statement)))


def _how(statement: ast.stmt) -> str:
    if isinstance(statement, ast.AugAssign):
        return 'changed in place'
    if type(statement) in _BLOCKS:
        return f'set inside `{_BLOCKS[type(statement)]}`'
    if isinstance(statement, ast.Delete):
        return 'deleted'
    return 'set together with other names'


def _stored_names(statement: ast.stmt) -> list[ast.Name]:
    """Names the statement binds, without the loop variables of comprehensions (they stay inside)."""
    inner = {
        id(name)
        for node in ast.walk(statement)
        if isinstance(node, ast.comprehension)
        for name in ast.walk(node.target)
    }
    names = [node for node in ast.walk(statement) if isinstance(node, ast.Name) and id(node) not in inner]
    return [node for node in names if isinstance(node.ctx, ast.Store | ast.Del)]


def _edited_name(statement: ast.stmt) -> ast.Name | None:
    """``x`` of ``x.a.b = 1``, ``x['a'] += 1``, ``del x['a']`` and ``x.update(...)``."""
    node: ast.expr
    if isinstance(statement, ast.Assign | ast.Delete) and len(statement.targets) == 1:
        node = statement.targets[0]
    elif isinstance(statement, ast.AugAssign):
        node = statement.target
    elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        node = statement.value.func
    else:
        return None
    if not isinstance(node, ast.Attribute | ast.Subscript):
        return None
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node if isinstance(node, ast.Name) else None


def _is_read_base(statement: ast.stmt) -> bool:
    if not (isinstance(statement, ast.With) and len(statement.items) == 1):
        return False
    call = statement.items[0].context_expr
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == 'read_base'


def _parse(path: Path, shown: str) -> tuple[str, ast.Module]:
    try:
        text = path.read_text(encoding='utf-8')
        return text, ast.parse(text, str(path))
    except SyntaxError as error:
        column = f':{error.offset}' if error.offset else ''
        line = f' in `{error.text.strip()}`' if error.text else ''
        raise ConfigError(f'{shown}:{error.lineno}{column}: syntax error: {error.msg}{line}') from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or null bytes
        raise ConfigError(f'{shown}: cannot be read as Python text: {error}') from None
