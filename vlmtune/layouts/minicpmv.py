"""MiniCPM-V 2.0: a SigLIP tower under timm's names, a resampler, and MiniCPM-2B, which is a Granite by other names.

The names are those of the Python files beside the weights on the hub. MiniCPM-V 1.0, 2.5 and 2.6 call themselves the
same (``model_type: minicpmv``) and are other models.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from vlmtune.families import find_family
from vlmtune.layouts.layout import Layout
from vlmtune.layouts.names import Rule, rename
from vlmtune.layouts.sentencepiece import fast_tokenizer
from vlmtune.utils.errors import ModelError
from vlmtune.utils.imports import import_name
from vlmtune.utils.json_files import write_json
from vlmtune.utils.pretrained import read_source_json

_NEEDED = (
    'vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads scale_emb scale_depth '
    'dim_model_base query_num vision_encoder drop_vision_last_layer max_slice_nums scale_resolution patch_size'
).split()
_TEXT = (
    'vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act '
    'max_position_embeddings initializer_range rms_norm_eps attention_bias attention_dropout bos_token_id eos_token_id'
).split()
_FIXED = {'slice_mode': True, 'rope_scaling': None, 'pretraining_tp': 1}
"""What the settings of 2.0 must be, for the code that reads them."""
_ENCODER = re.compile(r'vit_(?P<width>\w+)_patch(?P<patch>\d+)_siglip_(?P<side>\d+)(\.webli)?')
_WIDTHS = {  # of timm's SigLIP towers: width, heads, layers, width of the layers between, as a multiple
    'base': (768, 12, 12, 4.0),
    'large': (1024, 16, 24, 4.0),
    'so400m': (1152, 16, 27, 3.7362),
    'test': (32, 4, 3, 3.7362),  # none of timm's: what tests shrink a checkpoint to
}
_IMAGE_SETTINGS = ('max_slice_nums', 'scale_resolution', 'patch_size')

# Only the last answer is ended by a token. A system message, which the original has not, leads the first question.
_CHAT_TEMPLATE = """
{{- bos_token -}}
{%- for m in messages -%}
  {%- if m['role'] == 'assistant' -%}{{- '<AI>' -}}
  {%- elif loop.first or messages[loop.index0 - 1]['role'] != 'system' -%}{{- '<用户>' -}}{%- endif -%}
  {%- if m['content'] is string -%}{{- m['content'] -}}
  {%- else -%}
    {%- for p in m['content'] -%}
      {%- if p['type'] == 'image' -%}{{- unk_token + '\\n' -}}{%- else -%}{{- p['text'] -}}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- if m['role'] == 'system' -%}{{- '\\n' -}}
  {%- elif m['role'] == 'assistant' and loop.last -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<AI>' -}}{%- endif -%}
"""


# ---- config.json


def _read_config(raw: Mapping[str, Any]) -> PreTrainedConfig:
    _check_version(raw)
    head_dim = raw['hidden_size'] // raw['num_attention_heads']
    text = {key: raw[key] for key in _TEXT if raw.get(key) is not None} | dict(
        model_type='granite',
        rope_parameters=dict(rope_type='default', rope_theta=raw.get('rope_theta', 10000.0)),
        logits_scaling=raw['hidden_size'] / raw['dim_model_base'],
        residual_multiplier=raw['scale_depth'] / math.sqrt(raw['num_hidden_layers']),
        attention_multiplier=head_dim**-0.5,
        tie_word_embeddings=bool(raw.get('tie_word_embeddings', False)),
    )
    config: PreTrainedConfig = import_name(str(find_family('minicpmv2').model)).config_class(
        text_config=text,
        vision_config=_vision(raw),
        image_token_id=raw.get('unk_token_id', 0),
        query_num=raw['query_num'],
        scale_emb=raw['scale_emb'],
        tie_word_embeddings=text['tie_word_embeddings'],
        dtype=raw.get('torch_dtype') or raw.get('dtype'),
        **{key: raw[key] for key in _IMAGE_SETTINGS},
    )
    return config


def _check_version(raw: Mapping[str, Any]) -> None:
    if (version := raw.get('version')) is not None and str(version) not in ('2', '2.0'):
        raise ModelError(
            f'config.json: version is {version!r}; expected MiniCPM-V 2.0, other versions are other models'
        )
    for key, theirs in (('slice_config', '2.5 and 2.6'), ('vision_config', '2.5 and 2.6')):
        if key in raw:
            raise ModelError(f'config.json has {key}, as MiniCPM-V {theirs}; expected 2.0 (openbmb/MiniCPM-V-2)')
    if missing := [key for key in _NEEDED if raw.get(key) is None]:
        raise ModelError(f'config.json has no {missing[0]}, which MiniCPM-V 2.0 has (openbmb/MiniCPM-V-2)')
    for key, value in _FIXED.items():
        if raw.get(key, value) != value:
            raise ModelError(f'config.json: {key} is {raw[key]!r}; expected {value!r}, as in openbmb/MiniCPM-V-2')


def _vision(raw: Mapping[str, Any]) -> dict[str, Any]:
    name = raw['vision_encoder']
    found = _ENCODER.fullmatch(str(name))
    if found is None or found['width'] not in _WIDTHS:
        raise ModelError(
            f'config.json: vision_encoder is {name!r}; expected a SigLIP of timm, such as vit_so400m_patch14_siglip_384'
        )
    if int(found['patch']) != raw['patch_size']:
        raise ModelError(f'config.json: patch_size is {raw["patch_size"]}, but vision_encoder is {name!r}')
    width, heads, layers, multiple = _WIDTHS[found['width']]
    return dict(
        model_type='siglip_vision_model',
        hidden_size=width,
        intermediate_size=int(width * multiple),
        num_attention_heads=heads,
        num_hidden_layers=layers - bool(raw['drop_vision_last_layer']),
        image_size=int(found['side']),
        patch_size=int(found['patch']),
        hidden_act='gelu',  # timm's own choice, not the approximation of SigLIP's first code
        layer_norm_eps=1e-6,
        vision_use_head=False,
    )


# ---- tokenizer and image processor


def _write_processor_files(source: Path, target: Path) -> None:
    config = read_source_json(str(source), 'config.json') or {}
    tokenizer = fast_tokenizer(source)
    if tokenizer.unk_token_id != config.get('unk_token_id', 0):
        raise ModelError(
            f'{source / "tokenizer.model"}: {tokenizer.unk_token} is token {tokenizer.unk_token_id}, but config.json: '
            f'unk_token_id is {config.get("unk_token_id", 0)}; these files belong to different models'
        )
    # The original pads with the token that also stands for images; where rows end must not look like an image.
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = _CHAT_TEMPLATE.strip()
    tokenizer.save_pretrained(target)
    theirs = read_source_json(str(source), 'preprocessor_config.json') or {}
    image = {key: theirs.get(key, config[key]) for key in _IMAGE_SETTINGS}
    for ours, key in (('image_mean', 'norm_mean'), ('image_std', 'norm_std')):
        if key in theirs:
            image[ours] = theirs[key]
    image['image_processor_type'] = 'SliceImageProcessor'
    write_json(target / 'preprocessor_config.json', image)


# ---- weights


def _rules(config: PreTrainedConfig) -> tuple[Rule, ...]:
    theirs, ours = 'vpm.blocks.{i}', 'model.vision_tower.encoder.layers.{i}'
    names = {
        'attn.proj': 'self_attn.out_proj',
        'mlp.fc1': 'mlp.fc1',
        'mlp.fc2': 'mlp.fc2',
        'norm1': 'layer_norm1',
        'norm2': 'layer_norm2',
    }
    resampler = 'model.multi_modal_projector'
    return (
        rename('llm.model.{rest}', 'model.language_model.{rest}'),
        rename('llm.lm_head.weight', 'lm_head.weight'),
        _qkv(f'{theirs}.attn.qkv.{{leaf}}', f'{ours}.self_attn.*_proj.{{leaf}}'),
        *(rename(f'{theirs}.{name}.{{leaf}}', f'{ours}.{mine}.{{leaf}}') for name, mine in names.items()),
        rename('vpm.pos_embed', 'model.vision_tower.embeddings.position_embedding'),
        rename('vpm.patch_embed.proj.{leaf}', 'model.vision_tower.embeddings.patch_embedding.{leaf}'),
        rename('vpm.norm.{leaf}', 'model.vision_tower.post_layernorm.{leaf}'),
        _qkv('resampler.attn.in_proj_weight', f'{resampler}.attn.*_proj.weight'),
        _qkv('resampler.attn.in_proj_bias', f'{resampler}.attn.*_proj.bias'),
        rename('resampler.{rest}', f'{resampler}.{{rest}}'),
    )


def _qkv(original: str, native: str) -> Rule:
    """All queries, then all keys, then all values."""

    def split(fused: Tensor) -> Sequence[Tensor]:
        return [third.contiguous() for third in fused.chunk(3)]

    return Rule(original, tuple(native.replace('*', part) for part in 'qkv'), split, torch.cat)


MINICPMV = Layout(
    'MiniCPM-V 2.0',
    read_config=_read_config,
    write_processor_files=_write_processor_files,
    rules=_rules,
)
