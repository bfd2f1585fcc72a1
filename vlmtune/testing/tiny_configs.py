"""Configs of the tiny models: two or three layers, width 64 in the language model and 32 in the vision encoder."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

_WIDTH = 64
_VOCAB_STEP = 64  # the embedding has more rows than the tokenizer has tokens, as most checkpoints do


@dataclass(frozen=True)
class TinyFamily:
    """One row of ``TINY_FAMILIES``.

    Attributes:
        model_type: ``config.model_type``.
        tokenizer: a key of ``tiny_tokenizers.TOKENIZERS``.
        text: the language model's config; the whole config if ``vision`` is None.
        vision: the vision encoder's config.
        top: what stands beside the two.
        token_ids: config key -> token whose id it holds.
    """

    model_type: str
    tokenizer: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any] | None = None
    top: Mapping[str, Any] = field(default_factory=dict)
    token_ids: Mapping[str, str] = field(default_factory=dict)


def _text(model_type: str | None = None, **extra: Any) -> dict[str, Any]:
    return {
        **({} if model_type is None else {'model_type': model_type}),
        'hidden_size': _WIDTH,
        'intermediate_size': 2 * _WIDTH,
        'num_hidden_layers': 2,
        'num_attention_heads': 4,
        'num_key_value_heads': 2,
        'max_position_embeddings': 2048,
        **extra,
    }


def _encoder(model_type: str | None = None, **extra: Any) -> dict[str, Any]:
    return {
        **({} if model_type is None else {'model_type': model_type}),
        'hidden_size': 32,
        'intermediate_size': 64,
        'num_hidden_layers': 2,
        'num_attention_heads': 4,
        'patch_size': 14,
        **extra,
    }


def _mrope(**extra: Any) -> dict[str, Any]:
    return {'rope_parameters': {'rope_type': 'default', 'rope_theta': 10000.0, 'mrope_section': [2, 3, 3], **extra}}


_CLIP = _encoder('clip_vision_model', num_hidden_layers=3, projection_dim=32)
_QWEN_TOKENS = {
    'image_token_id': '<|image_pad|>',
    'video_token_id': '<|video_pad|>',
    'vision_start_token_id': '<|vision_start|>',
    'vision_end_token_id': '<|vision_end|>',
}
_QWEN3_TEXT = _text(num_hidden_layers=3, head_dim=16, **_mrope(mrope_interleaved=True))
_QWEN3_VISION = {
    'depth': 3,
    'hidden_size': 32,
    'out_hidden_size': _WIDTH,
    'intermediate_size': 64,
    'num_heads': 4,
    'patch_size': 16,
    'deepstack_visual_indexes': [0, 1],
    'num_position_embeddings': 64,
}
_MIXTURE = {'num_experts': 4, 'num_experts_per_tok': 2, 'moe_intermediate_size': 32}
_ANYRES = {'image_grid_pinpoints': [[28, 56], [56, 28], [56, 56]]}
_IMAGE = {'image_token_id': '<image>'}


def _internvl(llm: str) -> TinyFamily:
    return TinyFamily(
        'internvl',
        'internvl',
        text=_text(llm),
        vision=_encoder(image_size=[56, 56]) | {'patch_size': [14, 14]},
        top={'image_seq_length': 4, 'downsample_ratio': 0.5},
        token_ids={'image_token_id': '<IMG_CONTEXT>'},
    )


def _idefics3(model_type: str) -> TinyFamily:
    return TinyFamily(
        model_type,
        'smolvlm',
        text=_text('llama'),
        vision=_encoder(image_size=56),
        top={'scale_factor': 2},
        token_ids=_IMAGE,
    )


TINY_FAMILIES: Mapping[str, TinyFamily] = {
    'llama': TinyFamily('llama', 'llama3', text=_text()),
    'qwen2': TinyFamily('qwen2', 'qwen2', text=_text()),
    'qwen3': TinyFamily('qwen3', 'qwen3', text=_text(head_dim=16)),
    'llava': TinyFamily(
        'llava',
        'llava',
        text=_text('llama'),
        vision=_CLIP | {'image_size': 42},
        top={'image_seq_length': 9, 'vision_feature_layer': -2, 'vision_feature_select_strategy': 'default'},
        token_ids=_IMAGE,
    ),
    'qwen2_vl': TinyFamily(
        'qwen2_vl',
        'qwen2_vl',
        text=_text(**_mrope()),
        vision={'depth': 2, 'embed_dim': 32, 'hidden_size': _WIDTH, 'num_heads': 4, 'mlp_ratio': 2, 'patch_size': 14},
        token_ids=_QWEN_TOKENS,
    ),
    'qwen2_5_vl': TinyFamily(
        'qwen2_5_vl',
        'qwen2_vl',
        text=_text(**_mrope()),
        vision={
            'depth': 2,
            'hidden_size': 32,
            'out_hidden_size': _WIDTH,
            'intermediate_size': 64,
            'num_heads': 4,
            'patch_size': 14,
            'fullatt_block_indexes': [1],
            'window_size': 56,
        },
        token_ids=_QWEN_TOKENS,
    ),
    'qwen3_vl': TinyFamily('qwen3_vl', 'qwen3_vl', text=_QWEN3_TEXT, vision=_QWEN3_VISION, token_ids=_QWEN_TOKENS),
    'qwen3_vl_moe': TinyFamily(
        'qwen3_vl_moe', 'qwen3_vl', text=_QWEN3_TEXT | _MIXTURE, vision=_QWEN3_VISION, token_ids=_QWEN_TOKENS
    ),
    'qwen3_5': TinyFamily(
        'qwen3_5',
        'qwen3_vl',
        text=_text(
            layer_types=['linear_attention', 'full_attention'],
            head_dim=32,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            **_mrope(mrope_interleaved=True, partial_rotary_factor=0.5),
        ),
        vision={key: value for key, value in _QWEN3_VISION.items() if key != 'deepstack_visual_indexes'},
        token_ids=_QWEN_TOKENS,
    ),
    'internvl': _internvl('qwen2'),
    'internvl_llama': _internvl('llama'),
    'smolvlm': _idefics3('smolvlm'),
    'idefics3': _idefics3('idefics3'),
    'llava_next': TinyFamily(
        'llava_next',
        'llava',
        text=_text('llama'),
        vision=_CLIP | {'image_size': 28},
        top={'image_seq_length': 4, **_ANYRES},
        token_ids=_IMAGE,
    ),
    'llava_onevision': TinyFamily(
        'llava_onevision',
        'llava_onevision',
        text=_text('qwen2'),
        vision=_encoder('siglip_vision_model', num_hidden_layers=3, image_size=28, vision_use_head=False),
        top={'image_seq_length': 4, **_ANYRES},
        token_ids={**_IMAGE, 'video_token_id': '<video>'},
    ),
    'gemma3': TinyFamily(
        'gemma3',
        'gemma3',
        text=_text(head_dim=16, sliding_window=64, layer_types=['sliding_attention', 'full_attention']),
        vision=_encoder(image_size=56, vision_use_head=False),
        top={'mm_tokens_per_image': 4},
        token_ids={
            'image_token_id': '<image_soft_token>',
            'boi_token_id': '<start_of_image>',
            'eoi_token_id': '<end_of_image>',
        },
    ),
    'paligemma': TinyFamily(
        'paligemma',
        'paligemma',
        text=_text('gemma', head_dim=16),
        vision=_encoder('siglip_vision_model', image_size=28, projection_dim=_WIDTH, vision_use_head=False),
        top={'projection_dim': _WIDTH, 'hidden_size': _WIDTH},
        token_ids=_IMAGE,
    ),
}


def build_config(
    family: TinyFamily, *, tokenizer: PreTrainedTokenizerBase, overrides: Mapping[str, Any]
) -> PreTrainedConfig:
    """The config of a tiny model whose token ids are the tokenizer's.

    Args:
        overrides: keys of the config; a dict is merged into the sub-config of that name (``text_config={...}``).
    """
    roles = {f'{role}_token_id': getattr(tokenizer, f'{role}_token_id') for role in ('bos', 'eos', 'pad')}
    text = {**family.text, **roles, 'vocab_size': -(-len(tokenizer) // _VOCAB_STEP) * _VOCAB_STEP}
    if family.vision is None:
        values: dict[str, Any] = {**text, **family.top}
    else:
        values = {
            'text_config': text,
            'vision_config': dict(family.vision),
            'pad_token_id': roles['pad_token_id'],
            **family.top,
        }
    values |= {key: tokenizer.convert_tokens_to_ids(token) for key, token in family.token_ids.items()}
    for key, value in overrides.items():
        merge = isinstance(value, Mapping) and isinstance(values.get(key), Mapping)
        values[key] = {**values[key], **value} if merge else value
    return AutoConfig.for_model(family.model_type, **values)
