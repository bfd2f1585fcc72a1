"""Plans that outlive a run. Processes that want the same one wait for the first, then map its file.

A plan is two files: the table (``.arrow``) and, written last, what it depends on and the table's check sum (``.json``).
"""

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from filelock import FileLock, Timeout

from vlmtune.data.images import Root
from vlmtune.data.parallel import default_workers
from vlmtune.data.plan_key import describe_difference, plan_key
from vlmtune.data.planning import RowPlanner, file_state, plan_rows
from vlmtune.data.sample_table import FileState, SampleTable, write_batches, writing
from vlmtune.utils.disk import hash_file
from vlmtune.utils.errors import ConfigError

logger = logging.getLogger(__name__)

_KEPT = 4  # plans of one file of rows
_STAT_THREADS = 8  # they help where a folder lies on a network


def open_plan(
    planner: RowPlanner,
    *,
    cache_dir: str | None,
    workers: int | None,
    inspect: Callable[[pa.RecordBatch], None],
) -> SampleTable:
    """The plan of all rows: the one that is stored, if nothing changed that it depends on, or else a new one.

    Args:
        planner: knows how to plan a row.
        cache_dir: where plans are stored; None: this one goes when the process does.
        workers: processes that plan; None chooses.
        inspect: sees the records of a new plan as they come, and may raise to end it.

    Raises:
        UserError: ``inspect`` raised it; a mistake that is not a row's; the plan cannot be written.
    """
    name = str(getattr(planner.rows, 'name', 'rows'))

    def new_plan(reason: str) -> Iterator[pa.RecordBatch]:
        count = len(planner.rows)
        processes = default_workers(count) if workers is None else workers
        logger.info('plan of %s: %s; planning %s rows in %d processes', name, reason, f'{count:,}', max(1, processes))
        for batch in plan_rows(planner, workers=processes):
            inspect(batch)
            yield batch

    if cache_dir is None:
        return _temporary_plan(planner, new_plan('not stored'))
    parts = plan_key(planner)
    if isinstance(parts, str):
        return _temporary_plan(planner, new_plan(f'not stored, for it depends on {parts}'))
    folder = Path(cache_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        logger.warning('plans cannot be stored in %s (%s); set plan_cache_dir', folder, error.strerror)
        return _temporary_plan(planner, new_plan('not stored'))
    return _StoredPlan(planner, parts, folder=folder, name=name).open(new_plan)


def _temporary_plan(planner: RowPlanner, batches: Iterable[pa.RecordBatch]) -> SampleTable:
    handle, name = tempfile.mkstemp(prefix='vlmtune-plan-', suffix='.arrow')
    os.close(handle)
    path = Path(name)
    try:
        write_batches(path, batches, image_token=planner.image_token)
        return SampleTable(path, images_of=planner.images_of, temporary=True)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


class _StoredPlan:
    def __init__(self, planner: RowPlanner, parts: dict[str, str], *, folder: Path, name: str) -> None:
        self.planner, self.parts, self.folder, self.name = planner, parts, folder, name
        place = hashlib.sha256(str(getattr(planner.rows, 'path', name)).encode()).hexdigest()[:8]
        self.family = '{}-{}'.format(re.sub(r'[^\w.-]', '_', name), place)  # plans of the same file of rows
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        self.table_path = folder / f'{self.family}-{key}.arrow'
        self.info_path = self.table_path.with_suffix('.json')

    def open(self, new_plan: Callable[[str], Iterable[pa.RecordBatch]]) -> SampleTable:
        """The stored plan, which is planned first if need be; of several processes one plans."""
        seen = self._identity()
        found = self._load()
        if isinstance(found, SampleTable):
            logger.info('plan of %s: read from %s, nothing changed', self.name, self.table_path)
            return found
        with self._locked():
            if self._identity() != seen:  # another process has planned it a moment ago: its images are as they are now
                found = self._load(look_at_images=False)
            if isinstance(found, SampleTable):
                logger.info('plan of %s: read from %s, made a moment ago', self.name, self.table_path)
                return found
            self._write(new_plan(found))
            found = self._load(look_at_images=False)
        if isinstance(found, str):
            raise ConfigError(f'the plan in {self.table_path} cannot be read back ({found}); set plan_cache_dir')
        self._remove_old()
        logger.info('plan of %s: kept in %s', self.name, self.table_path)
        return found

    def _identity(self) -> int | None:
        """Changes when the plan is written anew: the file that is replaced still exists when its successor is made."""
        try:
            return self.info_path.stat().st_ino
        except OSError:
            return None

    def _load(self, *, look_at_images: bool = True) -> SampleTable | str:
        """The table; or why it cannot be used."""
        if not self.info_path.exists():
            return self._reason_for_none()
        try:
            info = json.loads(self.info_path.read_text('utf-8'))
            if info['sha256'] != hash_file(self.table_path):
                raise ValueError('its check sum is another')
            table = SampleTable(self.table_path, images_of=self.planner.images_of)
        except (OSError, ValueError, KeyError, TypeError) as error:  # Arrow's errors are ValueErrors
            logger.warning('the stored plan %s is broken (%s)', self.table_path, error)
            return 'the stored one is broken'
        if look_at_images and (changed := _changed_image(table, self.planner.image_folder)):
            return f'image {changed} has changed since the last one'
        os.utime(self.info_path)
        return table

    def _reason_for_none(self) -> str:
        others = self._others()
        if not others:
            return 'the first one'
        try:
            parts = json.loads(others[0].read_text('utf-8'))['parts']
            return f'the last one differs in {describe_difference(parts, self.parts)}'
        except (OSError, ValueError, KeyError, AttributeError):
            return 'the last one cannot be read'

    def _others(self) -> list[Path]:
        """Plans of the same file of rows, the one used last first."""
        found = [path for path in self.folder.glob(f'{self.family}-*.json') if path != self.info_path]
        return sorted(found, key=_used, reverse=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = FileLock(self.table_path.with_suffix('.lock'))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info('plan of %s: another process is at it; waiting', self.name)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _write(self, batches: Iterable[pa.RecordBatch]) -> None:
        new_table, new_info = (path.with_name(f'{path.name}.new') for path in (self.table_path, self.info_path))
        try:
            write_batches(new_table, batches, image_token=self.planner.image_token)
            info = dict(parts=self.parts, sha256=hash_file(new_table))
            with writing(self.info_path):
                new_info.write_text(json.dumps(info, indent=1), 'utf-8')
                os.replace(new_table, self.table_path)
                os.replace(new_info, self.info_path)
        finally:
            new_table.unlink(missing_ok=True)
            new_info.unlink(missing_ok=True)

    def _remove_old(self) -> None:
        for info in self._others()[_KEPT - 1 :]:
            info.unlink(missing_ok=True)
            info.with_suffix('.arrow').unlink(missing_ok=True)


def _used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # removed by another process a moment ago
        return 0.0


def _changed_image(table: SampleTable, root: Root) -> str | None:
    """An image file that is not what it was."""

    def first_changed(files: list[tuple[str, FileState]]) -> str | None:
        return next((path for path, state in files if file_state(path, root) != state), None)

    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        return next((path for path in pool.map(first_changed, table.image_files()) if path is not None), None)
