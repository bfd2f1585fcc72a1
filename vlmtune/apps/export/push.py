"""``vlmtune push``: an export goes to the Hugging Face hub or to ModelScope."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import httpx2
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from vlmtune.apps.export.adapters import refuse_checkpoint
from vlmtune.utils.adapter_folder import ADAPTER_CONFIG, base_of, is_adapter
from vlmtune.utils.errors import CheckpointError, ConfigError, UserError, first_line, one_line
from vlmtune.utils.extras import need
from vlmtune.utils.hub import hub_answers, why_no_answer
from vlmtune.utils.secrets import remember_secret, without_secrets

logger = logging.getLogger(__name__)

Hub = Literal['hub', 'modelscope']
_WRITTEN_HERE = ('README.md', 'config.json', 'generation_config.json', 'vlmtune_export.json', ADAPTER_CONFIG)
_LEFT_OUT = ['.*', '**/.*', '__pycache__', '**/__pycache__/*']
_MESSAGE = 'Upload by vlmtune push'


def push(folder: str, repository: str, *, private: bool = False, to: Hub = 'hub') -> str:
    """Upload an export; a repository that is not there is made.

    The key is the one that the hub's own client keeps (``hf auth login``, ``HF_TOKEN``; of ModelScope ``modelscope
    login``, ``MODELSCOPE_API_TOKEN``); it is never shown.

    Args:
        folder: a model or an adapter, as ``vlmtune convert`` writes them.
        repository: ``org/name``.
        private: make the repository private; one that is public already is refused.
        to: 'hub' (or the mirror that HF_ENDPOINT names) or 'modelscope'.

    Returns:
        the address of the repository.

    Raises:
        CheckpointError: the folder is no export, or holds what should not be published.
        ConfigError: the name of the repository is none, there is no key, or the hub refuses or does not answer.
    """
    path = check_folder(folder)
    if repository.count('/') != 1 or not all(repository.split('/')):
        raise ConfigError(f'push to {repository!r}: expected a repository, org/name')
    address = {'hub': _to_hub, 'modelscope': _to_modelscope}[to](path, repository, private=private)
    print(address)
    return address


def check_folder(folder: str) -> Path:
    """The folder of an export that may be published.

    Raises:
        CheckpointError: it is none, it links to files elsewhere, or a text in it holds what looks like a secret.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise CheckpointError(f'{path.absolute()} is no folder; expected an export of vlmtune convert')
    refuse_checkpoint(path)
    if not is_adapter(path) and not (path / 'config.json').is_file():
        raise CheckpointError(f'{path} has neither config.json nor {ADAPTER_CONFIG}; expected an export')
    inside = path.resolve()
    for file in sorted(path.rglob('*')):
        if file.is_symlink() and not file.resolve().is_relative_to(inside):
            raise CheckpointError(f'{file} is a link out of the folder; what it leads to would be published, remove it')
    for name in _WRITTEN_HERE:
        if (path / name).is_file() and _holds_secret((path / name).read_text('utf-8', errors='replace')):
            raise CheckpointError(f'{path / name} holds what looks like a secret; remove it before it is published')
    if is_adapter(path) and (base := base_of(path)) and os.path.isabs(base):
        logger.warning(
            '%s names %s as its base model, a folder of this machine; edit base_model_name_or_path, so that others '
            'can load it',
            path / ADAPTER_CONFIG,
            base,
        )
    return path


def _holds_secret(text: str) -> bool:
    return without_secrets(text) != text


def _to_hub(folder: Path, repository: str, *, private: bool) -> str:
    if (key := get_token()) is None:
        raise ConfigError('push needs a key of the hub; log in with `hf auth login`, or set HF_TOKEN')
    remember_secret(key)
    if not hub_answers():
        raise ConfigError(f'push to {repository}: {why_no_answer()}')
    api = HfApi()

    def upload() -> str:
        made = api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.model_info(made.repo_id).private:
            raise ConfigError(_is_public(repository))
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=_MESSAGE, ignore_patterns=_LEFT_OUT)
        return str(made.url)

    return _told(upload, repository, (HfHubHTTPError, HFValidationError, httpx2.HTTPError, OSError, RuntimeError))


def _to_modelscope(folder: Path, repository: str, *, private: bool) -> str:
    hub: Any = need('modelscope_hub', extra='modelscope', what='push --to modelscope')
    api = hub.HubApi()
    if not (key := hub.get_default_config().token):
        raise ConfigError('push needs a key of ModelScope; log in with `ms login`, or set MODELSCOPE_API_TOKEN')
    remember_secret(key)

    def upload() -> str:
        visibility = hub.Visibility.PRIVATE if private else hub.Visibility.PUBLIC
        if not api.repo_exists(repository, 'model'):
            api.create_repo(repository, 'model', visibility=visibility)
        elif private and api.get_repo(repository, 'model').visibility != hub.Visibility.PRIVATE:
            raise ConfigError(_is_public(repository))
        api.upload_folder(
            repository, 'model', folder, commit_message=_MESSAGE, ignore_patterns=_LEFT_OUT, use_cache=False
        )
        return f'{hub.get_default_config().endpoint}/models/{repository}'

    return _told(upload, repository, (hub.HubError, OSError, ValueError))


def _told(upload: Callable[[], str], repository: str, failures: tuple[type[Exception], ...]) -> str:
    try:
        return upload()
    except UserError:
        raise
    except failures as error:
        raise ConfigError(f'push to {repository}: {_reason(error)}') from error


def _reason(error: Exception) -> str:
    found = error if isinstance(error, HfHubHTTPError) else error.__cause__
    if isinstance(found, HfHubHTTPError) and found.server_message:
        return f'{found.response.status_code} {one_line(found.server_message)}'
    return first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)


def _is_public(repository: str) -> str:
    return f'push --private: {repository} is there and public; make it private on its page, or name another'
