"""POINTS-1.5 and POINTS-Reader: a NaViT tower of Qwen2-VL, a projector, and Qwen2.5.

The names are those of github.com/WePOINTS/WePOINTS and of the Python files beside the weights on the hub. The language
model lies in one of two ways: POINTS-Reader has that of transformers, POINTS-1.5 one of its own (``custom_llama``)
with keys and values in one matrix, and the two halves of the gated layer in another.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from vlmtune.families import find_family
from vlmtune.layouts.layout import Layout
from vlmtune.layouts.names import Rule, rename
from vlmtune.utils.errors import ModelError
from vlmtune.utils.guarded_copy import copy_present
from vlmtune.utils.imports import import_name
from vlmtune.utils.json_files import write_json
from vlmtune.utils.pretrained import read_source_json

_TOKENIZER_FILES = ('tokenizer.json', 'vocab.json', 'merges.txt', 'added_tokens.json', 'special_tokens_map.json')
_IMAGE_TOKEN = '<|image_pad|>'
_QWEN2 = (
    'vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act '
    'max_position_embeddings initializer_range rms_norm_eps rope_theta rope_scaling rope_parameters use_sliding_window '
    'sliding_window max_window_layers attention_dropout bos_token_id eos_token_id pad_token_id'
).split()
_VISION = (
    'depth embed_dim hidden_size hidden_act mlp_ratio num_heads in_channels patch_size spatial_merge_size '
    'temporal_patch_size initializer_range'
).split()
_CUSTOM_LLAMA = {  # their name: ours
    'vocab_size': 'vocab_size',
    'hidden_size': 'hidden_size',
    'ffn_hidden_size': 'intermediate_size',
    'num_layers': 'num_hidden_layers',
    'num_attention_heads': 'num_attention_heads',
    'num_kv_heads': 'num_key_value_heads',
    'layernorm_epsilon': 'rms_norm_eps',
    'rotary_emb_base': 'rope_theta',
    'max_position_embeddings': 'max_position_embeddings',
}
_LIKE_QWEN2 = {
    'hidden_act': 'swiglu',
    'norm_type': 'rms_norm',
    'rotary_pct': 1.0,
    'rotary_compress': 1.0,
    'qkv_proj_bias': True,
    'out_proj_bias': False,
    'mlp_fc1_bias': False,
    'mlp_fc2_bias': False,
}
"""What ``custom_llama`` must say to be a Qwen2 under other names."""
_IMAGE_SETTINGS = ('do_convert_rgb', 'do_resize', 'do_rescale', 'do_normalize', 'rescale_factor', 'image_mean',
                   'image_std', 'resample', 'patch_size', 'merge_size', 'temporal_patch_size')  # fmt: skip

_SERVING = """SGLang serves it; `points-v15-chat` writes the prompt of its training, if images stand before the text:

```
python3 -m sglang.launch_server --model-path path/to/this/folder --chat-template points-v15-chat \\
    --trust-remote-code --port 8081
```

