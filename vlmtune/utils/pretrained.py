"""Loading from a folder or a hub, with failures that a user understands."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError

from vlmtune.utils.adapter_folder import ADAPTER_CONFIG, is_adapter
from vlmtune.utils.errors import ConfigError, ModelError, UserError, first_line
from vlmtune.utils.hub import hub_answers, is_modelscope, looks_like_id, modelscope_folder, why_no_answer
from vlmtune.utils.json_files import read_object
from vlmtune.utils.safe_torch import check_legacy

NO_WEIGHTS = ('*.json', '*.jinja', '*.model', '*.txt')
"""Patterns of the files of a model that are read before its weights are."""

_COMMIT = re.compile('[0-9a-f]{40}')
# Of transformers and what it uses, on files that are broken or meant to harm.
# ImportError: a package that a setting asks for, or code that is not run.
FAILURES = (
    OSError, ValueError, ImportError, RuntimeError, TypeError, LookupError, AttributeError, EOFError, AssertionError,
    UnpicklingError, SafetensorError, StrictDataclassError, ArithmeticError,
)  # fmt: skip


def check_source(
    name_or_path: str,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    patterns: tuple[str, ...] | None = NO_WEIGHTS,
) -> str:
    """The folder, with the user's home in place of ~, or the hub id.

    A model of ModelScope is downloaded, its files of the given patterns, and its folder is returned. An id of a hub
    that does not answer passes only if its config is in the cache.

    Raises:
        ModelError: it can be neither, or is an adapter.
        ConfigError: code of a hub id would be run whose commit is not named.
    """
    if is_modelscope(name_or_path):
        return modelscope_folder(name_or_path, revision=revision, patterns=patterns)
    path = os.path.expanduser(name_or_path)
    if not os.path.isdir(path) and not looks_like_id(path):
        raise ModelError(
            f'no model at {os.path.abspath(path)}; expected a folder with config.json, or a hub id such as org/name'
        )
    if is_adapter(Path(path)):  # whether its base, its own weights or both are loaded would differ between programs
        raise ModelError(
            f'{os.path.abspath(path)} is an adapter; name its base model here, or remove {ADAPTER_CONFIG} if the '
            'weights beside it are whole'
        )
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, 'config.json')):
        raise ModelError(f'{os.path.abspath(path)} has no config.json; expected a Hugging Face model folder')
    if trust_remote_code and not os.path.isdir(path) and not (revision and _COMMIT.fullmatch(revision)):
        raise ConfigError(
            f'trust_remote_code=True for {name_or_path} with revision={revision!r}; expected the commit whose code you '
            'have read, 40 hexadecimal digits: what a branch or tag names can be changed by others'
        )
    if not os.path.isdir(path) and not _is_cached(path, revision) and not hub_answers():
        raise ModelError(
            f'cannot load {name_or_path}: there is no such folder here, and as a hub id it is not in the cache, and '
            f'{why_no_answer()}'
        )
    return path


def _is_cached(hub_id: str, revision: str | None) -> bool:
    try:
        return isinstance(try_to_load_from_cache(hub_id, 'config.json', revision=revision), str)
    except HFValidationError as error:
        raise ModelError(f'{hub_id} is neither a folder nor a hub id: {first_line(error)}') from error


def load_pretrained(
    auto_class: Any,
    name_or_path: str,
    *,
    has_weights: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    **kwargs: Any,
) -> Any:
    """``auto_class.from_pretrained(name_or_path)``.

    Args:
        auto_class: of transformers.
        name_or_path: a folder or a hub id.
        has_weights: whether it reads weights, and not only what is beside them.
        trust_remote_code: run the Python files of the model, if it has some. They can do whatever the user can.
        revision: of a hub id: a commit, a branch or a tag; a commit of 40 digits where code is run.
        kwargs: of ``from_pretrained``.

    Raises:
        ModelError: the folder or hub id cannot be read.
        ConfigError: code of a hub id would be run whose commit is not named.
    """
    patterns = None if has_weights else NO_WEIGHTS
    path = check_source(name_or_path, trust_remote_code=trust_remote_code, revision=revision, patterns=patterns)
    if has_weights and os.path.isdir(path):
        _check_pickles(Path(path))
    if not os.path.isdir(path):
        kwargs = dict(local_files_only=not hub_answers()) | kwargs
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
    if isinstance(error, StrictDataclassError):  # the first line names the key, the second says what is wrong with it
        return first_line(ValueError(' '.join(str(error).splitlines()[:2])))
    return first_line(error)


def read_source_json(source: str, name: str, *, revision: str | None = None) -> dict[str, Any] | None:
    """A json file of a model, from its folder or the hub cache; None where it has none.

    Raises:
        ModelError: it is no json object, or a huge one.
    """
    source = check_source(source, revision=revision) if is_modelscope(source) else source
    file = Path(source, name)
    if not os.path.isdir(source):
        try:
            file = Path(hf_hub_download(source, name, revision=revision, local_files_only=not hub_answers()))
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise ModelError(
                f'cannot load {source} (no folder here, so taken for a hub id): {first_line(error)}'
            ) from error
    return read_object(file, error=ModelError) if file.is_file() else None


def find_folder(
    name_or_path: str,
    *,
    revision: str | None = None,
    patterns: Sequence[str] | None = None,
    what: str = 'model',
    error: Callable[[str], UserError] = ModelError,
) -> Path:
    """The folder of a model: a local one, or that of a hub id, which is downloaded.

    Args:
        name_or_path: a folder or a hub id.
        revision: of a hub id.
        patterns: of the files that are wanted; None: all of them.
        what: is looked for, for the message.
        error: class to raise.

    Raises:
        UserError: there is none; of the class ``error``.
    """
    if is_modelscope(name_or_path):
        wanted = tuple(patterns) if patterns else None
        return Path(modelscope_folder(name_or_path, revision=revision, patterns=wanted, error=error))
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    try:
        return Path(
            snapshot_download(
                name_or_path,
                revision=revision,
                allow_patterns=list(patterns) if patterns else None,
                local_files_only=not hub_answers(),
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as failure:
        why = '' if hub_answers() else f' ({why_no_answer()})'
        raise error(f'no {what} {name_or_path}: neither a folder nor found on the hub{why}') from failure


def _check_pickles(folder: Path) -> None:
    """transformers reads pickles where there is no safetensors file, without code, but also without a bound."""
    if not any(folder.glob('*.safetensors')):
        for file in sorted(folder.glob('*.bin')):
            check_legacy(file)
