"""The weights of a model with an adapter in them, each computed when it is read."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmtune.layouts import Weight
from vlmtune.models.lazy_model import LazyModel, weight_of
from vlmtune.utils.errors import CheckpointError

if TYPE_CHECKING:
    from peft import PeftModel


def merged_weights(model: LazyModel, adapted: 'PeftModel', *, device: torch.device) -> dict[str, Weight]:
    """The weights of ``model``, with the updates added in float32 on ``device``, layer by layer.

    Args:
        model: the base.
        adapted: an outline of it with the adapter on it.
        device: where updates are computed.

    Raises:
        CheckpointError: an update is not finite (when it is read), or of a kind that has no place in the base.
    """
    bare = adapted.get_base_model()
    merged = dict(model.weights)
    for path, module in _adapters(bare):
        if hasattr(module, 'modules_to_save'):
            saved = module.modules_to_save[module.active_adapter].state_dict()
            merged.update({f'{path}.{name}': weight_of(tensor) for name, tensor in saved.items()})
            continue
        inside = {name: model.weights[f'{path}.{name}'] for name, _ in _base_of(module).named_parameters()}
        for name in _touched(module, list(inside)):
            read = partial(_merged, module, inside, name, path=path, device=device)
            merged[f'{path}.{name}'] = replace(inside[name], dtype=torch.float32, read=read)
    for name, tensor in bare.named_parameters():  # embeddings that PEFT saved beside its adapter
        if name in merged and tensor.device.type != 'meta':
            merged[name] = weight_of(tensor)
    if unknown := sorted(set(merged) - set(model.weights)):
        raise CheckpointError(f'the adapter trains {unknown[0]}, which cannot be merged; merge it with PEFT')
    return merged


def _adapters(bare: nn.Module, path: str = '') -> Iterator[tuple[str, Any]]:
    """Path and module of what stands in the place of a module of the base."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: PLC0415
    from peft.utils.other import AuxiliaryTrainingWrapper  # noqa: PLC0415

    for name, child in bare.named_children():
        inner = f'{path}.{name}' if path else name
        if isinstance(child, BaseTunerLayer | AuxiliaryTrainingWrapper):
            yield inner, child
        else:
            yield from _adapters(child, inner)


def _base_of(module: Any) -> nn.Module:
    return (module.token_adapter if hasattr(module, 'token_adapter') else module).get_base_layer()


def _touched(module: Any, names: list[str]) -> list[str]:
    """The weights that an update of a layer changes: all but the bias, unless it has one for that, too."""
    has_bias = any(getattr(module, 'lora_bias', {}).values())
    return [name for name in names if has_bias or name != 'bias']


@torch.no_grad()
def _merged(module: Any, inside: Mapping[str, Weight], name: str, *, path: str, device: torch.device) -> Tensor:
    layer = copy.deepcopy(module)
    base = _base_of(layer)
    for inner, weight in inside.items():
        home, _, leaf = inner.rpartition('.')
        values = weight.read().to(device, torch.float32, copy=True)  # the file's own must not be written to
        base.get_submodule(home).register_parameter(leaf, nn.Parameter(values, requires_grad=False))
    layer.to(device, torch.float32)
    try:
        if hasattr(layer, 'unload_and_optionally_merge_module'):
            base = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        else:
            layer.merge()
    except (ValueError, NotImplementedError) as error:
        raise CheckpointError(f'merging {path}: {error}') from error
    home, _, leaf = name.rpartition('.')
    result: Tensor = getattr(base.get_submodule(home), leaf).detach()
    if not result.sum().isfinite():  # of finite values it is finite, and it takes no memory
        raise CheckpointError(f'merging {path}: its update holds NaN or infinite values; nothing was written')
    return result
