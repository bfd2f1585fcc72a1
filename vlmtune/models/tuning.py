"""Which parts of a model learn, and how: frozen, lora or full.

``tune=dict(vision_encoder='frozen', projector='full', llm='lora')``: one word per part, or a dict with the part's own
settings, for example ``llm=dict(mode='lora', lr=1e-4, r=32, target_modules=['q_proj', 'v_proj'])``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from vlmtune.families import PARTS, Family, PartName
from vlmtune.models.sharded import is_sharded
from vlmtune.utils.errors import ConfigError, ModelError
from vlmtune.utils.suggest import did_you_mean

Mode: TypeAlias = Literal['frozen', 'lora', 'full']


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adaptation (https://arxiv.org/abs/2106.09685).

    Attributes:
        r: rank.
        alpha: the update is scaled by alpha / r (alpha / sqrt(r) with ``use_rslora``).
        dropout: on the input of the update, in [0, 1).
        use_dora: DoRA, https://arxiv.org/abs/2402.09353.
        use_rslora: https://arxiv.org/abs/2312.03732.
        target_modules: last names of the linear layers to adapt; None adapts all of the part.
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    use_dora: bool = False
    use_rslora: bool = False
    target_modules: tuple[str, ...] | None = None


_LORA_NAMES = tuple(f.name for f in fields(LoraSettings))
CHECKPOINTED_PARTS: tuple[PartName, ...] = ('vision_encoder', 'llm')  # those that are stacks of layers


@dataclass(frozen=True)
class PartPlan:
    """What happens to one part. ``lr`` None means the optimizer's own, ``gradient_checkpointing`` None the model's."""

    part: PartName
    mode: Mode
    lr: float | None = None
    lora: LoraSettings = field(default_factory=LoraSettings)
    gradient_checkpointing: bool | None = None


def _unknown(what: str, names: list[str], valid: tuple[str, ...]) -> ConfigError:
    hint = did_you_mean(names[0], valid)
    return ConfigError(f'{what}: unknown {", ".join(map(repr, names))}{hint}; expected {", ".join(valid)}')


def lora_settings(settings: Mapping[str, Any] | None, *, base: LoraSettings | None = None) -> LoraSettings:
    """Checked settings; what ``settings`` leaves out comes from ``base``.

    Raises:
        ConfigError: an unknown name.
    """
    given = dict(settings or {})
    if wrong := [name for name in given if name not in _LORA_NAMES]:
        raise _unknown('lora', wrong, _LORA_NAMES)
    if (targets := given.get('target_modules')) is not None:
        given['target_modules'] = (targets,) if isinstance(targets, str) else tuple(targets)
    inherited = {name: getattr(base or LoraSettings(), name) for name in _LORA_NAMES}
    return LoraSettings(**{**inherited, **given})


def _plan_part(part: PartName, setting: str | Mapping[str, Any], lora: LoraSettings) -> PartPlan:
    options: dict[str, Any] = dict(setting) if isinstance(setting, Mapping) else {'mode': setting}
    mode, lr = options.pop('mode', None), options.pop('lr', None)
    checkpointing = options.pop('gradient_checkpointing', None)
    if checkpointing not in (None, True, False) or (checkpointing is not None and part not in CHECKPOINTED_PARTS):
        raise ConfigError(
            f'tune.{part}: gradient_checkpointing={checkpointing!r}; expected True or False, '
            f'for {" and ".join(CHECKPOINTED_PARTS)} only'
        )
    if mode not in get_args(Mode):
        raise ConfigError(f'tune.{part}: {mode!r} is not one of {", ".join(get_args(Mode))}')
    if mode != 'lora' and options:
        raise ConfigError(f'tune.{part}: {", ".join(options)} only apply to mode lora, not to {mode}')
    return PartPlan(part, mode, lr, lora_settings(options, base=lora), checkpointing)


def plan_parts(
    tune: Mapping[str, Any], *, family: Family, lora: Mapping[str, Any] | None = None, tied: bool = False
) -> dict[PartName, PartPlan]:
    """One plan per part of the family.

    Parts that are not named are frozen, except that embeddings and head follow an ``llm`` that is tuned in full.

    Args:
        tune: part -> word or dict.
        family: which parts exist.
        lora: settings that all parts in mode lora share.
        tied: whether head and embeddings are one tensor.

    Raises:
        ConfigError: an unknown part, mode or setting; a part that the family lacks; nothing to train.
    """
    if wrong := [part for part in tune if part not in PARTS]:
        raise _unknown('tune', wrong, PARTS)
    shared = lora_settings(lora)
    plans: dict[PartName, PartPlan] = {}
    for part in PARTS:
        setting = tune.get(part)
        if not family.part_paths(part):
            if setting not in (None, 'frozen'):
                raise ConfigError(f'tune.{part}={setting!r}, but {family.model_type} has no {part}; remove it')
            continue
        if setting is None:
            follows = part in ('embeddings', 'lm_head') and plans['llm'].mode == 'full'
            setting = 'full' if follows else 'frozen'
            if part == 'lm_head' and tied:
                setting = {'mode': plans['embeddings'].mode, 'lr': plans['embeddings'].lr}
        plans[part] = _plan_part(part, setting, shared)
    if 'lora' in (plans['embeddings'].mode, plans['lm_head'].mode):
        raise ConfigError(
            "tune: embeddings and lm_head are 'frozen' or 'full'; lora is for linear layers inside the model"
        )
    if tied and plans['embeddings'].mode != plans['lm_head'].mode:
        raise ConfigError('tune: embeddings and lm_head are one tensor in this model; give both the same mode')
    if all(plan.mode == 'frozen' for plan in plans.values()):
        raise ConfigError(f'tune: every part is frozen ({", ".join(plans)}), so there is nothing to train')
    return plans


def part_of(name: str, *, family: Family) -> PartName:
    """The part that a parameter or module belongs to: the one with the longest path that contains it.

    Raises:
        ModelError: no part contains it, so the family's row is incomplete.
    """
    best: tuple[int, PartName] | None = None
    for part in PARTS:
        for path in family.part_paths(part):
            if (name == path or name.startswith(path + '.')) and (best is None or len(path) > best[0]):
                best = (len(path), part)
    if best is None:
        raise ModelError(
            f'{name} belongs to no part of {family.model_type}; its row in vlmtune/families.py is incomplete'
        )
    return best[1]


def _never_used(model: PreTrainedModel, *, family: Family) -> tuple[str, ...]:
    """Vision modules behind the layer whose features are read (``vision_feature_layer``); they never get a gradient."""
    wanted = getattr(model.config, 'vision_feature_layer', None)
    if wanted is None:
        return ()
    tower = family.vision_encoder[0]
    layers, count = next(
        (name, len(module))
        for name, module in model.named_modules()
        if name.startswith(tower) and isinstance(module, nn.ModuleList)
    )
    # Hidden state 0 is what enters layer 0; negative numbers count from the state behind the last layer.
    last = max(state % (count + 1) for state in ([wanted] if isinstance(wanted, int) else wanted))
    behind = ('post_layernorm', 'head') if last == count else ('post_layernorm', 'head', 'layernorm')
    return (*(f'{layers}.{i}' for i in range(last, count)), *(f'{tower}.{name}' for name in behind))


def tunable_parameters(model: PreTrainedModel, part: PartName, *, family: Family) -> Iterator[nn.Parameter]:
    """Parameters of a part that take part in the computation, those outside of its modules as well."""
    for _, module in tunable_modules(model, part, family=family):
        yield from module.parameters(recurse=False)
    own = dict(model.named_parameters())
    yield from (own[path] for path in family.part_paths(part) if path in own)


def tunable_modules(model: PreTrainedModel, part: PartName, *, family: Family) -> Iterator[tuple[str, nn.Module]]:
    """Named leaf modules of a part that take part in the computation."""
    unused = _never_used(model, family=family) if part == 'vision_encoder' else ()
    for name, module in model.named_modules():
        inside = any(name == path or name.startswith(path + '.') for path in family.part_paths(part))
        dead = any(name == path or name.startswith(path + '.') for path in unused)
        if inside and not dead and part_of(name, family=family) == part:
            yield name, module


def set_dtypes(model: PreTrainedModel, *, dtype: torch.dtype) -> None:
    """Make what trains float32, and all layer norms: a frozen bf16 one cannot take a trained layer's float32 (CPU).

    Where weights are sharded all become ``dtype``, also those that are not in pieces yet; DeepSpeed keeps a float32
    copy of what trains.
    """
    if any(is_sharded(parameter) for parameter in model.parameters()):
        for parameter in model.parameters():
            if not is_sharded(parameter):
                parameter.data = parameter.data.to(dtype)
        return
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad or isinstance(module, nn.LayerNorm):
                parameter.data = parameter.data.float()
