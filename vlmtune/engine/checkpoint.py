"""Checkpoint directories that are whole or are not there.

``iter_N.pth/`` is written beside its final name, every file is flushed to disk, a manifest with sizes and hashes is
written last, and only then is the directory renamed. Discovery trusts a manifest that holds, nothing else.
docs/checkpoint_format.md lists the files.
"""

import contextlib
import logging
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vlmtune.engine.manifest import MANIFEST, manifest_text, read_manifest, size_of, verify
from vlmtune.utils.disk import Written, flush_directory, free_bytes, rename, replace_text, write_file
from vlmtune.utils.errors import CheckpointError

logger = logging.getLogger(__name__)

WEIGHTS_FILE = 'model.safetensors'
TRAINER_FILE = 'trainer.json'
CONFIG_FILE = 'config.py'
PROCESSOR_DIR = 'processor'
POINTER = 'last_checkpoint'
BEST_POINTER = 'best_checkpoint'
_NAME = re.compile(r'iter_(\d+)\.pth')
_ASIDE = re.compile(r'(iter_\d+\.pth)\.old\d*')
_HALF_WRITTEN = 'iter_*.pth.tmp'
_SPARE = 1 << 24  # bytes; directories, and what else writes beside a checkpoint


def checkpoint_name(iteration: int) -> str:
    """'iter_500.pth'; the number counts optimizer steps."""
    return f'iter_{iteration}.pth'


def rng_file(rank: int) -> str:
    """The file with the random generators of a rank."""
    return f'rng_{rank}.json'


# ---- writing


def check_space(work_dir: Path, needed_bytes: int) -> None:
    """Raise unless a checkpoint can be written beside those that are there: old ones go when the new one is safe.

    Raises:
        CheckpointError: how much is free and how much is needed.
    """
    free = free_bytes(work_dir) + sum(_bytes_under(path) for path in work_dir.glob(_HALF_WRITTEN))
    if free < needed_bytes + _SPARE:
        raise CheckpointError(
            f'{work_dir} has room for {_in_words(free)}, a checkpoint takes about {_in_words(needed_bytes + _SPARE)}, '
            'spare room included; make room, choose another --work-dir, or keep fewer checkpoints (max_keep_ckpts)'
        )


def _bytes_under(path: Path) -> int:
    with contextlib.suppress(OSError):
        return sum(file.lstat().st_size for file in path.rglob('*'))
    return 0


def _in_words(size: int) -> str:
    return f'{size / 2**30:.1f} GiB' if size >= 2**30 else f'{size / 2**20:.1f} MiB'


def start(target: Path) -> Path:
    """An empty directory beside ``target`` to write into; what killed runs have left half written goes."""
    for left in target.parent.glob(_HALF_WRITTEN):
        _remove(left)
    staging = staging_of(target)
    staging.mkdir(parents=True)
    return staging


def staging_of(target: Path) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return target.with_name(target.name + '.tmp')


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def discard(staging: Path) -> None:
    """Give the space of a checkpoint back that could not be finished."""
    shutil.rmtree(staging, ignore_errors=True)


def seal(
    staging: Path, target: Path, *, files: Mapping[str, Written], meta: Mapping[str, Any], patience: float = 0.0
) -> None:
    """Make what was written to ``staging`` the checkpoint ``target``.

    Args:
        staging: of ``start``; every file in it was flushed by the one who wrote it.
        target: what is there under this name goes when the new one is in its place, or is kept if it is not ours.
        files: what the writers said, by names relative to ``staging``.
        meta: iteration, world_size, resumable.
        patience: seconds to wait for files that other nodes have written.

    Raises:
        CheckpointError: an announced file is not there.
        OSError: the disk failed; what was there under the name still is.
    """
    _expect(staging, files, patience=patience)
    folders = {staging / parent for name in files for parent in PurePosixPath(name).parents}
    for folder in sorted(folders - {staging}, reverse=True):
        flush_directory(folder)
    ages = [_saved_at(path) for path in _by_age(target.parent)]
    saved_at = max([time.time(), *(age + 1e-3 for age in ages[-1:])])  # the newest, also when the clock was put back
    write_file(staging / MANIFEST, [manifest_text(files, saved_at=saved_at, meta=meta).encode()])
    flush_directory(staging)
    aside = _free_name(target) if target.exists() or target.is_symlink() else None
    if aside is not None:
        rename(target, aside)
    try:
        rename(staging, target)
    except OSError:
        if aside is not None:
            rename(aside, target)
        raise
    flush_directory(target.parent)
    if aside is not None and _is_ours(aside):
        shutil.rmtree(aside, ignore_errors=True)  # what is left of it goes with the next purge


def _expect(staging: Path, files: Mapping[str, Written], *, patience: float) -> None:
    """Every announced file is there, whole. A network file system may need a while to show what another node wrote."""
    until = time.monotonic() + patience
    for name, written in files.items():
        while (found := _size_or_none(staging, name)) != written.size:
            if time.monotonic() < until:
                time.sleep(0.5)
            elif found is None:
                raise CheckpointError(
                    f'{name} of {staging} was written by another process and is not to be seen here: the work dir '
                    'is not shared between the nodes; choose a --work-dir that all of them see'
                )
            else:
                raise CheckpointError(
                    f'{staging}: {name} has {found} bytes right after {written.size} were written to it'
                )


