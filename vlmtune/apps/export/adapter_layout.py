"""How PEFT names what we trained: LoRA tensors, and whole modules that are saved with the adapter."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from vlmtune.apps.export.trained import Base, Trained
from vlmtune.utils.adapter_folder import PEFT_PREFIX
from vlmtune.utils.errors import CheckpointError

_NO_FORWARD = (nn.ModuleList, nn.ModuleDict)  # PEFT cannot wrap them


def saved_modules(trained: Trained, *, base: Base) -> list[str]:
    """The modules that PEFT has to save whole because they were trained in full.

    The fewest modules that hold exactly the trained tensors: a projector is one name, a vision encoder without its
    merger is its blocks. Embeddings and head go by their last names, as elsewhere.

    Raises:
        CheckpointError: a tensor was trained whose module also holds tensors that were not.
    """
    full = trained.full_tensors()
    names = list(_cover(base.outline, '', full))
    saved = {f'{name}.{inner}' for name in names for inner, _ in base.outline.get_submodule(name).named_parameters()}
    if lost := sorted(full - saved):
        raise CheckpointError(
            f'{lost[0]} cannot be part of an adapter, because its module also holds weights that were not trained; '
            'tune its whole part in full, or without lora elsewhere (a full model is exported then)'
        )
    return [_short_name(name, base=base) for name in names] + _tied_head(names, base=base)


def _cover(module: nn.Module, name: str, full: set[str]) -> Iterator[str]:
    inside = [f'{name}.{inner}' if name else inner for inner, _ in module.named_parameters()]
    if not any(parameter in full for parameter in inside):
        return
    if name and all(parameter in full for parameter in inside) and not isinstance(module, _NO_FORWARD):
        yield name
        return
    for child_name, child in module.named_children():
        yield from _cover(child, f'{name}.{child_name}' if name else child_name, full)


def _short_name(name: str, *, base: Base) -> str:
    last = name.rpartition('.')[2]
    if name not in (*base.family.embeddings, *base.family.lm_head):
        return name
    others = [other for other, _ in base.outline.named_modules() if other != name and other.endswith(last)]
    return name if others else last


def _tied_head(names: list[str], *, base: Base) -> list[str]:
    """The head, where it is one tensor with trained embeddings: PEFT copies both modules, so both must be saved."""
    (head,), (embeddings,) = base.family.lm_head, base.family.embeddings
    return [_short_name(head, base=base)] if embeddings in names and head not in names and _is_tied(base) else []


def _is_tied(base: Base) -> bool:
    outline: Any = base.outline
    return outline.get_output_embeddings().weight is outline.get_input_embeddings().weight


def adapter_tensors(trained: Trained, *, base: Base) -> dict[str, Tensor]:
    """The trained tensors under the names of an adapter file."""
    tensors = {PEFT_PREFIX + _without_adapter_name(name): tensor for name, tensor in trained.tensors.items()}
    (head,), (embeddings,) = base.family.lm_head, base.family.embeddings
    source, target = f'{PEFT_PREFIX}{embeddings}.weight', f'{PEFT_PREFIX}{head}.weight'
    if source in tensors and target not in tensors and _is_tied(base):
        tensors[target] = tensors[source].clone()
    return tensors


def _without_adapter_name(name: str) -> str:
    layer, mark, rest = name.partition('.lora_')
    if not mark:
        return name
    kind, _, tail = rest.partition('.default')
    if kind == 'magnitude_vector':  # DoRA's is stored as a bare tensor
        tail = ''
    return f'{layer}.lora_{kind}{tail}'


def adapter_config(trained: Trained, *, base: Base, base_name: str, modules_to_save: list[str]) -> Mapping[str, Any]:
    """PEFT's ``adapter_config.json``."""
    return {
        **(trained.adapter_config or {}),
        'base_model_name_or_path': base_name,
        'target_modules': _target_modules(trained, base=base),
        'inference_mode': True,
        'modules_to_save': modules_to_save or None,
    }


def _target_modules(trained: Trained, *, base: Base) -> list[str]:
    """The adapted layers: by their last names where those reach no other module, else by their full names.

    A list, since serving engines refuse the regular expressions that PEFT also takes.
    """
    layers = trained.lora_layers()
    last = {layer.rpartition('.')[2] for layer in layers}
    reached = {name for name, _ in base.outline.named_modules() if name.rpartition('.')[2] in last}
    return sorted(last if reached == layers else layers)
