"""Writes a resolved config as one flat Python file that reloads equal."""

import keyword
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.config.lazy import LazyAttr

from vlmtune.config.lazy import LAZY_TYPES, config_items, is_object, raw_items
from vlmtune.config.locate import lies_in
from vlmtune.config.mistakes import raise_mistakes
from vlmtune.config.redact import redact_secrets
from vlmtune.config.source import DUMP_MARK, MODULES_MARK, MODULES_PATTERN
from vlmtune.config.values import misplaced_objects

LINE_LENGTH = 120
_HEADER = f"""{DUMP_MARK}: nothing follows the settings here any more.
# To change one, edit or override the config that this was made from; keys such as `model.dtype` can be overridden.
"""


def dump_config(cfg: Config, path: str | Path) -> None:
    """Writes ``config_text`` to a file; ``load_config(path).to_dict()`` equals ``cfg.to_dict()`` but for secrets.

    Raises:
        ConfigError: the config holds something that is not plain data.
    """
    Path(path).write_text(config_text(cfg), encoding='utf-8')


def config_text(cfg: Config) -> str:
    """The config as Python text: imports, then one assignment a name, classes by name, secrets removed.

    Raises:
        ConfigError: the config holds something that is not plain data.
    """
    items = config_items(redact_secrets(cfg))
    raise_mistakes(misplaced_objects(items), where='the config')
    writer = _Writer(set(items))
    body = '\n'.join(f'{name} = {writer.write(value, column=len(name) + 3)}' for name, value in items.items())
    folder = _folder_of_user_modules(cfg, writer)
    header = _HEADER + (f'{MODULES_MARK} {folder}\n' if folder else '')
    return '\n'.join(filter(None, [header, writer.imports(), body])) + '\n'


def _folder_of_user_modules(cfg: Config, writer: '_Writer') -> Path | None:
    """Where the modules lie that the config imports from beside itself; the dump will lie elsewhere."""
    mark = MODULES_PATTERN.search(cfg.text)
    folders = [Path(cfg.filename).parent] if cfg.filename else []
    for folder in folders + ([Path(mark[1])] if mark else []):
        if any(lies_in(folder, module) for module in writer.modules()):
            return folder
    return None


class _Writer:
    """Formats values and collects the imports that they need."""

    def __init__(self, taken: set[str]) -> None:
        self._taken = taken  # names that an import may not use
        self._from: dict[tuple[str, str], str] = {}  # {(module, name): local name}
        self._whole: set[str] = set()

    def modules(self) -> set[str]:
        return self._whole | {module for module, _ in self._from}

    def imports(self) -> str:
        lines = [f'import {module}' for module in sorted(self._whole)]
        names: dict[str, list[str]] = {}
        for (module, name), local in sorted(self._from.items()):
            names.setdefault(module, []).append(name if local == name else f'{name} as {local}')
        lines += [f'from {module} import {", ".join(found)}' for module, found in names.items()]
        return ''.join(f'{line}\n' for line in lines)

    def write(self, value: Any, *, column: int = 0, indent: int = 0) -> str:
        """The value as an expression; broken over lines where it would not fit behind ``column``."""
        if is_object(value):
            return self._object(value)
        if isinstance(value, Mapping):
            pairs = list(raw_items(value))
            if all(_can_be_keyword(key) for key, _ in pairs):
                return self._wrapped('dict(', [(f'{key}=', item) for key, item in pairs], ')', column, indent)
            return self._wrapped('{', [(f'{key!r}: ', item) for key, item in pairs], '}', column, indent)
        if isinstance(value, list):
            return self._wrapped('[', [('', item) for item in value], ']', column, indent)
        if isinstance(value, tuple):
            close = ',)' if len(value) == 1 else ')'
            return self._wrapped('(', [('', item) for item in value], close, column, indent)
        return _scalar(value)

    def _wrapped(self, opening: str, items: list[tuple[str, Any]], close: str, column: int, indent: int) -> str:
        line = opening + ', '.join(head + self.write(item) for head, item in items) + close
        if '\n' not in line and column + len(line) < LINE_LENGTH:
            return line
        pad = ' ' * (indent + 4)
        lines = [
            pad + head + self.write(item, column=indent + 4 + len(head), indent=indent + 4) + ',\n'
            for head, item in items
        ]
        return f'{opening}\n{"".join(lines)}{" " * indent}{close.strip(",")}'

    def _object(self, value: Any) -> str:
        names: list[str] = []
        while isinstance(value, LazyAttr):
            names, value = [value.name, *names], value.source
        if not isinstance(value, LAZY_TYPES):
            first, *names = value.__qualname__.split('.')
            return '.'.join([self._import(value.__module__, first), *names])
        if isinstance(value._module, list):  # `import torch.optim`
            self._whole |= set(value._module)
            return '.'.join([value.module, *names])
        if str(value) == value.module and names:  # `import torch.optim as optim`
            return '.'.join([self._import(value.module, names[0]), *names[1:]])
        return '.'.join([self._import(value.module, str(value)), *names])

    def _import(self, module: str, name: str) -> str:
        if (module, name) not in self._from:
            local, number = name, 2
            while local in self._taken:
                local, number = f'{name}_{number}', number + 1
            self._taken.add(local)
            self._from[module, name] = local
        return self._from[module, name]


def _can_be_keyword(key: Any) -> bool:
    return isinstance(key, str) and key.isidentifier() and not keyword.iskeyword(key)


def _scalar(value: Any) -> str:
    if isinstance(value, float):
        text = float.__repr__(value)  # not numpy's own
        return text if text[-1].isdigit() else f'float({text!r})'
    if isinstance(value, set | frozenset):
        return f'{type(value).__name__}({sorted(value, key=repr)!r})'
    return repr(value)
