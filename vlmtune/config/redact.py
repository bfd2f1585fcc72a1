"""Keeps passwords and access keys out of whatever leaves the process."""

import re
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config, ConfigDict

from vlmtune.config.lazy import config_items, lazy_dicts, raw_items

PLACEHOLDER = '<secret removed>'
_SECRET_KEY = re.compile(
    r'(^|_)(api_?keys?|password|passwd|passphrase|secret|secret_?key|private_?key|access_?key|credentials?)($|_)'
    r'|^((hf|hub|huggingface|wandb|api|access|auth|use_auth|bearer|refresh)_)?token$',
    re.IGNORECASE,
)
_TRACKER_KEY = re.compile(r'key|token|password|secret|credential', re.IGNORECASE)
_URL_LOGIN = re.compile(r'(?<=://)[^/@\s]+:[^/@\s]+(?=@)')


def redact_secrets(cfg: Config) -> Config:
    """A copy with placeholders for secrets. Whatever writes or sends a config writes or sends this.

    Secrets are known by their key: ``api_key``, ``hf_token``, ``password`` and the like anywhere (``pad_token`` is no
    secret), anything with ``key`` or ``token`` in the arguments of the visualizer; and by their look: logins in URLs.
    """
    clean = {name: _redact(value, name, name == 'visualizer') for name, value in config_items(cfg).items()}
    with lazy_dicts():
        return Config(ConfigDict(clean), cfg_text='# redacted', filename=cfg.filename)


def _redact(value: Any, key: str, tracker: bool) -> Any:
    if isinstance(value, Mapping):
        return {inner: _redact(item, str(inner), tracker) for inner, item in raw_items(value)}
    if isinstance(value, list | tuple):
        return type(value)(_redact(item, key, tracker) for item in value)
    if not isinstance(value, str | bytes):
        return value
    if value and (_SECRET_KEY.search(key) or (tracker and _TRACKER_KEY.search(key))):
        return PLACEHOLDER
    return _URL_LOGIN.sub(PLACEHOLDER, value) if isinstance(value, str) else value
