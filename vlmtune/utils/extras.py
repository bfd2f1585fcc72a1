"""Packages that only some features need, and only when they are used."""

import importlib
from types import ModuleType

from vlmtune.utils.errors import ConfigError


def need(module: str, *, extra: str, what: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: its dotted name.
        extra: of vlmtune, which installs it.
        what: the feature that needs it, for the message.

    Raises:
        ConfigError: it is not installed; the message has the command that mends it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition('.')[0] != module.partition('.')[0]:
            raise ConfigError(
                f'{what} needs {module}, whose own package {error.name} is missing; pip install {error.name}'
            ) from error
        raise ConfigError(
            f'{what} needs the package {module.partition(".")[0]}, which is not installed; '
            f"pip install 'vlmtune[{extra}]'"
        ) from error
