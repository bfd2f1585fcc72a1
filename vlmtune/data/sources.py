"""Rows from files, folders and the hub.

Rows of json and jsonl files stay in their file, those of csv files are read into memory; no common schema is forced on
them. Everything else is an Arrow table on disk. Of files and tables a row is read when it is asked for; image columns
are never decoded.
"""

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from vlmtune.data.file_rows import FileRows, Row, hash_of_file
from vlmtune.data.indexed import Indexed
from vlmtune.utils.errors import DataError
from vlmtune.utils.hub import hub_answers, is_modelscope, modelscope_folder, why_no_answer

if TYPE_CHECKING:
    from datasets import Dataset

_HUB_ID = re.compile(r'[\w-][\w.-]*(/[\w-][\w.-]*)?')


class ListRows(Indexed[Row]):
    """Rows in memory, with the lines they came from.

    Args:
        rows: the rows.
        path: their file.
        lines: for every row the line it starts on, counted from 1.
    """

    def __init__(self, rows: list[Row], *, path: Path, lines: list[int]) -> None:
        self.rows = rows
        self.path = path
        self.name = path.name
        self.lines = lines

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, index: int) -> Row:
        """One row."""
        return self.rows[index]

    def where(self, index: int) -> str:
        """``train.csv:812``."""
        return f'{self.name}:{self.lines[index]}'

    def fingerprint(self) -> str:
        """A hash of the rows."""
        return _hash_of_values(self.rows)


class TableRows(Indexed[Row]):
    """Rows of an Arrow table on disk, read one by one; images stay ``dict(bytes=, path=)``.

    Args:
        dataset: the data set.
        name: the file's or data set's name, for messages.
        content: a hash of the content; None where ``datasets`` has to tell.
    """

    def __init__(self, dataset: 'Dataset', *, name: str, content: str | None = None) -> None:
        self.dataset = dataset.with_format('arrow')  # plain Arrow values: no feature is decoded
        self.name, self.content = name, content

    def __len__(self) -> int:
        return len(self.dataset)

    def at(self, index: int) -> Row:
        """One row, read."""
        return self.dataset[index].to_pylist()[0]

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), 1000):
            yield from self.dataset[start : start + 1000].to_pylist()

    def where(self, index: int) -> str:
        """``train.parquet[811]``."""
        return f'{self.name}[{index}]'

    def fingerprint(self) -> str:
        """A hash of the file, or the name that ``datasets`` gives to the content of the table."""
        return self.content or str(self.dataset._fingerprint)


LoadedRows: TypeAlias = FileRows | ListRows | TableRows


@runtime_checkable
class HasPlaces(Protocol):
    """Rows that know where they come from."""

    def where(self, index: int) -> str:
        """``train.jsonl:812``."""
        ...


def where(rows: Sequence[Any], index: int) -> str:
    """The place of a row for messages: ``train.jsonl:812`` (a line, from 1) or ``train.parquet[811]`` (from 0)."""
    if isinstance(rows, HasPlaces):
        return rows.where(index)
    return f'rows[{index}]'


def fingerprint(rows: Sequence[Any]) -> str | None:
    """What changes when a row does: a hash of the file or of the rows; None where rows in memory are not plain data."""
    if isinstance(rows, LoadedRows):
        return rows.fingerprint()
    try:
        return _hash_of_values(rows)
    except (TypeError, ValueError, RecursionError):
        return None


def _hash_of_values(rows: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b'\n')
    return digest.hexdigest()


def load_rows(path: str | os.PathLike[str], *, split: str = 'train', name: str | None = None) -> LoadedRows:
    """The rows of a data set.

    Args:
        path: a .json file (a list of objects, or ``{"data": [...]}``), a .jsonl, .csv, .parquet or .arrow file, a
            folder written by ``save_to_disk``, a folder of parquet files, or the id of a data set on the hub; or
            ``modelscope://org/name`` (a repository of parquet files), ``modelscope://org/name/train.jsonl`` (any file).
        split: for folders and the hub; slices such as ``'train[:100]'`` work there.
        name: the configuration (subset) of a folder or hub data set.

    Raises:
        DataError: not found, broken, empty, of an unknown kind, or without that split. What is wrong inside a .json or
            .jsonl file is said when its rows are first asked for.
    """
    text = os.fspath(path)
    if is_modelscope(text):
        text = modelscope_folder(text, kind='dataset', error=DataError)
    local = Path(os.path.expanduser(text))
    if local.is_dir():
        rows: LoadedRows = _read_folder(local, split=split, name=name)
    elif local.exists():
        reader = _READERS.get(local.suffix.lower())
        if reader is None:
            raise DataError(f'{local.absolute()} ends in {local.suffix!r}; expected {", ".join(_READERS)}, or a folder')
        if split != 'train' or name is not None:
            raise DataError(
                f'{local.absolute()} is one file, which has no split {split!r} or name {name!r}; remove them'
            )
        rows = reader(local)
    elif _HUB_ID.fullmatch(text) and local.suffix.lower() not in _READERS:
        rows = _read_hub(text, split=split, name=name)
    else:
        raise DataError(f'data file not found: {local.absolute()}; check the path in the config (data_path)')
    if not isinstance(rows, FileRows) and not len(rows):
        raise DataError(f'{text} holds no rows; expected at least one')
    return rows


