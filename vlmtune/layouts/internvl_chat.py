"""InternVL2 and its successors as OpenGVLab stores them: ``internvl_chat``, read as an InternVL of transformers.

Names and meanings of the settings are those of https://github.com/OpenGVLab/InternVL, commit 2410d1d, folder
``internvl_chat/internvl/model``. The language model is an InternLM2, a Llama, a Qwen2, a Qwen3 or a Phi-3.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, InternVLConfig, PreTrainedConfig

from vlmtune.layouts.internlm2 import internlm2_rules, internlm2_text_config
from vlmtune.layouts.internvl_files import CONTEXT_TOKEN, write_processor_files
from vlmtune.layouts.layout import Layout
from vlmtune.layouts.names import Rule, rename
from vlmtune.utils.errors import ModelError

_LANGUAGE_MODELS = {  # architecture in llm_config: model type here; InternLM2 is read by its own layout
    'LlamaForCausalLM': 'llama',
    'Qwen2ForCausalLM': 'qwen2',
    'Qwen3ForCausalLM': 'qwen3',
    'Phi3ForCausalLM': 'phi3',
}
_ONLY = {  # settings whose other values have no counterpart in transformers: (the one known, what else it may be)
    'ps_version': ('v2', 'InternVL 1.x shuffles pixels in another order'),
    'pad2square': (False, 'tiles that are padded are not supported'),
    'use_backbone_lora': (0, 'merge its LoRA first, with tools/merge_lora.py of the official repository'),
    'use_llm_lora': (0, 'merge its LoRA first, with tools/merge_lora.py of the official repository'),
}
_GENERIC = {
    'architectures',
    'dtype',
    'transformers_version',
    'return_dict',
    'output_hidden_states',
    'id2label',
    'label2id',
}
_ROPE = ('rope_theta', 'rope_scaling')
_QK_NORM_EPS = 1e-6  # of the native class, which has no setting for it


def read_config(raw: Mapping[str, Any]) -> InternVLConfig:
    """The native config of an ``internvl_chat``.

    Args:
        raw: config.json.

    Raises:
        ModelError: a setting or a language model that has no native counterpart.
    """
    for key, (known, otherwise) in _ONLY.items():
        if (found := raw.get(key, 'v1' if key == 'ps_version' else known)) != known:
            raise ModelError(f'config.json: {key}={found!r}, expected {known!r}; {otherwise}')
    vision = _vision_config(_section(raw, 'vision_config'), tile=raw.get('force_image_size'))
    ratio = float(raw.get('downsample_ratio', 0.5))
    return InternVLConfig(
        vision_config=vision,
        text_config=_text_config(_section(raw, 'llm_config')),
        image_seq_length=int((vision['image_size'] // vision['patch_size']) ** 2 * ratio**2),
        downsample_ratio=ratio,
        projector_hidden_act='gelu',
        vision_feature_layer=_feature_layer(raw.get('select_layer', -1), layers=vision['num_hidden_layers']),
        vision_feature_select_strategy='default',
        tie_word_embeddings=False,  # the official class sets it so, for all language models
        dtype=raw.get('torch_dtype'),
    )


def _section(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = raw.get(key)
    if not isinstance(section, Mapping):
        raise ModelError(f'config.json: {key} is {type(section).__name__}, expected an object as InternVL2 has it')
    return section


def _feature_layer(layer: Any, *, layers: int) -> int:
    if not isinstance(layer, int) or not -layers - 1 <= layer <= layers:
        raise ModelError(
            f'config.json: select_layer={layer!r}, but the vision encoder has {layers} layers; expected a whole number '
            f'from {-layers - 1} to {layers}'
        )
    return layer


def _vision_config(raw: Mapping[str, Any], *, tile: int | None) -> dict[str, Any]:
    """InternViT-300M or InternViT-6B; what is missing are the defaults of the official class."""
    size = int(raw.get('image_size', 224))
    if tile is not None and tile != size:
        raise ModelError(
            f'config.json: force_image_size={tile}, but vision_config.image_size={size}; expected the same number'
        )
    qk_norm, eps = bool(raw.get('qk_normalization', True)), float(raw.get('layer_norm_eps', 1e-6))
    if qk_norm and eps != _QK_NORM_EPS:
        raise ModelError(f'config.json: vision_config.layer_norm_eps={eps}, expected {_QK_NORM_EPS}')
    if raw.get('drop_path_rate', 0.0):
        raise ModelError('config.json: vision_config.drop_path_rate is not 0, which is not supported; set it to 0.0')
    return dict(
        hidden_size=raw.get('hidden_size', 3200),
        intermediate_size=raw.get('intermediate_size', 12800),
        num_hidden_layers=raw.get('num_hidden_layers', 48),
        num_attention_heads=raw.get('num_attention_heads', 25),
        image_size=size,
        patch_size=int(raw.get('patch_size', 14)),
        num_channels=raw.get('num_channels', 3),
        hidden_act=raw.get('hidden_act', 'gelu'),
        norm_type=raw.get('norm_type', 'rms_norm'),
        layer_norm_eps=eps,
        attention_bias=bool(raw.get('qkv_bias', False)),
        use_qk_norm=qk_norm,
        attention_dropout=raw.get('attention_dropout', 0.0),
        hidden_dropout_prob=0.0,
        projection_dropout=raw.get('dropout', 0.0),
        layer_scale_init_value=raw.get('initializer_factor', 0.1),
        use_mean_pooling=True,  # of its two classes, the one without a norm behind the last layer
    )


def _text_config(raw: Mapping[str, Any]) -> PreTrainedConfig:
    names = raw.get('architectures') or ['']
    config: PreTrainedConfig
    if names[0] == 'InternLM2ForCausalLM':
        config = internlm2_text_config(raw, key='llm_config.')
    elif names[0] in _LANGUAGE_MODELS:
        config = _known_settings(_LANGUAGE_MODELS[names[0]], raw)
    else:
        raise ModelError(
            f'config.json: the language model of llm_config is {names[0]!r}; supported are InternLM2ForCausalLM, '
            f'{", ".join(_LANGUAGE_MODELS)}'
        )
    config.tie_word_embeddings = False
    return config


def _known_settings(model_type: str, raw: Mapping[str, Any]) -> PreTrainedConfig:
    """Of what ``llm_config`` holds, the settings of that model; old files hold all that transformers had then."""
    native = type(AutoConfig.for_model(model_type))
    known = {field.name for field in dataclasses.fields(native)} - _GENERIC | set(_ROPE)
    settings = {key: value for key, value in raw.items() if key in known and (value is not None or key in _ROPE)}
    if model_type == 'phi3':
        settings['rope_scaling'] = _long_rope(raw)
    return native(**settings)


def _long_rope(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """Phi-3's ``su``, which is called ``longrope`` now."""
    rope = raw.get('rope_scaling')
    if not rope:
        return None
    if rope.get('type') not in ('su', 'longrope'):
        raise ModelError(f'config.json: llm_config.rope_scaling has type {rope.get("type")!r}, expected su or longrope')
    return {**rope, 'type': 'longrope'}


