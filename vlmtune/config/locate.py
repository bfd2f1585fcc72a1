"""Finds the files of base configs and of the user's own modules, without importing any package.

mmengine finds an installed base through ``pkg_resources``, which setuptools no longer has; ``importlib`` does it in
any kind of installation.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

from vlmtune.recipes import list_recipes, recipe_root


def find_base(module: str, *, level: int, beside: Path) -> Path | None:
    """The file of a base config.

    A relative base (``level`` dots) lies beside the config; a built-in recipe that was copied alone finds its relative
    base among the built-in ones. An absolute one lies in an installed package, or beside the config.
    """
    *folders, stem = module.split('.')
    if level:
        folder = beside.joinpath(*['..'] * (level - 1))
        places = [folder.joinpath(*folders)]
    else:
        places = [*_package_folders(folders), beside.joinpath(*folders)]
    for place in places:
        if (place / f'{stem}.py').is_file():
            return (place / f'{stem}.py').resolve()
    built_in = [recipe for recipe in list_recipes() if recipe.stem == stem] if level else []
    return built_in[0] if built_in else None


def _package_folders(folders: Sequence[str]) -> list[Path]:
    """The installed folders that ``a.b`` stands for; ``a`` is located, not imported."""
    if not folders:
        return []
    top, *inner = folders
    if top == 'vlmtune' and inner[:1] == ['configs']:  # beside the package in a checkout
        return [recipe_root().joinpath(*inner[1:])]
    spec = _find_top(top)
    locations = spec.submodule_search_locations if spec else None
    return [Path(location).joinpath(*inner) for location in locations or ()]


def make_importable(module: str, folders: Sequence[Path]) -> str | None:
    """Lets ``import module`` work for a module that lies beside a config.

    The folder is put at the *end* of ``sys.path``, and only when a file of the user's is really wanted from it: so
    that it works when the object is built later, and in the worker processes of a data loader, and hides nothing.

    Args:
        module: the dotted name that the config imports from.
        folders: where the user's modules may lie.

    Returns:
        What is wrong, or None.
    """
    top = module.partition('.')[0]
    own = [folder for folder in folders if lies_in(folder, module)]
    if not own:
        return None if _find_top(top) else f'no module {top!r} is installed, and none lies beside the config'
    if str(own[0]) not in sys.path:
        sys.path.append(str(own[0]))
        importlib.invalidate_caches()
    spec = _find_top(top)
    if spec is not None and not any(Path(place).resolve().is_relative_to(own[0]) for place in _places(spec)):
        return f'the module {top!r} beside the config is hidden by {_places(spec)[0]}; give it another name'
    return None


def lies_in(folder: Path, module: str) -> bool:
    """Whether a module's file is below the folder."""
    path = folder.joinpath(*module.split('.'))
    return path.with_suffix('.py').is_file() or (path / '__init__.py').is_file()


def _places(spec: ModuleSpec) -> list[str]:
    return [spec.origin] if spec.origin else list(spec.submodule_search_locations or ['an installed module'])


def _find_top(name: str) -> ModuleSpec | None:
    """The spec of a top-level module. Nothing is imported."""
    try:
        return importlib.util.find_spec(name)
    except ValueError:  # a module in sys.modules that has no spec, such as __main__
        return None
