"""Attention masks of the families in which some tokens see what comes after them.

For those, restarting positions do not keep the samples of a row apart: transformers 5.23 reads the two-way blocks of a
packed row by the wrong indices (``masking_utils.py``: packing maps indices to places within the sample, the overlay of
the blocks is asked with those). So the masks are made here, and handed over ready-made: Gemma 3 takes a dict, one mask
per kind of layer, PaliGemma a tensor.

Letters: B rows, L tokens.
"""

from typing import Any

import torch
from torch import Tensor

from vlmtune.utils.errors import ConfigError


def _samples(position_ids: Tensor) -> Tensor:
    """long[B, L]: the number of the sample within its row; one begins where positions do not go up by one."""
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return begins.cumsum(dim=1)


def _blocks(inside: Tensor, *, samples: Tensor) -> Tensor:
    """long[B, L]: the number of the unbroken run of ``inside`` (bool[B, L]) within one sample; -1 outside."""
    goes_on = torch.zeros_like(inside)
    goes_on[:, 1:] = inside[:, 1:] & inside[:, :-1] & (samples[:, 1:] == samples[:, :-1])
    return torch.where(inside, (inside & ~goes_on).cumsum(dim=1), -1)


def _visible(blocks: Tensor, *, samples: Tensor, attention_mask: Tensor | None) -> Tensor:
    """bool[B, L, L], True where the query (second to last axis) sees the key.

    A token sees those before it in its sample, and all of its own block. A padding token sees itself alone: a row of
    the mask that is False throughout would give NaN.
    """
    places = torch.arange(samples.shape[1], device=samples.device)
    causal = places[:, None] >= places
    two_way = (blocks[:, :, None] == blocks[:, None, :]) & (blocks[:, :, None] >= 0)
    visible = (causal | two_way) & (samples[:, :, None] == samples[:, None, :])
    if attention_mask is not None:
        real = attention_mask.bool()
        visible = visible & real[:, :, None] & real[:, None, :] | (places[:, None] == places)
    return visible


def _as_attention_takes_it(visible: Tensor, *, config: Any, dtype: torch.dtype) -> Tensor:
    """bool[B, 1, L, L]; for eager attention what is added to the scores.

    Raises:
        ConfigError: an implementation that takes no mask.
    """
    implementation = config._attn_implementation
    if implementation.startswith('fl'):  # flash_attention_*, flex_attention
        raise ConfigError(
            f'attn_implementation={implementation!r}: {config.model_type} needs a mask that it does not take; '
            "set attn_implementation='sdpa'"
        )
    if implementation != 'eager':
        return visible[:, None]
    scores = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return scores.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def two_way_images(
    config: Any,
    *,
    position_ids: Tensor,
    token_type_ids: Tensor,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Gemma 3 (https://arxiv.org/abs/2503.19786, section 2): causal, but the tokens of an image see each other.

    Layers of sliding attention see the last ``sliding_window`` tokens only, of an image as well: the composition of
    ``create_masks_for_vision_model`` in transformers' ``modeling_gemma3.py``.

    Args:
        config: of the whole model.
        position_ids: long[B, L], restarting at every sample of a packed row.
        token_type_ids: long[B, L], 1 at image tokens.
        attention_mask: long[B, L], 0 at padding; None where there is none.
        dtype: of the scores, for eager attention.

    Returns:
        For each kind of layer bool[B, 1, L, L] (sdpa) or dtype[B, 1, L, L] (eager).

    Raises:
        ConfigError: the attention implementation takes no masks.
    """
    text = config.get_text_config()
    samples = _samples(position_ids)
    blocks = _blocks(token_type_ids == 1, samples=samples)
    visible = _visible(blocks, samples=samples, attention_mask=attention_mask)
    places = torch.arange(position_ids.shape[1], device=position_ids.device)
    near = places > places[:, None] - text.sliding_window
    masks = {'full_attention': visible, 'sliding_attention': visible & near}
    return {kind: _as_attention_takes_it(mask, config=text, dtype=dtype) for kind, mask in masks.items()}


def two_way_prompts(
    config: Any,
    *,
    position_ids: Tensor,
    token_type_ids: Tensor,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """PaliGemma (https://arxiv.org/abs/2407.07726, section 3): the prompt sees all of itself, the answer is causal.

    Args:
        config: of the whole model.
        position_ids: long[B, L], restarting at every sample of a packed row.
        token_type_ids: long[B, L], 0 in the prompt (images included), 1 in the answer.
        attention_mask: long[B, L], 0 at padding; None where there is none.
        dtype: of the scores, for eager attention.

    Returns:
        bool[B, 1, L, L] (sdpa) or dtype[B, 1, L, L] (eager).

    Raises:
        ConfigError: the attention implementation takes no masks, or a sample is longer than the sliding window of
            PaliGemma 2, whose layers would need two masks where the model takes one.
    """
    text = config.get_text_config()
    window = getattr(text, 'sliding_window', None)
    if window is not None and position_ids.shape[1] > window and (longest := int(position_ids.max()) + 1) > window:
        raise ConfigError(
            f'a sample has {longest} tokens, but {config.model_type} can be trained up to its sliding window of '
            f'{window} tokens; set max_length={window}'
        )
    samples = _samples(position_ids)
    blocks = _blocks(token_type_ids == 0, samples=samples)
    visible = _visible(blocks, samples=samples, attention_mask=attention_mask)
    return _as_attention_takes_it(visible, config=text, dtype=dtype)
