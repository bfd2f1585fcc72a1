"""Keeps passwords and access keys out of texts: error messages and logs, of ours and of the libraries.

Secrets are known by their look (keys of hubs and trackers, logins in URLs), and by their value where a config or the
environment told it.
"""

import logging
import os
import re

PLACEHOLDER = '<secret removed>'
_SHORTEST = 8  # a shorter value would be found in ordinary words
_VARIABLES = (
    'HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'HUGGINGFACE_HUB_TOKEN', 'WANDB_API_KEY', 'MLFLOW_TRACKING_TOKEN',
    'MLFLOW_TRACKING_PASSWORD', 'COMET_API_KEY', 'NEPTUNE_API_TOKEN', 'CLEARML_API_SECRET_KEY', 'SWANLAB_API_KEY',
    'MODELSCOPE_API_TOKEN', 'GITHUB_TOKEN', 'AWS_SECRET_ACCESS_KEY', 'AWS_SESSION_TOKEN',
)  # fmt: skip
_LOOKS = re.compile(
    r'(?<=\w:/)(?P<slash>/?)[^/@\s\'"]+(?=@)'  # a login; a path drops one slash
    r'|\b(?:hf_|api_org_|ghp_|gho_|github_pat_|sk-|xox[bp]-|AKIA)[A-Za-z0-9_-]{16,}'
    r'|(?<=[?&])(?P<key>(?:access_|api_|auth_)?(?:token|key|signature)|sig|password)=[^&\s\'"]+',
    re.IGNORECASE,
)
_BEARER = re.compile(r'(?i)(?<=\bbearer )[A-Za-z0-9._~+/=-]{16,}')
_remembered: set[str] = set()


def remember_secret(value: str) -> None:
    """Keep this value out of all texts from now on."""
    if len(value) >= _SHORTEST:
        _remembered.add(value)


def without_secrets(text: str) -> str:
    """The text with placeholders for what is secret."""
    known = _remembered.union(filter(None, map(os.environ.get, _VARIABLES)))
    for value in sorted(known, key=len, reverse=True):
        if len(value) >= _SHORTEST and value in text:
            text = text.replace(value, PLACEHOLDER)
    if ':/' in text or '_' in text or '-' in text or 'AKIA' in text:
        text = _LOOKS.sub(_placeholder, text)
    return _BEARER.sub(PLACEHOLDER, text) if 'earer ' in text.lower() else text


def _placeholder(found: re.Match[str]) -> str:
    return f'{found["key"]}={PLACEHOLDER}' if found['key'] else f'{found["slash"] or ""}{PLACEHOLDER}'


class _RecordFactory:
    """Makes log records without secrets, for all loggers of the process."""

    def __init__(self) -> None:
        self._before = logging.getLogRecordFactory()

    def __call__(self, *args: object, **kwargs: object) -> logging.LogRecord:
        record = self._before(*args, **kwargs)
        try:
            message = record.getMessage()
        except (TypeError, ValueError, KeyError):  # logging itself reports a format that does not fit its values
            return record
        if (clean := without_secrets(message)) != message:
            record.msg, record.args = clean, None
        return record


def keep_out_of_logs() -> None:
    """From now on, no log record of any library holds a secret; calling it again changes nothing."""
    if not isinstance(logging.getLogRecordFactory(), _RecordFactory):
        logging.setLogRecordFactory(_RecordFactory())
