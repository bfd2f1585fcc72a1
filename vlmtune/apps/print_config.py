"""``vlmtune print-cfg``: what a config and its overrides come to."""

from collections.abc import Mapping
from typing import Any

from vlmtune.config import config_text, load_config


def print_config(config: str, *, overrides: Mapping[str, Any] | None = None) -> None:
    """Prints the resolved config as the Python file that a run writes into its work dir.

    Raises:
        ConfigError: everything that is wrong with the file or the overrides.
    """
    print(config_text(load_config(config, overrides)), end='')
