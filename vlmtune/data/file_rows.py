"""Rows of a json or jsonl file, which stay in the file: a row is read and parsed when it is asked for."""

import json
import os
import weakref
from pathlib import Path
from typing import Any

from vlmtune.data.indexed import Indexed
from vlmtune.data.json_index import RowIndex, index_lines, index_list
from vlmtune.utils.disk import hash_file
from vlmtune.utils.errors import DataError

Row = dict[str, Any]


def hash_of_file(path: Path) -> str:
    """A hash of the content of a file of rows.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return hash_file(path)
    except OSError as error:
        raise DataError(f'{path.absolute()} cannot be read: {error.strerror}', kind='unreadable_row') from error


def parse_row(text: bytes, *, at: int) -> Row:
    """A row of a file, of which ``text`` begins at the byte ``at``.

    Raises:
        DataError: it is broken, or no object.
    """
    try:
        row = json.loads(text.decode('utf-8').removeprefix('\ufeff'))
    except UnicodeDecodeError as error:
        reason = f'not UTF-8 text (byte {at + error.start}: {error.reason}); save it as UTF-8'
    except json.JSONDecodeError as error:
        hint = 'every line must be one object (else name the file .json)'
        reason = f'broken JSON at column {error.colno}: {error.msg}; {hint}'
    except ValueError:
        reason = 'a number of more digits than Python reads'
    except RecursionError:
        reason = 'JSON nested too deeply'
    else:
        if isinstance(row, dict):
            return row
        reason = f'a row is of type {type(row).__name__}; expected an object'
    raise DataError(reason, kind='unreadable_row')


class FileRows(Indexed[Row]):
    """Rows of a file. Where they begin is found out when the first is asked for, and takes 24 bytes a row.

    A row that is broken is an error of that row where rows are lines, and of the file where they are not. The message
    of the first does not name the row: whoever asked for it knows which it was, see ``where``.

    Args:
        path: a .json or .jsonl file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.name = path.name
        self.has_lines = path.suffix.lower() == '.jsonl'
        self._places: RowIndex | None = None
        self._file: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_places': None, '_file': None}  # cheap to send; another process finds out itself

    @property
    def places(self) -> RowIndex:
        """Where the rows are.

        Raises:
            DataError: the file is broken, or holds no rows.
        """
        if self._places is None:
            found = index_lines(self.path) if self.has_lines else index_list(self.path)
            if not len(found.starts):
                raise DataError(f'{self.path} holds no rows; expected at least one', kind='unreadable_row')
            self._places = found
        return self._places

    def __len__(self) -> int:
        return len(self.places.starts)

    def at(self, index: int) -> Row:
        """One row, read and parsed."""
        start, end = int(self.places.starts[index]), int(self.places.ends[index])
        return parse_row(self._read(start, end - start), at=start)

    def where(self, index: int) -> str:
        """``train.jsonl:812``, or ``train.json[811]`` where rows have no lines."""
        lines = self.places.lines
        return f'{self.name}[{index}]' if lines is None else f'{self.name}:{lines[index]}'

    def fingerprint(self) -> str:
        """A hash of the content of the file.

        Raises:
            DataError: it cannot be read.
        """
        return hash_of_file(self.path)

    def _read(self, start: int, count: int) -> bytes:
        # Not a memory map: a file that is cut while a run goes on would kill the process, here it is an error.
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._file)
        return os.pread(self._file, count, start)
