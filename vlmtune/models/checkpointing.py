"""Which parts recompute their activations in the backward pass."""

import logging
from collections.abc import Mapping
from dataclasses import replace

from transformers import PreTrainedModel

from vlmtune.families import Family, PartName
from vlmtune.models.tuning import CHECKPOINTED_PARTS, PartPlan

logger = logging.getLogger(__name__)


def apply_checkpointing(
    model: PreTrainedModel, plans: Mapping[PartName, PartPlan], *, family: Family, default: bool
) -> dict[PartName, PartPlan]:
    """Switch gradient checkpointing on, part by part.

    A vision encoder that does not train has no backward pass: nothing comes before it, so autograd keeps none of its
    activations, and there is nothing to recompute.

    Args:
        model: its parameters that train already require gradients.
        plans: of the parts; ``gradient_checkpointing`` None means ``default``.
        family: where the parts live.
        default: the setting of the whole model.

    Returns:
        The plans, with what was decided.
    """
    decided = dict(plans)
    for part in CHECKPOINTED_PARTS:
        if part not in decided:
            continue
        own = decided[part].gradient_checkpointing
        learns = part == 'llm' or decided[part].mode != 'frozen'
        wanted = (default if own is None else own) and learns
        decided[part] = replace(decided[part], gradient_checkpointing=wanted)
        for name, module in model.named_modules() if wanted else ():
            if name in family.part_paths(part) and isinstance(module, PreTrainedModel):
                module.activation_checkpointing_enable({'use_reentrant': False})
    if on := [part for part, plan in decided.items() if plan.gradient_checkpointing]:
        logger.info('gradient checkpointing: %s', ', '.join(on))
    return decided
