"""Loading from a folder or a hub, with failures that a user understands."""

import os
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError

from vlmtune.utils.errors import ConfigError, ModelError
from vlmtune.utils.safe_torch import check_legacy

_COMMIT = re.compile('[0-9a-f]{40}')
# Of transformers and what it uses, on files that are broken or meant to harm.
# ImportError: a package that a setting asks for, or code that is not run.
_FAILURES = (
    OSError, ValueError, ImportError, RuntimeError, TypeError, LookupError, AttributeError, EOFError, AssertionError,
    UnpicklingError, SafetensorError,
)  # fmt: skip


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
    if auto_class.__name__.startswith('AutoModel') and os.path.isdir(path):
        _check_pickles(Path(path))
    try:
        return auto_class.from_pretrained(
            path, trust_remote_code=trust_remote_code, revision=revision or 'main', **kwargs
        )
    except torch.OutOfMemoryError:
        raise
    except _FAILURES as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f'cannot load {name_or_path} with {auto_class.__name__}: {reason}') from error


def _check_pickles(folder: Path) -> None:
    """transformers reads pickles where there is no safetensors file, without code, but also without a bound."""
    if not any(folder.glob('*.safetensors')):
        for file in sorted(folder.glob('*.bin')):
            check_legacy(file)
