"""Json files that hold one object: settings, indices, records."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlmtune.utils.errors import CheckpointError, UserError

_MOST_BYTES = 1 << 28  # the largest tokenizer.json known has 33 million
_REASON = 160  # characters of what the parser says


def read_object(path: Path, *, error: Callable[[str], UserError] = CheckpointError) -> dict[str, Any]:
    """Read one.

    Args:
        path: of the file, which others may have made.
        error: class to raise.

    Raises:
        UserError: it cannot be read, holds something else, or is huge; of the class ``error``.
    """
    try:
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise error(f'{path} has {size:,} bytes, more than any model needs; copy it again')
        content = json.loads(path.read_bytes())
    except OSError as failure:
        raise error(f'{path} cannot be read: {failure.strerror}') from failure
    except (ValueError, RecursionError) as failure:
        raise error(f'{path} is not valid json ({str(failure)[:_REASON]})') from failure
    if not isinstance(content, dict):
        raise error(f'{path} holds a {type(content).__name__}, expected an object')
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one, its keys in order; dtypes become their names."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, default=str)
    path.write_text(text + '\n', 'utf-8')
