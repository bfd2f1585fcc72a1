"""Rows from files, folders and the hub.

Rows of json, jsonl and csv files are read into memory as they are (no common schema is forced on them). Everything
else is an Arrow table on disk, of which a row is read when it is asked for; image columns are never decoded.
"""

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, overload

from vlmtune.utils.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]
_HUB_ID = re.compile(r'[\w-][\w.-]*(/[\w-][\w.-]*)?')


class ListRows(Sequence[Row]):
    """Rows in memory, with the lines they came from.

    Args:
        rows: the rows.
        name: the file's name, for messages.
        lines: for every row the line it starts on, counted from 1; None where rows have no lines of their own.
    """

    def __init__(self, rows: list[Row], *, name: str, lines: list[int] | None = None) -> None:
        self.rows = rows
        self.name = name
        self.lines = lines

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        return self.rows[index]

    def where(self, index: int) -> str:
        """``train.jsonl:812``, or ``train.json[811]`` where rows have no lines."""
        return f'{self.name}:{self.lines[index]}' if self.lines is not None else f'{self.name}[{index}]'


class TableRows(Sequence[Row]):
    """Rows of an Arrow table on disk, read one by one; images stay ``dict(bytes=, path=)``.

    Args:
        dataset: the data set.
        name: the file's or data set's name, for messages.
    """

    def __init__(self, dataset: 'Dataset', *, name: str) -> None:
        self.dataset = dataset.with_format('arrow')  # plain Arrow values: no feature is decoded
        self.name = name

    def __len__(self) -> int:
        return len(self.dataset)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return self.dataset[index].to_pylist()
        return self.dataset[int(index)].to_pylist()[0]

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), 1000):
            yield from self[start : start + 1000]

    def where(self, index: int) -> str:
        """``train.parquet[811]``."""
        return f'{self.name}[{index}]'


def where(rows: Sequence[Any], index: int) -> str:
    """The place of a row for messages: ``train.jsonl:812`` (a line, from 1) or ``train.parquet[811]`` (from 0)."""
    if isinstance(rows, ListRows | TableRows):
        return rows.where(index)
    return f'rows[{index}]'


def load_rows(path: str | os.PathLike[str], *, split: str = 'train', name: str | None = None) -> ListRows | TableRows:
    """The rows of a data set.

    Args:
        path: a .json file (a list of objects, or ``{"data": [...]}``), a .jsonl, .csv, .parquet or .arrow file, a
            folder written by ``save_to_disk``, a folder of parquet files, or the id of a data set on the hub.
        split: for folders and the hub; slices such as ``'train[:100]'`` work there.
        name: the configuration (subset) of a folder or hub data set.

    Raises:
        DataError: not found, broken (with file and line), empty, of an unknown kind, or without that split.
    """
    text = os.fspath(path)
    local = Path(os.path.expanduser(text))
    if local.is_dir():
        rows: ListRows | TableRows = _read_folder(local, split=split, name=name)
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
    if not len(rows):
        raise DataError(f'{text} holds no rows; expected at least one')
    return rows


# ---- files read into memory


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise DataError(
            f'{path.absolute()} is not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8'
        ) from error
    except OSError as error:
        raise DataError(f'{path.absolute()} cannot be read: {error.strerror}') from error


def _parse(text: str, *, path: Path, line: int, hint: str = '') -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = line + error.lineno - 1
        raise DataError(f'{path.absolute()}:{at}: broken JSON at column {error.colno}: {error.msg}{hint}') from error
    except RecursionError as error:
        raise DataError(f'{path.absolute()}:{line}: JSON nested too deeply') from error


def _check_row(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f'{place}: a row is of type {type(row).__name__}; expected an object')
    return row


def _read_json(path: Path) -> ListRows:
    value = _parse(
        _read_text(path), path=path, line=1, hint='; if every line is an object of its own, name the file .jsonl'
    )
    if isinstance(value, dict):
        if not isinstance(value.get('data'), list):
            keys = ', '.join(map(repr, list(value)[:8]))
            raise DataError(
                f"{path.absolute()} is one object with the keys {keys}; expected a list of rows, or one under 'data'"
            )
        value = value['data']
    if not isinstance(value, list):
        raise DataError(f'{path.absolute()} holds a {type(value).__name__}; expected a list of rows')
    return ListRows([_check_row(row, f'{path.absolute()}[{i}]') for i, row in enumerate(value)], name=path.name)


def _read_jsonl(path: Path) -> ListRows:
    rows, lines = [], []
    # Not splitlines(): it also breaks at characters that JSON allows inside a text, for example U+2028.
    for number, line in enumerate(_read_text(path).split('\n'), start=1):
        if line.strip():
            value = _parse(
                line, path=path, line=number, hint='; every line must be one object (else name the file .json)'
            )
            rows.append(_check_row(value, f'{path.absolute()}:{number}'))
            lines.append(number)
    return ListRows(rows, name=path.name, lines=lines)


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
    return ListRows(rows, name=path.name, lines=lines)


# ---- tables on disk


def _datasets() -> ModuleType:
    import datasets  # noqa: PLC0415  (it takes seconds, and json files need none of it)

    return datasets


def _read_table(read: Callable[[], Any], *, what: str, name: str) -> TableRows:
    datasets = _datasets()
    try:
        dataset = read()
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = ' '.join(str(error.__cause__ or error).split())
        raise DataError(f'{what} cannot be read: {reason}') from error
    if not isinstance(dataset, datasets.Dataset):
        raise DataError(f'{what} is a {type(dataset).__name__}; expected one split, set split')
    return TableRows(dataset, name=name)


def _read_parquet(path: Path) -> TableRows:
    file = str(path.absolute())
    return _read_table(
        lambda: _datasets().load_dataset('parquet', data_files=file, split='train'), what=file, name=path.name
    )


def _read_arrow(path: Path) -> TableRows:
    file = str(path.absolute())
    return _read_table(
        lambda: _datasets().load_dataset('arrow', data_files=file, split='train'), what=file, name=path.name
    )


def _read_folder(path: Path, *, split: str, name: str | None) -> TableRows:
    folder = str(path.absolute())
    if (path / 'dataset_dict.json').is_file():
        info = path / 'dataset_dict.json'
        splits = _parse(_read_text(info), path=info, line=1).get('splits', [])
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


def _read_hub(hub_id: str, *, split: str, name: str | None) -> TableRows:
    what = f'{hub_id}: there is no file {Path(hub_id).absolute()}, and the data set {hub_id!r} of the hub'
    return _read_table(lambda: _datasets().load_dataset(hub_id, name, split=split), what=what, name=f'{hub_id}/{split}')


_READERS: dict[str, Callable[[Path], ListRows | TableRows]] = {
    '.json': _read_json,
    '.jsonl': _read_jsonl,
    '.parquet': _read_parquet,
    '.arrow': _read_arrow,
    '.csv': _read_csv,
}
