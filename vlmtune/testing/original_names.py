"""What makers of models call their weights; ``{a,b}`` stands for either, ``{i}`` for a layer, ``{leaf}`` for its two.

They stand here once more, so that a rule of ``vlmtune.layouts`` that is wrong finds no weight to agree with it.
"""

from collections.abc import Sequence

_HOLES = {'{i}': '{0,1,2,3,4,5,6,7}', '{leaf}': '{weight,bias}'}

LANGUAGE_MODELS = {
    'internlm2': (
        'model.{tok_embeddings,norm}.weight',
        'output.weight',
        'model.layers.{i}.attention.{wqkv,wo}.{leaf}',
        'model.layers.{i}.{feed_forward.w1,feed_forward.w2,feed_forward.w3,attention_norm,ffn_norm}.weight',
    ),
    'transformers': (
        'model.{embed_tokens,norm}.weight',
        'lm_head.weight',
        'model.layers.{i}.self_attn.{q_proj,k_proj,v_proj,o_proj,qkv_proj,q_norm,k_norm}.{leaf}',
        'model.layers.{i}.mlp.{gate_proj,up_proj,down_proj,gate_up_proj}.weight',
        'model.layers.{i}.{input_layernorm,post_attention_layernorm}.weight',
    ),
}
"""By the type of the model, or of all whose names are those of transformers."""

INTERNVL = (
    'mlp1.{0,1,3}.{leaf}',
    'vision_model.embeddings.{class_embedding,position_embedding,patch_embedding.weight,patch_embedding.bias}',
    'vision_model.encoder.layers.{i}.{attn.qkv,attn.proj,attn.q_norm,attn.k_norm,mlp.fc1,mlp.fc2,norm1,norm2}.{leaf}',
    'vision_model.encoder.layers.{i}.{ls1,ls2}',
)
POINTS = (
    'vision_encoder.patch_embed.proj.weight',
    'vision_encoder.blocks.{i}.{attn.qkv,attn.proj,mlp.fc1,mlp.fc2,norm1,norm2}.{leaf}',
    'vision_projector.{ln_q,mlp.0,mlp.2}.{leaf}',
)
MINICPMV = (
    'vpm.{pos_embed,patch_embed.proj.weight,patch_embed.proj.bias,norm.weight,norm.bias}',
    'vpm.blocks.{i}.{attn.qkv,attn.proj,mlp.fc1,mlp.fc2,norm1,norm2}.{leaf}',
    'resampler.{query,pos_embed,proj,kv_proj.weight,attn.in_proj_weight,attn.in_proj_bias}',
    'resampler.{attn.out_proj,ln_q,ln_kv,ln_post}.{leaf}',
)


def expand(patterns: Sequence[str]) -> list[str]:
    """The names that patterns stand for."""
    for hole, choices in _HOLES.items():
        patterns = [pattern.replace(hole, choices) for pattern in patterns]
    return [name for pattern in patterns for name in _expanded(pattern)]


def _expanded(pattern: str) -> list[str]:
    start, brace, rest = pattern.partition('{')
    if not brace:
        return [pattern]
    choices, _, end = rest.partition('}')
    return [start + choice + name for choice in choices.split(',') for name in _expanded(end)]
