"""Which attention runs in which part, and ours, registered with transformers.

A packed row is computed sample by sample: where transformers would build a mask of L x L, our mask function hands on
the borders of the samples (``ops.attention.Segments``), once a forward pass, in the mask's place. Padded rows,
generation and masks that a family builds itself get what transformers' sdpa does.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from vlmtune.families import Family
from vlmtune.ops.attention import Segments, read_segments, segment_attention
from vlmtune.ops.positions import segment_lengths
from vlmtune.utils.errors import ConfigError
from vlmtune.utils.suggest import did_you_mean

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch
    varlen_attn = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ('sdpa', 'varlen', 'eager', 'flash_attention_2', 'flash_attention_3', 'flex_attention')
_SDPA, _VARLEN = 'vlmtune_segments', 'vlmtune_varlen'
# Towers that read the patches of all images as one row tell where images and windows end to implementations with
# "flash" in their name; to others they give one window at a time.
_SDPA_TOWER, _VARLEN_TOWER = 'vlmtune_flash_segments', 'vlmtune_flash_varlen'
_OURS = {'sdpa': (_SDPA, _SDPA_TOWER), 'varlen': (_VARLEN, _VARLEN_TOWER)}
_MEANING = {
    _SDPA: 'sdpa, sample by sample',
    _SDPA_TOWER: 'sdpa, windows of one size together',
    _VARLEN: "torch's varlen attention",
    _VARLEN_TOWER: "torch's varlen attention",
}
_NOT_OURS = ('softcap', 'position_bias', 's_aux')  # a layer that asks for one of these gets transformers' sdpa


def check_attention(implementation: str, *, device: str) -> None:
    """Tell whether an implementation exists here.

    Raises:
        ConfigError: an unknown word, or one whose kernels are not installed or do not run on ``device``.
    """
    if implementation not in IMPLEMENTATIONS:
        hint = did_you_mean(implementation, IMPLEMENTATIONS)
        raise ConfigError(
            f'attn_implementation={implementation!r} is unknown{hint}; expected one of {", ".join(IMPLEMENTATIONS)}'
        )
    on_gpu = device.partition(':')[0] != 'cpu'
    reason = {
        'varlen': 'runs on GPUs only'
        if not on_gpu
        else ''
        if varlen_attn is not None
        else f'is not in torch {torch.__version__}',
        'flash_attention_2': '' if is_flash_attn_2_available() else 'needs a GPU and the package flash-attn',
        'flash_attention_3': '' if is_flash_attn_3_available() else 'needs a Hopper GPU and the package flash-attn-3',
        'flex_attention': '' if on_gpu else 'has no backward pass on the CPU',
    }.get(implementation)
    if reason:
        raise ConfigError(f"attn_implementation={implementation!r} {reason}; set attn_implementation='sdpa'")


def transformers_name(implementation: str) -> str:
    """What to load a model with, before ``apply_attention``."""
    return 'sdpa' if implementation in _OURS else implementation


def apply_attention(model: PreTrainedModel, implementation: str, *, family: Family) -> None:
    """Set the implementation of every part and log it.

    Raises:
        ConfigError: the family asks for what the implementation cannot do.
    """
    text = model.config.get_text_config()
    if implementation != 'eager' and getattr(text, 'attn_logit_softcapping', None):
        raise ConfigError(
            f'{family.model_type} caps attention scores, which attn_implementation={implementation!r} cannot; '
            "set attn_implementation='eager'"
        )
    if implementation == 'varlen' and family.masks is not None:
        raise ConfigError(
            f"{family.model_type} needs a mask that attn_implementation='varlen' does not take; "
            "set attn_implementation='sdpa'"
        )
    if implementation in _OURS and family.masks is None:
        llm, tower = _OURS[implementation]
        parts: dict[str, str] = {'text_config': llm}
        if 'image_grid_thw' in family.image_inputs:
            parts['vision_config'] = tower
        model.set_attn_implementation(parts if family.has_vision else llm)
    elif implementation == 'flex_attention' and family.has_vision:
        model.set_attn_implementation({'vision_config': 'sdpa'})
    logger.info('attention: %s', describe_attention(model, family=family))


def describe_attention(model: PreTrainedModel, *, family: Family) -> str:
    """'llm sdpa, sample by sample; vision_encoder sdpa'."""
    configs = {'llm': model.config.get_text_config()}
    if family.has_vision:
        configs['vision_encoder'] = model.config.vision_config
    names = {part: config._attn_implementation for part, config in configs.items()}
    return '; '.join(f'{part} {_MEANING.get(name, name)}' for part, name in names.items())


def attention_inputs(model: PreTrainedModel, *, position_ids: Tensor) -> dict[str, Any]:
    """What a packed row needs besides its positions: flash-attn takes the borders of samples as arguments.

    Args:
        model: whose language model runs.
        position_ids: long[B, L] or long[4, B, L].
    """
    if not model.config.get_text_config()._attn_implementation.startswith('flash_attention'):
        return {}
    lengths = segment_lengths(position_ids)
    borders = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    return dict(cu_seq_lens_q=borders, cu_seq_lens_k=borders, max_length_q=longest, max_length_k=longest)


# ---- what is registered


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    *,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = 'cpu',
    **kwargs: Any,
) -> Tensor | Segments | None:
    """A mask function as transformers calls them: segments where rows are packed, else transformers' own mask."""
    square = q_length == kv_length > 1 and q_offset == 0 and kv_offset == 0
    needed = not allow_is_causal_skip or (local_size is not None and local_size < kv_length)
    if square and needed and attention_mask is None and not use_vmap:
        found = read_segments(mask_function, rows=batch_size, length=q_length, window=local_size, device=device)
        if found is not None:
            return found
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Segments | None,
    *,
    compute: Callable[..., Tensor],
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers calls them.

    Args:
        module: the attention layer.
        query: float[B, H, L, D].
        key, value: float[B, K, L, D].
        attention_mask: what ``_mask`` returned, or a mask that the family built.
        compute: ``segment_attention`` or its like.
        dropout, scaling, is_causal: as in ``segment_attention``.
        cu_seq_lens_q: int32[S + 1], where a vision tower's images or windows begin and end.
        kwargs: for transformers' own function.
    """
    asked = any(kwargs.get(name) is not None for name in _NOT_OURS)
    if attention_mask is None and cu_seq_lens_q is not None and not asked:
        segments = Segments(tuple(cu_seq_lens_q.diff().tolist()))
        causal = getattr(module, 'is_causal', True) if is_causal is None else is_causal
        return compute(query, key, value, segments=segments, scale=scaling, dropout=dropout, causal=causal), None
    if isinstance(attention_mask, Segments):
        if key.shape[2] == query.shape[2] and not asked:
            return compute(query, key, value, segments=attention_mask, scale=scaling, dropout=dropout), None
        attention_mask = attention_mask.dense(rows=query.shape[0], device=query.device)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


def _sdpa(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return _attention(*args, compute=segment_attention, **kwargs)


def _varlen(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return _attention(*args, compute=_varlen_attention, **kwargs)


def _varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    segments: Segments,
    scale: float | None = None,
    dropout: float = 0.0,
    causal: bool = True,
) -> Tensor:
    """``segment_attention`` in one kernel; GPU only. Not run where this was written: no GPU was at hand."""
    if dropout:
        raise ConfigError("attn_implementation='varlen' has no attention dropout; set attn_implementation='sdpa'")
    borders, longest = segments.borders(query.device), max(segments.lengths)
    behind = (segments.window or 0) - 1 if causal else -1  # -1: all of them
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1).to(dtype) for tensor in (query, key, value))
    out = varlen_attn(
        q,
        k,
        v,
        borders,
        borders,
        longest,
        longest,
        scale=scale,
        window_size=(behind, 0 if causal else -1),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    assert isinstance(out, Tensor)  # nothing else was asked for
    return out.view(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])


for _name, _function in ((_SDPA, _sdpa), (_SDPA_TOWER, _sdpa), (_VARLEN, _varlen), (_VARLEN_TOWER, _varlen)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, _mask)
