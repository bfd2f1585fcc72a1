"""The planned rows of a data set as an Arrow file that processes map into memory.

One record per row, usable or not, in the order of the rows. A run of image tokens is stored as one token and the length
of the run, and what is learned as spans, so that a sample takes about the room of its text.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from vlmtune.data.arrow_arrays import list_array, list_of, number_array, number_lists, numbers_of, text_array
from vlmtune.data.bad_rows import BadSample
from vlmtune.data.indexed import Indexed
from vlmtune.structures import IGNORE_INDEX, ImageRef, ImageSize, Sample
from vlmtune.utils.errors import ConfigError

OK, BAD, OVERLONG = range(3)
KINDS = ('ok', 'bad', 'overlong')
_NO_IMAGE_TOKEN = -1
_FILES_AT_ONCE = 10_000
_BYTES = ''  # instead of a path; no path is empty
_NUMBERS, _LONGS = pa.list_(pa.int32()), pa.list_(pa.int64())
SCHEMA = pa.schema(
    [
        ('row', pa.int64()),
        ('kind', pa.int8()),  # into KINDS
        ('truncated', pa.int8()),
        ('tokens', _NUMBERS),  # every run of the image token is one token here
        ('image_runs', _NUMBERS),  # the lengths of those runs
        ('learned', _NUMBERS),  # start, end, start, end, ... of what is learned, in the whole sample
        ('length', pa.int32()),
        ('supervised', pa.int32()),
        ('patches', pa.int32()),
        ('image_paths', pa.list_(pa.string())),  # of all images of the row; '' where the row holds the bytes
        ('image_sizes', _NUMBERS),  # height, width, ... of the images of the sample, which are the row's first ones
        ('file_sizes', _LONGS),  # bytes of every image file; -1 where there is none
        ('file_times', _LONGS),  # when it was changed, ns
        ('where', pa.string()),
        ('error', pa.string()),
        ('reason', pa.string()),
    ]
)


class FileState(NamedTuple):
    """By what an image file is known again: its size in bytes and when it was changed, in ns; -1 if it is missing."""

    size: int
    time: int


@dataclass(frozen=True)
class PlannedRow:
    """What became of a row. ``sample`` is None where it cannot be used; ``where``, ``error`` and ``reason`` tell why.

    ``images`` and ``files`` are those of the whole row, also where the sample was cut to fewer.
    """

    row: int
    kind: int
    sample: Sample | None = None
    truncated: bool = False
    images: tuple[ImageRef, ...] = ()
    files: tuple[FileState, ...] = ()
    where: str = ''
    error: str = ''
    reason: str = ''


# ---- writing


def to_batch(rows: Sequence[PlannedRow], *, image_token: int | None) -> pa.RecordBatch:
    """Planned rows as records."""
    nothing = Sample(np.empty(0, np.int32), np.empty(0, np.int32))
    samples = [row.sample or nothing for row in rows]
    folded = [_fold(sample.input_ids, image_token) for sample in samples]
    sizes = [np.array(sample.image_sizes, np.int32).reshape(-1) for sample in samples]
    files = [np.array(row.files, np.int64).reshape(-1, 2) for row in rows]
    paths = [image.path or _BYTES for row in rows for image in row.images]
    columns = [
        number_array(np.array([row.row for row in rows], np.int64)),
        number_array(np.array([row.kind for row in rows], np.int8)),
        number_array(np.array([row.truncated for row in rows], np.int8)),
        number_lists([tokens for tokens, _ in folded], np.int32),
        number_lists([runs for _, runs in folded], np.int32),
        number_lists([_spans(sample.labels) for sample in samples], np.int32),
        number_array(np.array([len(sample) for sample in samples], np.int32)),
        number_array(np.array([_supervised(sample.labels) for sample in samples], np.int32)),
        number_array(np.array([sample.patches for sample in samples], np.int32)),
        list_array([len(row.images) for row in rows], text_array(paths)),
        number_lists(sizes, np.int32),
        number_lists([file[:, 0] for file in files], np.int64),
        number_lists([file[:, 1] for file in files], np.int64),
        *(text_array([getattr(row, name) for row in rows]) for name in ('where', 'error', 'reason')),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _supervised(labels: np.ndarray) -> int:
    return int(np.count_nonzero(labels[1:] != IGNORE_INDEX))


def _fold(ids: np.ndarray, image_token: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens with every run of the image token as one, and the lengths of the runs."""
    if image_token is None:
        return ids, np.empty(0, np.int32)
    inside = ids == image_token
    bounds = _bounds(inside)
    later = inside.copy()
    later[bounds[::2]] = False
    return ids[~later], bounds[1::2] - bounds[::2]


def _spans(labels: np.ndarray) -> np.ndarray:
    return _bounds(labels != IGNORE_INDEX)


def _bounds(inside: np.ndarray) -> np.ndarray:
    """Where runs of True begin and end: start, end, start, end, ..."""
    return np.flatnonzero(np.diff(inside, prepend=False, append=False)).astype(np.int32)


def write_batches(path: Path, batches: Iterable[pa.RecordBatch], *, image_token: int | None) -> None:
    """Write a table, batch by batch.

    Raises:
        ConfigError: the file cannot be written.
    """
    token = _NO_IMAGE_TOKEN if image_token is None else image_token
    schema = SCHEMA.with_metadata({'image_token': str(token)})
    with writing(path):
        file = path.open('wb')
    try:
        with writing(path):
            writer = pa.ipc.new_file(file, schema)
        for batch in batches:  # what these raise is no matter of the file
            with writing(path):
                writer.write_batch(batch)
        with writing(path):
            writer.close()
            file.flush()
            os.fsync(file.fileno())
    finally:
        file.close()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What goes wrong inside is told as a mistake of the setting that names the place."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f'the plan cannot be written to {path} ({reason}); make room, or set plan_cache_dir'
        ) from error


