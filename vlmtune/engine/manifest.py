"""What says that a checkpoint is whole: a list of its files with sizes and hashes.

A manifest is data from a stranger until it has been checked. Nothing outside of its directory is ever opened.
"""

import json
import os
import re
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from vlmtune.utils.disk import Written, hash_file
from vlmtune.utils.errors import CheckpointError

MANIFEST = 'manifest.json'
FORMAT = 'vlmtune-checkpoint'
FORMAT_VERSION = 2
_MOST_BYTES = 1 << 24  # of a manifest; a thousand ranks make a quarter of a megabyte
_HASHING = 4  # files at once
_SHA256 = re.compile(r'[0-9a-f]{64}')


def manifest_text(files: Mapping[str, Written], *, saved_at: float, meta: Mapping[str, Any]) -> str:
    """The manifest of a checkpoint.

    Args:
        files: by their names relative to the directory, with slashes.
        saved_at: seconds since 1970; discovery orders by it.
        meta: iteration, world_size and resumable.
    """
    entries = {name: dict(size=written.size, sha256=written.sha256) for name, written in sorted(files.items())}
    content = dict(format=FORMAT, version=FORMAT_VERSION, saved_at=saved_at, files=entries, **meta)
    return json.dumps(content, indent=2, allow_nan=False) + '\n'


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a directory, with nothing in it that could lead elsewhere; its files were not looked at.

    Raises:
        CheckpointError: there is none, it is broken, foreign, or of another version.
    """
    if not directory.is_dir():
        found = 'is a file' if os.path.lexists(directory) else 'does not exist'
        raise CheckpointError(f'{directory.absolute()} {found}; expected the directory iter_N.pth of a checkpoint')
    path = directory / MANIFEST
    manifest = _read_json(path)
    if not isinstance(manifest, dict) or manifest.get('format') != FORMAT:
        raise CheckpointError(f'{path} does not describe a vlmtune checkpoint')
    if manifest.get('version') != FORMAT_VERSION:
        raise CheckpointError(
            f'{directory} has format version {str(manifest.get("version"))[:20]}, this vlmtune reads {FORMAT_VERSION}'
        )
    if not _has_layout(manifest):
        raise CheckpointError(f'{path} was changed: it lacks what vlmtune writes into it')
    if wrong := [name for name in manifest['files'] if not _stays_inside(name)]:
        raise CheckpointError(f'{path} was changed: {wrong[0][:100]!r} is no name of a file in it')
    return manifest


def _read_json(path: Path) -> Any:
    try:
        about = path.lstat()
        if not stat.S_ISREG(about.st_mode):
            raise CheckpointError(f'{path} is no regular file; vlmtune did not write it')
        if about.st_size > _MOST_BYTES:
            raise CheckpointError(f'{path} has {about.st_size} bytes, expected {_MOST_BYTES} at most')
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        reason = f'has no {MANIFEST}: it was not finished, or vlmtune did not write it'
        raise CheckpointError(f'{path.parent} {reason}') from None
    except OSError as error:
        raise CheckpointError(f'{path} cannot be read: {error.strerror}') from error
    except ValueError as error:
        raise CheckpointError(f'{path} is not valid json ({error})') from error
    except RecursionError as error:
        raise CheckpointError(f'{path} is nested deeper than a manifest can be') from error


def _has_layout(manifest: dict[str, Any]) -> bool:
    files, saved_at = manifest.get('files'), manifest.get('saved_at')
    return (
        _counts(manifest.get('iteration'))
        and _counts(manifest.get('world_size'))
        and isinstance(manifest.get('resumable'), bool)
        and isinstance(saved_at, float | int)
        and abs(saved_at) < 2**63  # nor is nan
        and isinstance(files, dict)
        and all(isinstance(entry, dict) and _is_entry(entry) for entry in files.values())
    )


def _counts(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_entry(entry: dict[str, Any]) -> bool:
    sha256 = entry.get('sha256')
    return _counts(entry.get('size')) and isinstance(sha256, str) and _SHA256.fullmatch(sha256) is not None


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return str(path) == name and not path.is_absolute() and not {'..', '.'} & {*path.parts, name} and '\0' not in name


def verify(directory: Path, *, hashes: bool = True) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file is there, with the size and hash it was written with.

    Args:
        directory: ``iter_N.pth``.
        hashes: False looks at the sizes only, without reading the files.

    Raises:
        CheckpointError: what is wrong with it.
    """
    manifest = read_manifest(directory)
    for name, entry in manifest['files'].items():
        if (found := size_of(directory, name)) != entry['size']:
            raise CheckpointError(f'{directory}: {name} has {found} bytes, expected {entry["size"]}')
    if hashes:
        with ThreadPoolExecutor(_HASHING) as pool:
            found_hashes = pool.map(lambda name: _hash(directory, name), manifest['files'])
            for (name, entry), found_hash in zip(manifest['files'].items(), found_hashes, strict=True):
                if found_hash != entry['sha256']:
                    raise CheckpointError(f'{directory}: {name} was changed or damaged (sha256 differs)')
    return manifest


def size_of(directory: Path, name: str) -> int:
    """Bytes of a file of a checkpoint.

    Raises:
        CheckpointError: it is missing, or a link leads to it, so that it may lie elsewhere.
    """
    path, about = directory, None
    try:
        for part in PurePosixPath(name).parts:
            path = path / part
            about = path.lstat()
            if stat.S_ISLNK(about.st_mode):
                raise CheckpointError(f'{directory}: {name} is a link; vlmtune writes none')
    except FileNotFoundError:
        raise CheckpointError(f'{directory}: {name} is missing') from None
    except OSError as error:
        raise CheckpointError(f'{directory}: {name[:100]} cannot be read: {error.strerror}') from error
    if about is None or not stat.S_ISREG(about.st_mode):
        raise CheckpointError(f'{directory}: {name} is no regular file')
    return about.st_size


def _hash(directory: Path, name: str) -> str:
    try:
        return hash_file(directory / name)
    except OSError as error:
        raise CheckpointError(f'{directory}: {name} cannot be read: {error.strerror}') from error
