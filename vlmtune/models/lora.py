"""Puts LoRA layers into the parts that ask for them, through PEFT.

PEFT is imported where it is used: it brings bitsandbytes along, which other runs need not load.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from vlmtune.families import Family, PartName
from vlmtune.models.tuning import PartPlan, tunable_modules
from vlmtune.utils.errors import ConfigError

if TYPE_CHECKING:
    from peft import LoraConfig

_INDEX = re.compile(r'(?<=\.)\d+(?=\.)')


def linear_names(model: PreTrainedModel, plan: PartPlan, *, family: Family) -> list[str]:
    """Full names of the linear layers that ``plan`` adapts.

    Raises:
        ConfigError: ``target_modules`` matches nothing.
    """
    wanted = plan.lora.target_modules
    every = [name for name, module in tunable_modules(model, plan.part, family=family) if isinstance(module, nn.Linear)]
    names = [name for name in every if wanted is None or name.rsplit('.', 1)[-1] in wanted]
    if not names:
        last = sorted({name.rsplit('.', 1)[-1] for name in every})
        raise ConfigError(f'tune.{plan.part}: target_modules {wanted} match nothing; linear layers there are {last}')
    return names


def names_to_regex(names: Iterable[str]) -> str:
    """A short regular expression that fully matches ``names`` and nothing else of the same layout.

    Layer indices are gathered: ``layers.0.q_proj``, ``layers.1.q_proj`` -> ``layers\\.(0|1)\\.q_proj``.
    Engines that load adapters read the last names of such an expression, which a list of full names would hide.
    """
    indices: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for name in names:
        indices[_INDEX.sub('#', name)].add(tuple(_INDEX.findall(name)))
    by_head: dict[tuple[str, frozenset[tuple[str, ...]]], list[str]] = defaultdict(list)
    for layout, found in indices.items():
        head, hash_, tail = layout.rpartition('#.') if '#.' in layout else ('', '', layout)
        by_head[(head + hash_, frozenset(found))].append(tail)
    branches = []
    for (head, places), tails in by_head.items():
        columns = [sorted(set(column), key=int) for column in zip(*places, strict=True)]
        gathered = [columns] if math.prod(map(len, columns)) == len(places) else [[[i] for i in row] for row in places]
        last = '|'.join(sorted(map(re.escape, tails)))
        for choices in gathered:
            pattern = re.escape(head)
            for column in choices:
                pattern = pattern.replace(re.escape('#'), '(' + '|'.join(column) + ')', 1)
            branches.append(f'{pattern}({last})')
    return '|'.join(sorted(branches))


def build_lora_config(
    model: PreTrainedModel, plans: Mapping[PartName, PartPlan], *, family: Family
) -> 'tuple[LoraConfig, dict[PartName, list[str]]] | None':
    """One PEFT configuration for all parts in mode lora, and the layers per part; None if there is no such part.

    Parts may differ in r, alpha and target modules, not in the kind of update.

    Raises:
        ConfigError: parts disagree about dropout, DoRA or rsLoRA.
    """
    lora_plans = [plan for plan in plans.values() if plan.mode == 'lora']
    if not lora_plans:
        return None
    from peft import LoraConfig

    kinds = {(p.lora.dropout, p.lora.use_dora, p.lora.use_rslora) for p in lora_plans}
    if len(kinds) > 1:
        raise ConfigError(f'tune: all parts in mode lora share dropout, use_dora and use_rslora; found {sorted(kinds)}')
    names = {plan.part: linear_names(model, plan, family=family) for plan in lora_plans}
    main = lora_plans[-1].lora
    others = [plan for plan in lora_plans if (plan.lora.r, plan.lora.alpha) != (main.r, main.alpha)]
    config = LoraConfig(
        r=main.r,
        lora_alpha=main.alpha,  # type: ignore[arg-type]
        lora_dropout=main.dropout,
        use_dora=main.use_dora,
        use_rslora=main.use_rslora,
        bias='none',
        target_modules=names_to_regex(name for part in names.values() for name in part),
        rank_pattern={names_to_regex(names[plan.part]): plan.lora.r for plan in others},
        alpha_pattern={names_to_regex(names[plan.part]): plan.lora.alpha for plan in others},
        task_type='CAUSAL_LM',
    )
    return config, names


def inject_lora(model: PreTrainedModel, plans: Mapping[PartName, PartPlan], *, family: Family) -> 'LoraConfig | None':
    """Replace the linear layers of the parts in mode lora by adapted ones, in place.

    Raises:
        ConfigError: see ``build_lora_config``.
    """
    built = build_lora_config(model, plans, family=family)
    if built is None:
        return None
    from peft import inject_adapter_in_model

    config, names = built
    inject_adapter_in_model(config, model)
    adapted = sum(1 for name, _ in model.named_modules() if name.endswith('.lora_A'))
    expected = sum(len(part) for part in names.values())
    if adapted != expected:
        raise ConfigError(f'LoRA reached {adapted} layers, expected {expected}: {config.target_modules}')
    return config
