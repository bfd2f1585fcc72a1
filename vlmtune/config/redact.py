"""Keeps passwords and access keys out of whatever leaves the process."""

import re
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config, ConfigDict

from vlmtune.config.lazy import config_items, lazy_dicts, raw_items
from vlmtune.utils.secrets import PLACEHOLDER, keep_out_of_logs, remember_secret, without_secrets

_SECRET_KEY = re.compile(
    r'(^|_)(api_?keys?|password|passwd|passphrase|secret|secret_?key|private_?key|access_?key|credentials?)($|_)'
    r'|^((hf|hub|huggingface|wandb|api|access|auth|use_auth|bearer|refresh)_)?token$',
    re.IGNORECASE,
)
_TRACKER_KEY = re.compile(r'key|token|password|secret|credential', re.IGNORECASE)


def redact_secrets(cfg: Config) -> Config:
    """A copy with placeholders for secrets. Whatever writes or sends a config writes or sends this.

    Secrets are known by their key: ``api_key``, ``hf_token``, ``password`` and the like anywhere (``pad_token`` is no
    secret), anything with ``key`` or ``token`` in the arguments of trackers and the visualizer; and by their look, see
    ``utils.secrets``.
    """
    items = config_items(cfg).items()
    clean = {name: _redact(value, name, name in ('visualizer', 'trackers')) for name, value in items}
    with lazy_dicts():
        return Config(ConfigDict(clean), cfg_text='# redacted', filename=cfg.filename)


def guard_secrets(cfg: Config) -> None:
    """Keep the secrets of a config out of logs and error messages from now on."""
    keep_out_of_logs()
    redact_secrets(cfg)


def _redact(value: Any, key: str, tracker: bool) -> Any:
    if isinstance(value, Mapping):
        return {inner: _redact(item, str(inner), tracker) for inner, item in raw_items(value)}
    if isinstance(value, list | tuple):
        return type(value)(_redact(item, key, tracker) for item in value)
    if not isinstance(value, str | bytes):
        return value
    if value and (_SECRET_KEY.search(key) or (tracker and _TRACKER_KEY.search(key))):
        if value != PLACEHOLDER:
            remember_secret(value if isinstance(value, str) else value.decode('latin1'))
        return PLACEHOLDER
    return without_secrets(value) if isinstance(value, str) else value
