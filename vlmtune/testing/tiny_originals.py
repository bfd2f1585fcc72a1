"""Tiny checkpoints in layouts other than that of transformers: files and names as their makers have them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from vlmtune.families import find_family
from vlmtune.layouts import Layout, find_layout, read_config
from vlmtune.models.loading import auto_class
from vlmtune.testing import original_names
from vlmtune.testing.tiny_processors import PREPROCESSORS
from vlmtune.testing.tiny_sentencepiece import write_tokenizer_model
from vlmtune.testing.tiny_tokenizers import build_tokenizer

_VOCAB_STEP = 64


@dataclass(frozen=True)
class TinyOriginal:
    """One row of ``TINY_ORIGINALS``.

    Attributes:
        model_type: of the native config, a row of ``FAMILIES``.
        tokenizer: a key of ``tiny_tokenizers.TOKENIZERS``.
        llm_key: what config.json calls the language model's settings; '' if they stand at its top.
        config: config.json, but for the size of the vocabulary.
        llm_prefix: what stands before the names of the language model's weights.
        names: of all others, patterns of ``original_names``.
        preprocessor: a key of ``tiny_processors.PREPROCESSORS``; None where there is no file.
        kept: shapes of tensors that the native model does not hold.
        pieces: the tokenizer lies as a tokenizer.model, and puts a space before every text, or not; None: it does not.
    """

    model_type: str
    tokenizer: str
    llm_key: str
    config: Mapping[str, Any]
    llm_prefix: str = ''
    names: Sequence[str] = ()
    preprocessor: str | None = None
    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    pieces: Literal['prefix', 'no_prefix'] | None = None


_POINTS_VISION = {
    'model_type': 'qwen2_vl', 'depth': 2, 'embed_dim': 32, 'hidden_size': 48, 'num_heads': 4, 'mlp_ratio': 2,
    'hidden_act': 'quick_gelu', 'in_channels': 3, 'patch_size': 14, 'spatial_merge_size': 2, 'temporal_patch_size': 2,
}  # fmt: skip
_QWEN2 = {
    'model_type': 'qwen2', 'hidden_size': 64, 'intermediate_size': 128, 'num_hidden_layers': 2,
    'num_attention_heads': 4, 'num_key_value_heads': 2, 'max_position_embeddings': 2048, 'rms_norm_eps': 1e-6,
    'rope_theta': 1000000.0, 'tie_word_embeddings': True,
}  # fmt: skip

_MINICPMV = {
    'architectures': ['MiniCPMV'], 'model_type': 'minicpmv',
    'auto_map': {'AutoModelForCausalLM': 'modeling_minicpmv.MiniCPMV'},
    'hidden_size': 128, 'intermediate_size': 128, 'num_hidden_layers': 2, 'num_attention_heads': 4,
    'num_key_value_heads': 2, 'max_position_embeddings': 2048, 'rms_norm_eps': 1e-5, 'bos_token_id': 1,
    'eos_token_id': 2, 'scale_emb': 12, 'scale_depth': 1.4, 'dim_model_base': 64, 'tie_word_embeddings': False,
    'query_num': 4, 'vision_encoder': 'vit_test_patch14_siglip_56', 'drop_vision_last_layer': True, 'patch_size': 14,
    'slice_mode': True, 'max_slice_nums': 4, 'scale_resolution': 56,
}  # fmt: skip

_INTERNVIT = {
    'architectures': ['InternVisionModel'], 'model_type': 'intern_vit_6b', 'hidden_size': 32, 'intermediate_size': 64,
    'num_hidden_layers': 2, 'num_attention_heads': 4, 'image_size': 56, 'patch_size': 14, 'norm_type': 'layer_norm',
    'layer_norm_eps': 1e-6, 'qkv_bias': True, 'qk_normalization': False, 'initializer_factor': 1.0,
}  # fmt: skip
_INTERNLM2 = {
    'architectures': ['InternLM2ForCausalLM'], 'model_type': 'internlm2', 'hidden_size': 64, 'intermediate_size': 128,
    'num_hidden_layers': 2, 'num_attention_heads': 4, 'num_key_value_heads': 2, 'max_position_embeddings': 2048,
    'rms_norm_eps': 1e-5, 'rope_theta': 1000000, 'rope_scaling': {'type': 'dynamic', 'factor': 2.0}, 'bias': False,
    'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 2,
}  # fmt: skip

TINY_ORIGINALS: Mapping[str, TinyOriginal] = {
    'internlm2': TinyOriginal(
        'llama',
        tokenizer='internlm2',
        llm_key='',
        config={
            'architectures': ['InternLM2ForCausalLM'],
            'model_type': 'internlm2',
            'auto_map': {'AutoModelForCausalLM': 'modeling_internlm2.InternLM2ForCausalLM'},
            'hidden_size': 64,
            'intermediate_size': 128,
            'num_hidden_layers': 2,
            'num_attention_heads': 4,
            'num_key_value_heads': 2,
            'max_position_embeddings': 2048,
            'rms_norm_eps': 1e-5,
            'rope_theta': 1000000,
            'rope_scaling': {'type': 'dynamic', 'factor': 2.0},
            'bias': False,
            'hidden_act': 'silu',
            'tie_word_embeddings': False,
            'bos_token_id': 1,
            'eos_token_id': 2,
            'pad_token_id': 2,
        },
        pieces='no_prefix',
    ),
    'points': TinyOriginal(
        'points',
        tokenizer='points',
        llm_key='llm_config',
        config={
            'architectures': ['POINTSV15ChatModel'],
            'model_type': 'pointsv1.5_chat',
            'auto_map': {'AutoModelForCausalLM': 'modeling_pointsv15_chat.POINTSV15ChatModel'},
            'llm_config': _QWEN2,
            'vision_config': _POINTS_VISION,
        },
        llm_prefix='llm.',
        names=original_names.POINTS,
        preprocessor='qwen2_vl',
        kept={'vision_encoder.merger.ln_q.weight': (32,), 'vision_encoder.merger.mlp.2.weight': (48, 128)},
    ),
    'internvl_chat': TinyOriginal(
        'internvl',
        tokenizer='internvl2',
        llm_key='llm_config',
        config={
            'architectures': ['InternVLChatModel'],
            'model_type': 'internvl_chat',
            'auto_map': {'AutoModel': 'modeling_internvl_chat.InternVLChatModel'},
            'llm_config': _INTERNLM2,
            'vision_config': _INTERNVIT,
            'template': 'internlm2-chat',
            'ps_version': 'v2',
            'force_image_size': 56,
            'downsample_ratio': 0.5,
            'dynamic_image_size': True,
            'use_thumbnail': True,
            'max_dynamic_patch': 4,
        },
        llm_prefix='language_model.',
        names=original_names.INTERNVL,
        pieces='no_prefix',
    ),
    'minicpmv2': TinyOriginal(
        'minicpmv2',
        tokenizer='minicpmv',
        llm_key='',
        config=_MINICPMV,
        llm_prefix='llm.',
        names=original_names.MINICPMV,
        pieces='prefix',
    ),
}


def write_tiny_original(
    name: str,
    path: Path,
    *,
    random_model: Callable[[Any, PreTrainedConfig], PreTrainedModel],
    dtype: str,
    overrides: Mapping[str, Any],
) -> None:
    """Write the folder ``TINY_ORIGINALS[name]``.

    Args:
        name: a key of the table.
        path: an existing folder.
        random_model: (Auto class, native config) -> model.
        dtype: of the stored weights.
        overrides: keys of config.json; a dict is merged into the one of that name.
    """
    row = TINY_ORIGINALS[name]
    if row.pieces is None:
        tokenizer = build_tokenizer(row.tokenizer)
        tokenizer.save_pretrained(path)
    else:
        tokenizer = write_tokenizer_model(row.tokenizer, path, prefix=row.pieces == 'prefix')
    config = _config(row, tokenizer=tokenizer, overrides=overrides)
    config['torch_dtype'] = dtype
    _write_json(path / 'config.json', config)
    if row.preprocessor is not None:
        _write_json(path / 'preprocessor_config.json', PREPROCESSORS[row.preprocessor])
    layout = find_layout(str(path))
    assert layout is not None, row
    native = read_config(str(path))
    model = random_model(auto_class(find_family(row.model_type)), native)
    weights = dict(model.to(getattr(torch, dtype)).state_dict())
    if native.tie_word_embeddings:
        weights.pop('lm_head.weight')
    original = _original_weights(weights, _names(row, config), layout=layout, config=native)
    generator = torch.Generator().manual_seed(0)
    for key, shape in row.kept.items():
        original[key] = torch.randn(shape, generator=generator).to(getattr(torch, dtype))
    save_file(original, path / 'model.safetensors', metadata={'format': 'pt'})


def _original_weights(
    weights: Mapping[str, Tensor], names: Sequence[str], *, layout: Layout, config: PreTrainedConfig
) -> dict[str, Tensor]:
    """Those of ``names`` that a native model with these weights has in the original; every weight must be in one."""
    left, found = dict(weights), {}
    name_map = layout.name_map(config)
    for name in names:
        match = name_map.match(name)
        if match is not None and all(native in left for native in match.native):
            found[name] = match.rule.join([left.pop(native) for native in match.native]).clone().contiguous()
    if left:
        raise ValueError(f'{sorted(left)} have no place in {layout.name}')
    return found


def _names(row: TinyOriginal, config: Mapping[str, Any]) -> list[str]:
    llm = (config[row.llm_key] if row.llm_key else config)['model_type']
    patterns = original_names.LANGUAGE_MODELS.get(llm, original_names.LANGUAGE_MODELS['transformers'])
    return original_names.expand([*(row.llm_prefix + pattern for pattern in patterns), *row.names])


def _config(row: TinyOriginal, *, tokenizer: PreTrainedTokenizerBase, overrides: Mapping[str, Any]) -> dict[str, Any]:
    config = json.loads(json.dumps(row.config))
    for key, value in overrides.items():
        merge = isinstance(value, Mapping) and isinstance(config.get(key), Mapping)
        config[key] = {**config[key], **value} if merge else value
    llm = config[row.llm_key] if row.llm_key else config
    llm.setdefault('vocab_size', -(-len(tokenizer) // _VOCAB_STEP) * _VOCAB_STEP)
    return config


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
