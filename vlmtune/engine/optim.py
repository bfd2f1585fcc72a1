"""Parameter groups: one learning rate per part, no weight decay where it does not belong."""

import math
from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIMIZERS
from torch import Tensor, nn
from torch.optim import Optimizer

from vlmtune.config.targets import find_target
from vlmtune.models import SupervisedFinetune
from vlmtune.models.sharded import logical_shape
from vlmtune.registry import OPTIM_WRAPPER_CONSTRUCTORS
from vlmtune.utils.device import find_device
from vlmtune.utils.errors import ConfigError

MIN_LOSS_SCALE = 1.0  # a step that is not finite even with this one has not failed because of float16


def unwrap(model: nn.Module) -> SupervisedFinetune:
    """The SupervisedFinetune inside DDP or a DeepSpeed engine."""
    inner = getattr(model, 'module', model)
    if not isinstance(inner, SupervisedFinetune):
        raise TypeError(f'the engine trains a SupervisedFinetune, got {type(inner).__name__}')
    return inner


def build_optimizer(settings: Mapping[str, Any], parameters: Iterable[Any]) -> Optimizer:
    """An optimizer from ``dict(type=..., lr=...)`` over parameters or groups of them.

    Raises:
        ConfigError: it does not take its settings, as betas above 1.
    """
    taken = signature(find_target(settings['type'], must_exist=True)).parameters  # type: ignore[arg-type]
    name = 'model_params' if 'model_params' in taken else 'params'  # DeepSpeed's own have another word
    try:
        return OPTIMIZERS.build({**settings, name: list(parameters)})
    except (TypeError, ValueError) as error:
        given = ', '.join(f'{key}={value!r}' for key, value in settings.items() if key != 'type')
        raise ConfigError(f'optim_wrapper.optimizer: {given} is not taken ({error})') from error


class StepOptimWrapper(OptimWrapper):
    """An optimizer and the norm that gradients are clipped to. It does nothing but step: the loop accumulates.

    Args:
        optimizer: steps.
        max_norm: of all gradients together; infinity clips nothing.
        scaler: of the loss, for float16.
    """

    def __init__(
        self, optimizer: Optimizer, *, max_norm: float = float('inf'), scaler: torch.amp.GradScaler | None = None
    ) -> None:
        super().__init__(optimizer)
        self.base_param_settings = None  # a group of none of our weights, lost on resume
        self.max_norm = max_norm
        self.scaler = scaler
        self.lowered_loss_scale = False  # whether the last step was dropped, and the next one has a smaller scale

    def get_lr(self) -> dict[str, list[float]]:
        """What is logged: ``lr``, or ``projector_lr``, ``llm_lr``, ... where the parts differ."""
        by_part = {group['name'].partition('.')[0]: group['lr'] for group in self.param_groups}
        if len(set(by_part.values())) == 1:
            return {'lr': [next(iter(by_part.values()))]}
        return {f'{part}_lr': [lr] for part, lr in by_part.items()}

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss to call ``backward`` of."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def clip_and_step(self) -> float:
        """Clip, update, clear; returns the norm before clipping. The gradients are complete.

        If the norm is not finite no weight changes: one such step would make every weight NaN.
        """
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.param_groups for p in group['params'] if p.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(parameters, self.max_norm))
        if math.isfinite(norm):
            self.step()
        if self.scaler is not None:
            before = self.scaler.get_scale()
            self.scaler.update()
            self.lowered_loss_scale = self.scaler.get_scale() < before and before > MIN_LOSS_SCALE
        self.zero_grad(set_to_none=True)
        return norm

    def scaler_state(self) -> dict[str, Any]:
        """The loss scaler's state as plain numbers; empty but for float16."""
        if self.scaler is None:
            return {}
        state = self.scaler.state_dict()
        return dict(scale=state['scale'], good_steps=state['_growth_tracker'])

    def load_scaler_state(self, state: Mapping[str, Any]) -> None:
        """Set what ``scaler_state`` returned; a run in another dtype left none."""
        if self.scaler is not None and state:
            mine = self.scaler.state_dict()
            mine.update(scale=float(state['scale']), _growth_tracker=int(state['good_steps']))
            self.scaler.load_state_dict(mine)


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
        """The wrapper for ``model``; the loss is scaled if it computes in float16."""
        inner = unwrap(model)
        optimizer = build_optimizer(self.optimizer_cfg, self.parameter_groups(inner))
        scaler = torch.amp.GradScaler(find_device().type) if inner.dtype == torch.float16 else None
        return StepOptimWrapper(optimizer, max_norm=self.max_norm, scaler=scaler)

    def parameter_groups(self, model: SupervisedFinetune) -> list[dict[str, Any]]:
        """One group per part and decay setting, in a fixed order."""
        base_lr, decay = self.optimizer_cfg['lr'], self.optimizer_cfg.get('weight_decay', 0.0)
        groups: dict[tuple[str, bool], dict[str, Any]] = {}
        for name, parameter in model.named_trainable().items():
            part, decays = model.part_of(name), len(logical_shape(parameter)) > 1
            lr = model.plans[part].lr
            group = groups.setdefault(
                (part, decays),
                dict(name=f'{part}{"" if decays else ".no_decay"}', params=[], lr=base_lr if lr is None else lr),
            )
            group['weight_decay'] = decay if decays else 0.0
            group['params'].append(parameter)
        return list(groups.values())
