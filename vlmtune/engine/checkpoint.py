"""Checkpoint directories that are whole or are not there.

``iter_N.pth/`` is written beside its final name, every file is flushed to disk, a manifest with sizes and hashes is
written last, and only then is the directory renamed. Discovery trusts a manifest that holds, nothing else.
docs/checkpoint_format.md lists the files.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmtune.utils.errors import CheckpointError

MANIFEST = 'manifest.json'
POINTER = 'last_checkpoint'
FORMAT = 'vlmtune-checkpoint'
FORMAT_VERSION = 1
_NAME = re.compile(r'iter_(\d+)\.pth')


def checkpoint_name(iteration: int) -> str:
    """'iter_500.pth'; the number counts optimizer steps."""
    return f'iter_{iteration}.pth'


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def start(target: Path) -> Path:
    """An empty directory beside ``target`` to write into."""
    staging = target.with_name(target.name + '.tmp')
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def seal(staging: Path, target: Path, *, meta: dict[str, Any]) -> None:
    """Make what was written to ``staging`` the checkpoint ``target``."""
    files = sorted(path for path in staging.rglob('*') if path.is_file())
    entries = {str(p.relative_to(staging)): dict(size=p.stat().st_size, sha256=_sha256(p)) for p in files}
    manifest = dict(format=FORMAT, version=FORMAT_VERSION, saved_at=time.time(), files=entries, **meta)
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + '\n', 'utf-8')
    for path in [*files, staging / MANIFEST, *(p for p in staging.rglob('*') if p.is_dir()), staging]:
        _flush(path)
    aside = target.with_name(target.name + '.old')
    if target.exists():  # of an earlier run; it goes when the new one is in its place
        os.replace(target, aside)
    os.rename(staging, target)
    _flush(target.parent)
    if _is_ours(aside):
        shutil.rmtree(aside)


def verify(directory: Path, *, hashes: bool = True) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file is there, with the size and hash it was written with.

    Args:
        directory: ``iter_N.pth``.
        hashes: False looks at the sizes only, without reading the files.

    Raises:
        CheckpointError: what is wrong with it.
    """
    if not directory.is_dir():
        what = 'is a file, expected a directory' if directory.exists() else 'does not exist'
        raise CheckpointError(f'checkpoint {directory.absolute()} {what} as vlmtune writes it')
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(f'{directory} has no {MANIFEST}: it was not finished, or vlmtune did not write it')
    try:
        manifest = json.loads(path.read_text('utf-8'))
    except ValueError as error:
        raise CheckpointError(f'{path} is not valid json ({error})') from error
    if not isinstance(manifest, dict) or manifest.get('format') != FORMAT:
        raise CheckpointError(f'{path} does not describe a vlmtune checkpoint')
    if manifest.get('version') != FORMAT_VERSION:
        raise CheckpointError(
            f'{directory} has format version {manifest.get("version")}, this vlmtune reads {FORMAT_VERSION}'
        )
    if not _has_layout(manifest):
        raise CheckpointError(f'{path} was changed: it lacks what vlmtune writes into it')
    for name, entry in manifest['files'].items():
        file = directory / name
        if not file.is_file():
            raise CheckpointError(f'{directory}: {name} is missing')
        if file.stat().st_size != entry['size']:
            raise CheckpointError(f'{directory}: {name} has {file.stat().st_size} bytes, expected {entry["size"]}')
        if hashes and _sha256(file) != entry['sha256']:
            raise CheckpointError(f'{directory}: {name} was changed or damaged (sha256 differs)')
    return manifest


def _has_layout(manifest: dict[str, Any]) -> bool:
    files = manifest.get('files')
    return {'saved_at', 'iteration', 'world_size', 'resumable'} <= manifest.keys() and (
        isinstance(files, dict) and all(isinstance(e, dict) and {'size', 'sha256'} <= e.keys() for e in files.values())
    )


def _is_ours(path: Path) -> bool:
    """Whether vlmtune wrote it; other programs name their checkpoints alike."""
    try:
        return json.loads((path / MANIFEST).read_text('utf-8'))['format'] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_whole(path: Path) -> bool:
    try:
        verify(path, hashes=False)
    except CheckpointError:
        return False
    return True


@dataclass(frozen=True)
class Found:
    """The newest valid checkpoint of a work dir, and why newer ones were passed over."""

    path: Path | None
    skipped: tuple[str, ...]


def _by_age(work_dir: Path) -> list[Path]:
    """The checkpoints of a work dir, oldest first.

    By the time in the manifest, not by the number: a new run in an old work dir counts from 1 again.
    """
    paths = [path for path in work_dir.iterdir() if _NAME.fullmatch(path.name)] if work_dir.is_dir() else []
    return sorted(paths, key=lambda path: (_saved_at(path), path.name))


def _saved_at(path: Path) -> float:
    try:
        return float(json.loads((path / MANIFEST).read_text('utf-8'))['saved_at'])
    except (OSError, ValueError, KeyError, TypeError):
        return path.stat().st_mtime  # broken or foreign; verify() says how


def find_latest(work_dir: Path) -> Found:
    """Look for the newest checkpoint that holds; the pointer is for people and tools, the manifests decide."""
    skipped = []
    for path in reversed(_by_age(work_dir)):
        try:
            verify(path)
        except CheckpointError as error:
            skipped.append(str(error))
        else:
            return Found(path, tuple(skipped))
    return Found(None, tuple(skipped))


def point_to(target: Path) -> None:
    """Let ``last_checkpoint`` beside ``target`` name it, by a relative path, so that a work dir can be moved."""
    pointer = target.with_name(POINTER)
    staging = pointer.with_name(POINTER + '.tmp')
    staging.write_text(target.name + '\n', 'utf-8')
    _flush(staging)
    os.replace(staging, pointer)


def _pointed_at(work_dir: Path) -> str:
    pointer = work_dir / POINTER
    return pointer.read_text('utf-8').strip() if pointer.is_file() else ''


def purge(work_dir: Path, *, keep: int) -> list[Path]:
    """Remove all but the newest ``keep`` whole checkpoints (-1 keeps all, 0 means 1) and return what was removed.

    What ``last_checkpoint`` names stays, and so does what vlmtune did not write.
    """
    if keep < 0:
        return []
    ours = [path for path in _by_age(work_dir) if _is_ours(path)]
    kept = {*[path for path in ours if _is_whole(path)][-max(keep, 1) :], work_dir / _pointed_at(work_dir)}
    old = [path for path in ours if path not in kept]
    for path in old:
        shutil.rmtree(path)
    for left in work_dir.glob('iter_*.pth.tmp'):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(left)
    return old