SGLang knows POINTS-Reader, whose language model has the names of transformers, not POINTS-1.5. vLLM and LMDeploy know
neither."""


# ---- config.json


def _read_config(raw: Mapping[str, Any]) -> PreTrainedConfig:
    llm, vision = raw.get('llm_config'), raw.get('vision_config')
    for key, value in (('llm_config', llm), ('vision_config', vision)):
        if not isinstance(value, Mapping):
            raise ModelError(f'config.json: {key} is {value!r}; expected the settings that POINTS keeps there')
    kind = llm.get('model_type', 'qwen2')  # type: ignore[union-attr]
    if kind not in ('qwen2', 'custom_llama'):
        raise ModelError(
            f'config.json: llm_config.model_type is {kind!r}; expected qwen2 (POINTS-Reader) or custom_llama '
            '(POINTS-1.5); the first POINTS, without 1.5, is another model'
        )
    text = _qwen2(llm) if kind == 'qwen2' else _from_custom_llama(llm)  # type: ignore[arg-type]
    config_class = import_name(str(find_family('points').model)).config_class
    config: PreTrainedConfig = config_class(
        text_config={'model_type': 'qwen2', **text},
        vision_config={'model_type': 'qwen2_vl_vision', **{k: vision[k] for k in _VISION if k in vision}},  # type: ignore[index,operator]
        image_token_id=raw.get('image_token_id'),
        tie_word_embeddings=bool(llm.get('tie_word_embeddings', False)),  # type: ignore[union-attr]
        dtype=raw.get('torch_dtype') or raw.get('dtype'),
    )
    return config


def _qwen2(llm: Mapping[str, Any]) -> dict[str, Any]:
    return {key: llm[key] for key in _QWEN2 if llm.get(key) is not None}


def _from_custom_llama(llm: Mapping[str, Any]) -> dict[str, Any]:
    wrong = {key: llm.get(key) for key, value in _LIKE_QWEN2.items() if llm.get(key) != value}
    if llm.get('sliding_window_type') is not None:
        wrong['sliding_window_type'] = llm['sliding_window_type']
    if llm.get('num_kv_heads') == llm.get('num_attention_heads'):
        wrong['num_kv_heads'] = llm.get('num_kv_heads')
    if wrong:
        key, value = next(iter(wrong.items()))
        raise ModelError(f'config.json: llm_config.{key} is {value!r}; expected what POINTS-1.5-Qwen2.5-7B-Chat has')
    if missing := [key for key in _CUSTOM_LLAMA if key not in llm]:
        raise ModelError(f'config.json: llm_config lacks {missing[0]}')
    return {ours: llm[theirs] for theirs, ours in _CUSTOM_LLAMA.items()}


# ---- tokenizer and image processor


def _write_processor_files(source: Path, target: Path) -> None:
    copy_present(_TOKENIZER_FILES, source=source, target=target, error=ModelError)
    settings = _read_json(source, 'tokenizer_config.json')
    # Its chat template is that of Qwen2.5, which knows no images and adds a system message; POINTS does not use it.
    for key in ('chat_template', 'auto_map', 'processor_class'):
        settings.pop(key, None)
    write_json(target / 'tokenizer_config.json', settings)
    image = _read_json(source, 'preprocessor_config.json')
    kept = {key: image[key] for key in _IMAGE_SETTINGS if key in image}
    size = image.get('size')
    size = size if isinstance(size, Mapping) else {}
    for limit, edge in (('min_pixels', 'shortest_edge'), ('max_pixels', 'longest_edge')):
        if (pixels := image.get(limit, size.get(edge))) is not None:
            kept[limit] = pixels
    write_json(target / 'preprocessor_config.json', {**kept, 'image_processor_type': 'Qwen2VLImageProcessor'})


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    content = read_source_json(str(folder), name)
    if content is None:
        raise ModelError(f'{folder} has no {name}; download it')
    return content


# ---- weights


def _rules(config: Any) -> tuple[Rule, ...]:
    return (
        rename('llm.model.{rest}', 'model.language_model.{rest}'),
        rename('llm.lm_head.weight', 'lm_head.weight'),
        *_custom_llama_rules(config.text_config),
        rename('vision_encoder.{rest}', 'model.vision_tower.{rest}'),
        rename('vision_projector.{rest}', 'model.multi_modal_projector.{rest}'),
    )


def _custom_llama_rules(text_config: Any) -> tuple[Rule, ...]:
    heads = text_config.num_key_value_heads

    def split_heads(fused: Tensor) -> Sequence[Tensor]:
        """For every key head its key, then its value."""
        return [part.flatten(0, 1).contiguous() for part in fused.unflatten(0, (heads, 2, -1)).unbind(1)]

    def join_heads(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([part.unflatten(0, (heads, -1)) for part in parts], 1).flatten(0, 2)

    def halves(fused: Tensor) -> Sequence[Tensor]:
        return [half.contiguous() for half in fused.chunk(2)]

    theirs, ours = 'llm.lm.layers.{i}', 'model.language_model.layers.{i}'
    names = {
        'attention.query_dense': 'self_attn.q_proj',
        'attention.dense': 'self_attn.o_proj',
        'mlp.dense_4h_to_h': 'mlp.down_proj',
        'input_layernorm': 'input_layernorm',
        'post_attention_layernorm': 'post_attention_layernorm',
    }
    keys_and_values = tuple(f'{ours}.self_attn.{name}_proj.{{leaf}}' for name in 'kv')
    up_and_gate = tuple(f'{ours}.mlp.{name}_proj.weight' for name in ('up', 'gate'))
    return (
        Rule(f'{theirs}.attention.key_value_dense.{{leaf}}', keys_and_values, split_heads, join_heads),
        Rule(f'{theirs}.mlp.dense_h_to_4h.weight', up_and_gate, halves, torch.cat),
        *(rename(f'{theirs}.{name}.{{leaf}}', f'{ours}.{mine}.{{leaf}}') for name, mine in names.items()),
        rename('llm.lm.embed_in.weight', 'model.language_model.embed_tokens.weight'),
        rename('llm.lm.final_layer_norm.weight', 'model.language_model.norm.weight'),
        rename('llm.embed_out.weight', 'lm_head.weight'),
    )


POINTS = Layout(
    'POINTS-1.5',
    read_config=_read_config,
    write_processor_files=_write_processor_files,
    rules=_rules,
    # The tower brings Qwen2-VL's merger along; POINTS never runs it.
    kept=('vision_encoder.merger.{rest}',),
    serving=_SERVING,
    image_token=_IMAGE_TOKEN,
)
