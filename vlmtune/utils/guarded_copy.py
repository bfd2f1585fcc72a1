"""Copies out of a folder that others may have made: what is copied may be published, or shown to a model."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from vlmtune.utils.errors import CheckpointError, UserError


def copy_inside(path: Path, target: Path, *, root: Path, error: Callable[[str], UserError] = CheckpointError) -> None:
    """Copy a file of the folder ``root``; a link in it may not lead out of it.

    Raises:
        UserError: it is no file, or a link to one elsewhere; of the class ``error``.
    """
    roots = [root.resolve()]  # root may itself be a link, which its owner has made
    if roots[0].parent.name == 'snapshots':  # the hub's cache: files are links into a folder beside the snapshots
        roots.append(roots[0].parents[1])
    if not path.is_file():
        raise error(f'{path} is no file, or a link to none; remove it')
    if not any(path.resolve().is_relative_to(place) for place in roots):
        raise error(f'{path} is a link that leads out of {root}; put the file itself there')
    shutil.copyfile(path, target)


def copy_present(
    names: Iterable[str], *, source: Path, target: Path, error: Callable[[str], UserError] = CheckpointError
) -> None:
    """Copy those of the named files that a folder has.

    Raises:
        UserError: see ``copy_inside``.
    """
    for name in names:
        if (source / name).is_file():
            copy_inside(source / name, target / name, root=source, error=error)
