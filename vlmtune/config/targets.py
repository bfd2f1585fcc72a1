"""Finds the class or function behind a ``type=``."""

import importlib
from collections.abc import Callable
from typing import Any

from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.registry import Registry, root

from vlmtune.config.lazy import LAZY_TYPES
from vlmtune.utils.suggest import did_you_mean, nearest


class UnknownTarget(Exception):
    """A ``type=`` that leads nowhere; the message says why."""


def find_target(value: Any, *, must_exist: bool) -> Callable[..., Any] | None:
    """The object that a config part names.

    Args:
        value: a lazy object, a class or function, or a string: ``'torch.optim.SGD'``, or a name in a registry.
        must_exist: False where the dict may be plain data that happens to have a key ``type``; then a string that
            nothing is called like gives None.

    Raises:
        UnknownTarget: there is no such object, or it cannot be called.
    """
    if isinstance(value, LAZY_TYPES):
        found = _build(value)
    elif isinstance(value, str):
        found = _from_string(value, must_exist)
        if found is None:
            return None
    else:
        found = value
    if not callable(found):
        raise UnknownTarget(f'expected a class or a function, got {found!r}')
    return found


def _build(value: LazyObject | LazyAttr) -> Any:
    try:
        return value.build()
    except ImportError as error:
        return _explain(value, error)
    except Exception as error:  # a module of the user's may fail in any way
        raise UnknownTarget(f'importing {value.module} fails: {type(error).__name__}: {error}') from error


def _explain(value: LazyObject | LazyAttr, error: ImportError) -> Any:
    try:
        module = importlib.import_module(value.module)
    except ImportError:
        raise UnknownTarget(f'cannot import {value.module}: {error}') from error
    public = [name for name in dir(module) if not name.startswith('_')]
    raise UnknownTarget(f'{value.module} has no {str(value)!r}{did_you_mean(str(value), public)}') from error


def _from_string(name: str, must_exist: bool) -> Any:
    module, _, attribute = name.rpartition('.')
    if module and all(part.isidentifier() for part in name.split('.')):
        return _build(LazyObject(module, attribute))
    importlib.import_module('vlmtune.utils.lean_imports')  # fills mmengine's registries; takes seconds
    roots = [registry for registry in vars(root).values() if isinstance(registry, Registry)]
    registries = [*roots, *(child for registry in roots for child in registry.children.values())]
    for registry in registries:
        found = registry.get(name)
        if found is not None:
            return found
    known = {key for registry in registries for key in registry.module_dict}
    if must_exist or nearest(name, known, cutoff=0.85):
        hint = did_you_mean(name, known)
        raise UnknownTarget(f'nothing is called {name!r}{hint}; import the class and write type=Class')
    return None
