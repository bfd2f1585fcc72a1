"""Config files: read, overridden, checked and dumped.

Importing this imports mmengine's config reader, and neither torch nor transformers.
"""

from vlmtune.config.check import check_config, config_mistakes
from vlmtune.config.dump import config_text, dump_config
from vlmtune.config.overrides import parse_cfg_options
from vlmtune.config.reader import load_config
from vlmtune.config.redact import redact_secrets

__all__ = [
    'check_config',
    'config_mistakes',
    'config_text',
    'dump_config',
    'load_config',
    'parse_cfg_options',
    'redact_secrets',
]
