"""Keeps a library from importing optional heavy packages on our behalf."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
