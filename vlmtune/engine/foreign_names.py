"""What other programs call the weights that we train: PEFT's adapters, XTuner's and mmengine's checkpoints.

Names of ours are those inside the transformers model. A weight is described by its shape and a way to read it, so that
nothing is read that is not used.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from vlmtune.families import Family


@dataclass(frozen=True)
class Weight:
    """A weight in a file.

    Attributes:
        shape: of the whole.
        read: gives it, in the dtype of the file.
        origin: its name there, for messages.
    """

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    origin: str


Weights: TypeAlias = Mapping[str, Weight]
_Rule: TypeAlias = tuple[re.Pattern[str], str]


def _rules(*pairs: tuple[str, str]) -> tuple[_Rule, ...]:
    return tuple((re.compile(pattern), new) for pattern, new in pairs)


_PEFT = 'base_model.model.'
_ADAPTED = r'(?:base_model\.model\.)?'
# XTuner's wrappers hold a language model, a vision encoder and a projector, each with the names of its own library.
_TEXT = _rules((rf'^llm\.{_ADAPTED}', ''))
_LLAVA = _rules(
    (rf'^llm\.{_ADAPTED}model\.', 'model.language_model.'),
    (rf'^llm\.{_ADAPTED}lm_head\.', 'lm_head.'),
    (rf'^llm\.{_ADAPTED}output\.', 'lm_head.'),
    (rf'^visual_encoder\.{_ADAPTED}(vision_model\.)?', 'model.vision_tower.'),
    (r'^projector\.(model\.)?0\.', 'model.multi_modal_projector.linear_1.'),
    (r'^projector\.(model\.)?2\.', 'model.multi_modal_projector.linear_2.'),
)
_INTERNVL = _rules(
    (rf'^(model\.)?language_model\.{_ADAPTED}model\.', 'model.language_model.'),
    (rf'^(model\.)?language_model\.{_ADAPTED}(lm_head|output)\.', 'lm_head.'),
    (r'^(model\.)?mlp1\.0\.', 'model.multi_modal_projector.layer_norm.'),
    (r'^(model\.)?mlp1\.1\.', 'model.multi_modal_projector.linear_1.'),
    (r'^(model\.)?mlp1\.3\.', 'model.multi_modal_projector.linear_2.'),
    (rf'^(model\.)?vision_model\.{_ADAPTED}embeddings\.class_embedding$', 'model.vision_tower.embeddings.cls_token'),
    (
        rf'^(model\.)?vision_model\.{_ADAPTED}embeddings\.patch_embedding\.',
        'model.vision_tower.embeddings.patch_embeddings.projection.',
    ),
    (
        rf'^(model\.)?vision_model\.{_ADAPTED}embeddings\.position_embedding$',
        'model.vision_tower.embeddings.position_embeddings',
    ),
    (rf'^(model\.)?vision_model\.{_ADAPTED}encoder\.layers\.', 'model.vision_tower.encoder.layer.'),
    (r'(?<=model\.vision_tower\.encoder\.layer\.)(\d+)\.attn\.proj\.', r'\1.attention.projection_layer.'),
    (r'(?<=model\.vision_tower\.encoder\.layer\.)(\d+)\.norm1\.', r'\1.layernorm_before.'),
    (r'(?<=model\.vision_tower\.encoder\.layer\.)(\d+)\.norm2\.', r'\1.layernorm_after.'),
    (r'(?<=model\.vision_tower\.encoder\.layer\.)(\d+)\.ls(\d)$', r'\1.lambda_\2'),
)
_INTERNLM2 = _rules(
    (r'\.tok_embeddings\.', '.embed_tokens.'),
    (r'^output\.', 'lm_head.'),
    (r'\.attention\.wo\.', '.self_attn.o_proj.'),
    (r'\.feed_forward\.w1\.', '.mlp.gate_proj.'),
    (r'\.feed_forward\.w3\.', '.mlp.up_proj.'),
    (r'\.feed_forward\.w2\.', '.mlp.down_proj.'),
    (r'\.attention_norm\.', '.input_layernorm.'),
    (r'\.ffn_norm\.', '.post_attention_layernorm.'),
)
_XTUNER: Mapping[str, tuple[_Rule, ...]] = {'llava': _LLAVA, 'llava_next': _LLAVA, 'internvl': _INTERNVL}


def _renamed(name: str, rules: tuple[_Rule, ...]) -> str:
    for pattern, new in rules:
        name = pattern.sub(new, name)
    return name


def adapter_name(name: str) -> str:
    """The name of ours for a tensor of ``adapter_model.safetensors``."""
    name = name.removeprefix(_PEFT)
    layer, mark, rest = name.partition('.lora_')
    if not mark or '.default' in rest:
        return name
    kind, _, tail = rest.partition('.')
    return f'{layer}.lora_{kind}.default.{tail or "weight"}'


def place_of(name: str, *, family: Family, places: Mapping[str, str]) -> str | None:
    """The name of ours for a weight of a legacy checkpoint; None if it has none.

    Args:
        name: in the file.
        family: of the model.
        places: every name by which a weight of the model is known -> its name.
    """
    plain = name.removeprefix('module.')
    foreign = _renamed(_renamed(plain, _XTUNER.get(family.model_type, _TEXT)), _INTERNLM2)
    for candidate in (plain, plain.removeprefix('model.'), foreign):
        if candidate in places:
            return places[candidate]
    return None


def unfused(weights: Weights, *, family: Family, text_config: Any) -> Iterator[tuple[str, Weight]]:
    """The same weights, those that hold queries, keys and values in one cut in three.

    InternLM2's ``wqkv`` holds for every key head its queries, its key and its value, one after the other; InternVL's
    ``attn.qkv`` all queries, all keys, all values.
    """
    for name, weight in weights.items():
        if (at := name.find('.attention.wqkv.')) >= 0 and '.lora_' not in name:
            head, tail = name[:at], name[at + len('.attention.wqkv.') :]
            for part in 'qkv':
                yield f'{head}.self_attn.{part}_proj.{tail}', _head_rows(weight, part, text_config)
        elif family.model_type == 'internvl' and (at := name.find('.attn.qkv.')) >= 0 and '.lora_' not in name:
            head, tail = name[:at], name[at + len('.attn.qkv.') :]
            for i, part in enumerate('qkv'):
                yield f'{head}.attention.{part}_proj.{tail}', _third(weight, i)
        else:
            yield name, weight


def _third(weight: Weight, index: int) -> Weight:
    rows = weight.shape[0] // 3
    return Weight(
        (rows, *weight.shape[1:]), lambda: weight.read()[index * rows : (index + 1) * rows], f'{weight.origin}[{index}]'
    )


def _head_rows(weight: Weight, part: str, config: Any) -> Weight:
    groups = config.num_key_value_heads
    each = config.num_attention_heads // groups  # queries of a key head
    size = weight.shape[0] // (groups * (each + 2))
    chosen = dict(q=slice(0, each), k=slice(-2, -1), v=slice(-1, None))[part]
    rest = weight.shape[1:]
    rows = groups * size * (each if part == 'q' else 1)

    def read() -> Tensor:
        heads = weight.read().view(groups, each + 2, size, *rest)
        return heads[:, chosen].reshape(rows, *rest)

    return Weight((rows, *rest), read, f'{weight.origin}[{part}]')
