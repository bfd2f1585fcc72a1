"""Rows that come one after the other: sources that are too large to be planned ahead, or have no end that is known."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from vlmtune.data.file_rows import parse_row
from vlmtune.data.sources import in_cache, load_rows, where
from vlmtune.registry import build_callable
from vlmtune.utils.errors import DataError
from vlmtune.utils.hub import hub_answers, is_modelscope, modelscope_folder, why_no_answer

Row = Mapping[str, Any]


class StreamRow(NamedTuple):
    """One row of a stream.

    Attributes:
        load: gives the row, or raises a DataError if it is broken.
        where: its place, for messages: ``train.jsonl:812``.
        after: the position of the row after it.
    """

    load: Callable[[], Row]
    where: str
    after: tuple[int, ...]


class RowStream(Protocol):
    """A source that can be read from a position on; ``()`` is its start."""

    name: str

    def read(self, position: Sequence[int] = ()) -> Iterator[StreamRow]:
        """The rows from a position on."""
        ...


class StreamedRows(Sequence[Any]):
    """Rows of a stream that are in memory; one is parsed when it is asked for, so a broken one is as any bad row.

    Args:
        rows: as the stream gave them.
        name: for messages.
    """

    def __init__(self, rows: Sequence[StreamRow], *, name: str) -> None:
        self.rows, self.name = rows, name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index].load()

    def where(self, index: int) -> str:
        """``train.jsonl:812``."""
        return self.rows[index].where


class LineStream:
    """The lines of a .jsonl file; a position is (byte, lines before it).

    Args:
        path: of the file.

    Raises:
        DataError: there is no such file.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise DataError(f'data file not found: {path.absolute()}; check the path in the config (data_path)')
        self.path, self.name = path, path.name

    def read(self, position: Sequence[int] = ()) -> Iterator[StreamRow]:
        """The rows from a position on; empty lines are none."""
        byte, line = position or (0, 0)
        with self.path.open('rb') as file:
            file.seek(byte)
            for text in file:
                at, byte, line = byte, byte + len(text), line + 1
                if text.strip():
                    load = partial(parse_row, text.rstrip(b'\r\n'), at=at)
                    yield StreamRow(load, f'{self.name}:{line}', (byte, line))


class IterableStream:
    """Anything that can be iterated over again and again; a position is the number of rows before it.

    Args:
        rows: a Hugging Face ``IterableDataset``, a list, ...
        name: for messages.
    """

    def __init__(self, rows: Iterable[Row], *, name: str) -> None:
        self.rows, self.name = rows, name

    def read(self, position: Sequence[int] = ()) -> Iterator[StreamRow]:
        """The rows from a position on; a sequence starts there, a data set that can skip does, others are read over."""
        (first,) = position or (0,)
        if isinstance(self.rows, Sequence):
            for number in range(first, len(self.rows)):
                yield StreamRow(partial(self.rows.__getitem__, number), where(self.rows, number), (number + 1,))
            return
        skip = getattr(self.rows, 'skip', None)
        rest = islice(self.rows, first, None) if skip is None else skip(first)
        for number, row in enumerate(rest, start=first):
            yield StreamRow(partial(_given, row), f'{self.name}[{number}]', (number + 1,))


def stream_rows(
    path: str | os.PathLike[str], *, split: str = 'train', name: str | None = None
) -> LineStream | IterableStream:
    """The rows of a data set, one after the other; nothing is read ahead, or written to disk but downloads.

    Args:
        path: a .jsonl file, which is read line by line and resumed by seeking; a .json or .csv file, of which
            ``load_rows`` keeps the places of the rows in memory; a .parquet or .arrow file; or the id of a data set on
            the hub or a folder, which ``datasets`` streams. What ``modelscope://`` names is downloaded as a whole.
        split, name: of a folder or a data set on the hub.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    text = os.fspath(path)
    if is_modelscope(text):
        text = modelscope_folder(text, kind='dataset', error=DataError)
    local = Path(text).expanduser()
    suffix = local.suffix.lower()
    if suffix == '.jsonl':
        return LineStream(local)
    if suffix in ('.json', '.csv'):
        return IterableStream(load_rows(local), name=local.name)
    from datasets import load_dataset  # noqa: PLC0415  (it takes seconds, and json files need none of it)

    kind = {'.parquet': 'parquet', '.arrow': 'arrow'}.get(suffix)
    if kind is not None and not local.is_file():
        raise DataError(f'data file not found: {local.absolute()}; check the path in the config (data_path)')
    if not local.exists() and not in_cache(text) and not hub_answers():  # the library asks for a minute
        raise DataError(f'{text}: there is no {local.absolute()}, and {why_no_answer()}')
    try:
        if kind is None:
            found = load_dataset(str(local) if local.is_dir() else text, name, split=split, streaming=True)
        else:
            found = load_dataset(kind, data_files=str(local), split='train', streaming=True)
    except (OSError, ValueError) as error:
        raise DataError(f'{text} cannot be streamed: {" ".join(str(error).split())}') from error
    undecoded = found.decode(False) if found.features else found  # images stay dict(bytes=, path=)
    return IterableStream(undecoded, name=local.name)


def open_stream(rows: RowStream | Iterable[Row] | Mapping[str, Any]) -> RowStream:
    """The stream that ``StreamingDataset(rows=...)`` reads."""
    found: Any = build_callable(rows)() if isinstance(rows, Mapping) else rows
    return found if hasattr(found, 'read') else IterableStream(found, name='rows')


def _given(row: Row) -> Row:
    return row
