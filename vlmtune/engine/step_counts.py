"""How many steps a run has, and what one of them learns."""

import math
from typing import NamedTuple

from vlmtune.data import PackSampler
from vlmtune.utils.errors import ConfigError


class StepCounts(NamedTuple):
    """What one optimizer step learned, over all ranks; padding and fillers are left out."""

    supervised: int = 0  # tokens
    tokens: int = 0
    samples: int = 0
    flops: float = 0.0  # model FLOPs, see engine/flops.py


def count_steps(sampler: PackSampler, *, max_epochs: float | None = None, max_steps: int | None = None) -> int:
    """Optimizer steps of a run; the last epoch may be a fraction.

    Raises:
        ConfigError: both or none are given, or they make no step.
    """
    if (max_epochs is None) == (max_steps is None):
        raise ConfigError(f'train_cfg: give max_epochs or max_steps, not both (got {max_epochs} and {max_steps})')
    if max_epochs is None:
        steps, given = int(max_steps or 0), f'max_steps={max_steps}'
    else:
        whole, given = math.floor(max_epochs), f'max_epochs={max_epochs}'
        steps = sum(sampler.steps_in_epoch(epoch) for epoch in range(whole))
        steps += round((max_epochs - whole) * sampler.steps_in_epoch(whole)) if max_epochs > whole else 0
    if steps < 1:
        raise ConfigError(f'train_cfg: {given} makes no optimizer step; an epoch has {len(sampler)}')
    return steps
