"""``load_config``: one file and its overrides in, one mmengine ``Config`` out, or every mistake at once."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from vlmtune.config.evaluate import evaluate, is_constant
from vlmtune.config.lazy import lazy_dicts
from vlmtune.config.locate import make_importable
from vlmtune.config.mistakes import raise_mistakes
from vlmtune.config.names import RUNNER_NAMES, SETTINGS, unknown_name
from vlmtune.config.overrides import OPTION, Plan, plan_overrides
from vlmtune.config.redact import guard_secrets
from vlmtune.config.source import Source
from vlmtune.config.tree import DeepKey
from vlmtune.config.values import value_mistakes
from vlmtune.recipes import resolve_config
from vlmtune.utils.errors import ConfigError


def load_config(
    path_or_name: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    check: Callable[[Config], Iterable[str]] | None = None,
) -> Config:
    """Reads a config file, or a built-in recipe by name.

    Reading imports neither torch nor transformers. An override of a setting replaces the right side of its assignment
    and the file is evaluated again, so everything derived from it follows; overrides of deeper keys come after that. A
    module that lies beside the config can be imported by it: its folder is then put at the end of ``sys.path``.

    Args:
        path_or_name: a ``.py`` file, or the stem of a built-in recipe.
        overrides: ``{'lr': 1e-5, 'model.lora.r': 8}``, as ``parse_cfg_options`` returns them.
        check: finds further mistakes in the finished config (``config_mistakes``), to be reported with the others.

    Raises:
        ConfigError: everything that is wrong, with the nearest valid names.
    """
    path = resolve_config(path_or_name)
    source = Source(path, shown=str(path))
    plan = plan_overrides(source, overrides or {})
    mistakes = list(_file_mistakes(source))
    cfg = None
    try:
        with lazy_dicts():
            values = _evaluate(source, plan)
            cfg = Config(values, filename=str(source.path))
            mistakes += value_mistakes(values)
    except ConfigError as error:
        mistakes += [*value_mistakes(plan.changes.values), str(error)]
    mistakes += plan.mistakes
    if cfg is not None and check is not None:
        mistakes += check(cfg)
    raise_mistakes(mistakes, where=source.shown)
    assert cfg is not None
    guard_secrets(cfg)
    return cfg


def _evaluate(source: Source, plan: Plan) -> ConfigDict:
    """The config with all overrides that have a place; keys that have none are added to ``plan.mistakes``."""
    deep, plan.changes.deep = plan.changes.deep, []
    values = evaluate(source, plan.changes).values
    plan.changes.deep = [key for key in deep if _has_place(values, key, plan)]
    if plan.changes.deep:
        values = evaluate(source, plan.changes).values
    for key in sorted(plan.afterwards, key=lambda key: len(key.keys)):  # a whole part before keys inside it
        if not key.keys:
            values[key.root] = key.value
        elif _has_place(values, key, plan):
            values[key.root] = key.apply(values[key.root])
    return ConfigDict(values)


def _has_place(values: Mapping[str, Any], key: DeepKey, plan: Plan) -> bool:
    try:
        key.check(values.get(key.root))
    except ConfigError as error:
        plan.mistakes.append(f'{OPTION} {error}')
        return False
    return True


def _file_mistakes(source: Source) -> Iterator[str]:
    """What is wrong with the text of the files, before anything is evaluated."""
    for file in source:
        yield from file.mistakes
        yield from _import_mistakes(file)
        yield from _set_again_mistakes(file)
    if not source.is_dump:
        yield from _unused_names(source, frozenset())


def _import_mistakes(file: Source) -> Iterator[str]:
    for item in file.imports.values():
        for module in item.submodules or (item.module,):
            trouble = make_importable(module, file.module_folders)
            if trouble:
                yield f'{file.at(item.line)}: {trouble}'


def _set_again_mistakes(file: Source) -> Iterator[str]:
    """A setting of a base may be set anew to a constant, which then flows into the base."""
    for name, use in file.names.items():
        base = file.set_again(name)
        if base is None:
            continue
        line = use.plain[0][1].lineno if use.plain else use.changes[0][1]
        if not is_constant(file, name):
            yield f'{file.at(line)}: {name!r} is used in {base.source.shown} already; set it to a plain value, once'
        elif any(len(there.plain) != 1 or there.changes for _, there in base.source.holders(base.origin(name) or name)):
            yield f'{file.at(line)}: {name!r} is set several times in {base.source.shown}; it cannot be set anew here'


def _unused_names(source: Source, read_above: frozenset[str]) -> Iterator[str]:
    """Names that neither the Runner nor a later line uses; most are typing errors."""
    valid = RUNNER_NAMES | SETTINGS | {name for file in source for name in file.names}
    for name, use in source.names.items():
        used = name in read_above or any(at > use.first_set for at in use.reads) if use.is_set else True
        if not used and name not in RUNNER_NAMES and source.set_again(name) is None:
            line = use.plain[0][1].lineno if use.plain else use.changes[0][1]
            what = f'setting {name!r}' if name in SETTINGS else unknown_name(name, valid - {name})
            yield f'{source.at(line)}: {what}; nothing in the file uses it'
    for base in source.bases:
        read = read_above | {name for name, use in source.names.items() if use.reads}
        below = {base.origin(name) for name in read}
        yield from _unused_names(base.source, frozenset(name for name in below if name is not None))
