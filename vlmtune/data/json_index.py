"""Where the rows of a json or jsonl file begin and end, in bytes, without keeping any of them."""

import codecs
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from vlmtune.utils.errors import DataError

CHUNK = 1 << 22  # bytes
_SPACE = ' \t\n\r'
_LONGEST_ESCAPE = 12  # characters of a surrogate pair, \ud83d\ude00
_DECODER = json.JSONDecoder()


class RowIndex(NamedTuple):
    """Bytes [start, end) of every row, int64[N] each; ``lines`` counts from 1, and is None where rows have no lines."""

    starts: np.ndarray
    ends: np.ndarray
    lines: np.ndarray | None = None


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open('rb')
    except OSError as error:
        raise DataError(f'{path.absolute()} cannot be read: {error.strerror}', kind='unreadable_row') from error


# ---- jsonl


def index_lines(path: Path, *, chunk: int = CHUNK) -> RowIndex:
    """Lines that are not empty. Nothing is parsed; the one thing looked for is the line break, byte 10.

    Raises:
        DataError: the file cannot be read.
    """
    breaks = []
    with _open(path) as file:
        first = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(at := 0)
        while held := file.read(chunk):
            breaks.append(np.flatnonzero(np.frombuffer(held, np.uint8) == ord('\n')) + at)
            at += len(held)
        ends = np.concatenate([*breaks, np.array([at])]).astype(np.int64)
        starts = np.concatenate([np.array([first]), ends[:-1] + 1]).astype(np.int64)
        full = np.array([_holds_text(file, a, b) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)], bool)
    return RowIndex(starts[full], ends[full], np.flatnonzero(full) + 1)


def _holds_text(file: IO[bytes], start: int, end: int) -> bool:
    """Whether a line is more than white space; most are told by their first byte."""
    if end <= start:
        return False
    if os.pread(file.fileno(), 1, start) == b'{':
        return True
    return bool(os.pread(file.fileno(), end - start, start).decode('utf-8', 'replace').strip())


# ---- json


def index_list(path: Path, *, chunk: int = CHUNK) -> RowIndex:
    """Elements of the list that a file holds, or of the list under the key 'data' of the object that it holds.

    Args:
        path: of the file.
        chunk: bytes to read at once; a row may be longer.

    Raises:
        DataError: the file cannot be read, is not UTF-8, is broken (with line and column), or holds no list of rows.
    """
    with _open(path) as file:
        reader = _JsonReader(file, path, chunk=chunk)
        found = _top_level(reader)
        if reader.next_character():
            raise reader.error('Extra data', reader.at)
    if isinstance(found, RowIndex):
        return found
    if isinstance(found, list):
        keys = ', '.join(map(repr, found[:8]))
        message = f"{path.absolute()} is one object with the keys {keys}; expected a list of rows, or one under 'data'"
    else:
        message = f'{path.absolute()} holds a {found}; expected a list of rows'
    raise DataError(message, kind='unreadable_row')


def _top_level(reader: '_JsonReader') -> RowIndex | list[str] | str:
    """The rows; or the keys of an object without them; or the type of another value."""
    first = reader.next_character()
    if first == '[':
        return _elements(reader)
    if first != '{':
        return type(reader.value()).__name__
    rows, keys = None, []
    for key in _keys(reader):
        keys.append(key)
        if key == 'data':
            rows = None  # of two values of one key json takes the last
            if reader.next_character() == '[':
                rows = _elements(reader)
                continue
        reader.value()
    return keys if rows is None else rows


def _elements(reader: '_JsonReader') -> RowIndex:
    reader.at += 1
    starts: list[int] = []
    ends: list[int] = []
    while reader.next_character() != ']' or starts:
        start = reader.position()
        reader.value()
        starts.append(start)
        ends.append(reader.position())
        if reader.next_character() == ']':
            break
        reader.expect(',')
    reader.at += 1
    return RowIndex(np.array(starts, np.int64), np.array(ends, np.int64))


def _keys(reader: '_JsonReader') -> Iterator[str]:
    """The keys of an object; whoever asks for the next one has read the value of the last."""
    reader.at += 1
    first = True
    while reader.next_character() != '}' or not first:
        if not first:
            reader.expect(',')
        if reader.next_character() != '"':
            raise reader.error('Expecting property name enclosed in double quotes', reader.at)
        key = reader.value()
        reader.expect(':')
        yield key
        first = False
        if reader.next_character() == '}':
            break
    reader.at += 1


class _JsonReader:
    """A json text read piece by piece; ``at`` is the place in the piece that is held."""

    def __init__(self, file: IO[bytes], path: Path, *, chunk: int) -> None:
        self.file, self.path, self.chunk = file, path, chunk
        self.text, self.at = '', 0
        self._ended = False
        self._line, self._column = 1, 1  # of the first character held
        self._start = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0  # its byte
        self._read = self._start  # bytes read so far
        self._counted = 0, self._start  # a character held, and its byte
        file.seek(self._start)
        self._utf8 = codecs.getincrementaldecoder('utf-8')()

    def position(self) -> int:
        """The byte at which the text goes on."""
        character, byte = self._counted
        byte += len(self.text[character : self.at].encode())
        self._counted = self.at, byte
        return byte

    def next_character(self) -> str:
        """The first one that is no space, not taken; '' at the end."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in _SPACE:
                    return self.text[self.at]
                self.at += 1
            if not self._more():
                return ''

    def expect(self, character: str) -> None:
        """Take one character.

        Raises:
            DataError: it is another one.
        """
        if self.next_character() != character:
            raise self.error(f"Expecting '{character}' delimiter", self.at)
        self.at += 1

    def value(self) -> Any:
        """Take a whole value.

        Raises:
            DataError: it is broken, or nested too deeply.
        """
        self.next_character()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith('Unterminated string') or error.pos >= len(self.text) - _LONGEST_ESCAPE
                if not (cut and self._more()):
                    raise self.error(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:
                deep = isinstance(error, RecursionError)
                reason = 'JSON nested too deeply' if deep else 'a number of more digits than Python reads'
                message = f'{self.path.absolute()}:{self._place(self.at)[0]}: {reason}'
                raise DataError(message, kind='unreadable_row') from error
            else:
                if end < len(self.text) or not self._more():  # a number may go on
                    self.at = end
                    return value

    def error(self, message: str, at: int) -> DataError:
        """What to raise for a mistake at character ``at``."""
        line, column = self._place(at)
        return DataError(
            f'{self.path.absolute()}:{line}: broken JSON at column {column}: {message}; '
            'if every line is an object of its own, name the file .jsonl',
            kind='unreadable_row',
        )

    def _place(self, at: int) -> tuple[int, int]:
        breaks = self.text.count('\n', 0, at)
        column = at - self.text.rindex('\n', 0, at) if breaks else self._column + at
        return self._line + breaks, column

    def _more(self) -> bool:
        """Hold the next piece as well, and no longer what was taken; False at the end of the file."""
        if self._ended:
            return False
        self._counted = 0, self.position()
        self._line, self._column = self._place(self.at)
        held = self.text[self.at :]
        chunk = self.file.read(max(self.chunk, len(held)))  # long rows: twice as much, not once more
        self._ended = not chunk
        pending = len(self._utf8.getstate()[0])
        try:
            self.text = held + self._utf8.decode(chunk, final=self._ended)
        except UnicodeDecodeError as error:
            at = self._read - pending + error.start
            message = f'{self.path.absolute()} is not UTF-8 text (byte {at}: {error.reason}); save it as UTF-8'
            raise DataError(message, kind='unreadable_row') from error
        self.at, self._read = 0, self._read + len(chunk)
        return True
