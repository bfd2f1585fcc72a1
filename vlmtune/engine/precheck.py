"""What can be told to be wrong before data and weights are read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.config.lazy import LazyObject
from mmengine.hooks import Hook

from vlmtune.engine import checkpoint
from vlmtune.registry import HOOKS
from vlmtune.utils.errors import ConfigError


def check_settings(cfg: Config) -> None:
    """Let the model's class look at its settings, and hooks at theirs.

    Raises:
        UserError: a word, a part, a number of images or a path that cannot be right.
    """
    settings = dict(cfg.model)
    model = settings.pop('type')
    model = model.build() if isinstance(model, LazyObject) else model
    if hasattr(model, 'check'):
        model.check(**settings)
    if cfg.get('visualizer') is not None and not isinstance(cfg.visualizer, Mapping):
        raise ConfigError(f'visualizer={cfg.visualizer!r}: expected dict(type=Visualizer, vis_backends=[...]) or None')
    build_custom_hooks(cfg)


def build_custom_hooks(cfg: Config) -> list[Hook | dict[str, Any]]:
    """The hooks of ``custom_hooks``; one with a ``priority`` of its own is left to mmengine, which reads that."""
    return [hook if 'priority' in hook else HOOKS.build(hook) for hook in cfg.get('custom_hooks') or []]


def check_work_dir(work_dir: str, *, resume: str | bool) -> None:
    """A new run must not mix with, and later remove, the checkpoints of an earlier one.

    Raises:
        ConfigError: the work dir is a file, or holds checkpoints and nothing says to go on from one.
    """
    path = Path(work_dir)
    if path.exists() and not path.is_dir():
        raise ConfigError(f'work dir {path.absolute()} is a file')
    found = None if resume else checkpoint.find_latest(path).path
    if found is not None:
        raise ConfigError(
            f'{work_dir} holds {found.name} of an earlier run; '
            'add --resume to go on with it, or choose another --work-dir (or remove it)'
        )
