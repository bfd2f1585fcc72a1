"""Registries, one per kind, children of mmengine's.

Configs name classes directly (``type=SupervisedFinetune``), so that registration by string is rarely needed; the
registries are the doors through which a config part becomes an object.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from mmengine.config.lazy import LazyObject
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import STRATEGIES as MMENGINE_STRATEGIES
from mmengine.registry import Registry

MODELS = Registry('vlmtune model', locations=['vlmtune.models'])
PROCESSORS = Registry('vlmtune processor', locations=['vlmtune.data'])
DATASETS = Registry('vlmtune dataset', locations=['vlmtune.data'])
HOOKS = Registry('vlmtune hook', parent=MMENGINE_HOOKS, scope='vlmtune', locations=['vlmtune.engine'])
LOOPS = Registry('vlmtune loop', parent=MMENGINE_LOOPS, scope='vlmtune', locations=['vlmtune.engine'])
STRATEGIES = Registry('vlmtune strategy', parent=MMENGINE_STRATEGIES, scope='vlmtune', locations=['vlmtune.engine'])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'vlmtune optim wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='vlmtune',
    locations=['vlmtune.engine'],
)


def build_callable(cfg: Mapping[str, Any] | Callable[..., Any]) -> Callable[..., Any]:
    """``dict(type=fn, **kwargs)`` -> ``partial(fn, **kwargs)``; a callable passes through.

    Raises:
        TypeError: ``type`` is missing or is not callable.
    """
    if callable(cfg):
        return cfg
    options = dict(cfg)
    fn = options.pop('type', None)
    if isinstance(fn, LazyObject):
        fn = fn.build()
    if not callable(fn):
        raise TypeError(f'expected dict(type=<function>, ...), got type={fn!r}')
    return functools.partial(fn, **options) if options else fn
