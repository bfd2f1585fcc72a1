"""What can be told to be wrong before data and weights are read."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.config.lazy import LazyObject
from mmengine.dist import get_dist_info
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, Hook
from mmengine.utils import is_method_overridden

from vlmtune.config.targets import find_target
from vlmtune.data import Processor, StreamingDataset
from vlmtune.engine import checkpoint
from vlmtune.engine.build_locks import check_build_locks
from vlmtune.engine.deepspeed_config import check_deepspeed
from vlmtune.engine.monitor import Monitor
from vlmtune.engine.run_layout import lies_in
from vlmtune.engine.sharded_loading import check_sharding
from vlmtune.engine.trackers import read_trackers
from vlmtune.evaluation import Evaluator
from vlmtune.families import PartName
from vlmtune.layouts import check_same_parts, find_layout
from vlmtune.models.loading import read_family
from vlmtune.models.tuning import plan_parts
from vlmtune.models.vision_features import check_cacheable
from vlmtune.registry import HOOKS
from vlmtune.utils.errors import ConfigError

logger = logging.getLogger(__name__)

_CALLED = frozenset(
    f'{when}_{what}' for when in ('before', 'after') for what in ('run', 'train', 'train_epoch', 'train_iter', 'val')
)
"""Methods of hooks that the loops here call; mmengine has others, for its own loops and files."""
_OF_ALL_MODES = ('_before_epoch', '_after_epoch', '_before_iter', '_after_iter')  # called for training, too
_NOT_OURS = (CheckpointHook, EarlyStoppingHook)  # one would stop at its first save, the other never sees a validation


def check_settings(cfg: Config) -> list[Hook]:
    """Let the model's class look at its settings, and hooks at theirs.

    Returns:
        the hooks of ``custom_hooks``, for the run.

    Raises:
        UserError: a word, a part, a number of images or a path that cannot be right.
    """
    settings = dict(cfg.model)
    source = 'pretrained_model_name_or_path'
    check_same_parts(settings.get(source), (cfg.get('processor') or {}).get(source))
    model = settings.pop('type')
    model = model.build() if isinstance(model, LazyObject) else model
    if hasattr(model, 'check'):
        model.check(**settings)
    check_deepspeed(cfg, ranks=get_dist_info()[1])
    if cfg.get('strategy') is not None:
        check_build_locks()
    check_sharding(cfg)
    if cfg.get('vision_cache') is not None:
        _check_vision_cache(cfg, settings)
    if cfg.get('visualizer') is not None and not isinstance(cfg.visualizer, Mapping):
        raise ConfigError(f'visualizer={cfg.visualizer!r}: expected dict(type=Visualizer, vis_backends=[...]) or None')
    if read_trackers(cfg.get('trackers')) and cfg.get('visualizer') is not None:
        raise ConfigError('trackers and visualizer are both set; remove one of the two')
    hooks = build_custom_hooks(cfg)
    for hook in hooks:
        check_called(hook)
    check_validation(cfg, hooks=hooks)
    return hooks


def check_validation(cfg: Config, *, hooks: Sequence[Any]) -> None:
    """Tell what is wrong with the validation that a config asks for, and with what hooks want to read from it.

    Args:
        cfg: of the run.
        hooks: of ``custom_hooks``.

    Raises:
        ConfigError: a part is missing, a metric is none, or a score is monitored that there is not.
    """
    saving = (cfg.get('default_hooks') or {}).get('checkpoint')
    hooks = [*hooks, *([] if saving is None else [_build_hook(saving, at='default_hooks.checkpoint')])]
    monitors = [hook.monitor for hook in hooks if isinstance(getattr(hook, 'monitor', None), Monitor)]
    loader, loop = cfg.get('val_dataloader'), cfg.get('val_cfg')
    if loader is None:
        if monitors:
            raise ConfigError(
                f"{monitors[0].asked_by}='val/{monitors[0].name}' needs a validation, and there is no val_dataloader; "
                'set val_dataloader and val_cfg, or remove it'
            )
        return
    if not loop:
        raise ConfigError('val_dataloader needs val_cfg=dict(type=ValLoop, interval=500), or set val_dataloader=None')
    if 'dataset' not in loader:
        raise ConfigError('val_dataloader.dataset is missing; set it to the data set of the held-out rows')
    size = loader.get('batch_size', 1)
    if not isinstance(size, int) or size < 1:
        raise ConfigError(f'val_dataloader.batch_size={size!r}: expected a number of questions, at least 1')
    kind = find_target(loader.dataset.type, must_exist=True)
    if kind is StreamingDataset:
        raise ConfigError('val_dataloader: a StreamingDataset has no end; use a SupervisedDataset')
    check = getattr(find_target(loop.type, must_exist=True), 'check', None)
    if check is not None:
        check(**{name: value for name, value in loop.items() if name != 'type'})
    evaluator = Evaluator(**cfg.get('val_evaluator') or {}, at='val_evaluator')
    names = score_names(evaluator)
    for monitor in monitors:
        if names is not None:
            monitor.check({'loss', *names})
        monitor.ask(evaluator)


def score_names(evaluator: Evaluator) -> list[str] | None:
    """What the scores will be called; None where a metric does not say that it returns one number."""
    if not all(metric.is_one_number for metric in evaluator.metrics):
        return None
    return [metric.name for metric in evaluator.metrics]


def check_new_tokens(cfg: Config, *, processor: Processor) -> None:
    """Tell before data and weights are read that rows of new tokens would never be learned, or never be exported.

    Args:
        cfg: of the run.
        processor: of the run.

    Raises:
        ConfigError: the embeddings are frozen, or, for tokens that answers hold, a head of its own is; or the model can
            only be written with the files of its base, which do not know the tokens.
    """
    new = processor.added_tokens
    settings = cfg.get('model') or {}
    if not new or 'tune' not in settings:
        return
    plans = plan_parts(settings['tune'], family=processor.family, lora=settings.get('lora'))
    configs = (processor.config, processor.config.get_text_config())
    tied = any(getattr(config, 'tie_word_embeddings', False) for config in configs)
    needed: list[PartName] = ['embeddings']
    if processor.new_tokens and not tied:
        needed.append('lm_head')
    if frozen := [part for part in needed if plans[part].mode == 'frozen']:
        raise ConfigError(
            f'{new[0]!r} is new to the model, and tune {frozen[0]} is frozen: new tokens need embeddings that train; '
            'set tune embeddings="full", lm_head="full"'
        )
    if processor.family.model is None or find_layout(processor.source) is None:
        return
    why = f'{new[0]!r} is new to {processor.source}, whose files an export of {processor.family.model_type} copies'
    if all(plan.mode != 'lora' for plan in plans.values()):
        raise ConfigError(f'{why}: nothing could be exported; tune the llm by lora, or train without new tokens')
    logger.warning('%s: the adapter will work unmerged, but cannot be merged', why)


def _check_vision_cache(cfg: Config, model: Mapping[str, Any]) -> None:
    if not isinstance(cfg.vision_cache, str):
        raise ConfigError(f'vision_cache={cfg.vision_cache!r}: expected a folder, or None')
    if find_target(cfg.train_dataloader.dataset.type, must_exist=True) is StreamingDataset:
        raise ConfigError(
            'vision_cache: the images of a StreamingDataset are not known beforehand; '
            'use a SupervisedDataset, or remove vision_cache'
        )
    dataset = cfg.train_dataloader.dataset
    if any(part.get('image_transform') is not None for part in (dataset, *dataset.get('datasets', ()))):
        raise ConfigError(
            'vision_cache: features that were computed once cannot follow image_transform, which changes the images '
            'in every epoch; remove one of the two'
        )
    family = read_family(model['pretrained_model_name_or_path'])
    check_cacheable(family, plans=plan_parts(model['tune'], family=family, lora=model.get('lora')))


def check_called(hook: Hook) -> None:
    """Tell which methods of a hook nobody will call.

    Raises:
        ConfigError: it has no others, or it keeps something in checkpoints (such as mmengine's EMAHook).
    """
    own = {name for name in (*Hook.stages, *_OF_ALL_MODES) if is_method_overridden(name, Hook, hook)}
    never = [name for name in Hook.stages if name in own and name not in _CALLED]
    if not never:
        return
    if of_checkpoints := [name for name in never if name.endswith('_checkpoint')]:
        raise ConfigError(
            f'{type(hook).__name__}: vlmtune never calls {", ".join(of_checkpoints)}; checkpoints have no place for '
            'what a hook keeps, so that it would be lost on a resume and in an export; remove the hook'
        )
    said = (
        f'{type(hook).__name__}: vlmtune never calls {", ".join(never)}; behind a validation it calls '
        'after_val(runner), when runner.val_loop.history[-1] has the scores'
    )
    if own.isdisjoint({*_CALLED, *_OF_ALL_MODES}):
        raise ConfigError(said)
    logger.warning('%s', said)


def build_custom_hooks(cfg: Config) -> list[Hook]:
    """The hooks of ``custom_hooks``, each with its ``priority`` where one is given.

    Raises:
        ConfigError: one is mmengine's where it has to be ours.
    """
    return [_build_hook(part, at=f'custom_hooks.{i}') for i, part in enumerate(cfg.get('custom_hooks') or [])]


def _build_hook(part: Mapping[str, Any], *, at: str) -> Hook:
    options = dict(part)
    priority = options.pop('priority', None)
    given = options.pop('type')
    own = HOOKS.get(given) if isinstance(given, str) and '.' not in given else None  # mmengine has some of that name
    kind: Any = own or find_target(given, must_exist=True)
    if kind in _NOT_OURS:
        raise ConfigError(
            f"{at}.type is mmengine's {kind.__name__}, which does not work with the loops of vlmtune; "
            f'write from vlmtune.engine import {kind.__name__}'
        )
    hook: Hook = HOOKS.build(dict(options, type=kind))
    if priority is not None:
        hook.priority = priority
    return hook


def check_work_dir(work_dir: str, *, resume: str | bool) -> None:
    """A new run must not mix with, and later remove, the checkpoints of an earlier one.

    Raises:
        ConfigError: the work dir is a file, cannot be written to, or holds checkpoints and nothing says to go on
            from one of them.
    """
    path = Path(work_dir)
    if path.exists() and not path.is_dir():
        raise ConfigError(f'work dir {path.absolute()} is a file')
    above = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = 'may not be written to' if above.is_dir() else 'is no folder'
        raise ConfigError(f'work dir {path.absolute()}: {above} {why}; choose another --work-dir')
    elsewhere = isinstance(resume, str) and not lies_in(resume, path)
    found = checkpoint.find_latest(path, hashes=False).path if elsewhere or not resume else None
    if found is not None:
        how = 'say --resume without a path' if elsewhere else 'add --resume'
        raise ConfigError(
            f'{work_dir} holds {found.name} of an earlier run; '
            f'{how} to go on with it, or choose another --work-dir (or remove it)'
        )
