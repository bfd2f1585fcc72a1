"""Hubs of models and data: which one a name belongs to, whether it answers, and the local folder of what it has."""

import functools
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import httpx2
from huggingface_hub import constants
from huggingface_hub.utils import get_session

from vlmtune.utils.errors import ModelError, UserError, first_line
from vlmtune.utils.extras import need

MODELSCOPE = 'modelscope://'
"""What a name of ModelScope begins with: ``modelscope://org/name``."""
_PATIENCE = 10.0  # seconds; the hub's client itself asks six times for every file


@functools.cache
def hub_answers() -> bool:
    """Whether the Hugging Face hub (or the mirror that HF_ENDPOINT names) can be asked; asked once in a process."""
    if constants.is_offline_mode():
        return False
    try:
        return get_session().head(constants.ENDPOINT, timeout=_PATIENCE).status_code < 500
    except httpx2.HTTPError:
        return False


def why_no_answer() -> str:
    """For messages, where ``hub_answers`` says no."""
    if constants.is_offline_mode():
        return 'HF_HUB_OFFLINE is set, so the hub was not asked'
    return f'the hub {constants.ENDPOINT} cannot be reached (HF_ENDPOINT names a mirror)'


def is_modelscope(name: str) -> bool:
    """Whether it is a name of ModelScope."""
    return name.startswith(MODELSCOPE)


def looks_like_id(name: str) -> bool:
    """Whether a name is that of a repository, ``org/name`` or one of ModelScope, where no such folder is here.

    ``./gone``, ``~/gone``, ``gone`` and ``runs/1/gone`` are paths.
    """
    return is_modelscope(name) or (name.count('/') == 1 and all(name.split('/')) and name[0] not in '.~')


@functools.cache
def modelscope_folder(
    name: str,
    *,
    kind: Literal['model', 'dataset'] = 'model',
    revision: str | None = None,
    patterns: tuple[str, ...] | None = None,
    error: type[UserError] = ModelError,
) -> str:
    """The local folder of a model or a data set of ModelScope; what is not there yet is downloaded.

    Args:
        name: ``modelscope://org/name``; of a data set also ``modelscope://org/name/file``, which gives that file.
        kind: what it is the name of.
        revision: a branch or a tag; None: the default branch.
        patterns: of the files that are wanted; None: all of them.
        error: to raise.

    Raises:
        ConfigError: the package modelscope_hub is not installed.
        UserError: the name is none, or there is no such repository or file; of the class ``error``.
    """
    org, _, rest = name.removeprefix(MODELSCOPE).partition('/')
    repository, _, file = rest.partition('/')
    if not org or not repository or (file and kind == 'model'):
        raise error(f'{name}: expected {MODELSCOPE}org/name')
    hub: Any = need('modelscope_hub', extra='modelscope', what=name)
    fetch = functools.partial(
        hub.HubApi().download_repo, f'{org}/{repository}', kind, revision=revision,
        allow_patterns=[file] if file else list(patterns) if patterns else None,
    )  # fmt: skip
    try:
        folder = _fetch_or_find(fetch, hub)
    except (hub.HubError, OSError, ValueError) as failure:
        raise error(f'{name} cannot be had from ModelScope: {first_line(failure)}') from failure
    path = Path(folder, file)
    if not path.exists():
        raise error(f'{name}: the repository has no {file or "files"}; name one that it has')
    return str(path)


def _fetch_or_find(fetch: Callable[..., Any], hub: Any) -> Any:
    """What was downloaded before will do where there is no network."""
    try:
        return fetch()
    except hub.NetworkError:
        with suppress(hub.HubError, OSError, ValueError):
            return fetch(local_files_only=True)
        raise
