"""Loading from a folder or a hub, with failures that a user understands."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import cached_file

from vlmtune.utils.errors import ConfigError, ModelError
from vlmtune.utils.safe_torch import check_legacy

_COMMIT = re.compile('[0-9a-f]{40}')
_LONGEST = 300  # characters of what a library says
_MOST_BYTES = 1 << 28  # of a json file; the largest tokenizer.json known has 33 million
# Of transformers and what it uses, on files that are broken or meant to harm.
# ImportError: a package that a setting asks for, or code that is not run.
FAILURES = (
    OSError, ValueError, ImportError, RuntimeError, TypeError, LookupError, AttributeError, EOFError, AssertionError,
    UnpicklingError, SafetensorError, StrictDataclassError, ArithmeticError,
)  # fmt: skip


def check_source(name_or_path: str, *, trust_remote_code: bool = False, revision: str | None = None) -> str:
    """The folder, with the user's home in place of ~, or the hub id.

    Raises:
        ModelError: it can be neither.
        ConfigError: code of a hub id would be run whose commit is not named.
    """
    path = os.path.expanduser(name_or_path)
    looks_local = path.startswith(('/', './', '../')) or path.count('/') != 1
    if not os.path.isdir(path) and looks_local:
        raise ModelError(
            f'no model at {os.path.abspath(path)}; expected a folder with config.json, or a hub id such as org/name'
        )
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, 'config.json')):
        raise ModelError(f'{os.path.abspath(path)} has no config.json; expected a Hugging Face model folder')
    if trust_remote_code and not os.path.isdir(path) and not (revision and _COMMIT.fullmatch(revision)):
        raise ConfigError(
            f'trust_remote_code=True for {name_or_path} with revision={revision!r}; expected the commit whose code you '
            'have read, 40 hexadecimal digits: what a branch or tag names can be changed by others'
        )
    return path


def load_pretrained(
    auto_class: Any, name_or_path: str, *, trust_remote_code: bool = False, revision: str | None = None, **kwargs: Any
) -> Any:
    """``auto_class.from_pretrained(name_or_path)``.

    Args:
        auto_class: of transformers.
        name_or_path: a folder or a hub id.
        trust_remote_code: run the Python files of the model, if it has some. They can do whatever the user can.
        revision: of a hub id: a commit, a branch or a tag; a commit of 40 digits where code is run.
        kwargs: of ``from_pretrained``.

    Raises:
        ModelError: the folder or hub id cannot be read.
        ConfigError: code of a hub id would be run whose commit is not named.
    """
    path = check_source(name_or_path, trust_remote_code=trust_remote_code, revision=revision)
    if auto_class.__name__.startswith('AutoModel') and os.path.isdir(path):
        _check_pickles(Path(path))
    try:
        return auto_class.from_pretrained(
            path, trust_remote_code=trust_remote_code, revision=revision or 'main', **kwargs
        )
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        what = name_or_path if os.path.isdir(path) else f'{name_or_path} (no folder here, so taken for a hub id)'
        raise ModelError(f'cannot load {what} with {auto_class.__name__}: {reason_of(error)}') from error


def reason_of(error: Exception) -> str:
    """What an error of a library says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, StrictDataclassError):  # the first line names the key, the second says what is wrong with it
        lines = [' '.join(lines[:2])]
    return lines[0][:_LONGEST]


def read_source_json(source: str, name: str, *, revision: str | None = None) -> dict[str, Any] | None:
    """A json file of a model, from its folder or the hub cache; None where it has none.

    Raises:
        ModelError: it is no json object, or a huge one.
    """
    found = cached_file(
        source,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if found is None:
        return None
    if (size := os.path.getsize(found)) > _MOST_BYTES:
        raise ModelError(f'{found} has {size:,} bytes, more than any model needs; copy it again')
    try:
        content = json.loads(Path(found).read_text('utf-8'))
    except (ValueError, RecursionError) as error:
        raise ModelError(f'{found} is no json: {str(error)[:160]}') from error
    if not isinstance(content, dict):
        raise ModelError(f'{found} holds a {type(content).__name__}, expected an object')
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a json file, its keys in order; dtypes become their names."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, default=str)
    path.write_text(text + '\n', 'utf-8')


def find_folder(name_or_path: str, *, revision: str | None = None, patterns: Sequence[str] | None = None) -> Path:
    """The folder of a model: a local one, or that of a hub id, which is downloaded.

    Args:
        name_or_path: a folder or a hub id.
        revision: of a hub id.
        patterns: of the files that are wanted; None: all of them.

    Raises:
        ModelError: there is none.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    try:
        return Path(
            snapshot_download(name_or_path, revision=revision, allow_patterns=list(patterns) if patterns else None)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f'no model {name_or_path}: neither a folder nor found on the hub') from error


def _check_pickles(folder: Path) -> None:
    """transformers reads pickles where there is no safetensors file, without code, but also without a bound."""
    if not any(folder.glob('*.safetensors')):
        for file in sorted(folder.glob('*.bin')):
            check_legacy(file)