# ---- text files


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise DataError(
            f'{path.absolute()} is not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8'
        ) from error
    except OSError as error:
        raise DataError(f'{path.absolute()} cannot be read: {error.strerror}') from error


def _read_csv(path: Path) -> ListRows:
    """Every value is a text, and an empty cell None; nothing is guessed, so the answer 'NA' stays 'NA'."""
    reader = csv.reader(io.StringIO(_read_text(path)), strict=True)
    rows, lines = [], []
    try:
        header = next(reader, [])
        start = reader.line_num + 1
        for cells in reader:
            if cells:
                if len(cells) != len(header):
                    raise DataError(f'{path.absolute()}:{start}: {len(cells)} cells, but the header has {len(header)}')
                rows.append({key: cell or None for key, cell in zip(header, cells, strict=True)})
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f'{path.absolute()}:{reader.line_num}: broken CSV: {error}') from error
    return ListRows(rows, path=path.absolute(), lines=lines)


# ---- tables on disk


def _datasets() -> ModuleType:
    import datasets  # noqa: PLC0415  (it takes seconds, and json files need none of it)

    return datasets


def _read_table(read: Callable[[], Any], *, what: str, name: str, content: str | None = None) -> TableRows:
    datasets = _datasets()
    try:
        dataset = read()
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = ' '.join(str(error.__cause__ or error).split())
        raise DataError(f'{what} cannot be read: {reason}') from error
    if not isinstance(dataset, datasets.Dataset):
        raise DataError(f'{what} is a {type(dataset).__name__}; expected one split, set split')
    return TableRows(dataset, name=name, content=content)


def _read_table_file(path: Path, *, kind: str) -> TableRows:
    """``datasets`` keeps a copy of the file and knows it by its time of change; the name makes it know the content."""
    file, content = str(path.absolute()), hash_of_file(path)
    return _read_table(
        lambda: _datasets().load_dataset(kind, name=f'sha256-{content[:16]}', data_files=file, split='train'),
        what=file, name=path.name, content=content,
    )  # fmt: skip


def _read_folder(path: Path, *, split: str, name: str | None) -> TableRows:
    folder = str(path.absolute())
    if (path / 'dataset_dict.json').is_file():
        info = path / 'dataset_dict.json'
        try:
            splits = json.loads(_read_text(info)).get('splits', [])
        except json.JSONDecodeError as error:
            raise DataError(f'{info.absolute()}:{error.lineno}: broken JSON: {error.msg}') from error
        if split not in splits:
            raise DataError(f'{folder} has no split {split!r}, only {", ".join(splits)}; set split')
        return _read_table(lambda: _datasets().load_from_disk(folder)[split], what=folder, name=f'{path.name}/{split}')
    if (path / 'state.json').is_file():
        if split != 'train' or name is not None:
            raise DataError(
                f'{folder} is one saved data set, which has no split {split!r} or name {name!r}; remove them'
            )
        return _read_table(lambda: _datasets().load_from_disk(folder), what=folder, name=path.name)
    if not any(path.rglob('*.parquet')):
        raise DataError(f'{folder} holds no parquet file and was not written by save_to_disk; name a file in it')
    return _read_table(
        lambda: _datasets().load_dataset(folder, name, split=split), what=folder, name=f'{path.name}/{split}'
    )


def in_cache(hub_id: str) -> bool:
    """Whether ``datasets`` has it without a hub; it asks the hub for half a minute before it looks there."""
    return (Path(_datasets().config.HF_DATASETS_CACHE) / hub_id.replace('/', '___')).is_dir()


def _read_hub(hub_id: str, *, split: str, name: str | None) -> TableRows:
    what = f'{hub_id}: there is no file {Path(hub_id).absolute()}, and the data set {hub_id!r} of the hub'
    if not in_cache(hub_id) and not hub_answers():
        raise DataError(f'{what} is not in the cache, and {why_no_answer()}')
    return _read_table(lambda: _datasets().load_dataset(hub_id, name, split=split), what=what, name=f'{hub_id}/{split}')


_READERS: dict[str, Callable[[Path], LoadedRows]] = {
    '.json': FileRows,
    '.jsonl': FileRows,
    '.parquet': partial(_read_table_file, kind='parquet'),
    '.arrow': partial(_read_table_file, kind='arrow'),
    '.csv': _read_csv,
}