# ---- reading


class SampleTable(Indexed[Sample]):
    """The samples of a table: its usable rows.

    Args:
        source: the file, or what it holds.
        images_of: row -> its images; asked for rows that hold the bytes of an image.
        temporary: remove the file as soon as it is mapped, so that nothing is left of it however the process ends.
            Pickled, such a table takes its content along.

    Attributes:
        content: the bytes of the table, mapped.

    Raises:
        OSError, pyarrow.ArrowInvalid: the file is missing or broken.
    """

    def __init__(
        self, source: Path | bytes, *, images_of: Callable[[int], tuple[ImageRef, ...]], temporary: bool = False
    ) -> None:
        self.content = pa.memory_map(str(source)).read_buffer() if isinstance(source, Path) else pa.py_buffer(source)
        self.images_of = images_of
        self._path = source if isinstance(source, Path) and not temporary else None
        if temporary and isinstance(source, Path):
            source.unlink()
        reader = pa.ipc.open_file(self.content)
        if not reader.schema.equals(SCHEMA):
            raise pa.ArrowInvalid('the table has other columns')
        self._image_token = int(reader.schema.metadata[b'image_token'])
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self._kinds = self._column('kind')
        self.row_count = int(self._starts[-1])
        self.rows = np.flatnonzero(self._kinds == OK)  # int64[N], of every sample

    def __reduce__(self) -> tuple[Any, ...]:
        source = self.content.to_pybytes() if self._path is None else self._path
        return _reopen, (source, self.images_of)

    def _column(self, name: str) -> np.ndarray:
        parts = [numbers_of(batch.column(name)) for batch in self._batches]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def numbers(self, name: str) -> np.ndarray:
        """int64[N]: 'length', 'supervised', 'patches' or 'truncated' of every sample."""
        return self._column(name)[self.rows].astype(np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, index: int) -> Sample:
        """One sample, unfolded."""
        row = int(self.rows[index])
        batch, at = self._place(row)
        tokens, runs, learned, sizes = (
            list_of(batch.column(name), at) for name in ('tokens', 'image_runs', 'learned', 'image_sizes')
        )
        times = np.ones(len(tokens), np.int64)
        times[tokens == self._image_token] = runs
        ids = np.repeat(tokens, times)
        labels = np.full(len(ids), IGNORE_INDEX, np.int32)
        for start, end in learned.reshape(-1, 2).tolist():
            labels[start:end] = ids[start:end]
        return Sample(
            ids,
            labels,
            images=self._images(row, batch.column('image_paths')[at].as_py()[: len(sizes) // 2]),
            image_sizes=tuple(ImageSize(*size) for size in sizes.reshape(-1, 2).tolist()),
            patches=batch.column('patches')[at].as_py(),
        )

    def _place(self, row: int) -> tuple[pa.RecordBatch, int]:
        number = int(np.searchsorted(self._starts, row, side='right')) - 1
        return self._batches[number], row - int(self._starts[number])

    def _images(self, row: int, paths: Sequence[str]) -> tuple[ImageRef, ...]:
        if _BYTES in paths:
            return tuple(self.images_of(row)[: len(paths)])
        return tuple(ImageRef(path=path) for path in paths)

    def problems(self, kind: int) -> list[BadSample]:
        """The rows of one kind, BAD or OVERLONG."""
        return [problem_of(*self._place(int(row))) for row in np.flatnonzero(self._kinds == kind)]

    def image_files(self) -> Iterator[list[tuple[str, FileState]]]:
        """Every image file that was looked at, and what it was then, some thousands at a time."""
        if not self._batches:
            return
        named = pa.chunked_array([batch.column('image_paths').flatten() for batch in self._batches])
        paths = named.combine_chunks().dictionary_encode()  # rows share files
        numbers, sizes, times = numbers_of(paths.indices), self._flat('file_sizes'), self._flat('file_times')
        first = np.empty(len(paths.dictionary), np.int64)
        first[numbers[::-1]] = np.arange(len(numbers))[::-1]
        other = np.flatnonzero((sizes != sizes[first][numbers]) | (times != times[first][numbers]))
        looks = np.concatenate([first, other])  # a file that changed during the planning was seen in several states
        for start in range(0, len(looks), _FILES_AT_ONCE):
            some = looks[start : start + _FILES_AT_ONCE]
            names = paths.dictionary.take(number_array(numbers[some])).to_pylist()
            states = map(FileState, sizes[some].tolist(), times[some].tolist())
            yield [(path, state) for path, state in zip(names, states, strict=True) if path != _BYTES]

    def _flat(self, name: str) -> np.ndarray:
        return np.concatenate([numbers_of(batch.column(name).flatten()) for batch in self._batches])


def problem_of(batch: pa.RecordBatch, at: int) -> BadSample:
    """What is wrong with a record that is not OK."""
    record = {
        name: batch.column(name)[at].as_py() for name in ('row', 'kind', 'image_paths', 'where', 'error', 'reason')
    }
    paths = tuple(path for path in record['image_paths'] if path is not None)
    kind = KINDS[record['kind']]
    return BadSample(record['row'], record['where'], record['reason'], kind, record['error'], paths)


def _reopen(source: Path | bytes, images_of: Callable[[int], tuple[ImageRef, ...]]) -> SampleTable:
    return SampleTable(source, images_of=images_of)
