"""Parameter groups: one learning rate per part, no weight decay where it does not belong."""

import math
from collections.abc import Mapping
from typing import Any

from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIMIZERS
from torch import nn
from torch.optim import Optimizer

from vlmtune.models import SupervisedFinetune
from vlmtune.registry import OPTIM_WRAPPER_CONSTRUCTORS
from vlmtune.utils.errors import ConfigError, TrainingError


def unwrap(model: nn.Module) -> SupervisedFinetune:
    """The SupervisedFinetune inside DDP or a DeepSpeed engine."""
    inner = getattr(model, 'module', model)
    if not isinstance(inner, SupervisedFinetune):
        raise TypeError(f'the engine trains a SupervisedFinetune, got {type(inner).__name__}')
    return inner


class StepOptimWrapper(OptimWrapper):
    """An optimizer and the norm that gradients are clipped to. It does nothing but step: the loop accumulates.

    Args:
        optimizer: steps.
        max_norm: of all gradients together; infinity clips nothing.
    """

    def __init__(self, optimizer: Optimizer, *, max_norm: float = float('inf')) -> None:
        super().__init__(optimizer)
        self.base_param_settings = None  # a group of none of our weights, lost on resume
        self.max_norm = max_norm

    def get_lr(self) -> dict[str, list[float]]:
        """What is logged: ``lr``, or ``projector_lr``, ``llm_lr``, ... where the parts differ."""
        by_part = {group['name'].partition('.')[0]: group['lr'] for group in self.param_groups}
        if len(set(by_part.values())) == 1:
            return {'lr': [next(iter(by_part.values()))]}
        return {f'{part}_lr': [lr] for part, lr in by_part.items()}

    def clip_and_step(self) -> float:
        """Clip, update, clear; returns the norm before clipping. The gradients are complete.

        Raises:
            TrainingError: the norm is not finite; one such step would make every weight NaN.
        """
        parameters = [p for group in self.param_groups for p in group['params'] if p.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(parameters, self.max_norm))
        if not math.isfinite(norm):
            raise TrainingError(
                f'the norm of the gradients is {norm}; no weight was changed by this step. '
                'Lower lr, or resume from the last checkpoint with --resume'
            )
        self.step()
        self.zero_grad(set_to_none=True)
        return norm


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class PartwiseOptimWrapperConstructor:
    """Builds the optimizer over the parameters that train.

    A part's own ``lr`` replaces the optimizer's. Vectors (norms, biases) get no weight decay.

    Args:
        optim_wrapper_cfg: ``dict(optimizer=dict(type=..., lr=..., ...), clip_grad=dict(max_norm=...))``.
        paramwise_cfg: mmengine's; must be None, because parts carry their own settings.

    Raises:
        ConfigError: settings that the loop would not follow.
    """

    def __init__(self, optim_wrapper_cfg: Mapping[str, Any], paramwise_cfg: Mapping[str, Any] | None = None) -> None:
        options = dict(optim_wrapper_cfg)
        self.optimizer_cfg = dict(options.pop('optimizer'))
        if 'lr' not in self.optimizer_cfg:
            raise ConfigError('optim_wrapper.optimizer has no lr; every optimizer needs one here, say lr=1e-4')
        clip = dict(options.pop('clip_grad', None) or {})
        self.max_norm = float(clip.pop('max_norm', float('inf')))
        wrapper = options.pop('type', OptimWrapper)
        if wrapper not in (OptimWrapper, StepOptimWrapper):
            raise ConfigError(
                f'optim_wrapper.type={wrapper!r} is not followed: precision comes from model.dtype; remove it'
            )
        if paramwise_cfg or options or clip:
            found = sorted({*options, *clip, *(['paramwise_cfg'] if paramwise_cfg else [])})
            raise ConfigError(
                f'optim_wrapper: {", ".join(found)} not followed; it takes optimizer and clip_grad=dict(max_norm=...), '
                'a part takes its own lr (tune=dict(llm=dict(mode="lora", lr=1e-4))), the loop accumulative_counts'
            )

    def __call__(self, model: nn.Module) -> StepOptimWrapper:
        """The wrapper for ``model``."""
        groups = self.parameter_groups(unwrap(model))
        return StepOptimWrapper(OPTIMIZERS.build({**self.optimizer_cfg, 'params': groups}), max_norm=self.max_norm)

    def parameter_groups(self, model: SupervisedFinetune) -> list[dict[str, Any]]:
        """One group per part and decay setting, in a fixed order."""
        base_lr, decay = self.optimizer_cfg['lr'], self.optimizer_cfg.get('weight_decay', 0.0)
        groups: dict[tuple[str, bool], dict[str, Any]] = {}
        for name, parameter in model.named_trainable().items():
            part, decays = model.part_of(name), parameter.ndim > 1
            lr = model.plans[part].lr
            group = groups.setdefault(
                (part, decays),
                dict(name=f'{part}{"" if decays else ".no_decay"}', params=[], lr=base_lr if lr is None else lr),
            )
            group['weight_decay'] = decay if decays else 0.0
            group['params'].append(parameter)
        return list(groups.values())
