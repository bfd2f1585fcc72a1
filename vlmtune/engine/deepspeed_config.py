"""DeepSpeed's configuration: read, compared with the run's config, filled from it.

Precision, clipping, batch size, accumulation, optimizer and schedule have one place each, in the run's config. A
DeepSpeed file may leave them out, say 'auto', or say the same; one that says something else is an error.
"""

import math
from collections.abc import Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vlmtune.config.targets import find_target
from vlmtune.models.loading import parse_dtype
from vlmtune.utils.errors import ConfigError
from vlmtune.utils.json_files import read_object

PRESETS = Path(__file__).resolve().parents[1] / 'presets' / 'deepspeed'
_ADAMS = {'Adam': 'AdamW', 'FusedAdam': 'AdamW', 'DeepSpeedCPUAdam': 'AdamW'}  # DeepSpeed's Adam decays as AdamW does
_REFUSED: dict[tuple[str, ...], tuple[Any, str]] = {  # path: (the value that is all right, why)
    ('amp', 'enabled'): (False, 'precision comes from model.dtype'),
    ('torch_autocast', 'enabled'): (False, 'precision comes from model.dtype'),
    ('bf16', 'bf16_master_weights_and_grads'): (False, 'weights that train are kept in float32'),
    ('fp16', 'fp16_master_weights_and_grads'): (False, 'weights that train are kept in float32'),
    ('fp16', 'auto_cast'): (False, 'the model casts its inputs itself'),
    ('zero_optimization', 'compute_grad_norm'): (True, 'a step whose norm is not finite must be seen'),
    ('zero_optimization', 'round_robin_gradients'): (False, 'checkpoints need weights in their order'),
    ('zero_optimization', 'zero_hpz_partition_size'): (1, 'checkpoints need one partition per process'),
    ('zero_optimization', 'mics_shard_size'): (-1, 'checkpoints need one partition per process'),
    ('zero_optimization', 'offload_optimizer', 'ratio'): (1.0, 'checkpoints need one optimizer per process'),
    ('zero_optimization', 'offload_optimizer', 'super_offload'): (False, 'checkpoints cannot see its state'),
    ('zero_optimization', 'zenflow', 'enabled'): (False, 'checkpoints cannot see its state'),
}


class RunSettings(NamedTuple):
    """What the run's config says of the things that DeepSpeed's may name, too; None: not known yet."""

    dtype: torch.dtype
    max_norm: float  # infinity: no clipping
    batch_size: int  # samples of a micro-batch on one rank
    optimizer: str  # name of its class
    optimizer_settings: Mapping[str, Any]  # lr, betas, ...
    accumulative_counts: int | None = None
    ranks: int | None = None


# ---- reading


def read_config(config: str | Mapping[str, Any]) -> dict[str, Any]:
    """A DeepSpeed configuration as a dict of its own.

    Args:
        config: a preset ('zero2'; XTuner's 'deepspeed_zero2' means the same), the path of a json file, or a mapping.

    Raises:
        ConfigError: neither a preset nor a file with a json object.
    """
    if isinstance(config, Mapping):
        return {name: read_config(value) if isinstance(value, Mapping) else value for name, value in config.items()}
    return read_object(find_config(config), error=ConfigError)


def config_of(strategy: Mapping[str, Any] | None) -> dict[str, Any]:
    """The DeepSpeed configuration that the strategy of a config names; empty where it names none."""
    config = (strategy or {}).get('config')
    return {} if config is None else read_config(config)


def zero_stage(config: Mapping[str, Any]) -> int:
    """The stage of ZeRO in a DeepSpeed configuration: 0 is without, in 3 a rank has only a piece of each weight."""
    return config.get('zero_optimization', {}).get('stage') or 0


def find_config(name_or_path: str) -> Path:
    """The json file of a preset or of a path.

    Raises:
        ConfigError: neither a preset nor a file.
    """
    for candidate in (PRESETS / f'{name_or_path.removeprefix("deepspeed_")}.json', Path(name_or_path)):
        if candidate.is_file():
            return candidate
    known = ', '.join(sorted(path.stem for path in PRESETS.glob('*.json')))
    raise ConfigError(f'DeepSpeed configuration {name_or_path}: not a preset ({known}) and not a json file')


# ---- comparing and filling


def check_deepspeed(cfg: Mapping[str, Any], *, ranks: int) -> None:
    """Compare the DeepSpeed configuration of a run, if it has one, with the rest of its config.

    Args:
        cfg: of the run.
        ranks: processes of the run.

    Raises:
        ConfigError: as ``fill_config``.
    """
    strategy = cfg.get('strategy') or {}
    if not isinstance(strategy, Mapping):
        raise ConfigError(
            f'strategy={strategy!r}: expected dict(type=DeepSpeedStrategy, config=...); from the command line, '
            '--deepspeed zero1, zero2 or zero3'
        )
    if strategy.get('config') is None:
        return
    optimizer = dict(cfg['optim_wrapper']['optimizer'])
    kind: Any = find_target(optimizer.pop('type'), must_exist=True)
    defaults = {p.name: p.default for p in signature(kind).parameters.values() if p.default is not p.empty}
    clip = cfg['optim_wrapper'].get('clip_grad') or {}
    settings = RunSettings(
        dtype=parse_dtype(cfg['model'].get('dtype', 'bfloat16')),
        max_norm=float(clip.get('max_norm', math.inf)),
        batch_size=cfg['train_dataloader'].get('batch_size', 1),
        optimizer=kind.__name__,
        optimizer_settings={**defaults, **optimizer},
        accumulative_counts=cfg['train_cfg'].get('accumulative_counts', 1),
        ranks=ranks,
    )
    fill_config(config_of(strategy), settings)


