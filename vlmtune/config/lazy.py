"""Looking at a config without importing the classes it names."""

from collections.abc import ItemsView, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from mmengine.config import Config, ConfigDict
from mmengine.config.lazy import LazyAttr, LazyObject

LAZY_TYPES = (LazyObject, LazyAttr)


@contextmanager
def lazy_dicts() -> Iterator[None]:
    """Inside, looking into a ConfigDict does not import the classes that it names."""
    before = ConfigDict.lazy
    ConfigDict.lazy = True
    try:
        yield
    finally:
        ConfigDict.lazy = before


def config_items(cfg: Config) -> dict[str, Any]:
    """The top level of a config, classes still lazy. Look into the values with ``raw_items``."""
    with lazy_dicts():
        return dict(cfg.items())


def raw_items(value: Mapping[Any, Any]) -> ItemsView[Any, Any]:
    """``value.items()`` that imports nothing, whatever kind of dict it is."""
    return dict.items(cast(dict[Any, Any], value))


def is_object(value: Any) -> bool:
    """Whether a value is a class or a function, lazy or not."""
    return isinstance(value, (*LAZY_TYPES, type)) or (callable(value) and hasattr(value, '__qualname__'))


def object_place(value: Any) -> tuple[str, str]:
    """``(module, name)`` of a class or function, lazy or not."""
    if isinstance(value, LAZY_TYPES):
        return value.module, str(value)
    return value.__module__, value.__qualname__
