"""Compares a config with the classes and functions it names, before anything is built."""

from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from mmengine.config import Config

from vlmtune.config.arguments import argument_mistakes
from vlmtune.config.lazy import config_items, is_object, raw_items
from vlmtune.config.mistakes import raise_mistakes
from vlmtune.config.names import DATALOADER_KEYS, EVALUATOR_KEYS, QUESTION_LOADER_KEYS, RUNNER_NAMES
from vlmtune.config.signature import Signature
from vlmtune.config.targets import UnknownTarget, find_target
from vlmtune.utils.suggest import did_you_mean

_INJECTED = frozenset(
    """
    processor model dataset tokenizer runner dataloader evaluator optimizer params optim_wrapper_cfg paramwise_cfg
    name save_dir work_dir experiment_name env_kwargs rows row conversation image_sizes predictions references samples
    """.split()
)
"""Arguments that whoever builds a config part supplies, so that a config need not."""

_ALLOWED_KEYS: Mapping[str, Collection[str]] = MappingProxyType(
    {
        'train_dataloader': DATALOADER_KEYS,
        'val_dataloader': QUESTION_LOADER_KEYS,
        'test_dataloader': QUESTION_LOADER_KEYS,
        'val_evaluator': EVALUATOR_KEYS,
        'test_evaluator': EVALUATOR_KEYS,
        'test_cfg': ('limit',),
        'randomness': ('seed', 'diff_rank_seed', 'deterministic'),
        'timeouts': ('step', 'other'),
        'env_cfg': ('cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit'),
    }
)
"""{config path of a dict without ``type``: the keys it may have}."""

_PARTS = tuple(
    'processor model train_dataloader train_cfg optim_wrapper val_dataloader val_evaluator val_cfg test_dataloader '
    'test_evaluator test_cfg default_hooks randomness'.split()
)
# Keys that mmengine's build functions take out before they build: of one part, and of the parts in a list or dict.
_PART_KEYS = {'optim_wrapper': ('constructor', 'paramwise_cfg'), 'param_scheduler': ('convert_to_iter_based',)}
_ITEM_KEYS = {
    'default_hooks': ('priority',),
    'custom_hooks': ('priority',),
    'param_scheduler': ('convert_to_iter_based',),
    'val_evaluator.metrics': ('name', 'rule'),
    'test_evaluator.metrics': ('name', 'rule'),
}
_COMPLETE = ('rows',)  # functions that are called with what the config gives and nothing else


def config_mistakes(cfg: Config, *, required: Collection[str] = ()) -> list[str]:
    """What is wrong with the parts of a config, one line each, led by the path of the part.

    The classes and functions are imported (so torch is), nothing is built.

    Args:
        cfg: as ``load_config`` returns it.
        required: top-level names that must be there.
    """
    items = config_items(cfg)
    mistakes = [f'{name} is missing' for name in sorted(required) if items.get(name) is None]
    parts = {name: items[name] for name in _PARTS if items.get(name) is not None}
    mistakes += [
        f'{name}: expected a dict, got {part!r}' for name, part in parts.items() if not isinstance(part, Mapping)
    ]
    for name in RUNNER_NAMES & items.keys():
        mistakes += _check(items[name], name)
    return sorted(mistakes)


def check_config(cfg: Config, **options: Any) -> None:
    """Raises what ``config_mistakes`` finds; the options are its own.

    Raises:
        ConfigError: lists all mistakes.
    """
    raise_mistakes(config_mistakes(cfg, **options), where=str(cfg.filename or 'the config'))


def _check(value: Any, path: str, *, inside: bool = False) -> Iterator[str]:
    """``inside``: within the arguments of a class, where a dict with a ``type`` may also be plain data."""
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _check(item, f'{path}.{index}', inside=inside)
    if is_object(value):
        yield from _import_mistakes(value, path)
    if not isinstance(value, dict):
        return
    items = dict(raw_items(value))
    kind = items.pop('type', None)
    for key, item in items.items():
        yield from _check(item, f'{path}.{key}', inside=inside or kind is not None)
    if path in _ALLOWED_KEYS:
        yield from _unknown_keys(items, path, _ALLOWED_KEYS[path])
    if kind is None and (inside or 'type' not in dict(raw_items(value))):
        return
    try:
        target = find_target(kind, must_exist=not inside)
    except UnknownTarget as error:
        yield f'{path}.type: {error}'
        return
    if target is not None:
        yield from _check_arguments(Signature.of(target), items, path)


def _import_mistakes(value: Any, path: str) -> Iterator[str]:
    """For a class that is no ``type=``, such as ``constructor=``."""
    try:
        find_target(value, must_exist=True)
    except UnknownTarget as error:
        yield f'{path}: {error}'


def _check_arguments(signature: Signature | None, given: dict[Any, Any], path: str) -> Iterator[str]:
    owner, _, last = path.rpartition('.')
    if signature is None:
        return
    extra = (*_PART_KEYS.get(path, ()), *_ITEM_KEYS.get(owner, ()))
    if not signature.open:
        yield from _unknown_keys(given, path, [*signature.names, *extra])
    yield from argument_mistakes(signature.hints, given, path)
    for name, nested in signature.nested.items():
        item = given.get(name)
        if isinstance(item, dict) and 'type' not in item and f'{path}.{name}' not in _ALLOWED_KEYS:
            yield from _unknown_keys(dict(raw_items(item)), f'{path}.{name}', nested)
    needed = signature.required if signature.is_class or last in _COMPLETE else signature.required_by_name
    for name in needed:
        if name not in given and name not in _INJECTED:
            yield f'{path}: {signature.shown} needs the argument {name!r}'


def _unknown_keys(given: Mapping[Any, Any], path: str, valid: Collection[str]) -> Iterator[str]:
    for key in given:
        if key not in valid:
            near = did_you_mean(str(key), valid)
            hint = near or (f'; valid are {", ".join(sorted(valid))}' if len(valid) <= 20 else '')
            yield f'{path}.{key}: unknown argument{hint}'