# ---- weights


def rules(config: PreTrainedConfig) -> Sequence[Rule]:
    """How the names of the original correspond to those of ``InternVLForConditionalGeneration``."""
    return (
        *_vision_rules(),
        *(rename(f'mlp1.{i}.{{leaf}}', f'model.multi_modal_projector.{name}.{{leaf}}') for i, name in _PROJECTOR),
        *internlm2_rules(config.text_config, original='language_model.', native='model.language_model'),
        rename('language_model.model.{rest}', 'model.language_model.{rest}'),
        rename('language_model.lm_head.weight', 'lm_head.weight'),
    )


_PROJECTOR = ((0, 'layer_norm'), (1, 'linear_1'), (3, 'linear_2'))
_EMBEDDINGS = {
    'class_embedding': 'cls_token',
    'position_embedding': 'position_embeddings',
    'patch_embedding.weight': 'patch_embeddings.projection.weight',
    'patch_embedding.bias': 'patch_embeddings.projection.bias',
}
_LAYER = {
    'attn.q_norm.weight': 'attention.q_norm.weight',
    'attn.k_norm.weight': 'attention.k_norm.weight',
    'attn.proj.{leaf}': 'attention.projection_layer.{leaf}',
    'mlp.{rest}': 'mlp.{rest}',
    'norm1.{leaf}': 'layernorm_before.{leaf}',
    'norm2.{leaf}': 'layernorm_after.{leaf}',
    'ls1': 'lambda_1',
    'ls2': 'lambda_2',
}


def _vision_rules() -> tuple[Rule, ...]:
    theirs, ours = 'vision_model.encoder.layers.{i}', 'model.vision_tower.encoder.layer.{i}'
    qkv = tuple(f'{ours}.attention.{part}_proj.{{leaf}}' for part in 'qkv')
    return (
        *(
            rename(f'vision_model.embeddings.{original}', f'model.vision_tower.embeddings.{native}')
            for original, native in _EMBEDDINGS.items()
        ),
        Rule(f'{theirs}.attn.qkv.{{leaf}}', qkv, _split_qkv, torch.cat),
        *(rename(f'{theirs}.{original}', f'{ours}.{native}') for original, native in _LAYER.items()),
    )


def _split_qkv(fused: Tensor) -> Sequence[Tensor]:
    return [part.clone() for part in fused.chunk(3)]  # so that the fused one can be freed


INTERNVL_CHAT = Layout(
    'internvl_chat',
    read_config=read_config,
    write_processor_files=write_processor_files,
    rules=rules,
    image_token=CONTEXT_TOKEN,
)
