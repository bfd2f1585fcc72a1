"""Things by their dotted names, and heavy packages that a library shall not import on our behalf."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def import_name(dotted: str) -> Any:
    """What ``'package.module.name'`` is."""
    module, _, name = dotted.rpartition('.')
    return getattr(importlib.import_module(module), name)


@contextmanager
def imports_refused(*names: str) -> Iterator[None]:
    """Inside, importing a top-level package of ``names`` fails as if it were not installed; loaded ones are untouched.

    mmengine imports deepspeed and bitsandbytes whenever they are installed, which costs seconds and prints warnings in
    runs that use neither. It treats both as optional, so refusing them while it is imported is enough.
    """
    refused = [name for name in names if name not in sys.modules]
    for name in refused:
        sys.modules[name] = None  # type: ignore[assignment]  # documented: makes the import raise ModuleNotFoundError
    try:
        yield
    finally:
        for name in refused:
            sys.modules.pop(name, None)
