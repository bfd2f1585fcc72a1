"""``vlmtune list-cfg`` and ``copy-cfg``. Nothing heavy is imported, so that they answer at once."""

from vlmtune.recipes import copy_recipe, list_recipes
from vlmtune.utils.errors import ConfigError


def list_configs(pattern: str | None = None) -> None:
    """Prints the names of the built-in recipes, one a line.

    Raises:
        ConfigError: none matches the pattern.
    """
    names = [path.stem for path in list_recipes(pattern)]
    if not names:
        raise ConfigError(f'no built-in config matches {pattern or "*"!r}; `vlmtune list-cfg` lists all')
    print('\n'.join(names))


def copy_config(name: str, directory: str) -> None:
    """Copies a built-in recipe and prints where it lies.

    Raises:
        ConfigError: the name is unknown, or the file is already there.
    """
    print(copy_recipe(name, directory))
