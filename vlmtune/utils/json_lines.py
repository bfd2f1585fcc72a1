"""Files of JSON lines that a run adds to, and that a kill may have cut."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def as_line(row: Mapping[str, Any]) -> str:
    """Half characters, as names of files may have, become escapes of JSON."""
    return json.dumps(row, ensure_ascii=False).encode(errors='backslashreplace').decode() + '\n'


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a file; behind half a line, which a kill has left, they begin a line of their own.

    Raises:
        OSError: it cannot be written.
    """
    text = ''.join(map(as_line, rows)).encode()
    with path.open('ab+') as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            text = text if file.read() == b'\n' else b'\n' + text
        file.write(text)


def parse_lines(lines: Iterable[str]) -> Iterator[dict[str, Any] | None]:
    """The object that each line holds, None where it holds none; empty lines are left out."""
    for line in lines:
        if line.strip():
            row = parse_json(line)
            yield row if isinstance(row, dict) else None


def parse_json(text: str) -> Any:
    """The value of a text; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
