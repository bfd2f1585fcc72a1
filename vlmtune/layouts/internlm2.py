"""InternLM2 and InternLM2.5: a Llama whose queries, keys and values lie in one matrix, under names of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from vlmtune.layouts.layout import Layout
from vlmtune.layouts.names import Rule, rename
from vlmtune.layouts.sentencepiece import write_tokenizer
from vlmtune.utils.errors import ModelError

MODEL_TYPE, ARCHITECTURE = 'internlm2', 'InternLM2ForCausalLM'
# Where the keys of config.json have another name in a LlamaConfig, and what they are when left out.
_RENAMED = {'bias': 'attention_bias'}
_DEFAULTS: dict[str, Any] = dict(
    vocab_size=103168, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    hidden_act='silu', max_position_embeddings=2048, initializer_range=0.02, rms_norm_eps=1e-6, use_cache=True,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, bias=True,
)  # fmt: skip
_ROPE_TYPES = ('linear', 'dynamic')


def internlm2_text_config(raw: Mapping[str, Any], *, key: str = '') -> LlamaConfig:
    """The Llama that an InternLM2 is.

    Args:
        raw: config.json, or the part of it that describes the language model.
        key: where that part stands in config.json, for messages: 'llm_config.'.

    Raises:
        ModelError: it is no causal InternLM2, or one with positions or sizes that are not known.
    """
    _check_version(raw, key=key)
    settings = {name: raw.get(name, value) for name, value in _DEFAULTS.items()}
    heads = settings['num_attention_heads']
    groups = raw.get('num_key_value_heads') or heads
    if settings['hidden_size'] % heads or heads % groups:
        raise ModelError(
            f'config.json: {key}hidden_size={settings["hidden_size"]}, {key}num_attention_heads={heads} and '
            f'{key}num_key_value_heads={groups}; expected each to be a multiple of the next'
        )
    return LlamaConfig(
        **{_RENAMED.get(name, name): value for name, value in settings.items()},
        num_key_value_heads=groups,
        rope_parameters=_rope(raw, key=key),
        dtype=raw.get('dtype', raw.get('torch_dtype')),
        architectures=['LlamaForCausalLM'],
    )


def _check_version(raw: Mapping[str, Any], *, key: str) -> None:
    found = raw.get('model_type', MODEL_TYPE)
    if found != MODEL_TYPE:
        raise ModelError(
            f'config.json: {key}model_type={found!r}; expected {MODEL_TYPE!r}, InternLM2 or InternLM2.5: the first '
            'InternLM and InternLM3 are other models'
        )
    architecture = (raw.get('architectures') or [ARCHITECTURE])[0]
    if architecture != ARCHITECTURE:
        raise ModelError(
            f'config.json: {key}architectures={architecture!r}; expected {ARCHITECTURE!r}, a language model'
        )


def _rope(raw: Mapping[str, Any], *, key: str) -> dict[str, Any]:
    base = dict(rope_theta=float(raw.get('rope_theta', 10000)))
    scaling = raw.get('rope_scaling')
    if scaling is None:
        return {**base, 'rope_type': 'default'}
    kind, factor = (scaling.get('type'), scaling.get('factor')) if isinstance(scaling, Mapping) else (None, None)
    if kind not in _ROPE_TYPES or not isinstance(factor, int | float) or factor < 1:
        raise ModelError(
            f'config.json: {key}rope_scaling={scaling!r}; expected null or {{"type": ..., "factor": ...}} with a type '
            f'of {", ".join(_ROPE_TYPES)} and a factor of at least 1'
        )
    return {**base, 'rope_type': kind, 'factor': float(factor)}


def internlm2_rules(text_config: Any, *, original: str = '', native: str = '') -> tuple[Rule, ...]:
    """How the names of an InternLM2 correspond to those of a ``LlamaForCausalLM``.

    ``wqkv`` holds for every key head its queries, its key and its value, one after the other. No name is one of the
    language models of transformers that a picture model here may have, so these rules stand beside plain ones.

    Args:
        text_config: of the Llama.
        original: what stands before ``model.`` and ``output.`` there, for example 'language_model.'.
        native: the path of the Llama's layers here, for example 'model.language_model'; '' for a plain Llama.
    """
    here = native or 'model'
    layer, ours = f'{original}model.layers.{{i}}', f'{here}.layers.{{i}}'
    groups = text_config.num_key_value_heads
    each = text_config.num_attention_heads // groups  # queries of a key head

    def split(fused: Tensor) -> Sequence[Tensor]:
        heads = fused.unflatten(0, (groups, each + 2, -1))
        q, k, v = heads.split((each, 1, 1), dim=1)
        return [part.flatten(0, 2).contiguous() for part in (q, k, v)]

    def join(parts: Sequence[Tensor]) -> Tensor:
        q, k, v = (part.unflatten(0, (groups, -1)) for part in parts)
        return torch.cat([q, k, v], dim=1).flatten(0, 1)

    names = {
        'attention.wo': 'self_attn.o_proj',
        'feed_forward.w1': 'mlp.gate_proj',
        'feed_forward.w3': 'mlp.up_proj',
        'feed_forward.w2': 'mlp.down_proj',
        'attention_norm': 'input_layernorm',
        'ffn_norm': 'post_attention_layernorm',
    }
    qkv = tuple(f'{ours}.self_attn.{part}_proj.{{leaf}}' for part in 'qkv')
    return (
        Rule(f'{layer}.attention.wqkv.{{leaf}}', qkv, split, join),
        *(rename(f'{layer}.{theirs}.{{leaf}}', f'{ours}.{mine}.{{leaf}}') for theirs, mine in names.items()),
        rename(f'{original}model.tok_embeddings.weight', f'{here}.embed_tokens.weight'),
        rename(f'{original}model.norm.weight', f'{here}.norm.weight'),
        rename(f'{original}output.weight', 'lm_head.weight'),
    )


INTERNLM2 = Layout(
    name='InternLM2',
    read_config=internlm2_text_config,
    write_processor_files=write_tokenizer,
    rules=internlm2_rules,
)
