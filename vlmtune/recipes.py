"""Built-in recipes: where they lie, how they are found by name, and how one is copied.

Only ``pathlib`` and ``shutil`` are used, so that ``vlmtune list-cfg`` answers at once. A recipe's name is its file's
stem. In a wheel the recipes lie in ``<package>/configs``; in a checkout (and so in an editable install) they are read
from the top-level ``configs`` beside the package. Files whose name starts with an underscore are not recipes.
"""

import fnmatch
import shutil
from pathlib import Path

from vlmtune.utils.errors import ConfigError
from vlmtune.utils.suggest import nearest

PACKAGE = Path(__file__).resolve().parent


def recipe_root() -> Path:
    """The folder of the built-in recipes.

    Raises:
        ConfigError: neither place has them; the installation is broken.
    """
    installed, checkout = PACKAGE / 'configs', PACKAGE.parent / 'configs'
    if installed.is_dir():
        return installed
    if checkout.is_dir() and (PACKAGE.parent / 'setup.py').is_file():  # not a `configs` of another package
        return checkout
    raise ConfigError(f'no built-in configs at {installed} or {checkout}; install vlmtune again')


def list_recipes(pattern: str | None = None) -> list[Path]:
    """The built-in recipes, sorted by name.

    Args:
        pattern: keep names that contain it, or that match it where it has a wildcard (``*_qlora_*``); case does not
            matter.
    """
    found = [path for path in recipe_root().rglob('*.py') if not path.name.startswith('_')]
    if pattern:
        wanted = pattern.lower() if set(pattern) & set('*?[') else f'*{pattern.lower()}*'
        found = [path for path in found if fnmatch.fnmatchcase(path.stem.lower(), wanted)]
    return sorted(found, key=lambda path: path.stem)


def find_recipe(name: str) -> Path:
    """The file of a built-in recipe.

    Raises:
        ConfigError: there is none of that name; the message lists the nearest.
    """
    recipes = {path.stem: path for path in list_recipes()}
    stem = name.removesuffix('.py')
    if stem in recipes:
        return recipes[stem]
    near = nearest(stem, recipes, count=3, cutoff=0.4)
    hint = f'the nearest are {", ".join(near)}' if near else '`vlmtune list-cfg` lists them'
    raise ConfigError(f'no built-in config is named {name!r}; {hint}')


def resolve_config(path_or_name: str | Path) -> Path:
    """A config file by path, or a built-in one by name. A file that exists wins over a name.

    Raises:
        ConfigError: nothing is there, or the file is not Python.
    """
    path, text = Path(path_or_name), str(path_or_name)
    if path.suffix == '.py' and path.is_file():
        return path
    if path.name == text and path.suffix not in ('.yaml', '.yml', '.json', '.toml'):
        if path.suffix == '.py' and text.removesuffix('.py') not in {recipe.stem for recipe in list_recipes()}:
            raise ConfigError(f'config file {text} not found, neither here nor among the built-in ones')
        return find_recipe(text)
    if path.is_file():
        raise ConfigError(f'{text}: only Python configs (.py) are read, got {path.suffix or "no suffix"}')
    raise ConfigError(f'config file {text} {"is a folder" if path.is_dir() else "not found"}')


def copy_recipe(name: str, directory: str | Path) -> Path:
    """Copies a built-in recipe into ``directory`` (made if missing), byte for byte, and returns the new file.

    Raises:
        ConfigError: the name is unknown, or a file of that name is already there.
    """
    source = find_recipe(name)
    target = Path(directory) / source.name
    if target.exists():
        raise ConfigError(f'{target} is already there; remove it, or choose another folder')
    if target.parent.exists() and not target.parent.is_dir():
        raise ConfigError(f'{target.parent} is a file; name a folder')
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return target