def _size_or_none(staging: Path, name: str) -> int | None:
    with contextlib.suppress(CheckpointError):
        return size_of(staging, name)
    return None


def _free_name(target: Path) -> Path:
    for number in ('', *map(str, range(2, 1000))):
        if not (aside := target.with_name(f'{target.name}.old{number}')).exists():
            return aside
    raise CheckpointError(f'{target} cannot be kept aside: there are a thousand of them; remove the {target.name}.old*')


def point_to(target: Path, *, pointer: str = POINTER) -> None:
    """Let ``last_checkpoint`` beside ``target`` name it, by a relative path, so that a work dir can be moved."""
    replace_text(target.with_name(pointer), target.name + '\n')


def failure(target: Path, error: OSError) -> CheckpointError:
    """What to say when a checkpoint could not be written, and which one holds."""
    reason = error.strerror or str(error)
    if error.filename and not Path(error.filename).is_relative_to(staging_of(target)):
        reason += f' ({error.filename})'
    newest = find_latest(target.parent, hashes=False).path
    if newest == target:
        return CheckpointError(
            f'{target} is written, but not all behind it: {reason}; resume from it once that is mended'
        )
    rest = 'there is no older one' if newest is None else f'the newest good one is {newest}'
    return CheckpointError(f'checkpoint {target} could not be written: {reason}; {rest}')


# ---- finding


@dataclass(frozen=True)
class Found:
    """The newest valid checkpoint of a work dir, and why newer ones were passed over."""

    path: Path | None
    skipped: tuple[str, ...]


def find_latest(work_dir: Path, *, hashes: bool = True) -> Found:
    """Look for the newest checkpoint that holds; the pointer is for people and tools, the manifests decide.

    Args:
        work_dir: where to look.
        hashes: False looks at sizes only.
    """
    skipped = []
    for path in reversed(_by_age(work_dir)):
        try:
            verify(path, hashes=hashes)
        except CheckpointError as error:
            skipped.append(str(error))
        else:
            return Found(path, tuple(skipped))
    return Found(None, tuple(skipped))


def _by_age(work_dir: Path) -> list[Path]:
    """The checkpoints of a work dir, oldest first.

    By the time in the manifest, not by the number: a new run in an old work dir counts from 1 again. One that was put
    aside counts while the one that should replace it is not there: the run was killed between the two renames.
    """
    paths = list(work_dir.iterdir()) if work_dir.is_dir() else []
    found = [path for path in paths if _NAME.fullmatch(path.name)]
    for path in paths:
        if (match := _ASIDE.fullmatch(path.name)) and not (work_dir / match[1]).exists() and _is_ours(path):
            found.append(path)
    return sorted(found, key=lambda path: (_saved_at(path), path.name))


def _saved_at(path: Path) -> float:
    try:
        return float(read_manifest(path)['saved_at'])
    except CheckpointError:  # broken or foreign; verify() says how
        return path.lstat().st_mtime


def _is_ours(path: Path) -> bool:
    """Whether vlmtune wrote it; other programs name their checkpoints alike."""
    try:
        read_manifest(path)
    except CheckpointError:
        return False
    return True


def _is_whole(path: Path) -> bool:
    try:
        verify(path, hashes=False)
    except CheckpointError:
        return False
    return True


# ---- removing


def _pointed_at(work_dir: Path, pointer: str) -> str:
    try:
        name = (work_dir / pointer).read_bytes()[:100].decode(errors='replace').strip()
    except OSError:
        return ''
    return name if _NAME.fullmatch(name) else ''


def purge(work_dir: Path, *, keep: int) -> list[Path]:
    """Remove all but the newest ``keep`` whole checkpoints (-1 keeps all, 0 means 1) and return what was removed.

    What ``last_checkpoint`` or ``best_checkpoint`` names stays, and so does what vlmtune did not write.
    """
    if keep < 0:
        return []
    ours = [path for path in _by_age(work_dir) if _is_ours(path)]
    kept = {*[path for path in ours if _is_whole(path)][-max(keep, 1) :]}
    kept |= {work_dir / _pointed_at(work_dir, pointer) for pointer in (POINTER, BEST_POINTER)}
    old = [path for path in ours if path not in kept]
    old += [path for path in work_dir.iterdir() if path not in ours and _is_replaced(path)]
    try:
        for path in old:
            _remove(staging := staging_of(path.with_name(path.name.partition('.old')[0])))
            rename(path, staging)  # so that one half removed does not look like one that was damaged
            _remove(staging)
        for left in work_dir.glob(_HALF_WRITTEN):
            _remove(left)
    except OSError as error:
        logger.warning('old checkpoints could not be removed: %s', error)
    return old


def _is_replaced(path: Path) -> bool:
    """Whether a checkpoint was put aside and the one in its place is there."""
    match = _ASIDE.fullmatch(path.name)
    return match is not None and _is_ours(path) and _is_whole(path.with_name(match[1]))