def fill_config(config: Mapping[str, Any], settings: RunSettings) -> dict[str, Any]:
    """What ``deepspeed.initialize`` gets.

    'auto' at any depth is taken from the run's config, or left to DeepSpeed's default where that says nothing of it.
    The loop counts accumulation, so that DeepSpeed sees one micro-batch per step.

    Raises:
        ConfigError: every value that contradicts the run's config, or that vlmtune cannot work with, at once.
    """
    wrong = [*_contradictions(config, settings), *_unusable(config, settings)]
    if wrong:
        raise ConfigError('DeepSpeed configuration: ' + '; '.join(wrong))
    filled = without_auto(config)
    for block in ('optimizer', 'scheduler', 'train_batch_size', 'amp'):
        filled.pop(block, None)
    filled.update(
        train_micro_batch_size_per_gpu=settings.batch_size,
        gradient_accumulation_steps=1,
        gradient_clipping=0.0 if math.isinf(settings.max_norm) else settings.max_norm,  # 0 means none
        bf16={**filled.get('bf16', {}), 'enabled': settings.dtype == torch.bfloat16, 'check_grad_overflow': True},
        fp16={**filled.get('fp16', {}), 'enabled': settings.dtype == torch.float16},
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
        steps_per_print=10**13,
    )
    return filled


def without_auto(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is 'auto', at any depth: DeepSpeed's defaults stand there."""
    return {
        name: without_auto(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if value != 'auto'
    }


def _contradictions(config: Mapping[str, Any], settings: RunSettings) -> Iterator[str]:
    """What the file says otherwise, with the place that decides."""
    counts, ranks = settings.accumulative_counts, settings.ranks
    whole = None if counts is None or ranks is None else settings.batch_size * counts * ranks
    expected: dict[tuple[str, ...], tuple[Any, str]] = {
        ('bf16', 'enabled'): (settings.dtype == torch.bfloat16, f'model.dtype is {_name(settings.dtype)}'),
        ('bfloat16', 'enabled'): (settings.dtype == torch.bfloat16, f'model.dtype is {_name(settings.dtype)}'),
        ('fp16', 'enabled'): (settings.dtype == torch.float16, f'model.dtype is {_name(settings.dtype)}'),
        ('gradient_clipping',): (
            0.0 if math.isinf(settings.max_norm) else settings.max_norm,
            f'optim_wrapper.clip_grad.max_norm is {settings.max_norm}',
        ),
        ('gradient_accumulation_steps',): (counts, f'train_cfg.accumulative_counts is {counts}'),
        ('train_micro_batch_size_per_gpu',): (
            settings.batch_size,
            f'train_dataloader.batch_size is {settings.batch_size}',
        ),
        ('train_batch_size',): (whole, f'batch_size x accumulative_counts x processes is {whole}'),
    }
    for path, (value, place) in expected.items():
        given = _at(config, path)
        if given not in (None, 'auto') and value is not None and given != value:
            yield f'{".".join(path)} is {given}, but {place}, which decides: remove it, or make it "auto"'
    yield from _optimizer_contradictions(config.get('optimizer'), settings)
    yield from _schedule_contradictions(config.get('scheduler'))


def _optimizer_contradictions(block: Any, settings: RunSettings) -> Iterator[str]:
    if not isinstance(block, Mapping):
        return
    kind = block.get('type', 'auto')
    if kind != 'auto' and _ADAMS.get(kind, kind) != _ADAMS.get(settings.optimizer, settings.optimizer):
        yield f'optimizer.type is {kind}, but optim_wrapper.optimizer is {settings.optimizer}, which decides: remove it'
    for name, given in (block.get('params') or {}).items():
        value = settings.optimizer_settings.get(name)
        same = list(given) == list(value) if isinstance(value, tuple | list) and given != 'auto' else given == value
        if given != 'auto' and not same:
            yield (
                f'optimizer.params.{name} is {given}, but optim_wrapper.optimizer has {value}, which decides: '
                'remove it, or make it "auto"'
            )


def _schedule_contradictions(block: Any) -> Iterator[str]:
    if not isinstance(block, Mapping):
        return
    given = {name: value for name, value in (block.get('params') or {}).items() if value != 'auto'}
    if given:
        said = ', '.join(f'{name}={value}' for name, value in given.items())
        yield f'scheduler has {said}, but the schedule stands in param_scheduler alone: remove the block'


def _unusable(config: Mapping[str, Any], settings: RunSettings) -> Iterator[str]:
    zero = config.get('zero_optimization', {})
    if not isinstance(zero, Mapping) or zero.get('stage') not in (1, 2, 3):
        stage = zero.get('stage') if isinstance(zero, Mapping) else zero
        yield f'zero_optimization.stage is {stage}, expected 1, 2 or 3; without ZeRO, run without --deepspeed'
        return
    for part in ('offload_optimizer', 'offload_param'):
        if _at(zero, (part, 'device')) == 'nvme':
            yield f'zero_optimization.{part}.device is nvme, which vlmtune cannot save; use cpu, or more processes'
    for path, (right, why) in _REFUSED.items():
        given = _at(config, path)
        if given not in (None, 'auto', right):
            yield f'{".".join(path)} is {given}, expected {right}: {why}'
    sums = _at(config, ('data_types', 'grad_accum_dtype'))
    if zero['stage'] == 1 and settings.dtype == torch.bfloat16 and sums in ('fp32', 'float32'):
        yield f'data_types.grad_accum_dtype is {sums} in stage 1 with bfloat16, which vlmtune cannot save; use stage 2'


def _at(config: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = config
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')
