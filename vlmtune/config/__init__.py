"""Config files: read, overridden, checked and dumped.

Importing this imports mmengine's config reader, and neither torch nor transformers.
"""

from vlmtune.config.check import ALLOWED_KEYS, INJECTED, check_config, config_mistakes
from vlmtune.config.dump import config_text, dump_config
from vlmtune.config.names import DATALOADER_KEYS, RUNNER_NAMES, SETTINGS
from vlmtune.config.overrides import parse_cfg_options
from vlmtune.config.reader import load_config
from vlmtune.config.redact import redact_secrets
from vlmtune.recipes import copy_recipe, find_recipe, list_recipes

__all__ = [
    'ALLOWED_KEYS',
    'DATALOADER_KEYS',
    'INJECTED',
    'RUNNER_NAMES',
    'SETTINGS',
    'check_config',
    'config_mistakes',
    'config_text',
    'copy_recipe',
    'dump_config',
    'find_recipe',
    'list_recipes',
    'load_config',
    'parse_cfg_options',
    'redact_secrets',
]
