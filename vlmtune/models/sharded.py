"""Weights that are stored otherwise (in pieces under ZeRO-3, in 4 bit), seen as what they stand for.

DeepSpeed leaves an empty tensor in the place of a weight in pieces and notes its shape beside it. Code that only looks
at sizes asks here; code that reads or writes values gathers them first, on all ranks.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Transpose
from transformers.integrations import set_hf_deepspeed_config, unset_hf_deepspeed_config


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether this rank holds only a piece of it."""
    return hasattr(parameter, 'ds_shape')


def logical_shape(parameter: Any) -> torch.Size:
    """The shape of the whole weight, also where bitsandbytes stores two 4-bit weights in one element."""
    quantized = getattr(parameter, 'quant_state', None)
    return torch.Size(getattr(parameter, 'ds_shape', parameter.shape) if quantized is None else quantized.shape)


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, sharded weights are whole on every rank, to be read. All ranks have to come here."""
    pieces = [parameter for parameter in parameters if is_sharded(parameter)]
    if not pieces:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(pieces, modifier_rank=None):
        yield


class _ZeroConfig:
    """What transformers asks for; its own class of this purpose needs deepspeed imported before transformers is."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.is_on = True

    def is_zero3(self) -> bool:
        return self.is_on


_zero_configs: list[_ZeroConfig] = []  # transformers keeps a weak reference


@contextmanager
def loaded_in_pieces(config: Mapping[str, Any]) -> Iterator[None]:
    """Inside, transformers builds models whose weights are sharded from the start.

    Args:
        config: of DeepSpeed.
    """
    _zero_configs.append(_ZeroConfig(config))
    set_hf_deepspeed_config(_zero_configs[-1])
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        _zero_configs.pop()


@contextmanager
def built_whole() -> Iterator[None]:
    """Inside, models are built as they are everywhere, also within ``loaded_in_pieces``."""
    was_on = [config.is_on for config in _zero_configs]
    for config in _zero_configs:
        config.is_on = False
    try:
        yield
    finally:
        for config, is_on in zip(_zero_configs, was_on, strict=True):
            config.is_on = is_on


class _TransposeIfOther(Transpose):
    """transformers' own looks at the tensor in the place of the weight, whose shape is (0,) where it is sharded."""

    def convert(  # type: ignore[override]  # it has a decorator there
        self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """The tensor in the layout of the weight that it is for."""
        found = next(iter(input_dict.values()))
        tensor = found[0] if isinstance(found, list) else found
        name = self.get_target_pattern(input_dict, source_patterns, target_patterns)
        wanted = logical_shape(kwargs['model'].get_parameter(kwargs['full_layer_name']))
        return {name: tensor if tensor.shape == wanted else tensor.transpose(self.dim0, self.dim1).contiguous()}


def convert_by_logical_shape(model_type: str) -> None:
    """Mend how transformers reads checkpoints that may lie in two layouts, of which the shape tells (Qwen3-VL-MoE)."""
    rules = get_checkpoint_conversion_mapping(model_type) or []
    changed = False
    for rule in rules:
        operations = getattr(rule, 'operations', [])
        for place, operation in enumerate(operations):
            if type(operation) is Transpose and operation.check_dims:
                operations[place] = _TransposeIfOther(operation.dim0, operation.dim1, check_dims=True)
                changed = True
    if changed:
        register_checkpoint_conversion_mapping(model_type, rules, overwrite=True)
