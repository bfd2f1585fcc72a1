"""The folder of a LoRA adapter, as PEFT writes it: its files, its settings, and the base model that they name."""

import math
from pathlib import Path
from typing import Any

from vlmtune.utils.errors import CheckpointError
from vlmtune.utils.json_files import read_object

ADAPTER_CONFIG, ADAPTER_WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
PEFT_PREFIX = 'base_model.model.'
"""What PEFT puts before the name of a module."""
_DEFAULTS = dict(r=8, lora_alpha=8)  # of PEFT
_SHOWN = 80  # characters of a value


def is_adapter(folder: Path) -> bool:
    """Whether a folder is that of an adapter. One that also has a config.json is: transformers and PEFT say so."""
    return (folder / ADAPTER_CONFIG).is_file()


def adapter_settings(folder: Path) -> dict[str, Any]:
    """What ``adapter_config.json`` says, with PEFT's own rank and alpha where it says none.

    Raises:
        CheckpointError: there is none, it is not of LoRA, or a setting that is looked at here has no such value.
    """
    if not is_adapter(folder):
        raise CheckpointError(f'no adapter at {folder.absolute()}; expected a folder with {ADAPTER_CONFIG}')
    settings = _DEFAULTS | read_object(folder / ADAPTER_CONFIG)
    patterns = {name: settings.get(name) or {} for name in ('rank_pattern', 'alpha_pattern')}
    base = settings.get('base_model_name_or_path')
    checks = (
        ('peft_type', settings.get('peft_type') == 'LORA', 'an adapter of type LORA'),
        ('r', isinstance(settings['r'], int) and settings['r'] >= 1, 'a number from 1 on'),
        ('lora_alpha', _is_scale(settings['lora_alpha']), 'a number from 0 on'),
        *((name, _has_scales(found), 'numbers by the names of layers') for name, found in patterns.items()),
        ('base_model_name_or_path', base is None or isinstance(base, str), 'a folder or a hub id'),
    )
    for name, is_valid, expected in checks:
        if not is_valid:
            found = repr(settings.get(name))[:_SHOWN]
            raise CheckpointError(f'{folder / ADAPTER_CONFIG}: {name}={found}, expected {expected}')
    return settings


def _is_scale(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < math.inf


def _has_scales(pattern: Any) -> bool:
    return isinstance(pattern, dict) and all(map(_is_scale, pattern.values()))


def adapter_weights(folder: Path) -> Path:
    """The file with the weights.

    Raises:
        CheckpointError: there is none in a format that cannot run code.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(f'{folder} has no {ADAPTER_WEIGHTS}; adapters in other formats are not read')
    return folder / ADAPTER_WEIGHTS


def base_of(folder: Path) -> str | None:
    """The base model that an adapter names.

    Raises:
        CheckpointError: see ``adapter_settings``.
    """
    return adapter_settings(folder).get('base_model_name_or_path') or None


def split_adapter(model: str, adapter: str | None = None) -> tuple[str, str | None]:
    """Model and adapter; the folder of an adapter alone means its base and the adapter.

    Raises:
        CheckpointError: the adapter names no base, or see ``adapter_settings``.
    """
    folder = Path(model).expanduser()
    if adapter is not None or not is_adapter(folder):
        return model, adapter
    if (base := base_of(folder)) is None:
        raise CheckpointError(f'{model} is an adapter that names no base model; give the base, and --adapter {model}')
    return base, model
