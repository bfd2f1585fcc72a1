"""The one table of model knowledge: where the parts of a family live and what it needs.

Pure data and dotted names: importing this file imports neither torch nor transformers. Data and models both read it.
Adding a model that transformers already has means one row here, one recipe, one test. Module paths are the names of
transformers 5 (they are not the names on disk; ``save_pretrained`` maps those back).
"""

import difflib
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from vlmtune.utils.errors import ModelError

PartName: TypeAlias = Literal['vision_encoder', 'projector', 'llm', 'embeddings', 'lm_head']
PARTS: tuple[PartName, ...] = ('vision_encoder', 'projector', 'llm', 'embeddings', 'lm_head')


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        model_type: ``config.model_type`` of the checkpoint.
        auto_class: which ``AutoModelFor...`` of transformers loads it.
        vision_encoder, projector, llm, embeddings, lm_head: module paths of the part, seen from the whole model. A path
            inside another part's path belongs to the inner one (Qwen's merger lies inside ``model.visual``).
        placeholder: dotted name of the function that says what one image becomes in the token sequence.
        positions: 'rope' (one axis) or 'mrope' (time, height, width).
        packing: whether samples that share a row are kept apart by restarting ``position_ids``.
        no_packing_reason: why not, for the error message.
        image_inputs: the tensors that the image processor makes for this family.
        image_dim: the axis along which the images of several samples are joined.
        casts_images: image features are cast to the dtype of the model's first weight, so text embeddings must be, too.
        image_settings: what the family's processor sets on its image processor, over what its files say.
    """

    model_type: str
    auto_class: Literal['image_text_to_text', 'causal_lm']
    llm: tuple[str, ...]
    embeddings: tuple[str, ...]
    lm_head: tuple[str, ...] = ('lm_head',)
    vision_encoder: tuple[str, ...] = ()
    projector: tuple[str, ...] = ()
    placeholder: str | None = None
    positions: Literal['rope', 'mrope'] = 'rope'
    packing: bool = True
    no_packing_reason: str = ''
    image_inputs: tuple[str, ...] = ()
    image_dim: int = 0
    casts_images: bool = False
    image_settings: tuple[tuple[str, Any], ...] = ()

    @property
    def has_vision(self) -> bool:
        """Whether the family takes images."""
        return bool(self.vision_encoder)

    def part_paths(self, part: PartName) -> tuple[str, ...]:
        """Module paths of one part; empty where the family lacks it."""
        return getattr(self, part)


def _text(model_type: str, **kwargs: Any) -> Family:
    return Family(model_type, 'causal_lm', llm=('model',), embeddings=('model.embed_tokens',), **kwargs)


def _vlm(
    model_type: str, *, vision: str, projector: tuple[str, ...], llm: str = 'model.language_model', **kwargs: Any
) -> Family:
    return Family(
        model_type,
        'image_text_to_text',
        llm=(llm,),
        embeddings=(f'{llm}.embed_tokens',),
        vision_encoder=(vision,),
        projector=projector,
        **kwargs,
    )


def _qwen_vl(model_type: str, *, projector: tuple[str, ...] = ('model.visual.merger',)) -> Family:
    return _vlm(
        model_type,
        vision='model.visual',
        projector=projector,
        placeholder='vlmtune.data.placeholders.patch_grid',
        positions='mrope',
        image_inputs=('pixel_values', 'image_grid_thw'),
    )


_DEEPSTACK = ('model.visual.merger', 'model.visual.deepstack_merger_list')


def _tower(model_type: str, **kwargs: Any) -> Family:
    return _vlm(model_type, vision='model.vision_tower', projector=('model.multi_modal_projector',), **kwargs)


def _idefics(model_type: str) -> Family:
    return _vlm(
        model_type,
        vision='model.vision_model',
        projector=('model.connector',),
        llm='model.text_model',
        placeholder='vlmtune.data.placeholders.rows_and_columns',
        image_inputs=('pixel_values', 'pixel_attention_mask'),
        image_dim=1,
        casts_images=True,
    )


_ROWS = (
    # text only: full causal attention, so restarting positions isolate
    *(_text(name) for name in ('llama', 'qwen2', 'qwen3', 'mistral', 'gemma', 'granite', 'olmo2', 'phi3', 'smollm3')),
    _qwen_vl('qwen2_vl'),
    _qwen_vl('qwen2_5_vl'),
    _qwen_vl('qwen3_vl', projector=_DEEPSTACK),
    _qwen_vl('qwen3_vl_moe', projector=_DEEPSTACK),
    _tower('llava', placeholder='vlmtune.data.placeholders.fixed_grid', image_inputs=('pixel_values',)),
    _tower(
        'internvl',
        placeholder='vlmtune.data.placeholders.tiles',
        image_inputs=('pixel_values',),
        image_settings=(('crop_to_patches', True),),
    ),
    _idefics('smolvlm'),
    _idefics('idefics3'),
)

FAMILIES: dict[str, Family] = {row.model_type: row for row in _ROWS}


def find_family(model_type: str) -> Family:
    """The row of ``model_type``.

    Raises:
        ModelError: there is no such row; the nearest one is named.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    near = difflib.get_close_matches(model_type, FAMILIES, n=1)
    hint = f', the nearest is {near[0]!r}' if near else ''
    raise ModelError(
        f'model type {model_type!r} is not supported{hint}; supported are {", ".join(sorted(FAMILIES))} '
        '(CONTRIBUTING.md says how to add a family)'
    )
