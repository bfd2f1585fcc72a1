"""What no config.json of a model says, told by its key before anything is built from it."""

from collections.abc import Mapping
from typing import Any

import torch

from vlmtune.utils.errors import ModelError

# Models are built, without values, before their weights are looked at: a width costs nothing then, a layer does.
_LAYERS, _MOST_LAYERS = ('num_hidden_layers', 'num_layers', 'depth', 'encoder_layers'), 1000
_POSITIVE = ('hidden_size', 'embed_dim', 'patch_size', 'num_attention_heads', 'num_key_value_heads', 'num_heads')
_NATURAL = ('vocab_size', 'intermediate_size')
# What an image is cut into before anything is known of it: least and most.
_IMAGES = {
    'scale_resolution': (1, 8192), 'max_slice_nums': (0, 1000), 'min_dynamic_patch': (0, 1000),
    'max_dynamic_patch': (0, 1000),
}  # fmt: skip
_DTYPE = ('torch_dtype', 'dtype')
_MOST = 1 << 40


def check_numbers(raw: Mapping[str, Any], file: str) -> None:
    """Look at sizes and dtypes of a parsed config.json, also inside its sections.

    Args:
        raw: what it holds.
        file: for messages.

    Raises:
        ModelError: more layers than any model has, a size that is none, a dtype that torch does not know.
    """
    waiting: list[tuple[Mapping[str, Any], str]] = [(raw, '')]
    while waiting:
        section, place = waiting.pop()
        for key, value in section.items():
            if isinstance(value, dict):
                waiting.append((value, f'{place}{key}.'))
            elif expected := _expected(key, value):
                raise ModelError(f'{file}: {place}{key} is {str(value)[:40]}; expected {expected}')


def _expected(key: str, value: Any) -> str:
    """What a key has to be where it is not that, else ''."""
    if key in _DTYPE and value is not None:
        name = value.removeprefix('torch.') if isinstance(value, str) else ''
        return '' if name == 'auto' or isinstance(getattr(torch, name, None), torch.dtype) else 'a dtype of torch'
    if isinstance(value, str) and key in (*_POSITIVE, *_LAYERS):
        return 'a number'
    if isinstance(value, bool) or not isinstance(value, int):
        return ''
    if key in _LAYERS and value > _MOST_LAYERS:
        return f'at most {_MOST_LAYERS} layers'
    if key in _IMAGES and not _IMAGES[key][0] <= value <= _IMAGES[key][1]:
        return '{} to {}'.format(*_IMAGES[key])
    least = 1 if key in _POSITIVE else 0 if key in (*_LAYERS, *_NATURAL) else -_MOST
    return '' if least <= value < _MOST else f'a number of {max(least, 0)} or more that a model can have'
